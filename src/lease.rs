//! Leadership: a Lease that one replica holds, so that one controller acts.
//!
//! The protocol is that of client-go: whoever holds the Lease renews it, and another takes it over when it was not
//! renewed for its duration, measured on the watcher's own clock so that clocks need not agree. Every write carries the
//! resourceVersion that was read, so that of two writers one fails. See
//! <https://pkg.go.dev/k8s.io/client-go/tools/leaderelection>.
//!
//! Leadership is not a fact but a time until which it holds, and it is looked at before every step of the work: a process that
//! was suspended does nothing when it wakes up, though its timers are due and nobody has told it yet.

use std::{
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

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
    /// For how long a Lease holds that is not renewed. Leadership is given up after four fifths of it without a renewal,
    /// and a renewal is tried every seventh of it, so that it survives an API server that takes a third of it to answer.
    pub duration: Duration,
}

/// How long a hand-over may take, and a renewal that is under way before it.
const HANDOVER: Duration = Duration::from_secs(3);
/// The shortest pause between two attempts.
const MIN_PAUSE: Duration = Duration::from_millis(100);

/// Whether this replica leads, and until when if nothing more happens.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

impl Leadership {
    /// Waits until this replica leads; `false` if it never will, because the election has ended.
    pub async fn gained(&mut self) -> bool {
        self.0.wait_for(|until| holds(*until)).await.is_ok()
    }

    /// Does `work` while this replica leads, and drops it on the spot when it does not any more: then, `None`.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut changes = self.0.clone();
        let mut lost = pin!(async move {
            // An election that is gone has lost, too.
            let _ = changes.wait_for(|until| !holds(*until)).await;
        });
        let mut work = pin!(work);
        poll_fn(|context| {
            if lost.as_mut().poll(context).is_ready() || !holds(*self.0.borrow()) {
                return Poll::Ready(None);
            }
            work.as_mut().poll(context).map(Some)
        })
        .await
    }
}

fn holds(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() < until)
}

/// A competitor for the Lease.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    settings: Settings,
    leading: watch::Sender<Option<Instant>>,
    gauge: Gauge,
    /// The Lease as it was read or written last, and when it was first seen so.
    seen: Option<(Lease, Instant)>,
    /// When the last write was sent: nobody can have seen it before.
    sent: Instant,
}

impl Election {
    /// A competitor, and what it achieves.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        settings: Settings,
        registry: &mut Registry,
    ) -> (Self, Leadership) {
        let gauge = Gauge::default();
        registry.register("leader", "1 while this replica is the leader, else 0", gauge.clone());
        let api = Api::namespaced(client, namespace);
        let (leading, leadership) = watch::channel(None);
        (Self { api, settings, leading, gauge, seen: None, sent: Instant::now() }, Leadership(leadership))
    }

    /// Competes until `shutdown`, then hands the Lease over.
    pub async fn run(mut self, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            let began = Instant::now();
            // A leader gives up well before anyone else may take over, whatever it is waiting for then.
            let deadline = self.leading_until().unwrap_or(began + self.settings.duration);
            // A renewal that is under way would overtake the hand-over.
            let patience = if self.leading.borrow().is_some() { HANDOVER } else { Duration::ZERO };
            let attempt = tokio::time::timeout_at(deadline.into(), self.attempt());
            let enough = async {
                shutdown.cancelled().await;
                tokio::time::sleep(patience).await;
            };
            let attempt = tokio::select! {
                () = enough => break,
                attempt = attempt => attempt,
            };
            match attempt {
                Ok(Ok(true)) => self.lead(Some(self.sent + self.settings.duration * 4 / 5)),
                Ok(Ok(false)) => self.lead(None),
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "the Lease cannot be read or written; trying again");
                }
                Err(_) => warn!("the API server does not answer about the Lease; trying again"),
            }
            // Counted from the beginning of this attempt, so that a slow API server does not make renewals rare.
            let retry = (self.settings.duration / 7).mul_f64(0.9 + 0.2 * fastrand::f64());
            let next = (began + retry).max(Instant::now() + MIN_PAUSE);
            let next = self.leading_until().map_or(next, |deadline| next.min(deadline));
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep_until(next.into()) => {}
            }
            if self.leading_until().is_some_and(|deadline| deadline <= Instant::now()) {
                self.lead(None);
            }
        }
        if self.leading_until().is_some() {
            self.lead(None);
            self.release().await;
        }
    }

    fn leading_until(&self) -> Option<Instant> {
        *self.leading.borrow()
    }

    /// Takes or renews the Lease if that is allowed. Returns whether it is ours.
    async fn attempt(&mut self) -> kube::Result<bool> {
        // A leader knows what it wrote last. If that is not what is there any more, its write fails, and it reads again.
        let known = self.seen.take_if(|_| self.leading.borrow().is_some()).map(|(lease, _)| lease);
        let lease = match known {
            Some(lease) => Some(lease),
            None => self.api.get_opt(&self.settings.name).await?,
        };
        let Some(lease) = lease else {
            self.sent = Instant::now();
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
        self.sent = Instant::now();
        self.written(self.api.replace(&self.settings.name, &PostParams::default(), &lease).await)
    }

    fn written(&mut self, result: kube::Result<Lease>) -> kube::Result<bool> {
        match result {
            Ok(lease) => {
                self.seen = Some((lease, Instant::now()));
                Ok(true)
            }
            // While we lead, it may have been anyone, and the next attempt shows who holds it.
            Err(kube::Error::Api(status)) if status.code == 409 && self.leading.borrow().is_none() => {
                debug!("another replica wrote the Lease first");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn spec(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let same = old.filter(|o| self.is_ours(o));
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

    fn lead(&self, until: Option<Instant>) {
        let leads = until.is_some();
        self.gauge.set(leads.into());
        if self.leading.send_replace(until).is_some() != leads {
            info!(holder = self.settings.holder, leads, "leadership");
        }
    }

    /// Leaves the Lease without a holder, so that another replica leads at once.
    async fn release(&self) {
        let release = async {
            let mut lease = match &self.seen {
                Some((lease, _)) => lease.clone(),
                // A renewal was under way.
                None => self.api.get(&self.settings.name).await?,
            };
            let Some(spec) = lease.spec.as_mut().filter(|spec| self.is_ours(spec)) else { return Ok(()) };
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
            self.api.replace(&self.settings.name, &PostParams::default(), &lease).await.map(|_| ())
        };
        match tokio::time::timeout(HANDOVER, release).await {
            Ok(Ok(())) => info!("handed the Lease over"),
            Ok(Err(error)) => {
                warn!(error = %chain(&error), "the Lease could not be handed over; it will run out")
            }
            Err(_) => warn!("the Lease could not be handed over in time; it will run out"),
        }
    }

    fn is_ours(&self, spec: &LeaseSpec) -> bool {
        spec.holder_identity.as_deref() == Some(self.settings.holder.as_str())
    }
}
