use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::Api;
use kube::api::ListParams;
use testbed::controlplane::ControlPlane;

use crate::shared;

const CONFIG_MAP: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: kept}, data: {answer: '42'}}";

#[tokio::test]
async fn clients_of_any_runtime_reach_it() -> Result<()> {
    let control_plane = shared().await?;
    let version = control_plane.kube_client()?.apiserver_version().await?;
    assert!(version.git_version.starts_with("v1."), "{}", version.git_version);

    // The runtime that this test has ends with it; the next one brings its own.
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            Api::<Namespace>::all(shared().await?.kube_client()?).get("default").await?;
            anyhow::Ok(())
        })
    })
    .join()
    .map_err(|_| anyhow::anyhow!("panicked"))?
}

#[tokio::test]
async fn kubectl_is_the_real_one() -> Result<()> {
    let control_plane = shared().await?;
    let namespace = control_plane.namespace("kubectl", &[("team", "a")]).await?;
    assert_eq!(
        control_plane
            .kubectl(&["get", "namespace", &namespace, "-o", "jsonpath={.metadata.labels.team}"])
            .await?,
        "a"
    );
    control_plane
        .apply(&CONFIG_MAP.replace("name: kept", &format!("name: kept, namespace: {namespace}")))
        .await?;
    let error = control_plane.kubectl(&["get", "configmap", "missing"]).await.expect_err("there is none");
    assert!(format!("{error:#}").contains("NotFound"), "{error:#}");

    // Admission wants the service account that a controller would have made.
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: pod}, spec: {containers: [{name: c, image: i}]}}";
    control_plane.kubectl_stdin(&["create", "--namespace", &namespace, "--filename", "-"], pod).await?;
    let pods =
        Api::<Pod>::namespaced(control_plane.kube_client()?, &namespace).list(&ListParams::default()).await?;
    let spec = pods.items.into_iter().next().and_then(|pod| pod.spec).context("no pod")?;
    assert_eq!(spec.service_account_name.as_deref(), Some("default"));
    Ok(())
}

#[tokio::test]
async fn a_service_account_may_do_what_rbac_grants() -> Result<()> {
    let control_plane = shared().await?;
    let namespace = control_plane.namespace("rbac", &[]).await?;
    control_plane.service_account(&namespace, "reader").await?;
    let kubeconfig = control_plane.kubeconfig_for_service_account(&namespace, "reader").await?;
    let kubeconfig = kubeconfig.to_str().context("no UTF-8")?;

    let get = ["get", "configmaps", "--kubeconfig", kubeconfig];
    let error = control_plane.kubectl(&get).await.expect_err("nothing is granted yet");
    let user = format!("system:serviceaccount:{namespace}:reader");
    assert!(format!("{error:#}").contains(&user), "{error:#}");

    let grant = ["--namespace", &namespace, "create"];
    let role = ["role", "reader", "--verb=list", "--resource=configmaps"];
    let subject = format!("--serviceaccount={namespace}:reader");
    let binding = ["rolebinding", "reader", "--role=reader", &subject];
    control_plane.kubectl(&[&grant[..], &role].concat()).await?;
    control_plane.kubectl(&[&grant[..], &binding].concat()).await?;
    // The authorizer learns of the binding by a watch.
    for _ in 0..100 {
        if control_plane.kubectl(&get).await.is_ok() {
            return Ok(());
        }
    }
    anyhow::bail!("the grant has no effect")
}

#[tokio::test]
async fn data_outlive_every_kind_of_restart() -> Result<()> {
    let started = std::time::Instant::now();
    let control_plane = ControlPlane::start().await?;
    eprintln!("the control plane was ready after {:?}", started.elapsed());
    control_plane.apply(CONFIG_MAP).await?;
    let client = control_plane.kube_client()?;
    let kept = Api::<ConfigMap>::namespaced(client.clone(), "default");

    control_plane.stop_apiserver().await?;
    assert!(kept.get("kept").await.is_err());
    assert!(control_plane.apiserver().is_none());
    control_plane.start_apiserver().await?;
    kept.get("kept").await.context("after a stop of the API server")?;

    control_plane.kill_apiserver().await?;
    control_plane.start_apiserver().await?;
    kept.get("kept").await.context("after the death of the API server")?;

    control_plane.stop_etcd().await?;
    control_plane.start_etcd().await?;
    kept.get("kept").await.context("after a stop of etcd")?;

    // A paused server keeps its connections, and answers nothing.
    let apiserver = control_plane.apiserver().context("the API server runs")?;
    apiserver.pause()?;
    assert!(tokio::time::timeout(Duration::from_millis(300), kept.get("kept")).await.is_err());
    apiserver.resume()?;
    kept.get("kept").await.context("after a pause")?;

    let dir = control_plane.dir().to_owned();
    drop(apiserver);
    drop(control_plane);
    assert!(!dir.exists());
    Ok(())
}
