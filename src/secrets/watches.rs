//! The watches that pull secrets are kept by: over the whole cluster, or over each namespace in scope alone, so that no
//! right to list the cluster's is needed.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::sync::mpsc;

use crate::{
    pull_secret::Observed,
    scope::Scope,
    watch::{Change, WatchTimeout, follow},
};

/// What one pair of watches covers: one namespace, or all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place(Option<String>);

/// What a watch saw, and what it covers.
pub(super) enum Seen {
    Namespace(Place, Change<SeenNamespace>),
    Secret(Place, Change<SeenSecret>),
}

/// What is needed of a namespace.
pub(super) struct SeenNamespace {
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) terminating: bool,
}

/// What is needed of a pull secret.
pub(super) struct SeenSecret {
    pub(super) namespace: String,
    pub(super) observed: Observed,
}

impl SeenNamespace {
    fn of(namespace: PartialObjectMeta<Namespace>) -> Self {
        let meta = namespace.metadata;
        Self {
            name: meta.name.unwrap_or_default(),
            uid: meta.uid,
            labels: meta.labels.unwrap_or_default(),
            terminating: meta.deletion_timestamp.is_some(),
        }
    }
}

impl SeenSecret {
    fn of(secret: PartialObjectMeta<Secret>) -> Self {
        let observed = Observed::of(&secret);
        Self { namespace: secret.metadata.namespace.unwrap_or_default(), observed }
    }
}

impl Place {
    /// What must be watched for a scope.
    pub(super) fn all(scope: &Scope) -> Vec<Self> {
        if scope.watched.is_empty() {
            vec![Self(None)]
        } else {
            scope.watched.iter().cloned().map(Some).map(Self).collect()
        }
    }

    /// Whether a namespace is covered.
    pub(super) fn covers(&self, namespace: &str) -> bool {
        self.0.as_deref().is_none_or(|name| name == namespace)
    }

    /// The Secrets here.
    pub(super) fn secrets(&self, client: Client) -> Api<PartialObjectMeta<Secret>> {
        match &self.0 {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        }
    }

    /// Follows the namespaces here and their Secrets of that name, for ever.
    pub(super) async fn follow(
        self,
        client: Client,
        secret: &str,
        timeout: WatchTimeout,
        seen: mpsc::UnboundedSender<Seen>,
    ) {
        let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
        let namespaces = follow(
            Api::<PartialObjectMeta<Namespace>>::all(client.clone()),
            self.0.as_deref().map_or_else(watcher::Config::default, named),
            timeout,
            SeenNamespace::of,
            // The receiver lives as long as this watch does.
            |change| drop(seen.send(Seen::Namespace(self.clone(), change))),
        );
        let secrets = follow(self.secrets(client), named(secret), timeout, SeenSecret::of, |change| {
            drop(seen.send(Seen::Secret(self.clone(), change)));
        });
        tokio::select! {
            () = namespaces => {}
            () = secrets => {}
        }
    }
}
