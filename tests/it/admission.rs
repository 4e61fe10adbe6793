//! The admission cases in `tests/fixtures/admission/`: a pod, and what must come out.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use axum::{
    body::{Body, to_bytes},
    http::Request,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use ecr_cname::{
    admin::Readiness,
    alias::{Group, accept},
    crd::RegistryAlias,
    manifest,
    matching::FailurePolicy,
    metrics,
    review::parse,
    server::Limits,
    table::AliasTable,
    webhook::{Settings, Webhook},
};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use tower::ServiceExt as _;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Case {
    #[serde(default = "create")]
    operation: String,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    pod: Option<Value>,
    #[serde(default)]
    old_pod: Option<Value>,
    expect: Expect,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Expect {
    #[serde(default)]
    untouched: bool,
    denied: Option<String>,
    #[serde(default)]
    images: BTreeMap<String, String>,
    #[serde(default)]
    pull_secrets: Vec<String>,
    trace: Option<BTreeMap<String, String>>,
}

fn create() -> String {
    "CREATE".to_owned()
}

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/admission"))
}

fn objects() -> Vec<RegistryAlias> {
    let text = fs::read_to_string(fixtures().join("aliases.yaml")).unwrap();
    let documents = manifest::documents(&text).unwrap().into_iter();
    documents.map(|d| serde_json::from_value(d.value).unwrap()).collect()
}

fn table() -> AliasTable {
    let accepted = accept(objects());
    assert!(accepted.refused.is_empty(), "{:?}", accepted.refused);
    AliasTable::new(&accepted.aliases)
}

const LIMITS: Limits =
    Limits { connections: 4, memory: 4 << 20, body: 1 << 20, time: Duration::from_secs(5) };

fn webhook(audit: bool, failure_policy: FailurePolicy) -> Arc<Webhook> {
    let settings = Settings { pull_secret: "ecr-cname".to_owned(), audit, failure_policy };
    let table = Arc::new(ArcSwap::from_pointee(table()));
    let (_, updates) = tokio::sync::watch::channel(Arc::default());
    Webhook::new(table, updates, settings, LIMITS, &mut metrics::registry())
}

/// The group of the aliases that select every namespace.
fn everywhere() -> Group {
    Group::of(&Default::default())
}

/// The digest that the entry of that group is registered with.
fn digest() -> String {
    let accepted = accept(objects());
    let parts = ecr_cname::matching::parts(&accepted.aliases);
    parts.into_iter().find(|part| part.group == everywhere()).unwrap().digest
}

fn review(operation: &str, sub_resource: &str, pod: Option<&Value>, old: Option<&Value>) -> Value {
    json!({
        "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "subResource": sub_resource, "name": "web", "namespace": "shop", "operation": operation,
            "userInfo": {"username": "dev", "groups": ["system:authenticated"]},
            "object": pod, "oldObject": old, "dryRun": false, "options": null
        }
    })
}

fn answer(webhook: &Webhook, review: &Value) -> Value {
    let body = serde_json::to_vec(review).unwrap();
    let answer = webhook
        .answer(everywhere().as_str(), &digest(), parse(&body))
        .unwrap_or_else(|(s, text)| panic!("{s}: {text}"));
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["response"]["uid"], review["request"]["uid"]);
    answer["response"].clone()
}

/// Applies the patch of an answer with an independent implementation of RFC 6902. `None` where there is none.
fn patched(response: &Value, pod: &Value) -> Option<Value> {
    let patch = STANDARD.decode(response.get("patch")?.as_str().unwrap()).unwrap();
    assert_eq!(response["patchType"], "JSONPatch");
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    assert!(!patch.0.is_empty(), "an empty patch is no patch");
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, &patch).unwrap();
    Some(pod)
}

