//! An alias: a friendly host, where it leads, and who holds the credentials for it.
//!
//! [`accept`] is the one place where the aliases of a cluster are judged together; the webhook, the controller and the
//! offline commands all start from its answer.

use std::{borrow::Borrow, collections::HashMap, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{ResourceExt, core::Selector};

use crate::{
    crd::{PullSecret, RegistryAlias},
    image,
    registry::{self, EcrHost, Region},
};

/// A `RegistryAlias` whose every field has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Alias {
    /// The object's name.
    pub name: String,
    /// The friendly host.
    pub host: Host,
    /// Where it leads.
    pub target: Target,
    /// The registry that the controller found by following DNS, if the alias is so and the answer is allowed.
    found: Option<EcrHost>,
    /// Put before every repository.
    pub repository_prefix: Option<String>,
    /// The namespaces in which it holds, as written.
    pub namespace_selector: LabelSelector,
    /// The namespaces in which it holds, for matching.
    pub namespaces: Selector,
    /// Who asks for its token.
    pub identity: Identity,
    /// Which pods get the pull secret.
    pub pull_secret: PullSecret,
}

/// A friendly host in lower case, with its port if it has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host(Box<str>);

/// Where an alias leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the registry that the spec names.
    Registry(EcrHost),
    /// To the registry that the host's CNAME names, provided that one of these accounts owns it.
    Cname {
        /// 12-digit account ids; never empty.
        allowed_accounts: Vec<String>,
    },
}

/// Who asks AWS for a token.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// The operator itself.
    Operator,
    /// A role that the operator assumes.
    Role {
        /// The role's ARN.
        arn: String,
        /// The external ID that its trust policy asks for.
        external_id: Option<String>,
    },
}

/// Who asks for a token, and where: one token serves every registry of a principal, so calls are counted by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Principal {
    /// Who asks.
    pub identity: Identity,
    /// Which regional endpoint.
    pub region: Region,
}

/// Names the aliases that share one namespace selector, and so one webhook entry and one path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group(Box<str>);

/// What keeps an alias from being used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field that the API server would have refused, had the object come through the current CRD.
    #[error("spec.{field}: {problem}")]
    Invalid {
        /// The field below `spec`.
        field: &'static str,
        /// What is wrong with it, and what is expected.
        problem: String,
    },
    /// An older alias has the same host.
    #[error("host {host} belongs to the older alias {older:?}: choose another host or delete one of the two")]
    HostTaken {
        /// The host.
        host: Host,
        /// The name of the alias that has it.
        older: String,
    },
}

/// The aliases of a cluster, judged together.
#[derive(Clone, Debug, Default)]
pub struct Accepted {
    /// The aliases that hold, oldest first.
    pub aliases: Vec<Alias>,
    /// The names of those that do not, and why.
    pub refused: Vec<(String, Refusal)>,
}

/// Judges the aliases of a cluster: each must be valid, and of two with one host the older holds (of two equally old,
/// the one whose name sorts first).
pub fn accept<A: Borrow<RegistryAlias>>(objects: impl IntoIterator<Item = A>) -> Accepted {
    let mut objects: Vec<A> = objects.into_iter().collect();
    objects.sort_by_cached_key(|o| {
        (o.borrow().metadata.creation_timestamp.clone().map(|t| t.0), o.borrow().name_any())
    });
    let mut accepted = Accepted::default();
    let mut taken: HashMap<Host, String> = HashMap::new();
    for object in &objects {
        let object = object.borrow();
        match Alias::try_from(object) {
            Ok(alias) => match taken.get(&alias.host) {
                Some(older) => accepted
                    .refused
                    .push((alias.name, Refusal::HostTaken { host: alias.host, older: older.clone() })),
                None => {
                    taken.insert(alias.host.clone(), alias.name.clone());
                    accepted.aliases.push(alias);
                }
            },
            Err(refusal) => accepted.refused.push((object.name_any(), refusal)),
        }
    }
    accepted
}

impl Alias {
    /// The registry that the alias leads to, if that is known by now.
    #[must_use]
    pub fn registry(&self) -> Option<&EcrHost> {
        match &self.target {
            Target::Registry(registry) => Some(registry),
            Target::Cname { .. } => self.found.as_ref(),
        }
    }

    /// The same alias with what DNS has said by now.
    fn found(self, registry: Option<EcrHost>) -> Self {
        Self { found: registry.filter(|r| self.target.allows(r)), ..self }
    }

