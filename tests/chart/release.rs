//! What a release lives through on a real API server, with the real operator under the rights of the chart.
//!
//! There is no node, so the operator runs beside the API server instead of in the release's pods.

use std::{path::Path, time::Duration};

use k8s_openapi::api::{
    admissionregistration::v1::MutatingWebhookConfiguration,
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
    runtime::wait::{Condition, await_condition},
};
use serde_json::{Value, json};
use testbed::{
    aws::AwsStandIn,
    controlplane::ControlPlane,
    helm::{chart, helm_in},
    operator::{NAMESPACE, Operator, ROLE, SUBJECT, Start},
};
use tokio::{process::Command, time::timeout};

use crate::render::{path, values_file};

const LIMIT: Duration = Duration::from_secs(60);
const REGISTRY: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";
const BINARY: &str = env!("CARGO_BIN_EXE_ecr-cname");

/// A release of the chart, on an API server of its own.
struct Release {
    control_plane: ControlPlane,
    aws: AwsStandIn,
}

impl Release {
    async fn install(values: Value) -> Self {
        let control_plane = ControlPlane::start().await.unwrap();
        let aws = AwsStandIn::start(control_plane.issuer()).unwrap();
        aws.role(ROLE).trusts_subject(SUBJECT);
        let release = Self { control_plane, aws };
        release.helm("install", &["--create-namespace", "--values", path(&values_file(&values))]).await;
        release
    }

    /// `helm COMMAND ecr-cname …`, with the chart where the command takes one.
    async fn helm(&self, command: &str, args: &[&str]) -> String {
        let chart = chart();
        let mut all = vec![command, "ecr-cname"];
        if ["install", "upgrade"].contains(&command) {
            all.push(path(&chart));
        }
        all.extend(["--namespace", NAMESPACE]);
        all.extend(args);
        helm_in(&self.control_plane, &all).await.unwrap()
    }

    async fn operator(&self) -> Operator {
        let start = Start::run().args(["--lease-duration=3s"]);
        Operator::start(Path::new(BINARY), &self.control_plane, &self.aws, start).await.unwrap()
    }

    async fn ready(&self, alias: &str) {
        let alias = format!("registryalias/{alias}");
        self.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", &alias]).await;
    }

    async fn kubectl(&self, args: &[&str]) -> String {
        self.control_plane.kubectl(args).await.unwrap()
    }

    /// The image of a pod as it is stored.
    async fn stored(&self, namespace: &str, image: &str) -> String {
        let pods: Api<Pod> = Api::namespaced(self.control_plane.kube_client().unwrap(), namespace);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "p-"},
            "spec": {"containers": [{"name": "app", "image": image}]}});
        let pod = pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        pod.spec.unwrap().containers[0].image.clone().unwrap()
    }

    async fn configuration(&self) -> MutatingWebhookConfiguration {
        Api::all(self.control_plane.kube_client().unwrap()).get("ecr-cname").await.unwrap()
    }
}

fn alias(host: &str) -> Value {
    json!({"host": host, "registry": REGISTRY})
}

/// Watches an object until a condition holds.
async fn until<K>(api: Api<K>, name: &str, condition: impl Condition<K>) -> Option<K>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let waited = timeout(LIMIT, await_condition(api, name, condition)).await;
    waited.unwrap_or_else(|_| panic!("{name} is not as wanted after {LIMIT:?}")).unwrap()
}

/// Upgrade and rollback leave the webhook's entries as the controller wrote them, with server-side apply (Helm 4) and with a
/// three-way merge (Helm 3). Every pod that is created meanwhile is rewritten.
#[tokio::test]
async fn upgrade_and_rollback_keep_the_entries_and_lose_no_admission() {
    for server_side in ["--server-side=true", "--server-side=false"] {
        let release = Release::install(json!({"aliases": {"internal": alias("a.example.io")}})).await;
        let _operator = release.operator().await;
        release.ready("internal").await;
        let namespace = release.control_plane.namespace("t", &[]).await.unwrap();
        let before = release.configuration().await;
        assert_eq!(before.webhooks.as_ref().unwrap().len(), 1);

        let values = values_file(&json!({"commonLabels": {"team": "platform"}, "webhook": {"replicas": 3}}));
        let changes = async {
            release.helm("upgrade", &["--reuse-values", "--values", path(&values), server_side]).await;
            let upgraded = release.configuration().await;
            assert_eq!(upgraded.labels()["team"], "platform");
            release.helm("rollback", &["1", server_side]).await;
            upgraded
        };
        let mut created = 0;
        let mut changes = std::pin::pin!(changes);
        let upgraded = loop {
            tokio::select! {
                upgraded = &mut changes => break upgraded,
                image = release.stored(&namespace, "a.example.io/app") => {
                    assert_eq!(image, format!("{REGISTRY}/app"), "{server_side}");
                    created += 1;
                }
            }
        };
        assert!(created > 20, "only {created} pods meanwhile");
        let after = release.configuration().await;
        assert!(!after.labels().contains_key("team"), "{server_side}");
        // A generation counts every change of the entries, even one that was made good again.
        for later in [&upgraded, &after] {
            assert_eq!(later.webhooks, before.webhooks, "{server_side}");
            assert_eq!(later.metadata.generation, before.metadata.generation, "{server_side}");
        }
    }
}

