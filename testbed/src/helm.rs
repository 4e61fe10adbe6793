//! The real Helm, with no repositories, plugins or settings of the user's.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::controlplane::ControlPlane;
use crate::{binaries, testbed_dir, workspace};

/// How long one helm may take.
const TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Where the chart is.
#[must_use]
pub fn chart() -> PathBuf {
    workspace::root().join("charts/ecr-cname")
}

/// Runs Helm without a cluster, and returns what it prints; its complaints are the error.
///
/// The very first call on a machine builds it, see [`binaries::helm`].
///
/// # Errors
/// Helm cannot be built or started, or complains.
pub async fn helm(args: &[&str]) -> Result<String> {
    run(args, None).await
}

/// The same with a cluster, as its admin.
///
/// # Errors
/// Helm cannot be built or started, or complains.
pub async fn helm_in(control_plane: &ControlPlane, args: &[&str]) -> Result<String> {
    run(args, Some(control_plane.kubeconfig())).await
}

async fn run(args: &[&str], kubeconfig: Option<&Path>) -> Result<String> {
    let what = || format!("helm {}", args.join(" "));
    let program = spawn_blocking(binaries::helm).await??;
    let home = testbed_dir().join("helm");
    let mut helm = tokio::process::Command::new(program);
    helm.args(args)
        // Neither a proxy for the API server on this machine, nor anything that the user has set up.
        .env_clear()
        .env("HOME", &home)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(kubeconfig) = kubeconfig {
        helm.arg("--kubeconfig").arg(kubeconfig);
    }
    let output = timeout(TIMEOUT, helm.output())
        .await
        .with_context(|| format!("{} did not end within {TIMEOUT:?}", what()))?
        .with_context(what)?;
    let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {}\n{stdout}", what(), stderr.trim());
    Ok(stdout)
}
