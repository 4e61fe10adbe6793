//! The operator is gone, with its webhook entries still there.

use serde_json::json;
use testbed::operator::NAMESPACE;

use crate::world::{alone, container};

#[tokio::test]
async fn when_all_of_its_pods_are_gone_at_once_it_comes_back_by_itself() {
    let Some((world, _release)) = alone().await else { return };
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;

    world
        .kubectl(&["delete", "pods", "--all", "--namespace", NAMESPACE, "--force", "--grace-period=0"])
        .await;

    // What names no alias does not depend on it.
    world.pod(&namespace, "ordinary", json!({}), container("registry.example.com/app:1")).await;
    let configuration = world.get("", "mutatingwebhookconfiguration/ecr-cname").await.unwrap();
    assert!(!configuration["webhooks"].as_array().unwrap().is_empty());
    // What names one is refused, and tried again.
    world
        .apply(&json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web", "namespace": namespace },
            "spec": {
                "replicas": 1, "selector": { "matchLabels": { "app": "web" } },
                "template": {
                    "metadata": { "labels": { "app": "web" } },
                    "spec": container(&format!("{host}/{namespace}/app:1")),
                },
            },
        }))
        .await;

    for deployment in ["ecr-cname-webhook", "ecr-cname-controller"] {
        world.available(NAMESPACE, deployment).await;
    }
    world.available(&namespace, "web").await;
}
