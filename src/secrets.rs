//! Pull secrets: one Secret for each namespace that an alias selects, kept as [`crate::pull_secret::plan`] says.
//!
//! One loop owns all state and decides; only the calls to the API server run side by side, at most one for a
//! namespace. So a namespace that fails (a quota, a foreign admission policy) holds up no other.

mod call;
mod metrics;
mod selection;
mod watches;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client,
    api::ListParams,
    runtime::events::{Event, EventType},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{debug, info, warn};

use crate::{
    crd::PullSecret,
    events::Events,
    pull_secret::{MANAGED_BY, Observed, Plan, Wanted, plan},
    scope::Scope,
    tokens::Tokens,
    watch::{Aliases, Change, WatchTimeout, bounded, chain},
};
use call::{Call, CallError};
pub use metrics::SecretMetrics;
use metrics::WriteOutcome;
use selection::Groups;
use watches::{Place, Seen, SeenNamespace, SeenSecret};

/// How many calls run at one time.
const CONCURRENCY: usize = 32;
/// The longest pause before a namespace that was refused is tried again.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// The longest pause where it is the API server that failed: when it works again, nobody shall wait for long.
const MAX_BACKOFF_OF_FAILURES: Duration = Duration::from_secs(15);
/// How often the summary is made anew at the most.
const SUMMARY_EVERY: Duration = Duration::from_millis(250);
/// How many problems a summary names.
const MAX_PROBLEMS: usize = 3;

/// Which Secrets are kept, and where not.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of the Secret in every namespace.
    pub name: String,
    /// The namespaces that get one.
    pub scope: Scope,
    /// How long their watches last.
    pub watch_timeout: WatchTimeout,
}

/// How far the pull secrets have come, by the name of the alias.
pub type Summary = BTreeMap<String, Synced>;

/// How far the pull secrets of one alias have come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// What was looked for: [`Alias::serves`](crate::alias::Alias::serves).
    pub serves: String,
    /// How many namespaces the alias selects.
    pub selected: i32,
    /// How many of them hold a live token for its registry.
    pub synced: i32,
    /// The first few of those that have a problem, and which.
    pub problems: Vec<(String, String)>,
}

/// Keeps the pull secrets of all namespaces, for ever.
pub async fn keep(
    client: Client,
    settings: Settings,
    aliases: watch::Receiver<Arc<Aliases>>,
    tokens: watch::Receiver<Arc<Tokens>>,
    summary: watch::Sender<Arc<Summary>>,
    events: Events,
    metrics: SecretMetrics,
) {
    let (send, changes) = mpsc::unbounded_channel();
    let places = Place::all(&settings.scope);
    let name = settings.name.clone();
    let timeout = settings.watch_timeout;
    let follow = |place: &Place| place.clone().follow(client.clone(), &name, timeout, send.clone());
    let mut watches: FuturesUnordered<_> = places.iter().map(follow).collect();
    let keeper = Keeper {
        client,
        settings,
        aliases,
        tokens,
        summary,
        events,
        metrics,
        namespaces: BTreeMap::new(),
        groups: Groups::default(),
        dirty: BTreeSet::new(),
        timers: BTreeSet::new(),
        unsynced: (places.iter().cloned().collect(), places.iter().cloned().collect()),
    };
    tokio::select! {
        _ = watches.next() => {},
        () = keeper.run(changes) => {},
    }
}

struct Keeper {
    client: Client,
    settings: Settings,
    aliases: watch::Receiver<Arc<Aliases>>,
    tokens: watch::Receiver<Arc<Tokens>>,
    summary: watch::Sender<Arc<Summary>>,
    events: Events,
    metrics: SecretMetrics,
    namespaces: BTreeMap<String, State>,
    groups: Groups,
    dirty: BTreeSet<String>,
    timers: BTreeSet<(Instant, String)>,
    /// Where the watches of namespaces, and those of Secrets, have not yet said what is there.
    unsynced: (HashSet<Place>, HashSet<Place>),
}

/// What is known of one namespace.
#[derive(Default)]
struct State {
    /// Its UID and labels, once it has been seen; a Secret may be seen before its namespace.
    uid: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    terminating: bool,
    /// The places in [`Keeper::groups`] of the selectors that select it.
    groups: Vec<usize>,
    observed: Option<Observed>,
    /// Whether a call is under way, and whether the watch has spoken since it began.
    busy: bool,
    stirred: bool,
    failures: u32,
    not_before: Option<Instant>,
    problem: Option<String>,
    /// When it is looked at again, as it stands in [`Keeper::timers`].
    timer: Option<Instant>,
}

