//! Two roles, one binary: what each may do, how leaders change, and how the certificate is renewed.

use ecr_cname::crd::RegistryAlias;
use k8s_openapi::{
    ByteString,
    api::{coordination::v1::Lease, core::v1::Secret},
};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::json;
use testbed::{
    aws::{Fault, Operation, Scope},
    operator::{NAMESPACE, Start},
};

use crate::cluster::{Cluster, LIMIT, REGISTRY, await_object, images, shared, unique};

/// Least privilege: what the operator may not do, asked of the API server.
#[tokio::test]
async fn each_role_may_do_what_it_needs_and_nothing_else() {
    let cluster = shared().await;
    let namespace = cluster.namespace(&[]).await;
    let may = async |account: &str, question: &str| {
        let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
        let args: Vec<&str> =
            ["auth", "can-i"].into_iter().chain(question.split(' ')).chain([user.as_str()]).collect();
        // It answers no with an exit code of 1.
        cluster.control_plane.kubectl(&args).await.is_ok_and(|answer| answer.trim() == "yes")
    };
    let elsewhere = format!("-n {namespace}");
    for question in [
        format!("get secrets/ecr-cname {elsewhere}"),
        format!("patch secrets/ecr-cname {elsewhere}"),
        format!("delete secrets/ecr-cname {elsewhere}"),
        format!("create secrets {elsewhere}"),
        "list namespaces".to_owned(),
        "patch registryaliases/x --subresource=status".to_owned(),
        "patch mutatingwebhookconfigurations/ecr-cname".to_owned(),
        format!("update leases/ecr-cname -n {NAMESPACE}"),
    ] {
        assert!(may("ecr-cname-controller", &question).await, "the controller needs: {question}");
    }
    for question in [
        format!("get secrets/other {elsewhere}"),
        format!("list secrets {elsewhere}"),
        "list secrets -A".to_owned(),
        format!("get secrets/other -n {NAMESPACE}"),
        format!("patch secrets/other {elsewhere}"),
        "patch mutatingwebhookconfigurations/other".to_owned(),
        "create mutatingwebhookconfigurations".to_owned(),
        "delete mutatingwebhookconfigurations/ecr-cname".to_owned(),
        format!("list secrets -n {NAMESPACE}"),
        "watch secrets -A".to_owned(),
        format!("delete secrets/ecr-cname-tls -n {NAMESPACE}"),
        "patch validatingadmissionpolicies/ecr-cname-creates-only-its-secrets".to_owned(),
        "delete validatingadmissionpolicybindings/ecr-cname-creates-only-its-secrets".to_owned(),
        "patch clusterroles/ecr-cname-controller".to_owned(),
        "impersonate serviceaccounts/default".to_owned(),
        format!("create serviceaccounts/ecr-cname-controller --subresource=token -n {NAMESPACE}"),
        format!("create serviceaccounts/default --subresource=token {elsewhere}"),
        format!("get pods {elsewhere}"),
        "patch registryaliases/x".to_owned(),
        "patch namespaces/default".to_owned(),
        format!("get leases/other -n {NAMESPACE}"),
    ] {
        assert!(!may("ecr-cname-controller", &question).await, "the controller must not: {question}");
    }
    assert!(may("ecr-cname-webhook", "watch registryaliases").await);
    assert!(may("ecr-cname-webhook", &format!("get secrets/ecr-cname-tls -n {NAMESPACE}")).await);
    for question in [
        format!("get secrets/ecr-cname {elsewhere}"),
        format!("create secrets {elsewhere}"),
        format!("get secrets/other -n {NAMESPACE}"),
        format!("list secrets {elsewhere}"),
        "list secrets -A".to_owned(),
        format!("create serviceaccounts/ecr-cname-controller --subresource=token -n {NAMESPACE}"),
        "patch mutatingwebhookconfigurations/other".to_owned(),
        "list namespaces".to_owned(),
        "patch registryaliases/x --subresource=status".to_owned(),
        "patch mutatingwebhookconfigurations/ecr-cname".to_owned(),
        format!("patch secrets/ecr-cname-tls -n {NAMESPACE}"),
    ] {
        assert!(!may("ecr-cname-webhook", &question).await, "the webhook must not: {question}");
    }
}

