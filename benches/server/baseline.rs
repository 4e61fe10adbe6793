//! The least that a server on this stack can do: read the body, and answer with constant bytes.

use std::{fs, path::Path, sync::Arc};

use anyhow::{Result, anyhow};
use axum::{
    Router,
    body::Bytes,
    http::{HeaderValue, Request, header::CONTENT_TYPE},
    routing::post,
};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tower_service::Service as _;

/// Serves each `NAME.answer` of a directory at `/NAME`.
pub fn serve(dir: &Path) -> Result<()> {
    let mut router = Router::new();
    for file in fs::read_dir(dir)? {
        let path = file?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".answer")) else {
            continue;
        };
        let answer = Bytes::from(fs::read(&path)?);
        let handler = move |_: Bytes| {
            let answer = answer.clone();
            async { ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], answer) }
        };
        router = router.route(&format!("/{name}"), post(handler));
    }
    let chain = vec![CertificateDer::from_pem_file(dir.join("tls.crt"))?];
    let key = PrivateKeyDer::from_pem_file(dir.join("tls.key"))?;
    let mut tls = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let tls = TlsAcceptor::from(Arc::new(tls));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(fs::read_to_string(dir.join("address"))?).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(serve_connection(stream, tls.clone(), router.clone()));
        }
    })
}

async fn serve_connection(stream: TcpStream, tls: TlsAcceptor, router: Router) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = TokioIo::new(tls.accept(stream).await?);
    let service = service_fn(move |request: Request<Incoming>| router.clone().call(request));
    Builder::new(TokioExecutor::new()).serve_connection(stream, service).await.map_err(|e| anyhow!(e))
}
