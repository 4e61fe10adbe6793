//! Pull secrets: there wherever they are needed, kept as they shall be, and nobody else's touched.

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use crate::cluster::{LIMIT, REGISTRY, shared, tokens, uid, unique};

/// A namespace that is labelled so gets no Secret, whatever the aliases of other tests select.
const OUT: (&str, &str) = ("ecr-cname.dev/rewrite", "disabled");

async fn alias() -> String {
    let name = unique("secrets");
    let spec = json!({"host": format!("{name}.example.io"), "registry": REGISTRY});
    shared().await.alias(&name, spec).await;
    name
}

/// Cron jobs pile up or miss their start; a new namespace waits hours: k8s-ecr-login-renew #69; external-secrets #2150.
#[tokio::test]
async fn a_new_namespace_has_its_secret_without_a_call_to_aws() {
    let cluster = shared().await;
    alias().await;
    let first = cluster.namespace(&[]).await;
    let token = cluster.token(&first, REGISTRY).await;
    let second = cluster.namespace(&[]).await;
    // The very token that was in memory.
    cluster.holds(&second, REGISTRY, &token).await;
    let secret = cluster.secrets(&second).get("ecr-cname").await.unwrap();
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/dockerconfigjson"));
    assert_eq!(secret.labels()["app.kubernetes.io/managed-by"], "ecr-cname");
    let expires: jiff::Timestamp = secret.annotations()["ecr-cname.dev/expires-at"].parse().unwrap();
    assert!(expires > jiff::Timestamp::now());
    assert!(!secret.annotations().contains_key("kubectl.kubernetes.io/last-applied-configuration"));
    assert!(!serde_json::to_string(&secret.metadata).unwrap().contains(&token));
}

