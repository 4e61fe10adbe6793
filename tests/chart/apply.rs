//! What the API server says to what is rendered, in a dry run with warnings as errors.

use std::fs;

use testbed::{
    controlplane::ControlPlane,
    helm::{chart, helm},
    operator::NAMESPACE,
};
use tokio::sync::OnceCell;

use crate::render::{full_values, path, text};

/// An API server that knows our CRD, and what stands for those of cert-manager and Prometheus.
pub async fn cluster() -> &'static ControlPlane {
    static CLUSTER: OnceCell<ControlPlane> = OnceCell::const_new();
    CLUSTER.get_or_init(|| async { start().await.unwrap() }).await
}

async fn start() -> anyhow::Result<ControlPlane> {
    let control_plane = ControlPlane::start().await?;
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chart/crds.yaml");
    for crds in
        [fs::read_to_string(chart().join("crds/registryaliases.yaml"))?, fs::read_to_string(fixtures)?]
    {
        control_plane.apply(&crds).await?;
    }
    control_plane.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]).await?;
    for namespace in [NAMESPACE, "web", "jobs"] {
        control_plane.kubectl(&["create", "namespace", namespace]).await?;
    }
    // What a controller would make. The pod of `helm test` runs as it.
    control_plane.service_account(NAMESPACE, "default").await?;
    Ok(control_plane)
}

async fn dry_run(yaml: &str, namespace_level: &str) {
    let cluster = cluster().await;
    let mut namespaced = yaml.to_owned();
    if namespace_level == "restricted" {
        // Another namespace than that of the full values: the tests run side by side.
        let name = cluster
            .namespace(
                "restricted",
                &[
                    ("pod-security.kubernetes.io/enforce", "restricted"),
                    ("pod-security.kubernetes.io/warn", "restricted"),
                ],
            )
            .await
            .unwrap();
        namespaced = namespaced.replace("namespace: ecr-cname\n", &format!("namespace: {name}\n"));
        assert_ne!(namespaced, yaml);
    }
    let args = ["apply", "--dry-run=server", "--warnings-as-errors", "-f", "-"];
    let applied = cluster.kubectl_stdin(&args, &namespaced).await.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(applied.lines().count() > 20, "{applied}");
}

/// With the defaults, every pod passes the level `restricted`, those of hooks included.
#[tokio::test]
async fn the_defaults_pass_the_api_server_in_a_restricted_namespace() {
    dry_run(&text(&[]).await.unwrap(), "restricted").await;
}

/// Everything set: cert-manager and Prometheus, too.
#[tokio::test]
async fn the_full_values_pass_the_api_server() {
    let full = full_values();
    let rendered = text(&["--values", path(&full)]).await.unwrap();
    for kind in ["Certificate", "Issuer", "ServiceMonitor", "NetworkPolicy", "RegistryAlias"] {
        assert!(rendered.contains(&format!("kind: {kind}\n")), "{kind}");
    }
    dry_run(&rendered, "privileged").await;
    let pod_monitor = ["--set", "metrics.serviceMonitor.enabled=false,metrics.podMonitor.enabled=true"];
    let args: Vec<&str> = ["--values", path(&full)].into_iter().chain(pod_monitor).collect();
    dry_run(&text(&args).await.unwrap(), "privileged").await;
}

#[tokio::test]
async fn helm_finds_nothing_to_complain_about() {
    let (chart, full) = (chart(), full_values());
    helm(&["lint", "--strict", path(&chart)]).await.unwrap();
    helm(&["lint", "--strict", path(&chart), "--values", path(&full)]).await.unwrap();
    // An older cluster is told at once.
    let error = text(&["--kube-version", "1.29.9"]).await.unwrap_err().to_string();
    assert!(error.contains("which is incompatible with Kubernetes v1.29.9"), "{error}");
    text(&["--kube-version", "1.30.0-eks-1234567"]).await.unwrap();
}
