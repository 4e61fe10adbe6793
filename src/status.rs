//! Status: what the controller found out about each alias, as conditions that a person can act on.
//!
//! `judge` is pure; the loop around it writes what changed, and an Event for each transition.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{
    Api, Client, Resource as _,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType},
};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    alias::{Alias, Refusal, Target},
    crd::{Namespaces, PullSecret, RegistryAlias, RegistryAliasStatus},
    dns::{Answer, Answers},
    events::Events,
    pull_secret::FIELD_MANAGER,
    registration::Registered,
    secrets::{Summary, Synced},
    tokens::{TokenState, Tokens},
    watch::{Aliases, bounded, chain},
};

/// How many statuses are written at one time.
const CONCURRENCY: usize = 16;
/// The shortest time between two rounds of writes.
const ROUND: Duration = Duration::from_millis(200);
/// How long a new leader waits for its own picture of the namespaces before it writes what it knows.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause after a round in which a write failed.
const RETRY: Duration = Duration::from_secs(5);

/// What a status is made from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The aliases.
    pub aliases: watch::Receiver<Arc<Aliases>>,
    /// What DNS says.
    pub answers: watch::Receiver<Arc<Answers>>,
    /// What AWS says.
    pub tokens: watch::Receiver<Arc<Tokens>>,
    /// How far the pull secrets are.
    pub summary: watch::Receiver<Arc<Summary>>,
    /// What is registered.
    pub registered: watch::Receiver<Arc<Registered>>,
}

/// Keeps the status of every alias, for ever.
pub async fn keep(client: Client, mut sources: Sources, events: Events) {
    let api: Api<RegistryAlias> = Api::all(client);
    // What was written last, and to which version of the object.
    let mut written: BTreeMap<String, (Option<String>, RegistryAliasStatus)> = BTreeMap::new();
    // A new leader knows nothing yet; what its predecessor wrote is better than that. But if the namespaces cannot be
    // listed at all, that must show.
    let known = async {
        sources.registered.changed().await?;
        sources.summary.changed().await
    };
    if let Ok(Err(_)) = tokio::time::timeout(PATIENCE, known).await {
        return;
    }
    loop {
        let aliases = sources.aliases.borrow_and_update().clone();
        let answers = sources.answers.borrow_and_update().clone();
        let tokens = sources.tokens.borrow_and_update().clone();
        let summary = sources.summary.borrow_and_update().clone();
        let registered = sources.registered.borrow_and_update().clone();
        let now = Timestamp::now();
        written.retain(|name, _| aliases.objects.contains_key(name));
        let refused: BTreeMap<&str, &Refusal> =
            aliases.accepted.refused.iter().map(|(name, refusal)| (name.as_str(), refusal)).collect();
        let accepted: BTreeMap<&str, &Alias> =
            aliases.accepted.aliases.iter().map(|alias| (alias.name.as_str(), alias)).collect();
        let mut due = Vec::new();
        for (name, object) in &aliases.objects {
            let verdict = match (accepted.get(name.as_str()), refused.get(name.as_str())) {
                (Some(alias), _) => Ok(*alias),
                (None, Some(refusal)) => Err(*refusal),
                (None, None) => continue,
            };
            let principal = verdict.ok().and_then(Alias::principal);
            let facts = Facts {
                verdict,
                answer: answers.get(name),
                token: principal.as_ref().and_then(|p| tokens.get(p)),
                synced: summary.get(name),
                registered: verdict.is_ok_and(|alias| registered.has(alias)),
                registration_problem: registered.problem.as_deref(),
            };
            // The newer of what we wrote and what the watch shows: the watch may lag behind our own write.
            let last = written.get(name).filter(|(base, _)| *base == object.metadata.resource_version);
            let old = last.map(|(_, status)| status).or(object.status.as_ref());
            let new = judge(object, old, &facts, now);
            if Some(&new) != old {
                let (old, api) = (old.cloned(), &api);
                due.push(Box::pin(async move {
                    let result = write(api, name, &new).await;
                    (name, object, old, new, result)
                }));
            }
        }
        let done: Vec<_> = stream::iter(due).buffer_unordered(CONCURRENCY).collect().await;
        let mut failed = false;
        for (name, object, old, new, result) in done {
            match result {
                Ok(()) => {
                    announce(&events, object, old.as_ref(), &new);
                    written.insert(name.clone(), (object.metadata.resource_version.clone(), new));
                }
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    warn!(alias = name, error = %chain(&error), "the status could not be written; trying again");
                    failed = true;
                }
            }
        }
        tokio::time::sleep(if failed { RETRY } else { ROUND }).await;
        if failed {
            continue;
        }
        let alive = tokio::select! {
            alive = sources.aliases.changed() => alive,
            alive = sources.answers.changed() => alive,
            alive = sources.tokens.changed() => alive,
            alive = sources.summary.changed() => alive,
            alive = sources.registered.changed() => alive,
        };
        if alive.is_err() {
            return;
        }
    }
}

