//! How the controller's cost grows with the cluster: measured on a real control plane, beside a client that does nothing but
//! write.

mod audit;
mod bare;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ecr_cname::crd::RegistryAlias;
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client,
    api::{ListParams, WatchEvent},
    core::PartialObjectMeta,
};

use crate::{
    aws::{AwsStandIn, Operation, Scope},
    build::{self, Profile},
    controlplane::ControlPlane,
    eventually,
    operator::{self, Operator, ROLE, SUBJECT, Start},
    usage::Usage,
};
use audit::{Audit, since};

/// How large a pull secret of one registry is, about.
const SECRET_BYTES: usize = 3_300;
/// How many namespaces are created one after the other, to see how long each waits for its Secret.
const NEW: usize = 200;
/// Long enough for every watch to be begun anew once.
const IDLE: Duration = Duration::from_secs(130);
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Long enough for everything but the refresh, short enough to wait for it: refreshed with 50 to 60 % left.
const TOKEN_LIFETIME: Duration = Duration::from_secs(540);

/// Measures clusters of these sizes, and prints a table for each.
///
/// # Errors
/// Something could not be started, or did not happen in time.
pub async fn run(binary: Option<PathBuf>, sizes: &[usize], aliases: usize) -> Result<()> {
    let binary = build::operator_or(binary, Profile::Release).await?;
    for size in sizes {
        measure(&binary, *size).await.with_context(|| format!("{size} namespaces"))?;
    }
    if aliases > 0 {
        many_aliases(&binary, aliases).await.with_context(|| format!("{aliases} aliases"))?;
    }
    Ok(())
}

/// A control plane with the operator's manifests, and AWS.
struct Bed {
    control_plane: ControlPlane,
    aws: AwsStandIn,
    audit: Audit,
    client: Client,
}

impl Bed {
    async fn start() -> Result<Self> {
        let audit = Audit::new()?;
        let control_plane = ControlPlane::start_with(&audit.flags()).await?;
        let aws = AwsStandIn::start(control_plane.issuer())?;
        aws.role(ROLE).trusts_subject(SUBJECT);
        aws.set_token_lifetime(TOKEN_LIFETIME);
        operator::install(&control_plane).await?;
        let client = control_plane.kube_client()?;
        Ok(Self { control_plane, aws, audit, client })
    }

    async fn controller(&self, binary: &Path, name: &str) -> Result<Operator> {
        // Nothing admits pods here, so nobody needs to listen.
        let start = Start::controller(([127, 0, 0, 1], 9).into()).named(name);
        Operator::start(binary, &self.control_plane, &self.aws, start).await
    }

    async fn alias(&self, from: usize, to: usize) -> Result<()> {
        let documents: Vec<_> = (from..to)
            .map(|i| {
                format!(
                    "apiVersion: ecr-cname.dev/v1alpha1\nkind: RegistryAlias\nmetadata: {{name: a{i}}}\nspec: {{host: h{i}.example.io, registry: 123456789012.dkr.ecr.us-east-1.amazonaws.com}}\n"
                )
            })
            .collect();
        self.control_plane.apply(&documents.join("---\n")).await
    }
}

