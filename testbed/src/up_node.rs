//! `cargo testbed up --node`: from nothing to a pod that runs under a friendly name.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use testbed::build::{self, Profile};
use testbed::cluster::Cluster;
use testbed::helm::{chart, helm_in};
use testbed::image::Image;
use testbed::node::Requirements;
use testbed::operator::{NAMESPACE, ROLE, SUBJECT};
use testbed::registry::{Caller, HOST};
use testbed::testbed_dir;
use tokio::task::spawn_blocking;

use crate::write_private;

/// The friendly name.
const FRIENDLY: &str = "docker-ecr.internal.example.io";

const ALIAS: &str = "\
apiVersion: ecr-cname.dev/v1alpha1
kind: RegistryAlias
metadata: { name: internal }
spec:
  host: docker-ecr.internal.example.io
  allowedAccounts: [\"123456789012\"]   # which registry it is, the CNAME says
";

const DEPLOYMENT: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: { name: web, namespace: shop }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      containers:
        - name: app
          image: docker-ecr.internal.example.io/team/app:1
";

/// Brings everything up and shows it. Without `once` it never returns unless that fails.
pub(crate) async fn up(once: bool, operator: Option<PathBuf>) -> Result<()> {
    // Before anything is built: whoever lacks a package should not wait for minutes to hear of it.
    Requirements::check()?;
    let started = Instant::now();
    let tell = |what: &str| eprintln!("testbed: {what} ({} s)", started.elapsed().as_secs());

    let operator = build::operator_or(operator, Profile::Dev).await?;
    tell("the operator is compiled");
    let cluster = Cluster::start().await?;
    let (kubeconfig, values) = (testbed_dir().join("kubeconfig"), testbed_dir().join("values.yaml"));
    write_private(&kubeconfig, &fs::read_to_string(cluster.control_plane.kubeconfig())?)?;
    fs::write(&values, cluster.values()).with_context(|| format!("cannot write {}", values.display()))?;
    tell("the node is ready");

    cluster.dns.cname(FRIENDLY, HOST, 60)?;
    cluster.aws.role(ROLE).trusts_subject(SUBJECT);
    let image = spawn_blocking(move || Image::operator(&operator)).await??;
    cluster.load_operator(image).await?;
    let (chart, values) = (chart().display().to_string(), values.display().to_string());
    let install =
        ["install", "ecr-cname", &chart, "--namespace", NAMESPACE, "--create-namespace", "--values", &values];
    helm_in(&cluster.control_plane, &[&install[..], &["--wait", "--timeout=3m"]].concat()).await?;
    tell("the chart is installed");

    let kubectl = &cluster.control_plane;
    kubectl.apply(ALIAS).await?;
    kubectl.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "registryalias/internal"]).await?;
    kubectl.kubectl(&["create", "namespace", "shop"]).await?;
    kubectl.apply(DEPLOYMENT).await?;
    let rollout = ["rollout", "status", "deployment/web", "--namespace=shop", "--timeout=50s"];
    if let Err(error) = kubectl.kubectl(&rollout).await {
        let pods = kubectl.kubectl(&["describe", "pods", "--namespace=shop"]).await?;
        return Err(error.context(format!("the pods of a friendly name do not run:\n{pods}")));
    }
    tell("the pods run");

    println!("\nWhat was applied\n\n{}\n---\n{}", indent(ALIAS), indent(DEPLOYMENT));
    let columns =
        "--output=custom-columns=POD:.metadata.name,STATUS:.status.phase,IMAGE:.spec.containers[*].image";
    for args in [
        &["get", "registryaliases"][..],
        &["get", "pods", "--namespace=shop", columns],
        &["get", "deployment", "web", "--namespace=shop", "--output=wide"],
        &[
            "get",
            "events",
            "--namespace=shop",
            "--field-selector=reason=Pulled",
            "--output=custom-columns=EVENT:.message",
        ],
        &["get", "pods", "--namespace", NAMESPACE],
    ] {
        println!("$ kubectl {}\n{}", args.join(" "), indent(&kubectl.kubectl(args).await?));
    }
    println!("What the registry saw\n");
    for request in cluster.registry.requests_for("team/app") {
        let caller = match request.caller {
            Caller::Token { role, .. } => format!("with a token of {role}"),
            other => format!("{other:?}"),
        };
        println!("  {} {} {} {caller}", request.status, request.method, request.path);
    }
    if once {
        return Ok(());
    }
    println!("\nIn another terminal:\n");
    println!("    export KUBECONFIG='{}'", kubeconfig.display());
    println!("    kubectl describe pods --namespace shop");
    println!("\n`cargo testbed build controlplane` says where a kubectl is. Ctrl-C ends all of it.");
    std::future::pending().await
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
