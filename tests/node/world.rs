//! One node and one release for all tests of this binary.
//!
//! Most tests share the release, each with a namespace, an alias and a host of its own: [`shared`]. One that changes the
//! release has it for itself: [`alone`].

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use testbed::{
    cluster::Cluster,
    helm,
    image::Image,
    operator::{NAMESPACE, ROLE, SUBJECT},
    registry::HOST,
};
use tokio::{
    sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Instant, sleep},
};

/// How long anything may take that a test waits for. Pulling backs off to a minute and more.
pub const LIMIT: Duration = Duration::from_secs(150);

/// The release that most tests expect.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Release {
    Default,
    /// None, or one that some test made or left halfway.
    Other,
}

pub struct World {
    pub cluster: Cluster,
    values: PathBuf,
    release: RwLock<Release>,
}

/// The world with the default release, beside other tests. `None` where no node can run.
pub async fn shared() -> Option<(&'static World, RwLockReadGuard<'static, Release>)> {
    let (world, release) = alone().await?;
    Some((world, release.downgrade()))
}

/// The world with the default release, without other tests. Whoever does not leave the release as it was says
/// [`Release::Other`].
pub async fn alone() -> Option<(&'static World, RwLockWriteGuard<'static, Release>)> {
    let (world, mut release) = any_release().await?;
    if *release == Release::Other {
        world.uninstall().await;
        world.install(&[]).await;
        *release = Release::Default;
    }
    Some((world, release))
}

/// The world without other tests, with any release or none.
pub async fn any_release() -> Option<(&'static World, RwLockWriteGuard<'static, Release>)> {
    static WORLD: OnceCell<World> = OnceCell::const_new();
    if !testbed::node::available().unwrap() {
        return None;
    }
    let world = WORLD.get_or_init(World::start).await;
    Some((world, world.release.write().await))
}

/// The operator that was built for this test, or the one that `ECR_CNAME_BINARY` names.
fn binary() -> PathBuf {
    let given = std::env::var_os("ECR_CNAME_BINARY").filter(|path| !path.is_empty());
    given.map_or_else(|| Path::new(env!("CARGO_BIN_EXE_ecr-cname")).into(), PathBuf::from)
}

impl World {
    async fn start() -> Self {
        let cluster = Cluster::start().await.unwrap();
        cluster.aws.role(ROLE).trusts_subject(SUBJECT);
        cluster.load_operator(Image::operator(&binary()).unwrap()).await.unwrap();
        let values = cluster.control_plane.dir().join("values.yaml");
        std::fs::write(&values, cluster.values()).unwrap();
        let labels = "pod-security.kubernetes.io/enforce=restricted";
        let world = Self { cluster, values, release: RwLock::new(Release::Other) };
        world.kubectl(&["create", "namespace", NAMESPACE]).await;
        world.kubectl(&["label", "namespace", NAMESPACE, labels]).await;
        world
    }

    /// Installs the chart, with these values beside those that every test needs.
    pub async fn install(&self, values: &[&str]) {
        self.helm_release("install", values).await;
    }

    /// Changes the release, with these values beside those that every test needs.
    pub async fn upgrade(&self, values: &[&str]) {
        self.helm_release("upgrade", values).await;
    }

    async fn helm_release(&self, verb: &str, values: &[&str]) {
        let (chart, file) = (helm::chart().display().to_string(), self.values.display().to_string());
        let mut args = vec![verb, "ecr-cname", &chart, "--values", &file, "--wait", "--timeout=4m"];
        args.extend(values.iter().flat_map(|value| ["--set", value]));
        self.helm(&args).await;
    }

    /// Uninstalls the chart, if it is there.
    pub async fn uninstall_release(&self) {
        self.helm(&["uninstall", "ecr-cname", "--ignore-not-found", "--wait", "--timeout=4m"]).await;
    }

    /// The same, and the certificate goes that somebody else kept.
    pub async fn uninstall(&self) {
        self.uninstall_release().await;
        self.kubectl(&["delete", "secret", "ecr-cname-tls", "--namespace", NAMESPACE, "--ignore-not-found"])
            .await;
    }

    /// Runs Helm in the operator's namespace.
    pub async fn helm(&self, args: &[&str]) -> String {
        let args = [args, &["--namespace", NAMESPACE]].concat();
        match helm::helm_in(&self.cluster.control_plane, &args).await {
            Ok(output) => output,
            Err(error) => panic!("{error:#}\n{}", self.diagnosis(NAMESPACE).await),
        }
    }

    pub async fn kubectl(&self, args: &[&str]) -> String {
        self.cluster.control_plane.kubectl(args).await.unwrap()
    }

    /// An object, or `None` if there is none.
    pub async fn get(&self, namespace: &str, object: &str) -> Option<Value> {
        let args = ["get", object, "--namespace", namespace, "--ignore-not-found", "--output=json"];
        let output = self.kubectl(&args).await;
        (!output.trim().is_empty()).then(|| serde_json::from_str(&output).unwrap())
    }