    /// Whose token the alias's pull secret holds; `None` if it needs none, or if its registry is not known yet.
    #[must_use]
    pub fn principal(&self) -> Option<Principal> {
        if self.pull_secret == PullSecret::None {
            return None;
        }
        let region = self.registry()?.region().clone();
        Some(Principal { identity: self.identity.clone(), region })
    }

    /// What the pull secrets of the alias are made for: where this is another, they are others.
    #[must_use]
    pub fn serves(&self) -> String {
        let registry = self.registry().map_or("", EcrHost::as_str);
        format!("{registry} {} {} {:?}", self.identity, self.group(), self.pull_secret)
    }

    /// The group of aliases that hold in the same namespaces.
    #[must_use]
    pub fn group(&self) -> Group {
        Group::of(&self.namespace_selector)
    }
}

impl Target {
    /// Whether the alias may lead to a registry.
    #[must_use]
    pub fn allows(&self, registry: &EcrHost) -> bool {
        match self {
            Self::Registry(fixed) => fixed == registry,
            Self::Cname { allowed_accounts } => allowed_accounts.iter().any(|a| a == registry.account()),
        }
    }
}

impl TryFrom<&RegistryAlias> for Alias {
    type Error = Refusal;

    fn try_from(object: &RegistryAlias) -> Result<Self, Refusal> {
        let invalid = |field, problem: String| Refusal::Invalid { field, problem };
        let spec = &object.spec;
        let host: Host = spec.host.parse().map_err(|e: NotHost| invalid("host", e.to_string()))?;
        if let Some(account) = spec.allowed_accounts.iter().find(|a| !registry::is_account(a)) {
            return Err(invalid("allowedAccounts", format!("{account:?} is not a 12-digit account id")));
        }
        let target = match &spec.registry {
            Some(text) => {
                let registry: EcrHost =
                    text.parse().map_err(|e: registry::NotEcr| invalid("registry", e.to_string()))?;
                if !spec.allowed_accounts.is_empty()
                    && !spec.allowed_accounts.iter().any(|a| a == registry.account())
                {
                    return Err(invalid(
                        "registry",
                        format!("account {} is not in allowedAccounts", registry.account()),
                    ));
                }
                Target::Registry(registry)
            }
            None if spec.allowed_accounts.is_empty() => {
                return Err(invalid("allowedAccounts", "required when registry is omitted".to_owned()));
            }
            None => Target::Cname { allowed_accounts: spec.allowed_accounts.clone() },
        };
        if let Some(prefix) = spec.repository_prefix.as_deref().filter(|p| !image::is_path(p)) {
            return Err(invalid("repositoryPrefix", format!("{prefix:?} is not a repository path")));
        }
        let namespace_selector = normalised(&spec.namespace_selector);
        check_selector(&namespace_selector).map_err(|problem| invalid("namespaceSelector", problem))?;
        let namespaces = Selector::try_from(namespace_selector.clone())
            .map_err(|e| invalid("namespaceSelector", e.to_string()))?;
        let identity = match &spec.credentials {
            None => Identity::Operator,
            Some(c) => Identity::Role { arn: c.role_arn.clone(), external_id: c.external_id.clone() },
        };
        let alias = Self {
            name: object.name_any(),
            host,
            target,
            found: None,
            repository_prefix: spec.repository_prefix.clone(),
            namespace_selector,
            namespaces,
            identity,
            pull_secret: spec.pull_secret,
        };
        // What the status says is checked like any input: it may be of an older spec.
        let status = object.status.as_ref().filter(|s| s.host.as_deref() == Some(alias.host.as_str()));
        let found = status.and_then(|s| s.registry.as_deref()?.parse().ok());
        Ok(alias.found(found))
    }
}

/// Why a text cannot be a friendly host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHost {
    /// It is no host at all.
    #[error("{0:?} is not a host name with an optional port")]
    Grammar(String),
    /// Container runtimes would take it for a part of the repository path.
    #[error(
        "{0:?} needs a dot or a port: without one, container runtimes take it for a part of the repository path"
    )]
    Bare(String),
    /// It is an ECR host, so that rewriting would not end.
    #[error("{0:?} is itself an ECR host: rewriting it would not end")]
    Ecr(String),
}

impl std::str::FromStr for Host {
    type Err = NotHost;

