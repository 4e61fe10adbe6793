//! Mutual TLS: the API server shows a certificate, and nobody without one may call.

use std::{fs, path::PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::json;
use testbed::operator::Start;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    cluster::{Cluster, LIMIT, REGISTRY, images, unique},
    wire,
};

/// A certificate authority, and what it signs.
struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// The certificate and the key of a client, in PEM.
    fn client(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// Makes the API server show a certificate to webhooks, as docs/security.md says.
async fn show(cluster: &Cluster, (certificate, key): &(String, String)) {
    let dir = cluster.control_plane.dir();
    let kubeconfig = dir.join("webhooks.kubeconfig");
    let user = json!({"client-certificate-data": STANDARD.encode(certificate), "client-key-data": STANDARD.encode(key)});
    let config = json!({"apiVersion": "v1", "kind": "Config", "users": [{"name": "127.0.0.1:*", "user": user.clone()},
            {"name": "*", "user": user}]});
    fs::write(&kubeconfig, config.to_string()).unwrap();
    let admission = json!({"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AdmissionConfiguration", "plugins": [
        {"name": "MutatingAdmissionWebhook", "configuration": {"apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "WebhookAdmissionConfiguration", "kubeConfigFile": kubeconfig}}]});
    let path = dir.join("admission.yaml");
    fs::write(&path, admission.to_string()).unwrap();
    let flag = format!("--admission-control-config-file={}", path.display());
    cluster.control_plane.set_flags([flag]);
    cluster.control_plane.kill_apiserver().await.unwrap();
    cluster.control_plane.start_apiserver().await.unwrap();
}

#[tokio::test]
async fn with_a_client_ca_only_the_api_server_may_call() {
    let cluster = Cluster::start().await;
    let (ours, theirs) = (Ca::new(), Ca::new());
    let file: PathBuf = cluster.control_plane.dir().join("client-ca.crt");
    fs::write(&file, &ours.pem).unwrap();
    let flag = format!("--client-ca={}", file.display());
    let start = cluster.quick(Start::run()).args([flag.as_str(), "--client-names=kube-apiserver"]);
    let operator = cluster.operator(start).await;
    let address = operator.webhook_address();
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;

    // Without a certificate, with one of another authority, with one of another name: no answer, to anybody.
    let strangers = [None, Some(theirs.client("kube-apiserver")), Some(ours.client("some-pod"))];
    for stranger in &strangers {
        assert_eq!(call(&cluster, address, stranger.as_ref()).await, None);
    }
    let spec = json!({"containers": [{"name": "app", "image": "a.example.io/app"}]});
    let refused = cluster.try_pod(&namespace, "early", spec.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("failed calling webhook"), "{refused}");

    let good = ours.client("kube-apiserver");
    show(&cluster, &good).await;
    assert_eq!(call(&cluster, address, Some(&good)).await.as_deref(), Some("HTTP/1.1 400"));
    let pod = cluster.pod(&namespace, "a", "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);

    // The authority is exchanged without a restart; what is no authority is not taken.
    fs::write(&file, "nonsense").unwrap();
    let log = || operator.process().log().unwrap();
    until(|| log().contains("keeping the client CA")).await;
    assert!(call(&cluster, address, Some(&good)).await.is_some());
    fs::write(&file, &theirs.pem).unwrap();
    until(|| log().contains("the client CA has changed")).await;
    assert_eq!(call(&cluster, address, Some(&good)).await, None);
    assert!(call(&cluster, address, strangers[1].as_ref()).await.is_some());
    let better = theirs.client("kube-apiserver");
    show(&cluster, &better).await;
    let pod = cluster.pod(&namespace, &unique("p"), "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
}

/// Asks the webhook something, and returns the beginning of its answer if it gives one.
async fn call(
    cluster: &Cluster,
    address: std::net::SocketAddr,
    identity: Option<&(String, String)>,
) -> Option<String> {
    let connector = wire::connector_as(cluster, &[&rustls::version::TLS13], &["http/1.1"], identity).await;
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, stream).await.ok()?;
    let request = "POST /mutate/x/y HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

async fn until(condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
