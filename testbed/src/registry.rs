//! The registry behind ECR: one small image under every name, for those who bring a token of the AWS stand-in.
//!
//! Its certificate is for ECR's own names, as the real one's is, so whoever comes by a friendly name gets the error of
//! the real world.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum_server::tls_rustls::RustlsConfig;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::aws::Tokens;
use crate::background::Background;
use crate::image::{Image, MANIFEST};
use crate::node::Machine;
use crate::{install_crypto_provider, pki};

/// The canonical host of the account and region that everything here is in.
pub const HOST: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

/// What ECR's certificate is for.
const CERTIFICATE_NAMES: [&str; 2] =
    ["*.dkr.ecr.us-east-1.amazonaws.com", "*.dkr.ecr.us-east-1.vpce.amazonaws.com"];

/// One request that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// The path, such as `/v2/team/app/manifests/1`.
    pub path: String,
    /// The answer.
    pub status: u16,
    /// Who asked.
    pub caller: Caller,
}

/// Who asked. The token itself is told to nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// No credentials came along.
    Anonymous,
    /// The credentials are not from here.
    Unknown,
    /// A token that is valid.
    Token {
        /// The role that was given the token.
        role: String,
        /// When, which tells one token from the next.
        issued_at: SystemTime,
    },
    /// A token that was valid once.
    Expired {
        /// The role that was given the token.
        role: String,
    },
}

/// The running registry, on a thread of its own; dropping it ends it.
pub struct Registry {
    ca_pem: String,
    shared: Arc<Shared>,
    _server: Background,
}

struct Shared {
    image: Image,
    tokens: Tokens,
    log: watch::Sender<Vec<Request>>,
}

impl Registry {
    /// Serves `image` on port 443 of a machine to those who have one of `tokens`.
    pub fn start_on(machine: &Machine, image: Image, tokens: Tokens) -> Result<Self> {
        let address = SocketAddr::from((Machine::ADDRESS, 443));
        let listener = machine.within_network(|| TcpListener::bind(address).context("cannot listen"))?;
        Self::serve(listener, image, tokens)
    }

    fn serve(listener: TcpListener, image: Image, tokens: Tokens) -> Result<Self> {
        install_crypto_provider();
        listener.set_nonblocking(true)?;
        let serving = pki::serving_cert(&CERTIFICATE_NAMES)?;
        let shared = Arc::new(Shared { image, tokens, log: watch::Sender::default() });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let server = Background::spawn("registry", async move {
            let serve = async {
                let tls = RustlsConfig::from_pem(serving.cert.into(), serving.key.into()).await?;
                axum_server::from_tcp_rustls(listener, tls)?.serve(router.into_make_service()).await
            };
            if let Err(error) = serve.await {
                eprintln!("testbed: the registry cannot serve: {error}");
            }
        })?;
        Ok(Self { ca_pem: serving.ca, shared, _server: server })
    }

    /// The authority that signed the certificate, in PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// All requests so far, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.log.borrow().clone()
    }

    /// The requests so far for what is in `repository`.
    pub fn requests_for(&self, repository: &str) -> Vec<Request> {
        let prefix = format!("/v2/{repository}/");
        self.requests().into_iter().filter(|request| request.path.starts_with(&prefix)).collect()
    }

    /// Waits for a request; an error tells those so far if there is none within `limit`.
    pub async fn wait_for(
        &self,
        mut wanted: impl FnMut(&Request) -> bool,
        limit: Duration,
    ) -> Result<Request> {
        let mut log = self.shared.log.subscribe();
        let mut find = async || {
            let log = log.wait_for(|log| log.iter().any(&mut wanted)).await.ok()?;
            Some(log.clone())
        };
        let Ok(Some(log)) = timeout(limit, find()).await else {
            bail!("the registry did not see what was waited for within {limit:?}: {:#?}", self.requests());
        };
        log.into_iter().find(wanted).context("a request that was there is gone")
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let caller = shared.caller(request.headers());
    let response = match &caller {
        Caller::Token { .. } => shared.content(&method, &path),
        Caller::Expired { .. } => {
            let message = "Your authorization token has expired. Reauthenticate and try again.";
            error(StatusCode::FORBIDDEN, "DENIED", message)
        }
        Caller::Anonymous | Caller::Unknown => {
            let challenge = format!("Basic realm=\"https://{HOST}/\",service=\"ecr.amazonaws.com\"");
            (
                [(header::WWW_AUTHENTICATE, challenge)],
                error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "Not Authorized"),
            )
                .into_response()
        }
    };
    let status = response.status().as_u16();
    let request = Request { method: method.to_string(), path, status, caller };
    shared.log.send_modify(|log| log.push(request));
    response
}

impl Shared {
    fn caller(&self, headers: &HeaderMap) -> Caller {
        let Some(authorization) = headers.get(header::AUTHORIZATION) else { return Caller::Anonymous };
        let token = || {
            let basic = authorization.to_str().ok()?.strip_prefix("Basic ")?;
            let user = String::from_utf8(STANDARD.decode(basic).ok()?).ok()?;
            self.tokens.find(user.strip_prefix("AWS:")?)
        };
        match token() {
            None => Caller::Unknown,
            Some(token) if token.is_valid() => Caller::Token { role: token.role, issued_at: token.issued_at },
            Some(token) => Caller::Expired { role: token.role },
        }
    }

    /// The distribution protocol, as far as it reads.
    fn content(&self, method: &Method, path: &str) -> Response {
        if method != Method::GET && method != Method::HEAD {
            return error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry is read only");
        }
        if path == "/v2/" {
            return StatusCode::OK.into_response();
        }
        let mut parts = path.rsplitn(3, '/');
        let blob = match (parts.next(), parts.next()) {
            (Some(digest), Some("blobs")) => self.image.blob(digest),
            // Every tag is the same image.
            (Some(reference), Some("manifests")) if !reference.contains(':') => Some(self.image.manifest()),
            (Some(digest), Some("manifests")) => {
                self.image.blob(digest).filter(|blob| blob.media_type == MANIFEST)
            }
            _ => None,
        };
        let Some(blob) = blob else {
            return error(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "there is nothing of that name");
        };
        let headers = [
            (header::CONTENT_TYPE, blob.media_type.to_owned()),
            (header::CONTENT_LENGTH, blob.bytes.len().to_string()),
            (header::HeaderName::from_static("docker-content-digest"), blob.digest.clone()),
        ];
        let body = if method == Method::HEAD { Body::empty() } else { Body::from(blob.bytes.clone()) };
        (headers, body).into_response()
    }
}

fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({ "errors": [{ "code": code, "message": message }] });
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