/// What came of a call.
struct Done {
    namespace: String,
    uid: Option<String>,
    result: Result<Option<Observed>, CallError>,
}

impl Keeper {
    async fn run(mut self, mut changes: mpsc::UnboundedReceiver<Seen>) {
        let mut calls: FuturesUnordered<BoxFuture<'static, Done>> = FuturesUnordered::new();
        let mut summary_due = None;
        self.regroup();
        loop {
            let synced = self.unsynced.0.is_empty() && self.unsynced.1.is_empty();
            if synced {
                while calls.len() < CONCURRENCY
                    && let Some(namespace) = self.dirty.pop_first()
                {
                    calls.extend(self.reconcile(&namespace));
                }
                if summary_due.is_none_or(|due| due <= Instant::now()) {
                    self.summarise();
                    summary_due = None;
                }
            }
            let timer = self.timers.first().map(|(at, _)| *at);
            tokio::select! {
                seen = changes.recv() => match seen {
                    Some(Seen::Namespace(place, change)) => self.see_namespace(&place, change),
                    Some(Seen::Secret(place, change)) => self.see_secret(&place, change),
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
                () = sleep_until(summary_due), if synced => {}
            }
            summary_due.get_or_insert_with(|| Instant::now() + SUMMARY_EVERY);
        }
    }

    /// Sorts the aliases by selector, and every namespace anew, if that changes anything.
    fn regroup(&mut self) {
        let aliases = self.aliases.borrow_and_update().clone();
        let groups = Groups::of(&aliases.accepted.aliases);
        if groups == self.groups {
            return;
        }
        self.groups = groups;
        for (name, state) in &mut self.namespaces {
            state.groups = selecting(&self.settings.scope, &self.groups, name, state.labels.as_ref());
        }
        self.all_dirty();
    }

    fn all_dirty(&mut self) {
        self.dirty.extend(self.namespaces.keys().cloned());
    }

    fn see_namespace(&mut self, place: &Place, change: Change<SeenNamespace>) {
        match change {
            Change::All(all) => {
                let names: HashSet<_> = all.iter().map(|n| n.name.as_str()).collect();
                // A Secret may have been seen before its namespace; that alone makes no namespace.
                self.namespaces.retain(|name, _| !place.covers(name) || names.contains(name.as_str()));
                all.into_iter().for_each(|n| self.apply_namespace(n));
                self.unsynced.0.remove(place);
            }
            Change::Applied(namespace) => self.apply_namespace(namespace),
            Change::Deleted(namespace) => {
                self.namespaces.remove(&namespace.name);
            }
        }
    }

    fn apply_namespace(&mut self, seen: SeenNamespace) {
        let state = self.namespaces.entry(seen.name.clone()).or_default();
        if state.uid.is_some() && state.uid != seen.uid {
            // Deleted and made again under one name: nothing that was known of it holds.
            *state = State::default();
        }
        state.uid = seen.uid;
        state.terminating = seen.terminating;
        state.labels = Some(seen.labels);
        state.groups = selecting(&self.settings.scope, &self.groups, &seen.name, state.labels.as_ref());
        self.dirty.insert(seen.name);
    }

    fn see_secret(&mut self, place: &Place, change: Change<SeenSecret>) {
        match change {
            Change::All(all) => {
                // Those that are gone must be looked at, too.
                for (name, state) in self.namespaces.iter_mut().filter(|(name, _)| place.covers(name)) {
                    (state.observed, state.stirred) = (None, true);
                    self.dirty.insert(name.clone());
                }
                all.into_iter().for_each(|s| self.apply_secret(s.namespace, Some(s.observed)));
                self.unsynced.1.remove(place);
            }
            Change::Applied(secret) => self.apply_secret(secret.namespace, Some(secret.observed)),
            Change::Deleted(secret) => {
                let known = self.namespaces.get(&secret.namespace).and_then(|s| s.observed.as_ref());
                // A late word about one that has been replaced since is of no interest.
                if known.is_some_and(|known| known.uid == secret.observed.uid) {
                    self.apply_secret(secret.namespace, None);
                }
            }
        }
    }

    fn apply_secret(&mut self, namespace: String, observed: Option<Observed>) {
        let state = self.namespaces.entry(namespace.clone()).or_default();
        // A change by another hand is a reason to try at once what failed before.
        if state.observed != observed {
            state.not_before = None;
        }
        (state.observed, state.stirred) = (observed, true);
        self.dirty.insert(namespace);
    }

    /// Wakes the namespaces whose time has come.
    fn ring(&mut self) {
        let now = Instant::now();
        while let Some((at, _)) = self.timers.first()
            && *at <= now
            && let Some((_, namespace)) = self.timers.pop_first()
        {
            if let Some(state) = self.namespaces.get_mut(&namespace) {
                state.timer = None;
            }
            self.dirty.insert(namespace);
        }
    }

    /// Has a namespace looked at again at that time, and at no other.
    fn set_timer(&mut self, namespace: &str, at: Option<Instant>) {
        let Some(state) = self.namespaces.get_mut(namespace) else { return };
        if let Some(old) = std::mem::replace(&mut state.timer, at) {
            self.timers.remove(&(old, namespace.to_owned()));
        }
        if let Some(at) = at {
            self.timers.insert((at, namespace.to_owned()));
        }
    }

    /// Decides on one namespace, and returns the call to make, if there is one.
    fn reconcile(&mut self, namespace: &str) -> Option<BoxFuture<'static, Done>> {
        let state = self.namespaces.get(namespace)?;
        if state.busy || state.terminating || state.labels.is_none() {
            return None;
        }
        if let Some(at) = state.not_before.filter(|at| *at > Instant::now()) {
            self.set_timer(namespace, Some(at));
            return None;
        }
        let now = Timestamp::now();
        let tokens = self.tokens.borrow().clone();
        let choices = self.groups.choices(&state.groups, &tokens, now);
        let wanted = choices.iter().map(|(host, choice)| {
            let token = choice.token.as_ref().map(|t| (t.expires_at, t.lifetime));
            ((*host).to_owned(), Wanted { identity: choice.identity.clone(), token })
        });
        let old = state.observed.clone();
        let call = match plan(old.as_ref(), &wanted.collect(), now) {
            Plan::Keep(next) => {
                let pause = next.map(|next| Duration::try_from(next.duration_since(now)).unwrap_or_default());
                self.set_timer(namespace, pause.map(|pause| Instant::now() + pause));
                self.settle(namespace, None);
                return None;
            }
            Plan::Foreign => {
                let problem = format!(
                    "Secret {:?} exists and is not ours (no label {}={}): delete or rename it, or choose another name for the pull secret",
                    self.settings.name, MANAGED_BY.0, MANAGED_BY.1
                );
                self.settle(namespace, Some(("ForeignSecret", problem)));
                return None;
            }
            Plan::Delete => Call::Delete(old?),
            Plan::Write { fresh, carried } => {
                let fresh = choices.iter().filter(|(host, _)| fresh.iter().any(|f| f == *host));
                let fresh = fresh.filter_map(|(host, choice)| {
                    Some(((*host).to_owned(), (choice.token.clone()?, choice.identity.clone())))
                });
                let contents = old.as_ref().map(|o| o.contents.clone()).unwrap_or_default();
                let carried = contents.into_iter().filter(|(host, _)| carried.contains(host)).collect();
                Call::Write { fresh: fresh.collect(), old, carried }
            }
        };
        let uid = state.uid.clone();
        let (api, name) = (Api::namespaced(self.client.clone(), namespace), self.settings.name.clone());
        if let Some(state) = self.namespaces.get_mut(namespace) {
            (state.busy, state.stirred) = (true, false);
        }
        let namespace = namespace.to_owned();
        Some(Box::pin(async move {
            let result = call.perform(&api, &name).await;
            Done { namespace, uid, result }
        }))
    }

