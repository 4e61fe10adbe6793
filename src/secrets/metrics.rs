//! Metrics of pull secrets.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Metrics of pull secrets.
#[derive(Clone, Debug, Default)]
pub struct SecretMetrics {
    pub(super) selected: Gauge,
    pub(super) synced: Gauge,
    writes: Family<Labels, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    outcome: WriteOutcome,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
pub(super) enum WriteOutcome {
    /// It holds what it shall.
    Applied,
    /// It is gone.
    Deleted,
    /// It is as it was.
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

    /// Forgets what it showed: this replica does not lead any more.
    pub fn clear(&self) {
        self.selected.set(0);
        self.synced.set(0);
    }

    pub(super) fn count(&self, outcome: WriteOutcome) {
        self.writes.get_or_create(&Labels { outcome }).inc();
    }
}
