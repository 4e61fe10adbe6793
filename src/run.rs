//! The wiring: channels, tasks, readiness and shutdown. Nothing else knows of all the parts.

use std::{future::pending, net::TcpListener, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use jiff::SignedDuration;
use k8s_openapi::api::{admissionregistration::v1::MutatingWebhookConfiguration, core::v1::Secret};
use kube::{
    Api, Client,
    runtime::events::{Recorder, Reporter},
};
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpSocket,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    admin::{self, Readiness},
    args::{CertificateMode, ControllerArgs, Process, WebhookArgs},
    client::client,
    client_auth::ClientAuth,
    dns::{self, Dns},
    ecr::Ecr,
    events::Events,
    issuer,
    lease::{self, Leadership},
    matching::{Endpoint, EntrySettings},
    metrics, registration,
    scope::Scope,
    secrets,
    server::Limits,
    serving_cert::ServingCert,
    status,
    table::AliasTable,
    tokens::{self, TokenMetrics},
    watch::{Aliases, follow_aliases, follow_one},
    webhook::{self, Webhook},
};

/// The tasks of the process. One that ends before its time ends the process.
struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.try_spawn(name, async {
            task.await;
            Ok(())
        });
    }

    fn try_spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.set.spawn(async move { (name, task.await) });
    }

    /// A task that has nothing to finish at shutdown.
    fn spawn_until_shutdown(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        self.spawn(name, async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = task => {}
            }
        });
    }
}

/// Runs the webhook, the controller, or both, until a signal.
///
/// # Errors
/// Something could not be started, or a task died.
pub async fn run(
    process: Process,
    webhook: Option<WebhookArgs>,
    controller: Option<ControllerArgs>,
) -> anyhow::Result<()> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        webhook = webhook.is_some(),
        controller = controller.is_some(),
        namespace = process.names.namespace,
        "starting"
    );
    // First of all: as the first process of a container, one that has no handler is not stopped by SIGTERM.
    let watch_timeout = process.watch_timeout;
    let signals = Signals::new().context("signals cannot be handled")?;
    let client = client(watch_timeout.read_timeout()).await?;
    let mut tasks = Tasks { set: JoinSet::new(), shutdown: CancellationToken::new() };
    let readiness = Readiness::default();

    let table = Arc::new(ArcSwap::from_pointee(AliasTable::default()));
    let (aliases_send, aliases) = watch::channel(Arc::new(Aliases::default()));
    let gate = readiness.gate("the aliases");
    tasks.spawn_until_shutdown(
        "alias watch",
        follow_aliases(client.clone(), watch_timeout, aliases_send, table.clone(), gate),
    );

    let (certificate_send, certificate) = watch::channel(None::<Arc<Secret>>);
    let api: Api<Secret> = Api::namespaced(client.clone(), &process.names.namespace);
    let (name, gate) = (process.names.certificate_secret.clone(), readiness.gate("the certificate's Secret"));
    tasks.spawn_until_shutdown("certificate watch", async move {
        follow_one(api, &name, watch_timeout, certificate_send, gate).await;
    });

    let mut parts = Parts {
        process,
        client,
        table,
        aliases,
        certificate,
        readiness,
        registry: metrics::registry(),
        tasks,
    };
    if let Some(args) = webhook {
        parts.start_webhook(args)?;
    }
    if let Some(args) = controller {
        parts.start_controller(args).await?;
    }
    let Parts { process, readiness, registry, mut tasks, .. } = parts;
    let listener = listen(process.admin_listen, "the admin port (--admin-listen)")?;
    let admin = admin::serve(listener, readiness.clone(), Arc::new(registry), tasks.shutdown.clone());
    tasks.try_spawn("admin server", async { admin.await.context("the admin server failed") });
    supervise(tasks, signals, &readiness, &process).await
}

/// What both roles are made of.
struct Parts {
    process: Process,
    client: Client,
    table: Arc<ArcSwap<AliasTable>>,
    aliases: watch::Receiver<Arc<Aliases>>,
    certificate: watch::Receiver<Option<Arc<Secret>>>,
    readiness: Readiness,
    registry: Registry,
    tasks: Tasks,
}