#[tokio::test]
async fn drift_is_healed_in_place() {
    let cluster = shared().await;
    alias().await;
    let namespace = cluster.namespace(&[]).await;
    let token = cluster.token(&namespace, REGISTRY).await;
    let secrets = cluster.secrets(&namespace);
    let before = uid(&secrets.get("ecr-cname").await.unwrap());
    let broken = json!({"data": {".dockerconfigjson": ByteString(br#"{"auths":{}}"#.to_vec())}});
    secrets.patch("ecr-cname", &PatchParams::default(), &Patch::Merge(broken)).await.unwrap();
    cluster.holds(&namespace, REGISTRY, &token).await;
    // Deleting a secret broke running pods: pfnet image-pull-secrets-provisioner #56. Never deleted and made again.
    assert_eq!(uid(&secrets.get("ecr-cname").await.unwrap()), before);
    // An annotation of ours that someone removed comes back, too.
    let stripped = json!({"metadata": {"annotations": {"ecr-cname.dev/contents": null}}});
    secrets.patch("ecr-cname", &PatchParams::default(), &Patch::Merge(stripped)).await.unwrap();
    cluster
        .secret(&namespace, |s| s?.annotations().contains_key("ecr-cname.dev/contents").then_some(()))
        .await;
    // Nor may a forged one keep an old token in place for ever.
    let forged = json!({"metadata": {"annotations": {"ecr-cname.dev/contents":
        format!(r#"{{"{REGISTRY}":{{"expiresAt":"2099-01-01T00:00:00Z","identity":"operator"}}}}"#)}}});
    secrets.patch("ecr-cname", &PatchParams::default(), &Patch::Merge(forged)).await.unwrap();
    cluster
        .secret(&namespace, |s| {
            (!s?.annotations().get("ecr-cname.dev/contents")?.contains("2099")).then_some(())
        })
        .await;
    secrets.delete("ecr-cname", &DeleteParams::default()).await.unwrap();
    cluster.holds(&namespace, REGISTRY, &token).await;
}

/// Someone's own secret overwritten or deleted: external-secrets #4548; imagepullsecret-patcher #35.
#[tokio::test]
async fn a_secret_that_is_not_ours_is_left_alone_and_said_so() {
    let cluster = shared().await;
    let name = unique("foreign");
    let namespace = cluster.namespace(&[("only", &name), OUT]).await;
    let mine: Secret = serde_json::from_value(json!({
        "metadata": {"name": "ecr-cname"}, "type": "Opaque", "stringData": {"my": "own"}
    }))
    .unwrap();
    let secrets = cluster.secrets(&namespace);
    let before = secrets.create(&PostParams::default(), &mine).await.unwrap();
    cluster.label_namespace(&namespace, json!({OUT.0: null})).await;
    let selector = json!({"matchLabels": {"only": name}});
    let spec =
        json!({"host": format!("{name}.example.io"), "registry": REGISTRY, "namespaceSelector": selector});
    cluster.create_alias(&name, spec).await;
    let alias = cluster.condition(&name, "SecretsSynced", |c| c.reason == "NamespacesFailed").await;
    let conditions = alias.status.unwrap().conditions;
    let message = &conditions.iter().find(|c| c.type_ == "SecretsSynced").unwrap().message;
    assert!(message.contains(&namespace) && message.contains("not ours"), "{message}");
    let note = cluster.event(&namespace, "ecr-cname", "ForeignSecret").await;
    assert!(note.contains("delete or rename it"), "{note}");
    let after = secrets.get("ecr-cname").await.unwrap();
    assert_eq!(after.resource_version(), before.resource_version());
    // When its owner takes it away, ours comes.
    secrets.delete("ecr-cname", &DeleteParams::default()).await.unwrap();
    cluster.token(&namespace, REGISTRY).await;
    cluster.condition(&name, "SecretsSynced", |c| c.status == "True").await;
}

#[tokio::test]
async fn one_secret_holds_every_registry_of_its_namespace_and_aws_is_asked_once_for_each_region() {
    let cluster = shared().await;
    let name = unique("multi");
    let namespace = cluster.namespace(&[("multi", &name)]).await;
    let registries = [
        "123456789012.dkr.ecr.ap-south-1.amazonaws.com",
        "222222222222.dkr.ecr.ap-south-1.amazonaws.com",
        "123456789012.dkr.ecr.sa-east-1.amazonaws.com",
    ];
    let selector = json!({"matchLabels": {"multi": name}});
    for (i, registry) in registries.iter().enumerate() {
        let alias = format!("{name}-{i}");
        let host = format!("{alias}.example.io");
        cluster
            .alias(&alias, json!({"host": host, "registry": registry, "namespaceSelector": selector}))
            .await;
    }
    let held = cluster
        .secret(&namespace, |secret| {
            let held = tokens(secret?);
            registries.iter().all(|r| held.contains_key(*r)).then_some(held)
        })
        .await;
    // One token serves every registry that its principal may read, in that region.
    assert_eq!(held[registries[0]], held[registries[1]]);
    assert_ne!(held[registries[0]], held[registries[2]]);
    for region in ["ap-south-1", "sa-east-1"] {
        let scope = testbed::aws::Scope::of(testbed::aws::Operation::GetAuthorizationToken).region(region);
        assert_eq!(cluster.aws.count(&scope), 1, "{region}");
    }
}

#[tokio::test]
async fn a_role_is_assumed_with_its_external_id() {
    let cluster = shared().await;
    let name = unique("role");
    let namespace = cluster.namespace(&[("role", &name)]).await;
    let role = format!("arn:aws:iam::555555555555:role/{name}");
    cluster.aws.role(&role).trusts_role(testbed::operator::ROLE).external_id("secret-handshake");
    let registry = "555555555555.dkr.ecr.us-east-1.amazonaws.com";
    let selector = json!({"matchLabels": {"role": name}});
    let credentials = |id: &str| json!({"roleArn": role, "externalId": id});
    let spec = json!({"host": format!("{name}.example.io"), "registry": registry,
        "namespaceSelector": selector, "credentials": credentials("wrong")});
    cluster.create_alias(&name, spec).await;
    let alias = cluster.condition(&name, "TokenReady", |c| c.status == "False").await;
    let conditions = alias.status.unwrap().conditions;
    let message = &conditions.iter().find(|c| c.type_ == "TokenReady").unwrap().message;
    assert!(message.contains(&role) && message.contains("external ID"), "{message}");
    assert!(message.contains("(AccessDenied: ") && !message.contains("Error {"), "{message}");
    cluster.patch_alias(&name, json!({"spec": {"credentials": credentials("secret-handshake")}})).await;
    cluster.ready(&name).await;
    let token = cluster.token(&namespace, registry).await;
    assert_eq!(cluster.aws.current_token(&role, "us-east-1").as_deref(), Some(token.as_str()));
}

/// One namespace that fails holds up no other.
#[tokio::test]
async fn a_quota_holds_up_only_its_own_namespace() {
    let cluster = shared().await;
    let name = unique("quota");
    let full = cluster.namespace(&[("quota", &name), OUT]).await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": full},
        "spec": {"hard": {"count/secrets": "0"}}});
    cluster.control_plane.apply(&quota.to_string()).await.unwrap();
    // No controller-manager runs here that would say how much of the quota is used.
    let status =
        json!({"status": {"hard": {"count/secrets": "0"}, "used": {"count/secrets": "0"}}}).to_string();
    let patch = [
        "patch",
        "resourcequota",
        "none",
        "-n",
        &full,
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ];
    cluster.control_plane.kubectl(&patch).await.unwrap();
    cluster.label_namespace(&full, json!({OUT.0: null})).await;
    let selector = json!({"matchLabels": {"quota": name}});
    let spec =
        json!({"host": format!("{name}.example.io"), "registry": REGISTRY, "namespaceSelector": selector});
    let free = cluster.namespace(&[("quota", &name)]).await;
    cluster.create_alias(&name, spec).await;
    cluster.token(&free, REGISTRY).await;
    let alias = cluster.condition(&name, "SecretsSynced", |c| c.reason == "NamespacesFailed").await;
    let status = alias.status.unwrap();
    assert_eq!((status.namespaces.unwrap().selected, status.namespaces.unwrap().synced), (2, 1));
    let message = &status.conditions.iter().find(|c| c.type_ == "SecretsSynced").unwrap().message;
    assert!(message.contains(&full) && message.contains("exceeded quota"), "{message}");
    // The alias works everywhere else, so it is ready.
    cluster.ready(&name).await;
    cluster.control_plane.kubectl(&["delete", "resourcequota", "none", "-n", &full]).await.unwrap();
    tokio::time::timeout(LIMIT, cluster.token(&full, REGISTRY)).await.unwrap();
}

/// Two aliases that lead to one registry as two identities: the older has it in the Secret, and both say they are served.
/// When the identity of an alias changes, it is ready only when the Secret holds the new one's token.
#[tokio::test]
async fn two_identities_for_one_registry_and_a_change_of_identity() {
    let cluster = shared().await;
    let name = unique("identities");
    let namespace = cluster.namespace(&[("identities", &name)]).await;
    let registry = "777777777777.dkr.ecr.us-east-1.amazonaws.com";
    let role = |n: u32| format!("arn:aws:iam::777777777777:role/{name}-{n}");
    for n in 1..=3 {
        cluster.aws.role(&role(n)).trusts_role(testbed::operator::ROLE);
    }
    let spec = |n: u32, selector: serde_json::Value| {
        json!({"host": format!("{name}-{n}.example.io"), "registry": registry,
            "namespaceSelector": selector, "credentials": {"roleArn": role(n)}})
    };
    let (older, younger) = (format!("{name}-1"), format!("{name}-2"));
    cluster.alias(&older, spec(1, json!({"matchLabels": {"identities": name}}))).await;
    let exists = json!({"matchExpressions": [{"key": "identities", "operator": "In", "values": [name]}]});
    cluster.alias(&younger, spec(2, exists)).await;
    let current = |n: u32| cluster.aws.current_token(&role(n), "us-east-1").unwrap();
    assert_eq!(cluster.token(&namespace, registry).await, current(1));

    cluster.patch_alias(&older, json!({"spec": {"credentials": {"roleArn": role(3)}}})).await;
    cluster.ready(&older).await;
    let held = tokens(&cluster.secrets(&namespace).get("ecr-cname").await.unwrap()).remove(registry);
    assert_eq!(held, Some(current(3)));
}
