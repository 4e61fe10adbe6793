//! An HTTP server for a port that anyone may reach.
//!
//! What clients may take is bounded: the number of their connections, the memory of all their requests together, and the
//! time for a handshake, for a request to arrive, and for nothing at all. What is over a bound is paid for by those who take
//! most and give least; the ledger decides who that is.

mod heard;
mod ledger;

use std::{convert::Infallible, io, net::TcpListener, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{Request, Response, StatusCode},
    response::IntoResponse as _,
    routing::MethodRouter,
};
use http_body_util::{BodyExt as _, Collected, Full};
use hyper::{
    body::{Body as _, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;
use tracing::{debug, error, warn};

use heard::Heard;
pub use ledger::ServerMetrics;
use ledger::{Charge, IDLE, Ledger, Seat};

/// What the clients of one port may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most connections at one time; one more closes the least deserving.
    pub connections: usize,
    /// The most bytes that all requests together hold, from their headers to the last byte of their answers; one more closes
    /// the connection of the oldest that waits for its client.
    pub memory: usize,
    /// The most bytes of one body.
    pub body: usize,
    /// The most time for a handshake, for the headers of a request, and for its body.
    pub time: Duration,
}

/// How often it is looked for connections that have outstayed.
const SWEEP: Duration = Duration::from_millis(500);
/// The most bytes of one answer. The largest honest one, for a pod of 1,500 containers, is a third of this.
const MAX_ANSWER: usize = 1024 * 1024;
/// The most bytes of the headers of one request.
const MAX_HEADERS: u32 = 8 * 1024;
/// The most bytes that are read of a request before anyone asked for them.
const WINDOW: u32 = 256 * 1024;
/// … and of all requests of a connection. A smaller one costs an answer of its own every other large request.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// The most bytes of a body that come as one frame. Those of one frame are not copied, and most reviews are not larger.
const FRAME: u32 = 32 * 1024;
/// How much of a connection is read at once. TLS asks for 4 KiB at a time, and each time would be a system call.
const READ_AHEAD: usize = 32 * 1024;
/// The most requests of one connection at one time. The API server opens another connection for more.
const STREAMS: u32 = 64;
/// How long the client of an idle connection may take to agree to its end.
const FAREWELL: Duration = Duration::from_secs(1);

/// Has `route` answer, whatever the path, until `shutdown`, then lets requests under way finish for at most `drain`. With `tls`,
/// each handshake is made with what it holds at the time. A body is read as a whole before the route is asked.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    tls: Option<watch::Receiver<Arc<ServerConfig>>>,
    route: MethodRouter,
    limits: Limits,
    metrics: ServerMetrics,
    shutdown: CancellationToken,
    drain: Duration,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (http1, http2) = (builder().http1_only(), builder().http2_only());
    let port = Arc::new(Port { http1, http2, route, limits, shutdown, drain });
    let ledger = Ledger::new(limits, metrics, port.shutdown.clone());
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            () = port.shutdown.cancelled() => break,
            _ = sweep.tick() => ledger.sweep(),
            Some(ended) = connections.join_next() => if let Err(panic) = ended {
                error!(%panic, "a connection ended in a panic");
            },
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => if let Some(seat) = ledger.enter(peer.ip()) {
                    let tls = tls.as_ref().map(|tls| TlsAcceptor::from(tls.borrow().clone()));
                    connections.spawn(port.clone().welcome(stream, tls, seat));
                },
                Err(error) if is_the_clients(&error) => {}
                // No file descriptor is left, say.
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    ledger.make_room();
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(drain, drained).await;
    Ok(())
}

/// Whether a connection failed before it was accepted.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // It runs from the end of the last answer, so it must not be shorter than a connection may be idle: it would be closed
        // under the API server. Headers that have begun and do not end are the ledger's to see.
        .header_read_timeout(IDLE + SWEEP * 2)
        .max_buf_size(64 * 1024);
    builder
        .http2()
        // No pings: the ledger sees who is silent for too long, and they would cost something with every frame.
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_frame_size(FRAME)
        .max_send_buf_size(64 * 1024)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // Requests that are taken back, by the client or for its mistakes (rapid reset: CVE-2023-44487).
        .max_pending_accept_reset_streams(STREAMS as usize)
        .max_local_error_reset_streams(STREAMS as usize);
    builder
}

/// One builder for each version, as agreed in the handshake: one that waits for the first bytes to tell them apart would cut a new
/// connection off at a shutdown, where HTTP/2 has a goodbye.
struct Port {
    http1: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
    route: MethodRouter,
    limits: Limits,
    shutdown: CancellationToken,
    drain: Duration,
}

impl Port {
    async fn welcome(self: Arc<Self>, stream: TcpStream, tls: Option<TlsAcceptor>, seat: Seat) {
        // An answer is small, and nothing follows that it could be sent with.
        let _ = stream.set_nodelay(true);
        let Some(tls) = tls else { return self.converse(stream, true, seat).await };
        let mut shaking = std::pin::pin!(timeout(
            self.limits.time,
            tls.accept(BufReader::with_capacity(READ_AHEAD, stream))
        ));
        let shaken = tokio::select! {
            shaken = shaking.as_mut() => shaken,
            // Who is just coming in is told that the port closes, which takes HTTP.
            () = seat.closed() => if self.shutdown.is_cancelled() { shaking.await } else { return },
        };
        match shaken {
            Ok(Ok(stream)) => {
                let http1 = stream.get_ref().1.alpn_protocol() != Some(b"h2");
                self.converse(stream, http1, seat).await;
            }
            Ok(Err(error)) => {
                seat.failed_handshake();
                debug!(%error, "a TLS handshake failed");
            }
            Err(_) => {
                seat.failed_handshake();
                debug!("a TLS handshake took too long");
            }
        }
    }

