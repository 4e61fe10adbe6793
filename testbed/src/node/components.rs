//! kubelet, kube-controller-manager, kube-scheduler and kube-proxy: how each is started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::containerd::Containerd;
use super::machine::Machine;
use crate::binaries::NodeBinaries;
use crate::controlplane::ControlPlane;
use crate::dns::DOMAIN;
use crate::process::Process;

/// The name of the node.
pub(super) const NODE: &str = "node";

/// The running components.
pub(super) struct Components {
    processes: Vec<Process>,
}

impl Components {
    /// Starts all of them; none waits for another.
    pub(super) fn start(
        machine: &Machine,
        control_plane: &ControlPlane,
        binaries: &NodeBinaries,
    ) -> Result<Self> {
        let start = Start { machine, control_plane };
        let processes = vec![
            start.controller_manager(&binaries.kube_controller_manager)?,
            start.scheduler(&binaries.kube_scheduler)?,
            start.proxy(&binaries.kube_proxy)?,
            start.kubelet(&binaries.kubelet)?,
        ];
        Ok(Self { processes })
    }

    /// Fails if one of them has ended.
    pub(super) fn check(&self) -> Result<()> {
        match self.processes.iter().find(|process| !process.is_running()) {
            Some(process) => bail!("{} ended:\n{}", process.name(), process.log_tail(20)),
            None => Ok(()),
        }
    }

    /// The end of each log, for error messages.
    pub(super) fn logs(&self) -> String {
        self.processes
            .iter()
            .map(|process| format!("{}:\n{}\n", process.name(), process.log_tail(10)))
            .collect()
    }
}

struct Start<'a> {
    machine: &'a Machine,
    control_plane: &'a ControlPlane,
}

impl Start<'_> {
    fn controller_manager(&self, program: &Path) -> Result<Process> {
        let file = |name: &str| self.control_plane.dir().join(name).display().to_string();
        let mut command = self.machine.command_in_network(program);
        command
            .arg(format!("--kubeconfig={}", self.kubeconfig("kube-controller-manager")))
            .arg(format!("--root-ca-file={}", file("ca.crt")))
            .arg(format!("--service-account-private-key-file={}", file("service-account.key")))
            .args(["--use-service-account-credentials=true", "--leader-elect=false"])
            .args(["--bind-address=127.0.0.1", &format!("--cert-dir={}", file("controller-manager"))]);
        self.spawn("kube-controller-manager", &command)
    }

    fn scheduler(&self, program: &Path) -> Result<Process> {
        let mut command = self.machine.command_in_network(program);
        command
            .arg(format!("--kubeconfig={}", self.kubeconfig("kube-scheduler")))
            .args(["--leader-elect=false", "--bind-address=127.0.0.1"])
            .arg(format!("--cert-dir={}", self.control_plane.dir().join("scheduler").display()));
        self.spawn("kube-scheduler", &command)
    }

    fn proxy(&self, program: &Path) -> Result<Process> {
        let config = self.config(
            "kube-proxy",
            &json!({
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "iptables",
                "clientConnection": { "kubeconfig": self.kubeconfig("kube-proxy") },
                "hostnameOverride": NODE,
                "oomScoreAdj": 0,
                // These are the whole machine's, and not ours to change.
                "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
                // Rules follow endpoints at once: a test that restarts the webhook waits for them.
                "iptables": { "minSyncPeriod": "0s" },
            }),
        )?;
        let mut command = self.machine.command(program);
        command.arg(format!("--config={}", config.display()));
        self.spawn("kube-proxy", &command)
    }

    fn kubelet(&self, program: &Path) -> Result<Process> {
        let config = self.config(
            "kubelet",
            &json!({
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "containerRuntimeEndpoint": format!("unix://{}", Containerd::SOCKET),
                // Only this machine reaches the kubelet.
                "address": Machine::ADDRESS.to_string(),
                "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
                "authorization": { "mode": "AlwaysAllow" },
                "registerNode": true,
                "clusterDNS": [Machine::ADDRESS.to_string()],
                "clusterDomain": DOMAIN,
                // Any machine will do: with cgroups of either version, with swap, and nearly full.
                "cgroupDriver": "cgroupfs",
                "cgroupsPerQOS": false,
                "enforceNodeAllocatable": [],
                "failCgroupV1": false,
                "failSwapOn": false,
                "localStorageCapacityIsolation": false,
                "evictionHard": {
                    "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
                    "imagefs.available": "0%", "imagefs.inodesFree": "0%",
                },
                "imageGCHighThresholdPercent": 100,
                "oomScoreAdj": 0,
                // What tests wait for should not wait for a cycle.
                "syncFrequency": "10s",
                "serializeImagePulls": false,
            }),
        )?;
        let mut command = self.machine.command(program);
        command
            .arg(format!("--config={}", config.display()))
            .arg(format!("--kubeconfig={}", self.kubeconfig("kubelet")))
            .arg(format!("--hostname-override={NODE}"))
            .arg(format!("--node-ip={}", Machine::ADDRESS));
        self.spawn("kubelet", &command)
    }

    fn kubeconfig(&self, program: &str) -> String {
        self.control_plane.component_kubeconfig(program).display().to_string()
    }

    fn config(&self, program: &str, config: &Value) -> Result<PathBuf> {
        let path = self.machine.dir().join(format!("{program}.json"));
        fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn spawn(&self, name: &str, command: &Command) -> Result<Process> {
        Process::spawn(name, command, &self.machine.dir().join(format!("{name}.log")))
    }
}
