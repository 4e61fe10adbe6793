//! The namespaces that the operator is for: said once, and asked both by the webhook entries and by the pull secrets.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// The label that a pod or a namespace opts out with.
pub const OPT_OUT: &str = "ecr-cname.dev/rewrite";
/// The value that it opts out with.
pub const OPT_OUT_VALUE: &str = "disabled";

/// The label that every namespace has, with its name:
/// <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-metadata-name>.
const NAME: &str = "kubernetes.io/metadata.name";

/// The namespaces that the operator is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only these; empty for the whole cluster.
    pub watched: Vec<String>,
    /// None of these.
    pub excluded: Vec<String>,
}

impl Scope {
    /// Whether a namespace is in scope, and has not opted out.
    #[must_use]
    pub fn includes(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let named = |names: &[String]| names.iter().any(|n| n == name);
        (self.watched.is_empty() || named(&self.watched))
            && !named(&self.excluded)
            && labels.get(OPT_OUT).is_none_or(|value| value != OPT_OUT_VALUE)
    }

    /// A selector narrowed to the namespaces in scope, in the words of the API server.
    #[must_use]
    pub fn narrow(&self, selector: &LabelSelector) -> LabelSelector {
        let mut selector = selector.clone();
        let expressions = selector.match_expressions.get_or_insert_default();
        for (operator, names) in [("In", &self.watched), ("NotIn", &self.excluded)] {
            if !names.is_empty() {
                expressions.push(requirement(NAME, operator, names.clone()));
            }
        }
        expressions.push(not_opted_out());
        selector
    }
}

/// What holds for an object that has not opted out.
#[must_use]
pub fn not_opted_out() -> LabelSelectorRequirement {
    requirement(OPT_OUT, "NotIn", vec![OPT_OUT_VALUE.to_owned()])
}

fn requirement(key: &str, operator: &str, values: Vec<String>) -> LabelSelectorRequirement {
    LabelSelectorRequirement { key: key.to_owned(), operator: operator.to_owned(), values: Some(values) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::{Selector, SelectorExt as _};
    use proptest::prelude::*;

    fn names() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::vec("[abc]", 0..3)
    }

    proptest! {
        /// A pod is rewritten just where its namespace gets a pull secret.
        #[test]
        fn the_api_server_and_the_pull_secrets_see_the_same_namespaces(
            watched in names(),
            excluded in names(),
            name in "[abcd]",
            opt_out in proptest::option::of("disabled|enabled"),
        ) {
            let scope = Scope { watched, excluded };
            let mut labels = BTreeMap::new();
            labels.extend(opt_out.map(|value| (OPT_OUT.to_owned(), value)));
            let included = scope.includes(&name, &labels);
            labels.insert(NAME.to_owned(), name);
            let selector = Selector::try_from(scope.narrow(&LabelSelector::default())).unwrap();
            prop_assert_eq!(selector.matches(&labels), included);
        }
    }
}
