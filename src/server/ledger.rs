//! Who is connected, what each takes, and who has to go when it is too much.
//!
//! Two rules. *Too many connections*: of the address that has most of them, the one goes that was never answered, or, if there
//! is none, the one that has been idle longest. So a flood from one place displaces itself, and the API server, which
//! is answered all the time, is the last to go. *Too much memory*: the connection of the oldest request goes that waits for
//! its client, to send the rest of a body or to take an answer. An honest request arrives in milliseconds, so it is never the
//! oldest while someone dawdles.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Limits, MAX_HEADERS};

/// How long a connection may be there without having been answered.
const STRANGER: Duration = Duration::from_secs(10);
/// How long a connection that was answered may be idle: longer than the 90 s after which the API server closes it itself.
pub(super) const IDLE: Duration = Duration::from_secs(120);
/// How long a request may be there, from its headers to the last byte of its answer.
const STALLED: Duration = Duration::from_secs(10);
/// What a request takes beside its body: its headers, and what is kept of it.
const OVERHEAD: usize = MAX_HEADERS as usize;
/// How often it is logged that connections are closed to make room.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// The connections of one port and their requests.
pub(super) struct Ledger {
    limits: Limits,
    metrics: ServerMetrics,
    /// When the port closes, every connection has to go.
    shutdown: CancellationToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    connections: BTreeMap<u64, Connection>,
    peers: HashMap<IpAddr, usize>,
    /// By age.
    requests: BTreeMap<u64, Request>,
    /// The bytes of all requests.
    held: usize,
    warned: Option<Instant>,
}

struct Connection {
    peer: IpAddr,
    /// When it came, or when its last request ended.
    since: Instant,
    /// Whether a request of it was ever answered with success.
    answered: bool,
    requests: usize,
    /// Since when the headers of its next request are awaited, of which something has come.
    heard: Option<Instant>,
    /// Whether it was told to go, and does not count any more.
    leaving: bool,
    close: CancellationToken,
}

struct Request {
    connection: u64,
    began: Instant,
    bytes: usize,
    /// Whether it is the client that is waited for.
    waits: bool,
}