fn images(pod: &Value) -> BTreeMap<String, String> {
    let mut images = BTreeMap::new();
    for list in ["containers", "initContainers", "ephemeralContainers", "volumes"] {
        for member in pod["spec"][list].as_array().into_iter().flatten() {
            let image = if list == "volumes" { &member["image"]["reference"] } else { &member["image"] };
            if let Some(image) = image.as_str() {
                images.insert(format!("{list}[{}]", member["name"].as_str().unwrap()), image.to_owned());
            }
        }
    }
    images
}

#[test]
fn every_fixture() {
    let webhook = webhook(false, FailurePolicy::Fail);
    let mut cases = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if name == "aliases" {
            continue;
        }
        let document = manifest::documents(&fs::read_to_string(&path).unwrap()).unwrap().remove(0);
        let mut case: Case = serde_json::from_value(document.value).unwrap_or_else(|e| panic!("{name}: {e}"));
        // The API server always sends metadata; a case need not say so.
        if let Some(pod) = case.pod.as_mut().filter(|pod| pod.get("metadata").is_none()) {
            pod["metadata"] = json!({});
        }
        check(&webhook, &name, &case);
        cases += 1;
    }
    assert!(cases > 15, "only {cases} cases found");
}

fn check(webhook: &Webhook, name: &str, case: &Case) {
    let review = review(&case.operation, &case.sub_resource, case.pod.as_ref(), case.old_pod.as_ref());
    let response = answer(webhook, &review);
    let again = answer(webhook, &{
        let mut dry_run = review.clone();
        dry_run["request"]["dryRun"] = json!(true);
        dry_run
    });
    assert_eq!(response, again, "{name}: a dry run is answered the same");
    if let Some(expected) = &case.expect.denied {
        assert_eq!(response["allowed"], false, "{name}");
        let message = response["status"]["message"].as_str().unwrap();
        assert!(message.contains(expected), "{name}: {message}");
        return;
    }
    assert_eq!(response["allowed"], true, "{name}: {response}");
    let pod = case.pod.clone().unwrap_or_default();
    let Some(after) = patched(&response, &pod) else {
        assert!(case.expect.untouched, "{name}: nothing was patched");
        return;
    };
    assert!(!case.expect.untouched, "{name}: patched to {after}");
    assert_eq!(images(&after), case.expect.images, "{name}");
    let secrets: Vec<_> = after["spec"]["imagePullSecrets"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(secrets, case.expect.pull_secrets, "{name}");
    let trace = after["metadata"]["annotations"]["ecr-cname.dev/original-images"].as_str();
    if let Some(expected) = &case.expect.trace {
        let trace: BTreeMap<String, String> = serde_json::from_str(trace.unwrap()).unwrap();
        assert_eq!(trace, *expected, "{name}");
    }
    // f(f(x)) = f(x)
    let mut second = review.clone();
    second["request"]["object"] = after.clone();
    assert_eq!(patched(&answer(webhook, &second), &after), None, "{name}: a second call changes more");
    // Nothing but images, pull secrets and the one annotation has changed.
    assert_eq!(without_ours(&after), without_ours(&pod), "{name}");
}

/// A pod less all that may be patched.
fn without_ours(pod: &Value) -> Value {
    let mut pod = pod.clone();
    for list in ["containers", "initContainers", "ephemeralContainers", "volumes"] {
        for member in pod["spec"][list].as_array_mut().into_iter().flatten() {
            if list == "volumes" {
                if let Some(image) = member["image"].as_object_mut() {
                    image.remove("reference");
                }
            } else {
                member.as_object_mut().unwrap().remove("image");
            }
        }
    }
    if let Some(spec) = pod["spec"].as_object_mut() {
        spec.remove("imagePullSecrets");
    }
    if !pod["metadata"].is_object() {
        pod["metadata"] = json!({});
    }
    let metadata = pod["metadata"].as_object_mut().unwrap();
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove("ecr-cname.dev/original-images");
        if annotations.is_empty() {
            metadata.remove("annotations");
        }
    }
    pod
}

fn tagged_pod() -> Value {
    json!({"metadata": {}, "spec": {"containers": [{"name": "app", "image": "docker-ecr.internal.example.io/app:1"}]}})
}

