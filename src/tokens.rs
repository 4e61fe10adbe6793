//! Tokens: one for each principal that an alias needs, refreshed at about half of its life.
//!
//! A failure never takes a good token away: it stays until it expires, and the next attempts follow with exponential
//! back-off and jitter.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use jiff::{SignedDuration, Timestamp};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use crate::{
    alias::Principal,
    ecr::{Ecr, Reason, Token, TokenError},
    watch::Aliases,
};

/// A token is refreshed when less than this share of its life is left, give or take the jitter.
const REFRESH_AT: f64 = 0.5;
/// By how much of its life a refresh is brought forward at random, so that clusters do not ask in step.
const JITTER: f64 = 0.1;
/// A Secret is due when its token has less than this share of a life left. Every refresh makes the Secrets due.
pub const DUE_AT: f64 = REFRESH_AT + JITTER;
/// The longest pause between two attempts while a good token is left; without one it is a fifth of this.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// The shortest pause between two calls for one principal, whatever AWS says of expiry.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// The longest sleep, so that a clock that was set, or a machine that was suspended, is noticed.
const MAX_SLEEP: Duration = Duration::from_secs(300);

/// What is known of each principal's token.
pub type Tokens = BTreeMap<Principal, TokenState>;

/// What is known of a principal's token.
#[derive(Clone, Debug, Default)]
pub struct TokenState {
    /// The last good token; it may have expired since.
    pub token: Option<Arc<Token>>,
    /// What the last attempt said, if it failed.
    pub error: Option<TokenError>,
    failures: u32,
    next: Option<Instant>,
    asking: bool,
}

/// Keeps a token for each principal that an alias needs, for ever.
pub async fn keep(
    ecr: Arc<Ecr>,
    mut aliases: watch::Receiver<Arc<Aliases>>,
    tokens: watch::Sender<Arc<Tokens>>,
    metrics: TokenMetrics,
) {
    let mut state = Tokens::new();
    let mut asking = FuturesUnordered::new();
    let mut changed = true;
    loop {
        let needed: BTreeSet<Principal> =
            aliases.borrow_and_update().accepted.aliases.iter().filter_map(|a| a.principal()).collect();
        let known = state.len();
        state.retain(|principal, _| needed.contains(principal));
        changed |= state.len() != known;
        ecr.retain(|principal| needed.contains(principal));
        for principal in needed {
            let entry = state.entry(principal.clone()).or_default();
            if !entry.asking && entry.is_due(Instant::now(), Timestamp::now()) {
                entry.asking = true;
                let ecr = ecr.clone();
                asking.push(async move {
                    let result = ecr.token(&principal).await;
                    (principal, result)
                });
            }
        }
        if std::mem::take(&mut changed) {
            metrics.observe(&state);
            tokens.send_replace(Arc::new(state.clone()));
        }
        let next = state.values().filter(|s| !s.asking).filter_map(|s| s.next).min();
        let next = next.map_or(MAX_SLEEP, |at| at.saturating_duration_since(Instant::now()).min(MAX_SLEEP));
        tokio::select! {
            alive = aliases.changed() => if alive.is_err() { return },
            Some((principal, result)) = asking.next() => {
                metrics.count(&result);
                if let Some(entry) = state.get_mut(&principal) {
                    entry.record(&principal, result, Timestamp::now());
                    changed = true;
                }
            }
            () = tokio::time::sleep(next) => {}
        }
    }
}

impl TokenState {
    /// The token, unless it has expired.
    #[must_use]
    pub fn usable(&self, now: Timestamp) -> Option<&Arc<Token>> {
        self.token.as_ref().filter(|token| token.expires_at > now)
    }

    /// Whether it is time to ask. The clock of the machine may have been set, and a machine that was suspended has not
    /// counted the time: a token that is well past its half is due whatever the timer says.
    fn is_due(&self, now: Instant, clock: Timestamp) -> bool {
        let late = self.failures == 0
            && self.token.as_ref().is_some_and(|token| {
                token.expires_at.duration_since(clock) < token.lifetime.mul_f64(1.0 - REFRESH_AT - JITTER)
            });
        late || self.next.is_none_or(|next| next <= now)
    }

    fn record(&mut self, principal: &Principal, result: Result<Token, TokenError>, now: Timestamp) {
        self.asking = false;
        match result {
            Ok(token) => {
                let pause = refresh_after(token.lifetime, fastrand::f64());
                info!(%principal, expires_at = %token.expires_at, refresh_in_s = pause.as_secs(), "new token");
                *self = Self {
                    token: Some(Arc::new(token)),
                    next: Some(Instant::now() + pause),
                    ..Self::default()
                };
            }
            Err(error) => {
                let left = self.usable(now).map(|token| token.expires_at.duration_since(now));
                let pause = back_off(self.failures, left, fastrand::f64());
                warn!(%principal, error = %error, retry_in_s = pause.as_secs(), "token refresh failed");
                self.failures = self.failures.saturating_add(1);
                self.error = Some(error);
                self.next = Some(Instant::now() + pause);
            }
        }
    }
}

/// When to refresh a token that is valid for `lifetime`. `random` is in 0..1.
fn refresh_after(lifetime: SignedDuration, random: f64) -> Duration {
    let life = Duration::try_from(lifetime).unwrap_or_default();
    life.mul_f64(1.0 - REFRESH_AT - JITTER * random).max(MIN_PAUSE)
}

