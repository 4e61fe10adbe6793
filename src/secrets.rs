//! Pull secrets: one Secret for each namespace that an alias selects, kept as [`pull_secret::plan`] says.
//!
//! One loop owns all state and decides; only the calls to the API server run side by side, at most one for a
//! namespace. So a namespace that fails (a quota, a foreign admission policy) holds up no other.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::{
    Api, Client, Resource as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::{PartialObjectMeta, Selector, SelectorExt as _},
    runtime::{
        events::{Event, EventType, Recorder},
        watcher,
    },
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use secrecy::{SecretString, zeroize::Zeroizing};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{debug, info, warn};

use crate::{
    alias::{Alias, Identity},
    crd::PullSecret,
    dockerconfig,
    ecr::Token,
    matching,
    pull_secret::{
        CONTENTS, Contents, DATA_KEY, EXPIRES_AT, FIELD_MANAGER, Holding, MANAGED_BY, Observed, Plan, Wanted,
        plan,
    },
    tokens::Tokens,
    watch::{Aliases, Change, bounded, chain, follow},
};

/// How many calls run at one time.
const CONCURRENCY: usize = 32;
/// The longest pause before a namespace that failed is tried again.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// How often the summary is made anew at the most.
const SUMMARY_EVERY: Duration = Duration::from_millis(250);

/// Which Secrets are kept, and where not.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of the Secret in every namespace.
    pub name: String,
    /// Namespaces that never get one.
    pub excluded_namespaces: Vec<String>,
}

/// How far the pull secrets have come, by the name of the alias.
pub type Summary = BTreeMap<String, Synced>;

/// How far the pull secrets of one alias have come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// How many namespaces the alias selects.
    pub selected: u32,
    /// How many of them hold a live token for its registry.
    pub synced: u32,
    /// A few of those that have a problem, and which.
    pub problems: Vec<(String, String)>,
}

/// How many problems a summary names.
const MAX_PROBLEMS: usize = 3;

/// Keeps the pull secrets of all namespaces, for ever.
pub async fn keep(
    client: Client,
    settings: Settings,
    aliases: watch::Receiver<Arc<Aliases>>,
    tokens: watch::Receiver<Arc<Tokens>>,
    summary: watch::Sender<Arc<Summary>>,
    recorder: Recorder,
    metrics: SecretMetrics,
) {
    let (send, changes) = mpsc::unbounded_channel();
    let namespaces = follow(
        Api::<PartialObjectMeta<Namespace>>::all(client.clone()),
        watcher::Config::default(),
        forward(&send, Seen::Namespace),
    );
    let fields = format!("metadata.name={}", settings.name);
    let secrets = follow(
        Api::<PartialObjectMeta<Secret>>::all(client.clone()),
        watcher::Config::default().fields(&fields),
        forward(&send, Seen::Secret),
    );
    let keeper = Keeper {
        client,
        settings,
        aliases,
        tokens,
        summary,
        recorder,
        metrics,
        namespaces: HashMap::new(),
        groups: Vec::new(),
        dirty: BTreeSet::new(),
        timers: BTreeSet::new(),
        synced: HashSet::new(),
    };
    tokio::select! {
        () = namespaces => {},
        () = secrets => {},
        () = keeper.run(changes) => {},
    }
}

/// What a watch saw.
enum Seen {
    Namespace(Change<PartialObjectMeta<Namespace>>),
    Secret(Change<PartialObjectMeta<Secret>>),
}

fn forward<K>(send: &mpsc::UnboundedSender<Seen>, seen: impl Fn(Change<K>) -> Seen) -> impl FnMut(Change<K>) {
    let send = send.clone();
    move |change| {
        // The receiver lives as long as this watch does.
        let _ = send.send(seen(change));
    }
}

struct Keeper {
    client: Client,
    settings: Settings,
    aliases: watch::Receiver<Arc<Aliases>>,
    tokens: watch::Receiver<Arc<Tokens>>,
    summary: watch::Sender<Arc<Summary>>,
    recorder: Recorder,
    metrics: SecretMetrics,
    namespaces: HashMap<String, State>,
    /// The selectors in use, each with the aliases that share it.
    groups: Vec<(Selector, Vec<Alias>)>,
    dirty: BTreeSet<String>,
    timers: BTreeSet<(Instant, String)>,
    /// Which of the two watches have said what is there.
    synced: HashSet<&'static str>,
}