impl Ledger {
    pub(super) fn new(limits: Limits, metrics: ServerMetrics, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self { limits, metrics, shutdown, state: Mutex::default() })
    }

    /// A place for a new connection; `None` if even those that have to go are not gone yet.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr) -> Option<Seat> {
        let mut state = self.lock();
        if state.open() >= self.limits.connections {
            state.close_one(&self.metrics);
        }
        if state.connections.len() >= self.limits.connections * 2 {
            self.metrics.closed(Reason::Refused);
            return None;
        }
        let id = state.id();
        let close = self.shutdown.child_token();
        state.connections.insert(
            id,
            Connection {
                peer,
                since: Instant::now(),
                answered: false,
                requests: 0,
                heard: None,
                leaving: false,
                close: close.clone(),
            },
        );
        *state.peers.entry(peer).or_default() += 1;
        self.metrics.connections.inc();
        Some(Seat(Arc::new(Place { id, close, ledger: self.clone() })))
    }

    /// Closes the connection that deserves it most.
    pub(super) fn make_room(&self) {
        self.lock().close_one(&self.metrics);
    }

    /// Closes connections that have been there for too long with nothing to show for it.
    pub(super) fn sweep(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        let stalled: Vec<u64> = state
            .requests
            .values()
            .take_while(|r| now.duration_since(r.began) > STALLED)
            .map(|r| r.connection)
            .collect();
        for id in stalled {
            state.close(id, Reason::Stalled, &self.metrics);
        }
        let idle: Vec<u64> = state
            .connections
            .iter()
            .filter(|(_, c)| {
                let limit = if c.answered { IDLE } else { STRANGER };
                let slow = c.heard.is_some_and(|heard| now.duration_since(heard) > self.limits.time);
                c.requests == 0 && (slow || now.duration_since(c.since) > limit)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in idle {
            state.close(id, Reason::Idle, &self.metrics);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// How many connections are there that need not go.
    fn open(&self) -> usize {
        self.peers.values().sum()
    }

    fn close_one(&mut self, metrics: &ServerMetrics) {
        let most = self.peers.values().max().copied();
        let victim = self
            .connections
            .iter()
            .filter(|(_, c)| !c.leaving && self.peers.get(&c.peer).copied() == most)
            .min_by_key(|(_, c)| (c.answered, c.requests > 0, c.since))
            .map(|(id, _)| *id);
        if let Some(victim) = victim {
            self.close(victim, Reason::Crowded, metrics);
        }
    }

    fn close(&mut self, id: u64, reason: Reason, metrics: &ServerMetrics) {
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.leaving) else { return };
        connection.leaving = true;
        connection.close.cancel();
        let peer = connection.peer;
        self.leave(peer);
        metrics.closed(reason);
        let crowded = matches!(reason, Reason::Crowded | Reason::Memory);
        if crowded && self.warned.is_none_or(|at| at.elapsed() > SAY_AGAIN) {
            self.warned = Some(Instant::now());
            warn!(
                %peer, ?reason, connections = self.connections.len(), requests = self.requests.len(),
                bytes = self.held, "clients take too much: closing connections, this one first"
            );
        }
    }

    /// A connection of this peer does not count any more.
    fn leave(&mut self, peer: IpAddr) {
        if let Some(count) = self.peers.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                self.peers.remove(&peer);
            }
        }
    }

    /// Makes room for so many bytes more, at the cost of the oldest requests that wait for their clients.
    fn make_room(&mut self, bytes: usize, limits: Limits, metrics: &ServerMetrics) -> bool {
        while self.held + bytes > limits.memory {
            let Some(id) = self.requests.iter().find(|(_, r)| r.waits).map(|(id, _)| *id) else {
                return false;
            };
            if let Some(request) = self.requests.remove(&id) {
                self.held -= request.bytes;
                self.close(request.connection, Reason::Memory, metrics);
            }
        }
        true
    }
}

/// A connection's place in the ledger, which is given up when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Seat(Arc<Place>);

struct Place {
    id: u64,
    close: CancellationToken,
    ledger: Arc<Ledger>,
}

impl Seat {
    /// Completes when the connection has to go, be it because the port closes.
    pub(super) async fn closed(&self) {
        self.0.close.cancelled().await;
    }

    /// Whether the connection was answered before, and has no request now.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.0.ledger.lock();
        state.connections.get(&self.0.id).is_some_and(|c| c.answered && c.requests == 0)
    }

    /// Whether the connection has never been answered with success, and nothing of a request is there.
    pub(super) fn is_new(&self) -> bool {
        let state = self.0.ledger.lock();
        state.connections.get(&self.0.id).is_some_and(|c| !c.answered && c.requests == 0 && c.heard.is_none())
    }

    /// Something came. If there is no request, one has begun.
    pub(super) fn heard(&self) {
        if let Some(connection) = self.0.ledger.lock().connections.get_mut(&self.0.id)
            && connection.requests == 0
        {
            connection.heard.get_or_insert_with(Instant::now);
        }
    }

    pub(super) fn failed_handshake(&self) {
        self.0.ledger.metrics.closed(Reason::Handshake);
    }

    /// Opens the account of a new request.
    pub(super) fn request(&self) -> Charge {
        let ledger = &self.0.ledger;
        let mut state = ledger.lock();
        let id = state.id();
        // Where there is no room, the request has no account, and will be told so.
        if state.make_room(OVERHEAD, ledger.limits, &ledger.metrics) {
            state.held += OVERHEAD;
            let (connection, began) = (self.0.id, Instant::now());
            state.requests.insert(id, Request { connection, began, bytes: OVERHEAD, waits: true });
        }
        if let Some(connection) = state.connections.get_mut(&self.0.id) {
            connection.requests += 1;
            connection.heard = None;
        }
        drop(state);
        Charge { id, seat: self.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.ledger.lock();
        if let Some(connection) = state.connections.remove(&self.id) {
            if !connection.leaving {
                state.leave(connection.peer);
            }
            self.ledger.metrics.connections.dec();
        }
    }
}

