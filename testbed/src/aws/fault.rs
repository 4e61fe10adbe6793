//! What can be made to go wrong.

use super::protocol::Operation;

/// A way to misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Too many requests, as the service itself puts it.
    Throttle,
    /// Status 500.
    ServerError,
    /// The caller may not do this.
    AccessDenied,
    /// The request was signed too long ago, by AWS's clock.
    ClockSkew,
    /// No answer, until the caller gives up.
    Hang,
    /// An answer that is neither XML nor JSON.
    MalformedBody,
    /// An answer of [`HUGE_BODY`](Self::HUGE_BODY) bytes.
    HugeBody,
    /// The connection is closed without an answer.
    CloseConnection,
    /// A token that expired an hour ago. Only ECR has tokens; other operations answer as usual.
    ExpiredToken,
    /// A user without a password: a token of length zero. Only of ECR.
    EmptyToken,
    /// A list of tokens with nothing in it. Only of ECR.
    NoToken,
}

impl Fault {
    /// The size of a [`Fault::HugeBody`].
    pub const HUGE_BODY: usize = 64 << 20;
}

/// Some calls: all, or those to an operation, of a role, in a region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    operation: Option<Operation>,
    role: Option<String>,
    region: Option<String>,
}

impl Scope {
    /// Every call.
    pub fn all() -> Self {
        Self::default()
    }

    /// Calls to one operation.
    pub fn of(operation: Operation) -> Self {
        Self { operation: Some(operation), ..Self::default() }
    }

    /// Of these only the calls that concern a role: the role to be assumed, or the role that calls ECR.
    pub fn role(self, arn: &str) -> Self {
        Self { role: Some(arn.into()), ..self }
    }

    /// Of these only the calls in a region. `AssumeRoleWithWebIdentity` is not signed and has none.
    pub fn region(self, region: &str) -> Self {
        Self { region: Some(region.into()), ..self }
    }

    /// Whether a call is meant.
    pub(super) fn contains(&self, operation: Operation, role: Option<&str>, region: Option<&str>) -> bool {
        self.operation.is_none_or(|wanted| wanted == operation)
            && self.role.as_deref().is_none_or(|wanted| Some(wanted) == role)
            && self.region.as_deref().is_none_or(|wanted| Some(wanted) == region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_all_of_its_parts() {
        let scope = Scope::of(Operation::AssumeRole).role("a").region("r");
        assert!(scope.contains(Operation::AssumeRole, Some("a"), Some("r")));
        assert!(!scope.contains(Operation::AssumeRole, Some("a"), Some("other")));
        assert!(!scope.contains(Operation::AssumeRole, None, Some("r")));
        assert!(!scope.contains(Operation::GetAuthorizationToken, Some("a"), Some("r")));
        assert!(Scope::all().contains(Operation::GetAuthorizationToken, None, None));
    }
}
