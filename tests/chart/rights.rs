//! What the release's accounts may and must not do, asked of the API server: with names of the user's, in namespaced mode.
//!
//! The rights of the defaults are those of `manifests/`, whose tests are in `tests/it/roles.rs`.

use serde_json::json;
use testbed::operator::NAMESPACE;

use crate::{
    apply::cluster,
    render::{Objects, render},
};

/// Applies the accounts, roles and bindings alone; asks `kubectl auth can-i` about them.
async fn granted(objects: &Objects) {
    let kinds = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
    let rights: Vec<_> = kinds.iter().flat_map(|kind| objects.of(kind)).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": rights});
    cluster().await.apply(&list.to_string()).await.unwrap();
}

async fn may(account: &str, question: &str) -> bool {
    let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
    let args: Vec<&str> =
        ["auth", "can-i"].into_iter().chain(question.split(' ')).chain([user.as_str()]).collect();
    // It answers no with an exit code of 1.
    cluster().await.kubectl(&args).await.is_ok_and(|answer| answer.trim() == "yes")
}

async fn check(account: &str, allowed: &[&str], denied: &[&str]) {
    for question in allowed {
        assert!(may(account, question).await, "{account} needs: {question}");
    }
    for question in denied {
        assert!(!may(account, question).await, "{account} must not: {question}");
    }
}

/// What nobody of us may do, under any values.
const NEVER: [&str; 11] = [
    "list secrets -A",
    "get secrets/other -n web",
    "get secrets/other -n ecr-cname",
    "list secrets -n ecr-cname",
    "create serviceaccounts/default --subresource=token -n web",
    "create serviceaccounts/two-controller --subresource=token -n ecr-cname",
    "patch mutatingwebhookconfigurations/other",
    "create mutatingwebhookconfigurations",
    "delete mutatingwebhookconfigurations/two",
    "patch validatingadmissionpolicies/two-creates-only-its-secrets",
    "patch clusterroles/two-controller",
];

#[tokio::test]
async fn in_namespaced_mode_no_right_reaches_beyond_the_watched_namespaces() {
    let values = json!({"fullnameOverride": "two", "pullSecret": {"name": "pull"}, "watchNamespaces": ["web", "jobs"]});
    granted(&render(&values).await.unwrap()).await;
    check(
        "two-controller",
        &[
            "get secrets/pull -n web",
            "delete secrets/pull -n jobs",
            "create secrets -n web",
            "create secrets -n ecr-cname",
            "patch secrets/two-tls -n ecr-cname",
            "watch namespaces/web",
            "patch mutatingwebhookconfigurations/two",
            "update leases/two -n ecr-cname",
            "patch registryaliases/x --subresource=status",
        ],
        &[
            "get secrets/pull -n default",
            "create secrets -n default",
            "list namespaces",
            "watch namespaces/default",
            "patch registryaliases/x",
            "get pods -n web",
        ],
    )
    .await;
    check(
        "two-webhook",
        &["get secrets/two-tls -n ecr-cname", "watch registryaliases"],
        &[
            "get secrets/pull -n web",
            "create secrets -n ecr-cname",
            "patch secrets/two-tls -n ecr-cname",
            "patch mutatingwebhookconfigurations/two",
            "patch registryaliases/x --subresource=status",
            "get leases/two -n ecr-cname",
        ],
    )
    .await;
    check(
        "two-cleanup",
        &[
            "list secrets/pull -n web",
            "delete secrets/pull -n jobs",
            "delete secrets/two-tls -n ecr-cname",
            "delete leases/two -n ecr-cname",
        ],
        &[
            "delete secrets/pull -n default",
            "get registryaliases",
            "patch secrets/pull -n web",
            "create secrets -n web",
            "list namespaces",
        ],
    )
    .await;
    for account in ["two-controller", "two-webhook", "two-cleanup"] {
        check(account, &[], &NEVER).await;
    }
}

/// Whoever keeps the certificate is the only one to write it.
#[tokio::test]
async fn a_certificate_of_someone_elses_may_only_be_read() {
    let values =
        json!({"fullnameOverride": "three", "certificate": {"mode": "existing", "secretName": "mine"}});
    granted(&render(&values).await.unwrap()).await;
    check(
        "three-controller",
        &["get secrets/mine -n ecr-cname"],
        &[
            "patch secrets/mine -n ecr-cname",
            "delete secrets/mine -n ecr-cname",
            "get secrets/three-tls -n ecr-cname",
        ],
    )
    .await;
    check("three-cleanup", &["get secrets/mine -n ecr-cname"], &["delete secrets/mine -n ecr-cname"]).await;
}
