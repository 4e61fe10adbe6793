//! Flags, parsed into what the components are configured with. Each has an environment variable.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::SignedDuration;

use crate::{matching::FailurePolicy, telemetry::LogFormat, watch::WatchTimeout};

/// Your own name for your ECR registry, everywhere in a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 110, args_override_self = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the admission webhook: rewrite image names. Holds no AWS identity and no token
    Webhook {
        #[command(flatten)]
        #[allow(missing_docs)]
        process: Process,
        #[command(flatten)]
        #[allow(missing_docs)]
        webhook: WebhookArgs,
    },
    /// Keep tokens, pull secrets, webhook entries, the certificate and the status of aliases. Only the leader acts
    Controller {
        #[command(flatten)]
        #[allow(missing_docs)]
        process: Process,
        #[command(flatten)]
        #[allow(missing_docs)]
        controller: ControllerArgs,
    },
    /// Both in one process, for development and for small clusters
    Run {
        #[command(flatten)]
        #[allow(missing_docs)]
        process: Process,
        #[command(flatten)]
        #[allow(missing_docs)]
        webhook: WebhookArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        controller: ControllerArgs,
    },
    /// Print Kubernetes manifests with their image names rewritten, without a cluster. Exits with 2 for bad input
    Rewrite(RewriteArgs),
    /// Print what image names are rewritten to, without a cluster. Exits with 2 for bad input
    Resolve(ResolveArgs),
    /// Print the CustomResourceDefinition
    Crd,
    /// Ask the webhook as the API server would, and exit with 1 if it does not answer: what `helm test` runs
    Probe(ProbeArgs),
    /// Delete all that is ours: webhook entries, pull secrets, certificate, Lease. For uninstalling, after the controller
    /// was stopped
    Cleanup {
        #[command(flatten)]
        #[allow(missing_docs)]
        cleanup: CleanupArgs,
    },
}

/// What every process of the operator is told.
#[derive(Clone, Debug, Args)]
pub struct Process {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub names: Names,

    /// The name of this replica; default: the host name
    #[arg(long, env = "POD_NAME", default_value_t = host_name(), hide_default_value = true)]
    pub pod_name: String,

    /// Where probes and metrics are served: /livez, /readyz, /metrics
    #[arg(long, env = "ECR_CNAME_ADMIN_LISTEN", default_value = "0.0.0.0:9090", value_name = "ADDRESS")]
    pub admin_listen: SocketAddr,

    /// What becomes of a pod that names an alias while it cannot be rewritten; the same for webhook and controller
    #[arg(long, env = "ECR_CNAME_FAILURE_POLICY", default_value = "Fail", value_name = "POLICY")]
    pub failure_policy: FailurePolicy,

    /// How long a watch of the API server lasts before it is begun anew; a connection that died without a word is noticed
    /// 5 seconds after that at the latest
    #[arg(long, env = "ECR_CNAME_WATCH_TIMEOUT", default_value = "2m", value_name = "TIME", value_parser = watch_timeout)]
    pub watch_timeout: WatchTimeout,

    /// How long to serve on, not ready, after SIGTERM, so that the API server learns of it
    #[arg(long, env = "ECR_CNAME_SHUTDOWN_DELAY", default_value = "5s", value_name = "TIME", value_parser = duration)]
    pub shutdown_delay: Duration,

    /// How long requests and hand-overs under way may take at shutdown
    #[arg(long, env = "ECR_CNAME_DRAIN", default_value = "10s", value_name = "TIME", value_parser = duration)]
    pub drain: Duration,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

/// What the operator's objects are called, wherever it needs to know.
#[derive(Clone, Debug, Args)]
pub struct Names {
    /// The namespace that the operator runs in
    #[arg(long, env = "POD_NAMESPACE", default_value = "ecr-cname")]
    pub namespace: String,

    /// The Secret with the serving certificate (tls.crt, tls.key, ca.crt), in the operator's namespace
    #[arg(long, env = "ECR_CNAME_CERTIFICATE_SECRET", default_value = "ecr-cname-tls", value_name = "NAME", value_parser = object_name)]
    pub certificate_secret: String,

    /// The name of the pull secret, in every namespace
    #[arg(long, env = "ECR_CNAME_PULL_SECRET", default_value = "ecr-cname", value_name = "NAME", value_parser = object_name)]
    pub pull_secret: String,
}

/// How logs are written.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// How logs are written
    #[arg(long, env = "ECR_CNAME_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// What is logged, for example info or info,ecr_cname=debug
    #[arg(long, env = "ECR_CNAME_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

/// What the webhook is told.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Webhook")]
pub struct WebhookArgs {
    /// Where the webhook is served, with TLS
    #[arg(long, env = "ECR_CNAME_LISTEN", default_value = "0.0.0.0:8443", value_name = "ADDRESS")]
    pub listen: SocketAddr,