/// An upgrade changes the aliases of a release: a new one holds, and one that left the values is gone.
#[tokio::test]
async fn an_upgrade_changes_the_aliases() {
    let release = Release::install(json!({"aliases": {"old": alias("old.example.io")}})).await;
    let _operator = release.operator().await;
    release.ready("old").await;
    let values = values_file(&json!({"aliases": {"new": alias("new.example.io")}}));
    release.helm("upgrade", &["--values", path(&values)]).await;
    release.ready("new").await;
    let namespace = release.control_plane.namespace("t", &[]).await.unwrap();
    assert_eq!(release.stored(&namespace, "new.example.io/app").await, format!("{REGISTRY}/app"));
    assert_eq!(
        release.kubectl(&["get", "registryaliases", "-o", "name"]).await.trim(),
        "registryalias.ecr-cname.dev/new"
    );
}

/// After `helm uninstall` there is nothing of ours but the CRD, and the alias that was applied by hand.
#[tokio::test]
async fn uninstalling_leaves_the_crd_and_the_aliases_of_others() {
    let release = Release::install(json!({"aliases": {"internal": alias("a.example.io")}})).await;
    let operator = release.operator().await;
    let by_hand = json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
        "metadata": {"name": "by-hand"}, "spec": alias("b.example.io")});
    release.control_plane.apply(&by_hand.to_string()).await.unwrap();
    release.ready("internal").await;
    release.ready("by-hand").await;
    let client = release.control_plane.kube_client().unwrap();
    let namespace = release.control_plane.namespace("t", &[]).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    until(secrets.clone(), "ecr-cname", |secret: Option<&Secret>| secret.is_some()).await;
    let before = ours(&release).await;
    for made in
        ["secret/ecr-cname-tls", "lease.coordination.k8s.io/ecr-cname", "deployment.apps/ecr-cname-webhook"]
    {
        assert!(before.contains(&made.to_owned()), "{made} is not in {before:?}");
    }

    // The controller runs on until the Job does, as one that is slow to stop would: it may write no more.
    let jobs: Api<Job> = Api::namespaced(client.clone(), NAMESPACE);
    let ((), _) = tokio::join!(run_job(&release, jobs, operator), release.helm("uninstall", &[]));

    assert_eq!(ours(&release).await, Vec::<String>::new());
    assert!(secrets.get_opt("ecr-cname").await.unwrap().is_none());
    assert_eq!(
        release.kubectl(&["get", "registryaliases", "-o", "name"]).await.trim(),
        "registryalias.ecr-cname.dev/by-hand"
    );
    // Nothing is in the path of pods any more.
    assert_eq!(release.stored(&namespace, "b.example.io/app").await, "b.example.io/app");
}

/// Does what a node would do with the Job of the hook: runs its command as its account, and says that it is done.
async fn run_job(release: &Release, jobs: Api<Job>, operator: Operator) {
    let job = until(jobs.clone(), "ecr-cname-cleanup", |job: Option<&Job>| job.is_some()).await.unwrap();
    let pod = job.spec.unwrap().template.spec.unwrap();
    let account = pod.service_account_name.unwrap();
    let kubeconfig = release.control_plane.kubeconfig_for_service_account(NAMESPACE, &account).await.unwrap();
    let args = pod.containers[0].args.clone().unwrap();
    let output = Command::new(BINARY).args(args).env("KUBECONFIG", kubeconfig).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    operator.process().terminate().unwrap();
    operator.process().wait(LIMIT).expect("the operator ends");
    let now = "2026-01-01T00:00:00Z";
    let condition = |type_: &str| json!({"type": type_, "status": "True", "lastProbeTime": now, "lastTransitionTime": now, "reason": "Done", "message": ""});
    let status = json!({"status": {"startTime": now, "completionTime": now, "succeeded": 1,
        "conditions": [condition("SuccessCriteriaMet"), condition("Complete")]}});
    jobs.patch_status("ecr-cname-cleanup", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
}

/// The objects in the cluster that have our name, without the CRD and the namespace.
async fn ours(release: &Release) -> Vec<String> {
    let kinds = "deployments,jobs,pods,poddisruptionbudgets,services,serviceaccounts,secrets,configmaps,leases,roles,rolebindings,\
        clusterroles,clusterrolebindings,mutatingwebhookconfigurations,validatingadmissionpolicies,\
        validatingadmissionpolicybindings,networkpolicies,horizontalpodautoscalers";
    let all = release.kubectl(&["get", kinds, "--all-namespaces", "-o", "name"]).await;
    all.lines().filter(|name| name.contains("ecr-cname")).map(str::to_owned).collect()
}
