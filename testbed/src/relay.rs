//! A TCP port that forwards, and can be told to refuse or to keep silent.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::background::Background;
use crate::ports::Port;

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Forward,
    Refuse,
    Silence,
}

/// A port of 127.0.0.1 in front of another address, on a thread of its own; dropping it ends it.
pub struct Relay {
    mode: watch::Sender<Mode>,
    port: Port,
    _server: Background,
}

impl Relay {
    /// Forwards to an address from now on.
    ///
    /// # Errors
    /// There is no free port.
    pub fn start(target: SocketAddr) -> Result<Self> {
        let port = Port::reserve()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.number()));
        let mode = watch::Sender::new(Mode::Forward);
        let server = Background::spawn("relay", serve(address, target, mode.subscribe()))?;
        Ok(Self { mode, port, _server: server })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port.number()))
    }

    /// Ends all connections, and refuses new ones: nothing listens here any more.
    pub fn refuse(&self) {
        self.mode.send_replace(Mode::Refuse);
    }

    /// Accepts connections, but no byte passes any more: not on new ones, and not on those that are there.
    pub fn silence(&self) {
        self.mode.send_replace(Mode::Silence);
    }

    /// Forwards again. Connections that were silenced end.
    pub fn restore(&self) {
        self.mode.send_replace(Mode::Forward);
    }
}

async fn serve(address: SocketAddr, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    loop {
        let now = *mode.borrow_and_update();
        if now != Mode::Refuse {
            match TcpListener::bind(address).await {
                Ok(listener) => accept(&listener, target, &mut mode).await,
                Err(error) => return eprintln!("testbed: the relay cannot listen on {address}: {error}"),
            }
        } else if mode.changed().await.is_err() {
            return;
        }
    }
}

/// Accepts until connections are to be refused.
async fn accept(listener: &TcpListener, target: SocketAddr, mode: &mut watch::Receiver<Mode>) {
    let connections = mode.clone();
    tokio::select! {
        _ = mode.wait_for(|mode| *mode == Mode::Refuse) => {}
        () = async {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(forward(stream, target, connections.clone()));
                }
            }
        } => {}
    }
}

async fn forward(mut stream: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    if *mode.borrow_and_update() == Mode::Forward {
        let Ok(mut upstream) = TcpStream::connect(target).await else { return };
        tokio::select! {
            _ = copy_bidirectional(&mut stream, &mut upstream) => return,
            _ = mode.changed() => {}
        }
        if *mode.borrow_and_update() == Mode::Silence {
            // Both ends stay open, and hear nothing.
            let _ = mode.changed().await;
        }
    } else {
        let _ = mode.changed().await;
    }
}
