//! The webhook: HTTPS in front of the decision. Body → [`review::parse`] → [`mutate`] → answer.
//!
//! Nothing on this path asks the network or knows of AWS.

use std::{
    io,
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::{
    extract::{Request as HttpRequest, State},
    http::{
        HeaderValue, StatusCode, Version,
        header::{CONNECTION, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
    routing::{MethodRouter, post},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use rustls::ServerConfig;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    admin::Readiness,
    matching::FailurePolicy,
    mutate::{Mutation, Verdict, mutate, names_stranger},
    review::{self, BadReview, Operation, Request, answer},
    server::{self, Limits, ServerMetrics},
    table::{AliasTable, HostTable},
    watch::Aliases,
};

/// How the webhook answers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of the pull secret.
    pub pull_secret: String,
    /// Count, log and warn, but patch nothing.
    pub audit: bool,
    /// What the API server does when it cannot ask; decides how a pod of an unresolved alias is answered.
    pub failure_policy: FailurePolicy,
}

/// The webhook.
#[derive(Debug)]
pub struct Webhook {
    table: Arc<ArcSwap<AliasTable>>,
    /// Changes after the table does.
    updates: watch::Receiver<Arc<Aliases>>,
    settings: Settings,
    /// What is said to who debugs a pod whose credentials are not ours.
    lacks_pull_secret: String,
    limits: Limits,
    /// The bytes that requests may hold that wait for an alias.
    waiting: Semaphore,
    metrics: Metrics,
    server_metrics: ServerMetrics,
}

/// How long a pod waits at the most that came ahead of the alias that it names.
const CATCH_UP: Duration = Duration::from_secs(1);

/// What a pod is told that came ahead of the alias that it names.
const NOT_KNOWN_YET: &str =
    "the pod names a RegistryAlias that this replica does not know yet, or that was just deleted; try again";

/// An answer: a status and a JSON body, or a status and the text of an error.
type Answer = Result<Vec<u8>, (StatusCode, String)>;

impl Webhook {
    /// A webhook that decides with what `table` holds at the time. `updates` changes after the table does.
    #[must_use]
    pub fn new(
        table: Arc<ArcSwap<AliasTable>>,
        updates: watch::Receiver<Arc<Aliases>>,
        settings: Settings,
        limits: Limits,
        registry: &mut Registry,
    ) -> Arc<Self> {
        let metrics = Metrics::new(registry);
        let rejected = metrics.admissions[Outcome::Rejected as usize].clone();
        let lacks_pull_secret = warning(&format!(
            "ecr-cname: the pod has no pull secret {:?}, and an existing pod cannot be given one: the image can be pulled only with \
             credentials of the node or of the pod's own",
            settings.pull_secret
        ));
        Arc::new(Self {
            table,
            updates,
            settings,
            lacks_pull_secret,
            waiting: Semaphore::new(limits.memory / 4),
            limits,
            metrics,
            server_metrics: ServerMetrics::new(registry, rejected),
        })
    }

    /// The one route: `POST /mutate/GROUP/DIGEST`, as [`crate::matching`] registers it.
    pub fn route(self: Arc<Self>, readiness: Readiness) -> MethodRouter {
        post(admit).with_state((self, readiness))
    }

    /// Answers one request that came for a group of aliases, from a webhook entry with that digest.
    ///
    /// # Errors
    /// A 4xx status with a text that says what is wrong with the body.
    pub fn answer(&self, group: &str, digest: &str, request: Result<Request<'_>, BadReview>) -> Answer {
        let (outcome, answer) = match request {
            Ok(request) => {
                let (outcome, answer) = self.decide(group, digest, &request);
                (outcome, Ok(answer))
            }
            Err(error) => (Outcome::BadRequest, Err((StatusCode::BAD_REQUEST, error.to_string()))),
        };
        self.metrics.count(outcome);
        answer
    }

    /// Waits, for a moment, until this replica knows every alias that a new pod names: the API server learns of an alias by a
    /// watch of its own, which may be the faster one. `bytes` is the size of the body, which is held meanwhile.
    async fn catch_up(&self, group: &str, digest: &str, request: &Request<'_>, bytes: usize) {
        if !self.is_behind(group, digest, request) {
            return;
        }
        // Those that wait must leave room for those that need not.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(_waiting) = self.waiting.try_acquire_many(bytes) else { return };
        let mut updates = self.updates.clone();
        let catching_up = async {
            loop {
                updates.mark_unchanged();
                if !self.is_behind(group, digest, request) || updates.changed().await.is_err() {
                    return;
                }
            }
        };
        // Without success, the answer says so.
        let _ = tokio::time::timeout(CATCH_UP.min(self.limits.time), catching_up).await;
    }

    /// Whether the API server may know an alias that this replica does not, and this very pod may name it.
    fn is_behind(&self, group: &str, digest: &str, request: &Request<'_>) -> bool {
        if request.operation != Operation::Create {
            return false;
        }
        let table = self.table.load();
        let of_hosts = |hosts: &HostTable| !hosts.agrees_with(digest) && names_stranger(request, hosts);
        table.group(group).is_none_or(of_hosts)
    }

    fn decide(&self, group: &str, digest: &str, request: &Request<'_>) -> (Outcome, Vec<u8>) {
        let table = self.table.load();
        let Some(hosts) = table.group(group) else {
            // The API server knows an alias that we do not know yet, or no longer. Only a new pod may be refused.
            if request.operation != Operation::Create {
                return (Outcome::Untouched, answer::allow(&request.uid, None, None));
            }
            return self.refuse(request, NOT_KNOWN_YET.to_owned());
        };
        match mutate(request, hosts, &self.settings.pull_secret) {
            // The API server sent it because it names an alias, so this replica is behind, or the API server is.
            Verdict::Unknown if !hosts.agrees_with(digest) => self.refuse(request, NOT_KNOWN_YET.to_owned()),
            Verdict::Untouched | Verdict::Unknown => {
                (Outcome::Untouched, answer::allow(&request.uid, None, None))
            }
            Verdict::Unresolved { alias, image } => self.refuse(
                request,
                format!(
                    "{}: image {:?} names RegistryAlias {alias:?}, whose registry is not resolved: \
                     see the condition Resolved in `kubectl describe registryalias {alias}`",
                    field(image),
                    image.reference
                ),
            ),
            Verdict::Mutate(mutation) if self.settings.audit => {
                let warning = audit_warning(&mutation);
                info!(pod = %PodName(request), warning, "audit: a pod would be rewritten");
                (Outcome::Audited, answer::allow(&request.uid, None, Some(&warning)))
            }
            Verdict::Mutate(mutation) => {
                debug!(pod = %PodName(request), images = mutation.edits.len(), "rewritten");
                let warning = mutation.lacks_pull_secret.then_some(&*self.lacks_pull_secret);
                (Outcome::Rewritten, answer::allow(&request.uid, Some(&mutation), warning))
            }
        }
    }

    /// Refuses a pod that would otherwise stay in `ErrImagePull` for ever; its controller tries again. Where the user
    /// prefers `Ignore`, or only audits, it passes with a warning.
    fn refuse(&self, request: &Request<'_>, message: String) -> (Outcome, Vec<u8>) {
        let message = format!("ecr-cname: {message}");
        if self.settings.audit || self.settings.failure_policy == FailurePolicy::Ignore {
            warn!(pod = %PodName(request), message, "let through");
            return (Outcome::LetThrough, answer::allow(&request.uid, None, Some(&warning(&message))));
        }
        warn!(pod = %PodName(request), message, "refused");
        (Outcome::Denied, answer::deny(&request.uid, 403, "Forbidden", &message))
    }
}

/// Serves the webhook until `shutdown`, then lets requests under way finish for at most `drain`. Each handshake is made with
/// what `tls` holds at the time.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    webhook: Arc<Webhook>,
    readiness: Readiness,
    shutdown: CancellationToken,
    drain: Duration,
) -> io::Result<()> {
    let (limits, metrics) = (webhook.limits, webhook.server_metrics.clone());
    let route = webhook.route(readiness);
    server::serve(listener, Some(tls), route, limits, metrics, shutdown, drain).await
}

async fn admit(
    State((webhook, readiness)): State<(Arc<Webhook>, Readiness)>,
    request: HttpRequest,
) -> Response {
    let (head, body) = request.into_parts();
    let Some((group, digest)) = group_and_digest(head.uri.path()) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let answer = if is_json(head.headers.get(CONTENT_TYPE)) {
        let body = server::at_hand(body).await;
        let arrived = Instant::now();
        let request = review::parse(&body);
        if let Ok(request) = &request {
            webhook.catch_up(group, digest, request, body.len()).await;
        }
        let answer = webhook.answer(group, digest, request);
        webhook.metrics.latency.observe(arrived.elapsed().as_secs_f64());
        answer
    } else {
        webhook.metrics.count(Outcome::Rejected);
        Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json".to_owned()))
    };
    let mut response = match answer {
        Ok(json) => ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], json).into_response(),
        Err((status, text)) => (status, format!("{text}\n")).into_response(),
    };
    // Between the signal and the end, an answer says that its connection is not to be used again. The API server speaks
    // HTTP/1.1 to a Service and keeps connections; were they closed under it, a request that it is just sending would be lost,
    // and it does not send one twice. HTTP/2 has a goodbye of its own.
    if head.version < Version::HTTP_2 && readiness.is_stopping() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The parts of the path by which the API server calls.
