//! The server benchmark: the webhook as it is shipped, beside the least that a server on the same stack can do.
//!
//! ```sh
//! cargo bench --bench server
//! ```
//!
//! `ecr-cname webhook` runs against a real API server, from which it has its alias and its certificate. The baseline is
//! axum and rustls as the webhook has them, reads the body, and answers with as many bytes as the webhook does. Both get
//! the same load in alternating rounds, each on a core of its own with the load on another, so only ratios within a round
//! are trusted. Figures are medians over the rounds. Linux only, with two cores or more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod baseline;
mod load;
mod report;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Parser;
use ecr_cname::{
    alias::{Group, accept},
    crd::RegistryAlias,
    matching,
};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::PostParams};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Value, json};
use testbed::{
    aws::{self, AwsStandIn},
    controlplane::ControlPlane,
    operator::{self, NAMESPACE, Operator, Start},
    process::Process,
    usage::Usage,
};

use crate::{
    load::{Client, Outcome, Protocol, Rate},
    report::Round,
};

const ALIAS_HOST: &str = "docker-ecr.internal.example.io";
const REGISTRY: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";
/// Where the servers are, and where everything else is.
const SERVER_CORE: usize = 0;
const LOAD_CORE: usize = 1;
const FIXED_RATE: u32 = 2000;
const LIMIT: Duration = Duration::from_secs(30);

/// What is sent: the file, and what it is called in the report.
const FIXTURES: [(&str, &str); 5] = [
    ("create-2", "8 KB, 2 containers"),
    ("create-4", "15 KB, 4 containers"),
    ("create-26", "85 KB, 26 containers"),
    ("update-2", "17 KB, an update of 1 of 2"),
    ("ordinary-2", "8 KB, nothing to rewrite"),
];

/// The webhook beside a bare handler on the same stack.
#[derive(Parser)]
struct Args {
    /// How many rounds.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds at the fixed rate, in each round.
    #[arg(long, default_value_t = 4.0)]
    fixed: f64,
    /// Seconds at saturation, in each round.
    #[arg(long, default_value_t = 2.0)]
    saturation: f64,
    /// How many requests each server shall have answered in the end, for the peak of its memory.
    #[arg(long, default_value_t = 1_000_000)]
    requests: u64,
    /// Speak HTTP/1.1 on 64 connections, as the API server does to a Service, instead of HTTP/2 on 4.
    #[arg(long)]
    http1: bool,
    /// Only these fixtures.
    #[arg(long)]
    only: Vec<String>,
    /// Another binary than the one of this tree.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_ecr-cname"))]
    binary: PathBuf,
    /// Where to write the plot.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Be the baseline, with what is in this directory.
    #[arg(long, hide = true)]
    baseline: Option<PathBuf>,
    /// Said by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    testbed::install_crypto_provider();
    if let Some(dir) = args.baseline {
        return baseline::serve(&dir);
    }
    // Child processes are where the thread is that starts them.
    stay_on(LOAD_CORE).context("this benchmark needs two cores")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(bench(&args))
}

