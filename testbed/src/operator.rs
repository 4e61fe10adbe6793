//! The operator, started as a user would start it: the real binary, under the RBAC of `manifests/`, with IRSA.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use ecr_cname::crd::RegistryAlias;

use crate::{
    apiproxy::ApiProxy, aws::AwsStandIn, controlplane::ControlPlane, http, ports::Port, process::Process,
    service::WebhookService, workspace,
};

/// The namespace that `manifests/` puts the operator in.
pub const NAMESPACE: &str = "ecr-cname";
/// The role that the operator is given by IRSA.
pub const ROLE: &str = "arn:aws:iam::123456789012:role/ecr-cname";
/// The subject that the role trusts.
pub const SUBJECT: &str = "system:serviceaccount:ecr-cname:ecr-cname-controller";

/// How long the operator is given to be ready.
const READY: Duration = Duration::from_secs(30);

/// A running process of the operator. Dropping it kills it.
pub struct Operator {
    process: Process,
    admin: SocketAddr,
    webhook: SocketAddr,
    _ports: [Port; 2],
}

/// How to start a process of the operator.
#[derive(Clone, Debug)]
pub struct Start {
    role: &'static str,
    service_account: &'static str,
    name: String,
    args: Vec<String>,
    webhook: Option<SocketAddr>,
    address: IpAddr,
    service: bool,
    api: Option<String>,
    env: Vec<(String, String)>,
}

impl Start {
    /// `ecr-cname run`: both roles in one process.
    #[must_use]
    pub fn run() -> Self {
        Self::new("run", "ecr-cname-controller")
    }

    /// `ecr-cname webhook`.
    #[must_use]
    pub fn webhook() -> Self {
        Self::new("webhook", "ecr-cname-webhook")
    }

    /// `ecr-cname controller`, for a webhook at this address.
    #[must_use]
    pub fn controller(webhook: SocketAddr) -> Self {
        Self { webhook: Some(webhook), ..Self::new("controller", "ecr-cname-controller") }
    }

    /// `ecr-cname controller`, for the webhook's Service.
    #[must_use]
    pub fn controller_in_cluster() -> Self {
        Self { service: true, ..Self::new("controller", "ecr-cname-controller") }
    }

    fn new(role: &'static str, service_account: &'static str) -> Self {
        Self {
            role,
            service_account,
            name: role.to_owned(),
            args: Vec::new(),
            webhook: None,
            address: Ipv4Addr::LOCALHOST.into(),
            service: false,
            api: None,
            env: Vec::new(),
        }
    }

    /// The name of the replica: of its log, and its holder name in the Lease.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Behind the webhook's Service, or with a webhook there: as in a cluster.
    #[must_use]
    pub fn behind(mut self, service: &WebhookService) -> Self {
        (self.address, self.service) = (service.address(), true);
        self
    }

    /// With this proxy between it and the API server.
    #[must_use]
    pub fn via(mut self, proxy: &ApiProxy) -> Self {
        self.api = Some(proxy.url());
        self
    }

    /// Further flags.
    #[must_use]
    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// A further environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// Applies `manifests/` to a control plane.
///
/// # Errors
/// A manifest is refused.
pub async fn install(control_plane: &ControlPlane) -> Result<()> {
    for file in ["crd.yaml", "rbac.yaml", "policy.yaml", "webhook.yaml"] {
        let path = workspace::root().join("manifests").join(file);
        let yaml = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        control_plane.apply(&yaml).await.with_context(|| format!("cannot apply {}", path.display()))?;
    }
    control_plane
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=30s",
            "crd/registryaliases.ecr-cname.dev",
        ])
        .await?;
    Ok(())
}