/// When to try again after `failures` earlier ones. While a good token is left, attempts come at least ten times in
/// what is left of it, so that they grow faster as its end comes near. `random` is in 0..1.
fn back_off(failures: u32, left: Option<SignedDuration>, random: f64) -> Duration {
    let exponential = MIN_PAUSE.saturating_mul(2u32.saturating_pow(failures.min(16)));
    let ceiling = match left.and_then(|left| Duration::try_from(left).ok()) {
        Some(left) => (left / 10).clamp(MIN_PAUSE, MAX_BACKOFF),
        None => MAX_BACKOFF / 5,
    };
    // Half fixed, half at random: no two replicas or clusters in step, and never at once.
    exponential.min(ceiling).mul_f64(0.75 + 0.5 * random).max(MIN_PAUSE)
}

/// Metrics of tokens.
#[derive(Clone, Debug, Default)]
pub struct TokenMetrics {
    refreshes: Family<Outcome, Counter>,
    earliest_expiry: Gauge,
    principals: Gauge,
    missing: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: OutcomeValue,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum OutcomeValue {
    Success,
    Failure(Reason),
}

impl EncodeLabelValue for OutcomeValue {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>) -> std::fmt::Result {
        match self {
            Self::Success => "Success".encode(encoder),
            Self::Failure(reason) => reason.encode(encoder),
        }
    }
}

impl TokenMetrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // Every outcome is there from the start, so that a rate has a zero to rise from.
        for outcome in Reason::ALL.into_iter().map(OutcomeValue::Failure).chain([OutcomeValue::Success]) {
            let _ = metrics.refreshes.get_or_create(&Outcome { outcome });
        }
        registry.register(
            "token_refreshes",
            "Attempts to get an ECR token, by what came of them",
            metrics.refreshes.clone(),
        );
        registry.register(
            "token_expiry_timestamp_seconds",
            "When the first of the tokens at hand expires, in seconds since 1970; 0 if there is none",
            metrics.earliest_expiry.clone(),
        );
        registry.register(
            "token_principals",
            "Identities and regions that need a token; 0 unless this replica is the leader",
            metrics.principals.clone(),
        );
        registry.register(
            "token_principals_missing",
            "Identities and regions that need a token and have none that is valid",
            metrics.missing.clone(),
        );
        metrics
    }

    fn count(&self, result: &Result<Token, TokenError>) {
        let outcome = match result {
            Ok(_) => OutcomeValue::Success,
            Err(error) => OutcomeValue::Failure(error.reason),
        };
        self.refreshes.get_or_create(&Outcome { outcome }).inc();
    }

    /// Forgets what it showed: this replica does not lead any more.
    pub fn clear(&self) {
        self.observe(&Tokens::new());
    }

    fn observe(&self, state: &Tokens) {
        let now = Timestamp::now();
        let expiry = state.values().filter_map(|s| s.token.as_ref()).map(|t| t.expires_at.as_second()).min();
        self.earliest_expiry.set(expiry.unwrap_or_default());
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.principals.set(count(state.len()));
        self.missing.set(count(state.values().filter(|s| s.usable(now).is_none()).count()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_refresh_comes_at_about_half_of_a_life(seconds in 2i64..1_000_000, random in 0.0..1.0) {
            let lifetime = SignedDuration::from_secs(seconds);
            let share = refresh_after(lifetime, random).as_secs_f64() / lifetime.as_secs_f64();
            prop_assert!(share <= REFRESH_AT || seconds <= 2, "{share}");
            prop_assert!(share >= REFRESH_AT - JITTER, "{share}");
            // Whatever the jitter, the Secrets that hold this token are due by then.
            prop_assert!(1.0 - share <= DUE_AT + 1e-9);
        }

        #[test]
        fn no_answer_of_aws_makes_a_hot_loop(
            failures in 0u32..u32::MAX, left in proptest::option::of(-10_000i64..1_000_000), random in 0.0..1.0,
        ) {
            let pause = back_off(failures, left.map(SignedDuration::from_secs), random);
            prop_assert!(pause >= MIN_PAUSE);
            prop_assert!(pause <= MAX_BACKOFF.mul_f64(1.25));
            prop_assert!(refresh_after(SignedDuration::from_secs(left.unwrap_or(-1)), random) >= MIN_PAUSE);
        }
    }

    #[test]
    fn back_off_grows_and_quickens_near_expiry() {
        let pause =
            |failures, left: Option<i64>| back_off(failures, left.map(SignedDuration::from_secs), 0.5);
        assert_eq!(pause(0, Some(20_000)), Duration::from_secs(1));
        assert_eq!(pause(4, Some(20_000)), Duration::from_secs(16));
        assert_eq!(pause(20, Some(20_000)), Duration::from_secs(300));
        assert_eq!(pause(20, Some(100)), Duration::from_secs(10));
        assert_eq!(pause(20, Some(3)), Duration::from_secs(1));
        assert_eq!(pause(20, None), Duration::from_secs(60));
    }

    #[test]
    fn a_failure_keeps_the_last_good_token() {
        let now = Timestamp::now();
        let principal = Principal {
            identity: crate::alias::Identity::Operator,
            region: "123456789012.dkr.ecr.us-east-1.amazonaws.com"
                .parse::<crate::registry::EcrHost>()
                .unwrap()
                .region()
                .clone(),
        };
        let lifetime = SignedDuration::from_hours(12);
        let token = Token { auth: "QVdTOng=".to_owned().into(), expires_at: now + lifetime, lifetime };
        let mut state = TokenState::default();
        state.record(&principal, Ok(token), now);
        let failed = TokenError { reason: Reason::Throttled, problem: "slow down".to_owned() };
        state.record(&principal, Err(failed.clone()), now);
        assert!(state.usable(now).is_some());
        assert_eq!(state.error, Some(failed));
        assert!(state.usable(now + SignedDuration::from_hours(13)).is_none());
    }
}