/// What is known of one alias.
#[derive(Clone, Copy)]
struct Facts<'a> {
    verdict: Result<&'a Alias, &'a Refusal>,
    answer: Option<&'a Answer>,
    token: Option<&'a TokenState>,
    synced: Option<&'a Synced>,
    registered: bool,
    registration_problem: Option<&'a str>,
}

/// A condition before it has a time.
struct Finding {
    status: &'static str,
    reason: &'static str,
    message: String,
}

fn finding(status: &'static str, reason: &'static str, message: impl Into<String>) -> Finding {
    Finding { status, reason, message: message.into() }
}

/// Judges one alias. `old` is its status so far, whose transition times are kept where nothing changed.
fn judge(
    object: &RegistryAlias,
    old: Option<&RegistryAliasStatus>,
    facts: &Facts<'_>,
    now: Timestamp,
) -> RegistryAliasStatus {
    let resolved = resolved(facts);
    let (registry, host) = match facts.verdict {
        Ok(alias) => {
            let answered =
                facts.answer.filter(|a| a.host == alias.host).and_then(|a| a.registry.clone().ok());
            let registry = match &alias.target {
                Target::Registry(registry) => Some(registry.clone()),
                // The last good answer stays where DNS has none.
                Target::Cname { .. } => answered.or_else(|| alias.registry().cloned()),
            };
            (registry.map(|r| r.to_string()), Some(alias.host.to_string()))
        }
        Err(_) => (None, None),
    };
    // What was said before still holds where this leader has not found out otherwise.
    let before =
        old.filter(|o| o.observed_generation == object.metadata.generation && o.registry == registry);
    let promised = before.and_then(|o| o.token_expires_at.clone()).filter(|expiry| expiry.0 > now);
    // What was found out about another registry, identity or selector says nothing about this one.
    let moved = facts.verdict.is_ok_and(|alias| alias.registry().map(ToString::to_string) != registry);
    let facts = &Facts {
        token: facts.token.filter(|_| !moved),
        synced: facts
            .synced
            .filter(|s| !moved && facts.verdict.is_ok_and(|alias| alias.serves() == s.serves)),
        ..*facts
    };
    let token = token_ready(facts, promised.as_ref(), now);
    let synced = secrets_synced(facts, before);
    let ready = ready(facts, &[&resolved, &token, &synced]);
    let findings =
        [("Resolved", resolved), ("TokenReady", token), ("SecretsSynced", synced), ("Ready", ready)];
    RegistryAliasStatus {
        host: registry.as_ref().and(host),
        registry,
        token_expires_at: facts
            .token
            .and_then(|t| t.token.as_ref())
            .map(|t| seconds(t.expires_at))
            .or(promised),
        namespaces: match facts.synced {
            Some(s) => Some(Namespaces { selected: s.selected, synced: s.synced }),
            None => before.and_then(|o| o.namespaces),
        },
        observed_generation: object.metadata.generation,
        conditions: findings
            .into_iter()
            .map(|(type_, finding)| condition(object, old, type_, finding, now))
            .collect(),
    }
}

