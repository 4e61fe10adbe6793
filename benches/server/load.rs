//! The load: requests over TLS, at a fixed rate or as many as the server can take.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::{Mutex, OnceCell},
    task::LocalSet,
};
use tokio_rustls::TlsConnector;

/// How many requests are under way at saturation, whatever the protocol.
const UNDER_WAY: usize = 64;

/// How requests share connections. The API server speaks HTTP/2 to a URL, and HTTP/1.1 to a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A connection for each request under way.
    Http1,
    /// Four connections for all of them.
    Http2,
}

impl Protocol {
    fn connections(self) -> usize {
        match self {
            Self::Http1 => UNDER_WAY,
            Self::Http2 => 4,
        }
    }
}

/// How fast requests are sent.
#[derive(Clone, Copy, Debug)]
pub enum Rate {
    /// So many in each second, whether they are answered or not.
    Fixed(u32),
    /// As many as the server can take, with 64 under way.
    Saturation,
}

/// What came of a load.
pub struct Outcome {
    pub requests: u64,
    pub elapsed: Duration,
    /// In nanoseconds, from the moment at which a request was due.
    pub latencies: Vec<u32>,
}

/// What a load was like for the server.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub cpu_us: f64,
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
}

/// Connections to one server.
pub struct Client {
    address: SocketAddr,
    tls: TlsConnector,
    protocol: Protocol,
    connections: Vec<OnceCell<Connection>>,
    answered: Cell<u64>,
}

#[derive(Clone)]
enum Connection {
    /// Whoever finds it taken waits.
    Http1(Rc<Mutex<http1::SendRequest<Full<Bytes>>>>),
    Http2(h2::client::SendRequest<Bytes>),
}

impl Client {
    pub fn new(address: SocketAddr, ca: &str, protocol: Protocol) -> Result<Self> {
        Ok(Self {
            address,
            tls: super::tls(ca, protocol)?.into(),
            protocol,
            connections: (0..protocol.connections()).map(|_| OnceCell::new()).collect(),
            answered: Cell::new(0),
        })
    }

    /// How many requests the server has answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.get()
    }

    /// Sends one request and returns the answer.
    pub async fn ask(&self, path: &str, body: Bytes) -> Result<Vec<u8>> {
        let mut answer = Vec::new();
        let connection = self.connection(0).await?;
        connection.exchange(&self.uri(path)?, body, |part| answer.extend_from_slice(part)).await?;
        self.answered.set(self.answered.get() + 1);
        Ok(answer)
    }

    /// Sends the body for as long as `time`, and checks the length of each answer.
    pub async fn load(
        &self,
        path: &str,
        body: &Bytes,
        expected: usize,
        rate: Rate,
        time: Duration,
    ) -> Result<Outcome> {
        let latencies = Rc::new(RefCell::new(Vec::with_capacity(1 << 18)));
        let started = Instant::now();
        let (uri, body, seen) = (self.uri(path)?, body.clone(), latencies.clone());
        let exchange = move |connection: Connection, due: Instant| {
            let (uri, body, seen) = (uri.clone(), body.clone(), seen.clone());
            async move {
                let mut length = 0;
                connection.exchange(&uri, body, |part| length += part.len()).await?;
                ensure!(length == expected, "an answer of {length} bytes instead of {expected}");
                seen.borrow_mut().push(due.elapsed().as_nanos().try_into().unwrap_or(u32::MAX));
                Ok(())
            }
        };
        let mut connections = Vec::new();
        for i in 0..self.connections.len() {
            connections.push(self.connection(i).await?);
        }
        let tasks = LocalSet::new();
        let mut handles = Vec::new();
        match rate {
            Rate::Saturation => {
                let each = UNDER_WAY / connections.len();
                tasks
                    .run_until(async {
                        for connection in connections {
                            for _ in 0..each {
                                let (exchange, connection) = (exchange.clone(), connection.clone());
                                handles.push(tokio::task::spawn_local(async move {
                                    while started.elapsed() < time {
                                        exchange(connection.clone(), Instant::now()).await?;
                                    }
                                    anyhow::Ok(())
                                }));
                            }
                        }
                        for handle in handles {
                            handle.await??;
                        }
                        anyhow::Ok(())
                    })
                    .await?
            }
            Rate::Fixed(per_second) => {
                tasks
                    .run_until(async {
                        let requests = (time.as_secs_f64() * f64::from(per_second)) as u32;
                        for n in 0..requests {
                            let due = started + Duration::from_secs(1) / per_second * n;
                            // A timer is good for milliseconds; this thread has its core for itself.
                            while Instant::now() < due {
                                tokio::task::yield_now().await;
                            }
                            let connection = connections[n as usize % connections.len()].clone();
                            handles.push(tokio::task::spawn_local(exchange(connection, due)));
                        }
                        for handle in handles {
                            handle.await??;
                        }
                        anyhow::Ok(())
                    })
                    .await?
            }
        }
        let elapsed = started.elapsed();
        let latencies = latencies.take();
        self.answered.set(self.answered.get() + latencies.len() as u64);
        Ok(Outcome { requests: latencies.len() as u64, elapsed, latencies })
    }

    fn uri(&self, path: &str) -> Result<http::Uri> {
        Ok(format!("https://{}{path}", self.address).parse()?)
    }

    async fn connection(&self, index: usize) -> Result<Connection> {
        let connect = || async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let stream = self.tls.connect(ServerName::from(self.address.ip()), stream).await?;
            // Whoever sends on a connection is told how it ended.
            anyhow::Ok(match self.protocol {
                Protocol::Http1 => {
                    let (send, connection) = http1::handshake(TokioIo::new(stream)).await?;
                    tokio::spawn(async move { drop(connection.await) });
                    Connection::Http1(Rc::new(Mutex::new(send)))
                }
                Protocol::Http2 => {
                    let (send, connection) = h2::client::handshake(stream).await?;
                    tokio::spawn(async move { drop(connection.await) });
                    Connection::Http2(send)
                }
            })
        };
        Ok(self.connections[index].get_or_try_init(connect).await?.clone())
    }
}

impl Connection {
    /// One request and its answer.
    async fn exchange(self, uri: &http::Uri, body: Bytes, mut part: impl FnMut(&[u8])) -> Result<()> {
        let request = http::Request::post(uri.clone())
            .header("content-type", "application/json")
            .header("content-length", body.len())
            .header("accept", "application/json, */*")
            .header("user-agent", "kube-apiserver-admission");
        match self {
            Self::Http1(connection) => {
                let mut connection = connection.lock().await;
                connection.ready().await?;
                let request = request.header("host", uri.authority().map_or("", |host| host.as_str()));
                let response = connection.send_request(request.body(Full::new(body))?).await?;
                ensure!(response.status() == 200, "{}", response.status());
                let mut body = response.into_body();
                while let Some(frame) = body.frame().await {
                    part(frame.context("an answer broke off")?.data_ref().map_or(&[], |bytes| bytes));
                }
            }
            Self::Http2(connection) => {
                let (response, mut stream) =
                    connection.ready().await?.send_request(request.body(())?, false)?;
                stream.send_data(body, true)?;
                let response = response.await?;
                ensure!(response.status() == 200, "{}", response.status());
                let mut body = response.into_body();
                while let Some(bytes) = body.data().await {
                    let bytes = bytes.context("an answer broke off")?;
                    part(&bytes);
                    body.flow_control().release_capacity(bytes.len())?;
                }
            }
        }
        Ok(())
    }
}
