//! No admission is lost while the operator is restarted, killed, reconfigured, or renews its certificate.
//!
//! Two replicas of each role, the webhook's behind its Service, and pods with friendly names all the time.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::json;
use testbed::{
    fleet::{Fleet, Role},
    load::{Load, Report, Target},
    operator::{NAMESPACE, Start},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::cluster::{Cluster, LIMIT, REGISTRY, await_object, binary};

/// Pods in each second.
const RATE: u32 = 20;

/// Two replicas of each role, with further flags for the controllers.
async fn fleet<'a>(cluster: &'a Cluster, args: &[&str]) -> Fleet<'a> {
    let webhook = Start::webhook().args(["--log=debug"]);
    // A machine that is busy with other things is no fault.
    let controller = cluster.quick(Start::controller_in_cluster()).args(["--webhook-timeout=10"]);
    let controller = controller.args(args.iter().copied());
    Fleet::start(binary(), &cluster.control_plane, &cluster.aws, webhook, controller).await.unwrap()
}

fn target(namespace: &str, host: &str, registries: &[&str]) -> Target {
    Target {
        namespace: namespace.to_owned(),
        image: format!("{host}/team/app:1"),
        expected: registries.iter().map(|registry| format!("{registry}/team/app:1")).collect(),
    }
}

/// An alias that is ready, and load on it.
async fn load(cluster: &Cluster) -> Load {
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let namespace = cluster.namespace(&[]).await;
    let load =
        Load::start(&cluster.control_plane, RATE, vec![target(&namespace, "a.example.io", &[REGISTRY])]);
    let load = load.unwrap();
    load.stored(20, LIMIT).await.unwrap();
    load
}

fn nothing_lost(what: &str, report: &Report) {
    println!(
        "{what}: {} pods stored, {} failed, slowest {:?}",
        report.stored,
        report.failed.len(),
        report.slowest
    );
    assert_eq!(report.unrewritten, [""; 0], "{what}");
    let errors: Vec<_> = report.failed.iter().map(|failure| &failure.error).collect();
    assert!(
        errors.is_empty(),
        "{what}: {} of {} failed: {errors:#?}",
        errors.len(),
        report.stored + errors.len()
    );
}

/// Webhook restarts refuse pods: cert-manager #2525; kyverno #6551; opa gatekeeper #1156.
#[tokio::test]
async fn rolling_restarts_of_both_roles() {
    let cluster = Cluster::start().await;
    let mut fleet = fleet(&cluster, &[]).await;
    let load = load(&cluster).await;
    for _ in 0..2 {
        fleet.roll(Role::Webhook).await.unwrap();
        fleet.roll(Role::Controller).await.unwrap();
    }
    load.stored(20, LIMIT).await.unwrap();
    nothing_lost("rolling restarts, 4 webhooks and 4 controllers", &load.stop().await);
}

/// A node that dies takes its webhook with it, and nobody says goodbye. What the API server does then is its own: see
/// `docs/reliability.md`. Requests on connections that died fail, and those that are sent to the dead address until its
/// endpoint is not ready any more; after that, none.
#[tokio::test]
async fn a_killed_webhook_costs_only_what_was_under_way() {
    const KILLS: usize = 5;
    let cluster = Cluster::start().await;
    let mut fleet = fleet(&cluster, &[]).await;
    let load = load(&cluster).await;
    let mut windows = Vec::new();
    for _ in 0..KILLS {
        let killed = fleet.kill(Role::Webhook, 0).await.unwrap();
        // `kill` returns when the endpoint is gone; the API server learns of that by its own watch.
        windows.push((killed, Instant::now() + Duration::from_millis(500)));
        load.stored(30, LIMIT).await.unwrap();
        fleet.add(Role::Webhook).await.unwrap();
        load.stored(30, LIMIT).await.unwrap();
    }
    let report = load.stop().await;
    assert_eq!(report.unrewritten, [""; 0]);
    let mut lost = 0;
    for (killed, noticed) in &windows {
        let failed = report.failed_between(*killed, *noticed);
        let longest = failed.iter().map(|f| f.failed.saturating_duration_since(*killed)).max();
        println!(
            "a killed webhook: {} of about {} failed, the last after {longest:?}; endpoint gone after {:?}",
            failed.len(),
            (*noticed - *killed).as_millis() * u128::from(RATE) / 1000,
            *noticed - *killed - Duration::from_millis(500),
        );
        for failure in &failed {
            println!("    {}", failure.error);
            // Nothing was refused by a webhook: it was not reached.
            let died =
                ["connection refused", "EOF", "connection reset", "broken pipe", "closed idle connection"];
            assert!(died.iter().any(|d| failure.error.contains(d)), "{}", failure.error);
        }
        lost += failed.len();
    }
    println!("{KILLS} killed webhooks: {} pods stored, {lost} failed", report.stored);
    assert_eq!(report.failed.len(), lost, "failures beyond those of the kills: {:#?}", report.failed);
}

