//! What must hold all along: every namespace has live tokens, and no process grows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::ListParams;
use serde_json::Value;
use tokio::time::timeout;

use super::ALIASES;
use crate::aws::AwsStandIn;
use crate::background::Background;
use crate::controlplane::ControlPlane;
use crate::eventually;
use crate::process::Process;
use crate::usage::Usage;

/// How often the tokens in all namespaces are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// No process may take more, ever: what the chart allows one is twice this.
const MAX_RSS_MIB: u64 = 96;
const MAX_DESCRIPTORS: usize = 128;

/// The watch over what must hold, on a thread of its own.
pub(super) struct Invariants {
    shared: Arc<Shared>,
    processes: BTreeMap<String, Vec<Sample>>,
    _watch: Background,
}

struct Shared {
    aws: Arc<AwsStandIn>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    expected: BTreeSet<String>,
    served: BTreeSet<String>,
    checks: usize,
    violations: Vec<String>,
}

/// A process at one time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) rss_mib: u64,
    pub(super) descriptors: usize,
}

impl Invariants {
    pub(super) fn start(control_plane: &ControlPlane, aws: Arc<AwsStandIn>) -> Result<Self> {
        let shared = Arc::new(Shared { aws, state: Mutex::default() });
        let watch = Background::spawn(
            "invariants",
            watch(control_plane.config_without_retries(), Arc::clone(&shared)),
        )?;
        Ok(Self { shared, processes: BTreeMap::new(), _watch: watch })
    }

    /// From now on this namespace must have live tokens at any time.
    pub(super) fn expect_namespace(&self, namespace: String) {
        self.shared.lock().expected.insert(namespace);
    }

    /// Waits until a namespace has live tokens.
    pub(super) async fn served(&self, namespace: &str, limit: Duration) -> Result<()> {
        eventually(limit, async || {
            let served = self.shared.lock().served.contains(namespace);
            ensure!(served, "the new namespace {namespace} has no live tokens");
            Ok(())
        })
        .await
    }

    /// How often a namespace was looked at.
    pub(super) fn checks(&self) -> usize {
        self.shared.lock().checks
    }

    /// What did not hold since this was asked last.
    pub(super) fn violations(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().violations)
    }

    /// Measures a process.
    pub(super) fn sample(&mut self, process: &Process) {
        if let Some(sample) = Sample::of(process.pid()) {
            self.processes.entry(process.name().to_owned()).or_default().push(sample);
        }
    }

    /// What those processes took that were there all along: the first and the last quarter of their samples, in the median, and
    /// the most.
    pub(super) fn lasting(&self) -> Vec<(String, [Sample; 3])> {
        let times = self.processes.values().map(Vec::len).max().unwrap_or_default();
        let summary = |(name, samples): (&String, &Vec<Sample>)| {
            let quarter = samples.len().div_ceil(4);
            let last = samples.len() - quarter;
            let of = [
                Sample::median(&samples[..quarter]),
                Sample::median(&samples[last..]),
                Sample::most(samples),
            ];
            (name.clone(), of)
        };
        self.processes.iter().filter(|(_, samples)| samples.len() == times).map(summary).collect()
    }

    /// How many processes there were, and the most that any of them took.
    pub(super) fn all(&self) -> (usize, Sample) {
        let samples: Vec<_> = self.processes.values().flatten().copied().collect();
        (self.processes.len(), Sample::most(&samples))
    }

    /// What is wrong with what processes took. Only one that was there all along can be seen to grow.
    pub(super) fn judge_processes(&self) -> Vec<String> {
        let mut violations = Vec::new();
        for (name, [first, last, _]) in self.lasting() {
            if last.rss_mib > first.rss_mib + first.rss_mib / 4 + 8 {
                violations.push(format!("{name} grew from {} to {} MiB", first.rss_mib, last.rss_mib));
            }
            if last.descriptors > first.descriptors + 24 {
                let (from, to) = (first.descriptors, last.descriptors);
                violations.push(format!("{name} went from {from} to {to} file descriptors"));
            }
        }
        let (_, most) = self.all();
        if most.rss_mib > MAX_RSS_MIB || most.descriptors > MAX_DESCRIPTORS {
            violations.push(format!("a process took {most:?}"));
        }
        violations
    }
}

impl Sample {
    fn of(pid: u32) -> Option<Self> {
        let rss_mib = Usage::of(pid).ok()?.rss >> 20;
        Some(Self { rss_mib, descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() })
    }

    fn median(samples: &[Self]) -> Self {
        fn middle<T: Ord + Copy + Default>(mut values: Vec<T>) -> T {
            values.sort_unstable();
            values.get(values.len() / 2).copied().unwrap_or_default()
        }
        Self {
            rss_mib: middle(samples.iter().map(|s| s.rss_mib).collect()),
            descriptors: middle(samples.iter().map(|s| s.descriptors).collect()),
        }
    }

    fn most(samples: &[Self]) -> Self {
        Self {
            rss_mib: samples.iter().map(|s| s.rss_mib).max().unwrap_or_default(),
            descriptors: samples.iter().map(|s| s.descriptors).max().unwrap_or_default(),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees the pull secrets of all namespaces, and judges them if it is time to.
    fn see(&self, secrets: Vec<Secret>, judge: bool) {
        let served: BTreeSet<String> = secrets
            .into_iter()
            .filter(|secret| self.is_live(secret))
            .filter_map(|secret| secret.metadata.namespace)
            .collect();
        let mut state = self.lock();
        if judge {
            let missing: Vec<_> = state.expected.difference(&served).cloned().collect();
            state.checks += state.expected.len();
            for namespace in missing {
                state
                    .violations
                    .push(format!("the pull secret of {namespace} holds no live token for some registry"));
                // Once is enough.
                state.expected.remove(&namespace);
            }
        }
        state.served = served;
    }

    /// Whether a pull secret holds, for the registry of every alias, a token that AWS would accept now. The alias that moves
    /// has one for where it is, so one of the two is enough.
    fn is_live(&self, secret: &Secret) -> bool {
        let data = secret.data.as_ref().and_then(|data| data.get(".dockerconfigjson"));
        let Some(config) = data.and_then(|data| serde_json::from_slice::<Value>(&data.0).ok()) else {
            return false;
        };
        let live = |registry: &str| {
            let auth = config["auths"][registry]["auth"].as_str().unwrap_or_default();
            let auth = STANDARD.decode(auth).ok().and_then(|auth| String::from_utf8(auth).ok());
            auth.is_some_and(|auth| auth.strip_prefix("AWS:").is_some_and(|token| self.aws.is_valid(token)))
        };
        ALIASES.iter().all(|(_, _, registries)| registries.iter().any(|registry| live(registry)))
    }
}

async fn watch(config: kube::Config, shared: Arc<Shared>) {
    let Ok(client) = kube::Client::try_from(config) else { return };
    let secrets: Api<Secret> = Api::all(client);
    let params = ListParams::default().fields("metadata.name=ecr-cname");
    let mut looked = Instant::now();
    loop {
        // While the API server is away, nobody can be served. A new namespace is looked for more often than all are judged.
        if let Ok(Ok(list)) = timeout(LOOK_TIMEOUT, secrets.list(&params)).await {
            let judge = looked.elapsed() >= LOOK_EVERY;
            if judge {
                looked = Instant::now();
            }
            shared.see(list.items, judge);
        }
        tokio::time::sleep(LOOK_EVERY / 8).await;
    }
}
