//! Aliases → webhook entries: which pods the API server sends, decided with its own data.
//!
//! One entry stands for the aliases that share a namespace selector. Its `matchConditions` name their hosts, so that a
//! pod with ordinary images never depends on this program being up.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{
        MatchCondition, MutatingWebhook, RuleWithOperations, ServiceReference, WebhookClientConfig,
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};

use crate::{
    alias::{self, Alias, Group},
    crd::PullSecret,
    scope::{Scope, not_opted_out},
};

/// How many aliases one entry stands for at the most: its CEL expression names a host or two of each.
const ALIASES_PER_ENTRY: usize = 100;

/// Every image name in a pod, in CEL. Checked against Kubernetes 1.36.
const IMAGES: &str = "(object.spec.containers.map(c, c.?image.orValue(''))
 + object.spec.?initContainers.orValue([]).map(c, c.?image.orValue(''))
 + object.spec.?ephemeralContainers.orValue([]).map(c, c.?image.orValue(''))
 + object.spec.?volumes.orValue([]).map(v, v.?image.?reference.orValue('')))";

/// What is the same in every entry.
#[derive(Clone, Debug)]
pub struct EntrySettings {
    /// Where the API server finds the webhook.
    pub endpoint: Endpoint,
    /// What becomes of a pod when the webhook cannot be asked.
    pub failure_policy: FailurePolicy,
    /// How long the API server waits for an answer, in seconds (1 to 30).
    pub timeout_seconds: u8,
    /// The namespaces whose pods are sent.
    pub scope: Scope,
}

/// Where the API server finds the webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Service in the cluster.
    Service {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A URL, for a webhook outside the cluster; without a slash at its end.
    Url(String),
}

/// What becomes of a pod when the webhook cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum FailurePolicy {
    /// It is refused; its controller tries again.
    Fail,
    /// It is let through as it is.
    Ignore,
}

impl FailurePolicy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Fail => "Fail",
            Self::Ignore => "Ignore",
        }
    }
}

/// Aliases of one group that one webhook entry stands for.
#[derive(Debug)]
pub struct Part<'a> {
    /// The group.
    pub group: Group,
    /// Which part of it: groups of many aliases have several.
    pub index: usize,
    /// The aliases, by host.
    pub aliases: Vec<&'a Alias>,
    /// Names the hosts: a replica whose own digest is another knows other aliases than the API server does.
    pub digest: String,
}

/// Splits the aliases that hold into groups, and long groups into parts. The webhook and the controller do this each for
/// themselves, and come to the same.
#[must_use]
pub fn parts(aliases: &[Alias]) -> Vec<Part<'_>> {
    let mut groups: BTreeMap<Group, Vec<&Alias>> = BTreeMap::new();
    for alias in aliases {
        groups.entry(alias.group()).or_default().push(alias);
    }
    let mut parts = Vec::new();
    for (group, mut aliases) in groups {
        aliases.sort_by(|a, b| a.host.cmp(&b.host));
        for (index, aliases) in aliases.chunks(ALIASES_PER_ENTRY).enumerate() {
            let hosts: Vec<&str> = aliases.iter().flat_map(|a| hosts(a)).collect();
            let digest = alias::digest(&hosts.join(" "));
            parts.push(Part { group: group.clone(), index, aliases: aliases.to_vec(), digest });
        }
    }
    parts
}

/// The webhook entries for the aliases that hold, by name.
#[must_use]
pub fn entries(aliases: &[Alias], ca_bundle: &ByteString, settings: &EntrySettings) -> Vec<MutatingWebhook> {
    parts(aliases).iter().map(|part| entry(part, ca_bundle, settings)).collect()
}

/// The hosts for which an alias wants to be asked: its own, and with `pullSecret: Registry` that of the registry.
pub fn hosts(alias: &Alias) -> impl Iterator<Item = &str> {
    std::iter::once(alias.host.as_str()).chain(canonical(alias))
}

fn canonical(alias: &Alias) -> Option<&str> {
    let registry = alias.registry().filter(|_| alias.pull_secret == PullSecret::Registry);
    registry.map(|registry| registry.as_str())
}

fn entry(part: &Part<'_>, ca_bundle: &ByteString, settings: &EntrySettings) -> MutatingWebhook {
    let path = format!("/mutate/{}/{}", part.group, part.digest);
    let selector = part.aliases.first().map(|alias| settings.scope.narrow(&alias.namespace_selector));
    let (service, url) = match &settings.endpoint {
        Endpoint::Service { namespace, name } => (
            Some(ServiceReference {
                namespace: namespace.clone(),
                name: name.clone(),
                path: Some(path),
                port: Some(443),
            }),
            None,
        ),
        Endpoint::Url(base) => (None, Some(format!("{base}{path}"))),
    };
    let rule = |resource: &str, operations: &[&str]| RuleWithOperations {
        api_groups: Some(vec![String::new()]),
        api_versions: Some(vec!["v1".to_owned()]),
        operations: Some(operations.iter().map(|o| (*o).to_owned()).collect()),
        resources: Some(vec![resource.to_owned()]),
        scope: Some("Namespaced".to_owned()),
    };
    MutatingWebhook {
        name: format!("{}-{:03}.ecr-cname.dev", part.group, part.index),
        admission_review_versions: vec!["v1".to_owned()],
        client_config: WebhookClientConfig { ca_bundle: Some(ca_bundle.clone()), service, url },
        failure_policy: Some(settings.failure_policy.as_str().to_owned()),
        match_conditions: Some(vec![
            condition("names-an-alias", &names_one_of(&part.aliases)),
            // A change of labels, of finalizers or of the status could not be patched, and must not depend on us.
            condition(
                "is-new-or-changes-the-spec",
                "request.operation == 'CREATE' || object.spec != oldObject.spec",
            ),
            condition(
                "is-no-mirror-pod",
                "!('kubernetes.io/config.mirror' in object.metadata.?annotations.orValue({}))",
            ),
        ]),
        match_policy: Some("Equivalent".to_owned()),
        namespace_selector: selector,
        object_selector: Some(LabelSelector {
            match_expressions: Some(vec![not_opted_out()]),
            match_labels: None,
        }),
        reinvocation_policy: Some("IfNeeded".to_owned()),
        rules: Some(vec![rule("pods", &["CREATE", "UPDATE"]), rule("pods/ephemeralcontainers", &["UPDATE"])]),
        side_effects: "None".to_owned(),
        timeout_seconds: Some(i32::from(settings.timeout_seconds)),
    }
}

