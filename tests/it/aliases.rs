//! Aliases: what is refused, what becomes a condition, and how a change reaches the pods.

use kube::ResourceExt as _;
use serde_json::json;

use crate::cluster::{REGISTRY, await_object, images, shared, unique};

#[tokio::test]
async fn what_is_wrong_when_it_is_written_is_refused_by_the_api_server() {
    let cluster = shared().await;
    let selector =
        |operator: &str| json!({"matchExpressions": [{"key": "a", "operator": operator, "values": ["b"]}]});
    let cases = [
        (json!({"registry": REGISTRY}), "spec.host: Required value"),
        (json!({"host": "", "registry": REGISTRY}), "spec.host"),
        (json!({"host": "bare", "registry": REGISTRY}), "a host needs a dot or a port"),
        (json!({"host": "https://a.b", "registry": REGISTRY}), "spec.host"),
        (json!({"host": "a.b/c", "registry": REGISTRY}), "spec.host"),
        (json!({"host": REGISTRY, "registry": REGISTRY}), "host is itself an ECR host"),
        (json!({"host": REGISTRY.to_uppercase(), "registry": REGISTRY}), "host is itself an ECR host"),
        (json!({"host": "a.b", "registry": "ghcr.io"}), "not the host of an ECR private registry"),
        (
            json!({"host": "a.b", "registry": format!("{REGISTRY}.evil.example")}),
            "not the host of an ECR private registry",
        ),
        (
            json!({"host": "a.b", "registry": format!("https://{REGISTRY}")}),
            "not the host of an ECR private registry",
        ),
        (json!({"host": "a.b"}), "allowedAccounts is required when registry is omitted"),
        (
            json!({"host": "a.b", "allowedAccounts": []}),
            "allowedAccounts is required when registry is omitted",
        ),
        (json!({"host": "a.b", "allowedAccounts": ["1234"]}), "spec.allowedAccounts[0]"),
        (
            json!({"host": "a.b", "allowedAccounts": ["210987654321"], "registry": REGISTRY}),
            "not in allowedAccounts",
        ),
        (json!({"host": "a.b", "registry": REGISTRY, "repositoryPrefix": "/x"}), "spec.repositoryPrefix"),
        (
            json!({"host": "a.b", "registry": REGISTRY, "credentials": {"roleArn": "x"}}),
            "spec.credentials.roleArn",
        ),
        (
            json!({"host": "a.b", "registry": REGISTRY, "credentials": {"externalId": "xx"}}),
            "roleArn: Required value",
        ),
        (json!({"host": "a.b", "registry": REGISTRY, "pullSecret": "Some"}), "spec.pullSecret"),
        (json!({"host": "a.b", "registry": REGISTRY, "namespaceSelector": selector("in")}), "operator"),
    ];
    for (spec, expected) in cases {
        let error = cluster.try_create_alias(&unique("bad"), spec.clone()).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{spec}: {error}");
    }
    // A mis-nested config key silently does nothing: k8s-image-swapper #624.
    let yaml = "{apiVersion: ecr-cname.dev/v1alpha1, kind: RegistryAlias, metadata: {name: nested}, \
                spec: {host: a.b, registry: 123456789012.dkr.ecr.us-east-1.amazonaws.com, credentials: {roleARN: x}}}";
    let error =
        cluster.control_plane.kubectl_stdin(&["apply", "-f", "-"], yaml).await.unwrap_err().to_string();
    assert!(error.contains("unknown field \"spec.credentials.roleARN\""), "{error}");
}

#[tokio::test]
async fn a_change_reaches_the_next_pod_and_a_deletion_ends_it() {
    let cluster = shared().await;
    let name = unique("change");
    let host = format!("{name}.example.io");
    let namespace = cluster.namespace(&[]).await;
    cluster.alias(&name, json!({"host": host, "registry": REGISTRY})).await;
    let pod = cluster.pod(&namespace, "a", &format!("{host}/app")).await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);

    let moved = "123456789012.dkr.ecr.eu-central-1.amazonaws.com";
    cluster.patch_alias(&name, json!({"spec": {"registry": moved, "repositoryPrefix": "x"}})).await;
    cluster.ready(&name).await;
    let pod = cluster.pod(&namespace, "b", &format!("{host}/app")).await;
    assert_eq!(images(&pod), [format!("{moved}/x/app")]);
    assert!(cluster.aws.is_valid(&cluster.token(&namespace, moved).await));

    let renamed = format!("renamed-{host}");
    cluster.patch_alias(&name, json!({"spec": {"host": renamed}})).await;
    cluster.ready(&name).await;
    let pod = cluster.pod(&namespace, "c", &format!("{renamed}/app")).await;
    assert_eq!(images(&pod), [format!("{moved}/x/app")]);
    let pod = cluster.pod(&namespace, "d", &format!("{host}/app")).await;
    assert_eq!(images(&pod), [format!("{host}/app")]);

    cluster.delete_alias(&name).await;
    // The webhook entry goes with the alias.
    let api: kube::Api<k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration> =
        kube::Api::all(cluster.client());
    await_object(api, "ecr-cname", "the webhook configuration", |c| {
        let names_it = serde_json::to_string(&c?.webhooks).unwrap().contains(&renamed);
        (!names_it).then_some(())
    })
    .await;
    let pod = cluster.pod(&namespace, "e", &format!("{renamed}/app")).await;
    assert_eq!(images(&pod), [format!("{renamed}/app")]);
}

