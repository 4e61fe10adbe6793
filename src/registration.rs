//! Registration: the webhook entries in the `MutatingWebhookConfiguration`, by server-side apply.
//!
//! The configuration itself is the chart's (or `manifests/`'s): it exists before, and it goes when they go. Only its
//! entries are ours.

use std::{collections::HashSet, sync::Arc, time::Duration};

use k8s_openapi::api::{
    admissionregistration::v1::{MutatingWebhook, MutatingWebhookConfiguration},
    core::v1::Secret,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    alias::Alias,
    matching::{self, EntrySettings},
    pull_secret::FIELD_MANAGER,
    serving_cert::ca_bundle,
    watch::{Aliases, bounded, chain},
};

/// The first pause after a failure, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What of the aliases the API server knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// The webhook entries that are registered just as they shall be.
    entries: HashSet<(String, String)>,
    /// Why some are not.
    pub problem: Option<String>,
}

impl Registered {
    /// Whether pods that name the alias are sent to the webhook.
    #[must_use]
    pub fn has(&self, alias: &Alias) -> bool {
        let group = alias.group();
        matching::hosts(alias).all(|host| {
            self.entries.iter().any(|(name, expression)| {
                name.starts_with(group.as_str()) && expression.contains(&format!("'{host}'"))
            })
        })
    }
}

/// Keeps the entries as the aliases and the certificate want them, for ever. `observed` is the configuration as a watch
/// sees it.
pub async fn keep(
    client: Client,
    name: String,
    settings: EntrySettings,
    mut aliases: watch::Receiver<Arc<Aliases>>,
    mut certificate: watch::Receiver<Option<Arc<Secret>>>,
    mut observed: watch::Receiver<Option<Arc<MutatingWebhookConfiguration>>>,
    registered: watch::Sender<Arc<Registered>>,
) {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client);
    let mut backoff = BACKOFF.0;
    loop {
        let (all, secret) = (aliases.borrow_and_update().clone(), certificate.borrow_and_update().clone());
        let mut actual = observed.borrow_and_update().clone();
        let mut again = None;
        let problem = match (actual.clone(), secret.as_deref().and_then(ca_bundle)) {
            (None, _) => Some(format!(
                "MutatingWebhookConfiguration {name:?} does not exist: install the chart, or apply manifests/webhook.yaml"
            )),
            (_, None) => {
                Some("the Secret of the serving certificate is missing, or has no ca.crt".to_owned())
            }
            (Some(configuration), Some(bundle)) => {
                let desired = matching::entries(&all.accepted.aliases, bundle, &settings);
                if ours(&configuration) == desired {
                    backoff = BACKOFF.0;
                    None
                } else {
                    match apply(&api, &configuration, &desired).await {
                        Ok(written) if ours(&written) == desired => {
                            info!(entries = desired.len(), "registered the webhook");
                            // The watch will say the same.
                            actual = Some(Arc::new(written));
                            None
                        }
                        Ok(_) => {
                            again = Some(backoff);
                            Some("the API server stored other webhook entries than it was given".to_owned())
                        }
                        Err(error) => {
                            again = Some(backoff);
                            Some(format!("the webhook cannot be registered: {}", chain(&error)))
                        }
                    }
                }
            }
        };
        publish(&registered, actual.as_deref(), secret.as_deref(), &all, &settings, problem);
        tokio::select! {
            alive = aliases.changed() => if alive.is_err() { return },
            alive = certificate.changed() => if alive.is_err() { return },
            alive = observed.changed() => if alive.is_err() { return },
            () = pause(again) => backoff = (backoff * 2).min(BACKOFF.1),
        }
    }
}

/// Says which entries are there just as they shall be.
fn publish(
    registered: &watch::Sender<Arc<Registered>>,
    configuration: Option<&MutatingWebhookConfiguration>,
    secret: Option<&Secret>,
    aliases: &Aliases,
    settings: &EntrySettings,
    problem: Option<String>,
) {
    let desired = secret
        .and_then(ca_bundle)
        .map(|bundle| matching::entries(&aliases.accepted.aliases, bundle, settings))
        .unwrap_or_default();
    let actual = configuration.map(ours).unwrap_or_default();
    let entries = desired
        .into_iter()
        .filter(|entry| actual.contains(entry))
        .filter_map(|entry| Some((entry.name, entry.match_conditions?.into_iter().next()?.expression)))
        .collect();
    if let Some(problem) = &problem
        && registered.borrow().problem.as_ref() != Some(problem)
    {
        warn!(problem, "the webhook is not registered");
    }
    let new = Registered { entries, problem };
    registered.send_replace(Arc::new(new));
}

/// The entries of a configuration that are ours to keep.
fn ours(configuration: &MutatingWebhookConfiguration) -> Vec<MutatingWebhook> {
    let mut entries: Vec<_> = configuration
        .webhooks
        .iter()
        .flatten()
        .filter(|entry| entry.name.ends_with(".ecr-cname.dev"))
        .cloned()
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}

async fn apply(
    api: &Api<MutatingWebhookConfiguration>,
    existing: &MutatingWebhookConfiguration,
    entries: &[MutatingWebhook],
) -> kube::Result<MutatingWebhookConfiguration> {
    let name = existing.metadata.name.as_deref().unwrap_or_default();
    let patch = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        // With the UID, a configuration that was deleted meanwhile is not made again.
        "metadata": { "name": name, "uid": existing.metadata.uid },
        "webhooks": entries,
    });
    bounded(api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&patch))).await
}

async fn pause(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Removes every entry of ours: for uninstalling. Returns how many there were; none where there is no configuration.
///
/// # Errors
/// The configuration could not be read or written.
pub async fn remove_all(client: &Client, name: &str) -> kube::Result<usize> {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let Some(configuration) = bounded(api.get_opt(name)).await? else { return Ok(0) };
    let entries = ours(&configuration).len();
    if entries > 0 {
        apply(&api, &configuration, &[]).await?;
    }
    Ok(entries)
}
