//! Whether the webhook answers as the API server would ask it: through its Service, with a certificate of its CA.

use std::{
    io,
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{
        CertificateDer, ServerName,
        pem::{self, PemObject as _},
    },
};

use crate::args::ProbeArgs;

/// How long the webhook is given for one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// The most bytes of an answer.
const MAX_ANSWER: u64 = 64 * 1024;

/// A change of a pod for aliases that nobody has: it is let through as it is, and has no effect.
const REVIEW: &str = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"probe","operation":"UPDATE","kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},"namespace":"probe","object":{"metadata":{"name":"probe"},"spec":{"containers":[]}},"oldObject":{"metadata":{"name":"probe"},"spec":{"containers":[]}}}}"#;

/// Why the webhook is not well.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no CA.
    #[error("cannot read the CA in {0:?}: {1}")]
    Ca(String, String),
    /// The CA is none, or TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
    /// Not a name that a certificate could be for.
    #[error("{0:?} is not a host name")]
    Host(String),
    /// It cannot be reached, or its certificate is for another name or of another CA.
    #[error("{0} does not answer: {1}")]
    Io(String, io::Error),
    /// It answers something else.
    #[error("{0} answers something else than a webhook of ours would: {1:?}")]
    Answer(String, String),
}

/// Asks the webhook until it answers, or the time is up.
///
/// # Errors
/// What was wrong with the last attempt.
pub fn probe(args: &ProbeArgs) -> Result<(), ProbeError> {
    let deadline = Instant::now() + args.timeout;
    loop {
        match attempt(&args.host, args.port, &args.ca) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() + PAUSE >= deadline => return Err(error),
            Err(error) => eprintln!("{error}; trying again"),
        }
        std::thread::sleep(PAUSE);
    }
}

fn attempt(host: &str, port: u16, ca: &Path) -> Result<(), ProbeError> {
    let mut tls = connection(host, ca)?;
    let io_error = |error| ProbeError::Io(format!("{host}:{port}"), error);
    let answer = exchange(&mut tls, host, port).map_err(io_error)?;
    let allowed = answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"allowed\":true");
    if allowed { Ok(()) } else { Err(ProbeError::Answer(format!("{host}:{port}"), answer)) }
}

fn connection(host: &str, ca: &Path) -> Result<ClientConnection, ProbeError> {
    let bad = |why| ProbeError::Ca(ca.display().to_string(), why);
    let unreadable = |error: pem::Error| bad(error.to_string());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(unreadable)? {
        roots.add(certificate.map_err(unreadable)?).map_err(ProbeError::Tls)?;
    }
    if roots.is_empty() {
        return Err(bad("there is no certificate in it".to_owned()));
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(|_| ProbeError::Host(host.to_owned()))?;
    ClientConnection::new(Arc::new(config), name).map_err(ProbeError::Tls)
}

fn exchange(tls: &mut ClientConnection, host: &str, port: u16) -> io::Result<String> {
    let address = (host, port).to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut tcp = TcpStream::connect_timeout(&address, PATIENCE)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))?;
    let mut stream = rustls::Stream::new(tls, &mut tcp);
    write!(
        stream,
        "POST /mutate/probe/probe HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{REVIEW}",
        REVIEW.len()
    )?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