    fn from_str(text: &str) -> Result<Self, NotHost> {
        let host = Self(text.to_ascii_lowercase().into());
        let port = host.0.len() - host.name().len();
        if !image::is_host(&host.0) || host.0.len() > MAX_HOST || port > MAX_PORT {
            return Err(NotHost::Grammar(text.to_owned()));
        }
        if !host.0.contains(['.', ':']) && &*host.0 != "localhost" {
            return Err(NotHost::Bare(text.to_owned()));
        }
        if host.name().parse::<EcrHost>().is_ok() {
            return Err(NotHost::Ecr(text.to_owned()));
        }
        Ok(host)
    }
}

/// The longest host with its port: 253 characters of a DNS name, a colon, and five digits.
pub const MAX_HOST: usize = 259;

/// The longest port, with its colon. The CRD says the same.
const MAX_PORT: usize = 6;

impl Host {
    /// The host in lower case, with its port.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host without its port, as DNS knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        let port = self.0.rfind(':').filter(|colon| !self.0.ends_with(']') && *colon > 0);
        port.and_then(|colon| self.0.get(..colon)).unwrap_or(&self.0)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("operator"),
            Self::Role { arn, .. } => f.write_str(arn),
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.identity, self.region.name)
    }
}

impl Group {
    /// The group of a namespace selector. Two selectors that say the same in another order are one group.
    #[must_use]
    pub fn of(selector: &LabelSelector) -> Self {
        let mut expressions: Vec<_> = selector
            .match_expressions
            .iter()
            .flatten()
            .map(|e| {
                let mut values = e.values.clone().unwrap_or_default();
                values.sort();
                (&e.key, &e.operator, values)
            })
            .collect();
        expressions.sort();
        let labels: Vec<_> = selector.match_labels.iter().flatten().collect();
        let canonical = format!("{labels:?}{expressions:?}");
        Self(digest(&canonical).into())
    }

    /// The group's name: ten hexadecimal digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Group {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Ten hexadecimal digits that stand for a text: the beginning of its SHA-256.
pub(crate) fn digest(text: &str) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    hash.as_ref().iter().take(5).map(|byte| format!("{byte:02x}")).collect()
}

/// A selector without its empty parts. The API server drops them from a webhook entry, which then is not what was applied.
fn normalised(selector: &LabelSelector) -> LabelSelector {
    let mut selector = selector.clone();
    selector.match_labels = selector.match_labels.filter(|labels| !labels.is_empty());
    for expression in selector.match_expressions.iter_mut().flatten() {
        expression.values = expression.values.take().filter(|values| !values.is_empty());
    }
    selector.match_expressions = selector.match_expressions.filter(|e| !e.is_empty());
    selector
}

/// Refuses a selector that the API server would refuse in a webhook entry: there, one bad alias would hold up all.
fn check_selector(selector: &LabelSelector) -> Result<(), String> {
    for (key, value) in selector.match_labels.iter().flatten() {
        check_label_key(key)?;
        check_label_value(value)?;
    }
    for expression in selector.match_expressions.iter().flatten() {
        check_label_key(&expression.key)?;
        let values = expression.values.as_deref().unwrap_or_default();
        match expression.operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                return Err(format!("operator {} of {:?} needs values", expression.operator, expression.key));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                return Err(format!(
                    "operator {} of {:?} takes no values",
                    expression.operator, expression.key
                ));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => {
                return Err(format!("operator {other:?} is unknown: use In, NotIn, Exists or DoesNotExist"));
            }
        }
        values.iter().try_for_each(|v| check_label_value(v))?;
    }
    Ok(())
}

/// <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set>
fn check_label_key(key: &str) -> Result<(), String> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(p, n)| (Some(p), n));
    let prefix_ok = prefix.is_none_or(|p| {
        (1..=253).contains(&p.len())
            && p.split('.').all(|label| {
                !label.is_empty()
                    && !label.starts_with('-')
                    && !label.ends_with('-')
                    && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            })
    });
    if prefix_ok && !name.is_empty() && is_label_text(name) {
        Ok(())
    } else {
        Err(format!("{key:?} is not a label key"))
    }
}

fn check_label_value(value: &str) -> Result<(), String> {
    if is_label_text(value) { Ok(()) } else { Err(format!("{value:?} is not a label value")) }
}

