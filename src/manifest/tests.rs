//! Tables, and properties over generated manifests. Here is what they share.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod properties;
mod refusals;
mod rewriting;
mod yaml;

use super::*;

const ECR: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

/// `acme/…` becomes `ECR/…`.
fn to_ecr(image: &str) -> Option<String> {
    image.strip_prefix("acme/").map(|rest| format!("{ECR}/{rest}"))
}

fn renamed(text: &str) -> String {
    rewrite(text, to_ecr).unwrap_or_else(|error| panic!("{error}\n{text}")).text
}

fn error(text: &str) -> String {
    rewrite(text, to_ecr).map_or_else(|error| error.to_string(), |it| panic!("no error:\n{}", it.text))
}

/// The kinds' paths once more, as data of the test's own.
fn paths(version: &str, kind: &str) -> Option<&'static str> {
    Some(match (version, kind) {
        ("v1", "Pod") => "",
        ("v1", "PodTemplate") => "/template",
        ("v1", "ReplicationController") | ("batch/v1", "Job") => "/spec/template",
        (
            "apps/v1" | "apps/v1beta1" | "apps/v1beta2" | "extensions/v1beta1",
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet",
        ) => "/spec/template",
        ("batch/v1" | "batch/v1beta1", "CronJob") => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

/// What `rewrite` should do to the content, independently of it.
fn expected(value: &mut Value) -> usize {
    let (version, kind) = (value["apiVersion"].as_str(), value["kind"].as_str());
    let (Some(version), Some(kind)) = (version, kind) else { return 0 };
    let path = paths(version, kind);
    if kind.ends_with("List") {
        return value["items"].as_array_mut().into_iter().flatten().map(expected).sum();
    }
    let Some(pod) = path.and_then(|path| value.pointer_mut(path)) else { return 0 };
    if pod["metadata"]["labels"]["ecr-cname.dev/rewrite"] == "disabled"
        || pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some()
    {
        return 0;
    }
    let mut count = 0;
    for list in ["containers", "initContainers", "ephemeralContainers", "volumes"] {
        let Some(items) = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut) else {
            continue;
        };
        for item in items {
            let image = item.pointer_mut(if list == "volumes" { "/image/reference" } else { "/image" });
            if let Some(image) = image
                && let Some(new) = image.as_str().and_then(to_ecr)
            {
                *image = Value::String(new);
                count += 1;
            }
        }
    }
    count
}

fn values(text: &str) -> Vec<Value> {
    let documents = documents(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    documents.into_iter().map(|document| document.value).collect()
}

/// The text as libyaml, and so as another parser than ours, reads it.
fn libyaml(text: &str) -> Vec<Value> {
    let values = serde_yaml_ng::Deserializer::from_str(text).map(|document| {
        let mut value = <serde_yaml_ng::Value as serde::Deserialize>::deserialize(document).expect(text);
        value.apply_merge().expect(text);
        serde_json::to_value(value).expect(text)
    });
    values.collect()
}

/// A pod's text with `body`, in which `ECR` may be written for the host, as its containers.
fn pod(body: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nspec:\n  containers:\n{body}").replace("ECR", ECR)
}
