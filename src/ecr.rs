//! AWS: from a principal to an ECR authorization token.
//!
//! Credentials come from the standard chain of `aws-config` (IRSA, EKS Pod Identity, profile, IMDS), then, for an alias
//! with a role, from `sts:AssumeRole`. One token serves every registry that its principal may read in that region; see
//! <https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_GetAuthorizationToken.html>.

mod bounded;

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aws_config::{
    BehaviorVersion, Region, SdkConfig, retry::RetryConfig, sts::AssumeRoleProvider, timeout::TimeoutConfig,
};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_ecr::{
    Client,
    error::{ErrorMetadata, SdkError},
    operation::get_authorization_token::GetAuthorizationTokenError,
};
use aws_sdk_sts::operation::{
    assume_role::AssumeRoleError, assume_role_with_web_identity::AssumeRoleWithWebIdentityError,
};
use aws_smithy_http_client::{
    Builder, Connector,
    proxy::ProxyConfig,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;

use bounded::Bounded;

use crate::{
    alias::{Identity, Principal},
    dockerconfig::{self, NotAuth},
    watch::chain,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// A token that pulls from every registry of its principal.
pub struct Token {
    /// What a docker config holds as `auth`: base64 of `AWS:PASSWORD`.
    pub auth: SecretString,
    /// Until when AWS says it is valid.
    pub expires_at: Timestamp,
    /// How long it was valid when it came.
    pub lifetime: SignedDuration,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct TokenError {
    /// A word for conditions, events and metrics.
    pub reason: Reason,
    /// What was asked, what came, and what to do.
    pub problem: String,
}

/// A word for why there is no token. A closed set, for it is a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prometheus_client::encoding::EncodeLabelValue)]
pub enum Reason {
    /// AWS knows the caller and says no.
    AccessDenied,
    /// No credentials could be had for the principal.
    NoCredentials,
    /// AWS takes the request for too old or too new: a clock is wrong.
    ClockSkew,
    /// AWS asks us to slow down.
    Throttled,
    /// No answer came in time, or no connection.
    Unreachable,
    /// AWS failed.
    ServiceError,
    /// The answer holds no usable token.
    BadAnswer,
    /// The token that came had expired already.
    ExpiredOnArrival,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::AccessDenied,
        Self::NoCredentials,
        Self::ClockSkew,
        Self::Throttled,
        Self::Unreachable,
        Self::ServiceError,
        Self::BadAnswer,
        Self::ExpiredOnArrival,
    ];
}

/// A client for each principal, made when it is first needed.
#[derive(Debug)]
pub struct Ecr {
    base: SdkConfig,
    clients: Mutex<HashMap<Principal, Client>>,
}

/// Why AWS cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The CA bundle cannot be read.
    #[error("cannot read the CA bundle {path} that AWS_CA_BUNDLE names: {source}")]
    CaBundle {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The CA bundle holds no certificates.
    #[error("cannot use the CA bundle {path} that AWS_CA_BUNDLE names: {problem}")]
    Tls {
        /// Its path.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

impl Ecr {
    /// Loads what the environment says of AWS: credentials, region, endpoints (`AWS_ENDPOINT_URL…`), proxies
    /// (`HTTPS_PROXY`, `NO_PROXY`) and a CA bundle (`AWS_CA_BUNDLE`, beside the system's).
    ///
    /// # Errors
    /// The CA bundle cannot be used.
    pub async fn from_env() -> Result<Self, SetupError> {
        let tls = tls_context()?;
        let http_client = Builder::new().build_with_connector_fn(move |settings, components| {
            let mut connector = Connector::builder().proxy_config(ProxyConfig::from_env());
            connector.set_connector_settings(settings.cloned());
            connector.set_sleep_impl(components.and_then(|c| c.sleep_impl()));
            connector.tls_provider(Provider::Rustls(CryptoMode::AwsLc)).tls_context(tls.clone()).build()
        });
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .operation_timeout(CALL_TIMEOUT)
            .build();
        // The refresh loop has a back-off of its own; two on top of each other would multiply the calls.
        let base = aws_config::defaults(BehaviorVersion::latest())
            .http_client(Bounded(http_client))
            .timeout_config(timeouts)
            .retry_config(RetryConfig::disabled())
            .load()
            .await;
        Ok(Self { base, clients: Mutex::default() })
    }

    /// Asks AWS for a token: one call of `GetAuthorizationToken`, and what its credentials need.
    ///
    /// # Errors
    /// [`TokenError`] says what to do. A token that is empty or has expired is an error, never an answer.
    pub async fn token(&self, principal: &Principal) -> Result<Token, TokenError> {
        let client = self.client(principal).await;
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.get_authorization_token().send())
            .await
            .map_err(|_| TokenError {
                reason: Reason::Unreachable,
                problem: format!("no answer from AWS within {} s for {principal}", CALL_TIMEOUT.as_secs()),
            })?
            .map_err(|e| explain(principal, &e))?;
        let bad = |problem: &str| TokenError {
            reason: Reason::BadAnswer,
            problem: format!("AWS answered {principal} without a usable token: {problem}"),
        };
        let data = answer.authorization_data.and_then(|d| d.into_iter().next());
        let data = data.ok_or_else(|| bad("no authorizationData"))?;
        let auth: SecretString = data.authorization_token.ok_or_else(|| bad("no authorizationToken"))?.into();
        dockerconfig::check_auth(secrecy::ExposeSecret::expose_secret(&auth))
            .map_err(|e: NotAuth| bad(&e.to_string()))?;
        let expires_at = data
            .expires_at
            .and_then(|t| Timestamp::from_millisecond(t.to_millis().ok()?).ok())
            .ok_or_else(|| bad("no expiresAt"))?;
        let lifetime = expires_at.duration_since(Timestamp::now());
        if lifetime <= SignedDuration::ZERO {
            return Err(TokenError {
                reason: Reason::ExpiredOnArrival,
                problem: format!(
                    "the token for {principal} expired at {expires_at}, before it came: check the clock of this node"
                ),
            });
        }
        Ok(Token { auth, expires_at, lifetime })
    }

    /// Forgets the clients, and with them the credentials, of principals that are not needed any more.
    pub fn retain(&self, needed: impl Fn(&Principal) -> bool) {
        self.lock().retain(|principal, _| needed(principal));
    }

    async fn client(&self, principal: &Principal) -> Client {
        if let Some(client) = self.lock().get(principal) {
            return client.clone();
        }
        let region = Region::new(principal.region.name.to_string());
        let mut config = aws_sdk_ecr::config::Builder::from(&self.base).region(region.clone());
        if principal.region.fips {
            config = config.use_fips(true);
        }
        if principal.region.dual_stack {
            config = config.use_dual_stack(true);
        }
        if let Identity::Role { arn, external_id } = &principal.identity {
            // The STS of the operator's own region if it has one: it is the one that a private cluster reaches.
            let mut role = AssumeRoleProvider::builder(arn)
                .session_name("ecr-cname")
                .region(self.base.region().cloned().unwrap_or(region));
            if let Some(external_id) = external_id {
                role = role.external_id(external_id);
            }
            config = config.credentials_provider(role.configure(&self.base).build().await);
        }
        let client = Client::from_conf(config.build());
        self.lock().insert(principal.clone(), client.clone());
        client
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Principal, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tls_context() -> Result<TlsContext, SetupError> {
    let mut trust = TrustStore::default();
    let path = std::env::var_os("AWS_CA_BUNDLE").filter(|p| !p.is_empty()).map(PathBuf::from);
    if let Some(path) = &path {
        let pem =
            std::fs::read(path).map_err(|source| SetupError::CaBundle { path: path.clone(), source })?;
        trust = trust.with_pem_certificate(pem);
    }
    TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|e| SetupError::Tls { path: path.unwrap_or_default(), problem: chain(&e) })
}

/// Makes of an SDK error a reason, what to do, and AWS's own words.
fn explain(principal: &Principal, error: &SdkError<GetAuthorizationTokenError>) -> TokenError {
    let credentials = find::<CredentialsError>(error).is_some();
    let (code, message) = said(error);
    // Of the calls that a token takes, the innermost that failed says how.
    let failure = find::<SdkError<AssumeRoleWithWebIdentityError>>(error)
        .map(Failure::of)
        .or_else(|| find::<SdkError<AssumeRoleError>>(error).map(Failure::of))
        .unwrap_or_else(|| Failure::of(error));
    let reason = match code.as_deref() {
        Some("ThrottlingException" | "Throttling" | "TooManyRequestsException" | "RequestLimitExceeded") => {
            Reason::Throttled
        }
        Some("RequestTimeTooSkewed" | "RequestExpired" | "RequestInTheFuture") => Reason::ClockSkew,
        // The code is that of a wrong key, too; only the words say which.
        Some("InvalidSignatureException" | "SignatureDoesNotMatch") if is_about_time(message.as_deref()) => {
            Reason::ClockSkew
        }
        Some("UnrecognizedClientException" | "InvalidSignatureException") => Reason::NoCredentials,
        Some(code) if code.contains("ExpiredToken") || code.contains("InvalidIdentityToken") => {
            Reason::NoCredentials
        }
        Some(code) if code.contains("AccessDenied") => Reason::AccessDenied,
        _ if failure == Failure::Server => Reason::ServiceError,
        Some(_) if credentials => Reason::NoCredentials,
        Some(_) => Reason::AccessDenied,
        None if failure == Failure::Answer => Reason::BadAnswer,
        None if credentials && failure != Failure::Network => Reason::NoCredentials,
        None => Reason::Unreachable,
    };
    let advice = match reason {
        Reason::Throttled => "AWS is throttling; this is tried again with back-off".to_owned(),
        Reason::ClockSkew => {
            "AWS takes the request for too old or too new: check the clock of this node".to_owned()
        }
        Reason::ServiceError => "AWS failed; this is tried again".to_owned(),
        Reason::BadAnswer | Reason::ExpiredOnArrival => {
            "the answer could not be read; is something else answering for AWS?".to_owned()
        }
        Reason::Unreachable => unreachable_advice(&principal.region.name),
        Reason::AccessDenied if !credentials => {
            "allow ecr:GetAuthorizationToken on \"*\" in the policy of this identity".to_owned()
        }
        Reason::AccessDenied | Reason::NoCredentials => match &principal.identity {
            Identity::Operator => {
                "check the role on the controller's service account (IRSA or Pod Identity)".to_owned()
            }
            Identity::Role { arn, .. } => format!(
                "check that {arn} trusts the operator's role, and the external ID; and that the operator has a role itself"
            ),
        },
    };
    let said = match code {
        Some(code) => format!("{code}: {}", message.unwrap_or_else(|| "no message".to_owned())),
        None => chain(error),
    };
    // Whoever answers for AWS may have much to say.
    let said: String = said.chars().take(1000).collect();
    TokenError { reason, problem: format!("no token for {principal}: {advice} ({said})") }
}

/// Whether AWS's words about a signature are about its time:
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html>.
fn is_about_time(message: Option<&str>) -> bool {
    message.is_some_and(|m| m.contains("Signature expired") || m.contains("Signature not yet current"))
}

/// What AWS itself says: the code and the message of the innermost service error.
fn said(error: &SdkError<GetAuthorizationTokenError>) -> (Option<String>, Option<String>) {
    let own = |meta: &ErrorMetadata| (meta.code().map(str::to_owned), meta.message().map(str::to_owned));
    let role =
        find::<SdkError<AssumeRoleError>>(error).and_then(|e| e.as_service_error()).map(|e| own(e.meta()));
    let web_identity = find::<SdkError<AssumeRoleWithWebIdentityError>>(error)
        .and_then(|e| e.as_service_error())
        .map(|e| own(e.meta()));
    role.or(web_identity).or_else(|| error.as_service_error().map(|e| own(e.meta()))).unwrap_or_default()
}

/// How a call to AWS failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// No connection, or no whole answer in time.
    Network,
    /// AWS says that it failed.
    Server,
    /// AWS says something else.
    Answer,
    /// It was not made.
    NotMade,
}

impl Failure {
    fn of<E: std::error::Error + 'static>(error: &SdkError<E>) -> Self {
        match error {
            SdkError::TimeoutError(_) => Self::Network,
            // What could not be sent for want of credentials has nothing to do with the network.
            SdkError::DispatchFailure(failure) => {
                match failure.as_connector_error().and_then(|e| find::<CredentialsError>(e)) {
                    Some(_) => Self::NotMade,
                    None => Self::Network,
                }
            }
            SdkError::ServiceError(context) if context.raw().status().as_u16() >= 500 => Self::Server,
            SdkError::ServiceError(_) | SdkError::ResponseError(_) => Self::Answer,
            _ => Self::NotMade,
        }
    }
}

/// The first error of a type in a chain of causes.
fn find<'e, E: std::error::Error + 'static>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e E> {
    std::iter::successors(Some(error), |e| e.source()).find_map(|e| e.downcast_ref())
}

fn unreachable_advice(region: &str) -> String {
    format!("AWS cannot be reached; check the route, proxy or VPC endpoint to ECR and STS in {region}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_credential_types::Credentials;
    use aws_sdk_ecr::config::SharedCredentialsProvider;
    use proptest::prelude::*;
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    #[test]
    fn debug_shows_no_token() {
        let token = Token {
            auth: "QVdTOnNlY3JldA==".to_owned().into(),
            expires_at: Timestamp::UNIX_EPOCH,
            lifetime: SignedDuration::from_hours(12),
        };
        let debug = format!("{token:?}");
        assert!(!debug.contains("QVdT") && debug.contains("1970"), "{debug}");
    }

    /// An ECR that gives one answer to whoever asks.
    fn answering(status: u16, body: Vec<u8>) -> Ecr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = [0; 16 * 1024];
            let _ = stream.read(&mut question);
            let head = format!(
                "HTTP/1.1 {status} X\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
            // Closing with something unread would take the answer back.
            let _ = stream.read(&mut question);
        });
        let keys = Credentials::new("AKIA", "secret", None, None, "test");
        let base = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(url)
            .credentials_provider(SharedCredentialsProvider::new(keys))
            .http_client(Builder::new().build_http())
            .retry_config(RetryConfig::disabled())
            .build();
        Ecr { base, clients: Mutex::default() }
    }
    fn principal() -> Principal {
        let host: crate::registry::EcrHost = "123456789012.dkr.ecr.us-east-1.amazonaws.com".parse().unwrap();
        Principal { identity: Identity::Operator, region: host.region().clone() }
    }

    fn ask(status: u16, body: Vec<u8>) -> Result<Token, TokenError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(answering(status, body).token(&principal()))
    }

    proptest! {
        /// Whatever answers for AWS: a token that can be used, or an error that is short and does not hold it.
        #[test]
        fn any_answer_is_a_usable_token_or_a_short_error(
            status in prop_oneof![Just(200u16), Just(400), Just(403), Just(500), Just(503), 200u16..600],
            token in prop_oneof![
                Just("QVdTOnNlY3JldA==".to_owned()), "[A-Za-z0-9+/=]{0,24}", "\\PC{0,20}", Just("QVdTOg==".to_owned()),
            ],
            expires in prop_oneof![Just("4102444800".to_owned()), "-?[0-9]{1,12}(\\.[0-9]{1,3})?", "[0-9]{1,30}", Just("1e300".to_owned()), Just("null".to_owned()), Just("\"x\"".to_owned())],
            kind in "(AccessDeniedException|ThrottlingException|[A-Za-z]{0,12}|#|x#y:z)",
            message in prop_oneof![4 => "\\PC{0,40}", 1 => "a{5000,9000}"],
            form in 0..6,
        ) {
            let text = serde_json::to_string(&token).unwrap();
            let body = match form {
                0 | 1 => format!(r#"{{"authorizationData":[{{"authorizationToken":{text},"expiresAt":{expires}}}]}}"#),
                2 => serde_json::json!({"__type": kind, "message": message}).to_string(),
                3 => format!(r#"{{"authorizationData":[{{"authorizationToken":{text}"#),
                4 => format!(r#"{{"authorizationData":{text}}}"#),
                _ => message.clone(),
            };
            match ask(status, body.into_bytes()) {
                Ok(answer) => {
                    prop_assert!((200..300).contains(&status) && form < 2);
                    prop_assert!(dockerconfig::check_auth(&token).is_ok());
                    prop_assert!(answer.expires_at > Timestamp::now() && answer.lifetime > SignedDuration::ZERO);
                }
                Err(error) => {
                    prop_assert!(error.problem.len() < 4096, "{} bytes", error.problem.len());
                    prop_assert!(!error.problem.contains("QVdTOnNlY3JldA"), "{}", error.problem);
                }
            }
        }
    }
}