fn group_and_digest(path: &str) -> Option<(&str, &str)> {
    let (group, digest) = path.strip_prefix("/mutate/")?.split_once('/')?;
    (!group.is_empty() && !digest.is_empty() && !digest.contains('/')).then_some((group, digest))
}

fn is_json(content_type: Option<&HeaderValue>) -> bool {
    content_type
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.as_bytes().split(|byte| *byte == b';').next())
        .is_some_and(|v| v.trim_ascii().eq_ignore_ascii_case(b"application/json"))
}

fn audit_warning(mutation: &Mutation<'_>) -> String {
    let images: Vec<_> =
        mutation.edits.iter().map(|e| format!("{} -> {}", e.image.reference, e.new)).collect();
    warning(&format!("ecr-cname (audit): would rewrite {}", images.join(", ")))
}

/// The API server cuts a warning off at 256 characters: <https://pkg.go.dev/k8s.io/api/admission/v1#AdmissionResponse>.
fn warning(text: &str) -> String {
    if text.chars().count() <= 256 {
        text.to_owned()
    } else {
        text.chars().take(255).chain(['…']).collect()
    }
}

fn field(image: &review::Image<'_>) -> String {
    format!("spec.{}[{}]", image.list.field(), image.index)
}

/// A pod's name for the log, as far as it is known.
struct PodName<'a>(&'a Request<'a>);