#[tokio::test]
async fn an_alias_says_what_it_resolved_to_and_prints_as_a_row() {
    let cluster = shared().await;
    let name = unique("row");
    cluster.alias(&name, json!({"host": format!("{name}.example.io"), "registry": REGISTRY})).await;
    let alias = cluster.ready(&name).await;
    let status = alias.status.as_ref().unwrap();
    assert_eq!(status.registry.as_deref(), Some(REGISTRY));
    assert!(status.token_expires_at.as_ref().unwrap().0 > jiff::Timestamp::now());
    let conditions: Vec<_> =
        status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
    assert_eq!(
        conditions,
        [("Resolved", "True"), ("TokenReady", "True"), ("SecretsSynced", "True"), ("Ready", "True")]
    );
    let row = cluster.control_plane.kubectl(&["get", "registryalias", &name]).await.unwrap();
    for column in ["HOST", "REGISTRY", "READY", "TOKEN-EXPIRES", "NAMESPACES", "AGE", REGISTRY, "True"] {
        assert!(row.contains(column), "{column}: {row}");
    }
    let note = cluster.event("default", &name, "Ready").await;
    assert!(note.contains("pods that name"), "{note}");
}

#[tokio::test]
async fn of_two_aliases_with_one_host_the_older_wins_and_the_younger_says_so() {
    let cluster = shared().await;
    let (older, younger) = (unique("a-twin"), unique("b-twin"));
    let host = format!("{older}.example.io");
    cluster.alias(&older, json!({"host": host, "registry": REGISTRY})).await;
    let other = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
    cluster.create_alias(&younger, json!({"host": host.to_uppercase(), "registry": other})).await;
    let refused = cluster.condition(&younger, "Resolved", |c| c.reason == "HostTaken").await;
    let message = &refused.status.unwrap().conditions[0].message;
    assert!(message.contains(&older) && message.contains("choose another host"), "{message}");
    cluster.event("default", &younger, "HostTaken").await;
    let namespace = cluster.namespace(&[]).await;
    assert_eq!(
        images(&cluster.pod(&namespace, "a", &format!("{host}/app")).await),
        [format!("{REGISTRY}/app")]
    );
    // When the older goes, the younger takes its place.
    cluster.delete_alias(&older).await;
    cluster.ready(&younger).await;
    assert_eq!(images(&cluster.pod(&namespace, "b", &format!("{host}/app")).await), [format!("{other}/app")]);
}

#[tokio::test]
async fn a_selector_decides_where_the_name_holds() {
    let cluster = shared().await;
    let name = unique("team");
    let host = format!("{name}.example.io");
    let (inside, outside) = (cluster.namespace(&[("team", &name)]).await, cluster.namespace(&[]).await);
    let registry = "444444444444.dkr.ecr.us-east-1.amazonaws.com";
    let selector = json!({"matchLabels": {"team": name}});
    cluster.alias(&name, json!({"host": host, "registry": registry, "namespaceSelector": selector})).await;
    let image = format!("{host}/app");
    assert_eq!(images(&cluster.pod(&inside, "web", &image).await), [format!("{registry}/app")]);
    assert_eq!(images(&cluster.pod(&outside, "web", &image).await), std::slice::from_ref(&image));
    cluster.token(&inside, registry).await;
    let alias = cluster.ready(&name).await;
    assert_eq!(alias.status.unwrap().namespaces.unwrap().selected, 1);
    // A label is all it takes.
    cluster.label_namespace(&outside, json!({"team": name})).await;
    cluster.token(&outside, registry).await;
    assert_eq!(images(&cluster.pod(&outside, "web-2", &image).await), [format!("{registry}/app")]);
}

