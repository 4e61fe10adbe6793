//! IRSA, as the pod identity webhook of EKS injects it: a pod whose service account names a role gets a token for AWS.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

use crate::controlplane::ControlPlane;

/// The API server needs about a second to learn of a policy.
const LIMIT: Duration = Duration::from_secs(30);

/// Installs the policy, and returns when pods are subject to it.
pub(super) async fn install(control_plane: &ControlPlane) -> Result<()> {
    control_plane.apply(include_str!("identity.yaml")).await?;
    let probe = include_str!("identity-probe.yaml");
    control_plane.apply(probe).await?;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: { name: probe, namespace: testbed-identity }\n\
               spec: { serviceAccountName: probe, containers: [{ name: app, image: probe }] }\n";
    let create =
        ["create", "--dry-run=server", "--output=jsonpath={.spec.containers[0].env[*].name}", "--filename=-"];
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = control_plane.kubectl_stdin(&create, pod).await;
        if answer.as_ref().is_ok_and(|names| names.contains("AWS_WEB_IDENTITY_TOKEN_FILE")) {
            break;
        }
        if Instant::now() > deadline {
            bail!("pods get no identity: {answer:?}");
        }
        sleep(Duration::from_millis(100)).await;
    }
    control_plane.kubectl(&["delete", "namespace", "testbed-identity", "--wait=false"]).await?;
    Ok(())
}
