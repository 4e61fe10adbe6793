//! ECR.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;
use serde_json::json;

use super::Shared;
use super::credentials::{account, authenticate};
use super::fault::Fault;
use super::protocol::{ApiError, Request, json};
use crate::random;

/// What every token starts with, so that a token can be found wherever it does not belong.
pub const TOKEN_PREFIX: &str = "standin-token-";

/// A token of ECR: the password of the user `AWS`.
#[derive(Clone, PartialEq, Eq)]
pub struct IssuedToken {
    /// The password itself.
    pub token: String,
    /// The role that asked for it.
    pub role: String,
    /// The account of that role.
    pub account: String,
    /// The region that it is for.
    pub region: String,
    /// When it was issued.
    pub issued_at: SystemTime,
    /// When it expires.
    pub expires_at: SystemTime,
}

impl IssuedToken {
    /// A new token for a role.
    pub(super) fn new(
        role: &str,
        region: &str,
        issued_at: SystemTime,
        expires_at: SystemTime,
    ) -> Result<Self> {
        Ok(Self {
            token: random::secret(TOKEN_PREFIX)?,
            role: role.into(),
            account: account(role).into(),
            region: region.into(),
            issued_at,
            expires_at,
        })
    }

    /// Whether it has not expired yet.
    pub fn is_valid(&self) -> bool {
        self.expires_at > SystemTime::now()
    }
}

impl fmt::Debug for IssuedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedToken")
            .field("role", &self.role)
            .field("region", &self.region)
            .field("issued_at", &self.issued_at)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// A new token for the caller, spoiled as `fault` says.
pub(super) fn get_authorization_token(
    shared: &Shared,
    request: &Request,
    fault: Option<Fault>,
) -> Result<Response<Full<Bytes>>, ApiError> {
    let (credentials, lifetime) = {
        let state = shared.state.borrow();
        let credentials = authenticate(&state, request.operation, request.signature.as_ref())?;
        (credentials.clone(), state.token_lifetime)
    };
    let region = request.signature.as_ref().map(|signature| signature.region.clone()).unwrap_or_default();
    if fault == Some(Fault::NoToken) {
        return Ok(json(200, &json!({ "authorizationData": [] })));
    }

    let issued_at = SystemTime::now();
    let expires_at = match fault {
        Some(Fault::ExpiredToken) => issued_at - Duration::from_secs(60 * 60),
        _ => issued_at + lifetime,
    };
    let account = credentials.account().to_owned();
    let suffix = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
    let endpoint = format!("https://{account}.dkr.ecr.{region}.{suffix}");

    let token = match fault {
        Some(Fault::EmptyToken) => String::new(),
        _ => {
            let issued = IssuedToken::new(&credentials.role, &region, issued_at, expires_at)
                .map_err(|error| ApiError::new(500, "ServerException", error.to_string()))?;
            let token = issued.token.clone();
            shared.modify(|state| state.record_token(issued));
            token
        }
    };
    Ok(json(
        200,
        &json!({ "authorizationData": [{
            "authorizationToken": STANDARD.encode(format!("AWS:{token}")),
            "expiresAt": epoch_seconds(expires_at),
            "proxyEndpoint": endpoint,
        }] }),
    ))
}

/// As ECR writes it: with milliseconds.
fn epoch_seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1e3).round() / 1e3
}