/// A CEL expression that holds for a pod that names an alias. A pod that names a registry itself is of interest only
/// when it is created: an update could not give it the pull secret, and must not depend on us.
fn names_one_of(aliases: &[&Alias]) -> String {
    // Hosts are of the host grammar, so they need no escapes in CEL.
    let list = |hosts: &mut dyn Iterator<Item = &str>| {
        let mut hosts: Vec<_> = hosts.map(|host| format!("'{host}'")).collect();
        hosts.sort_unstable();
        hosts.dedup();
        format!("[{}]", hosts.join(", "))
    };
    let friendly = list(&mut aliases.iter().map(|alias| alias.host.as_str()));
    let canonical = list(&mut aliases.iter().filter_map(|alias| canonical(alias)));
    let hosts = if canonical == "[]" {
        friendly
    } else {
        format!("({friendly} + (request.operation == 'CREATE' ? {canonical} : []))")
    };
    format!("{IMAGES}\n.exists(i, i.contains('/') && i.split('/')[0].lowerAscii() in {hosts})")
}

fn condition(name: &str, expression: &str) -> MatchCondition {
    MatchCondition { name: name.to_owned(), expression: expression.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{alias, crd::RegistryAlias};
    use serde_json::json;

    fn aliases(specs: impl IntoIterator<Item = serde_json::Value>) -> Vec<Alias> {
        let objects: Vec<RegistryAlias> = specs
            .into_iter()
            .enumerate()
            .map(|(i, spec)| {
                serde_json::from_value(
                    json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
                    "metadata": {"name": format!("a{i}")}, "spec": spec}),
                )
                .unwrap()
            })
            .collect();
        let accepted = alias::accept(&objects);
        assert!(accepted.refused.is_empty(), "{:?}", accepted.refused);
        accepted.aliases
    }

    fn settings() -> EntrySettings {
        EntrySettings {
            endpoint: Endpoint::Service {
                namespace: "ecr-cname".to_owned(),
                name: "ecr-cname-webhook".to_owned(),
            },
            failure_policy: FailurePolicy::Fail,
            timeout_seconds: 3,
            scope: Scope { watched: vec![], excluded: vec!["kube-system".to_owned()] },
        }
    }

    const REGISTRY: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

    #[test]
    fn one_entry_for_each_selector_with_the_hosts_that_share_it() {
        let team = json!({"matchLabels": {"team": "a"}});
        let aliases = aliases([
            json!({"host": "B.example.io", "registry": REGISTRY}),
            json!({"host": "a.example.io", "registry": REGISTRY}),
            json!({"host": "t.example.io", "registry": REGISTRY, "namespaceSelector": team, "pullSecret": "Registry"}),
        ]);
        let entries = entries(&aliases, &ByteString(b"ca".to_vec()), &settings());
        assert_eq!(entries.len(), 2);
        let expressions: Vec<_> =
            entries.iter().map(|e| e.match_conditions.as_ref().unwrap()[0].expression.clone()).collect();
        assert!(
            expressions.iter().any(|e| e.ends_with("in ['a.example.io', 'b.example.io'])")),
            "{expressions:?}"
        );
        let both = format!("in (['t.example.io'] + (request.operation == 'CREATE' ? ['{REGISTRY}'] : [])))");
        assert!(expressions.iter().any(|e| e.ends_with(&both)), "{expressions:?}");
        for (entry, alias) in
            entries.iter().map(|e| (e, aliases.iter().find(|a| e.name.starts_with(a.group().as_str()))))
        {
            let path = entry.client_config.service.as_ref().unwrap().path.as_deref().unwrap();
            assert!(path.starts_with(&format!("/mutate/{}/", alias.unwrap().group())), "{path}");
        }
    }

    #[test]
    fn a_long_list_of_hosts_is_split() {
        let aliases =
            aliases((0..250).map(|i| json!({"host": format!("h{i}.example.io"), "registry": REGISTRY})));
        let entries = entries(&aliases, &ByteString(vec![]), &settings());
        assert_eq!(entries.len(), 3);
        assert!(entries.is_sorted_by(|a, b| a.name < b.name));
    }
}
