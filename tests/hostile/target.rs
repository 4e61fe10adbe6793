//! What is attacked, and what must hold meanwhile.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use testbed::operator::{NAMESPACE, Operator, Start};
use tokio::{
    net::TcpStream,
    sync::{Mutex, MutexGuard, OnceCell},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::cluster::{Cluster, LIMIT, REGISTRY, images, unique};

/// The most memory that the process may ever have used, in bytes: what it needs without anybody attacking it, the 32 MiB that
/// requests may hold, and 512 connections. A debug build, whose code alone is large.
pub const MEMORY: u64 = 192 * 1024 * 1024;

/// The most time that an attack may take: each ends by itself.
const SIEGE: Duration = Duration::from_secs(60);

/// A webhook and a controller, each a process of its own.
pub struct Target {
    cluster: Cluster,
    webhook: Operator,
    _controller: Operator,
    tls: Arc<ClientConfig>,
    namespace: String,
}

pub type Stream = TlsStream<TcpStream>;

/// The target, for one attack at a time.
pub async fn target() -> (MutexGuard<'static, ()>, &'static Target) {
    static ALONE: Mutex<()> = Mutex::const_new(());
    static TARGET: OnceCell<Target> = OnceCell::const_new();
    let alone = ALONE.lock().await;
    (alone, TARGET.get_or_init(Target::start).await)
}

impl Target {
    async fn start() -> Self {
        let cluster = Cluster::start().await;
        let webhook = cluster.quick_webhook("webhook").await;
        let start = cluster.quick(Start::controller(webhook.webhook_address()));
        let controller = cluster.operator(start).await;
        webhook.wait_ready().await.unwrap();
        let namespace = cluster.namespace(&[]).await;
        cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;

        let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
        let data = secrets.get("ecr-cname-tls").await.unwrap().data.unwrap();
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(&data["ca.crt"].0) {
            roots.add(ca.unwrap()).unwrap();
        }
        let tls = Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth());
        Self { cluster, webhook, _controller: controller, tls, namespace }
    }

    pub fn address(&self) -> SocketAddr {
        self.webhook.webhook_address()
    }

    /// A connection with TLS, or nothing where the target does not want it.
    pub async fn connect(&self, alpn: &str) -> Option<Stream> {
        let mut tls = (*self.tls).clone();
        tls.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.address()).await.ok()?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        TlsConnector::from(Arc::new(tls)).connect(name, stream).await.ok()
    }

    pub async fn metric(&self, name: &str) -> f64 {
        self.webhook.metric(name).await.unwrap()
    }

    /// Admits alias pods during an attack, and looks after it for what it left behind.
    pub async fn withstands(&self, attack: impl Future<Output = ()>) {
        let process = self.webhook.process();
        let descriptors = self.descriptors();
        // Forgets the peak of earlier attacks.
        fs::write(format!("/proc/{}/clear_refs", process.pid()), "5").unwrap();
        let mut admitted = Vec::new();
        {
            let mut attack = std::pin::pin!(attack);
            let mut goes_on = true;
            let started = Instant::now();
            while goes_on || admitted.is_empty() {
                assert!(started.elapsed() < SIEGE, "the attack does not end");
                let honest = async {
                    let began = Instant::now();
                    let name = unique("honest");
                    let pod = self.cluster.pod(&self.namespace, &name, "a.example.io/app").await;
                    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
                    began.elapsed()
                };
                let mut honest = std::pin::pin!(honest);
                let took = loop {
                    tokio::select! {
                        () = &mut attack, if goes_on => goes_on = false,
                        took = &mut honest => break took,
                    }
                };
                admitted.push(took);
            }
        }
        let peak = self.memory("VmHWM");
        admitted.sort();
        println!(
            "{} pods admitted, median {:?}, slowest {:?}; peak memory {} MiB",
            admitted.len(),
            admitted[admitted.len() / 2],
            admitted[admitted.len() - 1],
            peak >> 20,
        );
        assert!(process.is_running(), "{}", process.log_tail(20));
        assert!(!process.log().unwrap().contains("panicked"), "a panic in the log");
        assert!(peak < MEMORY, "{} MiB", peak >> 20);
        let deadline = Instant::now() + LIMIT;
        // The API server may have another connection than before, and there are the probes.
        while self.descriptors() > descriptors + 8 {
            assert!(
                Instant::now() < deadline,
                "{} file descriptors, {descriptors} before",
                self.descriptors()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(self.webhook.admin("/livez").await.unwrap().0, 200);
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.webhook.process().pid())).unwrap().count()
    }

    /// A size of the process in bytes, as the kernel counts it.
    fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.webhook.process().pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        let kilobytes: String = line.chars().filter(char::is_ascii_digit).collect();
        kilobytes.parse::<u64>().unwrap() * 1024
    }
}