fn resolved(facts: &Facts<'_>) -> Finding {
    let alias = match facts.verdict {
        Ok(alias) => alias,
        Err(refusal @ Refusal::HostTaken { .. }) => {
            return finding("False", "HostTaken", refusal.to_string());
        }
        Err(refusal @ Refusal::Invalid { .. }) => {
            return finding("False", "InvalidSpec", refusal.to_string());
        }
    };
    match (
        &alias.target,
        facts.answer.filter(|a| a.host == alias.host).map(|a| &a.registry),
        alias.registry(),
    ) {
        (Target::Registry(registry), ..) => {
            finding("True", "SpecifiedRegistry", format!("spec.registry is {registry}"))
        }
        (_, Some(Ok(registry)), _) => {
            finding("True", "FollowedCNAME", format!("{} is a CNAME of {registry}", alias.host))
        }
        (_, Some(Err(problem)), Some(last)) => {
            finding("True", problem.reason(), format!("{problem}; keeping the last good answer, {last}"))
        }
        (_, Some(Err(problem)), None) => finding("False", problem.reason(), problem.to_string()),
        (_, None, Some(last)) => {
            finding("True", "FollowedCNAME", format!("{} is a CNAME of {last}", alias.host))
        }
        (_, None, None) => {
            finding("Unknown", "LookingUp", format!("looking up the CNAME of {}", alias.host.name()))
        }
    }
}

fn token_ready(facts: &Facts<'_>, promised: Option<&Time>, now: Timestamp) -> Finding {
    match facts.verdict {
        Err(_) => return finding("Unknown", "NotResolved", "the alias does not hold"),
        Ok(alias) if alias.pull_secret == PullSecret::None => {
            return finding("True", "NotRequired", "pullSecret is None: names are rewritten only");
        }
        Ok(alias) if alias.registry().is_none() => {
            return finding("Unknown", "NotResolved", "the registry is not known yet");
        }
        Ok(_) => {}
    }
    let unknown = TokenState::default();
    let state = facts.token.unwrap_or(&unknown);
    // A new leader has no token yet; the pull secrets hold what its predecessor got, until that expires.
    let valid_until = state.usable(now).map(|token| token.expires_at).or(promised.map(|expiry| expiry.0));
    match (valid_until, &state.error) {
        (Some(expiry), None) => finding("True", "TokenValid", format!("valid until {expiry:.0}")),
        (Some(expiry), Some(error)) => finding(
            "True",
            "RefreshFailing",
            format!("the last token is valid until {expiry:.0}, but {error}"),
        ),
        (None, Some(error)) => finding("False", reason_of(error), error.to_string()),
        (None, None) => finding("Unknown", "Requesting", "asking AWS for a token"),
    }
}

fn reason_of(error: &crate::ecr::TokenError) -> &'static str {
    use crate::ecr::Reason;
    match error.reason {
        Reason::AccessDenied => "AccessDenied",
        Reason::NoCredentials => "NoCredentials",
        Reason::ClockSkew => "ClockSkew",
        Reason::Throttled => "Throttled",
        Reason::Unreachable => "AWSUnreachable",
        Reason::ServiceError => "AWSError",
        Reason::BadAnswer => "BadAnswer",
        Reason::ExpiredOnArrival => "TokenExpiredOnArrival",
    }
}

fn secrets_synced(facts: &Facts<'_>, before: Option<&RegistryAliasStatus>) -> Finding {
    match facts.verdict {
        Err(_) => return finding("Unknown", "NotResolved", "the alias does not hold"),
        Ok(alias) if alias.pull_secret == PullSecret::None => {
            return finding("True", "NotRequired", "pullSecret is None: no Secret is made");
        }
        Ok(_) => {}
    }
    let Some(synced) = facts.synced else {
        return finding("Unknown", "Syncing", "the namespaces are being listed");
    };
    let is = |type_: &str| {
        before.is_some_and(|s| s.conditions.iter().any(|c| c.type_ == type_ && c.status == "True"))
    };
    match synced.problems.first() {
        Some((namespace, problem)) => finding("False", "NamespacesFailed", format!("{namespace}: {problem}")),
        // The count stands in status.namespaces: here it would make a transition of every new namespace.
        None if synced.synced == synced.selected || is("Ready") => {
            finding("True", "Synced", "every selected namespace holds the pull secret")
        }
        None => finding("False", "Syncing", "not every selected namespace holds the pull secret yet"),
    }
}