async fn measure(binary: &Path, size: usize) -> Result<()> {
    let bed = Bed::start().await?;
    let names: Vec<_> = (0..size).map(|i| format!("n{i:06}")).collect();
    eprintln!("scale: creating {size} namespaces");
    bare::namespaces(&bed.client, &names).await?;
    let row = |what: &str, value: String| println!("| {what} | {value} |");
    println!("\n| {size} namespaces | |\n|---|---|");

    // The baseline once before and once after, for storage only grows.
    let before = bare::apply(&bed.client, &names, "bare-before", SECRET_BYTES).await?;
    let first = bed.controller(binary, "first").await?;
    let second = bed.controller(binary, "second").await?;
    wait("the first controller leads", || async { Ok(first.metric("ecr_cname_leader").await? > 0.5) })
        .await?;
    let pid = first.process().pid();
    let (calls, usage) = (bed.audit.calls()?, Usage::of(pid)?);
    let started = Instant::now();
    bed.alias(0, 1).await?;
    written(&first, size).await?;
    let sync = started.elapsed();
    settled(&first, size).await?;
    let after = bare::apply(&bed.client, &names, "bare-after", SECRET_BYTES).await?;
    let synced = Usage::of(pid)?;
    let rate = |time: Duration| size_as_f64(size) / time.as_secs_f64();
    let baseline = f64::midpoint(rate(before), rate(after));
    row("first sync, from the alias", format!("{:.2} s, {:.0}/s", sync.as_secs_f64(), rate(sync)));
    row("… a bare client, before and after", format!("{:.0}/s, {:.0}/s", rate(before), rate(after)));
    row("… ratio", format!("{:.2}", rate(sync) / baseline));
    row("… AWS calls", bed.aws.count(&Scope::of(Operation::GetAuthorizationToken)).to_string());
    row("… API calls", since(&calls, &bed.audit.calls()?));
    row("… CPU of the controller", format!("{:.2} s", (synced.cpu.saturating_sub(usage.cpu)).as_secs_f64()));
    row("RSS of the leader, peak", mib(synced.peak_rss));
    row("RSS of the standby", mib(Usage::of(second.process().pid())?.rss));

    let (p50, p99) = new_namespaces(&bed).await?;
    row(
        &format!("Secret in a new namespace ({NEW}), p50, p99"),
        format!("{} ms, {} ms", p50.as_millis(), p99.as_millis()),
    );
    let size = size + NEW;
    settled(&first, size).await?;

    let (calls, usage) = (bed.audit.calls()?, Usage::of(pid)?);
    eprintln!("scale: idle for {} s", IDLE.as_secs());
    tokio::time::sleep(IDLE).await;
    row(&format!("API calls of both in {} idle seconds", IDLE.as_secs()), since(&calls, &bed.audit.calls()?));
    let idle = Usage::of(pid)?;
    row("… CPU of the leader", format!("{:.2} s", idle.cpu.saturating_sub(usage.cpu).as_secs_f64()));

    let calls = bed.audit.calls()?;
    let killed = Instant::now();
    first.process().kill()?;
    wait("the second controller leads", || async { Ok(second.metric("ecr_cname_leader").await? > 0.5) })
        .await?;
    let leads = killed.elapsed();
    wait("it knows what is synced", || async {
        Ok(second.metric("ecr_cname_namespaces_synced").await? >= size_as_f64(size))
    })
    .await?;
    row(
        "failover after SIGKILL: it leads, it has seen every Secret",
        format!("{:.1} s, {:.1} s", leads.as_secs_f64(), killed.elapsed().as_secs_f64()),
    );
    row("… API calls", since(&calls, &bed.audit.calls()?));

    eprintln!("scale: waiting for the refresh");
    let pid = second.process().pid();
    let writes = || second.metric(WRITES);
    let base = writes().await?;
    wait("the refresh begins", || async { Ok(writes().await? > base) }).await?;
    let (calls, usage, started) = (bed.audit.calls()?, Usage::of(pid)?, Instant::now());
    written(&second, size).await?;
    let refresh = started.elapsed();
    let refreshed = Usage::of(pid)?;
    row("refresh of every Secret", format!("{:.2} s, {:.0}/s", refresh.as_secs_f64(), rate(refresh)));
    row("… API calls", since(&calls, &bed.audit.calls()?));
    row("… CPU of the controller", format!("{:.2} s", refreshed.cpu.saturating_sub(usage.cpu).as_secs_f64()));
    row("RSS of the new leader, peak", mib(refreshed.peak_rss));
    Ok(())
}