#[test]
fn audit_mode_warns_and_patches_nothing() {
    let webhook = webhook(true, FailurePolicy::Fail);
    let response = answer(&webhook, &review("CREATE", "", Some(&tagged_pod()), None));
    assert_eq!(response["allowed"], true);
    assert!(response.get("patch").is_none());
    let warning = response["warnings"][0].as_str().unwrap();
    assert!(warning.contains("123456789012.dkr.ecr.us-east-1.amazonaws.com/app:1"), "{warning}");
}

#[test]
fn who_debugs_a_pod_without_the_pull_secret_is_warned() {
    let webhook = webhook(false, FailurePolicy::Fail);
    let pod = |debug: &str, secrets: Value| {
        json!({"metadata": {}, "spec": {
            "containers": [{"name": "app", "image": "nginx"}],
            "ephemeralContainers": [{"name": "debug", "image": debug}],
            "imagePullSecrets": secrets}})
    };
    let warnings = |debug: &str, secrets: Value| {
        let (new, mut old) = (pod(debug, secrets.clone()), pod(debug, secrets));
        old["spec"].as_object_mut().unwrap().remove("ephemeralContainers");
        answer(&webhook, &review("UPDATE", "ephemeralcontainers", Some(&new), Some(&old)))["warnings"].clone()
    };
    let alias = "docker-ecr.internal.example.io/debug";
    let said = warnings(alias, json!([{"name": "other"}]));
    assert!(said[0].as_str().unwrap().contains("the pod has no pull secret \"ecr-cname\""), "{said}");
    assert_eq!(warnings(alias, json!([{"name": "ecr-cname"}])), Value::Null);
    assert_eq!(warnings("names.example.io/debug", json!([])), Value::Null, "an alias without a pull secret");
    assert_eq!(warnings("busybox", json!([])), Value::Null);
}

#[test]
fn an_unresolved_alias_passes_with_a_warning_under_ignore() {
    let webhook = webhook(false, FailurePolicy::Ignore);
    let pod = json!({"spec": {"containers": [{"name": "app", "image": "followed.example.io/app"}]}});
    let response = answer(&webhook, &review("CREATE", "", Some(&pod), None));
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("unresolved"));
}

/// A replica that is behind the API server refuses what it cannot judge, if it is new; no other pod, ever.
#[test]
fn a_new_pod_of_an_alias_that_is_not_known_yet_is_refused() {
    let webhook = webhook(false, FailurePolicy::Fail);
    let stranger = json!({"spec": {"containers": [{"name": "app", "image": "new.example.io/app"}]}});
    let (group, current) = (everywhere(), digest());
    let allowed = |group: &str, digest: &str, operation: &str, pod: &Value| {
        let body = serde_json::to_vec(&review(operation, "", Some(pod), Some(&json!({})))).unwrap();
        let answer = webhook.answer(group, digest, parse(&body)).unwrap();
        serde_json::from_slice::<Value>(&answer).unwrap()["response"]["allowed"].as_bool().unwrap()
    };
    assert!(!allowed("0123456789", "0123456789", "CREATE", &stranger), "an unknown group");
    assert!(!allowed(group.as_str(), "0123456789", "CREATE", &stranger), "an unknown host in a known group");
    assert!(allowed(group.as_str(), "0123456789", "CREATE", &tagged_pod()), "a known host");
    // Were the entry to lose its condition, ordinary pods would still pass.
    assert!(allowed(group.as_str(), &current, "CREATE", &stranger), "an ordinary pod");
    assert!(allowed("0123456789", "0123456789", "UPDATE", &stranger), "an update");
}