    /// All objects of a kind in a namespace.
    pub async fn list(&self, namespace: &str, kind: &str) -> Vec<Value> {
        let output = self.kubectl(&["get", kind, "--namespace", namespace, "--output=json"]).await;
        let list: Value = serde_json::from_str(&output).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    pub async fn apply(&self, object: &Value) {
        self.cluster.control_plane.apply(&object.to_string()).await.unwrap();
    }

    /// A namespace that no other test uses.
    pub async fn namespace(&self, labels: &[(&str, &str)]) -> String {
        self.cluster.control_plane.namespace("e2e", labels).await.unwrap()
    }

    /// A friendly host that leads to ECR by a CNAME, and an alias for it in one namespace. Returns the host when the alias
    /// is ready.
    pub async fn alias(&self, namespace: &str, spec: Value) -> String {
        let selector = json!({ "matchLabels": { "kubernetes.io/metadata.name": namespace } });
        self.alias_of(namespace, &with(spec, json!({ "namespaceSelector": selector }))).await
    }

    /// The same with any selector; `name` is used by no other test.
    pub async fn alias_of(&self, name: &str, spec: &Value) -> String {
        let host = self.friendly_host(name);
        let spec = with(json!({ "host": host, "registry": HOST }), spec.clone());
        self.apply(&json!({
            "apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
            "metadata": { "name": name }, "spec": spec,
        }))
        .await;
        self.until(&format!("alias {name} to be ready"), name, async || {
            let alias = self.get("", &format!("registryalias/{name}")).await?;
            condition(&alias, "Ready").filter(|status| status == "True")
        })
        .await;
        host
    }

    /// A name with a CNAME that leads to ECR, as people have them.
    pub fn friendly_host(&self, name: &str) -> String {
        let host = format!("{name}.internal.example.io");
        self.cluster.dns.cname(&host, HOST, 60).unwrap();
        host
    }

    /// Creates a pod, and returns it as it was stored.
    pub async fn pod(&self, namespace: &str, name: &str, labels: Value, spec: Value) -> Value {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "labels": labels }, "spec": spec,
        });
        let create = ["create", "--filename=-", "--output=json"];
        let stored = self.cluster.control_plane.kubectl_stdin(&create, &pod.to_string()).await.unwrap();
        serde_json::from_str(&stored).unwrap()
    }

    /// Waits until a pod runs.
    pub async fn running(&self, namespace: &str, pod: &str) {
        self.until(&format!("pod {pod} to run"), namespace, async || {
            let pod = self.get(namespace, &format!("pod/{pod}")).await?;
            condition(&pod, "Ready").filter(|status| status == "True")
        })
        .await;
    }

    /// Waits until kubelet says why it cannot pull the image of a pod.
    pub async fn pull_error(&self, namespace: &str, pod: &str) -> String {
        self.until(&format!("pod {pod} to fail"), namespace, async || {
            let events = self.list(namespace, "events").await;
            events
                .iter()
                .filter(|event| event["involvedObject"]["name"] == pod && event["reason"] == "Failed")
                .find_map(|event| event["message"].as_str().filter(|text| text.contains("failed to pull")))
                .map(str::to_owned)
        })
        .await
    }

    /// Waits until all replicas of a Deployment are available.
    pub async fn available(&self, namespace: &str, deployment: &str) {
        self.until(&format!("deployment {deployment} to be available"), namespace, async || {
            let deployment = self.get(namespace, &format!("deployment/{deployment}")).await?;
            let (wanted, status) = (&deployment["spec"]["replicas"], &deployment["status"]);
            (status["observedGeneration"] == deployment["metadata"]["generation"]
                && &status["availableReplicas"] == wanted
                && &status["updatedReplicas"] == wanted
                && &status["replicas"] == wanted)
                .then_some(())
        })
        .await;
    }

    /// Polls until `look` finds something; an error tells what is in `namespace` if it does not in time.
    pub async fn until<T: Debug>(&self, what: &str, namespace: &str, look: impl AsyncFn() -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "waited in vain for {what}\n{}",
                self.diagnosis(namespace).await
            );
            sleep(Duration::from_millis(250)).await;
        }
    }

    /// What a person would look at.
    async fn diagnosis(&self, namespace: &str) -> String {
        let mut text = String::new();
        for args in [
            &["get", "registryaliases,pods", "--output=wide", "--namespace", namespace][..],
            &["get", "events", "--namespace", namespace, "--sort-by=.lastTimestamp"],
            &[
                "logs",
                "--namespace",
                NAMESPACE,
                "--selector=app.kubernetes.io/name=ecr-cname",
                "--tail=15",
                "--prefix",
            ],
        ] {
            let output = self.cluster.control_plane.kubectl(args).await;
            let output = output.unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<_> = output.lines().collect();
            text.push_str(&lines[lines.len().saturating_sub(30)..].join("\n"));
            text.push('\n');
        }
        text
    }
}

/// The status of a condition.
pub fn condition(object: &Value, type_: &str) -> Option<String> {
    let conditions = object["status"]["conditions"].as_array()?;
    let condition = conditions.iter().find(|condition| condition["type"] == type_)?;
    condition["status"].as_str().map(str::to_owned)
}

/// The fields of both objects; those of `more` count.
pub fn with(mut object: Value, more: Value) -> Value {
    if let (Some(fields), Value::Object(more)) = (object.as_object_mut(), more) {
        fields.extend(more);
    }
    object
}

/// A pod's spec with one container.
pub fn container(image: &str) -> Value {
    json!({ "containers": [{ "name": "app", "image": image, "imagePullPolicy": "Always" }], "terminationGracePeriodSeconds": 1 })
}

/// A Secret with credentials for ECR, as people make them by hand.
pub fn pull_secret(namespace: &str, name: &str, token: &str) -> Value {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let auth = STANDARD.encode(format!("AWS:{token}"));
    let config = json!({ "auths": { HOST: { "auth": auth } } });
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson",
        "metadata": { "name": name, "namespace": namespace },
        "stringData": { ".dockerconfigjson": config.to_string() },
    })
}