impl Parts {
    fn start_webhook(&mut self, args: WebhookArgs) -> anyhow::Result<()> {
        let serving = ServingCert::new(&mut self.registry);
        let gate = self.readiness.gate("a serving certificate");
        let follow = serving.clone().follow(self.certificate.clone(), gate);
        self.tasks.spawn_until_shutdown("serving certificate", follow);
        let settings = webhook::Settings {
            pull_secret: self.process.names.pull_secret.clone(),
            audit: args.audit,
            failure_policy: self.process.failure_policy,
        };
        let limits = Limits {
            connections: args.max_connections,
            // Room for the largest, whatever else is under way.
            memory: args.max_memory.max(args.max_body * 2),
            body: args.max_body,
            time: args.request_timeout,
        };
        let (table, aliases) = (self.table.clone(), self.aliases.clone());
        let webhook = Webhook::new(table, aliases, settings, limits, &mut self.registry);
        let listener = listen(args.listen, "the webhook (--listen)")?;
        let (clients, pem, verifier) = match args.client_ca {
            Some(ca) => {
                let clients = ClientAuth { ca, names: args.client_names };
                let loaded = clients.load().context("clients cannot be authenticated (--client-ca)")?;
                (Some(clients), loaded.0, Some(loaded.1))
            }
            None => (None, Vec::new(), None),
        };
        let config = serving.clone().server_config(verifier).context("TLS cannot be set up")?;
        let (tls_send, tls) = watch::channel(Arc::new(config));
        if let Some(clients) = clients {
            self.tasks.spawn_until_shutdown("client CA", clients.follow(pem, serving, tls_send));
        }
        let serve = webhook::serve(
            listener,
            tls,
            webhook,
            self.readiness.clone(),
            self.tasks.shutdown.clone(),
            self.process.drain,
        );
        self.tasks.try_spawn("webhook server", async { serve.await.context("the webhook server failed") });
        Ok(())
    }

    async fn start_controller(&mut self, args: ControllerArgs) -> anyhow::Result<()> {
        let (configuration_send, configuration) = watch::channel(None::<Arc<MutatingWebhookConfiguration>>);
        let api: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let name = args.kept.webhook_configuration.clone();
        let gate = self.readiness.gate("the MutatingWebhookConfiguration");
        let timeout = self.process.watch_timeout;
        self.tasks.spawn_until_shutdown("webhook configuration watch", async move {
            follow_one(api, &name, timeout, configuration_send, gate).await;
        });

        let leader = Leader {
            client: self.client.clone(),
            ecr: Arc::new(Ecr::from_env().await.context("AWS cannot be set up")?),
            dns: Dns::new(args.dns_server).context("DNS cannot be set up")?,
            process: self.process.clone(),
            args,
            aliases: self.aliases.clone(),
            certificate: self.certificate.clone(),
            configuration,
            token_metrics: TokenMetrics::new(&mut self.registry),
            secret_metrics: secrets::SecretMetrics::new(&mut self.registry),
        };
        let synced = leader.synced();
        let settings = lease::Settings {
            name: leader.args.kept.lease.clone(),
            holder: format!("{}_{:08x}", self.process.pod_name, fastrand::u32(..)),
            duration: leader.args.lease_duration,
        };
        let (election, leadership) = lease::Election::new(
            self.client.clone(),
            &self.process.names.namespace,
            settings,
            &mut self.registry,
        );
        let shutdown = self.tasks.shutdown.clone();
        self.tasks.spawn("leader election", async move {
            // Whoever leads before it knows what is there would take what it has not read yet for gone.
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = synced => {}
            }
            election.run(shutdown).await;
        });
        self.tasks.spawn_until_shutdown("leader", leader.lead_while(leadership));
        Ok(())
    }
}

/// What the leader needs to act.
struct Leader {
    client: Client,
    ecr: Arc<Ecr>,
    dns: Dns,
    process: Process,
    args: ControllerArgs,
    aliases: watch::Receiver<Arc<Aliases>>,
    certificate: watch::Receiver<Option<Arc<Secret>>>,
    configuration: watch::Receiver<Option<Arc<MutatingWebhookConfiguration>>>,
    token_metrics: TokenMetrics,
    secret_metrics: secrets::SecretMetrics,
}

impl Leader {
    /// Waits until the watches that the leader acts on have said what there is.
    fn synced(&self) -> impl Future<Output = ()> + Send + use<> {
        let (mut aliases, mut certificate) = (self.aliases.clone(), self.certificate.clone());
        let mut configuration = self.configuration.clone();
        async move {
            // A channel that is closed belongs to a task that died, which ends the process.
            let _ = aliases.changed().await;
            let _ = certificate.changed().await;
            let _ = configuration.changed().await;
        }
    }

    /// Acts while it leads. What is under way when it no longer does is dropped on the spot.
    async fn lead_while(self, mut leadership: Leadership) {
        while leadership.gained().await {
            if leadership.during(self.lead()).await.is_some() {
                return;
            }
            warn!("not the leader any more");
            self.token_metrics.clear();
            self.secret_metrics.clear();
        }
    }