    /// A namespace has come to rest, either well or with a problem that only a change by another hand can solve.
    fn settle(&mut self, namespace: &str, problem: Option<(&'static str, String)>) {
        let Some(state) = self.namespaces.get_mut(namespace) else { return };
        (state.failures, state.not_before) = (0, None);
        match problem {
            Some((reason, problem)) if state.problem.as_ref() != Some(&problem) => {
                state.problem = Some(problem.clone());
                self.complain(namespace, reason, problem);
            }
            Some(_) => {}
            None => state.problem = None,
        }
    }

    fn finish(&mut self, done: Done) {
        let Done { namespace, uid, result } = done;
        let Some(state) = self.namespaces.get_mut(&namespace).filter(|s| s.uid == uid) else { return };
        state.busy = false;
        match result {
            Ok(observed) => {
                debug!(namespace, written = observed.is_some(), "pull secret");
                let written = observed.is_some();
                // What the watch said meanwhile may be newer. If it is older, the next call is a conflict that says so.
                if !state.stirred {
                    state.observed = observed;
                }
                (state.failures, state.not_before, state.problem) = (0, None, None);
                self.metrics.count(if written { WriteOutcome::Applied } else { WriteOutcome::Deleted });
            }
            Err(error) => {
                let pause =
                    Duration::from_secs(1).saturating_mul(2u32.saturating_pow(state.failures.min(16)));
                let longest = if error.is_refusal() { MAX_BACKOFF } else { MAX_BACKOFF_OF_FAILURES };
                let pause = pause.min(longest).mul_f64(0.75 + 0.5 * fastrand::f64());
                state.failures = state.failures.saturating_add(1);
                state.not_before = Some(Instant::now() + pause);
                let problem = format!("Secret {:?} cannot be written: {}", self.settings.name, chain(&error));
                match error {
                    // Our picture of it was old; with the new one, the next plan may well be to do nothing.
                    CallError::Changed(_, actual) => state.observed = *actual,
                    CallError::Api(_) | CallError::TooLarge { .. } | CallError::Altered => {
                        let first = state.problem.is_none();
                        state.problem = Some(problem.clone());
                        if first {
                            self.complain(&namespace, "PullSecretFailed", problem);
                        }
                    }
                }
                self.metrics.count(WriteOutcome::Failed);
            }
        }
        self.dirty.insert(namespace);
    }

    /// Says in the log and in an Event what is wrong with the Secret of a namespace.
    fn complain(&self, namespace: &str, reason: &'static str, problem: String) {
        warn!(namespace, problem, "pull secret");
        let uid = self.namespaces.get(namespace).and_then(|s| s.observed.as_ref()).map(|o| o.uid.clone());
        let secret = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Secret".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(self.settings.name.clone()),
            uid,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(problem.chars().take(1000).collect()),
            action: "SyncPullSecret".to_owned(),
            secondary: None,
        };
        self.events.say(secret, event);
    }

