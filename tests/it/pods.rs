//! Pods on the real API server: what of them is rewritten, and what is left alone.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::cluster::{REGISTRY, images, pull_secrets, shared, unique};

/// An alias of its own, ready, and its host.
async fn alias(extra: Value) -> (String, String) {
    let name = unique("pods");
    let host = format!("{name}.example.io");
    let mut spec = json!({"host": host, "registry": REGISTRY});
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    shared().await.alias(&name, spec).await;
    (name, host)
}

#[tokio::test]
async fn a_friendly_name_is_stored_as_the_registry_and_the_secret_is_there() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let pod = cluster.pod(&namespace, "web", &format!("{host}/team/app:1")).await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/team/app:1")]);
    assert_eq!(pull_secrets(&pod), ["ecr-cname"]);
    let trace = &pod.annotations()["ecr-cname.dev/original-images"];
    assert_eq!(*trace, format!(r#"{{"spec.containers{{app}}":"{host}/team/app:1"}}"#));
    let token = cluster.token(&namespace, REGISTRY).await;
    assert!(cluster.aws.is_valid(&token));
}

#[tokio::test]
async fn upper_case_tag_and_digest_and_every_kind_of_container() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let digest = format!("sha256:{}", "0".repeat(64));
    let spec = json!({
        "initContainers": [{"name": "init", "image": format!("{}/init:1@{digest}", host.to_uppercase())}],
        "containers": [{"name": "plain", "image": "nginx"}, {"name": "app", "image": format!("{host}/app")}],
    });
    let pod = cluster.try_pod(&namespace, "web", spec).await.unwrap();
    assert_eq!(images(&pod), ["nginx".to_owned(), format!("{REGISTRY}/app")]);
    let init = pod.spec.unwrap().init_containers.unwrap().remove(0).image.unwrap();
    assert_eq!(init, format!("{REGISTRY}/init:1@{digest}"));
}

/// Image volumes: "missing path" only on a real API server: zarf PR #3235.
#[tokio::test]
async fn an_image_volume() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let spec = json!({
        "containers": [{"name": "app", "image": "nginx", "volumeMounts": [{"name": "model", "mountPath": "/model"}]}],
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "model", "image": {"reference": format!("{host}/model:1")}},
        ],
    });
    let pod = cluster.try_pod(&namespace, "web", spec).await.unwrap();
    assert_eq!(images(&pod), ["nginx"]);
    let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
    let reference =
        volumes.iter().find(|v| v.name == "model").unwrap().image.as_ref().unwrap().reference.clone();
    assert_eq!(reference.unwrap(), format!("{REGISTRY}/model:1"));
    assert_eq!(pull_secrets(&pod), ["ecr-cname"]);
}

/// `kubectl debug` images missed, or the second debug fails: kyverno #4716, #9152; kube-image-keeper #149.
#[tokio::test]
async fn kubectl_debug_twice() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    cluster.pod(&namespace, "web", &format!("{host}/app:1")).await;
    for n in [1, 2] {
        let (image, container) = (format!("--image={host}/debug:{n}"), format!("--container=debug-{n}"));
        cluster.control_plane.kubectl(&["debug", "web", "-n", &namespace, &image, &container]).await.unwrap();
    }
    let pod = Api::<Pod>::namespaced(cluster.client(), &namespace).get("web").await.unwrap();
    let debug: Vec<_> =
        pod.spec.unwrap().ephemeral_containers.unwrap().into_iter().map(|c| c.image.unwrap()).collect();
    assert_eq!(debug, [format!("{REGISTRY}/debug:1"), format!("{REGISTRY}/debug:2")]);
}

/// Patching pods on UPDATE: stuck Terminating, Forbidden: gatekeeper #2196, #4121; opentelemetry-operator #1514.
#[tokio::test]
async fn an_update_that_changes_no_image_is_not_patched_and_deletion_is_not_blocked() {
    let cluster = shared().await;
    let name = unique("pods");
    let host = format!("{name}.example.io");
    let namespace = cluster.namespace(&[]).await;
    // The pod is older than the alias, so it runs with the friendly name.
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "old", "finalizers": ["example.io/x"]},
        "spec": {"containers": [{"name": "app", "image": format!("{host}/app:1")}]}});
    cluster.try_create(&namespace, pod).await.unwrap();
    cluster.alias(&name, json!({"host": host, "registry": REGISTRY})).await;

    let pods: Api<Pod> = Api::namespaced(cluster.client(), &namespace);
    let labelled = json!({"metadata": {"labels": {"a": "b"}}});
    let pod = pods.patch("old", &PatchParams::default(), &Patch::Merge(labelled)).await.unwrap();
    assert_eq!(images(&pod), [format!("{host}/app:1")]);
    assert_eq!(pull_secrets(&pod), [""; 0]);

    pods.delete("old", &DeleteParams::default().grace_period(0)).await.unwrap();
    let finalized = json!({"metadata": {"finalizers": null}});
    pods.patch("old", &PatchParams::default(), &Patch::Merge(finalized)).await.unwrap();
    assert!(pods.get_opt("old").await.unwrap().is_none());

    // An image that an update changes is rewritten: `kubectl set image`.
    cluster.pod(&namespace, "new", "nginx").await;
    let image = json!({"spec": {"containers": [{"name": "app", "image": format!("{host}/app:2")}]}});
    let pod = pods.patch("new", &PatchParams::default(), &Patch::Strategic(image)).await.unwrap();
    assert_eq!(images(&pod), [format!("{REGISTRY}/app:2")]);
}