/// A pod with an alias that is known and one that is not yet is neither refused nor half rewritten: it waits for the watch.
#[tokio::test]
async fn a_new_pod_waits_for_the_alias_that_is_not_known_yet() {
    let objects = objects();
    let all = accept(objects.clone());
    let fewer = accept(objects.into_iter().filter(|o| o.spec.host != "everywhere.example.io"));
    assert!(fewer.aliases.len() < all.aliases.len());
    let table = Arc::new(ArcSwap::from_pointee(AliasTable::new(&fewer.aliases)));
    let (watch, updates) = tokio::sync::watch::channel(Arc::default());
    let settings =
        Settings { pull_secret: "ecr-cname".to_owned(), audit: false, failure_policy: FailurePolicy::Fail };
    let webhook = Webhook::new(Arc::clone(&table), updates, settings, LIMITS, &mut metrics::registry());

    let pod = json!({"metadata": {}, "spec": {"containers": [
        {"name": "known", "image": "docker-ecr.internal.example.io/team/app"},
        {"name": "new", "image": "everywhere.example.io/app"}]}});
    let request = Request::post(format!("/mutate/{}/{}", everywhere(), digest()))
        .header("content-type", "application/json")
        .body(Body::from(review("CREATE", "", Some(&pod), None).to_string()))
        .unwrap();
    let learns = async {
        table.store(Arc::new(AliasTable::new(&all.aliases)));
        watch.send_replace(Arc::default());
    };
    // The request comes first, and finds the old table.
    let (response, ()) = tokio::join!(biased; webhook.route(Readiness::default()).oneshot(request), learns);
    let body = to_bytes(response.unwrap().into_body(), usize::MAX).await.unwrap();
    let response: Value = serde_json::from_slice(&body).unwrap();
    let images = images(&patched(&response["response"], &pod).unwrap());
    assert!(images.values().all(|image| image.contains(".dkr.ecr.")), "{images:?}");
}

#[test]
fn the_annotation_is_capped() {
    let webhook = webhook(false, FailurePolicy::Fail);
    let containers: Vec<_> = (0..1000)
        .map(|i| json!({"name": format!("c{i}"), "image": format!("docker-ecr.internal.example.io/team/app-{i}:1")}))
        .collect();
    let pod = json!({"metadata": {}, "spec": {"containers": containers}});
    let after = patched(&answer(&webhook, &review("CREATE", "", Some(&pod), None)), &pod).unwrap();
    assert!(images(&after).values().all(|i| i.starts_with("123456789012.")));
    let trace = after["metadata"]["annotations"]["ecr-cname.dev/original-images"].as_str().unwrap();
    assert!(trace.len() < 20_000, "{}", trace.len());
    let trace: BTreeMap<String, String> = serde_json::from_str(trace).unwrap();
    assert!(trace["…"].ends_with(" more"), "{trace:?}");
}

fn any_image() -> impl Strategy<Value = String> {
    let hosts = "(docker-ecr\\.internal\\.example\\.io|DOCKER-ecr.internal.example.io|hub\\.example\\.io:5000|names\\.example\\.io|everywhere\\.example\\.io|ghcr\\.io)";
    prop_oneof![
        (hosts, "[a-z0-9]{1,6}(/[a-z0-9]{1,6}){0,2}", "(:[a-z0-9.]{1,6})?(@sha256:[0-9a-f]{64})?")
            .prop_map(|(host, path, rest)| format!("{host}/{path}{rest}")),
        "\\PC{0,40}",
        Just("nginx".to_owned()),
    ]
}

