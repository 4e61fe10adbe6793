//! What benchmarks have in common: captured reviews, aliases, and one request from its body to its answer.

use std::{fs, path::Path};

use ecr_cname::{
    alias::{Alias, Group, accept},
    crd::RegistryAlias,
    mutate::{Mutation, Verdict, mutate},
    review::{self, Request},
    table::{AliasTable, HostTable},
};
use serde_json::json;

/// Reviews that a real API server sent; `cargo testbed capture benches/fixtures` writes them.
pub const FIXTURES: [&str; 5] = ["ordinary-2", "create-2", "create-4", "create-26", "update-2"];

pub fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/fixtures").join(format!("{name}.json"));
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// So many aliases. The fixtures name the one whose host comes first: it is in the first part of its group.
pub fn aliases(count: usize) -> Vec<Alias> {
    let objects: Vec<RegistryAlias> = (0..count)
        .map(|n| {
            let host =
                if n == 0 { "docker-ecr.internal.example.io".to_owned() } else { format!("x{n}.example.io") };
            serde_json::from_value(json!({
                "apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
                "metadata": {"name": format!("a{n}"), "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"host": host, "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com"},
            }))
            .unwrap()
        })
        .collect();
    accept(&objects).aliases
}

pub fn decide<'a>(request: &'a Request<'a>, hosts: &'a HostTable) -> Option<Mutation<'a>> {
    match mutate(request, hosts, "ecr-cname") {
        Verdict::Mutate(mutation) => Some(mutation),
        _ => None,
    }
}

/// Body to answer, as the webhook does it.
pub fn answer(body: &[u8], table: &AliasTable) -> Vec<u8> {
    let request = review::parse(body).unwrap();
    let hosts = table.group(Group::of(&Default::default()).as_str()).unwrap();
    review::answer::allow(&request.uid, decide(&request, hosts).as_ref(), None)
}