    /// A file with certificate authorities (PEM): only clients with a certificate of theirs may call. Followed as it changes
    #[arg(long, env = "ECR_CNAME_CLIENT_CA", value_name = "FILE")]
    pub client_ca: Option<PathBuf>,

    /// The names of which such a certificate must have one, as common name or DNS name; default: any
    #[arg(
        long,
        env = "ECR_CNAME_CLIENT_NAMES",
        value_delimiter = ',',
        value_name = "NAMES",
        requires = "client_ca"
    )]
    pub client_names: Vec<String>,

    /// Only count, log and warn; rewrite nothing
    #[arg(long, env = "ECR_CNAME_AUDIT")]
    pub audit: bool,

    /// The most bytes of one request
    #[arg(long, env = "ECR_CNAME_MAX_BODY", default_value_t = 8 * 1024 * 1024, value_name = "BYTES")]
    pub max_body: usize,

    /// The most bytes that all requests together hold, and no less than twice --max-body; beyond that, those go that wait for
    /// their clients
    #[arg(long, env = "ECR_CNAME_MAX_MEMORY", default_value_t = 32 * 1024 * 1024, value_name = "BYTES")]
    pub max_memory: usize,

    /// The most connections at one time; beyond that, those go that were never answered, of the address that has most
    #[arg(long, env = "ECR_CNAME_MAX_CONNECTIONS", default_value_t = 512, value_name = "N")]
    pub max_connections: usize,

    /// The most time for one request to arrive; less than the API server waits (--webhook-timeout)
    #[arg(long, env = "ECR_CNAME_REQUEST_TIMEOUT", default_value = "2s", value_name = "TIME", value_parser = interval)]
    pub request_timeout: Duration,
}

/// What the controller is told.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Controller")]
pub struct ControllerArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kept: Kept,

    /// The Service through which the API server reaches the webhook, in the operator's namespace
    #[arg(long, env = "ECR_CNAME_WEBHOOK_SERVICE", default_value = "ecr-cname-webhook", value_name = "NAME", value_parser = object_name)]
    pub webhook_service: String,

    /// The URL at which the API server reaches the webhook, instead of a Service: for running outside the cluster
    #[arg(long, env = "ECR_CNAME_WEBHOOK_URL", value_name = "URL", value_parser = webhook_url)]
    pub webhook_url: Option<WebhookUrl>,

    /// How many seconds the API server waits for the webhook
    #[arg(long, env = "ECR_CNAME_WEBHOOK_TIMEOUT", default_value_t = 3, value_name = "SECONDS", value_parser = clap::value_parser!(u8).range(1..=30))]
    pub webhook_timeout: u8,

    /// Namespaces to leave alone; the operator's own always is
    #[arg(
        long,
        env = "ECR_CNAME_EXCLUDE_NAMESPACES",
        default_value = "kube-system,kube-node-lease",
        value_delimiter = ',',
        value_name = "NAMES"
    )]
    pub exclude_namespaces: Vec<String>,

    /// Who keeps the Secret of the serving certificate
    #[arg(long, env = "ECR_CNAME_CERTIFICATE", default_value = "self", value_name = "WHO")]
    pub certificate: CertificateMode,

    /// How long a self-managed certificate is valid; renewed when a third of it is left
    #[arg(long, env = "ECR_CNAME_CERTIFICATE_LIFETIME", default_value = "2160h", value_name = "TIME", value_parser = interval)]
    pub certificate_lifetime: Duration,

    /// How long the API server is given to trust a new CA before it is used
    #[arg(long, env = "ECR_CNAME_CERTIFICATE_OVERLAP", default_value = "60s", value_name = "TIME", value_parser = duration)]
    pub certificate_overlap: Duration,

    /// For how long the Lease holds without renewal
    #[arg(long, env = "ECR_CNAME_LEASE_DURATION", default_value = "15s", value_name = "TIME", value_parser = interval)]
    pub lease_duration: Duration,

    /// The DNS server to ask for CNAMEs; default: the system's
    #[arg(long, env = "ECR_CNAME_DNS_SERVER", value_name = "ADDRESS")]
    pub dns_server: Option<SocketAddr>,

    /// The shortest time between two look-ups of a CNAME, whatever its TTL
    #[arg(long, env = "ECR_CNAME_DNS_MIN_TTL", default_value = "30s", value_name = "TIME", value_parser = interval)]
    pub dns_min_ttl: Duration,

    /// The longest time between two look-ups of a CNAME, whatever its TTL
    #[arg(long, env = "ECR_CNAME_DNS_MAX_TTL", default_value = "1h", value_name = "TIME", value_parser = interval)]
    pub dns_max_ttl: Duration,
}

/// What the controller keeps, and `cleanup` takes away.
#[derive(Clone, Debug, Args)]
pub struct Kept {
    /// The MutatingWebhookConfiguration whose entries are kept; it must exist
    #[arg(long, env = "ECR_CNAME_WEBHOOK_CONFIGURATION", default_value = "ecr-cname", value_name = "NAME", value_parser = object_name)]
    pub webhook_configuration: String,

