//! Watches: objects of the API server, followed into state that others read.

use std::{collections::BTreeMap, convert::identity, fmt::Debug, pin::pin, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use futures::TryStreamExt as _;
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{WatchStreamExt as _, utils::Backoff, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::{debug, error, warn};

use crate::{
    admin::Gate,
    alias::{Accepted, accept},
    crd::RegistryAlias,
    table::AliasTable,
};

/// How long a watch lasts before it is begun anew. A connection that died silently is noticed 5 seconds after that.
#[derive(Clone, Copy, Debug)]
pub struct WatchTimeout(u32);

impl WatchTimeout {
    /// In whole seconds, as the API server takes it.
    #[must_use]
    pub fn new(time: Duration) -> Self {
        Self(u32::try_from(time.as_secs()).unwrap_or(u32::MAX).max(1))
    }

    /// How long the API server may be silent while an answer is awaited: longer than any watch lasts.
    #[must_use]
    pub fn read_timeout(self) -> Duration {
        Duration::from_secs(u64::from(self.0) + 10).max(CALL_TIMEOUT)
    }
}

/// How long a single call to the API server may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// The pauses of a watch that fails: from half a second to five, each give or take half of it, and from the start again when
/// anything was heard. kube's own grow to a minute, and an alias must not be unknown for so long because the API server
/// restarted.
#[derive(Debug)]
struct WatchBackoff(Duration);

impl WatchBackoff {
    const FIRST: Duration = Duration::from_millis(500);
    const LONGEST: Duration = Duration::from_secs(5);
}

impl Default for WatchBackoff {
    fn default() -> Self {
        Self(Self::FIRST)
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0.mul_f64(0.5 + fastrand::f64());
        self.0 = (self.0 * 2).min(Self::LONGEST);
        Some(pause)
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {
        self.0 = Self::FIRST;
    }
}

/// What a watch says.
#[derive(Debug)]
pub enum Change<T> {
    /// These are all the objects there are: said first, and again whenever the watch had to start over.
    All(Vec<T>),
    /// This object is new or has changed.
    Applied(T),
    /// This object is gone.
    Deleted(T),
}

/// Follows objects for ever. Errors are logged and tried again with back-off; nothing is said until a list is whole. `read`
/// takes of each what is needed of it, at once, so that a long list is never held as it came.
pub async fn follow<K, T>(
    api: Api<K>,
    config: watcher::Config,
    timeout: WatchTimeout,
    read: impl Fn(K) -> T,
    mut on_change: impl FnMut(Change<T>),
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    let kind = K::kind(&K::DynamicType::default()).into_owned();
    let mut events = pin!(watcher(api, config.timeout(timeout.0)).backoff(WatchBackoff::default()));
    let mut initial = Vec::new();
    loop {
        match events.try_next().await {
            Ok(Some(watcher::Event::Init)) => initial.clear(),
            Ok(Some(watcher::Event::InitApply(object))) => initial.push(read(object)),
            Ok(Some(watcher::Event::InitDone)) => {
                debug!(%kind, objects = initial.len(), "watch synced");
                on_change(Change::All(std::mem::take(&mut initial)));
            }
            Ok(Some(watcher::Event::Apply(object))) => on_change(Change::Applied(read(object))),
            Ok(Some(watcher::Event::Delete(object))) => on_change(Change::Deleted(read(object))),
            Ok(None) => return,
            Err(error) => warn!(%kind, error = %chain(&error), "watch failed; trying again"),
        }
    }
}

/// Follows the one object of a name: `None` while it does not exist. `gate` opens when that is known.
pub async fn follow_one<K>(
    api: Api<K>,
    name: &str,
    timeout: WatchTimeout,
    state: watch::Sender<Option<Arc<K>>>,
    gate: Gate,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    follow(api, config, timeout, identity, |change| {
        state.send_replace(match change {
            Change::All(objects) => objects.into_iter().next().map(Arc::new),
            Change::Applied(object) => Some(Arc::new(object)),
            Change::Deleted(_) => None,
        });
        gate.open();
    })
    .await;
}

/// The `RegistryAlias` objects of the cluster, and what they come to.
#[derive(Debug, Default)]
pub struct Aliases {
    /// Every object, by name.
    pub objects: BTreeMap<String, Arc<RegistryAlias>>,
    /// The aliases that hold, and those that do not.
    pub accepted: Accepted,
}

/// Follows the aliases into `state`, and into the table that admissions are decided with.
pub async fn follow_aliases(
    client: Client,
    timeout: WatchTimeout,
    state: watch::Sender<Arc<Aliases>>,
    table: Arc<ArcSwap<AliasTable>>,
    gate: Gate,
) {
    let mut objects: BTreeMap<String, Arc<RegistryAlias>> = BTreeMap::new();
    // One object that an older or newer version of the schema let through must not blind us to the others.
    let api: Api<DeserializeGuard<RegistryAlias>> = Api::all(client);
    let valid = |guard: DeserializeGuard<RegistryAlias>| match guard.0 {
        Ok(alias) => Some((alias.name_any(), Arc::new(alias))),
        Err(invalid) => {
            let name = invalid.metadata.name.unwrap_or_default();
            error!(alias = name, error = %invalid.error, "ignoring a RegistryAlias that cannot be read");
            None
        }
    };
    follow(api, watcher::Config::default(), timeout, identity, |change| {
        match change {
            Change::All(all) => objects = all.into_iter().filter_map(valid).collect(),
            Change::Applied(guard) => {
                let name = guard.name_any();
                match valid(guard) {
                    Some((name, alias)) => objects.insert(name, alias),
                    None => objects.remove(&name),
                };
            }
            Change::Deleted(guard) => {
                objects.remove(&guard.name_any());
            }
        }
        let accepted = accept(objects.values().map(Arc::as_ref));
        if accepted.aliases != state.borrow().accepted.aliases {
            table.store(Arc::new(AliasTable::new(&accepted.aliases)));
        }
        state.send_replace(Arc::new(Aliases { objects: objects.clone(), accepted }));
        gate.open();
    })
    .await;
}

/// A call to the API server with a bound on its time.
///
/// # Errors
/// What the call says, or that it took too long.
pub async fn bounded<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .unwrap_or_else(|elapsed| Err(kube::Error::Service(Box::new(elapsed))))
}

/// An error with its causes, in one line, each said once.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = said(error);
    let mut above = error;
    while let Some(cause) = above.source()
        && !matches!(above.downcast_ref(), Some(kube::Error::Api(_)))
    {
        // Many say their cause themselves, in its own words.
        text = text.replace(&cause.to_string(), &said(cause));
        if !text.contains(&said(cause)) {
            text = format!("{text}: {}", said(cause));
        }
        above = cause;
    }
    text
}

/// An error without its causes. What the API server says needs no more than its message: kube adds the whole `Status`.
fn said(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref() {
        Some(kube::Error::Api(status)) => format!("{} ({} {})", status.message, status.code, status.reason),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_says_is_said_once_and_without_its_frame() {
        let status = kube::core::Status::failure("secrets is forbidden", "Forbidden").with_code(403);
        let error = watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)));
        assert_eq!(
            chain(&error),
            "failed to perform initial object list: secrets is forbidden (403 Forbidden)"
        );
    }
}