    fn summarise(&self) {
        let now = Timestamp::now();
        let tokens = self.tokens.borrow().clone();
        let mut summary: Summary = BTreeMap::new();
        for alias in self.groups.aliases() {
            summary.insert(alias.name.clone(), Synced { serves: alias.serves(), ..Synced::default() });
        }
        let (mut selected, mut synced) = (0, 0);
        for (name, state) in self.namespaces.iter().filter(|(_, s)| s.labels.is_some() && !s.terminating) {
            let choices = self.groups.choices(&state.groups, &tokens, now);
            let mut complete = true;
            for (_, alias) in self.groups.members(&state.groups) {
                let Some(entry) = summary.get_mut(&alias.name) else { continue };
                entry.selected += 1;
                if alias.pull_secret == PullSecret::None {
                    entry.synced += 1;
                    continue;
                }
                // Of two aliases with one registry and two identities, the Secret holds the token of one.
                let holds = alias.registry().is_some_and(|r| {
                    let identity = choices.get(r.as_str()).map_or(&alias.identity, |c| c.identity);
                    state.observed.as_ref().is_some_and(|o| o.holds(r.as_str(), identity, now))
                });
                complete &= holds;
                entry.synced += i32::from(holds);
                if let Some(problem) = &state.problem
                    && entry.problems.len() < MAX_PROBLEMS
                {
                    entry.problems.push((name.clone(), problem.clone()));
                }
            }
            selected += i64::from(!state.groups.is_empty());
            synced += i64::from(!state.groups.is_empty() && complete);
        }
        self.metrics.selected.set(selected);
        self.metrics.synced.set(synced);
        self.summary.send_replace(Arc::new(summary));
    }
}

/// The places of the groups that select a namespace.
fn selecting(
    scope: &Scope,
    groups: &Groups,
    name: &str,
    labels: Option<&BTreeMap<String, String>>,
) -> Vec<usize> {
    labels.filter(|labels| scope.includes(name, labels)).map(|l| groups.selecting(l)).unwrap_or_default()
}

/// Deletes every pull secret that is ours, wherever one may be: for uninstalling. Returns how many there were, and how
/// many of them could not be deleted.
///
/// # Errors
/// The Secrets could not be listed.
pub async fn delete_all(client: &Client, name: &str, scope: &Scope) -> kube::Result<(usize, usize)> {
    let params = ListParams::default().fields(&format!("metadata.name={name}"));
    let (mut ours, mut failed) = (0, 0);
    for place in Place::all(scope) {
        for secret in &bounded(place.secrets(client.clone()).list(&params)).await?.items {
            let observed = Observed::of(secret);
            if !observed.ours {
                continue;
            }
            ours += 1;
            let namespace = secret.metadata.namespace.as_deref().unwrap_or_default();
            let api = Api::namespaced(client.clone(), namespace);
            match Call::Delete(observed).perform(&api, name).await {
                Ok(_) => info!(namespace, "deleted the pull secret"),
                Err(error) => {
                    failed += 1;
                    warn!(namespace, error = %chain(&error), "the pull secret could not be deleted");
                }
            }
        }
    }
    Ok((ours, failed))
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
