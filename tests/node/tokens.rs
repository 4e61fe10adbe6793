//! Tokens expire, and nobody notices.

use std::time::{Duration, SystemTime};

use serde_json::json;
use testbed::{
    aws::{REGION, TOKEN_PREFIX},
    operator::{NAMESPACE, ROLE},
    registry::Caller,
};

use crate::world::{LIMIT, container, pull_secret, shared, with};

#[tokio::test]
async fn after_a_token_has_expired_new_pods_pull_with_the_next_and_the_old_one_is_refused() {
    let Some((world, _release)) = shared().await else { return };
    let aws = &world.cluster.aws;
    let namespace = world.namespace(&[]).await;
    // A role of its own has tokens of its own.
    let role = format!("arn:aws:iam::123456789012:role/{namespace}");
    aws.role(&role).trusts_role(ROLE);
    aws.set_token_lifetime(Duration::from_secs(12));
    let host = world.alias(&namespace, json!({ "credentials": { "roleArn": role } })).await;
    aws.set_token_lifetime(Duration::from_secs(12 * 60 * 60));
    let first = aws.all_tokens().into_iter().find(|token| token.role == role).unwrap();
    let spec = container(&format!("{host}/{namespace}/app:1"));
    world.pod(&namespace, "early", json!({}), spec.clone()).await;

    world
        .until("the first token to expire", &namespace, async || (!aws.is_valid(&first.token)).then_some(()))
        .await;
    world.pod(&namespace, "late", json!({}), spec.clone()).await;
    world.running(&namespace, "late").await;
    world.running(&namespace, "early").await;
    let current = aws.current_token(&role, REGION).unwrap();
    let current = aws.all_tokens().into_iter().find(|token| token.token == current).unwrap();
    let repository = format!("/v2/{namespace}/app/");
    let with_current = Caller::Token { role: role.clone(), issued_at: current.issued_at };
    let registry = &world.cluster.registry;
    registry
        .wait_for(|request| request.path.starts_with(&repository) && request.caller == with_current, LIMIT)
        .await
        .unwrap();
    assert!(current.issued_at < first.expires_at, "the token was refreshed only after it had expired");
    assert!(first.expires_at < SystemTime::now());

    world.apply(&pull_secret(&namespace, "old", &first.token)).await;
    let old = json!({ "imagePullSecrets": [{ "name": "old" }] });
    let canonical = container(&format!("{}/{namespace}/old:1", testbed::registry::HOST));
    world.pod(&namespace, "old", json!({}), with(canonical, old)).await;
    let error = world.pull_error(&namespace, "old").await;
    assert!(error.contains("403 Forbidden"), "{error}");
    let refused = registry.requests_for(&format!("{namespace}/old"));
    assert!(
        refused.iter().any(|request| request.caller == Caller::Expired { role: role.clone() }),
        "{refused:#?}"
    );
}

#[tokio::test]
async fn no_token_is_in_a_log_an_event_or_a_status() {
    let Some((world, _release)) = shared().await else { return };
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;
    world.pod(&namespace, "app", json!({}), container(&format!("{host}/{namespace}/app:1"))).await;
    world.running(&namespace, "app").await;

    let selector = "--selector=app.kubernetes.io/name=ecr-cname";
    let logs = world.kubectl(&["logs", "--namespace", NAMESPACE, selector, "--tail=-1"]).await;
    assert!(logs.contains(&namespace), "the logs say nothing of the alias:\n{logs}");
    let objects =
        world.kubectl(&["get", "events,registryaliases,pods", "--all-namespaces", "--output=json"]).await;
    for text in [logs, objects] {
        assert!(!text.contains(TOKEN_PREFIX));
    }
}
