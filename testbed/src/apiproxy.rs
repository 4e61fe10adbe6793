//! A proxy between the operator and the API server, which delays, refuses, holds back and counts.
//!
//! It speaks TLS as the API server does, with its certificate, so the operator does not notice. Each connection to it is
//! one connection to the API server: what breaks in between breaks as it would on the way.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::background::Background;
use crate::controlplane::ControlPlane;

/// What can be made to go wrong with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The API server is not asked; this status is the answer, with `Retry-After` in seconds if there is a number.
    Answer(u16, Option<u32>),
    /// The API server is asked this much later.
    Delay(Duration),
    /// The API server is asked when all faults are healed, even if nobody waits any more.
    Hold,
    /// The API server is asked, and its answer is lost with the connection.
    LoseAnswer,
    /// The API server is not asked, and the connection is closed.
    CloseConnection,
}

/// A call that came by.
#[derive(Clone, Debug)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// The path without the query.
    pub path: String,
    /// Whether it is a watch.
    pub watch: bool,
    /// When it came.
    pub at: Instant,
    /// The status that the API server answered it with; `None` if it has not, or was not asked.
    pub answer: Option<u16>,
    /// What was done to it.
    pub fault: Option<Fault>,
}

impl Call {
    /// Whether it changes anything.
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.method != Method::GET
    }

    /// Whether the API server did what it asks for.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.answer.is_some_and(|status| status < 300)
    }

    /// Whether it is about the Lease, which is written all the time.
    #[must_use]
    pub fn is_lease(&self) -> bool {
        self.path.contains("/leases")
    }
}

type Scope = Arc<dyn Fn(&Call) -> bool + Send + Sync>;

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    faults: Vec<Injected>,
}

struct Injected {
    fault: Fault,
    scope: Scope,
    left: usize,
}

/// The running proxy, on a thread of its own; dropping it ends it.
pub struct ApiProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: Background,
}

struct Shared {
    upstream: SocketAddr,
    tls: TlsConnector,
    state: watch::Sender<State>,
    /// Connections that were made before it changed are dead without a word.
    silenced: watch::Sender<()>,
}

impl ApiProxy {
    /// Starts a proxy in front of a control plane's API server.
    ///
    /// # Errors
    /// It cannot listen, or the certificates cannot be read.
    pub fn start(control_plane: &ControlPlane) -> Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let file = |name: &str| control_plane.dir().join(name);
        let chain = CertificateDer::pem_file_iter(file("tls.crt"))?.collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(file("tls.key"))?;
        let mut server =
            rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(control_plane.ca_pem().as_bytes())?)?;
        let mut client = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        let upstream = control_plane.url().trim_start_matches("https://").parse()?;
        let shared = Arc::new(Shared {
            upstream,
            tls: TlsConnector::from(Arc::new(client)),
            state: watch::Sender::default(),
            silenced: watch::Sender::new(()),
        });
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let server = Background::spawn("api-proxy", serve(listener, acceptor, Arc::clone(&shared)))?;
        Ok(Self { address, shared, _server: server })
    }

    /// What a kubeconfig says instead of the API server's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Does this to every call in `scope`, until [`heal`](Self::heal). Of several faults the newest counts.
    pub fn inject(&self, fault: Fault, scope: impl Fn(&Call) -> bool + Send + Sync + 'static) {
        self.inject_times(usize::MAX, fault, scope);
    }

    /// Does this to so many calls in `scope`.
    pub fn inject_times(
        &self,
        times: usize,
        fault: Fault,
        scope: impl Fn(&Call) -> bool + Send + Sync + 'static,
    ) {
        let injected = Injected { fault, scope: Arc::new(scope), left: times };
        self.shared.state.send_modify(|state| state.faults.push(injected));
    }

    /// Ends all faults; what was held is passed on.
    pub fn heal(&self) {
        self.shared.state.send_modify(|state| state.faults.clear());
    }

    /// From now on no byte passes on the connections that are there, and nobody is told. New ones work.
    pub fn silence_connections(&self) {
        self.shared.silenced.send_replace(());
    }

    /// All calls so far, oldest first.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.shared.state.borrow().calls.clone()
    }

    /// The calls since `then` that changed something, the Lease's and Events left out.
    #[must_use]
    pub fn writes_since(&self, then: Instant) -> Vec<Call> {
        let lasting = |c: &Call| c.is_write() && c.at >= then && !c.is_lease() && !c.path.contains("/events");
        self.calls().into_iter().filter(|call| lasting(call) && call.succeeded()).collect()
    }

    /// Waits until `condition` holds of the calls so far.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub async fn wait_for(&self, mut condition: impl FnMut(&[Call]) -> bool, limit: Duration) -> Result<()> {
        let mut state = self.shared.state.subscribe();
        let waited = tokio::time::timeout(limit, state.wait_for(|state| condition(&state.calls))).await;
        waited.map(|_| ()).with_context(|| format!("not within {limit:?}; calls: {:#?}", self.calls()))
    }
}