    async fn converse<I>(self: Arc<Self>, io: I, http1: bool, seat: Seat)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (port, requests) = (self.clone(), seat.clone());
        // In a box of its own, because hyper moves it about.
        let service = service_fn(move |request| Box::pin(port.clone().respond(request, requests.request())));
        let io = TokioIo::new(Heard { io, seat: seat.clone(), http1 });
        let builder = if http1 { &self.http1 } else { &self.http2 };
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        let patience = tokio::select! {
            biased;
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    debug!(error, "a connection failed");
                }
                return;
            }
            () = seat.closed() => if self.shutdown.is_cancelled() {
                self.drain
            } else if seat.is_idle() {
                // The API server may just be about to use it: it is told first.
                FAREWELL
            } else {
                return
            },
        };
        // hyper would close it at once, and a request may just be on its way, whose answer says that nothing more is taken.
        if http1 && seat.is_new() && timeout(FAREWELL.min(patience), connection.as_mut()).await.is_ok() {
            return;
        }
        connection.as_mut().graceful_shutdown();
        let _ = timeout(patience, connection).await;
    }

    async fn respond(
        self: Arc<Self>,
        request: Request<Incoming>,
        mut charge: Charge,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let (parts, body) = request.into_parts();
        let read = timeout(self.limits.time, read(body, &mut charge, self.limits.body)).await;
        let response = match read.unwrap_or(Err(Rejection::Slow(self.limits.time))) {
            Ok(body) => {
                charge.settle();
                let answered = self.route.clone().call(Request::from_parts(parts, Body::from(body))).await;
                answered.unwrap_or_else(|never| match never {})
            }
            Err(rejection) => {
                charge.reject();
                rejection.into_response()
            }
        };
        let size = usize::try_from(response.body().size_hint().lower()).unwrap_or(usize::MAX);
        let response = if size > MAX_ANSWER {
            let text = format!("the answer would have {size} bytes; at most {MAX_ANSWER} are sent\n");
            (StatusCode::PAYLOAD_TOO_LARGE, text).into_response()
        } else {
            response
        };
        let (parts, body) = response.into_parts();
        let body = at_hand(body).await;
        charge.answer(body.len(), parts.status.is_success());
        Ok(Response::from_parts(parts, Full::new(Bytes::from_owner(Answer { body, _charge: charge }))))
    }
}

/// A body of which all is at hand, so that nothing is waited for, and nothing can fail.
pub(crate) async fn at_hand(mut body: Body) -> Bytes {
    let first = body.frame().await.and_then(|frame| frame.ok()?.into_data().ok()).unwrap_or_default();
    if body.is_end_stream() {
        return first;
    }
    let rest = body.collect().await.map(Collected::to_bytes).unwrap_or_default();
    [first, rest].concat().into()
}

/// Why a request was not read.
#[derive(Debug, thiserror::Error)]
enum Rejection {
    #[error("cannot read a body of at most {0} bytes: it is longer")]
    Large(usize),
    #[error("the request did not arrive within {0:?}")]
    Slow(Duration),
    #[error("the body broke off: {0}")]
    Broken(hyper::Error),
    #[error("too many requests are under way")]
    Busy,
}

impl Rejection {
    fn into_response(self) -> Response<Body> {
        let status = match self {
            Self::Large(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Broken(_) => StatusCode::BAD_REQUEST,
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// Reads a whole body. It holds at most eight times the bytes that have come, whatever was announced.
async fn read(mut body: Incoming, charge: &mut Charge, limit: usize) -> Result<Bytes, Rejection> {
    let announced = body.size_hint().exact().map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    if announced.is_some_and(|size| size > limit) {
        return Err(Rejection::Large(limit));
    }
    let mut whole: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(Rejection::Broken)?.into_data() else { continue };
        if whole.is_empty() && body.is_end_stream() && data.len() <= limit {
            charge.hold(data.len()).ok_or(Rejection::Busy)?;
            return Ok(data);
        }
        let length = whole.len() + data.len();
        if length > limit {
            return Err(Rejection::Large(limit));
        }
        // Copied, because a piece keeps the whole buffer alive that it was read into.
        if length > whole.capacity() {
            let capacity = match announced {
                // It is believed as far as eight times what has come; else what has come is copied too often.
                Some(size) => size.min(length * 8),
                None => limit.min(whole.capacity() * 2),
            };
            let capacity = capacity.max(length);
            charge.hold(capacity).ok_or(Rejection::Busy)?;
            whole.reserve_exact(capacity - whole.len());
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.into())
}

/// The bytes of an answer, and what its request is charged for until they have been written: hyper drops them then, and no earlier.
struct Answer {
    body: Bytes,
    _charge: Charge,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}
