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
            if yaml.contains("apiVersion:") {
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
