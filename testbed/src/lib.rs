//! What the tests and the demo of ecr-cname run against: a real Kubernetes control plane, with a real node if
//! pods are to run, and stand-ins that speak the real protocols of AWS and DNS to the real clients.
//!
//! Nothing in here mocks the API server. What is stood in for is only what cannot run on a developer's
//! machine, and every stand-in is proven with the client that production uses.
//!
//! # Layout
//!
//! - [`binaries`]: Kubernetes, etcd, Helm and what runs in containers, built once from Go modules
//! - [`build`]: the operator, compiled
//! - [`process`]: a child process that cannot outlive us
//! - [`controlplane`]: etcd and kube-apiserver, started in seconds, stopped and restarted at will
//! - [`aws`]: STS and ECR
//! - [`dns`]: a DNS server whose zone is changed while it runs
//! - [`operator`]: the real operator, started as a user would start it
//! - [`pki`]: keys and certificates of servers
//! - [`helm`]: the real Helm
//! - [`generated`]: the files that are generated and committed
//! - [`image`]: images for containers, the operator's among them
//! - [`registry`]: ECR's registry, which takes the tokens of the AWS stand-in
//! - [`node`]: kubelet, containerd and the rest of Kubernetes, in namespaces of their own
//! - [`cluster`]: all of it together
//! - [`usage`]: what a process takes of the machine; [`scale`]: how that grows with the cluster
//! - [`capture`]: AdmissionReviews as the API server sends them, for benchmarks
//! - [`service`]: the webhook's Service, with several replicas behind it
//! - [`fleet`]: two replicas of each role behind it, replaced and killed at will
//! - [`apiproxy`]: between the operator and the API server, to delay, refuse, hold back and count
//! - [`relay`]: a TCP port that forwards, refuses or keeps silent
//! - [`load`]: pods created all the time, each looked at
//! - [`soak`]: all of that for half an hour
//!
//! Everything here may be kept in a `static` and shared by tests that each have a runtime of their own:
//! nothing is bound to the runtime that started it, and nothing stays behind when the process ends.

pub mod apiproxy;
pub mod aws;
pub mod binaries;
pub mod build;
pub mod capture;
pub mod cluster;
pub mod controlplane;
pub mod dns;
pub mod fleet;
pub mod generated;
pub mod helm;
pub mod image;
pub mod load;
pub mod node;
pub mod operator;
pub mod pki;
pub mod process;
pub mod registry;
pub mod relay;
pub mod scale;
pub mod service;
pub mod soak;
pub mod usage;

mod background;
mod http;
mod kubeconfig;
mod ports;
mod random;
mod run_dir;
mod workspace;

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

pub use workspace::testbed_dir;

/// Makes aws-lc-rs the TLS provider of this process, if none was chosen before.
pub fn install_crypto_provider() {
    // An error says that a provider is installed already, which is all that is wanted.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Tries until it succeeds, and gives up after `limit`.
///
/// # Errors
/// The last one.
pub async fn eventually<T>(
    limit: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt().await {
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            done => return done,
        }
    }
}

/// Does `work` until it is done or the process is told to stop, which is no failure.
///
/// # Errors
/// What `work` says, or that signals cannot be handled.
pub async fn until_interrupted(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = work => result,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}