/// Handing over and dying are the same to admissions: the webhook does not need a controller.
#[tokio::test]
async fn leaders_that_end_and_leaders_that_are_killed() {
    let cluster = Cluster::start().await;
    let mut fleet = fleet(&cluster, &[]).await;
    let load = load(&cluster).await;
    for killed in [false, true, false, true] {
        let leader = fleet.leader().await.unwrap();
        let began = Instant::now();
        if killed {
            fleet.kill(Role::Controller, leader).await.unwrap();
        } else {
            fleet.terminate(Role::Controller, leader).await.unwrap();
        }
        fleet.leader().await.unwrap();
        let led = began.elapsed();
        // It does what leaders do.
        cluster.token(&cluster.namespace(&[]).await, REGISTRY).await;
        let how = if killed { "killed" } else { "ended" };
        println!(
            "a leader {how}: another leads after {led:?}, a new namespace is served after {:?}",
            began.elapsed()
        );
        fleet.add(Role::Controller).await.unwrap();
    }
    nothing_lost("leader changes, 2 by SIGTERM and 2 by SIGKILL", &load.stop().await);
}

/// The API server speaks HTTP/1.1 to a Service, keeps its connections for 90 s, and does not send a request twice: one that it
/// sends while the webhook closes the connection is a pod refused. So the webhook does not close what is kept, and says in
/// its answers that the connection is at its end before it ends itself.
#[tokio::test]
async fn a_connection_that_is_kept_is_not_closed_under_a_request() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator(cluster.quick(Start::run()).args(["--shutdown-delay=4s"])).await;
    let mut used = Kept::open(&cluster, operator.webhook_address()).await;
    let mut idle = Kept::open(&cluster, operator.webhook_address()).await;
    for connection in [&mut used, &mut idle] {
        let answer = connection.ask().await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("connection: close"), "{answer}");
    }
    assert!(used.stays_open(Duration::from_secs(15)).await, "a connection was closed that was only idle");
    assert!(idle.stays_open(Duration::from_millis(10)).await);
    let mut new = Kept::open(&cluster, operator.webhook_address()).await;

    operator.process().terminate().unwrap();
    let told = Instant::now();
    while !matches!(operator.admin("/readyz").await, Ok((503, _))) {
        assert!(told.elapsed() < LIMIT);
    }
    let answer = used.ask().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    assert!(!used.stays_open(LIMIT).await, "and then it is closed");
    assert!(told.elapsed() < Duration::from_secs(3), "long before the end");
    assert!(idle.stays_open(Duration::from_millis(100)).await, "there is time to use it once more");
    assert!(idle.ask().await.contains("connection: close"));

    // The port closes just when a new connection is about to be used.
    while tokio::net::TcpStream::connect(operator.webhook_address()).await.is_ok() {
        assert!(told.elapsed() < LIMIT);
    }
    let answer = new.ask().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
}

/// A connection of HTTP/1.1 to the webhook, as the API server keeps one.
struct Kept(tokio_rustls::client::TlsStream<tokio::net::TcpStream>);

