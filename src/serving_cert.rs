//! The serving certificate: from its Secret into rustls, without dropping a connection.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::{admin::Gate, watch::chain};

/// Why a Secret holds no certificate that can be served.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A key of the Secret is missing.
    #[error("the Secret has no {0}")]
    Missing(&'static str),
    /// A key of the Secret is no PEM of the expected kind.
    #[error("{0} is not PEM: {1}")]
    Pem(&'static str, rustls::pki_types::pem::Error),
    /// The certificate cannot be read.
    #[error("tls.crt is no certificate: {0}")]
    X509(String),
    /// The key is of another certificate, or of no known kind.
    #[error("tls.key does not serve tls.crt: {0}")]
    Key(#[from] rustls::Error),
}

/// The certificate that is served now.
#[derive(Debug, Default)]
pub struct ServingCert {
    current: ArcSwapOption<CertifiedKey>,
    expires: Gauge,
}

impl ServingCert {
    /// No certificate yet; handshakes fail until there is one.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let cert = Self::default();
        registry.register(
            "serving_certificate_expiry_timestamp_seconds",
            "Until when the certificate that is served is valid, in seconds since 1970",
            cert.expires.clone(),
        );
        Arc::new(cert)
    }

    /// Serves what the Secret holds, whenever that changes. A Secret that cannot be served leaves the last good
    /// certificate in place. `gate` opens with the first certificate.
    pub async fn follow(self: Arc<Self>, mut secret: watch::Receiver<Option<Arc<Secret>>>, gate: Gate) {
        let mut last: Option<ByteString> = None;
        loop {
            let snapshot = secret.borrow_and_update().clone();
            if let Some(secret) = snapshot {
                let crt = secret.data.as_ref().and_then(|d| d.get("tls.crt")).cloned();
                if crt.is_some() && crt != last {
                    match load(&secret) {
                        Ok((certified, expires)) => {
                            info!(expires = %expires, "serving a new certificate");
                            self.expires.set(expires.as_second());
                            self.current.store(Some(Arc::new(certified)));
                            gate.open();
                            last = crt;
                        }
                        Err(error) => {
                            error!(error = %chain(&error), "cannot serve the certificate of the Secret")
                        }
                    }
                }
            } else if last.is_none() {
                warn!("waiting for the Secret with the serving certificate");
            }
            if secret.changed().await.is_err() {
                return;
            }
        }
    }

    /// The rustls configuration: TLS 1.2 and 1.3, HTTP/2 and HTTP/1.1. With `clients`, it asks clients for a certificate.
    ///
    /// # Errors
    /// The crypto provider does not support these versions, which ours does.
    pub fn server_config(
        self: Arc<Self>,
        clients: Option<Arc<dyn ClientCertVerifier>>,
    ) -> Result<ServerConfig, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?;
        let builder = match clients {
            Some(clients) => builder.with_client_cert_verifier(clients),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(self);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // The API server does not resume sessions (client-go gives Go's TLS no cache for them): tickets and what they stand for
        // would only cost.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(config)
    }
}

impl ResolvesServerCert for ServingCert {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

/// The CA bundle that goes with a Secret's certificate.
#[must_use]
pub fn ca_bundle(secret: &Secret) -> Option<&ByteString> {
    secret.data.as_ref()?.get("ca.crt").filter(|pem| !pem.0.is_empty())
}

fn load(secret: &Secret) -> Result<(CertifiedKey, jiff::Timestamp), CertificateError> {
    let get = |key: &'static str| {
        secret.data.as_ref().and_then(|d| d.get(key)).ok_or(CertificateError::Missing(key))
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&get("tls.crt")?.0)
        .collect::<Result<_, _>>()
        .map_err(|e| CertificateError::Pem("tls.crt", e))?;
    let leaf = chain.first().ok_or(CertificateError::Missing("certificate in tls.crt"))?;
    let expires = not_after(leaf)?;
    let key =
        PrivateKeyDer::from_pem_slice(&get("tls.key")?.0).map_err(|e| CertificateError::Pem("tls.key", e))?;
    let certified = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())?;
    Ok((certified, expires))
}

/// Until when a certificate is valid.
///
/// # Errors
/// It is no certificate.
pub fn not_after(der: &[u8]) -> Result<jiff::Timestamp, CertificateError> {
    let (_, certificate) =
        x509_parser::parse_x509_certificate(der).map_err(|e| CertificateError::X509(e.to_string()))?;
    jiff::Timestamp::from_second(certificate.validity().not_after.timestamp())
        .map_err(|e| CertificateError::X509(e.to_string()))
}