async fn bench(args: &Args) -> Result<()> {
    let protocol = if args.http1 { Protocol::Http1 } else { Protocol::Http2 };
    let control_plane = ControlPlane::start().await?;
    operator::install(&control_plane).await?;
    let dir = control_plane.dir().join("baseline");
    fs::create_dir_all(&dir)?;
    let ca = certificate(&dir, &control_plane).await?;
    let path = alias(&control_plane).await?;

    let aws = AwsStandIn::start(aws::Issuer::none())?;
    let start = on_core(SERVER_CORE, || async { time_to_ready(&args.binary, &control_plane, &aws).await });
    let (operator, to_ready) = start.await?;
    let webhook = Server {
        name: "ecr-cname",
        pid: operator.process().pid(),
        client: Client::new(operator.webhook_address(), &ca, protocol)?,
    };
    let mut fixtures = Vec::new();
    for (name, title) in FIXTURES {
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            continue;
        }
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/fixtures").join(format!("{name}.json"));
        let body = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let answer = answered(&webhook.client, &path, &body, name).await?;
        fs::write(dir.join(format!("{name}.answer")), &answer)?;
        fixtures.push(Fixture { name, title, body: body.into(), answer: answer.len() });
    }
    let (process, address) = on_core(SERVER_CORE, || async { start_baseline(&dir, &control_plane) }).await?;
    let bare = Server { name: "baseline", pid: process.pid(), client: Client::new(address, &ca, protocol)? };
    await_listener(address).await?;

    let mut rounds = Vec::new();
    for round in 0..args.rounds {
        eprintln!("round {} of {}", round + 1, args.rounds);
        for fixture in &fixtures {
            let bare_path = format!("/{}", fixture.name);
            let mut pair = [(&bare, bare_path.as_str()), (&webhook, path.as_str())];
            if round % 2 == 1 {
                pair.reverse();
            }
            for (server, path) in pair {
                let fixed = server.load(fixture, path, Rate::Fixed(FIXED_RATE), args.fixed).await?;
                let saturated = server.load(fixture, path, Rate::Saturation, args.saturation).await?;
                rounds.push(Round { server: server.name, fixture: fixture.name, fixed, saturated });
            }
        }
    }
    let mut memory = Vec::new();
    for (server, path) in [(&bare, "/create-2"), (&webhook, path.as_str())] {
        let fixture = &fixtures[0];
        let path = if server.name == "baseline" { format!("/{}", fixture.name) } else { path.to_owned() };
        while server.client.answered() < args.requests {
            eprintln!("{} has answered {} requests", server.name, server.client.answered());
            server.load(fixture, &path, Rate::Saturation, 5.0).await?;
        }
        memory.push((server.name, server.client.answered(), Usage::of(server.pid)?));
    }
    let titles: Vec<_> = fixtures
        .iter()
        .map(|f| (f.name, format!("{} ({} B → {} B)", f.title, f.body.len(), f.answer)))
        .collect();
    report::print(&titles, &rounds, &memory, &to_ready, fs::metadata(&args.binary)?.len());
    if let Some(plot) = &args.plot {
        fs::write(plot, report::plot(&rounds)).with_context(|| format!("cannot write {}", plot.display()))?;
    }
    Ok(())
}

/// A review that is sent.
struct Fixture {
    name: &'static str,
    title: &'static str,
    body: bytes::Bytes,
    /// How many bytes the answer has.
    answer: usize,
}

/// A server under load.
struct Server {
    name: &'static str,
    pid: u32,
    client: Client,
}

impl Server {
    async fn load(&self, fixture: &Fixture, path: &str, rate: Rate, seconds: f64) -> Result<load::Measured> {
        let time = Duration::from_secs_f64(seconds);
        // Connections, code and memory are warm before anything counts.
        self.client
            .load(path, &fixture.body, fixture.answer, rate, time.min(Duration::from_millis(300)))
            .await?;
        let before = cpu(self.pid)?;
        let Outcome { requests, elapsed, mut latencies } =
            self.client.load(path, &fixture.body, fixture.answer, rate, time).await?;
        let cpu = cpu(self.pid)?.saturating_sub(before);
        latencies.sort_unstable();
        let percentile = |p: f64| {
            let place = (latencies.len() as f64 * p) as usize;
            f64::from(latencies.get(place.min(latencies.len() - 1)).copied().unwrap_or_default()) / 1000.0
        };
        Ok(load::Measured {
            cpu_us: cpu.as_secs_f64() * 1e6 / requests as f64,
            rate: requests as f64 / elapsed.as_secs_f64(),
            p50_us: percentile(0.5),
            p99_us: percentile(0.99),
            p999_us: percentile(0.999),
        })
    }
}

/// Time on a processor of all threads, in nanoseconds where `stat` has hundredths of a second: `proc_schedstat`.
fn cpu(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(Duration::from_nanos(nanoseconds))
}

