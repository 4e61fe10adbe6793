//! DNS: following a friendly host's CNAME to the registry that it names.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use hickory_resolver::{
    TokioResolver,
    config::{NameServerConfig, ResolveHosts, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::{Name, RData, RecordType},
};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    alias::{Alias, Host, Target},
    registry::EcrHost,
    watch::Aliases,
};

/// How many CNAMEs are followed from one host.
const MAX_HOPS: usize = 8;
/// How long following one host may take.
const MAX_TIME: Duration = Duration::from_secs(10);
/// The pause after a failure doubles from [`Bounds::min`] to this many times it.
const MAX_BACKOFF: u32 = 4;

/// How often a host is looked up: as the answer's TTL says, within these bounds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The shortest time between two look-ups.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

/// What DNS says of an alias that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The host that was looked up.
    pub host: Host,
    /// The registry, or why there is none.
    pub registry: Result<EcrHost, Problem>,
}

/// What DNS says of each alias that follows it, by name.
pub type Answers = BTreeMap<String, Answer>;

/// Why DNS names no registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No answer could be had.
    #[error("DNS look-up of {name} failed: {problem}")]
    Failed {
        /// The name that was asked for.
        name: String,
        /// What came.
        problem: String,
    },
    /// The host has no CNAME, or its CNAMEs end elsewhere.
    #[error(
        "{host} leads to {end}, which is not the host of an ECR registry: make it a CNAME of ACCOUNT.dkr.ecr.REGION.amazonaws.com"
    )]
    NotEcr {
        /// The host.
        host: String,
        /// Where its CNAMEs end.
        end: String,
    },
    /// The CNAMEs lead in a circle, or too far.
    #[error("the CNAMEs of {host} do not end within {MAX_HOPS} steps")]
    Endless {
        /// The host.
        host: String,
    },
    /// The registry belongs to an account that the alias does not allow.
    #[error("{host} leads to {registry}, but allowedAccounts does not hold {}: if the move is meant, add the account", registry.account())]
    AccountNotAllowed {
        /// The host.
        host: String,
        /// The registry.
        registry: EcrHost,
    },
}

impl Problem {
    /// A word for conditions and events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Failed { .. } => "DNSLookupFailed",
            Self::NotEcr { .. } => "NotAnECRHost",
            Self::Endless { .. } => "CNAMELoop",
            Self::AccountNotAllowed { .. } => "AccountNotAllowed",
        }
    }
}

/// Looks hosts up.
#[derive(Clone)]
pub struct Dns(TokioResolver);

impl Dns {
    /// A resolver that asks `server`, or the servers that the system is configured with.
    ///
    /// # Errors
    /// The system's configuration cannot be read.
    pub fn new(server: Option<SocketAddr>) -> Result<Self, NetError> {
        let mut builder = match server {
            None => TokioResolver::builder_tokio()?,
            Some(address) => {
                let mut server = NameServerConfig::udp_and_tcp(address.ip());
                server.connections.iter_mut().for_each(|c| c.port = address.port());
                let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            }
        };
        let options = builder.options_mut();
        // Answers are asked for again as their TTL says; a second cache would only add to it.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.timeout = Duration::from_secs(2);
        options.attempts = 2;
        Ok(Self(builder.build()?))
    }

    /// Follows a host's CNAMEs. Returns the registry that they end at, and for how long that holds.
    ///
    /// # Errors
    /// [`Problem`] says where the way ends instead.
    pub async fn follow(&self, host: &Host, target: &Target) -> Result<(EcrHost, Duration), Problem> {
        let mut name = host.name().to_owned();
        let mut ttl = Duration::MAX;
        for _ in 0..MAX_HOPS {
            let Some((next, for_)) = self.cname(&name).await? else {
                return Err(Problem::NotEcr { host: host.to_string(), end: name });
            };
            ttl = ttl.min(for_);
            if let Ok(registry) = next.parse::<EcrHost>() {
                return if target.allows(&registry) {
                    Ok((registry, ttl))
                } else {
                    Err(Problem::AccountNotAllowed { host: host.to_string(), registry })
                };
            }
            name = next;
        }
        Err(Problem::Endless { host: host.to_string() })
    }

    async fn follow_in_time(&self, host: &Host, target: &Target) -> Result<(EcrHost, Duration), Problem> {
        tokio::time::timeout(MAX_TIME, self.follow(host, target)).await.unwrap_or_else(|_| {
            let problem = format!("no answer within {} s", MAX_TIME.as_secs());
            Err(Problem::Failed { name: host.name().to_owned(), problem })
        })
    }

