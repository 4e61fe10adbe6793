//! Credentials of assumed roles.

use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::Result;

use super::protocol::{ApiError, Operation, Signature};
use super::state::State;
use crate::random;

/// What every secret access key starts with.
pub const SECRET_KEY_PREFIX: &str = "standin-secret-key-";

/// What every session token starts with.
pub const SESSION_TOKEN_PREFIX: &str = "standin-session-";

/// Credentials of a role, as STS gives them.
#[derive(Clone)]
pub struct Credentials {
    /// Names the credentials, and is not secret.
    pub access_key_id: String,
    /// Signs requests.
    pub secret_access_key: String,
    /// Goes with every request.
    pub session_token: String,
    /// When they expire.
    pub expires_at: SystemTime,
    /// The role.
    pub role: String,
    pub(super) session_name: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("access_key_id", &self.access_key_id)
            .field("expires_at", &self.expires_at)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    pub(super) fn new(role: &str, session_name: &str, lifetime: Duration) -> Result<Self> {
        Ok(Self {
            access_key_id: format!("ASIA{}", random::id()?),
            secret_access_key: random::secret(SECRET_KEY_PREFIX)?,
            session_token: random::secret(SESSION_TOKEN_PREFIX)?,
            expires_at: SystemTime::now() + lifetime,
            role: role.into(),
            session_name: session_name.into(),
        })
    }

    /// The account of the role.
    pub(super) fn account(&self) -> &str {
        account(&self.role)
    }

    /// The caller, as messages and answers name it.
    pub(super) fn session_arn(&self) -> String {
        let partition = self.role.split(':').nth(1).unwrap_or("aws");
        let name = self.role.rsplit('/').next().unwrap_or_default();
        format!("arn:{partition}:sts::{}:assumed-role/{name}/{}", self.account(), self.session_name)
    }
}

/// The account of a role: the fifth part of its ARN.
pub(super) fn account(role: &str) -> &str {
    role.split(':').nth(4).unwrap_or_default()
}

/// Whose request this is, if it is someone's.
pub(super) fn authenticate<'a>(
    state: &'a State,
    operation: Operation,
    signature: Option<&Signature>,
) -> Result<&'a Credentials, ApiError> {
    // The two services name the same refusals differently.
    let (unknown, expired, status) = match operation {
        Operation::GetAuthorizationToken => ("UnrecognizedClientException", "ExpiredTokenException", 400),
        _ => ("InvalidClientTokenId", "ExpiredToken", 403),
    };
    let Some(signature) = signature else {
        let code = match operation {
            Operation::GetAuthorizationToken => "MissingAuthenticationTokenException",
            _ => "MissingAuthenticationToken",
        };
        return Err(ApiError::new(status, code, "Missing Authentication Token"));
    };
    if signature.service != operation.service() {
        let (given, wanted) = (&signature.service, operation.service());
        let message = format!("Credential should be scoped to correct service: '{wanted}', not '{given}'.");
        return Err(ApiError::new(status, "SignatureDoesNotMatch", message));
    }
    state
        .credentials(&signature.access_key_id)
        .filter(|credentials| Some(&credentials.session_token) == signature.session_token.as_ref())
        .ok_or_else(|| {
            ApiError::new(status, unknown, "The security token included in the request is invalid.")
        })
        .and_then(|credentials| {
            if credentials.expires_at > SystemTime::now() {
                Ok(credentials)
            } else {
                Err(ApiError::new(status, expired, "The security token included in the request is expired"))
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(credentials: &Credentials, service: &str) -> Signature {
        Signature {
            access_key_id: credentials.access_key_id.clone(),
            region: "us-east-1".into(),
            service: service.into(),
            session_token: Some(credentials.session_token.clone()),
        }
    }

    #[test]
    fn only_issued_and_unexpired_keys_are_someone() -> Result<()> {
        let mut state = State::default();
        let role = "arn:aws:iam::123456789012:role/path/pull";
        let good = state.issue_credentials(role, "session", Duration::from_secs(60))?;
        let old = state.issue_credentials(role, "session", Duration::ZERO)?;
        let operation = Operation::GetAuthorizationToken;
        let code = |signature: Option<Signature>| {
            authenticate(&state, operation, signature.as_ref()).err().map(|error| error.code)
        };

        assert_eq!(code(Some(signature(&good, "ecr"))), None);
        assert_eq!(code(None), Some("MissingAuthenticationTokenException"));
        assert_eq!(code(Some(signature(&good, "sts"))), Some("SignatureDoesNotMatch"));
        assert_eq!(code(Some(signature(&old, "ecr"))), Some("ExpiredTokenException"));
        let unknown = Credentials::new(role, "session", Duration::from_secs(60))?;
        assert_eq!(code(Some(signature(&unknown, "ecr"))), Some("UnrecognizedClientException"));
        let mixed = Signature { session_token: None, ..signature(&good, "ecr") };
        assert_eq!(code(Some(mixed)), Some("UnrecognizedClientException"));

        assert_eq!(good.session_arn(), "arn:aws:sts::123456789012:assumed-role/pull/session");
        Ok(())
    }

    #[test]
    fn debug_shows_no_secret() -> Result<()> {
        let debug = format!("{:?}", Credentials::new("role", "session", Duration::ZERO)?);
        assert!(!debug.contains(SECRET_KEY_PREFIX) && !debug.contains(SESSION_TOKEN_PREFIX), "{debug}");
        Ok(())
    }
}
