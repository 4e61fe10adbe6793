//! The soak: load and faults for as long as one likes, with what must always hold checked all along.
//!
//! Two replicas of each role run behind the webhook's Service. Pods that name aliases are created all the time, tokens live
//! for a minute and a half, and the certificate for three. One fault follows the other, chosen by a generator whose seed is
//! printed and can be given again. After each fault everything has to work again before the next one comes.

mod fault;
mod invariants;
mod report;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecr_cname::crd::RegistryAlias;
use kube::Api;
use serde_json::json;

use crate::apiproxy::ApiProxy;
use crate::aws::AwsStandIn;
use crate::controlplane::ControlPlane;
use crate::eventually;
use crate::fleet::{Fleet, Role};
use crate::load::{Load, Target};
use crate::operator::{self, ROLE, SUBJECT, Start};
use crate::relay::Relay;
use fault::Fault;
use invariants::Invariants;
use report::{Report, Trial};

/// What is soaked, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long faults go on.
    pub duration: Duration,
    /// Which faults, and when.
    pub seed: u64,
    /// How many pods are created in each second.
    pub rate: u32,
}

/// How long anything may take to work again after a fault is over.
const CONVERGENCE: Duration = Duration::from_secs(60);
/// How long a token of ECR lives. No fault of AWS lasts for half of that.
const TOKEN_LIFETIME: Duration = Duration::from_secs(90);
/// The role of one of the aliases.
const PULL_ROLE: &str = "arn:aws:iam::210987654321:role/pull";

/// Name, host, registry and the registry that it moves to and back.
const ALIASES: [(&str, &str, [&str; 2]); 3] = [
    ("internal", "a.example.io", ["123456789012.dkr.ecr.us-east-1.amazonaws.com"; 2]),
    (
        "moving",
        "b.example.io",
        ["123456789012.dkr.ecr.eu-west-1.amazonaws.com", "123456789012.dkr.ecr.us-east-1.amazonaws.com"],
    ),
    ("other", "c.example.io", ["210987654321.dkr.ecr.us-east-1.amazonaws.com"; 2]),
];

/// Everything that runs.
struct Soak<'a> {
    control_plane: &'a ControlPlane,
    aws: Arc<AwsStandIn>,
    relay: Relay,
    /// Before the API server: the webhooks', the controllers'.
    proxies: [ApiProxy; 2],
    fleet: Fleet<'a>,
    load: Load,
    invariants: Invariants,
    random: fastrand::Rng,
    moved: bool,
    numbered: usize,
}

/// Runs the soak, prints what it does, and ends with a table.
///
/// # Errors
/// Something that must always hold did not, or the soak could not be started.
pub async fn run(binary: &Path, settings: Settings) -> Result<()> {
    let Settings { duration, seed, rate } = settings;
    println!("soak: {} min, {rate} pods in each second, seed {seed}", duration.as_secs_f64() / 60.0);
    let control_plane = ControlPlane::start().await?;
    let aws = Arc::new(AwsStandIn::start(control_plane.issuer())?);
    aws.role(ROLE).trusts_subject(SUBJECT);
    aws.role(PULL_ROLE).trusts_role(ROLE);
    aws.set_token_lifetime(TOKEN_LIFETIME);
    operator::install(&control_plane).await?;
    let relay = Relay::start(aws.url().trim_start_matches("http://").parse()?)?;
    let proxies = [ApiProxy::start(&control_plane)?, ApiProxy::start(&control_plane)?];
    let endpoint = format!("http://{}", relay.address());
    let start = |start: Start, proxy: &ApiProxy| {
        start.via(proxy).args(["--watch-timeout=10s"]).env("AWS_ENDPOINT_URL", &endpoint)
    };
    let controller = start(Start::controller_in_cluster(), &proxies[1]).args([
        "--lease-duration=5s",
        "--certificate-lifetime=3m",
        "--certificate-overlap=5s",
        // A machine that is busy with other things is no fault.
        "--webhook-timeout=10",
    ]);
    let fleet =
        Fleet::start(binary, &control_plane, &aws, start(Start::webhook(), &proxies[0]), controller).await?;

    let mut namespaces = Vec::new();
    for _ in 0..3 {
        namespaces.push(control_plane.namespace("soak", &[]).await?);
    }
    for (name, host, [registry, _]) in ALIASES {
        create_alias(&control_plane, name, host, registry).await?;
    }
    let invariants = Invariants::start(&control_plane, Arc::clone(&aws))?;
    let mut targets = Vec::new();
    for namespace in &namespaces {
        for (_, host, registries) in ALIASES {
            targets.push(Target {
                namespace: namespace.clone(),
                image: format!("{host}/team/app:1"),
                expected: registries.map(|registry| format!("{registry}/team/app:1")).into(),
            });
        }
    }
    for alias in ALIASES {
        ready(&control_plane, alias.0).await?;
    }
    let load = Load::start(&control_plane, rate, targets)?;
    let soak = Soak {
        control_plane: &control_plane,
        aws: Arc::clone(&aws),
        relay,
        proxies,
        fleet,
        load,
        invariants,
        random: fastrand::Rng::with_seed(seed),
        moved: false,
        numbered: 0,
    };
    for namespace in namespaces {
        soak.invariants.expect_namespace(namespace);
    }
    let report = soak.soak(duration).await;
    print!("{report}");
    ensure!(report.violations.is_empty(), "{} violations", report.violations.len());
    Ok(())
}