/// What is known of one namespace.
#[derive(Default)]
struct State {
    /// Its labels, once it has been seen; a Secret may be seen before its namespace.
    labels: Option<BTreeMap<String, String>>,
    terminating: bool,
    /// The places in [`Keeper::groups`] of the selectors that select it.
    groups: Vec<usize>,
    observed: Option<Observed>,
    /// Whether a call is under way.
    busy: bool,
    failures: u32,
    not_before: Option<Instant>,
    problem: Option<String>,
}

/// What came of a call.
struct Done {
    namespace: String,
    result: Result<Option<Observed>, kube::Error>,
}

type Calls = FuturesUnordered<BoxFuture<'static, Done>>;

impl Keeper {
    async fn run(mut self, mut changes: mpsc::UnboundedReceiver<Seen>) {
        let mut calls: Calls = FuturesUnordered::new();
        let mut summary_due = Some(Instant::now());
        self.regroup();
        loop {
            if self.synced.len() == 2 {
                while calls.len() < CONCURRENCY
                    && let Some(namespace) = self.dirty.pop_first()
                {
                    if let Some(call) = self.reconcile(&namespace) {
                        calls.push(call);
                    }
                }
                if summary_due.is_some_and(|due| due <= Instant::now()) {
                    self.summarise();
                    summary_due = None;
                }
            }
            let timer = self.timers.first().map(|(at, _)| *at);
            tokio::select! {
                seen = changes.recv() => match seen {
                    Some(Seen::Namespace(change)) => self.see_namespace(change),
                    Some(Seen::Secret(change)) => self.see_secret(change),
                    None => return,
                },
                alive = self.aliases.changed() => {
                    if alive.is_err() { return }
                    self.regroup();
                }
                alive = self.tokens.changed() => {
                    if alive.is_err() { return }
                    self.all_dirty();
                }
                Some(done) = calls.next() => self.finish(done),
                () = sleep_until(timer) => self.ring(),
                () = sleep_until(summary_due) => {}
            }
            summary_due.get_or_insert_with(|| Instant::now() + SUMMARY_EVERY);
        }
    }

    /// Sorts the aliases by selector, and every namespace anew, if that changes anything.
    fn regroup(&mut self) {
        let aliases = self.aliases.borrow_and_update().clone();
        let mut groups: BTreeMap<_, (Selector, Vec<Alias>)> = BTreeMap::new();
        for alias in &aliases.accepted.aliases {
            let group = groups.entry(alias.group()).or_insert_with(|| (alias.namespaces.clone(), Vec::new()));
            group.1.push(alias.clone());
        }
        let groups: Vec<_> = groups.into_values().collect();
        if groups == self.groups {
            return;
        }
        self.groups = groups;
        for (name, state) in &mut self.namespaces {
            state.groups = select(&self.settings, &self.groups, name, state.labels.as_ref());
        }
        self.all_dirty();
    }

    fn all_dirty(&mut self) {
        self.tokens.mark_unchanged();
        self.dirty.extend(self.namespaces.keys().cloned());
    }

    fn see_namespace(&mut self, change: Change<PartialObjectMeta<Namespace>>) {
        match change {
            Change::All(all) => {
                let names: HashSet<_> = all.iter().filter_map(|n| n.metadata.name.clone()).collect();
                self.namespaces.retain(|name, _| names.contains(name));
                all.into_iter().for_each(|n| self.apply_namespace(n));
                self.synced.insert("namespaces");
            }
            Change::Applied(namespace) => self.apply_namespace(namespace),
            Change::Deleted(namespace) => {
                self.namespaces.remove(&namespace.metadata.name.unwrap_or_default());
            }
        }
    }

    fn apply_namespace(&mut self, namespace: PartialObjectMeta<Namespace>) {
        let meta = namespace.metadata;
        let name = meta.name.unwrap_or_default();
        let state = self.namespaces.entry(name.clone()).or_default();
        state.terminating = meta.deletion_timestamp.is_some();
        state.labels = Some(meta.labels.unwrap_or_default());
        state.groups = select(&self.settings, &self.groups, &name, state.labels.as_ref());
        self.dirty.insert(name);
    }

    fn see_secret(&mut self, change: Change<PartialObjectMeta<Secret>>) {
        match change {
            Change::All(all) => {
                self.namespaces.values_mut().for_each(|state| state.observed = None);
                all.iter().for_each(|secret| self.apply_secret(secret, Some(Observed::of(secret))));
                self.synced.insert("secrets");
            }
            Change::Applied(secret) => self.apply_secret(&secret, Some(Observed::of(&secret))),
            Change::Deleted(secret) => self.apply_secret(&secret, None),
        }
    }

