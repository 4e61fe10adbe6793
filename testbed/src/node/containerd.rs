//! containerd, with the network of pods.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::machine::Machine;
use crate::process::Process;

/// The network of the pods.
const PODS: &str = "198.18.1.0/24";

/// The image of the sandbox of every pod, imported before the first.
pub(super) const PAUSE_IMAGE: &str = "testbed.invalid/pause:1";

const START_TIMEOUT: Duration = Duration::from_secs(30);
const IMPORT_TIMEOUT: Duration = Duration::from_secs(60);

/// A running containerd.
pub(super) struct Containerd {
    _process: Process,
}

impl Containerd {
    /// The socket, as seen from within the machine.
    pub(super) const SOCKET: &'static str = "/run/containerd/containerd.sock";

    /// Starts containerd in the machine, and returns when it answers.
    pub(super) fn start(machine: &Machine) -> Result<Self> {
        machine.write("/etc/containerd/config.toml", &config(machine))?;
        machine.write("/etc/cni/net.d/10-pods.conflist", &network().to_string())?;
        let mut command = machine.command("containerd");
        command.args(["--config", "/etc/containerd/config.toml"]);
        let process = Process::spawn("containerd", &command, &machine.dir().join("containerd.log"))?;
        let deadline = Instant::now() + START_TIMEOUT;
        while let Err(error) = machine.run(ctr(machine).arg("version")) {
            if process.wait(Duration::from_millis(50)).is_some() || Instant::now() > deadline {
                bail!("containerd did not start ({error:#}):\n{}", process.log_tail(20));
            }
        }
        Ok(Self { _process: process })
    }

    /// Gives containerd the images of an archive, under the names that the archive says.
    pub(super) fn import(machine: &Machine, archive: &Path) -> Result<()> {
        let mut command = ctr(machine);
        command.args(["images", "import"]).arg(archive);
        machine.run(&mut command).with_context(|| format!("cannot import {}", archive.display()))?;
        Ok(())
    }
}

fn ctr(machine: &Machine) -> Command {
    let mut command = machine.command("timeout");
    command.arg(IMPORT_TIMEOUT.as_secs().to_string()).args([
        "ctr",
        "--address",
        Containerd::SOCKET,
        "--namespace",
        "k8s.io",
    ]);
    command
}

fn config(machine: &Machine) -> String {
    let plugins = machine.cni_plugins().display();
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Lowering the score of a container below our own is not allowed everywhere.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "/etc/cni/net.d"
"#,
        socket = Containerd::SOCKET,
    )
}

/// Each pod is at the end of a cable of its own, and the machine routes: that needs no bridge, and lets kube-proxy see
/// everything.
fn network() -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": PODS }]],
                "routes": [{ "dst": format!("{}/0", Ipv4Addr::UNSPECIFIED) }],
            },
        }],
    })
}
