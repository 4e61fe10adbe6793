//! What the stand-in knows: roles, credentials, tokens, calls and faults.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use anyhow::Result;

use super::credentials::Credentials;
use super::ecr::IssuedToken;
use super::fault::{Fault, Scope};
use super::protocol::Operation;

/// One call that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What was called.
    pub operation: Operation,
    /// The role to be assumed, or the role that calls ECR if the caller is known.
    pub role: Option<String>,
    /// The region that the request is signed for.
    pub region: Option<String>,
    /// `OK`, the code of the error, or the name of the fault that there was instead of an answer.
    pub answer: String,
    /// When.
    pub at: SystemTime,
}

/// Everything that happened so far, for [`AwsStandIn::wait_for`](super::AwsStandIn::wait_for).
pub struct State {
    pub(super) token_lifetime: Duration,
    pub(super) max_session_lifetime: Duration,
    pub(super) web_identity_ahead: Duration,
    pub(super) faults: Vec<(Scope, Fault)>,
    roles: HashMap<String, Trust>,
    credentials: HashMap<String, Credentials>,
    tokens: Vec<IssuedToken>,
    calls: Vec<Call>,
}

/// Whom a role trusts.
#[derive(Debug, Default)]
pub(super) struct Trust {
    pub(super) subjects: Vec<String>,
    pub(super) roles: Vec<String>,
    pub(super) external_id: Option<String>,
}

impl Default for State {
    fn default() -> Self {
        let twelve_hours = Duration::from_secs(12 * 60 * 60);
        Self {
            token_lifetime: twelve_hours,
            max_session_lifetime: twelve_hours,
            web_identity_ahead: Duration::ZERO,
            faults: Vec::new(),
            roles: HashMap::new(),
            credentials: HashMap::new(),
            tokens: Vec::new(),
            calls: Vec::new(),
        }
    }
}

impl State {
    /// All calls so far, oldest first.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// The number of calls in `scope`.
    pub fn count(&self, scope: &Scope) -> usize {
        self.calls
            .iter()
            .filter(|call| scope.contains(call.operation, call.role.as_deref(), call.region.as_deref()))
            .count()
    }

    /// All tokens of ECR so far, oldest first.
    pub fn tokens(&self) -> &[IssuedToken] {
        &self.tokens
    }

    /// The newest token for a role and region that is still valid.
    pub fn current_token(&self, role: &str, region: &str) -> Option<&str> {
        self.tokens
            .iter()
            .rev()
            .find(|token| token.role == role && token.region == region && token.is_valid())
            .map(|token| token.token.as_str())
    }

    /// Whether a registry would accept this token now.
    pub fn is_valid(&self, token: &str) -> bool {
        self.tokens.iter().any(|issued| issued.token == token && issued.is_valid())
    }

    pub(super) fn fault(
        &self,
        operation: Operation,
        role: Option<&str>,
        region: Option<&str>,
    ) -> Option<Fault> {
        self.faults
            .iter()
            .rev()
            .find(|(scope, _)| scope.contains(operation, role, region))
            .map(|(_, fault)| *fault)
    }

    pub(super) fn add_role(&mut self, arn: &str) {
        self.roles.insert(arn.into(), Trust::default());
    }

    pub(super) fn role_mut(&mut self, arn: &str) -> &mut Trust {
        self.roles.entry(arn.into()).or_default()
    }

    pub(super) fn trust(&self, arn: &str) -> Option<&Trust> {
        self.roles.get(arn)
    }

    pub(super) fn credentials(&self, access_key_id: &str) -> Option<&Credentials> {
        self.credentials.get(access_key_id)
    }

    pub(super) fn issue_credentials(
        &mut self,
        role: &str,
        session: &str,
        lifetime: Duration,
    ) -> Result<Credentials> {
        let credentials = Credentials::new(role, session, lifetime)?;
        self.credentials.insert(credentials.access_key_id.clone(), credentials.clone());
        Ok(credentials)
    }

    pub(super) fn record_token(&mut self, token: IssuedToken) {
        self.tokens.push(token);
    }

    pub(super) fn record_call(&mut self, call: Call) {
        self.calls.push(call);
    }
}