    fn apply_secret(&mut self, secret: &PartialObjectMeta<Secret>, observed: Option<Observed>) {
        let namespace = secret.metadata.namespace.clone().unwrap_or_default();
        if observed.is_none() && !self.namespaces.contains_key(&namespace) {
            return;
        }
        let state = self.namespaces.entry(namespace.clone()).or_default();
        // A change by another hand is a reason to try at once what failed before.
        if state.observed != observed {
            state.not_before = None;
        }
        state.observed = observed;
        self.dirty.insert(namespace);
    }

    /// Wakes the namespaces whose time has come.
    fn ring(&mut self) {
        let now = Instant::now();
        while let Some((at, _)) = self.timers.first()
            && *at <= now
            && let Some((_, namespace)) = self.timers.pop_first()
        {
            self.dirty.insert(namespace);
        }
    }

    /// Decides on one namespace, and returns the call to make, if there is one.
    fn reconcile(&mut self, namespace: &str) -> Option<BoxFuture<'static, Done>> {
        let state = self.namespaces.get_mut(namespace)?;
        if state.busy || state.terminating || state.labels.is_none() {
            return None;
        }
        if let Some(at) = state.not_before.filter(|at| *at > Instant::now()) {
            self.timers.insert((at, namespace.to_owned()));
            return None;
        }
        let now = Timestamp::now();
        let tokens = self.tokens.borrow().clone();
        let mut wanted = BTreeMap::new();
        let mut auths: BTreeMap<String, (Arc<Token>, Identity)> = BTreeMap::new();
        for alias in state.groups.iter().filter_map(|g| self.groups.get(*g)).flat_map(|(_, aliases)| aliases)
        {
            let (Some(principal), Some(registry)) = (alias.principal(), alias.registry()) else { continue };
            let token = tokens.get(&principal).and_then(|t| t.usable(now));
            let host = registry.as_str().to_owned();
            // Two aliases may lead to one registry as two identities: the older has it.
            if wanted.contains_key(&host) {
                continue;
            }
            if let Some(token) = token {
                auths.insert(host.clone(), (token.clone(), principal.identity.clone()));
            }
            let token = token.map(|t| (t.expires_at, t.lifetime));
            wanted.insert(host, Wanted { identity: principal.identity, token });
        }
        let plan = plan(state.observed.as_ref(), &wanted, now);
        if !matches!(plan, Plan::Foreign) && state.failures == 0 {
            state.problem = None;
        }
        let call = match plan {
            Plan::Keep(next) => {
                if let Some(next) = next {
                    let pause = Duration::try_from(next.duration_since(now)).unwrap_or_default();
                    self.timers.insert((Instant::now() + pause, namespace.to_owned()));
                }
                return None;
            }
            Plan::Foreign => {
                if state.problem.is_none() {
                    let problem = format!(
                        "Secret {:?} exists and is not ours (no label {}={}): delete or rename it, or choose another name for the pull secret",
                        self.settings.name, MANAGED_BY.0, MANAGED_BY.1
                    );
                    warn!(namespace, problem, "leaving a foreign Secret alone");
                    state.problem = Some(problem.clone());
                    let secret = reference(namespace, &self.settings.name, state.observed.as_ref());
                    tokio::spawn(report(self.recorder.clone(), secret, "ForeignSecret", problem));
                }
                return None;
            }
            Plan::Delete => Call::Delete(state.observed.as_ref()?.uid.clone()),
            Plan::Write { fresh, carried } => {
                auths.retain(|host, _| fresh.contains(host));
                let old = state.observed.as_ref().map(|o| o.contents.clone()).unwrap_or_default();
                let carried = old.into_iter().filter(|(host, _)| carried.contains(host)).collect();
                Call::Write { uid: state.observed.as_ref().map(|o| o.uid.clone()), auths, carried }
            }
        };
        state.busy = true;
        let api = Api::namespaced(self.client.clone(), namespace);
        let name = self.settings.name.clone();
        let namespace = namespace.to_owned();
        Some(Box::pin(async move {
            let result = bounded(call.perform(&api, &name)).await;
            Done { namespace, result }
        }))
    }

    fn finish(&mut self, done: Done) {
        let Done { namespace, result } = done;
        let Some(state) = self.namespaces.get_mut(&namespace) else { return };
        state.busy = false;
        match result {
            Ok(observed) => {
                debug!(namespace, written = observed.is_some(), "pull secret");
                self.metrics.count(if observed.is_some() {
                    WriteOutcome::Applied
                } else {
                    WriteOutcome::Deleted
                });
                (state.observed, state.failures, state.not_before, state.problem) = (observed, 0, None, None);
            }
            Err(error) => {
                self.metrics.count(WriteOutcome::Failed);
                let pause =
                    Duration::from_secs(1).saturating_mul(2u32.saturating_pow(state.failures.min(16)));
                let pause = pause.min(MAX_BACKOFF).mul_f64(0.75 + 0.5 * fastrand::f64());
                let problem = format!("Secret {:?} cannot be written: {}", self.settings.name, chain(&error));
                if state.failures == 0 {
                    warn!(namespace, problem, "pull secret failed; trying again");
                    let secret = reference(&namespace, &self.settings.name, None);
                    tokio::spawn(report(self.recorder.clone(), secret, "PullSecretFailed", problem.clone()));
                }
                state.failures = state.failures.saturating_add(1);
                state.not_before = Some(Instant::now() + pause);
                state.problem = Some(problem);
            }
        }
        self.dirty.insert(namespace);
    }

    fn summarise(&self) {
        let now = Timestamp::now();
        let mut summary: Summary = BTreeMap::new();
        for alias in self.groups.iter().flat_map(|(_, aliases)| aliases) {
            summary.insert(alias.name.clone(), Synced::default());
        }
        let (mut selected, mut synced) = (0, 0);
        for (name, state) in self.namespaces.iter().filter(|(_, s)| s.labels.is_some() && !s.terminating) {
            let aliases: Vec<&Alias> =
                state.groups.iter().filter_map(|g| self.groups.get(*g)).flat_map(|(_, a)| a).collect();
            let mut complete = !aliases.is_empty();
            for alias in &aliases {
                let Some(entry) = summary.get_mut(&alias.name) else { continue };
                entry.selected += 1;
                let holds = match alias.registry() {
                    _ if alias.pull_secret == PullSecret::None => true,
                    Some(r) => {
                        state.observed.as_ref().is_some_and(|o| o.holds(r.as_str(), &alias.identity, now))
                    }
                    None => false,
                };
                complete &= holds;
                if holds {
                    entry.synced += 1;
                }
                if let Some(problem) = &state.problem
                    && entry.problems.len() < MAX_PROBLEMS
                    && alias.pull_secret != PullSecret::None
                {
                    entry.problems.push((name.clone(), problem.clone()));
                }
            }
            selected += i64::from(!aliases.is_empty());
            synced += i64::from(complete);
        }
        for entry in summary.values_mut() {
            entry.problems.sort();
        }
        self.metrics.selected.set(selected);
        self.metrics.synced.set(synced);
        self.summary.send_if_modified(|old| {
            let changed = **old != summary;
            if changed {
                *old = Arc::new(summary);
            }
            changed
        });
    }
}

