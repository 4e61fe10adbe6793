//! The Go programs: the control plane, the node, Helm, and what runs in containers.
//!
//! They are pinned like any other dependency, in a Go module for each of `testbed/controlplane`,
//! `testbed/helm` and `testbed/images`, and built from source the first time they are needed: who starts no
//! node builds no kubelet. `KUBEBUILDER_ASSETS` names a directory that has the control plane already.

mod go_module;
mod progress;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use go_module::{GoModule, Program};

/// Where the control plane's programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// The API server.
    pub kube_apiserver: PathBuf,
    /// Its storage.
    pub etcd: PathBuf,
    /// The command line client.
    pub kubectl: PathBuf,
}

/// Where the programs are that make a machine a node, and a cluster of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeBinaries {
    /// Runs the pods.
    pub kubelet: PathBuf,
    /// Makes pods of Deployments, service accounts of namespaces, and so on.
    pub kube_controller_manager: PathBuf,
    /// Gives the pods to the node.
    pub kube_scheduler: PathBuf,
    /// Makes the addresses of Services work.
    pub kube_proxy: PathBuf,
}

/// Where the programs are that run in containers. They are static.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBinaries {
    /// Holds the namespaces of a pod.
    pub pause: PathBuf,
    /// Stands for whatever people run.
    pub app: PathBuf,
}

/// Kubernetes and etcd, quickest build first.
const ETCD: Program = Program { name: "etcd", package: "go.etcd.io/etcd/server/v3" };
const KUBE_APISERVER: Program =
    Program { name: "kube-apiserver", package: "k8s.io/kubernetes/cmd/kube-apiserver" };
const KUBECTL: Program = Program { name: "kubectl", package: "k8s.io/kubernetes/cmd/kubectl" };
const KUBELET: Program = Program { name: "kubelet", package: "k8s.io/kubernetes/cmd/kubelet" };
const KUBE_CONTROLLER_MANAGER: Program =
    Program { name: "kube-controller-manager", package: "k8s.io/kubernetes/cmd/kube-controller-manager" };
const KUBE_SCHEDULER: Program =
    Program { name: "kube-scheduler", package: "k8s.io/kubernetes/cmd/kube-scheduler" };
const KUBE_PROXY: Program = Program { name: "kube-proxy", package: "k8s.io/kubernetes/cmd/kube-proxy" };
const HELM: Program = Program { name: "helm", package: "helm.sh/helm/v4/cmd/helm" };
const PAUSE: Program = Program { name: "pause", package: "./pause" };
const APP: Program = Program { name: "app", package: "./app" };

/// Finds the control plane's programs, and builds them if need be. Blocks, for minutes the first time.
pub fn locate() -> Result<Binaries> {
    if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS").filter(|assets| !assets.is_empty()) {
        let binaries = Binaries::in_dir(Path::new(&assets));
        for path in [&binaries.kube_apiserver, &binaries.etcd, &binaries.kubectl] {
            ensure!(path.is_file(), "KUBEBUILDER_ASSETS is set, but there is no {}", path.display());
        }
        return Ok(binaries);
    }
    let dir = kubernetes()?
        .build(&[ETCD, KUBE_APISERVER, KUBECTL])
        .context("if you have kube-apiserver, etcd and kubectl, set KUBEBUILDER_ASSETS to their directory")?;
    Ok(Binaries::in_dir(&dir))
}

/// Finds the node's programs, and builds them if need be. Blocks, for minutes the first time.
pub fn node() -> Result<NodeBinaries> {
    let dir = kubernetes()?.build(&[KUBELET, KUBE_CONTROLLER_MANAGER, KUBE_SCHEDULER, KUBE_PROXY])?;
    Ok(NodeBinaries {
        kubelet: dir.join(KUBELET.name),
        kube_controller_manager: dir.join(KUBE_CONTROLLER_MANAGER.name),
        kube_scheduler: dir.join(KUBE_SCHEDULER.name),
        kube_proxy: dir.join(KUBE_PROXY.name),
    })
}

/// Finds Helm, and builds it if need be. Blocks, for minutes the first time.
pub fn helm() -> Result<PathBuf> {
    let module = GoModule::read("helm", Some("helm.sh/helm/v4"))?;
    let ldflags = format!("-X helm.sh/helm/v4/internal/version.version={}", module.version());
    Ok(module.ldflags(ldflags).build(&[HELM])?.join(HELM.name))
}

/// Finds the programs for the images, and builds them if need be, within seconds.
pub fn images() -> Result<ImageBinaries> {
    let dir = GoModule::read("images", None)?.build(&[PAUSE, APP])?;
    Ok(ImageBinaries { pause: dir.join(PAUSE.name), app: dir.join(APP.name) })
}

impl Binaries {
    fn in_dir(dir: &Path) -> Self {
        Self {
            kube_apiserver: dir.join(KUBE_APISERVER.name),
            etcd: dir.join(ETCD.name),
            kubectl: dir.join(KUBECTL.name),
        }
    }
}

fn kubernetes() -> Result<GoModule> {
    let module = GoModule::read("controlplane", Some("k8s.io/kubernetes"))?;
    let ldflags = kubernetes_ldflags(module.version())?;
    Ok(module.ldflags(ldflags))
}

/// A program that does not know its version is refused by clients.
fn kubernetes_ldflags(version: &str) -> Result<String> {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        bail!("{version} is no version of Kubernetes");
    };
    let package = "k8s.io/component-base/version";
    Ok(format!(
        "-X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_linked_in() -> Result<()> {
        let flags = kubernetes_ldflags("v1.36.3")?;
        assert!(flags.contains("gitVersion=v1.36.3 "));
        assert!(flags.contains("gitMajor=1 "));
        assert!(flags.ends_with("gitMinor=36"));
        Ok(())
    }

    #[test]
    fn every_module_can_be_read() -> Result<()> {
        assert!(kubernetes()?.version().starts_with("v1."));
        assert!(GoModule::read("helm", Some("helm.sh/helm/v4"))?.version().starts_with("v4."));
        GoModule::read("images", None)?;
        Ok(())
    }
}
