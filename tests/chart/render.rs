//! Values in, objects out.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;
use serde::Deserialize as _;
use serde_json::Value;
use testbed::{
    helm::{chart, helm},
    operator::NAMESPACE,
};

/// The objects that the chart renders, hooks included.
pub struct Objects(pub Vec<Value>);

/// Renders the chart as the release `ecr-cname` in the namespace `ecr-cname`.
pub async fn render(values: &Value) -> Result<Objects> {
    let file = values_file(values);
    Ok(Objects::parse(&text(&["--values", path(&file)]).await?))
}

/// What `helm template` prints, with these arguments besides.
pub async fn text(args: &[&str]) -> Result<String> {
    let chart = chart();
    let mut all = vec!["template", NAMESPACE, path(&chart), "--namespace", NAMESPACE];
    all.extend(args);
    helm(&all).await
}

/// Writes values to a file of their own.
pub fn values_file(values: &Value) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("values-{}-{}.json", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&file, values.to_string()).unwrap();
    file
}

/// The values file that sets everything.
pub fn full_values() -> PathBuf {
    chart().join("ci/full-values.yaml")
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn yaml(text: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(text);
    documents.map(|document| Value::deserialize(document).unwrap()).filter(|v| !v.is_null()).collect()
}

impl Objects {
    pub fn parse(text: &str) -> Self {
        Self(yaml(text))
    }

    /// `KIND/NAME`, or `KIND/NAME/NAMESPACE` where that is not the release's.
    pub fn find(&self, id: &str) -> Option<&Value> {
        let mut parts = id.split('/');
        let (kind, name) = (parts.next()?, parts.next()?);
        let namespace = parts.next().unwrap_or(NAMESPACE);
        self.0.iter().find(|object| {
            let metadata = &object["metadata"];
            object["kind"] == kind
                && metadata["name"] == name
                && metadata["namespace"].as_str().is_none_or(|of| of == namespace)
        })
    }

    pub fn get(&self, id: &str) -> &Value {
        self.find(id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// All of one kind.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |object| object["kind"] == kind)
    }
}

/// The flags of a Deployment's or Job's container.
pub fn args(object: &Value) -> Vec<&str> {
    let args = object.pointer("/spec/template/spec/containers/0/args").unwrap();
    args.as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect()
}