/// The places of the groups that select a namespace.
fn select(
    settings: &Settings,
    groups: &[(Selector, Vec<Alias>)],
    name: &str,
    labels: Option<&BTreeMap<String, String>>,
) -> Vec<usize> {
    let Some(labels) = labels else { return Vec::new() };
    let opted_out = labels.get(matching::OPT_OUT).is_some_and(|v| v == matching::OPT_OUT_VALUE);
    if opted_out || settings.excluded_namespaces.iter().any(|n| n == name) {
        return Vec::new();
    }
    groups.iter().enumerate().filter(|(_, (selector, _))| selector.matches(labels)).map(|(i, _)| i).collect()
}

/// A call to the API server about one Secret.
enum Call {
    Delete(String),
    Write { uid: Option<String>, auths: BTreeMap<String, (Arc<Token>, Identity)>, carried: Contents },
}

impl Call {
    async fn perform(self, api: &Api<Secret>, name: &str) -> kube::Result<Option<Observed>> {
        match self {
            Self::Delete(uid) => {
                let only_this = Preconditions { uid: Some(uid), resource_version: None };
                let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                match api.delete(name, &params).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                    other => other.map(|_| None),
                }
            }
            Self::Write { uid, auths, carried } => write(api, name, uid, auths, carried).await.map(Some),
        }
    }
}

