//! A real Kubernetes control plane: etcd and kube-apiserver, with RBAC on.
//!
//! By itself it has no controllers and no nodes; [`Node`](crate::node::Node) adds them to one that was started on a
//! [`Machine`]. What they would do that tests depend on is done here: a namespace from
//! [`ControlPlane::namespace`] has the `default` service account that admission wants every pod to have.
//! What they would do beyond that is not done without them: nothing is garbage collected, a namespace that is
//! deleted stays `Terminating`, and the aggregated roles `view`, `edit` and `admin` grant nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig as KubeconfigFile};
use tokio::io::AsyncWriteExt as _;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::aws::Issuer;
use crate::binaries::{self, Binaries};
use crate::http;
use crate::install_crypto_provider;
use crate::kubeconfig::Kubeconfig;
use crate::node::Machine;
use crate::pki;
use crate::ports::Port;
use crate::process::Process;
use crate::random;
use crate::run_dir::RunDir;

/// The addresses of Services, and the first of them: that of the API server.
pub(crate) const SERVICES: &str = "10.96.0.0/16";
const KUBERNETES_SERVICE: &str = "10.96.0.1";

/// The issuer of service account tokens.
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// What the components of a node are called: file name, user and group.
const COMPONENTS: [(&str, &str, &str); 4] = [
    ("kubelet", "system:node:node", "system:nodes"),
    ("kube-controller-manager", "system:kube-controller-manager", ""),
    ("kube-scheduler", "system:kube-scheduler", ""),
    ("kube-proxy", "system:kube-proxy", ""),
];

/// The API server is ready about four seconds after its start; a loaded machine may need longer.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a component may take to end by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one kubectl may take.
const KUBECTL_TIMEOUT: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A running control plane; dropping it, or the end of the process, ends it.
///
/// It may be shared by tests with runtimes of their own: nothing in it belongs to the runtime that
/// started it.
pub struct ControlPlane {
    // Dropped in this order: the API server before its storage, the directory last.
    apiserver: Mutex<Option<Arc<Process>>>,
    etcd: Mutex<Option<Arc<Process>>>,
    machine: Option<Arc<Machine>>,
    binaries: Binaries,
    apiserver_port: Port,
    etcd_port: Port,
    url: String,
    ca_pem: String,
    config: kube::Config,
    kubeconfig: PathBuf,
    flags: Mutex<Vec<String>>,
    run: RunDir,
}

impl ControlPlane {
    /// Starts etcd and kube-apiserver, and returns when the latter is ready.
    ///
    /// The very first call on a machine builds both, see [`binaries::locate`].
    pub async fn start() -> Result<Self> {
        Self::start_at(None, &[]).await
    }

    /// The same, with further flags of the API server.
    pub async fn start_with(flags: &[String]) -> Result<Self> {
        Self::start_at(None, flags).await
    }

    /// The same for a cluster with a node: nodes and pods of the machine reach the API server, and it them.
    pub async fn start_on(machine: Arc<Machine>) -> Result<Self> {
        Self::start_at(Some(machine), &[]).await
    }

    async fn start_at(machine: Option<Arc<Machine>>, flags: &[String]) -> Result<Self> {
        install_crypto_provider();
        let binaries = spawn_blocking(binaries::locate).await??;
        let run = RunDir::create()?;
        let (apiserver_port, etcd_port) = (Port::reserve()?, Port::reserve()?);
        let ip = machine.as_ref().map_or(Ipv4Addr::LOCALHOST, |_| Machine::ADDRESS);
        let url = format!("https://{ip}:{}", apiserver_port.number());

        let names = [&ip.to_string(), "localhost", "kubernetes.default.svc", KUBERNETES_SERVICE];
        let serving = pki::serving_cert(&names)?;
        let admin_token = random::secret("")?;
        let mut tokens = format!("{admin_token},admin,admin,\"system:masters\"\n");
        let write = |name: &str, contents: &str| {
            let path = run.path().join(name);
            fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
            Ok::<_, anyhow::Error>(path)
        };
        write("ca.crt", &serving.ca)?;
        write("tls.crt", &serving.cert)?;
        write("tls.key", &serving.key)?;
        write("service-account.key", &pki::service_account_key()?)?;
        for (name, user, groups) in COMPONENTS.iter().filter(|_| machine.is_some()) {
            let token = random::secret("")?;
            tokens.push_str(&format!("{token},{user},{user},\"{groups}\"\n"));
            let kubeconfig = Kubeconfig {
                server: &url,
                ca_pem: &serving.ca,
                user: name,
                token: &token,
                namespace: "default",
            };
            write(&format!("{name}.kubeconfig"), &kubeconfig.to_yaml())?;
        }
        write("tokens.csv", &tokens)?;
        let admin = Kubeconfig {
            server: &url,
            ca_pem: &serving.ca,
            user: "admin",
            token: &admin_token,
            namespace: "default",
        };
        let kubeconfig = write("admin.kubeconfig", &admin.to_yaml())?;

        let control_plane = Self {
            apiserver: Mutex::default(),
            etcd: Mutex::default(),
            machine,
            config: client_config(&kubeconfig).await?,
            kubeconfig,
            url,
            ca_pem: serving.ca,
            binaries,
            apiserver_port,
            etcd_port,
            flags: Mutex::new(flags.to_vec()),
            run,
        };
        control_plane.start_etcd().await?;
        control_plane.start_apiserver().await?;
        Ok(control_plane)
    }

