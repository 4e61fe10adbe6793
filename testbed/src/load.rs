//! Load: pods created through the API server all the time, each looked at as it was stored.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::background::Background;
use crate::controlplane::ControlPlane;

/// How long a creation may take. The API server itself gives up after 34 s.
const PATIENCE: Duration = Duration::from_secs(40);
/// How many creations are under way at the most.
const CONCURRENCY: usize = 64;

/// What is created: one of these for each pod, in turn.
#[derive(Clone, Debug)]
pub struct Target {
    /// The namespace.
    pub namespace: String,
    /// The image's name as it is written.
    pub image: String,
    /// What the stored name may be.
    pub expected: Vec<String>,
}

/// What came of it so far.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Pods that were stored as they should.
    pub stored: usize,
    /// Pods that were stored otherwise: their image and pull secrets.
    pub unrewritten: Vec<String>,
    /// Pods that were not stored.
    pub failed: Vec<Failure>,
    /// How long the slowest creation took that succeeded.
    pub slowest: Duration,
}

/// A pod that was not stored.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When it was sent.
    pub sent: Instant,
    /// When it had failed.
    pub failed: Instant,
    /// What was said.
    pub error: String,
}

impl Report {
    /// The failures between two moments.
    #[must_use]
    pub fn failed_between(&self, from: Instant, to: Instant) -> Vec<&Failure> {
        self.failed.iter().filter(|failure| failure.failed >= from && failure.sent <= to).collect()
    }
}

/// The running load, on a thread of its own; dropping it ends it.
pub struct Load {
    report: Arc<Mutex<Report>>,
    targets: Arc<Mutex<Vec<Target>>>,
    stop: watch::Sender<bool>,
    done: watch::Receiver<bool>,
    _generator: Background,
}

impl Load {
    /// Creates so many pods in each second, at even distances whatever the answers are like.
    ///
    /// # Errors
    /// There is no client or thread to be had.
    pub fn start(control_plane: &ControlPlane, rate: u32, targets: Vec<Target>) -> Result<Self> {
        let report = Arc::new(Mutex::new(Report::default()));
        let targets = Arc::new(Mutex::new(targets));
        let (stop, stopped) = watch::channel(false);
        let (finished, done) = watch::channel(false);
        let generate = generate(
            control_plane.config_without_retries(),
            Duration::from_secs(1) / rate,
            Arc::clone(&targets),
            Arc::clone(&report),
            stopped,
        );
        let generator = Background::spawn("load", async move {
            generate.await;
            finished.send_replace(true);
            std::future::pending().await
        })?;
        Ok(Self { report, targets, stop, done, _generator: generator })
    }

    /// Creates other pods from now on.
    pub fn set_targets(&self, targets: Vec<Target>) {
        *lock(&self.targets) = targets;
    }

    /// What came of it so far.
    #[must_use]
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// Waits until so many more pods have been stored.
    ///
    /// # Errors
    /// They are not within `limit`.
    pub async fn stored(&self, more: usize, limit: Duration) -> Result<()> {
        let goal = lock(&self.report).stored + more;
        let wait = async {
            while lock(&self.report).stored < goal {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = timeout(limit, wait).await;
        waited.map_err(|_| {
            let report = self.report();
            let last = report.failed.last().map(|failure| failure.error.clone()).unwrap_or_default();
            anyhow::anyhow!(
                "{} of {goal} pods were stored within {limit:?}; last failure: {last}",
                report.stored
            )
        })
    }

    /// Creates no more, waits for what is under way, and says what came of it all.
    pub async fn stop(mut self) -> Report {
        self.stop.send_replace(true);
        let _ = self.done.wait_for(|done| *done).await;
        self.report()
    }
}

async fn generate(
    config: kube::Config,
    pause: Duration,
    targets: Arc<Mutex<Vec<Target>>>,
    report: Arc<Mutex<Report>>,
    mut stopped: watch::Receiver<bool>,
) {
    let Ok(client) = kube::Client::try_from(config) else { return };
    let mut tick = interval(pause);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut creations = JoinSet::new();
    let mut number = 0;
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => break,
            _ = tick.tick(), if creations.len() < CONCURRENCY => {
                let target = {
                    let targets = lock(&targets);
                    targets.get(number % targets.len().max(1)).cloned()
                };
                number += 1;
                if let Some(target) = target {
                    creations.spawn(create(client.clone(), target, format!("load-{number}"), Arc::clone(&report)));
                }
            }
            Some(_) = creations.join_next() => {}
        }
    }
    while creations.join_next().await.is_some() {}
}

async fn create(client: kube::Client, target: Target, name: String, report: Arc<Mutex<Report>>) {
    let pods: Api<Pod> = Api::namespaced(client, &target.namespace);
    let pod =
        json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "app", "image": target.image}]}});
    let Ok(pod) = serde_json::from_value(pod) else { return };
    let sent = Instant::now();
    let created = timeout(PATIENCE, pods.create(&PostParams::default(), &pod)).await;
    let failed = Instant::now();
    let stored = match created {
        Ok(Ok(pod)) => pod,
        Ok(Err(error)) => {
            let error = match error {
                kube::Error::Api(status) => status.message,
                other => other.to_string(),
            };
            lock(&report).failed.push(Failure { sent, failed, error });
            return;
        }
        Err(_) => {
            let error = format!("no answer within {PATIENCE:?}");
            lock(&report).failed.push(Failure { sent, failed, error });
            return;
        }
    };
    let spec = stored.spec.unwrap_or_default();
    let image = spec.containers.into_iter().next().and_then(|c| c.image).unwrap_or_default();
    let secrets: Vec<_> = spec.image_pull_secrets.unwrap_or_default().into_iter().map(|s| s.name).collect();
    {
        let mut report = lock(&report);
        if target.expected.contains(&image) && secrets == ["ecr-cname"] {
            report.stored += 1;
            report.slowest = report.slowest.max(failed - sent);
        } else {
            report.unrewritten.push(format!("{} with pull secrets {secrets:?}", image));
        }
    }
    // Pods that stay would only fill the API server's memory.
    let _ = pods.delete(&name, &DeleteParams::default().grace_period(0)).await;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