/// Secrets injected into mirror pods: they vanish from the API: kube-image-keeper #560.
#[tokio::test]
async fn a_mirror_pod_is_left_alone() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let image = format!("{host}/app:1");
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "static-node", "annotations": {"kubernetes.io/config.mirror": "abc"}},
        "spec": {"nodeName": "node", "containers": [{"name": "app", "image": image}]}});
    let pod = cluster.try_create(&namespace, pod).await.unwrap();
    assert_eq!(images(&pod), [image]);
    assert_eq!(pull_secrets(&pod), [""; 0]);
}

#[tokio::test]
async fn a_pod_or_a_namespace_may_opt_out() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let image = format!("{host}/app:1");
    let namespace = cluster.namespace(&[]).await;
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "out", "labels": {"ecr-cname.dev/rewrite": "disabled"}},
        "spec": {"containers": [{"name": "app", "image": image}]}});
    assert_eq!(images(&cluster.try_create(&namespace, pod).await.unwrap()), std::slice::from_ref(&image));

    let out = cluster.namespace(&[("ecr-cname.dev/rewrite", "disabled")]).await;
    assert_eq!(images(&cluster.pod(&out, "web", &image).await), std::slice::from_ref(&image));

    // kube-system is left out by name.
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": unique("sys")},
        "spec": {"containers": [{"name": "app", "image": image}]}});
    cluster.control_plane.service_account("kube-system", "default").await.unwrap();
    assert_eq!(images(&cluster.try_create("kube-system", pod).await.unwrap()), [image]);
}

#[tokio::test]
async fn pull_secrets_are_appended_never_replaced() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let spec = json!({
        "imagePullSecrets": [{"name": "mine"}],
        "containers": [{"name": "app", "image": format!("{host}/app")}],
    });
    let pod = cluster.try_pod(&namespace, "web", spec).await.unwrap();
    assert_eq!(pull_secrets(&pod), ["mine", "ecr-cname"]);
}

#[tokio::test]
async fn which_pods_get_the_secret_is_the_aliass_to_say() {
    let cluster = shared().await;
    let namespace = cluster.namespace(&[]).await;
    let (_, none) = alias(json!({"pullSecret": "None"})).await;
    let pod = cluster.pod(&namespace, "none", &format!("{none}/app")).await;
    assert_eq!((images(&pod), pull_secrets(&pod)), (vec![format!("{REGISTRY}/app")], vec![]));

    let registry = "222222222222.dkr.ecr.us-east-1.amazonaws.com";
    let canonical = format!("{registry}/app");
    let pod = cluster.pod(&namespace, "before", &canonical).await;
    assert_eq!(pull_secrets(&pod), [""; 0]);
    alias(json!({"registry": registry, "pullSecret": "Registry"})).await;
    let pod = cluster.pod(&namespace, "after", &canonical).await;
    assert_eq!((images(&pod), pull_secrets(&pod)), (vec![canonical], vec!["ecr-cname".to_owned()]));
}

#[tokio::test]
async fn a_repository_prefix_for_a_pull_through_cache() {
    let cluster = shared().await;
    let (_, host) = alias(json!({"repositoryPrefix": "docker-hub"})).await;
    let namespace = cluster.namespace(&[]).await;
    let pod = cluster.pod(&namespace, "web", &format!("{host}/library/nginx:1.27")).await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/docker-hub/library/nginx:1.27")]);
}

#[tokio::test]
async fn a_dry_run_shows_the_same_and_stores_nothing() {
    let cluster = shared().await;
    let (_, host) = alias(json!({})).await;
    let namespace = cluster.namespace(&[]).await;
    let image = format!("--image={host}/app:1");
    let run = [
        "run",
        "dry",
        "-n",
        &namespace,
        &image,
        "--dry-run=server",
        "-o",
        "jsonpath={.spec.containers[0].image}",
    ];
    assert_eq!(cluster.control_plane.kubectl(&run).await.unwrap(), format!("{REGISTRY}/app:1"));
    assert!(Api::<Pod>::namespaced(cluster.client(), &namespace).get_opt("dry").await.unwrap().is_none());
}

/// The conditions that the API server evaluates stay within its budget for the largest pods, new and old.
#[tokio::test]
async fn a_very_large_pod() {
    let cluster = shared().await;
    let name = unique("large");
    let host = format!("{name}.example.io");
    let namespace = cluster.namespace(&[]).await;
    let containers: Vec<_> =
        (0..1000).map(|i| json!({"name": format!("c{i}"), "image": format!("{host}/app-{i}")})).collect();
    cluster.try_pod(&namespace, "old", json!({"containers": containers})).await.unwrap();
    cluster.alias(&name, json!({"host": host, "registry": REGISTRY})).await;
    let pod = cluster.try_pod(&namespace, "new", json!({"containers": containers})).await.unwrap();
    assert!(images(&pod).iter().all(|image| image.starts_with(REGISTRY)));
    let pods: Api<Pod> = Api::namespaced(cluster.client(), &namespace);
    let labelled = json!({"metadata": {"labels": {"a": "b"}}});
    pods.patch("old", &PatchParams::default(), &Patch::Merge(labelled)).await.unwrap();
    let mut debug = pods.get("old").await.unwrap();
    let image = format!("{host}/debug");
    debug.spec.as_mut().unwrap().ephemeral_containers =
        Some(vec![serde_json::from_value(json!({"name": "debug", "image": image})).unwrap()]);
    let debug = pods.replace_ephemeral_containers("old", &Default::default(), &debug).await.unwrap();
    let image = debug.spec.unwrap().ephemeral_containers.unwrap().remove(0).image;
    assert_eq!(image, Some(format!("{REGISTRY}/debug")));
}