impl std::fmt::Display for PodName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.0.namespace, self.0.name)
    }
}

#[derive(Debug)]
struct Metrics {
    /// By outcome, in the order of [`Outcome::ALL`]: the hot path does not look them up.
    admissions: [Counter; Outcome::ALL.len()],
    latency: Histogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
enum Outcome {
    /// Patched.
    Rewritten,
    /// Allowed as it was.
    Untouched,
    /// Allowed with a warning that says what would have been patched.
    Audited,
    /// Refused.
    Denied,
    /// Allowed with a warning although it should have been refused.
    LetThrough,
    /// Not an admission review that can be answered.
    BadRequest,
    /// Not a request that can be read: too large, too slow, or not JSON by its header.
    Rejected,
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Rewritten,
        Self::Untouched,
        Self::Audited,
        Self::Denied,
        Self::LetThrough,
        Self::BadRequest,
        Self::Rejected,
    ];
}

impl Metrics {
    fn new(registry: &mut Registry) -> Self {
        let admissions: Family<Labels, Counter> = Family::default();
        // Every outcome is there from the start, so that a rate has a zero to rise from.
        let metrics = Self {
            admissions: Outcome::ALL.map(|outcome| admissions.get_or_create(&Labels { outcome }).clone()),
            latency: Histogram::new(exponential_buckets(0.000_01, 2.0, 16)),
        };
        registry.register("admissions", "Admission requests answered, by what came of them", admissions);
        registry.register(
            "admission_duration_seconds",
            "Time to decide on a request and to write the answer",
            metrics.latency.clone(),
        );
        metrics
    }

    fn count(&self, outcome: Outcome) {
        if let Some(counter) = self.admissions.get(outcome as usize) {
            counter.inc();
        }
    }
}
