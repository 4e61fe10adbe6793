//! `values.schema.json` knows the values, all of them and no others.

use std::{collections::BTreeSet, fs};

use ecr_cname::crd::RegistryAlias;
use kube::CustomResourceExt as _;
use serde_json::Value;
use testbed::helm::chart;

use crate::render::{full_values, yaml};

/// Known to the schema without being values of ours: Helm hands them to charts that are part of others.
const HELMS: [&str; 2] = ["enabled", "global"];

/// What the full values leave out: it makes no sense beside what they set, or the webhook's stands for the controller's.
const LEFT_OUT: [&str; 17] = [
    "nameOverride",
    "topologySpreadConstraints",
    "podSecurityContext",
    "securityContext",
    "certificate.issuerRef.name",
    "certificate.issuerRef.kind",
    "certificate.issuerRef.group",
    "metrics.podMonitor.enabled",
    "webhook.dnsPolicy",
    "webhook.serviceAccount.create",
    "controller.serviceAccount.create",
    "controller.hostNetwork",
    "controller.priorityClassName",
    "controller.nodeSelector",
    "controller.tolerations",
    "controller.affinity",
    "controller.topologySpreadConstraints",
];

fn schema() -> Value {
    serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap()
}

/// Follows a reference to a definition.
fn resolve<'a>(schema: &'a Value, node: &'a Value) -> &'a Value {
    let reference = node.get("$ref").and_then(Value::as_str);
    reference.map_or(node, |reference| schema.pointer(reference.trim_start_matches('#')).unwrap())
}

/// The paths of what the schema knows, down to lists, maps of the user's and single values.
fn known(schema: &Value, node: &Value, path: &str, paths: &mut BTreeSet<String>) {
    match resolve(schema, node).get("properties").and_then(Value::as_object) {
        Some(properties) => {
            for (key, node) in properties {
                known(schema, node, &format!("{path}.{key}"), paths);
            }
        }
        None => {
            paths.insert(path.trim_start_matches('.').to_owned());
        }
    }
}

/// The paths in values, as far down as the schema knows keys.
fn present(schema: &Value, node: &Value, values: &Value, path: &str, paths: &mut BTreeSet<String>) {
    let properties = resolve(schema, node).get("properties").and_then(Value::as_object);
    match (properties, values.as_object()) {
        (Some(properties), Some(values)) if !values.is_empty() => {
            for (key, value) in values {
                let node = properties.get(key).unwrap_or_else(|| panic!("{path}.{key} is not in the schema"));
                present(schema, node, value, &format!("{path}.{key}"), paths);
            }
        }
        _ => {
            paths.insert(path.trim_start_matches('.').to_owned());
        }
    }
}

#[test]
fn the_schema_and_the_values_name_the_same() {
    let schema = schema();
    let values = yaml(&fs::read_to_string(chart().join("values.yaml")).unwrap()).remove(0);
    let (mut known_paths, mut present_paths) = (BTreeSet::new(), BTreeSet::new());
    known(&schema, &schema, "", &mut known_paths);
    present(&schema, &schema, &values, "", &mut present_paths);
    known_paths.retain(|path| !HELMS.contains(&path.as_str()));
    // What is empty by default and has keys of its own in the schema is named as a whole in the values.
    let missing: Vec<_> = known_paths
        .iter()
        .filter(|path| {
            !present_paths.contains(*path)
                && !present_paths.iter().any(|whole| path.starts_with(&format!("{whole}.")))
        })
        .collect();
    assert!(missing.is_empty(), "values.yaml does not have {missing:?}");
}

/// The file that the API server is shown must leave out nothing that can be set.
#[test]
fn the_full_values_set_everything_that_can_be_set_together() {
    let schema = schema();
    let full = yaml(&fs::read_to_string(full_values()).unwrap()).remove(0);
    let (mut known_paths, mut present_paths) = (BTreeSet::new(), BTreeSet::new());
    known(&schema, &schema, "", &mut known_paths);
    present(&schema, &schema, &full, "", &mut present_paths);
    let left_out: Vec<_> = known_paths
        .difference(&present_paths)
        .filter(|path| !HELMS.contains(&path.as_str()) && !LEFT_OUT.contains(&path.as_str()))
        .collect();
    assert!(left_out.is_empty(), "ci/full-values.yaml does not set {left_out:?}");
}

/// Nothing that is misspelt may pass for something that has no effect.
#[test]
fn every_object_in_the_schema_is_closed_or_free_on_purpose() {
    fn walk(node: &Value, path: &str) {
        if let Some(object) = node.as_object() {
            // Lists of parts of Kubernetes's API say the fields that they need; the API server knows the others.
            let part_of_kubernetes = path.ends_with(".items");
            if object.contains_key("properties") && !part_of_kubernetes {
                assert_eq!(object["additionalProperties"], false, "{path}");
            }
            for (key, node) in object {
                walk(node, &format!("{path}.{key}"));
            }
        } else if let Some(list) = node.as_array() {
            list.iter().for_each(|node| walk(node, path));
        }
    }
    walk(&schema(), "");
}

#[test]
fn an_alias_in_the_values_has_the_fields_of_the_crd() {
    let crd = serde_json::to_value(RegistryAlias::crd()).unwrap();
    let of_crd = crd.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties").unwrap();
    let schema = schema();
    let of_values = schema.pointer("/definitions/alias/properties").unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(of_values), keys(of_crd));
    let credentials = "/credentials/properties";
    assert_eq!(keys(of_values.pointer(credentials).unwrap()), keys(of_crd.pointer(credentials).unwrap()));
}