/// Ready is the moment from which pods are rewritten and can pull: resolved, registered, a token at hand, and every
/// selected namespace served. A namespace with a problem of its own (a quota, a foreign Secret) does not make an alias
/// unready that works everywhere else.
fn ready(facts: &Facts<'_>, [resolved, token, synced]: &[&Finding; 3]) -> Finding {
    for (type_, part) in [("Resolved", resolved), ("TokenReady", token)] {
        if part.status != "True" {
            return finding("False", part.reason, format!("{type_}: {}", part.message));
        }
    }
    if !facts.registered {
        let message = facts.registration_problem.unwrap_or("the API server does not know the host yet");
        return finding("False", "NotRegistered", message);
    }
    if synced.status != "True" && synced.reason != "NamespacesFailed" {
        return finding("False", synced.reason, format!("SecretsSynced: {}", synced.message));
    }
    let alias = facts.verdict.map_or("", |alias| alias.host.as_str());
    finding("True", "Ready", format!("pods that name {alias} are rewritten"))
}

fn condition(
    object: &RegistryAlias,
    old: Option<&RegistryAliasStatus>,
    type_: &str,
    finding: Finding,
    now: Timestamp,
) -> Condition {
    let before = old.and_then(|s| s.conditions.iter().find(|c| c.type_ == type_));
    let since = before.filter(|c| c.status == finding.status).map(|c| c.last_transition_time.clone());
    Condition {
        type_: type_.to_owned(),
        status: finding.status.to_owned(),
        reason: finding.reason.to_owned(),
        // The API allows 32 KiB.
        message: finding.message.chars().take(4096).collect(),
        observed_generation: object.metadata.generation,
        last_transition_time: since.unwrap_or(seconds(now)),
    }
}

/// A time as the API keeps it: in whole seconds. What is finer would look like a change of what was written.
fn seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

async fn write(api: &Api<RegistryAlias>, name: &str, status: &RegistryAliasStatus) -> kube::Result<()> {
    let patch = json!({
        "apiVersion": RegistryAlias::api_version(&()),
        "kind": RegistryAlias::kind(&()),
        "metadata": { "name": name },
        "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    bounded(api.patch_status(name, &params, &Patch::Apply(&patch))).await.map(|_| ())
}

/// Writes an Event for each condition that became another.
fn announce(
    events: &Events,
    object: &RegistryAlias,
    old: Option<&RegistryAliasStatus>,
    new: &RegistryAliasStatus,
) {
    for condition in &new.conditions {
        let before = old.and_then(|s| s.conditions.iter().find(|c| c.type_ == condition.type_));
        let same = before.is_some_and(|b| (&b.status, &b.reason) == (&condition.status, &condition.reason));
        // On the way to ready, only what failed is worth a word.
        if same
            || condition.status == "Unknown"
            || matches!(
                condition.reason.as_str(),
                "Syncing" | "NotRegistered" | "Requesting" | "LookingUp" | "NotResolved"
            )
        {
            continue;
        }
        info!(
            alias = object.metadata.name,
            condition = condition.type_,
            status = condition.status,
            reason = condition.reason,
            detail = condition.message,
            "condition"
        );
        let fine = condition.status == "True"
            && !matches!(
                condition.reason.as_str(),
                "RefreshFailing" | "DNSLookupFailed" | "NotAnECRHost" | "CNAMELoop" | "AccountNotAllowed"
            );
        let event = Event {
            type_: if fine { EventType::Normal } else { EventType::Warning },
            reason: condition.reason.clone(),
            note: Some(format!("{}: {}", condition.type_, condition.message).chars().take(1000).collect()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        events.say(object.object_ref(&()), event);
    }
}
