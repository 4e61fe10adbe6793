//! Pods run under a friendly name, and would not without the operator.

use serde_json::{Value, json};
use testbed::{
    operator::ROLE,
    registry::{Caller, HOST, Request},
};

use crate::world::{World, container, pull_secret, shared, with};

#[tokio::test]
async fn a_deployment_a_job_and_a_cron_job_run_under_a_friendly_name() {
    let Some((world, _release)) = shared().await else { return };
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;
    let image = |name: &str| format!("{host}/{namespace}/{name}:1");
    let object = |api: &str, kind: &str, spec: Value| json!({ "apiVersion": api, "kind": kind, "metadata": { "name": "app", "namespace": namespace }, "spec": spec });
    let ends = |name: &str| {
        let container = json!({ "name": "app", "image": image(name), "args": ["exit", "0"] });
        json!({ "spec": { "restartPolicy": "Never", "containers": [container] } })
    };
    let template =
        json!({ "metadata": { "labels": { "app": "app" } }, "spec": container(&image("deployment")) });
    let selector = json!({ "matchLabels": { "app": "app" } });

    world
        .apply(&object(
            "batch/v1",
            "CronJob",
            json!({ "schedule": "* * * * *", "jobTemplate": { "spec": { "template": ends("cron-job") } } }),
        ))
        .await;
    world.apply(&object("batch/v1", "Job", json!({ "template": ends("job") }))).await;
    world
        .apply(&object(
            "apps/v1",
            "Deployment",
            json!({ "replicas": 2, "selector": selector, "template": template }),
        ))
        .await;

    world.available(&namespace, "app").await;
    let complete =
        async |job: &Value| crate::world::condition(job, "Complete").filter(|status| status == "True");
    world
        .until("the job to complete", &namespace, async || {
            complete(&world.get(&namespace, "job/app").await?).await
        })
        .await;
    world
        .until("a job of the cron job to complete", &namespace, async || {
            let jobs = world.list(&namespace, "jobs").await;
            let job = jobs.iter().find(|job| job["metadata"]["ownerReferences"][0]["kind"] == "CronJob")?;
            complete(job).await
        })
        .await;

    for name in ["deployment", "job", "cron-job"] {
        pulled(world, &format!("{namespace}/{name}"), ROLE);
    }
    // What people wrote is what they find: only pods are changed.
    let deployment = world.get(&namespace, "deployment/app").await.unwrap();
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], image("deployment"));
}

#[tokio::test]
async fn without_the_webhook_the_same_pod_fails_as_it_does_everywhere() {
    let Some((world, _release)) = shared().await else { return };
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;
    let spec = container(&format!("{host}/{namespace}/app:1"));

    world.pod(&namespace, "opted-out", json!({ "ecr-cname.dev/rewrite": "disabled" }), spec.clone()).await;
    let error = world.pull_error(&namespace, "opted-out").await;
    assert!(error.contains("x509: certificate is valid for *.dkr.ecr.us-east-1.amazonaws.com"), "{error}");
    assert!(error.contains(&format!("not {host}")), "{error}");

    world.pod(&namespace, "rewritten", json!({}), spec).await;
    world.running(&namespace, "rewritten").await;
}

#[tokio::test]
async fn a_name_that_follows_its_cname_is_pulled() {
    let Some((world, _release)) = shared().await else { return };
    let namespace = world.namespace(&[]).await;
    let spec = json!({ "registry": null, "allowedAccounts": ["123456789012"], "repositoryPrefix": "mirror" });
    let host = world.alias(&namespace, spec).await;

    let pod = world.pod(&namespace, "app", json!({}), container(&format!("{host}/{namespace}/app:1"))).await;
    assert_eq!(image(&pod), format!("{HOST}/mirror/{namespace}/app:1"));
    world.running(&namespace, "app").await;
    pulled(world, &format!("mirror/{namespace}/app"), ROLE);
}

#[tokio::test]
async fn a_namespace_that_is_created_later_pulls_at_once() {
    let Some((world, _release)) = shared().await else { return };
    let name = world.namespace(&[]).await;
    let selector = json!({ "namespaceSelector": { "matchLabels": { "team": name } } });
    let host = world.alias_of(&name, &selector).await;

    let later = world.namespace(&[("team", &name)]).await;
    world.pod(&later, "app", json!({}), container(&format!("{host}/{later}/app:1"))).await;
    world.running(&later, "app").await;
    pulled(world, &format!("{later}/app"), ROLE);
}

#[tokio::test]
async fn without_a_pull_secret_of_ours_the_name_is_rewritten_and_the_users_own_credentials_count() {
    let Some((world, _release)) = shared().await else { return };
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({ "pullSecret": "None" })).await;
    let spec = container(&format!("{host}/{namespace}/app:1"));

    let pod = world.pod(&namespace, "without", json!({}), spec.clone()).await;
    assert_eq!(image(&pod), format!("{HOST}/{namespace}/app:1"));
    assert_eq!(pod["spec"]["imagePullSecrets"], Value::Null);
    let error = world.pull_error(&namespace, "without").await;
    assert!(error.contains("401 Unauthorized"), "{error}");
    assert_eq!(world.get(&namespace, "secret/ecr-cname").await, None);

    let other = "arn:aws:iam::123456789012:role/somebody";
    let token = world.cluster.aws.login_password(other, crate::world::LIMIT * 2).unwrap();
    world.apply(&pull_secret(&namespace, "own", &token)).await;
    let secrets = json!({ "imagePullSecrets": [{ "name": "own" }] });
    world.pod(&namespace, "with", json!({}), with(spec, secrets)).await;
    world.running(&namespace, "with").await;
    pulled(world, &format!("{namespace}/app"), other);
}

/// The registry gave the image in `repository` to a token of `role`.
fn pulled(world: &World, repository: &str, role: &str) {
    let requests = world.cluster.registry.requests_for(repository);
    let with_token = |request: &Request| match &request.caller {
        Caller::Token { role: caller, .. } => caller == role && request.status == 200,
        _ => false,
    };
    assert!(requests.iter().any(with_token), "no pull of {repository} with a token of {role}: {requests:#?}");
}

fn image(pod: &Value) -> &str {
    pod["spec"]["containers"][0]["image"].as_str().unwrap()
}
