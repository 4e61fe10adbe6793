//! The admin port: `/livez`, `/readyz` and `/metrics`, in plain HTTP, for probes and Prometheus.

use std::{
    io,
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    extract::State,
    http::{StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics,
    server::{self, Limits, ServerMetrics},
};

/// Probes and Prometheus are few, and send nothing.
const LIMITS: Limits =
    Limits { connections: 64, memory: 4 * 1024 * 1024, body: 1024, time: Duration::from_secs(2) };
const DRAIN: Duration = Duration::from_secs(1);

/// Whether the process is ready: every watch has synced, a certificate is loaded, and no shutdown has begun.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Gates>>);

#[derive(Debug, Default)]
struct Gates {
    closed: Vec<&'static str>,
    stopping: bool,
}

/// One thing that readiness waits for.
#[derive(Debug)]
pub struct Gate {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Adds a thing to wait for.
    #[must_use]
    pub fn gate(&self, name: &'static str) -> Gate {
        self.lock().closed.push(name);
        Gate { name, readiness: self.clone() }
    }

    /// From now on the process is not ready any more.
    pub fn stop(&self) {
        self.lock().stopping = true;
    }

    /// Whether a shutdown has begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    /// What is being waited for; empty if ready.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let gates = self.lock();
        if gates.stopping { vec!["shutdown"] } else { gates.closed.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Gates> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// What was waited for is there.
    pub fn open(&self) {
        self.readiness.lock().closed.retain(|name| *name != self.name);
    }
}

/// Serves the admin port until `shutdown`.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    registry: Arc<Registry>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let route = get(answer).with_state((readiness, registry));
    server::serve(listener, None, route, LIMITS, ServerMetrics::default(), shutdown, DRAIN).await
}

async fn answer(State((readiness, registry)): State<(Readiness, Arc<Registry>)>, uri: Uri) -> Response {
    match uri.path() {
        "/livez" => "ok\n".into_response(),
        "/readyz" => readyz(&readiness),
        "/metrics" => metrics(&registry),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

fn readyz(readiness: &Readiness) -> Response {
    let waiting_for = readiness.waiting_for();
    if waiting_for.is_empty() {
        "ok\n".into_response()
    } else {
        let text = format!("not ready, waiting for: {}\n", waiting_for.join(", "));
        (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
    }
}

fn metrics(registry: &Registry) -> Response {
    match metrics::render(registry) {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
