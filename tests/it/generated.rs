//! What is generated is up to date, and what is shown in documents is accepted by the API server.

use std::{fs, path::Path};

use crate::cluster::{Cluster, binary, shared};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_crd_in_manifests_is_the_one_of_the_types() {
    let printed = std::process::Command::new(binary()).arg("crd").output().unwrap().stdout;
    let kept = fs::read(root().join("manifests/crd.yaml")).unwrap();
    assert!(printed == kept, "run `cargo testbed generate`");
}

/// docs/security.md says of each thing that nobody can do which test tries it.
#[test]
fn every_test_that_the_threat_model_names_exists() {
    let model = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let mut code = String::new();
    let mut directories = vec![root().join("src"), root().join("tests")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                code += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let is_test = |name: &&str| {
        name.matches('_').count() > 1
            && !name.starts_with("ecr_cname_")
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let named: Vec<_> = model.split('`').skip(1).step_by(2).filter(is_test).collect();
    assert!(named.len() > 40, "only {} tests are named", named.len());
    for name in named {
        assert!(code.contains(&format!("fn {name}(")), "there is no test {name}");
    }
}

#[tokio::test]
async fn every_manifest_and_every_manifest_in_documents_passes_a_server_side_dry_run() {
    let cluster = shared().await;
    let mut checked = 0;
    for file in fs::read_dir(root().join("manifests")).unwrap() {
        dry_run(cluster, &fs::read_to_string(file.unwrap().path()).unwrap()).await;
        checked += 1;
    }
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let documents = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    for document in documents.chain([root().join("README.md")]) {
        let text = fs::read_to_string(document).unwrap();
        for snippet in text.split("```yaml\n").skip(1) {
            let yaml = snippet.split("```").next().unwrap();
            // Files of the API server itself are no objects.
            let is_file = yaml.contains("kind: Config\n") || yaml.contains("kind: AdmissionConfiguration");
            if yaml.contains("apiVersion:") && !is_file {
                dry_run(cluster, yaml).await;
                checked += 1;
            }
        }
    }
    assert!(checked >= 9, "only {checked} manifests found");
}

async fn dry_run(cluster: &Cluster, yaml: &str) {
    let args = ["apply", "--dry-run=server", "--server-side", "--force-conflicts", "-f", "-"];
    if let Err(error) = cluster.control_plane.kubectl_stdin(&args, yaml).await {
        panic!("{error:#}\n{yaml}");
    }
}