/// RBAC cannot narrow the creation of Secrets; the admission policy beside it does.
#[tokio::test]
async fn the_controller_creates_no_secrets_but_its_own() {
    let cluster = shared().await;
    let namespace = cluster.namespace(&[("ecr-cname.dev/rewrite", "disabled")]).await;
    let user = format!("--as=system:serviceaccount:{NAMESPACE}:ecr-cname-controller");
    let create = async |name: &str, type_: &str| {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": type_, "metadata": {"name": name,
            "namespace": namespace, "annotations": {"kubernetes.io/service-account.name": "default"}},
            "data": {".dockerconfigjson": ByteString(b"{}".to_vec())}});
        cluster.control_plane.kubectl_stdin(&["create", "-f", "-", &user], &secret.to_string()).await
    };
    // A token of any service account, under the one name that may be read.
    for (name, type_) in [("ecr-cname", "kubernetes.io/service-account-token"), ("other", "Opaque")] {
        let refused = create(name, type_).await.unwrap_err().to_string();
        assert!(refused.contains("creates pull secrets and its serving certificate only"), "{refused}");
    }
    create("ecr-cname", "kubernetes.io/dockerconfigjson").await.unwrap();
}

/// The two roles as two processes, each under its own service account; then a second controller takes over, without
/// one write of a Secret that is still good.
#[tokio::test]
async fn webhook_and_controller_apart_and_a_second_controller_takes_over() {
    let cluster = Cluster::start().await;
    // The webhook is not ready before there is a certificate, so it is not waited for yet.
    let spawned = cluster.quick_webhook("webhook").await;
    let address = spawned.webhook_address();
    let first = cluster.operator(cluster.quick(Start::controller(address)).named("first")).await;
    spawned.wait_ready().await.unwrap();
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let pod = cluster.pod(&namespace, "a", "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
    let token = cluster.token(&namespace, REGISTRY).await;
    let before = cluster.secrets(&namespace).get("ecr-cname").await.unwrap();
    assert!((first.metric("ecr_cname_leader").await.unwrap() - 1.0).abs() < f64::EPSILON);
    assert_eq!(spawned.metric("ecr_cname_leader").await.unwrap().to_bits(), 0);

    let ready_since = since(&cluster.ready("internal").await);

    // Handed over: the second leads as soon as the first is told to stop.
    let second = cluster.operator(cluster.quick(Start::controller(address)).named("second")).await;
    assert_eq!(second.metric("ecr_cname_leader").await.unwrap().to_bits(), 0);
    // The new leader's first question to AWS gets no answer, so it has to go by what its predecessor wrote.
    let minted = Scope::of(Operation::GetAuthorizationToken);
    let asked = cluster.aws.count(&minted);
    cluster.aws.inject(Fault::Hang, minted.clone());
    first.process().terminate().unwrap();
    let status = first.process().wait(LIMIT).expect("the first controller ends");
    assert!(status.success(), "{status}\n{}", first.process().log_tail(20));
    leader(&cluster, "second").await;
    cluster.aws.wait_for(|state| state.count(&minted) > asked, LIMIT).await.unwrap();
    cluster.aws.heal();
    // It serves: a new namespace has its Secret, with a token of its own; the good one is not written again.
    let new = cluster.namespace(&[]).await;
    assert_ne!(cluster.token(&new, REGISTRY).await, token);
    let after = cluster.secrets(&namespace).get("ecr-cname").await.unwrap();
    assert_eq!(after.resource_version(), before.resource_version());

    // Nor did anyone who waits for the alias see it unready.
    assert_eq!(since(&cluster.ready("internal").await), ready_since);

    // Killed: the third leads when the Lease has run out.
    let _third = cluster.operator(cluster.quick(Start::controller(address)).named("third")).await;
    second.process().kill().unwrap();
    leader(&cluster, "third").await;
    cluster.token(&cluster.namespace(&[]).await, REGISTRY).await;
    let after = cluster.secrets(&namespace).get("ecr-cname").await.unwrap();
    assert_eq!(after.resource_version(), before.resource_version());
}

/// Since when each condition of an alias is as it is.
fn since(alias: &RegistryAlias) -> Vec<(String, String, jiff::Timestamp)> {
    let conditions = &alias.status.as_ref().unwrap().conditions;
    conditions.iter().map(|c| (c.type_.clone(), c.status.clone(), c.last_transition_time.0)).collect()
}

/// Waits until a replica holds the Lease.
async fn leader(cluster: &Cluster, name: &str) {
    let api: Api<Lease> = Api::namespaced(cluster.client(), NAMESPACE);
    await_object(api, "ecr-cname", "the Lease", |lease| {
        let holder = lease?.spec.as_ref()?.holder_identity.as_ref()?;
        holder.starts_with(name).then_some(())
    })
    .await;
}

/// The CA rotated: every pod creation failed; unusable without cert-manager: imageswap-webhook #115;
/// harbor-container-webhook #37. Here every pod created while the certificate is renewed is rewritten.
#[tokio::test]
async fn a_certificate_is_renewed_without_one_admission_lost() {
    let cluster = Cluster::start().await;
    let start = cluster.quick(Start::run()).args(["--certificate-lifetime=12s", "--certificate-overlap=1s"]);
    let _operator = cluster.operator(start).await;
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let leaf = |secret: &Secret| secret.data.as_ref().unwrap()["tls.crt"].clone();
    let first = leaf(&secrets.get("ecr-cname-tls").await.unwrap());
    let renewed = await_object(secrets, "ecr-cname-tls", "the certificate", |secret| {
        let second = leaf(secret?);
        (second != first).then_some(second)
    });
    let mut renewed = std::pin::pin!(renewed);
    let mut after = 0;
    let mut created = 0;
    // Until well after the new leaf serves.
    while after < 20 {
        let name = unique("p");
        let done = tokio::select! {
            biased;
            _ = &mut renewed, if after == 0 => true,
            pod = cluster.pod(&namespace, &name, "a.example.io/app") => {
                assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
                created += 1;
                false
            }
        };
        after += usize::from(done || after > 0);
    }
    assert!(created > 40, "only {created} pods while the certificate was renewed");
}

/// cert-manager or the user keeps the Secret; nobody of us writes it.
#[tokio::test]
async fn a_certificate_of_someone_elses_is_served_and_registered() {
    let cluster = Cluster::start().await;
    let start = cluster.quick(Start::run()).args(["--certificate=external"]);
    let operator = testbed::operator::Operator::spawn(
        crate::cluster::binary(),
        &cluster.control_plane,
        &cluster.aws,
        start,
    )
    .await
    .unwrap();
    let secret = |serial: u8| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.serial_number = Some(vec![serial].into());
        let cert = params.self_signed(&key).unwrap().pem();
        let data = |text: String| ByteString(text.into_bytes());
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ecr-cname-tls"}, "type": "kubernetes.io/tls",
            "data": {"tls.crt": data(cert.clone()), "tls.key": data(key.serialize_pem()), "ca.crt": data(cert)}})
    };
    let secrets: Api<Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let apply = async |secret: &serde_json::Value| {
        let params = PatchParams::apply("cert-manager").force();
        secrets.patch("ecr-cname-tls", &params, &Patch::Apply(secret)).await.unwrap()
    };
    apply(&secret(1)).await;
    operator.wait_ready().await.unwrap();
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let pod = cluster.pod(&namespace, "a", "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
    let managers: Vec<_> = secrets
        .get("ecr-cname-tls")
        .await
        .unwrap()
        .managed_fields()
        .iter()
        .map(|m| m.manager.clone())
        .collect();
    assert_eq!(managers, [Some("cert-manager".to_owned())]);
}

