//! Mutual TLS: who may call the webhook, by a certificate of their own.
//!
//! The API server shows one if its `--admission-control-config-file` leads to a kubeconfig that has one; see
//! <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#authenticate-apiservers>.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::{
        VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use tokio::sync::watch;
use tracing::{error, info};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::{serving_cert::ServingCert, watch::chain};

/// How often it is looked whether the file has changed.
const LOOK: Duration = Duration::from_secs(5);

/// Whose certificates are accepted.
#[derive(Clone, Debug)]
pub struct ClientAuth {
    /// A file with the certificate authorities, in PEM.
    pub ca: PathBuf,
    /// The names of which a certificate must have one, as common name or DNS name; empty if any will do.
    pub names: Vec<String>,
}

/// Why client certificates cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum ClientAuthError {
    /// The file cannot be read.
    #[error("cannot read the client CA {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// The file is not PEM.
    #[error("the client CA {0} is not PEM: {1}")]
    Pem(PathBuf, rustls::pki_types::pem::Error),
    /// What it holds is no certificate.
    #[error("the client CA {0} cannot be used: {1}")]
    Certificate(PathBuf, Error),
    /// It holds none.
    #[error("the client CA {0} holds no certificate: {1}")]
    Verifier(PathBuf, VerifierBuilderError),
}

impl ClientAuth {
    /// Reads the file. Returns what it holds, and what checks certificates by it.
    ///
    /// # Errors
    /// It holds no certificate authority.
    pub fn load(&self) -> Result<(Vec<u8>, Arc<dyn ClientCertVerifier>), ClientAuthError> {
        let pem = std::fs::read(&self.ca).map_err(|e| ClientAuthError::Read(self.ca.clone(), e))?;
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(&pem) {
            let ca = ca.map_err(|e| ClientAuthError::Pem(self.ca.clone(), e))?;
            roots.add(ca).map_err(|e| ClientAuthError::Certificate(self.ca.clone(), e))?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let by_ca = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|e| ClientAuthError::Verifier(self.ca.clone(), e))?;
        Ok((pem, Arc::new(Verifier { by_ca, names: self.names.clone() })))
    }

    /// Follows the file, of which `pem` is known, for ever. Connections that are there already stay.
    pub async fn follow(
        self,
        mut pem: Vec<u8>,
        serving: Arc<ServingCert>,
        tls: watch::Sender<Arc<ServerConfig>>,
    ) {
        let mut refused = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let problem = match self.load() {
                Ok((new, _)) if new == pem => None,
                Ok((new, verifier)) => match serving.clone().server_config(Some(verifier)) {
                    Ok(config) => {
                        info!(file = %self.ca.display(), "the client CA has changed");
                        pem = new;
                        tls.send_replace(Arc::new(config));
                        None
                    }
                    Err(error) => Some(chain(&error)),
                },
                Err(error) => Some(chain(&error)),
            };
            if let Some(error) = problem.as_ref().filter(|_| problem != refused) {
                error!(error, "keeping the client CA that was read last");
            }
            refused = problem;
        }
    }
}

/// Checks certificates by their CA, and then by their name.
#[derive(Debug)]
struct Verifier {
    by_ca: Arc<dyn ClientCertVerifier>,
    names: Vec<String>,
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.by_ca.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.by_ca.verify_client_cert(certificate, intermediates, now)?;
        if self.names.is_empty() || names(certificate).iter().any(|name| self.names.contains(name)) {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_ca.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_ca.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by_ca.supported_verify_schemes()
    }
}

/// The common names and DNS names of a certificate.
fn names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let alternative = certificate.subject_alternative_name().ok().flatten();
    let dns =
        alternative.iter().flat_map(|extension| &extension.value.general_names).filter_map(
            |name| match name {
                GeneralName::DNSName(name) => Some(*name),
                _ => None,
            },
        );
    common.chain(dns).map(str::to_owned).collect()
}