    /// The admin's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A new admin client, which belongs to the runtime that this is called in.
    pub fn kube_client(&self) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.config.clone())?)
    }

    /// How an admin's client is configured.
    pub(crate) fn config(&self) -> kube::Config {
        self.config.clone()
    }

    /// The same without retries: every answer is seen.
    pub fn kube_client_without_retries(&self) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.config_without_retries())?)
    }

    pub(crate) fn config_without_retries(&self) -> kube::Config {
        let mut config = self.config.clone();
        config.default_retry = false;
        config
    }

    /// The URL of the API server.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The certificate authority of the API server, in PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The kubeconfig of a component of the node, by its program's name.
    pub(crate) fn component_kubeconfig(&self, program: &str) -> PathBuf {
        self.run.path().join(format!("{program}.kubeconfig"))
    }

    /// The directory of this run: data, keys and logs. It goes with the control plane.
    pub fn dir(&self) -> &Path {
        self.run.path()
    }

    /// Who signs service account tokens here, for [`AwsStandIn::start`](crate::aws::AwsStandIn::start).
    pub fn issuer(&self) -> Issuer {
        Issuer::api_server(ISSUER, self.config.clone())
    }

    // Objects that no controller makes here.

    /// Creates a namespace whose name starts with `prefix` and is used by nobody else, and the `default`
    /// service account in it.
    pub async fn namespace(&self, prefix: &str, labels: &[(&str, &str)]) -> Result<String> {
        let name = format!("{prefix}-{}", random::id()?.to_lowercase());
        let labels: BTreeMap<_, _> =
            labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let namespace = Namespace {
            metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..Default::default() },
            ..Default::default()
        };
        Api::all(self.kube_client()?).create(&PostParams::default(), &namespace).await?;
        if self.machine.is_some() {
            let wait =
                ["wait", "--for=create", "--timeout=30s", "serviceaccount/default", "--namespace", &name];
            self.kubectl(&wait).await?;
        } else {
            self.service_account(&name, "default").await?;
        }
        Ok(name)
    }

    /// Creates a service account.
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        let account = ServiceAccount {
            metadata: ObjectMeta { name: Some(name.into()), ..Default::default() },
            ..Default::default()
        };
        Api::namespaced(self.kube_client()?, namespace)
            .create(&PostParams::default(), &account)
            .await
            .with_context(|| format!("cannot create the service account {namespace}/{name}"))?;
        Ok(())
    }

    /// A token of a service account for `audience`. The API server grants no less than ten minutes.
    pub async fn service_account_token(
        &self,
        namespace: &str,
        name: &str,
        audience: &str,
        lifetime: Duration,
    ) -> Result<String> {
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec![audience.into()]),
                expiration_seconds: Some(lifetime.as_secs().try_into()?),
                ..Default::default()
            }),
            ..Default::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.kube_client()?, namespace);
        let answer = accounts
            .create_token_request(name, &PostParams::default(), &request)
            .await
            .with_context(|| format!("cannot get a token of the service account {namespace}/{name}"))?;
        answer.status.and_then(|status| status.token).context("an answer without a token")
    }

    /// A kubeconfig with a token of a service account, good for a day, and its namespace as default.
    pub async fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let token =
            self.service_account_token(namespace, name, ISSUER, Duration::from_secs(24 * 60 * 60)).await?;
        let kubeconfig =
            Kubeconfig { server: &self.url, ca_pem: &self.ca_pem, user: name, token: &token, namespace };
        let path = self.run.path().join(format!("{namespace}.{name}.kubeconfig"));
        fs::write(&path, kubeconfig.to_yaml()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    // kubectl

    /// Runs the real kubectl as admin, and returns what it prints; its complaints are the error.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_stdin(args, "").await
    }

    /// The same with something to read on standard input.
    pub async fn kubectl_stdin(&self, args: &[&str], input: &str) -> Result<String> {
        let what = || format!("kubectl {}", args.join(" "));
        let home = self.run.path().join("home");
        let mut kubectl = tokio::process::Command::new(&self.binaries.kubectl)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(home.join("cache"))
            .args(args)
            .env("HOME", &home)
            .env("NO_PROXY", self.ip().to_string())
            .env_remove("KUBECONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(what)?;

        let mut stdin = kubectl.stdin.take().context("kubectl has no standard input")?;
        let (written, output) = timeout(KUBECTL_TIMEOUT, async {
            let write = async move { stdin.write_all(input.as_bytes()).await };
            tokio::join!(write, kubectl.wait_with_output())
        })
        .await
        .with_context(|| format!("{} did not end within {KUBECTL_TIMEOUT:?}", what()))?;
        let output = output.with_context(what)?;
        ensure!(output.status.success(), "{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim());
        written.with_context(what)?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Applies manifests, server-side.
    pub async fn apply(&self, yaml: &str) -> Result<()> {
        self.kubectl_stdin(&["apply", "--server-side", "--force-conflicts", "--filename", "-"], yaml).await?;
        Ok(())
    }

    // Stopping and starting

    /// The running API server, to be paused or to have its log read.
    pub fn apiserver(&self) -> Option<Arc<Process>> {
        lock(&self.apiserver).clone()
    }

    /// The running etcd.
    pub fn etcd(&self) -> Option<Arc<Process>> {
        lock(&self.etcd).clone()
    }

    /// Ends the API server as an upgrade would. Data stay.
    pub async fn stop_apiserver(&self) -> Result<()> {
        stop(&self.apiserver).await
    }

    /// Kills the API server. Data stay.
    pub async fn kill_apiserver(&self) -> Result<()> {
        kill(&self.apiserver).await
    }

    /// Other further flags of the API server, from its next start on.
    pub fn set_flags(&self, flags: impl IntoIterator<Item = String>) {
        *lock(&self.flags) = flags.into_iter().collect();
    }

    /// Starts the API server again, on the same port, and waits until it is ready.
    pub async fn start_apiserver(&self) -> Result<()> {
        self.launch(&self.apiserver, "kube-apiserver", &self.apiserver_command())?;
        self.apiserver_ready().await
    }

    /// Ends etcd. Data stay.
    pub async fn stop_etcd(&self) -> Result<()> {
        stop(&self.etcd).await
    }

    /// Kills etcd. Data stay, as far as they had been written.
    pub async fn kill_etcd(&self) -> Result<()> {
        kill(&self.etcd).await
    }

    /// Starts etcd again, on the same port, and waits until it accepts connections and the API server, if
    /// there is one, is ready with it.
    pub async fn start_etcd(&self) -> Result<()> {
        self.launch(&self.etcd, "etcd", &self.etcd_command())?;
        self.etcd_ready().await?;
        if self.apiserver().is_some() {
            self.apiserver_ready().await?;
        }
        Ok(())
    }

    /// Has etcd forget all earlier revisions: whoever asks for changes since one of them is told that it is gone.
    pub async fn compact_etcd(&self) -> Result<()> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.etcd_port.number()));
        let ask = async |path: &str, question: serde_json::Value| {
            let answer = http::post(address, path, &question.to_string()).await?;
            Ok::<_, anyhow::Error>(serde_json::from_str::<serde_json::Value>(&answer)?)
        };
        let status = ask("/v3/maintenance/status", serde_json::json!({})).await?;
        let revision = status["header"]["revision"].clone();
        ensure!(revision.is_string(), "etcd does not say its revision: {status}");
        let answer =
            ask("/v3/kv/compaction", serde_json::json!({"revision": revision, "physical": true})).await?;
        ensure!(answer.get("error").is_none(), "etcd does not compact: {answer}");
        Ok(())
    }

    fn launch(&self, slot: &Mutex<Option<Arc<Process>>>, name: &str, command: &Command) -> Result<()> {
        let mut slot = lock(slot);
        ensure!(slot.as_ref().is_none_or(|process| !process.is_running()), "{name} runs already");
        let log = self.run.path().join(format!("{name}.log"));
        *slot = Some(Arc::new(Process::spawn(name, command, &log)?));
        Ok(())
    }

    fn etcd_command(&self) -> Command {
        let url = format!("http://{}:{}", self.ip(), self.etcd_port.number());
        let mut command = self.command(&self.binaries.etcd);
        command
            .arg("--data-dir")
            .arg(self.run.path().join("etcd"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", "http://127.0.0.1:0"])
            .arg("--unsafe-no-fsync");
        command
    }

    fn apiserver_command(&self) -> Command {
        let file = |name: &str| self.run.path().join(name);
        let mut command = self.command(&self.binaries.kube_apiserver);
        if self.machine.is_some() {
            command
                .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
                .arg("--kubelet-preferred-address-types=InternalIP");
        } else {
            command
                .arg("--authorization-mode=RBAC")
                // A machine without any network has no other address to advertise.
                .arg("--endpoint-reconciler-type=none")
                // Webhook services are dialled by the addresses of their endpoints: there is no kube-proxy.
                .arg("--enable-aggregator-routing=true");
        }
        command
            .arg(format!("--etcd-servers=http://{}:{}", self.ip(), self.etcd_port.number()))
            .arg(format!("--secure-port={}", self.apiserver_port.number()))
            .arg(format!("--bind-address={}", self.ip()))
            .arg(format!("--advertise-address={}", self.ip()))
            .arg("--cert-dir")
            .arg(file("certs"))
            .arg("--tls-cert-file")
            .arg(file("tls.crt"))
            .arg("--tls-private-key-file")
            .arg(file("tls.key"))
            .arg("--token-auth-file")
            .arg(file("tokens.csv"))
            .arg(format!("--service-account-issuer={ISSUER}"))
            .arg("--service-account-key-file")
            .arg(file("service-account.key"))
            .arg("--service-account-signing-key-file")
            .arg(file("service-account.key"))
            .arg("--allow-privileged=true")
            .arg(format!("--service-cluster-ip-range={SERVICES}"))
            .args(lock(&self.flags).iter());
        command
    }

    /// A component that is yet to be started, where its address is.
    fn command(&self, program: &Path) -> Command {
        match &self.machine {
            Some(machine) => machine.command_in_network(program),
            None => Command::new(program),
        }
    }

    /// The address of both components.
    fn ip(&self) -> Ipv4Addr {
        self.machine.as_ref().map_or(Ipv4Addr::LOCALHOST, |_| Machine::ADDRESS)
    }

    async fn apiserver_ready(&self) -> Result<()> {
        let process = self.apiserver().context("kube-apiserver does not run")?;
        // A retry in the client would hide what this loop wants to see.
        let client = self.kube_client_without_retries()?;
        ready(&process, || async {
            let request = hyper::Request::get("/readyz").body(Vec::new())?;
            timeout(Duration::from_secs(5), client.request_text(request)).await??;
            Ok(())
        })
        .await
    }

    async fn etcd_ready(&self) -> Result<()> {
        let process = self.etcd().context("etcd does not run")?;
        let address = SocketAddr::from((self.ip(), self.etcd_port.number()));
        ready(&process, || async {
            tokio::net::TcpStream::connect(address).await?;
            Ok(())
        })
        .await
    }
}

/// Polls `probe` until it succeeds, the process ends or the time is up.
async fn ready<F, Fut>(process: &Process, mut probe: F) -> Result<()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let name = process.name();
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let Err(error) = probe().await else { return Ok(()) };
        if let Some(status) = process.wait(Duration::ZERO) {
            bail!("{name} ended ({status}):\n{}", process.log_tail(20));
        }
        if Instant::now() > deadline {
            bail!("{name} is not ready after {START_TIMEOUT:?} ({error:#}):\n{}", process.log_tail(20));
        }
        sleep(POLL_INTERVAL).await;
    }
}

async fn stop(slot: &Mutex<Option<Arc<Process>>>) -> Result<()> {
    let Some(process) = lock(slot).take() else { return Ok(()) };
    spawn_blocking(move || {
        process.terminate()?;
        if process.wait(STOP_TIMEOUT).is_none() {
            process.kill()?;
            process.wait(STOP_TIMEOUT).ok_or_else(|| anyhow!("{} cannot be killed", process.name()))?;
        }
        Ok(())
    })
    .await?
}

async fn kill(slot: &Mutex<Option<Arc<Process>>>) -> Result<()> {
    let Some(process) = lock(slot).take() else { return Ok(()) };
    spawn_blocking(move || {
        process.kill()?;
        process.wait(STOP_TIMEOUT).ok_or_else(|| anyhow!("{} cannot be killed", process.name()))?;
        Ok(())
    })
    .await?
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn client_config(kubeconfig: &Path) -> Result<kube::Config> {
    let file = KubeconfigFile::read_from(kubeconfig)?;
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    // A proxy of the developer's leads nowhere near 127.0.0.1.
    config.proxy_url = None;
    config.connect_timeout = Some(Duration::from_secs(5));
    Ok(config)
}