/// Many aliases, in a cluster of a hundred namespaces.
async fn many_aliases(binary: &Path, aliases: usize) -> Result<()> {
    let bed = Bed::start().await?;
    let names: Vec<_> = (0..100).map(|i| format!("n{i:06}")).collect();
    bare::namespaces(&bed.client, &names).await?;
    let controller = bed.controller(binary, "controller").await?;
    let pid = controller.process().pid();
    let (calls, usage, started) = (bed.audit.calls()?, Usage::of(pid)?, Instant::now());
    bed.alias(0, aliases).await?;
    let applied = started.elapsed();
    let api: Api<RegistryAlias> = Api::all(bed.client.clone());
    // kubectl waits for one after the other, which takes longer than it takes them to be ready.
    eventually(LIMIT, async || {
        let listed = api.list(&ListParams::default()).await?.items;
        let ready = listed.iter().filter(|alias| operator::is_ready(alias)).count();
        if ready < aliases {
            // A list of all of them is work for the API server, too.
            tokio::time::sleep(Duration::from_millis(250)).await;
            bail!("{ready} of {aliases} aliases are ready");
        }
        Ok(())
    })
    .await?;
    let ready = started.elapsed();
    let done = Usage::of(pid)?;
    println!("\n| {aliases} aliases, 100 namespaces | |\n|---|---|");
    println!("| applied, all ready | {:.1} s, {:.1} s |", applied.as_secs_f64(), ready.as_secs_f64());
    println!("| API calls | {} |", since(&calls, &bed.audit.calls()?));
    println!("| AWS calls | {} |", bed.aws.count(&Scope::of(Operation::GetAuthorizationToken)));
    println!(
        "| CPU of the controller, RSS peak | {:.2} s, {} |",
        done.cpu.saturating_sub(usage.cpu).as_secs_f64(),
        mib(done.peak_rss)
    );
    Ok(())
}

const WRITES: &str = r#"ecr_cname_pull_secret_writes_total{outcome="Applied"}"#;

/// Creates namespaces one after the other, and returns the median and the 99th percentile of how long each waited.
async fn new_namespaces(bed: &Bed) -> Result<(Duration, Duration)> {
    let secrets: Api<PartialObjectMeta<Secret>> = Api::all(bed.client.clone());
    let params = kube::api::WatchParams::default().fields("metadata.name=ecr-cname");
    let version = secrets.list_metadata(&kube::api::ListParams::default().limit(1)).await?;
    let version = version.metadata.resource_version.unwrap_or_default();
    let mut events = std::pin::pin!(secrets.watch(&params, &version).await?);
    let mut waited = Vec::with_capacity(NEW);
    for i in 0..NEW {
        let name = format!("new-{i:04}");
        let created = Instant::now();
        bare::namespaces(&bed.client, std::slice::from_ref(&name)).await?;
        loop {
            let event = tokio::time::timeout(LIMIT, events.try_next()).await??;
            match event.context("the watch of Secrets ended")? {
                WatchEvent::Added(secret) if secret.metadata.namespace.as_deref() == Some(&name) => break,
                _ => {}
            }
        }
        waited.push(created.elapsed());
    }
    waited.sort_unstable();
    let at = |share: usize| waited.get(waited.len() * share / 100).copied().unwrap_or_default();
    Ok((at(50), at(99)))
}

/// Waits until the operator has written so many Secrets since it started.
async fn written(operator: &Operator, secrets: usize) -> Result<()> {
    wait("every Secret is written", || async { Ok(operator.metric(WRITES).await? >= size_as_f64(secrets)) })
        .await
}

async fn settled(operator: &Operator, namespaces: usize) -> Result<()> {
    let synced = || operator.metric("ecr_cname_namespaces_synced");
    wait("every namespace is synced", || async { Ok(synced().await? >= size_as_f64(namespaces)) }).await
}

async fn wait<F: Future<Output = Result<bool>>>(what: &str, done: impl Fn() -> F) -> Result<()> {
    eventually(LIMIT, async || {
        ensure!(done().await?, "{what}: not yet");
        Ok(())
    })
    .await
}

#[allow(clippy::cast_precision_loss)]
fn size_as_f64(size: usize) -> f64 {
    size as f64
}

#[allow(clippy::cast_precision_loss)]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1024.0 / 1024.0)
}