    /// The Lease that the leader holds, in the operator's namespace
    #[arg(long, env = "ECR_CNAME_LEASE", default_value = "ecr-cname", value_name = "NAME", value_parser = object_name)]
    pub lease: String,

    /// The only namespaces that get pull secrets and have pods rewritten, so that no right to list the cluster's Secrets
    /// is needed; default: all namespaces
    #[arg(long, env = "ECR_CNAME_WATCH_NAMESPACES", value_delimiter = ',', value_name = "NAMES", value_parser = object_name)]
    pub watch_namespaces: Vec<String>,
}

/// Who keeps the Secret of the serving certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CertificateMode {
    /// The controller, with a CA of its own.
    #[value(name = "self")]
    SelfManaged,
    /// cert-manager or the user.
    External,
}

/// The URL of a webhook outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookUrl {
    /// The URL without a slash at its end.
    pub base: String,
    /// The host that the certificate must name.
    pub host: String,
}

/// What `rewrite` is told.
#[derive(Clone, Debug, Args)]
pub struct RewriteArgs {
    /// A file with RegistryAlias manifests
    #[arg(long, value_name = "FILE")]
    pub aliases: PathBuf,

    /// Print what would change, as DOCUMENT/PATH: OLD -> NEW with documents counted from 1, and exit with 1 if anything would
    #[arg(long)]
    pub check: bool,

    /// Kubernetes manifests in YAML or JSON; - is standard input
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// What `resolve` is told.
#[derive(Clone, Debug, Args)]
pub struct ResolveArgs {
    /// A file with RegistryAlias manifests
    #[arg(long, value_name = "FILE")]
    pub aliases: PathBuf,

    /// Image references
    #[arg(required = true, value_name = "REF")]
    pub references: Vec<String>,
}

/// What `probe` is told.
#[derive(Clone, Debug, Args)]
pub struct ProbeArgs {
    /// The host name of the webhook, which its certificate is for
    #[arg(long)]
    pub host: String,

    /// The port at which it is asked
    #[arg(long, default_value_t = 443)]
    pub port: u16,

    /// A file with the CA that its certificate must be of, in PEM
    #[arg(long, value_name = "FILE")]
    pub ca: PathBuf,

    /// For how long to try
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = duration)]
    pub timeout: Duration,
}

/// What `cleanup` is told.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub names: Names,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub kept: Kept,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration =
        text.parse().map_err(|_| "expected a time such as 15s, 5m or 1h30m".to_owned())?;
    let duration = Duration::try_from(duration).map_err(|_| "a time cannot be negative".to_owned())?;
    // More than any flag could mean, and far from what arithmetic could not hold.
    if duration > TEN_YEARS { Err("at most 87600h, ten years".to_owned()) } else { Ok(duration) }
}

/// A time of at least a second: what recurs at it must not become a busy loop.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    if interval < Duration::from_secs(1) { Err("at least 1s".to_owned()) } else { Ok(interval) }
}

fn watch_timeout(text: &str) -> Result<WatchTimeout, String> {
    interval(text).map(WatchTimeout::new)
}

const TEN_YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The name of an object: <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>.
fn object_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = label.as_bytes();
        bytes.iter().all(|b| edge(*b) || *b == b'-')
            && bytes.first().is_some_and(|b| edge(*b))
            && bytes.last().is_some_and(|b| edge(*b))
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.to_owned())
    } else {
        Err("expected the name of an object: lower-case letters, digits, - and .".to_owned())
    }
}

fn webhook_url(text: &str) -> Result<WebhookUrl, String> {
    let url: axum::http::Uri = text.parse().map_err(|e| format!("{e}"))?;
    if url.scheme_str() != Some("https") || url.query().is_some() {
        return Err("expected https://HOST[:PORT][/PATH]: the API server calls nothing else".to_owned());
    }
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    Ok(WebhookUrl { base: text.trim_end_matches('/').to_owned(), host })
}

fn host_name() -> String {
    std::fs::read_to_string("/etc/hostname").map_or_else(|_| "ecr-cname".to_owned(), |n| n.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn parses_times_and_urls_at_the_edge() {
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert!(duration("15").is_err());
        assert!(duration("-1s").is_err());
        assert!(duration("99999999h").is_err());
        assert!(interval("0s").is_err());
        assert!(object_name("ecr-cname.x").is_ok());
        assert!(object_name("x\"}").is_err());
        assert!(object_name("").is_err());
        let url = webhook_url("https://127.0.0.1:8443/").unwrap();
        assert_eq!((url.base.as_str(), url.host.as_str()), ("https://127.0.0.1:8443", "127.0.0.1"));
        assert!(webhook_url("http://127.0.0.1").is_err());
    }
}
