//! A stand-in for the two services of AWS that pull secrets need: STS and ECR.
//!
//! It speaks the real wire protocols to the real SDK (the query protocol of STS with its XML, JSON 1.1 of
//! ECR) and is as strict as AWS where a mistake of ours would show: a web identity token must carry the
//! signature of the cluster, the right audience and a subject that the role trusts; an access key must have
//! been issued and not have expired; an external ID must match. The signature of a request is not computed
//! again: the access key and the session token in it say who calls.

mod credentials;
mod ecr;
mod fault;
mod issuer;
mod protocol;
mod server;
mod state;
mod sts;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use tokio::sync::watch;
use tokio::time::timeout;

pub use credentials::{Credentials, SECRET_KEY_PREFIX, SESSION_TOKEN_PREFIX};
pub use ecr::{IssuedToken, TOKEN_PREFIX};
pub use fault::{Fault, Scope};
pub use issuer::Issuer;
pub use protocol::Operation;
pub use state::{Call, State};

use crate::background::Background;
use crate::install_crypto_provider;
use crate::node::Machine;

/// The region of [`AwsStandIn::env`].
pub const REGION: &str = "us-east-1";

/// The running stand-in, on a thread of its own; dropping it ends it.
pub struct AwsStandIn {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: Background,
}

/// Tells a registry whose token it is that a client shows.
#[derive(Clone)]
pub struct Tokens(Arc<Shared>);

impl Tokens {
    /// The token as it was issued, if it ever was.
    pub fn find(&self, token: &str) -> Option<IssuedToken> {
        self.0.state.borrow().tokens().iter().find(|issued| issued.token == token).cloned()
    }
}

/// What the handle and the server have in common.
struct Shared {
    issuer: Issuer,
    state: watch::Sender<State>,
}

impl AwsStandIn {
    /// Starts a stand-in on a free port of 127.0.0.1 that trusts the web identity tokens of `issuer`.
    pub fn start(issuer: Issuer) -> Result<Self> {
        Self::serve(issuer, TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?)
    }

    /// The same on a machine, so that pods reach it.
    pub fn start_on(issuer: Issuer, machine: &Machine) -> Result<Self> {
        let bind = || TcpListener::bind((Machine::ADDRESS, 0)).context("cannot listen");
        Self::serve(issuer, machine.within_network(bind)?)
    }

