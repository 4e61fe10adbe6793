//! The life of a release: tested, upgraded and rolled back under load.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};
use testbed::{
    aws::{Operation, Scope},
    operator::{NAMESPACE, ROLE},
    registry::HOST,
};
use tokio::sync::watch;

use crate::world::{Release, World, alone, container, shared};

#[tokio::test]
async fn helm_test_passes_and_only_the_controller_has_an_identity() {
    let Some((world, _release)) = shared().await else { return };
    world.helm(&["test", "ecr-cname", "--timeout=2m"]).await;

    let namespace = world.namespace(&[]).await;
    world.alias(&namespace, json!({})).await;
    assert!(world.cluster.aws.count(&Scope::of(Operation::AssumeRoleWithWebIdentity)) > 0);
    for pod in world.list(NAMESPACE, "pods").await {
        let component = &pod["metadata"]["labels"]["app.kubernetes.io/component"];
        let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        let role =
            env.iter().find(|variable| variable["name"] == "AWS_ROLE_ARN").map(|variable| &variable["value"]);
        assert_eq!(role, (component == "controller").then_some(&json!(ROLE)), "{component}");
    }
}

#[tokio::test]
async fn an_upgrade_changes_aliases_a_rollback_brings_them_back_and_no_admission_is_lost() {
    let Some((world, mut release)) = alone().await else { return };
    *release = Release::Other;
    let default = revision(world).await;
    let namespace = world.namespace(&[]).await;
    let (first, second) = (world.friendly_host("first"), world.friendly_host("second"));
    let first_values = [format!("aliases.first.host={first}"), format!("aliases.first.registry={HOST}")];
    let second_values = [
        format!("aliases.second.host={second}"),
        format!("aliases.second.registry={HOST}"),
        // New pods, of both components.
        "podAnnotations.generation=second".to_owned(),
    ];
    // One that stays, whose pods are admitted all the time.
    let steady = world.alias(&namespace, json!({})).await;

    world.upgrade(&first_values.each_ref().map(String::as_str)).await;
    registered(world, "first").await;
    let before = revision(world).await;
    let load = Load::start(world, &namespace, &format!("{steady}/{namespace}/app:1"));

    world.upgrade(&second_values.each_ref().map(String::as_str)).await;
    registered(world, "second").await;
    assert_eq!(world.get("", "registryalias/first").await, None);
    world.pod(&namespace, "second", json!({}), container(&format!("{second}/{namespace}/second:1"))).await;
    world.running(&namespace, "second").await;

    world.helm(&["rollback", "ecr-cname", &before, "--wait", "--timeout=4m"]).await;
    registered(world, "first").await;
    assert_eq!(world.get("", "registryalias/second").await, None);
    world.pod(&namespace, "first", json!({}), container(&format!("{first}/{namespace}/first:1"))).await;
    world.running(&namespace, "first").await;

    let (admitted, lost) = load.stop().await;
    world.helm(&["rollback", "ecr-cname", &default, "--wait", "--timeout=4m"]).await;
    *release = Release::Default;
    assert_eq!(lost, Vec::<String>::new(), "lost beside {admitted} that were admitted");
    assert!(admitted > 20, "only {admitted} pods were admitted");
}

/// Waits until an alias is registered.
async fn registered(world: &World, alias: &str) {
    world
        .until(&format!("alias {alias} to be ready"), NAMESPACE, async || {
            let alias = world.get("", &format!("registryalias/{alias}")).await?;
            crate::world::condition(&alias, "Ready").filter(|status| status == "True")
        })
        .await;
}

async fn revision(world: &World) -> String {
    let history = world.helm(&["history", "ecr-cname", "--max=1", "--output=json"]).await;
    let history: Value = serde_json::from_str(&history).unwrap();
    history[0]["revision"].to_string()
}

/// Somebody creates pods with an image, one after the other.
struct Load {
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<(usize, Vec<String>)>,
}

impl Load {
    fn start(world: &World, namespace: &str, image: &str) -> Self {
        let pods: Api<Pod> = Api::namespaced(world.cluster.control_plane.kube_client().unwrap(), namespace);
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "load" }, "spec": container(image),
        }))
        .unwrap();
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let (mut admitted, mut lost) = (0, Vec::new());
            let mut interval = tokio::time::interval(Duration::from_millis(50));
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while !*stopped.borrow() {
                interval.tick().await;
                // The webhook is asked for a dry run as for anything else.
                let dry_run = PostParams { dry_run: true, ..PostParams::default() };
                match pods.create(&dry_run, &pod).await {
                    Ok(stored) => {
                        let image = stored.spec.unwrap().containers[0].image.clone().unwrap();
                        if image.starts_with(HOST) {
                            admitted += 1;
                        } else {
                            lost.push(format!("admitted as {image}"));
                        }
                    }
                    Err(error) => lost.push(error.to_string()),
                }
            }
            (admitted, lost)
        });
        Self { stop, task }
    }

    /// How many were admitted and rewritten, and what became of the others.
    async fn stop(self) -> (usize, Vec<String>) {
        self.stop.send_replace(true);
        self.task.await.unwrap()
    }
}