/// What a request holds, until it is dropped.
pub(super) struct Charge {
    id: u64,
    seat: Seat,
}

impl Charge {
    /// The request holds so many bytes beside its headers. `None` if there is no room for them.
    pub(super) fn hold(&mut self, bytes: usize) -> Option<()> {
        let ledger = &self.seat.0.ledger;
        let mut state = ledger.lock();
        let more = (OVERHEAD + bytes).saturating_sub(state.requests.get(&self.id)?.bytes);
        if !state.make_room(more, ledger.limits, &ledger.metrics) {
            return None;
        }
        // It may have been the oldest itself.
        let request = state.requests.get_mut(&self.id)?;
        request.bytes += more;
        state.held += more;
        Some(())
    }

    /// The request is there as a whole: from now on it is we who are waited for.
    pub(super) fn settle(&mut self) {
        if let Some(request) = self.seat.0.ledger.lock().requests.get_mut(&self.id) {
            request.waits = false;
        }
    }

    /// The request is turned away.
    pub(super) fn reject(&self) {
        self.seat.0.ledger.metrics.rejected.inc();
    }

    /// Body and headers are gone; an answer of so many bytes waits for the client.
    pub(super) fn answer(&mut self, bytes: usize, success: bool) {
        let mut state = self.seat.0.ledger.lock();
        let state = &mut *state;
        if let Some(request) = state.requests.get_mut(&self.id) {
            // Smaller than what was held, or at most an answer's bound more: no one has to go for it.
            state.held = state.held - request.bytes + OVERHEAD + bytes;
            request.bytes = OVERHEAD + bytes;
            request.waits = true;
        }
        if success && let Some(connection) = state.connections.get_mut(&self.seat.0.id) {
            connection.answered = true;
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut state = self.seat.0.ledger.lock();
        if let Some(request) = state.requests.remove(&self.id) {
            state.held -= request.bytes;
        }
        if let Some(connection) = state.connections.get_mut(&self.seat.0.id) {
            connection.requests -= 1;
            connection.since = Instant::now();
        }
    }
}

/// Metrics of a port.
#[derive(Clone, Debug, Default)]
pub struct ServerMetrics {
    connections: Gauge,
    closed: Family<Labels, Counter>,
    rejected: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    reason: Reason,
}

/// Why a connection was closed by us.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
enum Reason {
    /// No TLS, none that is allowed, or too slow.
    Handshake,
    /// Nothing was asked for too long, or headers did not end.
    Idle,
    /// An answer was not taken.
    Stalled,
    /// There were too many connections.
    Crowded,
    /// Requests held too much memory.
    Memory,
    /// There was no place, not even by closing another.
    Refused,
}

impl ServerMetrics {
    /// Registers the metrics of the webhook's port. `rejected` counts requests that could not be read.
    #[must_use]
    pub fn new(registry: &mut Registry, rejected: Counter) -> Self {
        let metrics = Self { rejected, ..Self::default() };
        use Reason::{Crowded, Handshake, Idle, Memory, Refused, Stalled};
        for reason in [Handshake, Idle, Stalled, Crowded, Memory, Refused] {
            let _ = metrics.closed.get_or_create(&Labels { reason });
        }
        registry.register(
            "webhook_connections",
            "Connections of the webhook's port that are open",
            metrics.connections.clone(),
        );
        registry.register(
            "webhook_connections_closed",
            "Connections of the webhook's port that were closed for taking too much, by reason",
            metrics.closed.clone(),
        );
        metrics
    }

    fn closed(&self, reason: Reason) {
        self.closed.get_or_create(&Labels { reason }).inc();
    }
}