impl Soak<'_> {
    async fn soak(mut self, duration: Duration) -> Report {
        let began = Instant::now();
        let mut trials = Vec::new();
        let mut violations = Vec::new();
        let mut bag: Vec<Fault> = Vec::new();
        while began.elapsed() < duration && violations.is_empty() {
            // Each kind comes once before any comes again.
            let fault = match bag.pop() {
                Some(fault) => fault,
                None => {
                    bag = Fault::ALL.into();
                    self.random.shuffle(&mut bag);
                    continue;
                }
            };
            match self.trial(fault).await {
                Ok(trial) => {
                    println!("{:>7.1} s  {trial}", began.elapsed().as_secs_f64());
                    trials.push(trial);
                }
                Err(error) => {
                    violations.push(format!("{fault}: {error:#}"));
                    self.show_logs();
                }
            }
            for operator in
                self.fleet.replicas(Role::Webhook).iter().chain(self.fleet.replicas(Role::Controller))
            {
                self.invariants.sample(operator.process());
            }
            violations.extend(self.invariants.violations());
        }
        let load = self.load.stop().await;
        violations.extend(self.invariants.judge_processes());
        report::judge(&trials, &load, &mut violations);
        Report {
            trials,
            load,
            violations,
            checks: self.invariants.checks(),
            lasting: self.invariants.lasting(),
            all: self.invariants.all(),
        }
    }

    /// One fault, from its beginning until everything works again.
    async fn trial(&mut self, fault: Fault) -> Result<Trial> {
        let from = Instant::now();
        self.cause(fault).await.with_context(|| format!("{fault} could not be caused"))?;
        let over = Instant::now();
        self.works().await?;
        let converged = over.elapsed();
        let to = Instant::now();
        self.pause(1, 3).await;
        let failed = self.load.report().failed_between(from, to).len();
        Ok(Trial { fault, from, to, converged, failed })
    }

    /// Waits until everything works: somebody leads, the aliases are ready, a new namespace is served, and pods are stored.
    async fn works(&mut self) -> Result<()> {
        self.fleet.leader().await?;
        let namespace = self.control_plane.namespace("soak", &[]).await?;
        self.invariants.served(&namespace, CONVERGENCE).await?;
        self.invariants.expect_namespace(namespace);
        for (name, ..) in ALIASES {
            ready(self.control_plane, name).await?;
        }
        self.load.stored(5, CONVERGENCE).await
    }

    async fn pause(&mut self, least: u64, most: u64) {
        let pause = Duration::from_millis(self.random.u64(least * 1000..=most * 1000));
        tokio::time::sleep(pause).await;
    }

    fn show_logs(&self) {
        for operator in self.fleet.replicas(Role::Webhook).iter().chain(self.fleet.replicas(Role::Controller))
        {
            eprintln!("--- {}\n{}", operator.process().name(), operator.process().log_tail(25));
        }
    }
}

async fn create_alias(control_plane: &ControlPlane, name: &str, host: &str, registry: &str) -> Result<()> {
    let mut spec = json!({"host": host, "registry": registry});
    if registry.starts_with("210987654321") {
        spec["credentials"] = json!({"roleArn": PULL_ROLE});
    }
    let alias = json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
        "metadata": {"name": name}, "spec": spec});
    control_plane.apply(&alias.to_string()).await
}

/// Waits until an alias is ready for its present spec.
async fn ready(control_plane: &ControlPlane, name: &str) -> Result<()> {
    let api: Api<RegistryAlias> = Api::all(control_plane.kube_client()?);
    eventually(CONVERGENCE, async || {
        let alias = api.get(name).await?;
        ensure!(operator::is_ready(&alias), "alias {name} is not ready: {:?}", alias.status);
        Ok(())
    })
    .await
}
