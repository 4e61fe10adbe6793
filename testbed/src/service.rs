//! The webhook's Service with several replicas behind it.
//!
//! The API server dials the endpoints itself, as managed control planes do, and speaks HTTP/1.1 to them, as it does with
//! every Service (to a URL on loopback it would speak HTTP/2). What kubelet and the controller of EndpointSlices would do is
//! done here: each replica has a slice, which says that it is ready while `/readyz` does. A loopback address is not
//! allowed in a slice, so the replicas listen on an address of this machine.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::background::Background;
use crate::controlplane::ControlPlane;
use crate::http;
use crate::operator::{NAMESPACE, Operator};

/// The Service of `manifests/webhook.yaml`.
const SERVICE: &str = "ecr-cname-webhook";
/// How often replicas are asked whether they are ready. A kubelet sees the end of a container within a second.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// A Service whose endpoints are kept, on a thread of its own, until it is dropped.
pub struct WebhookService {
    address: IpAddr,
    replicas: watch::Sender<Vec<Replica>>,
    said: watch::Receiver<Vec<(Replica, bool)>>,
    _keeper: Background,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Replica {
    name: String,
    admin: SocketAddr,
    webhook: SocketAddr,
}

impl WebhookService {
    /// Keeps the endpoints of the Service that the manifests have made.
    ///
    /// # Errors
    /// This machine has no address but loopback.
    pub fn start(control_plane: &ControlPlane) -> Result<Self> {
        let replicas = watch::Sender::new(Vec::new());
        let (say, said) = watch::channel(Vec::new());
        let keep = keep(control_plane.config_without_retries(), replicas.subscribe(), say);
        let keeper = Background::spawn("endpoints", keep)?;
        Ok(Self { address: own_address()?, replicas, said, _keeper: keeper })
    }

    /// Where replicas listen.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Adds a replica. It gets requests once it is ready.
    pub fn add(&self, operator: &Operator) {
        let replica = Replica {
            name: operator.process().name().to_owned(),
            admin: operator.admin_address(),
            webhook: operator.webhook_address(),
        };
        self.replicas.send_modify(|replicas| replicas.push(replica));
    }

    /// Waits until the slices speak of all replicas as ready, and of no others.
    ///
    /// # Errors
    /// They do not within `limit`.
    pub async fn converged(&self, limit: Duration) -> Result<()> {
        let wanted: Vec<_> = self.replicas.borrow().iter().map(|replica| (replica.clone(), true)).collect();
        let mut said = self.said.clone();
        let waited = timeout(limit, said.wait_for(|said| *said == wanted)).await.map(|_| ());
        waited.with_context(|| format!("the slices say {:?}, not {wanted:?}", self.said.borrow()))
    }

    /// Waits until a slice speaks of a replica as not ready.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub async fn missed(&self, operator: &Operator, limit: Duration) -> Result<()> {
        let mut said = self.said.clone();
        let missed = said.wait_for(|said| {
            !said.iter().any(|(replica, ready)| replica.name == operator.process().name() && *ready)
        });
        timeout(limit, missed).await.map(|_| ()).context("the slice speaks of it as ready")
    }

    /// Removes a replica that has ended, or is told to.
    pub fn remove(&self, operator: &Operator) {
        self.replicas.send_modify(|replicas| replicas.retain(|r| r.name != operator.process().name()));
    }
}

/// The address from which this machine reaches others. No packet is sent for that.
fn own_address() -> Result<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9)).context("this machine has no route to anywhere")?;
    let address = socket.local_addr()?.ip();
    ensure!(!address.is_loopback() && !address.is_unspecified(), "this machine has no address but loopback");
    Ok(address)
}

async fn keep(
    config: kube::Config,
    mut replicas: watch::Receiver<Vec<Replica>>,
    say: watch::Sender<Vec<(Replica, bool)>>,
) {
    let Ok(client) = kube::Client::try_from(config) else { return };
    let slices: Api<EndpointSlice> = Api::namespaced(client, NAMESPACE);
    // What each slice says.
    let mut said: Vec<(Replica, bool)> = Vec::new();
    loop {
        let now = replicas.borrow_and_update().clone();
        let mut next = Vec::new();
        for (gone, _) in said.iter().filter(|(replica, _)| !now.contains(replica)) {
            // What cannot be written now is written in the next round.
            if slices.delete(&gone.name, &DeleteParams::default()).await.is_err_and(|e| !is_gone(&e)) {
                next.push((gone.clone(), false));
            }
        }
        for replica in now {
            let probe = timeout(PROBE_TIMEOUT, http::get(replica.admin, "/readyz")).await;
            let ready = matches!(probe, Ok(Ok((200, _))));
            let entry = (replica, ready);
            if said.contains(&entry) || apply(&slices, &entry.0, ready).await {
                next.push(entry);
            }
        }
        said = next;
        say.send_replace(said.clone());
        let _ = timeout(PROBE_EVERY, replicas.changed()).await;
    }
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

async fn apply(slices: &Api<EndpointSlice>, replica: &Replica, ready: bool) -> bool {
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": replica.name, "labels": {"kubernetes.io/service-name": SERVICE}},
        "ports": [{"name": "https", "port": replica.webhook.port(), "protocol": "TCP"}],
        "endpoints": [{"addresses": [replica.webhook.ip()], "conditions": {"ready": ready}}],
    });
    let params = PatchParams::apply("testbed").force();
    slices.patch(&replica.name, &params, &Patch::Apply(&slice)).await.is_ok()
}
