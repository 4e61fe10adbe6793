//! Leadership: a Lease that one replica holds, so that one controller acts.
//!
//! The protocol is that of client-go: whoever holds the Lease renews it, and another takes it over when it was not
//! renewed for its duration, measured on the watcher's own clock so that clocks need not agree. Every write carries the
//! resourceVersion that was read, so that of two writers one fails. See
//! <https://pkg.go.dev/k8s.io/client-go/tools/leaderelection>.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::watch::chain;

/// Who competes for which Lease.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The Lease's name, in the operator's namespace.
    pub name: String,
    /// This replica, as the Lease shows it.
    pub holder: String,
    /// For how long a Lease holds that is not renewed. Leadership is given up after two thirds of it without a renewal,
    /// and a renewal is tried every seventh of it.
    pub duration: Duration,
}

/// A competitor for the Lease.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    settings: Settings,
    leading: watch::Sender<bool>,
    gauge: Gauge,
    /// The Lease as it was read last, and when it was first seen so.
    seen: Option<(Lease, Instant)>,
    renewed: Instant,
}

impl Election {
    /// A competitor that says through `leading` whether it holds the Lease.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        settings: Settings,
        leading: watch::Sender<bool>,
        registry: &mut Registry,
    ) -> Self {
        let gauge = Gauge::default();
        registry.register("leader", "1 while this replica is the leader, else 0", gauge.clone());
        let api = Api::namespaced(client, namespace);
        Self { api, settings, leading, gauge, seen: None, renewed: Instant::now() }
    }

    /// Competes until `shutdown`, then hands the Lease over.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let retry = self.settings.duration / 7;
        while !shutdown.is_cancelled() {
            let attempt = Instant::now();
            // A leader gives up well before anyone else may take over, whatever it is waiting for then.
            let deadline = (*self.leading.borrow()).then(|| self.renewed + self.settings.duration * 2 / 3);
            let patience = attempt + self.settings.duration / 3;
            let until = deadline.map_or(patience, |deadline| patience.min(deadline));
            match tokio::time::timeout_at(until.into(), self.attempt()).await {
                Ok(Ok(true)) => {
                    self.renewed = attempt;
                    self.lead(true);
                }
                Ok(Ok(false)) => self.lead(false),
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "the Lease cannot be read or written; trying again");
                }
                Err(_) => warn!("the API server does not answer about the Lease; trying again"),
            }
            let next = Instant::now() + retry.mul_f64(0.9 + 0.2 * fastrand::f64());
            let deadline = (*self.leading.borrow()).then(|| self.renewed + self.settings.duration * 2 / 3);
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep_until(deadline.map_or(next, |deadline| next.min(deadline)).into()) => {}
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.lead(false);
            }
        }
        if *self.leading.borrow() {
            self.lead(false);
            self.release().await;
        }
    }

    /// Takes or renews the Lease if that is allowed. Returns whether it is ours.
    async fn attempt(&mut self) -> kube::Result<bool> {
        let Some(lease) = self.api.get_opt(&self.settings.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(self.settings.name.clone()), ..ObjectMeta::default() },
                spec: Some(self.spec(None)),
            };
            return self.written(self.api.create(&PostParams::default(), &lease).await);
        };
        if self.seen.as_ref().is_none_or(|(seen, _)| seen.spec != lease.spec) {
            self.seen = Some((lease.clone(), Instant::now()));
        }
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder != self.settings.holder && !holder.is_empty() {
            let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or_default();
            let duration = Duration::from_secs(seconds).max(self.settings.duration);
            if self.seen.as_ref().is_some_and(|(_, since)| since.elapsed() < duration) {
                return Ok(false);
            }
            info!(holder, "the Lease was not renewed; taking it over");
        }
        // The metadata carry the resourceVersion that was read: if anyone wrote since, this is a conflict.
        let lease = Lease { spec: Some(self.spec(Some(&spec))), metadata: lease.metadata };
        self.written(self.api.replace(&self.settings.name, &PostParams::default(), &lease).await)
    }

    fn written(&mut self, result: kube::Result<Lease>) -> kube::Result<bool> {
        match result {
            Ok(lease) => {
                self.seen = Some((lease, Instant::now()));
                Ok(true)
            }
            // While we lead, it may have been anyone, and the next attempt shows who holds it.
            Err(kube::Error::Api(status)) if status.code == 409 && !*self.leading.borrow() => {
                debug!("another replica wrote the Lease first");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn spec(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let same = old.filter(|o| o.holder_identity.as_deref() == Some(self.settings.holder.as_str()));
        LeaseSpec {
            holder_identity: Some(self.settings.holder.clone()),
            lease_duration_seconds: i32::try_from(self.settings.duration.as_secs().max(1)).ok(),
            acquire_time: same.and_then(|o| o.acquire_time.clone()).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: match same {
                Some(same) => same.lease_transitions,
                None => Some(old.and_then(|o| o.lease_transitions).map_or(0, |n| n + 1)),
            },
            ..LeaseSpec::default()
        }
    }

    fn lead(&self, leads: bool) {
        self.gauge.set(leads.into());
        let changed = self.leading.send_if_modified(|was| std::mem::replace(was, leads) != leads);
        if changed {
            info!(holder = self.settings.holder, leads, "leadership");
        }
    }

    /// Leaves the Lease without a holder, so that another replica leads at once.
    async fn release(&self) {
        let Some((lease, _)) = &self.seen else { return };
        let mut lease = lease.clone();
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        let params = PostParams::default();
        let replace = self.api.replace(&self.settings.name, &params, &lease);
        match tokio::time::timeout(Duration::from_secs(3), replace).await {
            Ok(Ok(_)) => info!("handed the Lease over"),
            Ok(Err(error)) => {
                warn!(error = %chain(&error), "the Lease could not be handed over; it will run out")
            }
            Err(_) => warn!("the Lease could not be handed over in time; it will run out"),
        }
    }
}