impl Kept {
    async fn open(cluster: &Cluster, address: SocketAddr) -> Self {
        let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
        let data = secrets.get("ecr-cname-tls").await.unwrap().data.unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&data["ca.crt"].0).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        Self(connector.connect("127.0.0.1".try_into().unwrap(), stream).await.unwrap())
    }

    /// Sends a review and returns the answer's head, in lower case but for the first line.
    async fn ask(&mut self) -> String {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE",
            "namespace": "n", "object": {"metadata": {"name": "p"}, "spec": {"containers": []}}}})
        .to_string();
        let head = format!(
            "POST /mutate/none/none HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            review.len()
        );
        self.0.write_all((head + &review).as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        let head_and_body = |answer: &[u8]| {
            let text = String::from_utf8_lossy(answer).into_owned();
            let (head, body) = text.split_once("\r\n\r\n")?;
            let length =
                head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok())?;
            (body.len() >= length).then(|| head.to_owned())
        };
        loop {
            if let Some(head) = head_and_body(&answer) {
                return head;
            }
            let read = self.0.read(&mut buffer).await.unwrap();
            assert!(read > 0, "closed under a request");
            answer.extend_from_slice(&buffer[..read]);
        }
    }

    /// Whether it is still open after this time.
    async fn stays_open(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.0.read(&mut [0; 1])).await.is_err()
    }
}

/// The CA rotated: every pod creation failed: imageswap-webhook #115; harbor-container-webhook #37. Here with two replicas,
/// which learn of the new leaf at different times, and with the connections that the API server keeps.
#[tokio::test]
async fn the_certificate_and_its_authority_are_renewed() {
    const RENEWALS: usize = 3;
    let cluster = Cluster::start().await;
    let _fleet = fleet(&cluster, &["--certificate-lifetime=12s", "--certificate-overlap=1s"]).await;
    let load = load(&cluster).await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let part = |secret: &Secret, key: &str| secret.data.as_ref().unwrap()[key].clone();
    let mut last = secrets.get("ecr-cname-tls").await.unwrap();
    for _ in 0..RENEWALS {
        last = await_object(secrets.clone(), "ecr-cname-tls", "the certificate", |secret| {
            let changed = |key| part(secret.unwrap(), key) != part(&last, key);
            (changed("tls.crt") && changed("ca.crt")).then(|| secret.unwrap().clone())
        })
        .await;
        load.stored(40, LIMIT).await.unwrap();
    }
    nothing_lost("renewals of certificate and CA, 3", &load.stop().await);
}

/// Aliases come, change and go while pods name another of the same selector, which shares its webhook entry.
#[tokio::test]
async fn aliases_are_added_changed_and_removed() {
    const ROUNDS: usize = 4;
    const MOVED: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
    let cluster = Cluster::start().await;
    let _fleet = fleet(&cluster, &[]).await;
    let load = load(&cluster).await;
    let namespace = cluster.namespace(&[]).await;
    let steady = target(&namespace, "a.example.io", &[REGISTRY, MOVED]);
    load.set_targets(vec![steady.clone()]);
    for round in 0..ROUNDS {
        let (name, host) = (format!("other-{round}"), format!("b{round}.example.io"));
        cluster.alias(&name, json!({"host": host, "registry": REGISTRY})).await;
        // From the moment at which it is ready, its own pods are rewritten, too.
        load.set_targets(vec![steady.clone(), target(&namespace, &host, &[REGISTRY])]);
        load.stored(10, LIMIT).await.unwrap();
        // The registry of the alias under load moves.
        let to = if round % 2 == 0 { MOVED } else { REGISTRY };
        cluster.patch_alias("internal", json!({"spec": {"registry": to}})).await;
        cluster.ready("internal").await;
        // The other one goes, when no pods name it any more.
        load.set_targets(vec![steady.clone()]);
        load.stored(10, LIMIT).await.unwrap();
        cluster.delete_alias(&name).await;
        load.stored(20, LIMIT).await.unwrap();
    }
    nothing_lost("aliases added, changed and removed, 4 each", &load.stop().await);
}