/// Watching some namespaces only needs no right to the Secrets and namespaces of the cluster, and touches no others.
#[tokio::test]
async fn the_controller_keeps_to_the_namespaces_that_it_watches() {
    let cluster = Cluster::start().await;
    let (watched, later) = (cluster.namespace(&[]).await, format!("{}-later", unique("watched")));
    let outside = cluster.namespace(&[]).await;
    let account = json!([{"kind": "ServiceAccount", "name": "ecr-cname-controller", "namespace": NAMESPACE}]);
    let rules = json!([
        {"apiGroups": ["ecr-cname.dev"], "resources": ["registryaliases"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["ecr-cname.dev"], "resources": ["registryaliases/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": [watched, later], "verbs": ["list", "watch"]},
        {"apiGroups": ["admissionregistration.k8s.io"], "resources": ["mutatingwebhookconfigurations"],
         "resourceNames": ["ecr-cname"], "verbs": ["get", "list", "watch", "patch"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
    ]);
    let group = "rbac.authorization.k8s.io";
    let mut objects = vec![
        json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRole",
               "metadata": {"name": "ecr-cname-controller"}, "rules": rules}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": later}}),
    ];
    let create = json!({"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]});
    let keep = json!({"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["ecr-cname"],
        "verbs": ["get", "list", "watch", "patch", "delete"]});
    // The certificate is created in the operator's own namespace.
    for (namespace, rules) in [
        (NAMESPACE, json!([create])),
        (watched.as_str(), json!([keep, create])),
        (later.as_str(), json!([keep, create])),
    ] {
        let metadata = json!({"name": "ecr-cname-watched", "namespace": namespace});
        objects.push(
            json!({"apiVersion": format!("{group}/v1"), "kind": "Role", "metadata": metadata, "rules": rules}),
        );
        objects.push(json!({"apiVersion": format!("{group}/v1"), "kind": "RoleBinding", "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": "ecr-cname-watched"}, "subjects": account}));
    }
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
    // A List is applied in its order.
    cluster.control_plane.apply(&list).await.unwrap();

    let watch = format!("--watch-namespaces={watched},{later}");
    let start = cluster.quick(Start::run()).args([watch.as_str()]);
    let _operator = cluster.operator(start).await;
    cluster.create_alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let ready = cluster.ready("internal").await;
    assert_eq!(ready.status.unwrap().namespaces.unwrap().selected, 2);
    cluster.token(&watched, REGISTRY).await;
    cluster.token(&later, REGISTRY).await;
    assert_eq!(images(&cluster.pod(&watched, "a", "a.example.io/app").await), [format!("{REGISTRY}/app")]);
    // Outside, nothing is promised and nothing is done.
    assert_eq!(images(&cluster.pod(&outside, "a", "a.example.io/app").await), ["a.example.io/app"]);
    assert!(cluster.secrets(&outside).get_opt("ecr-cname").await.unwrap().is_none());
    // A watched namespace that goes and comes back is served again.
    cluster.control_plane.kubectl(&["delete", "secret", "ecr-cname", "-n", &later]).await.unwrap();
    cluster.token(&later, REGISTRY).await;
}

/// Uninstalling cleans up at once, and only what is ours.
#[tokio::test]
async fn cleanup_removes_what_is_ours_and_nothing_else() {
    let running = Cluster::start().await.run().await;
    let namespace = running.namespace(&[]).await;
    let foreign = running.namespace(&[("ecr-cname.dev/rewrite", "disabled")]).await;
    running.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    running.token(&namespace, REGISTRY).await;
    running
        .control_plane
        .kubectl(&["create", "secret", "generic", "ecr-cname", "-n", &foreign, "--from-literal=a=b"])
        .await
        .unwrap();
    running.operator.process().terminate().unwrap();
    running.operator.process().wait(LIMIT).expect("the operator ends");

    let output = tokio::process::Command::new(crate::cluster::binary())
        .arg("cleanup")
        .env("KUBECONFIG", running.control_plane.kubeconfig())
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(running.secrets(&namespace).get_opt("ecr-cname").await.unwrap().is_none());
    assert!(running.secrets(&foreign).get_opt("ecr-cname").await.unwrap().is_some());
    assert!(running.secrets(NAMESPACE).get_opt("ecr-cname-tls").await.unwrap().is_none());
    let leases: Api<Lease> = Api::namespaced(running.client(), NAMESPACE);
    assert!(leases.get_opt("ecr-cname").await.unwrap().is_none());
    // Nothing is in the path of pods any more.
    let pod = running.pod(&namespace, "a", "a.example.io/app").await;
    assert_eq!(images(&pod), ["a.example.io/app"]);
}