fn stay_on(core: usize) -> Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    Ok(sched_setaffinity(None, &cores)?)
}

/// Does what starts a process while this thread is on a core.
async fn on_core<T>(core: usize, start: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
    stay_on(core)?;
    let started = start().await;
    stay_on(LOAD_CORE)?;
    started
}

/// Makes a certificate for the servers, in a Secret for the one and in files for the other. Returns the CA.
async fn certificate(dir: &Path, control_plane: &ControlPlane) -> Result<String> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let key = KeyPair::generate()?;
    let leaf =
        CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &Issuer::new(ca, ca_key))?;
    fs::write(dir.join("tls.crt"), leaf.pem())?;
    fs::write(dir.join("tls.key"), key.serialize_pem())?;
    let secrets: Api<Secret> = Api::namespaced(control_plane.kube_client()?, NAMESPACE);
    let secret = json!({"metadata": {"name": "ecr-cname-tls"},
        "stringData": {"tls.crt": leaf.pem(), "tls.key": key.serialize_pem(), "ca.crt": ca_pem}});
    secrets.create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
    Ok(ca_pem)
}

/// Makes an alias. Returns the path that the API server would call for it.
async fn alias(control_plane: &ControlPlane) -> Result<String> {
    let alias = json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
        "metadata": {"name": "internal"}, "spec": {"host": ALIAS_HOST, "registry": REGISTRY}});
    control_plane.apply(&alias.to_string()).await?;
    let alias: RegistryAlias = serde_json::from_value(alias)?;
    let accepted = accept([&alias]);
    let part = matching::parts(&accepted.aliases).into_iter().next().context("the alias is not accepted")?;
    Ok(format!("/mutate/{}/{}", Group::of(&Default::default()).as_str(), part.digest))
}

/// Starts the webhook several times. Returns the last one, and how long each took to be ready.
async fn time_to_ready(
    binary: &Path,
    control_plane: &ControlPlane,
    aws: &AwsStandIn,
) -> Result<(Operator, Vec<Duration>)> {
    let mut times = Vec::new();
    loop {
        let started = Instant::now();
        let operator = Operator::spawn(binary, control_plane, aws, Start::webhook()).await?;
        while !matches!(operator.admin("/readyz").await, Ok((200, _))) {
            ensure!(started.elapsed() < LIMIT, "not ready: {}", operator.process().log_tail(20));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.push(started.elapsed());
        if times.len() == 9 {
            return Ok((operator, times));
        }
    }
}

/// What the webhook answers, once it knows the alias.
async fn answered(client: &Client, path: &str, body: &[u8], name: &str) -> Result<Vec<u8>> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = client.ask(path, body.to_vec().into()).await?;
        let json: Value = serde_json::from_slice(&answer).context("the answer is no JSON")?;
        let patch = json["response"]["patch"].as_str().map(|patch| STANDARD.decode(patch)).transpose()?;
        let rewrites = patch.is_some_and(|patch| String::from_utf8_lossy(&patch).contains(REGISTRY));
        if json["response"]["allowed"] == true && rewrites != name.starts_with("ordinary") {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("{name} is answered with {json}");
        }
    }
}

fn start_baseline(dir: &Path, control_plane: &ControlPlane) -> Result<(Process, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    drop(listener);
    fs::write(dir.join("address"), address.to_string())?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--baseline").arg(dir);
    let process = Process::spawn("baseline", &command, &control_plane.dir().join("baseline.log"))?;
    Ok((process, address))
}

async fn await_listener(address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while tokio::net::TcpStream::connect(address).await.is_err() {
        ensure!(Instant::now() < deadline, "the baseline does not listen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// A configuration that trusts the CA and speaks the protocol.
fn tls(ca: &str, protocol: Protocol) -> Result<Arc<rustls::ClientConfig>> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes())?)?;
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name: &[u8] = if protocol == Protocol::Http1 { b"http/1.1" } else { b"h2" };
    config.alpn_protocols = vec![name.to_vec()];
    Ok(Arc::new(config))
}