fn is_label_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_none_or(u8::is_ascii_alphanumeric)
        && bytes.last().is_none_or(u8::is_ascii_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn object(name: &str, created: &str, spec: Value) -> RegistryAlias {
        serde_json::from_value(json!({
            "apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
            "metadata": {"name": name, "creationTimestamp": created}, "spec": spec
        }))
        .unwrap()
    }

    fn spec(host: &str) -> Value {
        json!({"host": host, "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com"})
    }

    #[test]
    fn of_two_aliases_with_one_host_the_older_holds() {
        let accepted = accept([
            object("b", "2026-01-02T00:00:00Z", spec("ecr.example.io")),
            object("c", "2026-01-01T00:00:00Z", spec("ECR.example.io")),
            object("a", "2026-01-02T00:00:00Z", spec("ecr.example.io:443")),
        ]);
        let names: Vec<_> = accepted.aliases.iter().map(|a| a.name.as_str()).collect();
        assert_eq!(names, ["c", "a"]);
        assert_eq!(accepted.refused.len(), 1);
        let (name, refusal) = &accepted.refused[0];
        assert_eq!(name, "b");
        assert!(refusal.to_string().contains("older alias \"c\""), "{refusal}");
    }

    #[test]
    fn refuses_what_would_hold_up_others() {
        let bad = [
            (
                json!({"host": "bare", "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com"}),
                "spec.host",
            ),
            (spec("a.b:065536"), "is not a host name with an optional port"),
            (spec("123456789012.dkr.ecr.us-east-1.amazonaws.com"), "itself an ECR host"),
            (spec("123456789012.dkr.ecr.us-east-1.amazonaws.com:443"), "itself an ECR host"),
            (json!({"host": "a.b", "registry": "ghcr.io"}), "spec.registry"),
            (json!({"host": "a.b"}), "spec.allowedAccounts"),
            (json!({"host": "a.b", "allowedAccounts": ["12"]}), "12-digit"),
            (
                json!({"host": "a.b", "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com",
                       "allowedAccounts": ["210987654321"]}),
                "not in allowedAccounts",
            ),
            (
                json!({"host": "a.b", "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com",
                       "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "in", "values": ["b"]}]}}),
                "operator \"in\" is unknown",
            ),
            (
                json!({"host": "a.b", "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com",
                       "namespaceSelector": {"matchLabels": {"a b": "c"}}}),
                "not a label key",
            ),
        ];
        for (spec, expected) in bad {
            let refusal = Alias::try_from(&object("x", "2026-01-01T00:00:00Z", spec.clone())).unwrap_err();
            assert!(refusal.to_string().contains(expected), "{spec}: {refusal}");
        }
    }

    #[test]
    fn dns_may_choose_no_other_account() {
        let mut alias =
            object("x", "2026-01-01T00:00:00Z", json!({"host": "a.b", "allowedAccounts": ["123456789012"]}));
        let status =
            |registry: &str| serde_json::from_value(json!({"host": "a.b", "registry": registry})).unwrap();
        alias.status = Some(status("123456789012.dkr.ecr.us-east-1.amazonaws.com"));
        assert!(Alias::try_from(&alias).unwrap().registry().is_some());
        alias.status = Some(status("666666666666.dkr.ecr.us-east-1.amazonaws.com"));
        assert_eq!(Alias::try_from(&alias).unwrap().registry(), None);
        // Nor may an answer for another host stand for this one.
        alias.status = Some(status("123456789012.dkr.ecr.us-east-1.amazonaws.com"));
        alias.spec.host = "c.d".to_owned();
        assert_eq!(Alias::try_from(&alias).unwrap().registry(), None);
    }

    #[test]
    fn a_group_does_not_depend_on_the_order_of_a_selector() {
        let selector = |v: Value| serde_json::from_value::<LabelSelector>(v).unwrap();
        let a = selector(json!({"matchLabels": {"a": "1", "b": "2"}, "matchExpressions": [
            {"key": "x", "operator": "In", "values": ["1", "2"]}, {"key": "y", "operator": "Exists"}]}));
        let b = selector(json!({"matchLabels": {"b": "2", "a": "1"}, "matchExpressions": [
            {"key": "y", "operator": "Exists", "values": []}, {"key": "x", "operator": "In", "values": ["2", "1"]}]}));
        assert_eq!(Group::of(&a), Group::of(&b));
        assert_eq!(normalised(&b).match_expressions.unwrap()[0].values, None);
        assert_eq!(
            normalised(&selector(json!({"matchLabels": {}, "matchExpressions": []}))),
            selector(json!({}))
        );
        assert_ne!(Group::of(&a), Group::of(&selector(json!({}))));
    }
}
