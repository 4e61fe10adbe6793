//! The load: requests over HTTP/2 and TLS, at a fixed rate or as many as the server can take.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::OnceCell, task::LocalSet};
use tokio_rustls::TlsConnector;

/// How fast requests are sent.
#[derive(Clone, Copy, Debug)]
pub enum Rate {
    /// So many in each second, whether they are answered or not.
    Fixed(u32),
    /// Always so many under way on each connection.
    Saturation(usize),
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
    connections: Vec<OnceCell<SendRequest<Bytes>>>,
    answered: Cell<u64>,
}

impl Client {
    pub fn new(address: SocketAddr, ca: &str, connections: usize) -> Result<Self> {
        Ok(Self {
            address,
            tls: super::tls(ca)?.into(),
            connections: (0..connections).map(|_| OnceCell::new()).collect(),
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
        exchange(self.connection(0).await?, &self.uri(path)?, body, |part| answer.extend_from_slice(part))
            .await?;
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
        let exchange = move |connection: SendRequest<Bytes>, due: Instant| {
            let (uri, body, seen) = (uri.clone(), body.clone(), seen.clone());
            async move {
                let mut length = 0;
                exchange(connection, &uri, body, |part| length += part.len()).await?;
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
            Rate::Saturation(streams) => {
                tasks
                    .run_until(async {
                        for connection in connections {
                            for _ in 0..streams {
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

    async fn connection(&self, index: usize) -> Result<SendRequest<Bytes>> {
        let connect = || async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let stream = self.tls.connect(ServerName::from(self.address.ip()), stream).await?;
            let (send, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(async move {
                // Whoever sends on it is told.
                let _ = connection.await;
            });
            anyhow::Ok(send)
        };
        Ok(self.connections[index].get_or_try_init(connect).await?.clone())
    }
}

/// One request and its answer.
async fn exchange(
    connection: SendRequest<Bytes>,
    uri: &http::Uri,
    body: Bytes,
    mut part: impl FnMut(&[u8]),
) -> Result<()> {
    let request = http::Request::post(uri.clone())
        .header("content-type", "application/json")
        .header("content-length", body.len())
        .header("accept", "application/json, */*")
        .header("user-agent", "kube-apiserver-admission")
        .body(())?;
    let (response, mut stream) = connection.ready().await?.send_request(request, false)?;
    stream.send_data(body, true)?;
    let response = response.await?;
    ensure!(response.status() == 200, "{}", response.status());
    let mut body = response.into_body();
    while let Some(bytes) = body.data().await {
        let bytes = bytes.context("an answer broke off")?;
        part(&bytes);
        body.flow_control().release_capacity(bytes.len())?;
    }
    Ok(())
}
