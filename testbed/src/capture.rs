//! AdmissionReviews as a real API server sends them, kept as files for benchmarks and tests.

use std::{collections::HashMap, fs, net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_rustls::TlsAcceptor;

use crate::{controlplane::ControlPlane, pki};

/// The host that the captured pods name.
pub const HOST: &str = "docker-ecr.internal.example.io";

/// How long the API server may take to send what was asked of it.
const LIMIT: Duration = Duration::from_secs(10);

/// A pod to capture: the name of its file, how many containers it has, and how many variables each of them.
const PODS: [(&str, &str, usize, usize); 4] = [
    ("create-2", HOST, 2, 0),
    ("create-4", HOST, 4, 3),
    ("create-26", HOST, 26, 5),
    ("ordinary-2", "registry.example.com", 2, 0),
];

/// Has a real API server send reviews of pods of several sizes, and writes them into `dir` byte for byte.
///
/// # Errors
/// The control plane, the API server or the file system says no.
pub async fn capture(dir: &Path) -> Result<()> {
    let control_plane = ControlPlane::start().await?;
    let mut recorder = Recorder::start(&control_plane).await?;
    let namespace = control_plane.namespace("shop", &[]).await?;
    let pods: Api<Pod> = Api::namespaced(control_plane.kube_client()?, &namespace);
    let by = PostParams { field_manager: Some("kube-controller-manager".into()), ..Default::default() };
    for (name, host, containers, variables) in PODS {
        let pod = serde_json::from_value(pod(name, host, containers, variables))?;
        pods.create(&by, &pod).await?;
        recorder.keep(dir, name).await?;
    }
    // `kubectl set image`: an update carries the pod twice.
    let image =
        json!({"spec": {"containers": [{"name": "web-0", "image": format!("{HOST}/team/web-0:2.0.0")}]}});
    let by = PatchParams::apply("kubectl-set");
    pods.patch("create-2", &by, &Patch::Strategic(image)).await?;
    recorder.keep(dir, "update-2").await
}

/// A webhook that lets everything pass and hands on what it was sent.
struct Recorder(mpsc::UnboundedReceiver<Bytes>);

impl Recorder {
    async fn start(control_plane: &ControlPlane) -> Result<Self> {
        let serving = pki::serving_cert(&["127.0.0.1"])?;
        let chain = vec![CertificateDer::from_pem_slice(serving.cert.as_bytes())?];
        let key = PrivateKeyDer::from_pem_slice(serving.key.as_bytes())?;
        let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("https://{}", listener.local_addr()?);
        let (send, bodies) = mpsc::unbounded_channel();
        tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(tls)), send));
        let configuration = json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "capture"},
            "webhooks": [{
                "name": "capture.ecr-cname.dev",
                "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Fail",
                "clientConfig": {"url": url, "caBundle": STANDARD.encode(&serving.ca)},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"],
                    "operations": ["CREATE", "UPDATE"]}],
            }],
        });
        control_plane.apply(&configuration.to_string()).await?;
        let mut recorder = Self(bodies);
        recorder.heard(control_plane).await?;
        Ok(recorder)
    }

    /// Waits until the API server has taken notice of the webhook: dry runs until one of them arrives.
    async fn heard(&mut self, control_plane: &ControlPlane) -> Result<()> {
        let namespace = control_plane.namespace("warm", &[]).await?;
        let pods: Api<Pod> = Api::namespaced(control_plane.kube_client()?, &namespace);
        let probe = serde_json::from_value(pod("probe", HOST, 1, 0))?;
        let dry = PostParams { dry_run: true, ..Default::default() };
        timeout(LIMIT, async {
            loop {
                pods.create(&dry, &probe).await?;
                if self.0.try_recv().is_ok() {
                    return Ok::<_, anyhow::Error>(());
                }
            }
        })
        .await
        .context("the API server does not call the webhook")?
    }

    async fn keep(&mut self, dir: &Path, name: &str) -> Result<()> {
        let body = timeout(LIMIT, self.0.recv()).await?.context("the webhook is gone")?;
        let review: HashMap<String, Value> = serde_json::from_slice(&body)?;
        ensure!(review.contains_key("request"), "{name}: no request in what the API server sent");
        let path = dir.join(format!("{name}.json"));
        fs::write(&path, &body).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{} bytes in {}", body.len(), path.display());
        Ok(())
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, send: mpsc::UnboundedSender<Bytes>) {
    loop {
        // What cannot be accepted is the API server's to notice.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (tls, send) = (tls.clone(), send.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = service_fn(|request| pass(request, &send));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn pass(
    request: hyper::Request<Incoming>,
    send: &mpsc::UnboundedSender<Bytes>,
) -> Result<Response<Full<Bytes>>> {
    let body = request.into_body().collect().await?.to_bytes();
    let review: Value = serde_json::from_slice(&body)?;
    let answer = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "response": {"uid": review["request"]["uid"], "allowed": true}});
    send.send(body).context("nobody listens")?;
    let response = Response::builder().header("content-type", "application/json");
    Ok(response.body(Full::from(answer.to_string()))?)
}

/// A pod as a Deployment of a usual service makes it, with sidecars as many as wanted.
fn pod(name: &str, host: &str, containers: usize, variables: usize) -> Value {
    let containers: Vec<_> = (0..containers).map(|n| container(n, host, variables)).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "web", "app.kubernetes.io/instance": "web-production",
                "app.kubernetes.io/version": "1.27.3", "app.kubernetes.io/part-of": "shop",
                "app.kubernetes.io/managed-by": "Helm", "pod-template-hash": "7d4b9c6f8d"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "8080",
                "checksum/config": "5f2a1c9d0b3e4f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c",
                "kubectl.kubernetes.io/restartedAt": "2026-11-20T09:41:07Z"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d4b9c6f8d",
                "uid": "0b6f2a51-4c1e-4d8e-9d5e-3c1a9f2b7e64", "controller": true, "blockOwnerDeletion": true}],
        },
        "spec": {
            "serviceAccountName": "default",
            "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": 60,
            "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "web"}}}],
            "containers": containers,
            "volumes": [
                {"name": "config", "configMap": {"name": "web-config"}},
                {"name": "scratch", "emptyDir": {"sizeLimit": "256Mi"}},
            ],
        },
    })
}

fn container(n: usize, host: &str, variables: usize) -> Value {
    let variables: Vec<_> = (0..variables)
        .map(|v| match v % 3 {
            0 => json!({"name": format!("SHOP_SERVICE_{v}_URL"),
                "value": format!("http://service-{v}.shop.svc.cluster.local:8080/api/v1?timeout=30s")}),
            1 => json!({"name": format!("SHOP_SECRET_{v}"), "valueFrom": {"secretKeyRef":
                {"name": "web-credentials", "key": format!("password-{v}")}}}),
            _ => json!({"name": format!("SHOP_POD_{v}"), "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
        })
        .collect();
    json!({
        "name": format!("web-{n}"),
        "image": format!("{host}/team/web-{n}:1.27.3"),
        "args": ["--config=/etc/web/config.yaml", "--log-format=json", format!("--shard={n}")],
        "ports": [{"name": format!("http-{n}"), "containerPort": 8080 + n}],
        "env": variables,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": format!("http-{n}")}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": format!("http-{n}")}, "initialDelaySeconds": 10},
        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/web", "readOnly": true},
            {"name": "scratch", "mountPath": "/tmp"}],
    })
}