async fn serve(listener: std::net::TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("testbed: the proxy cannot listen: {error}"),
    };
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(connection(stream, tls.clone(), Arc::clone(&shared)));
    }
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, shared: Arc<Shared>) {
    let mut silenced = shared.silenced.subscribe();
    let converse = async {
        let Ok(stream) = tls.accept(stream).await else { return };
        let upstream = Arc::new(Mutex::new(None));
        let service = service_fn(move |request| pass(Arc::clone(&shared), Arc::clone(&upstream), request));
        // An error is a client that went away, or a fault that was asked for.
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    };
    let mut converse = std::pin::pin!(converse);
    tokio::select! {
        () = &mut converse => {}
        // The sockets stay open, and nobody reads or writes.
        _ = silenced.changed() => std::future::pending().await,
    }
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;
type Upstream = Arc<Mutex<Option<SendRequest<Incoming>>>>;

/// Passes one request on, if no fault is in its way; an error closes the connection.
async fn pass(shared: Arc<Shared>, upstream: Upstream, request: Request<Incoming>) -> Result<Response<Body>> {
    let mut call = Call {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        watch: request.uri().query().is_some_and(|query| query.contains("watch=true")),
        at: Instant::now(),
        answer: None,
        fault: None,
    };
    let mut index = 0;
    shared.state.send_modify(|state| {
        let injected = state.faults.iter_mut().rev().find(|f| f.left > 0 && (f.scope)(&call));
        call.fault = injected.map(|injected| {
            injected.left -= 1;
            injected.fault
        });
        index = state.calls.len();
        state.calls.push(call.clone());
    });
    match call.fault {
        Some(Fault::Answer(status, retry_after)) => return refuse(status, retry_after),
        Some(Fault::CloseConnection) => anyhow::bail!("hanging up"),
        Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
        Some(Fault::Hold) => {
            // On its own, so that it reaches the API server even if the caller has given up.
            let held = tokio::spawn(async move {
                let _ = shared.state.subscribe().wait_for(|state| state.faults.is_empty()).await;
                forward(&shared, &upstream, request, index).await
            });
            return held.await?;
        }
        Some(Fault::LoseAnswer) => {
            forward(&shared, &upstream, request, index).await?;
            anyhow::bail!("losing the answer");
        }
        None => {}
    }
    forward(&shared, &upstream, request, index).await
}

async fn forward(
    shared: &Shared,
    upstream: &Upstream,
    request: Request<Incoming>,
    index: usize,
) -> Result<Response<Body>> {
    let mut sender = upstream.lock().await;
    if sender.as_ref().is_none_or(SendRequest::is_closed) {
        *sender = Some(connect(shared).await?);
    }
    let sender = sender.as_mut().context("there is a connection")?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    shared.state.send_modify(|state| {
        if let Some(call) = state.calls.get_mut(index) {
            call.answer = Some(status);
        }
    });
    Ok(response.map(http_body_util::BodyExt::boxed_unsync))
}

async fn connect(shared: &Shared) -> Result<SendRequest<Incoming>> {
    let stream = TcpStream::connect(shared.upstream).await?;
    let name = ServerName::IpAddress(shared.upstream.ip().into());
    let stream = shared.tls.connect(name, stream).await?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A refusal as the API server words it.
fn refuse(status: u16, retry_after: Option<u32>) -> Result<Response<Body>> {
    let status = StatusCode::from_u16(status)?;
    let reason = match status.as_u16() {
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => "Unknown",
    };
    let body = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "the proxy was told to refuse this", "reason": reason, "code": status.as_u16(),
        "details": {"retryAfterSeconds": retry_after.unwrap_or_default()}});
    let mut response = Response::builder().status(status).header("content-type", "application/json");
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds);
    }
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never| match never {});
    Ok(response.body(body.boxed_unsync())?)
}