    /// The CNAME of a name, and for how long that holds.
    async fn cname(&self, name: &str) -> Result<Option<(String, Duration)>, Problem> {
        let failed = |problem: String| Problem::Failed { name: name.to_owned(), problem };
        let mut fqdn = Name::from_ascii(name).map_err(|e| failed(e.to_string()))?;
        // No search domains: the name is meant as it stands.
        fqdn.set_fqdn(true);
        let answer = match self.0.lookup(fqdn, RecordType::CNAME).await {
            Ok(answer) => answer,
            // The name exists but has no CNAME; that it does not exist is an error.
            Err(error) if error.is_no_records_found() && !error.is_nx_domain() => return Ok(None),
            Err(error) if error.is_nx_domain() => return Err(failed("the name does not exist".to_owned())),
            Err(error) => return Err(failed(error.to_string())),
        };
        Ok(answer.answers().iter().find_map(|record| match &record.data {
            RData::CNAME(cname) => {
                let target = cname.0.to_ascii();
                let ttl = Duration::from_secs(record.ttl.into());
                Some((target.trim_end_matches('.').to_ascii_lowercase(), ttl))
            }
            _ => None,
        }))
    }
}

/// Keeps an answer for each alias that follows DNS, for ever.
pub async fn keep(
    dns: Dns,
    bounds: Bounds,
    mut aliases: watch::Receiver<Arc<Aliases>>,
    answers: watch::Sender<Arc<Answers>>,
) {
    let mut schedule: HashMap<Key, Schedule> = HashMap::new();
    let mut current = Answers::new();
    let mut asking = FuturesUnordered::new();
    loop {
        let snapshot = aliases.borrow_and_update().clone();
        let followed: HashMap<Key, &Alias> = snapshot
            .accepted
            .aliases
            .iter()
            .filter(|alias| matches!(alias.target, Target::Cname { .. }))
            .map(|alias| ((alias.name.clone(), alias.host.clone()), alias))
            .collect();
        schedule.retain(|key, s| followed.get(key).is_some_and(|alias| alias.target == s.target));
        current.retain(|name, answer| schedule.contains_key(&(name.clone(), answer.host.clone())));
        for (key, alias) in followed {
            let fresh = || Schedule { at: None, failures: 0, target: alias.target.clone(), asking: false };
            let entry = schedule.entry(key.clone()).or_insert_with(fresh);
            if !entry.asking && entry.at.is_none_or(|at| at <= Instant::now()) {
                entry.asking = true;
                let (dns, target) = (dns.clone(), alias.target.clone());
                asking.push(async move {
                    let result = dns.follow_in_time(&key.1, &target).await;
                    (key, target, result)
                });
            }
        }
        answers.send_if_modified(|old| {
            let changed = **old != current;
            if changed {
                *old = Arc::new(current.clone());
            }
            changed
        });
        let next = schedule.values().filter(|s| !s.asking).filter_map(|s| s.at).min();
        let sleep = next.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        tokio::select! {
            alive = aliases.changed() => if alive.is_err() { return },
            Some((key, target, result)) = asking.next() => {
                // An answer to a question that is not asked any more is dropped.
                if let Some(entry) = schedule.get_mut(&key).filter(|s| s.target == target) {
                    entry.record(&result, bounds);
                    let (name, host) = key;
                    let answer = Answer { host, registry: result.map(|(registry, _)| registry) };
                    announce(&name, current.get(&name), &answer);
                    current.insert(name, answer);
                }
            }
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// Says in the log what DNS says, if it says something else than before.
fn announce(alias: &str, before: Option<&Answer>, answer: &Answer) {
    if before != Some(answer) {
        match &answer.registry {
            Ok(registry) => info!(alias, %registry, "followed DNS"),
            Err(problem) => warn!(alias, %problem, "DNS names no registry"),
        }
    }
}

/// An alias's name and host.
type Key = (String, Host);

/// When a host is looked up next.
struct Schedule {
    at: Option<Instant>,
    failures: u32,
    target: Target,
    asking: bool,
}

impl Schedule {
    fn record(&mut self, result: &Result<(EcrHost, Duration), Problem>, bounds: Bounds) {
        let pause = match result {
            Ok((_, ttl)) => (*ttl).clamp(bounds.min, bounds.max),
            Err(Problem::Failed { .. }) => bounds.min * 2u32.pow(self.failures.min(8)).min(MAX_BACKOFF),
            // DNS answers, if not what is wanted.
            Err(_) => bounds.min,
        };
        let failed = matches!(result, Err(Problem::Failed { .. }));
        self.failures = if failed { self.failures.saturating_add(1) } else { 0 };
        self.at = Some(Instant::now() + pause);
        self.asking = false;
    }
}
