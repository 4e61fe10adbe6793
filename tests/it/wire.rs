//! The webhook's own port, as a stranger finds it: real TLS on real sockets. It answers with a clear text, within its
//! bounds, and stays there for those who mean well.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};
use serde_json::json;
use testbed::operator::{NAMESPACE, Start};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::cluster::{Cluster, LIMIT, REGISTRY, images, shared};

/// A client that trusts the CA in the certificate's Secret, and nothing else.
async fn connector(
    cluster: &Cluster,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&str],
) -> TlsConnector {
    connector_as(cluster, versions, alpn, None).await
}

/// The same with a certificate and a key of the client's own, in PEM.
pub async fn connector_as(
    cluster: &Cluster,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&str],
    identity: Option<&(String, String)>,
) -> TlsConnector {
    let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let data = secrets.get("ecr-cname-tls").await.unwrap().data.unwrap();
    let mut roots = RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(&data["ca.crt"].0) {
        roots.add(ca.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match identity {
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

async fn connect(connector: &TlsConnector, address: SocketAddr) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    connector.connect(name, stream).await.unwrap()
}

/// Sends a request of HTTP/1.1 and returns the whole answer.
async fn ask(cluster: &Cluster, address: SocketAddr, head: &str, body: &[u8]) -> String {
    let connector = connector(cluster, &[&TLS13], &["http/1.1"]).await;
    let mut stream = connect(&connector, address).await;
    let request =
        format!("{head}\r\nHost: webhook\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    // The server may have answered and hung up before it read all of it.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

const JSON: &str = "Content-Type: application/json";

#[tokio::test]
async fn tls_1_2_and_1_3_with_http_2_and_1_1() {
    let cluster = shared().await;
    let address = cluster.operator.webhook_address();
    for (version, expected) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        for (offered, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["http/1.1"][..], "http/1.1")] {
            let stream = connect(&connector(cluster, &[version], offered).await, address).await;
            let (_, connection) = stream.get_ref();
            assert_eq!(connection.protocol_version(), Some(expected));
            assert_eq!(connection.alpn_protocol(), Some(chosen.as_bytes()));
        }
    }
}

#[tokio::test]
async fn bad_input_is_answered_with_a_clear_text() {
    let cluster = shared().await;
    let address = cluster.operator.webhook_address();
    let post = format!("POST /mutate/0123456789/0123456789 HTTP/1.1\r\n{JSON}");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: [(&str, &[u8], &str, &str); 8] = [
        (&post, b"", "400", "the body is not an AdmissionReview: EOF"),
        (&post, b"{\"kind\":", "400", "line 1 column 8"),
        (&post, b"\xff\xfe\x00", "400", "not an AdmissionReview"),
        (&post, deep.as_bytes(), "400", "not an AdmissionReview"),
        (&post, b"{\"kind\":\"AdmissionReview\",\"kind\":\"x\"}", "400", "duplicate field `kind`"),
        (
            &post,
            b"{\"kind\":\"AdmissionReview\",\"apiVersion\":\"admission.k8s.io/v1\"}",
            "400",
            "no request",
        ),
        (
            "POST /mutate/0123456789/0123456789 HTTP/1.1\r\nContent-Type: text/plain",
            b"{}",
            "415",
            "application/json",
        ),
        ("GET /mutate/0123456789/0123456789 HTTP/1.1", b"", "405", ""),
    ];
    for (head, body, status, expected) in cases {
        let answer = ask(cluster, address, head, body).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head}: {answer}");
        assert!(answer.contains(expected), "{head}: {answer}");
    }
    let answer = ask(cluster, address, "POST /elsewhere HTTP/1.1", b"").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    // A body that is too large is refused before it has all been read.
    let large = vec![b' '; 9 * 1024 * 1024];
    let answer = ask(cluster, address, &post, &large).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

/// Slow headers, a slow body and a silent handshake hold a connection for no longer than the limit, and nobody else up.
#[tokio::test]
async fn slow_clients_are_cut_off_and_others_are_served() {
    let cluster = Cluster::start().await;
    let start = cluster.quick(Start::run()).args(["--request-timeout=2s"]);
    let operator = cluster.operator(start).await;
    let address = operator.webhook_address();
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let namespace = cluster.namespace(&[]).await;

    let http1 = connector(&cluster, &[&TLS13], &["http/1.1"]).await;
    let mut slow_headers = connect(&http1, address).await;
    slow_headers.write_all(b"POST /mutate/x/y HTTP/1.1\r\nHost: w\r\n").await.unwrap();
    let mut slow_bodies = Vec::new();
    for _ in 0..4 {
        let mut stream = connect(&http1, address).await;
        let head = format!("POST /mutate/x/y HTTP/1.1\r\nHost: w\r\n{JSON}\r\nContent-Length: 100\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        slow_bodies.push(stream);
    }
    let _silent = TcpStream::connect(address).await.unwrap();
    let started = Instant::now();
    // The API server waits 3 s.
    let pod = cluster.pod(&namespace, "honest", "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
    for mut stream in slow_bodies {
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "a slow body is cut off");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("within 2s"), "{answer}");
    }
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), slow_headers.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "slow headers are cut off");
    assert!(started.elapsed() < Duration::from_secs(10));
    let bad = operator.metric("ecr_cname_admissions_total{outcome=\"Rewritten\"}").await.unwrap();
    assert!(bad >= 1.0);
}

#[tokio::test]
async fn a_new_connection_of_http_2_is_told_of_the_shutdown_and_not_cut_off() {
    let cluster = &shared().await.cluster;
    let webhook = cluster.quick_webhook("just-connected").await;
    webhook.wait_ready().await.unwrap();
    let connector = connector(cluster, &[&TLS13], &["h2"]).await;
    let mut stream = connect(&connector, webhook.webhook_address()).await;

    webhook.process().terminate().unwrap();
    let deadline = Instant::now() + LIMIT;
    while TcpStream::connect(webhook.webhook_address()).await.is_ok() {
        assert!(Instant::now() < deadline, "the port is still open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    // The preface and empty settings: what the API server sends before its first request.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    const GOAWAY: u8 = 7;
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.expect("the connection was cut off without a GOAWAY");
        if header[3] == GOAWAY {
            break;
        }
        let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
    }
}

#[tokio::test]
async fn probes_and_metrics_have_a_port_of_their_own() {
    let cluster = shared().await;
    let (status, body) = cluster.operator.admin("/livez").await.unwrap();
    assert_eq!((status, body.as_str()), (200, "ok\n"));
    let (status, _) = cluster.operator.admin("/mutate/x").await.unwrap();
    assert_eq!(status, 404);
    let (status, metrics) = cluster.operator.admin("/metrics").await.unwrap();
    assert_eq!(status, 200);
    for name in [
        "ecr_cname_admissions_total",
        "ecr_cname_admission_duration_seconds_bucket",
        "ecr_cname_token_expiry_timestamp_seconds",
        "ecr_cname_token_refreshes_total",
        "ecr_cname_namespaces_selected",
        "ecr_cname_namespaces_synced",
        "ecr_cname_serving_certificate_expiry_timestamp_seconds",
        "ecr_cname_leader",
    ] {
        assert!(
            metrics
                .contains(&format!("# TYPE {}", name.trim_end_matches("_total").trim_end_matches("_bucket"))),
            "{name}\n{metrics}"
        );
    }
    assert!(metrics.ends_with("# EOF\n"));
}

/// What `helm test` runs: it trusts the CA in the Secret and nothing else, and says what is wrong.
#[tokio::test]
async fn the_probe_asks_as_the_api_server_would() {
    let cluster = shared().await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let data = secrets.get("ecr-cname-tls").await.unwrap().data.unwrap();
    let probe = async |name: &str, ca: &[u8], port: u16| {
        let file = cluster.control_plane.dir().join(name);
        std::fs::write(&file, ca).unwrap();
        let mut command = tokio::process::Command::new(crate::cluster::binary());
        command
            .args(["probe", "--host=127.0.0.1", "--timeout=0s", &format!("--port={port}"), "--ca"])
            .arg(file);
        let output = command.output().await.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let webhook = cluster.operator.webhook_address().port();
    let (well, said) = probe("probe.crt", &data["ca.crt"].0, webhook).await;
    assert!(well, "{said}");

    let stranger = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (well, said) = probe("stranger.crt", stranger.cert.pem().as_bytes(), webhook).await;
    assert!(!well && said.contains("invalid peer certificate: UnknownIssuer"), "{said}");

    let (well, said) = probe("no.crt", b"", webhook).await;
    assert!(!well && said.contains("cannot read the CA in"), "{said}");

    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (well, said) = probe("nobody.crt", &data["ca.crt"].0, nobody).await;
    assert!(!well && said.contains("does not answer: Connection refused"), "{said}");
}