/// The API server drops the empty parts of a selector from a webhook entry; that must not look like drift.
#[tokio::test]
async fn every_way_to_write_a_selector_of_all_namespaces() {
    let cluster = shared().await;
    for selector in [
        json!({}),
        json!({"matchLabels": {}}),
        json!({"matchExpressions": []}),
        json!({"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "Exists", "values": []}]}),
    ] {
        let name = unique("all");
        let host = format!("{name}.example.io");
        cluster
            .alias(&name, json!({"host": host, "registry": REGISTRY, "namespaceSelector": selector}))
            .await;
        let pod = cluster.pod(&cluster.namespace(&[]).await, "web", &format!("{host}/app")).await;
        assert_eq!(images(&pod), [format!("{REGISTRY}/app")], "{selector}");
    }
}

#[tokio::test]
async fn a_cname_is_followed_into_allowed_accounts_only_and_the_last_good_answer_is_kept() {
    let cluster = shared().await;
    let name = unique("cname");
    let host = format!("{name}.internal.example.io");
    let namespace = cluster.namespace(&[]).await;
    let image = format!("{host}/app");
    cluster.create_alias(&name, json!({"host": host, "allowedAccounts": ["123456789012"]})).await;

    // Not in DNS yet: the name means nothing, and a pod that names it is refused with the reason.
    let alias = cluster.condition(&name, "Resolved", |c| c.reason == "DNSLookupFailed").await;
    assert_eq!(alias.status.unwrap().registry, None);
    let refused = await_refusal(&namespace, &image).await;
    assert!(refused.contains(&name) && refused.contains("Resolved"), "{refused}");

    // By way of another name, as people do.
    let hop = format!("hop.{host}");
    cluster.dns.cname(&host, &hop, 1).unwrap();
    cluster.dns.cname(&hop, REGISTRY, 1).unwrap();
    let alias = cluster.ready(&name).await;
    assert_eq!(alias.status.unwrap().registry.as_deref(), Some(REGISTRY));
    assert_eq!(images(&cluster.pod(&namespace, "a", &image).await), [format!("{REGISTRY}/app")]);

    // A region failover is a change in DNS, and nothing else.
    let moved = "123456789012.dkr.ecr.us-west-2.amazonaws.com";
    cluster.dns.cname(&hop, moved, 1).unwrap();
    cluster.condition(&name, "Resolved", |c| c.message.contains("us-west-2")).await;
    cluster.ready(&name).await;
    assert_eq!(images(&cluster.pod(&namespace, "b", &image).await), [format!("{moved}/app")]);

    // DNS may choose no other account: the last good answer stays, and the condition and an Event say so.
    cluster.dns.cname(&hop, "666666666666.dkr.ecr.us-east-1.amazonaws.com", 1).unwrap();
    let alias = cluster.condition(&name, "Resolved", |c| c.reason == "AccountNotAllowed").await;
    assert_eq!(alias.status.unwrap().registry.as_deref(), Some(moved));
    cluster.event("default", &name, "AccountNotAllowed").await;
    assert_eq!(images(&cluster.pod(&namespace, "c", &image).await), [format!("{moved}/app")]);

    // Nor is the way into nothing, out of ECR, or round in a circle.
    cluster.dns.cname(&hop, "elsewhere.example.io", 1).unwrap();
    cluster.dns.a("elsewhere.example.io", [127, 0, 0, 1].into(), 1).unwrap();
    cluster.condition(&name, "Resolved", |c| c.reason == "NotAnECRHost" && c.status == "True").await;
    cluster.dns.cname(&hop, &host, 1).unwrap();
    cluster.condition(&name, "Resolved", |c| c.reason == "CNAMELoop" && c.status == "True").await;
    cluster.dns.remove(&hop).unwrap();
    cluster.condition(&name, "Resolved", |c| c.reason == "DNSLookupFailed" && c.status == "True").await;
    assert_eq!(images(&cluster.pod(&namespace, "d", &image).await), [format!("{moved}/app")]);

    // And it heals.
    cluster.dns.cname(&hop, REGISTRY, 1).unwrap();
    cluster
        .condition(&name, "Resolved", |c| c.reason == "FollowedCNAME" && c.message.contains("us-east-1"))
        .await;
}

/// Creates pods until one is refused, which it is once the webhook is registered; returns what was said.
async fn await_refusal(namespace: &str, image: &str) -> String {
    let cluster = shared().await;
    let deadline = tokio::time::Instant::now() + crate::cluster::LIMIT;
    loop {
        let spec = json!({"containers": [{"name": "app", "image": image}]});
        match cluster.try_pod(namespace, &unique("p"), spec).await {
            Err(error) => return error.to_string(),
            Ok(pod) => assert!(tokio::time::Instant::now() < deadline, "{} was not refused", pod.name_any()),
        }
    }
}
