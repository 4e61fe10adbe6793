//! Clusters to test on: one that most tests share, and others that a test breaks as it likes.
//!
//! Every test has aliases, hosts and namespaces of its own, so that tests do not meet.

use std::{collections::BTreeMap, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ecr_cname::crd::RegistryAlias;
use futures::StreamExt as _;
use k8s_openapi::{
    api::core::v1::{Namespace, Pod, Secret},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};
use testbed::{
    aws::AwsStandIn,
    controlplane::ControlPlane,
    dns::DnsStandIn,
    operator::{self, Operator, ROLE, SUBJECT, Start},
};
use tokio::sync::OnceCell;

pub const REGISTRY: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";
/// How long anything may take that a test waits for.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A control plane with the manifests applied, and stand-ins for AWS and DNS.
pub struct Cluster {
    pub control_plane: ControlPlane,
    pub aws: AwsStandIn,
    pub dns: DnsStandIn,
}

/// A cluster with `ecr-cname run` in it.
pub struct Running {
    pub cluster: Cluster,
    pub operator: Operator,
}

impl std::ops::Deref for Running {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

/// The cluster that most tests share.
pub async fn shared() -> &'static Running {
    static SHARED: OnceCell<Running> = OnceCell::const_new();
    SHARED.get_or_init(|| async { Cluster::start().await.run().await }).await
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ecr-cname"))
}

impl Cluster {
    /// A cluster of its own, without the operator.
    pub async fn start() -> Self {
        testbed::install_crypto_provider();
        let control_plane = ControlPlane::start().await.unwrap();
        let aws = AwsStandIn::start(control_plane.issuer()).unwrap();
        aws.role(ROLE).trusts_subject(SUBJECT);
        let dns = DnsStandIn::start().unwrap();
        operator::install(&control_plane).await.unwrap();
        Self { control_plane, aws, dns }
    }

    /// Adds the operator, as tests want it: quick, and with its DNS.
    pub async fn run(self) -> Running {
        let operator = self.operator(self.quick(Start::run())).await;
        Running { cluster: self, operator }
    }

    /// Starts a process of the operator, and waits until it is ready.
    pub async fn operator(&self, start: Start) -> Operator {
        Operator::start(binary(), &self.control_plane, &self.aws, start).await.unwrap()
    }

    /// Starts a process of the operator, and returns before it is ready.
    pub async fn operator_unready(&self, start: Start) -> Operator {
        Operator::spawn(binary(), &self.control_plane, &self.aws, start).await.unwrap()
    }

    /// A start with short times, verbose logs and the DNS stand-in.
    pub fn quick(&self, start: Start) -> Start {
        let dns = format!("--dns-server={}", self.dns.address());
        start.args(["--log=debug", "--dns-min-ttl=1s", "--lease-duration=3s", &dns])
    }

    /// Starts the webhook alone, and returns before it is ready.
    pub async fn quick_webhook(&self, name: &str) -> Operator {
        let start = Start::webhook().named(name).args(["--log=debug"]);
        self.operator_unready(start).await
    }

    pub fn client(&self) -> Client {
        self.control_plane.kube_client().unwrap()
    }

    pub async fn namespace(&self, labels: &[(&str, &str)]) -> String {
        self.control_plane.namespace("t", labels).await.unwrap()
    }

    /// Creates an alias, and waits until it is ready.
    pub async fn alias(&self, name: &str, spec: Value) {
        self.create_alias(name, spec).await;
        self.ready(name).await;
    }

    pub async fn create_alias(&self, name: &str, spec: Value) {
        self.try_create_alias(name, spec).await.unwrap();
    }

    pub async fn try_create_alias(&self, name: &str, spec: Value) -> kube::Result<RegistryAlias> {
        let alias = json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
            "metadata": {"name": name}, "spec": spec});
        let api: Api<kube::core::DynamicObject> =
            Api::all_with(self.client(), &kube::core::ApiResource::erase::<RegistryAlias>(&()));
        let created = api.create(&PostParams::default(), &serde_json::from_value(alias).unwrap()).await?;
        Ok(created.try_parse().unwrap())
    }

    pub async fn patch_alias(&self, name: &str, patch: Value) {
        self.aliases().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    pub fn aliases(&self) -> Api<RegistryAlias> {
        Api::all(self.client())
    }

    /// Waits until an alias is ready for its present spec.
    pub async fn ready(&self, name: &str) -> RegistryAlias {
        self.condition(name, "Ready", |c| c.status == "True").await
    }

    /// Waits until a condition of an alias, made for its present spec, is as wanted.
    pub async fn condition(
        &self,
        name: &str,
        type_: &str,
        wanted: impl Fn(&Condition) -> bool,
    ) -> RegistryAlias {
        let what = format!("condition {type_} of {name}");
        await_object(self.aliases(), name, &what, |alias: Option<&RegistryAlias>| {
            let alias = alias?;
            let status = alias.status.as_ref()?;
            let current = status.observed_generation == alias.metadata.generation;
            let condition = status.conditions.iter().find(|c| c.type_ == type_)?;
            (current && wanted(condition)).then(|| alias.clone())
        })
        .await
    }

    /// Creates a pod of one container with an image, and returns what was stored.
    pub async fn pod(&self, namespace: &str, name: &str, image: &str) -> Pod {
        self.try_pod(namespace, name, json!({"containers": [{"name": "app", "image": image}]})).await.unwrap()
    }

    pub async fn try_pod(&self, namespace: &str, name: &str, spec: Value) -> kube::Result<Pod> {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec});
        self.try_create(namespace, pod).await
    }

    pub async fn try_create(&self, namespace: &str, pod: Value) -> kube::Result<Pod> {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        api.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await
    }

    pub fn secrets(&self, namespace: &str) -> Api<Secret> {
        Api::namespaced(self.client(), namespace)
    }

    /// Waits until the pull secret of a namespace is as wanted.
    pub async fn secret<T>(&self, namespace: &str, wanted: impl Fn(Option<&Secret>) -> Option<T>) -> T {
        let what = format!("pull secret of {namespace}");
        await_object(self.secrets(namespace), "ecr-cname", &what, wanted).await
    }

    /// Waits until the pull secret of a namespace holds a token for a registry, and returns it.
    pub async fn token(&self, namespace: &str, registry: &str) -> String {
        self.secret(namespace, |secret| tokens(secret?).remove(registry)).await
    }

    /// Waits until the pull secret of a namespace holds this very token for a registry.
    pub async fn holds(&self, namespace: &str, registry: &str, token: &str) {
        self.secret(namespace, |secret| (tokens(secret?).get(registry)? == token).then_some(())).await;
    }

    pub async fn delete_alias(&self, name: &str) {
        self.aliases().delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub async fn label_namespace(&self, name: &str, labels: Value) {
        let api: Api<Namespace> = Api::all(self.client());
        let patch = json!({"metadata": {"labels": labels}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    /// Waits until an Event with this reason speaks of an object, and returns its note.
    pub async fn event(&self, namespace: &str, object: &str, reason: &str) -> String {
        let api: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(self.client(), namespace);
        let mut events =
            std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff().touched_objects());
        let find = async {
            while let Some(event) = events.next().await {
                let Ok(event) = event else { continue };
                let regarding = event.regarding.and_then(|r| r.name);
                if event.reason.as_deref() == Some(reason) && regarding.as_deref() == Some(object) {
                    return event.note.unwrap_or_default();
                }
            }
            panic!("the watch of events ended")
        };
        tokio::time::timeout(LIMIT, find)
            .await
            .unwrap_or_else(|_| panic!("no Event {reason} of {object} in {namespace}"))
    }
}

/// Watches one object until `wanted` finds something in it.
pub async fn await_object<K, T>(
    api: Api<K>,
    name: &str,
    what: &str,
    wanted: impl Fn(Option<&K>) -> Option<T>,
) -> T
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let mut last = None;
    let mut objects = std::pin::pin!(kube::runtime::watcher::watch_object(api, name).default_backoff());
    let find = async {
        while let Some(object) = objects.next().await {
            let Ok(object) = object else { continue };
            if let Some(found) = wanted(object.as_ref()) {
                return found;
            }
            last = object.map(|o| serde_json::to_string(o.meta()).unwrap_or_default() + &format!("{o:?}"));
        }
        panic!("the watch of {what} ended")
    };
    let found = tokio::time::timeout(LIMIT, find).await;
    found.unwrap_or_else(|_| {
        // A Secret's data must not end up in a test's output.
        let last = last.filter(|_| !what.starts_with("pull secret")).unwrap_or_default();
        panic!("{what} is not as wanted after {LIMIT:?}; last seen: {last}")
    })
}

/// The tokens in a pull secret, by registry.
pub fn tokens(secret: &Secret) -> BTreeMap<String, String> {
    let Some(config) = secret.data.as_ref().and_then(|d| d.get(".dockerconfigjson")) else {
        return BTreeMap::new();
    };
    let config: Value = serde_json::from_slice(&config.0).unwrap();
    let auths = config["auths"].as_object().unwrap();
    auths
        .iter()
        .map(|(host, entry)| {
            let auth = STANDARD.decode(entry["auth"].as_str().unwrap()).unwrap();
            let auth = String::from_utf8(auth).unwrap();
            (host.clone(), auth.strip_prefix("AWS:").unwrap().to_owned())
        })
        .collect()
}

/// The images of a pod's containers, in order.
pub fn images(pod: &Pod) -> Vec<String> {
    pod.spec.as_ref().unwrap().containers.iter().map(|c| c.image.clone().unwrap_or_default()).collect()
}

/// The names of a pod's pull secrets, in order.
pub fn pull_secrets(pod: &Pod) -> Vec<String> {
    pod.spec.as_ref().unwrap().image_pull_secrets.iter().flatten().map(|s| s.name.clone()).collect()
}

/// A name that no other test uses.
pub fn unique(prefix: &str) -> String {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    format!("{prefix}-{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

/// The name of an object, for messages.
pub fn uid<K: kube::Resource>(object: &K) -> String {
    object.uid().unwrap_or_default()
}
