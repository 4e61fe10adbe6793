//! A real node, and with it a whole cluster: containerd and kubelet run pods; kube-controller-manager, kube-scheduler
//! and kube-proxy do what they do everywhere.
//!
//! All of it happens on a [`Machine`] of namespaces, so the host stays as it is.

mod components;
mod containerd;
mod identity;
mod janitor;
mod machine;
mod requirements;

use std::io::Write as _;
use std::sync::{Arc, Once};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::binaries;
use crate::controlplane::ControlPlane;
use crate::image::Image;
use components::{Components, NODE};
use containerd::{Containerd, PAUSE_IMAGE};

pub use machine::Machine;
pub use requirements::{Missing, Requirements};

/// The node is ready about five seconds after its start; a loaded machine may need longer.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Set to anything, it makes a machine that cannot be a node a failure.
const REQUIRE: &str = "ECR_CNAME_REQUIRE_NODE";

/// Whether tests that need a node can run here; where not, says so on standard error, past the capture of the test
/// harness.
///
/// # Errors
/// A node cannot run here, and `ECR_CNAME_REQUIRE_NODE` is set, as it is in CI.
pub fn available() -> Result<bool, Missing> {
    static SAY: Once = Once::new();
    match Requirements::check() {
        Ok(_) => Ok(true),
        Err(missing) if std::env::var_os(REQUIRE).is_some_and(|value| !value.is_empty()) => Err(missing),
        Err(missing) => {
            SAY.call_once(|| {
                let _ = writeln!(std::io::stderr(), "\nSKIPPED: the tests that need a node. {missing}\n");
            });
            Ok(false)
        }
    }
}

/// A running node; dropping it ends it.
pub struct Node {
    // Dropped in this order.
    components: Components,
    _containerd: Containerd,
    machine: Arc<Machine>,
}

impl Node {
    /// Starts a node on the machine that the control plane is on, and returns when it is ready for pods.
    ///
    /// The very first call on a machine builds its programs, see [`binaries::node`].
    pub async fn start(machine: Arc<Machine>, control_plane: &ControlPlane) -> Result<Self> {
        let binaries = spawn_blocking(binaries::node).await??;
        let started = Arc::clone(&machine);
        let containerd = spawn_blocking(move || {
            let containerd = Containerd::start(&started)?;
            import(&started, &Image::pause()?, PAUSE_IMAGE)?;
            Ok::<_, anyhow::Error>(containerd)
        })
        .await??;
        let components = Components::start(&machine, control_plane, &binaries)?;
        let node = Self { components, _containerd: containerd, machine };
        node.wait_ready(control_plane).await?;
        identity::install(control_plane).await?;
        Ok(node)
    }

    /// Puts an image on the node under `name`, so that pods need not pull it.
    pub async fn import(&self, image: Image, name: &str) -> Result<()> {
        let (machine, name) = (Arc::clone(&self.machine), name.to_owned());
        spawn_blocking(move || import(&machine, &image, &name)).await?
    }

    /// Waits for the node, and for what every namespace must have before pods can be made.
    async fn wait_ready(&self, control_plane: &ControlPlane) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        let node = format!("node/{NODE}");
        for wait in [
            &["wait", "--for=create", "--timeout=1s", &node][..],
            &["wait", "--for=condition=Ready", "--timeout=1s", &node],
            &["wait", "--for=create", "--timeout=1s", "serviceaccount/default"],
            &["wait", "--for=create", "--timeout=1s", "configmap/kube-root-ca.crt"],
        ] {
            while let Err(error) = control_plane.kubectl(wait).await {
                self.components.check()?;
                if Instant::now() > deadline {
                    bail!(
                        "the node is not ready after {START_TIMEOUT:?}: {error:#}\n{}",
                        self.components.logs()
                    );
                }
                sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }
}

fn import(machine: &Machine, image: &Image, name: &str) -> Result<()> {
    let archive = machine.dir().join("image.tar");
    image.write_archive(name, &archive)?;
    Containerd::import(machine, &archive)?;
    std::fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))
}
