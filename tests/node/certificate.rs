//! The serving certificate is cert-manager's.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use testbed::{operator::NAMESPACE, pki};

use crate::world::{Release, World, any_release, container};

#[tokio::test]
async fn with_cert_manager_pods_run_under_its_certificate() {
    let Some((world, mut release)) = any_release().await else { return };
    *release = Release::Other;
    world.uninstall().await;
    world.cluster.control_plane.apply(include_str!("cert-manager.yaml")).await.unwrap();

    // Helm waits for the webhook, which waits for the Secret, which cert-manager makes.
    let (ca, ()) = tokio::join!(cert_manager(world), world.install(&["certificate.mode=cert-manager"]));

    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;
    let configuration = world.get("", "mutatingwebhookconfiguration/ecr-cname").await.unwrap();
    let entries = configuration["webhooks"].as_array().unwrap();
    assert!(!entries.is_empty());
    for entry in entries {
        assert_eq!(entry["clientConfig"]["caBundle"], STANDARD.encode(&ca));
    }
    world.pod(&namespace, "app", json!({}), container(&format!("{host}/{namespace}/app:1"))).await;
    world.running(&namespace, "app").await;

    // What cert-manager made is cert-manager's.
    world.uninstall_release().await;
    assert!(world.get(NAMESPACE, "secret/ecr-cname-tls").await.is_some());
}

/// Does what cert-manager does: makes the Secret that the Certificate asks for. Returns the CA.
async fn cert_manager(world: &World) -> String {
    let certificate = world
        .until("a Certificate", NAMESPACE, async || {
            let certificates = world.list(NAMESPACE, "certificates.cert-manager.io").await;
            certificates.into_iter().find(|certificate| certificate["spec"]["isCA"] != true)
        })
        .await;
    let spec = &certificate["spec"];
    let names: Vec<&str> = spec["dnsNames"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let signed = pki::serving_cert(&names).unwrap();
    let name = &certificate["metadata"]["name"];
    world
        .apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {
                "name": spec["secretName"], "namespace": NAMESPACE,
                "annotations": { "cert-manager.io/certificate-name": name },
                "labels": { "controller.cert-manager.io/fao": "true" },
            },
            "stringData": { "tls.crt": signed.cert, "tls.key": signed.key, "ca.crt": signed.ca },
        }))
        .await;
    signed.ca
}