fn any_pod() -> impl Strategy<Value = Value> {
    let list = proptest::collection::vec(proptest::option::of(any_image()), 0..4).boxed();
    let secrets = proptest::option::of(proptest::collection::vec("(ecr-cname|a|b)", 0..3));
    let annotations = proptest::option::of(proptest::collection::btree_map(
        "(a|ecr-cname.dev/original-images)",
        "(\\PC{0,10}|\\{\"x\":\"y\"\\}|\\{\"x\":1\\})",
        0..3,
    ));
    (list.clone(), list.clone(), list, secrets, annotations).prop_map(|(c, i, v, secrets, annotations)| {
        let containers = |images: Vec<Option<String>>, prefix: &str| -> Vec<Value> {
            let one = |(n, image)| json!({"name": format!("{prefix}{n}"), "image": image, "x": [n]});
            images.into_iter().enumerate().map(one).collect()
        };
        let volumes: Vec<Value> = v
            .into_iter()
            .enumerate()
            .map(|(n, image)| json!({"name": format!("v{n}"), "image": {"reference": image}}))
            .collect();
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {
            "containers": containers(c, "c"), "initContainers": containers(i, "i"), "volumes": volumes}});
        if let Some(secrets) = secrets {
            let names: Vec<_> = secrets.into_iter().map(|n| json!({"name": n})).collect();
            pod["spec"]["imagePullSecrets"] = json!(names);
        }
        if let Some(annotations) = annotations {
            pod["metadata"]["annotations"] = json!(annotations);
        }
        pod
    })
}

/// What an image must become: the rule once more, in other words, on decoded strings.
fn expected(image: &str) -> String {
    let aliases = [
        ("docker-ecr.internal.example.io", "123456789012.dkr.ecr.us-east-1.amazonaws.com"),
        ("hub.example.io:5000", "123456789012.dkr.ecr.us-east-1.amazonaws.com/docker-hub"),
        ("names.example.io", "210987654321.dkr.ecr.eu-west-1.amazonaws.com"),
        ("everywhere.example.io", "333333333333.dkr.ecr.eu-west-1.amazonaws.com"),
    ];
    let valid = ecr_cname::image::ImageRef::parse(image).is_ok();
    match image.split_once('/') {
        Some((host, rest)) if valid => aliases
            .iter()
            .find(|(alias, _)| host.eq_ignore_ascii_case(alias))
            .map_or(image.to_owned(), |(_, registry)| format!("{registry}/{rest}")),
        _ => image.to_owned(),
    }
}

proptest! {
    #[test]
    fn the_patch_equals_rewriting_the_decoded_pod(pod in any_pod()) {
        let webhook = webhook(false, FailurePolicy::Fail);
        let response = answer(&webhook, &review("CREATE", "", Some(&pod), None));
        let after = patched(&response, &pod).unwrap_or_else(|| pod.clone());
        let wanted: BTreeMap<_, _> = images(&pod).into_iter().map(|(k, image)| (k, expected(&image))).collect();
        prop_assert_eq!(images(&after), wanted);
        prop_assert_eq!(without_ours(&after), without_ours(&pod));
        let second = answer(&webhook, &review("CREATE", "", Some(&after), None));
        prop_assert_eq!(patched(&second, &after), None);
        // What was there of pull secrets still is, in its order.
        let names = |pod: &Value| -> Vec<String> {
            pod["spec"]["imagePullSecrets"].as_array().into_iter().flatten().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
        };
        prop_assert!(names(&after).starts_with(&names(&pod)));
        prop_assert!(names(&after).len() <= names(&pod).len() + 1);
    }

    #[test]
    fn any_bytes_are_answered_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let webhook = webhook(false, FailurePolicy::Fail);
        prop_assert!(webhook.answer(everywhere().as_str(), &digest(), parse(&bytes)).is_err());
    }

    #[test]
    fn a_damaged_review_is_answered_and_never_panics(
        pod in any_pod(), cut in 0usize..1500, flip in proptest::collection::vec((0usize..1500, any::<u8>()), 0..4),
    ) {
        let webhook = webhook(false, FailurePolicy::Fail);
        let mut body = serde_json::to_vec(&review("UPDATE", "", Some(&pod), Some(&pod))).unwrap();
        body.truncate(cut.max(1));
        for (at, byte) in flip {
            if let Some(b) = body.get_mut(at) { *b = byte; }
        }
        if let Ok(answer) = webhook.answer(everywhere().as_str(), &digest(), parse(&body)) {
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            prop_assert!(answer["response"]["allowed"].is_boolean());
        }
    }
}
