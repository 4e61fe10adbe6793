//! Each file in `tests/fixtures/chart/cases/` is a test: values, and what becomes of them.

use std::{collections::BTreeMap, fs, path::Path};

use futures::future::join_all;
use serde::Deserialize;
use serde_json::Value;

use crate::render::{Objects, render};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    #[serde(default = "empty")]
    values: Value,
    /// The object → `absent`, or JSON pointers into it → what is there. A pointer that ends with `/*` stands for any item of
    /// a list, one with a negative number counts from its end, and `null` means that there is nothing.
    expect: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    values: Value,
    says: String,
}

fn empty() -> Value {
    Value::Object(serde_json::Map::new())
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chart")
}

#[tokio::test]
async fn every_case() {
    let mut files: Vec<_> =
        fs::read_dir(fixtures().join("cases")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 15);
    let problems = join_all(files.iter().map(async |file| {
        let name = file.file_stem().unwrap().to_string_lossy();
        let case: Case = serde_yaml_ng::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        let objects = render(&case.values).await.unwrap();
        check(&objects, &case).into_iter().map(|problem| format!("{name}: {problem}")).collect::<Vec<_>>()
    }))
    .await
    .concat();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

fn check(objects: &Objects, case: &Case) -> Vec<String> {
    let mut problems = Vec::new();
    for (id, expected) in &case.expect {
        let (object, expected) = match (objects.find(id), expected) {
            (None, Value::String(absent)) if absent == "absent" => continue,
            (Some(object), Value::Object(expected)) => (object, expected),
            (Some(_), _) => {
                problems.push(format!("{id} is there"));
                continue;
            }
            (None, _) => {
                problems.push(format!("there is no {id}"));
                continue;
            }
        };
        for (pointer, expected) in expected {
            if let Some(list) = pointer.strip_suffix("/*") {
                let actual = object.pointer(list).unwrap_or(&Value::Null);
                if !actual.as_array().is_some_and(|items| items.contains(expected)) {
                    problems.push(format!("{id} {list}: {expected} is not in {actual}"));
                }
            } else {
                let actual = look_up(object, pointer).unwrap_or(&Value::Null);
                if actual != expected {
                    problems.push(format!("{id} {pointer}: {actual}, not {expected}"));
                }
            }
        }
    }
    problems
}

fn look_up<'a>(object: &'a Value, pointer: &str) -> Option<&'a Value> {
    if let Some((list, from_end)) = pointer.rsplit_once("/-") {
        let list = object.pointer(list)?.as_array()?;
        return list.get(list.len().checked_sub(from_end.parse().ok()?)?);
    }
    object.pointer(pointer)
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    let text = fs::read_to_string(fixtures().join("refused.yaml")).unwrap();
    let cases: Vec<Refused> = serde_yaml_ng::from_str(&text).unwrap();
    join_all(cases.iter().map(async |case| match render(&case.values).await {
        Ok(_) => panic!("{} is rendered", case.values),
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains(&case.says), "{}: {error}", case.values);
        }
    }))
    .await;
}