async fn write(
    api: &Api<Secret>,
    name: &str,
    uid: Option<String>,
    auths: BTreeMap<String, (Arc<Token>, Identity)>,
    mut contents: Contents,
) -> kube::Result<Observed> {
    let carried: BTreeMap<String, SecretString> = if contents.is_empty() {
        BTreeMap::new()
    } else {
        let secret = api.get(name).await?;
        let config = Zeroizing::new(secret.data.and_then(|mut d| d.remove(DATA_KEY)).unwrap_or_default().0);
        dockerconfig::parse(&config)
    };
    contents.retain(|host, _| carried.contains_key(host));
    let held = carried.iter().filter(|(host, _)| contents.contains_key(*host));
    let config = dockerconfig::render(
        held.map(|(host, auth)| (host.as_str(), auth))
            .chain(auths.iter().map(|(host, (token, _))| (host.as_str(), &token.auth))),
    );
    if config.len() > dockerconfig::MAX_BYTES {
        let problem = format!(
            "the credentials of {} registries are {} bytes, and a Secret holds 1 MiB: let fewer aliases select this namespace",
            contents.len() + auths.len(),
            config.len()
        );
        return Err(kube::Error::Service(problem.into()));
    }
    for (host, (token, identity)) in &auths {
        let holding = Holding { expires_at: token.expires_at, identity: identity.to_string() };
        contents.insert(host.clone(), holding);
    }
    let expires_at = contents.values().map(|h| h.expires_at).min().unwrap_or_default();
    let secret: Secret = serde_json::from_value(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "uid": uid,
            "labels": { MANAGED_BY.0: MANAGED_BY.1, "app.kubernetes.io/name": "ecr-cname" },
            "annotations": {
                EXPIRES_AT: format!("{expires_at:.0}"),
                CONTENTS: serde_json::to_string(&contents).unwrap_or_default(),
            },
        },
        "type": "kubernetes.io/dockerconfigjson",
    }))
    .map_err(kube::Error::SerdeError)?;
    let data = [(DATA_KEY.to_owned(), k8s_openapi::ByteString(config.as_bytes().to_vec()))];
    let secret = Secret { data: Some(data.into()), ..secret };
    let written = match uid {
        // With the UID, a Secret that someone else put in its place meanwhile is not overwritten but a conflict.
        Some(_) => {
            api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&secret)).await?
        }
        None => {
            let params =
                PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
            api.create(&params, &secret).await?
        }
    };
    Ok(Observed::of(&PartialObjectMeta { metadata: written.metadata, ..PartialObjectMeta::default() }))
}

/// Deletes every pull secret that is ours, in all namespaces: for uninstalling. Returns how many there were.
///
/// # Errors
/// A list or a deletion failed.
pub async fn delete_all(client: &Client, name: &str) -> kube::Result<usize> {
    let all: Api<PartialObjectMeta<Secret>> = Api::all(client.clone());
    let params = kube::api::ListParams::default().fields(&format!("metadata.name={name}"));
    let mut deleted = 0;
    for secret in bounded(all.list(&params)).await? {
        let observed = Observed::of(&secret);
        if observed.ours {
            let namespace = secret.metadata.namespace.unwrap_or_default();
            let api = Api::namespaced(client.clone(), &namespace);
            bounded(Call::Delete(observed.uid).perform(&api, name)).await?;
            info!(namespace, "deleted the pull secret");
            deleted += 1;
        }
    }
    Ok(deleted)
}

fn reference(
    namespace: &str,
    name: &str,
    observed: Option<&Observed>,
) -> k8s_openapi::api::core::v1::ObjectReference {
    k8s_openapi::api::core::v1::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(Secret::kind(&()).into_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        uid: observed.map(|o| o.uid.clone()),
        ..Default::default()
    }
}

async fn report(
    recorder: Recorder,
    regarding: k8s_openapi::api::core::v1::ObjectReference,
    reason: &'static str,
    note: String,
) {
    let event = Event {
        type_: EventType::Warning,
        reason: reason.to_owned(),
        note: Some(note.chars().take(1000).collect()),
        action: "SyncPullSecret".to_owned(),
        secondary: None,
    };
    if let Err(error) = bounded(recorder.publish(&event, &regarding)).await {
        debug!(error = %chain(&error), "an event could not be written");
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Metrics of pull secrets.
#[derive(Clone, Debug, Default)]
pub struct SecretMetrics {
    selected: Gauge,
    synced: Gauge,
    writes: Family<Labels, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    outcome: WriteOutcome,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
enum WriteOutcome {
    Applied,
    Deleted,
    Failed,
}

impl SecretMetrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // Every outcome is there from the start, so that a rate has a zero to rise from.
        for outcome in [WriteOutcome::Applied, WriteOutcome::Deleted, WriteOutcome::Failed] {
            let _ = metrics.writes.get_or_create(&Labels { outcome });
        }
        registry.register(
            "namespaces_selected",
            "Namespaces that at least one alias selects",
            metrics.selected.clone(),
        );
        registry.register(
            "namespaces_synced",
            "Selected namespaces whose pull secret holds a live token for every alias",
            metrics.synced.clone(),
        );
        registry.register(
            "pull_secret_writes",
            "Writes of pull secrets, by what came of them",
            metrics.writes.clone(),
        );
        metrics
    }

    fn count(&self, outcome: WriteOutcome) {
        self.writes.get_or_create(&Labels { outcome }).inc();
    }
}