impl Operator {
    /// Starts a process of the operator, and returns without waiting for it to be ready.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn spawn(
        binary: &Path,
        control_plane: &ControlPlane,
        aws: &AwsStandIn,
        start: Start,
    ) -> Result<Self> {
        let ports = [Port::reserve()?, Port::reserve()?];
        let local = |port: &Port| SocketAddr::from((Ipv4Addr::LOCALHOST, port.number()));
        let admin = local(&ports[0]);
        let webhook = SocketAddr::from((start.address, ports[1].number()));
        let webhook = start.webhook.unwrap_or(webhook);
        let mut kubeconfig =
            control_plane.kubeconfig_for_service_account(NAMESPACE, start.service_account).await?;
        if let Some(api) = &start.api {
            let yaml = fs::read_to_string(&kubeconfig)?.replace(control_plane.url(), api);
            kubeconfig = control_plane.dir().join(format!("{}.kubeconfig", start.name));
            fs::write(&kubeconfig, yaml)?;
        }
        let mut command = Command::new(binary);
        command
            .arg(start.role)
            .arg(format!("--admin-listen={admin}"))
            .args(["--shutdown-delay=0s", "--drain=5s"])
            .arg(format!("--pod-name={}", start.name))
            .env("KUBECONFIG", kubeconfig);
        if start.role != "controller" {
            command.arg(format!("--listen={webhook}"));
        }
        if start.role != "webhook" {
            if !start.service {
                command.arg(format!("--webhook-url=https://{webhook}"));
            }
            command.envs(aws.env_web_identity(ROLE, &web_identity_token(control_plane).await?));
        }
        command.envs(start.env).args(start.args);
        let log = control_plane.dir().join(format!("{}.log", start.name));
        let process = Process::spawn(&start.name, &command, &log)?;
        Ok(Self { process, admin, webhook, _ports: ports })
    }

    /// Starts a process of the operator, and waits until it is ready.
    ///
    /// # Errors
    /// It ends, or is not ready in time; the error has the end of its log.
    pub async fn start(
        binary: &Path,
        control_plane: &ControlPlane,
        aws: &AwsStandIn,
        start: Start,
    ) -> Result<Self> {
        let operator = Self::spawn(binary, control_plane, aws, start).await?;
        operator.wait_ready().await?;
        Ok(operator)
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// It ends, or is not ready in time; the error has the end of its log.
    pub async fn wait_ready(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + READY;
        loop {
            let answer = self.admin("/readyz").await;
            if matches!(answer, Ok((200, _))) {
                return Ok(());
            }
            if !self.process.is_running() || tokio::time::Instant::now() > deadline {
                let said = answer.map_or_else(|e| format!("{e:#}"), |(_, text)| text);
                let log = self.process.log_tail(40);
                bail!("{} is not ready: {said}\n{log}", self.process.name());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks the admin port. Returns the status and the body.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn admin(&self, path: &str) -> Result<(u16, String)> {
        tokio::time::timeout(Duration::from_secs(5), http::get(self.admin, path)).await?
    }

    /// The value of a metric, named with its labels just as it is printed; 0 where it is not there.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let (_, text) = self.admin("/metrics").await?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.map(str::parse).transpose()?.unwrap_or_default())
    }

    /// Where the webhook is served.
    #[must_use]
    pub fn webhook_address(&self) -> SocketAddr {
        self.webhook
    }

    /// Where probes and metrics are served.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// The process itself.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// A file with a token as the pod identity webhook projects it into a pod.
///
/// # Errors
/// The API server refuses the token, or the file cannot be written.
pub async fn web_identity_token(control_plane: &ControlPlane) -> Result<PathBuf> {
    let token = control_plane
        .service_account_token(
            NAMESPACE,
            "ecr-cname-controller",
            "sts.amazonaws.com",
            Duration::from_secs(3600),
        )
        .await?;
    let path = control_plane.dir().join("web-identity-token");
    fs::write(&path, token)?;
    Ok(path)
}

/// Whether an alias is ready, as it is written now.
#[must_use]
pub fn is_ready(alias: &RegistryAlias) -> bool {
    let status = alias.status.as_ref().filter(|s| s.observed_generation == alias.metadata.generation);
    status.is_some_and(|s| s.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}