    /// Acts as the leader. Each part follows what the others publish; none calls another.
    async fn lead(&self) {
        let (answers_send, answers) = watch::channel(Arc::default());
        let (tokens_send, tokens) = watch::channel(Arc::default());
        let (summary_send, summary) = watch::channel(Arc::default());
        let (registered_send, registered) = watch::channel(Arc::default());
        let reporter =
            Reporter { controller: "ecr-cname".into(), instance: Some(self.process.pod_name.clone()) };
        let (events, events_written) = Events::new(Recorder::new(self.client.clone(), reporter));
        let scope = self.scope();
        let bounds =
            dns::Bounds { min: self.args.dns_min_ttl, max: self.args.dns_max_ttl.max(self.args.dns_min_ttl) };
        let dns = dns::keep(self.dns.clone(), bounds, self.aliases.clone(), answers_send);
        let tokens_kept =
            tokens::keep(self.ecr.clone(), self.aliases.clone(), tokens_send, self.token_metrics.clone());
        let secrets = secrets::keep(
            self.client.clone(),
            secrets::Settings {
                name: self.process.names.pull_secret.clone(),
                scope: scope.clone(),
                watch_timeout: self.process.watch_timeout,
            },
            self.aliases.clone(),
            tokens.clone(),
            summary_send,
            events.clone(),
            self.secret_metrics.clone(),
        );
        let registration = registration::keep(
            self.client.clone(),
            self.args.kept.webhook_configuration.clone(),
            EntrySettings {
                endpoint: self.endpoint(),
                failure_policy: self.process.failure_policy,
                timeout_seconds: self.args.webhook_timeout,
                scope,
            },
            self.aliases.clone(),
            self.certificate.clone(),
            self.configuration.clone(),
            registered_send,
        );
        let sources = status::Sources { aliases: self.aliases.clone(), answers, tokens, summary, registered };
        let status = status::keep(self.client.clone(), sources, events);
        tokio::select! {
            () = dns => {}
            () = tokens_kept => {}
            () = secrets => {}
            () = registration => {}
            () = status => {}
            () = self.issue() => {}
            () = events_written => {}
        }
    }

    fn scope(&self) -> Scope {
        let own = &self.process.names.namespace;
        let mut excluded = self.args.exclude_namespaces.clone();
        excluded.retain(|name| !name.is_empty() && name != own);
        excluded.push(own.clone());
        Scope { watched: self.args.kept.watch_namespaces.clone(), excluded }
    }

    fn endpoint(&self) -> Endpoint {
        match &self.args.webhook_url {
            Some(url) => Endpoint::Url(url.base.clone()),
            None => Endpoint::Service {
                namespace: self.process.names.namespace.clone(),
                name: self.args.webhook_service.clone(),
            },
        }
    }

    async fn issue(&self) {
        if self.args.certificate == CertificateMode::External {
            return pending().await;
        }
        let service = format!("{}.{}.svc", self.args.webhook_service, self.process.names.namespace);
        let settings = issuer::Settings {
            secret: self.process.names.certificate_secret.clone(),
            names: match &self.args.webhook_url {
                Some(url) => vec![url.host.clone()],
                None => vec![service],
            },
            lifetime: SignedDuration::try_from(self.args.certificate_lifetime)
                .unwrap_or(SignedDuration::from_hours(2160)),
            overlap: self.args.certificate_overlap,
        };
        let namespace = self.process.names.namespace.clone();
        issuer::keep(
            self.client.clone(),
            namespace,
            settings,
            self.certificate.clone(),
            self.configuration.clone(),
        )
        .await;
    }
}

/// What tells the process to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Waits for a signal or for a task to die; then stops everything within its bounds.
async fn supervise(
    mut tasks: Tasks,
    mut signals: Signals,
    readiness: &Readiness,
    process: &Process,
) -> anyhow::Result<()> {
    let died = tokio::select! {
        () = signals.next() => None,
        ended = tasks.set.join_next() => Some(obituary(ended)),
    };
    readiness.stop();
    if died.is_none() {
        info!(delay_s = process.shutdown_delay.as_secs(), "shutting down: not ready any more");
        tokio::select! {
            () = tokio::time::sleep(process.shutdown_delay) => {}
            () = signals.next() => {}
        }
    }
    tasks.shutdown.cancel();
    let drained = async { while tasks.set.join_next().await.is_some() {} };
    tokio::select! {
        () = drained => info!("stopped"),
        () = tokio::time::sleep(process.drain + Duration::from_secs(5)) => warn!("stopped before everything had finished"),
        () = signals.next() => warn!("stopped at once, by a second signal"),
    }
    died.map_or(Ok(()), Err)
}

fn obituary(
    ended: Option<Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>>,
) -> anyhow::Error {
    match ended {
        Some(Ok((name, Err(error)))) => error.context(format!("the task {name:?} died")),
        Some(Ok((name, Ok(())))) => anyhow!("the task {name:?} ended before its time"),
        Some(Err(panic)) => anyhow!("a task died: {panic}"),
        None => anyhow!("there is nothing to do"),
    }
}

fn listen(address: std::net::SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        // Far more than the usual 128, so that a burst of strangers does not make the API server wait to be accepted.
        socket.listen(4096)?.into_std()
    };
    let listener = open().with_context(|| format!("cannot listen on {address} for {what}"))?;
    info!(address = %listener.local_addr()?, "listening for {what}");
    Ok(listener)
}