    fn serve(issuer: Issuer, listener: TcpListener) -> Result<Self> {
        install_crypto_provider();
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { issuer, state: watch::Sender::new(State::default()) });
        let server = Background::spawn("aws-stand-in", server::serve(listener, Arc::clone(&shared)))?;
        Ok(Self { address, shared, _server: server })
    }

    /// Where both services are served.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The environment that makes a process use this instead of AWS, and nothing of the developer's own.
    pub fn env(&self) -> Vec<(String, String)> {
        let local = "127.0.0.1,localhost";
        [
            ("AWS_ENDPOINT_URL", self.url().as_str()),
            ("AWS_REGION", REGION),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
            ("NO_PROXY", local),
            ("no_proxy", local),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into()
    }

    /// The same for a pod that has a role by IRSA: the file holds its service account token.
    pub fn env_web_identity(&self, role: &str, token_file: &Path) -> Vec<(String, String)> {
        let mut env = self.env();
        env.push(("AWS_ROLE_ARN".into(), role.into()));
        env.push(("AWS_WEB_IDENTITY_TOKEN_FILE".into(), token_file.display().to_string()));
        env
    }

    /// The same for a process that holds credentials from [`issue_credentials`](Self::issue_credentials).
    pub fn env_credentials(&self, credentials: &Credentials) -> Vec<(String, String)> {
        let mut env = self.env();
        env.push(("AWS_ACCESS_KEY_ID".into(), credentials.access_key_id.clone()));
        env.push(("AWS_SECRET_ACCESS_KEY".into(), credentials.secret_access_key.clone()));
        env.push(("AWS_SESSION_TOKEN".into(), credentials.session_token.clone()));
        env
    }

    /// Registers a role, such as `arn:aws:iam::123456789012:role/ecr-pull`, which trusts nobody yet.
    /// Registering it again starts over.
    pub fn role(&self, arn: &str) -> Role<'_> {
        self.shared.state.send_modify(|state| state.add_role(arn));
        Role { aws: self, arn: arn.into() }
    }

    /// Credentials of a role without anyone assuming it, as an instance profile hands them out.
    pub fn issue_credentials(&self, role: &str, lifetime: Duration) -> Result<Credentials> {
        self.shared.modify(|state| state.issue_credentials(role, "testbed", lifetime))
    }

    /// A token of ECR, as `aws ecr get-login-password` prints it for someone who has the role.
    pub fn login_password(&self, role: &str, lifetime: Duration) -> Result<String> {
        let now = SystemTime::now();
        let issued = IssuedToken::new(role, REGION, now, now + lifetime)?;
        let token = issued.token.clone();
        self.shared.modify(|state| state.record_token(issued));
        Ok(token)
    }

    /// How long tokens of ECR live from now on; twelve hours by default.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.shared.state.send_modify(|state| state.token_lifetime = lifetime);
    }

    /// The longest that credentials of an assumed role live from now on, whatever the caller asks for.
    pub fn set_max_session_lifetime(&self, lifetime: Duration) {
        self.shared.state.send_modify(|state| state.max_session_lifetime = lifetime);
    }

    /// Takes web identity tokens for expired that are good for less than this, as if so much time had passed.
    pub fn age_web_identities(&self, by: Duration) {
        self.shared.state.send_modify(|state| state.web_identity_ahead = by);
    }

    /// Misbehaves in calls of `scope`, until [`heal`](Self::heal). Of several faults the newest counts.
    pub fn inject(&self, fault: Fault, scope: Scope) {
        self.shared.state.send_modify(|state| state.faults.push((scope, fault)));
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.shared.state.send_modify(|state| state.faults.clear());
    }

    /// All calls so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.state.borrow().calls().to_vec()
    }

    /// The number of calls in `scope` so far.
    pub fn count(&self, scope: &Scope) -> usize {
        self.shared.state.borrow().count(scope)
    }

    /// The newest token of ECR for a role and region that is still valid.
    pub fn current_token(&self, role: &str, region: &str) -> Option<String> {
        self.shared.state.borrow().current_token(role, region).map(str::to_owned)
    }

    /// Whether a registry would accept this token now.
    pub fn is_valid(&self, token: &str) -> bool {
        self.shared.state.borrow().is_valid(token)
    }

    /// What a registry knows of tokens.
    pub fn tokens(&self) -> Tokens {
        Tokens(Arc::clone(&self.shared))
    }

    /// All tokens of ECR so far, oldest first, valid or not.
    pub fn all_tokens(&self) -> Vec<IssuedToken> {
        self.shared.state.borrow().tokens().to_vec()
    }

    /// Waits until `condition` holds; an error tells the calls so far if it does not within `limit`.
    pub async fn wait_for(&self, mut condition: impl FnMut(&State) -> bool, limit: Duration) -> Result<()> {
        let mut state = self.shared.state.subscribe();
        let waited =
            timeout(limit, state.wait_for(|state| condition(state))).await.map(|result| result.is_ok());
        if waited != Ok(true) {
            anyhow::bail!("AWS did not see what was waited for within {limit:?}; calls: {:#?}", self.calls());
        }
        Ok(())
    }
}

/// A registered role, to say whom it trusts.
pub struct Role<'a> {
    aws: &'a AwsStandIn,
    arn: String,
}

impl Role<'_> {
    /// Trusts a web identity, such as `system:serviceaccount:NAMESPACE:NAME`.
    pub fn trusts_subject(self, subject: &str) -> Self {
        self.aws.shared.state.send_modify(|state| state.role_mut(&self.arn).subjects.push(subject.into()));
        self
    }

    /// Trusts another role to assume this one.
    pub fn trusts_role(self, arn: &str) -> Self {
        self.aws.shared.state.send_modify(|state| state.role_mut(&self.arn).roles.push(arn.into()));
        self
    }

    /// Demands this external ID of every role that assumes this one.
    pub fn external_id(self, external_id: &str) -> Self {
        self.aws
            .shared
            .state
            .send_modify(|state| state.role_mut(&self.arn).external_id = Some(external_id.into()));
        self
    }
}

impl Shared {
    /// Changes the state, and tells everyone who waits for it.
    fn modify<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut change = Some(change);
        let mut result = None;
        self.state.send_modify(|state| result = change.take().map(|change| change(state)));
        match result {
            Some(result) => result,
            // `send_modify` calls its closure exactly once.
            None => unreachable!("the state was not modified"),
        }
    }
}
