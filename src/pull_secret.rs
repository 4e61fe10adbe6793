//! The pull secret of a namespace: what it holds now, what it shall hold, and what to do about it. Pure.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::core::PartialObjectMeta;
use serde::{Deserialize, Serialize};

use crate::{alias::Identity, tokens::DUE_AT};

/// The label that says that a Secret is ours, and its value.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "ecr-cname");
/// The annotation that says when the first of the tokens in a Secret expires.
pub const EXPIRES_AT: &str = "ecr-cname.dev/expires-at";
/// The annotation that says what a Secret holds: [`Contents`] as JSON.
pub const CONTENTS: &str = "ecr-cname.dev/contents";
/// The field manager of all that this program applies.
pub const FIELD_MANAGER: &str = "ecr-cname";
/// The key of a docker config in a Secret.
pub const DATA_KEY: &str = ".dockerconfigjson";

/// What a pull secret holds: registry host → whose token, and until when.
pub type Contents = BTreeMap<String, Holding>;

/// One token in a pull secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holding {
    /// Until when the token is valid.
    pub expires_at: Timestamp,
    /// Who asked for it: `operator`, or the ARN of a role.
    pub identity: String,
}

/// A Secret of our name, as its metadata show it: its data are never read for this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its UID. It never changes, because kubelet re-authorises cached images by it (KEP-2535).
    pub uid: String,
    /// The version that was observed.
    pub resource_version: String,
    /// Whether it is ours to touch.
    pub ours: bool,
    /// Whether its data, and what the annotation says of them, are still as we wrote them.
    pub intact: bool,
    /// What it holds.
    pub contents: Contents,
}

/// A registry whose credentials a namespace needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Whose token.
    pub identity: Identity,
    /// The token at hand: until when it is valid, and how long it was valid when it came.
    pub token: Option<(Timestamp, SignedDuration)>,
}

/// What to do about a namespace's pull secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing; look again at that time, if there is one.
    Keep(Option<Timestamp>),
    /// Write these: `fresh` registries get the token at hand, `carried` ones keep what the Secret holds.
    Write {
        /// Registries that get the token at hand.
        fresh: Vec<String>,
        /// Registries that keep what the Secret holds.
        carried: Vec<String>,
    },
    /// Delete it: every token in it has expired, and nobody needs it.
    Delete,
    /// A Secret of our name is there that is not ours.
    Foreign,
}

impl Observed {
    /// Reads the metadata of a Secret.
    #[must_use]
    pub fn of(secret: &PartialObjectMeta<Secret>) -> Self {
        let meta = &secret.metadata;
        let annotation = |key: &str| meta.annotations.as_ref()?.get(key);
        let ours = meta.labels.as_ref().and_then(|l| l.get(MANAGED_BY.0)).is_some_and(|v| v == MANAGED_BY.1);
        // Whoever changes a field takes its ownership over, so that a foreign write shows without reading the data.
        let owns = |pointer: &str| {
            meta.managed_fields.iter().flatten().any(|m| {
                m.manager.as_deref() == Some(FIELD_MANAGER)
                    && m.fields_v1.as_ref().is_some_and(|f| f.0.pointer(pointer).is_some())
            })
        };
        let intact = owns("/f:data/f:.dockerconfigjson")
            && owns("/f:metadata/f:annotations/f:ecr-cname.dev~1contents");
        let contents =
            annotation(CONTENTS).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        Self {
            uid: meta.uid.clone().unwrap_or_default(),
            resource_version: meta.resource_version.clone().unwrap_or_default(),
            ours,
            intact,
            contents,
        }
    }

    /// Whether it holds a token for a registry that has not expired.
    #[must_use]
    pub fn holds(&self, registry: &str, identity: &Identity, now: Timestamp) -> bool {
        self.ours
            && self.intact
            && self
                .contents
                .get(registry)
                .is_some_and(|h| h.expires_at > now && h.identity == identity.to_string())
    }
}

/// Decides what to do about the pull secret of a namespace that needs `wanted`.
#[must_use]
pub fn plan(observed: Option<&Observed>, wanted: &BTreeMap<String, Wanted>, now: Timestamp) -> Plan {
    let empty = Contents::new();
    let contents = match observed {
        Some(observed) if !observed.ours => {
            return if wanted.is_empty() { Plan::Keep(None) } else { Plan::Foreign };
        }
        Some(observed) => &observed.contents,
        None => &empty,
    };
    let live = |host: &String| contents.get(host).filter(|held| held.expires_at > now);
    if wanted.is_empty() {
        // Pods that run already keep what they were promised: until the last token has expired.
        return match (observed, contents.values().map(|held| held.expires_at).max()) {
            (None, _) => Plan::Keep(None),
            (Some(_), Some(last)) if last > now => Plan::Keep(Some(last)),
            (Some(_), _) => Plan::Delete,
        };
    }
    let mut next: Option<Timestamp> = None;
    let mut due = observed.is_some_and(|o| !o.intact);
    for (host, want) in wanted {
        let Some((expires_at, lifetime)) = want.token else { continue };
        let held = live(host).filter(|held| held.identity == want.identity.to_string());
        // A token that is not newer would not make it better.
        match held.filter(|held| held.expires_at < expires_at) {
            None if held.is_some() => {}
            None => due = true,
            Some(held) => {
                let at = held.expires_at - lifetime.mul_f64(DUE_AT);
                due |= at <= now;
                next = Some(next.map_or(at, |n: Timestamp| n.min(at)));
            }
        }
    }
    let fresh: Vec<String> =
        wanted.iter().filter(|(_, w)| w.token.is_some()).map(|(h, _)| h.clone()).collect();
    if !due || fresh.is_empty() {
        return Plan::Keep(next);
    }
    // What cannot be replaced now, or is not needed any more, stays until it expires; unless someone else wrote it.
    let intact = observed.is_some_and(|o| o.intact);
    let carried =
        contents.keys().filter(|h| intact && live(h).is_some() && !fresh.contains(h)).cloned().collect();
    Plan::Write { fresh, carried }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIFE: SignedDuration = SignedDuration::from_hours(12);

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn hours(h: i64) -> Timestamp {
        now() + SignedDuration::from_hours(h)
    }

    fn observed(contents: &[(&str, i64)]) -> Observed {
        let holding = |h| Holding { expires_at: hours(h), identity: "operator".to_owned() };
        Observed {
            uid: "u".to_owned(),
            resource_version: "7".to_owned(),
            ours: true,
            intact: true,
            contents: contents.iter().map(|(host, h)| ((*host).to_owned(), holding(*h))).collect(),
        }
    }

    fn wanted(hosts: &[(&str, Option<i64>)]) -> BTreeMap<String, Wanted> {
        hosts
            .iter()
            .map(|(host, token)| {
                let token = token.map(|h| (hours(h), LIFE));
                ((*host).to_owned(), Wanted { identity: Identity::Operator, token })
            })
            .collect()
    }

    fn write(fresh: &[&str], carried: &[&str]) -> Plan {
        let own = |hosts: &[&str]| hosts.iter().map(|h| (*h).to_owned()).collect();
        Plan::Write { fresh: own(fresh), carried: own(carried) }
    }

    /// What it is about, what is there, what is wanted, and what to do.
    type Case = (&'static str, Option<Observed>, BTreeMap<String, Wanted>, Plan);

    #[test]
    fn plans() {
        let foreign = Observed { ours: false, ..observed(&[]) };
        let drifted = Observed { intact: false, ..observed(&[("a", 12)]) };
        let other = Observed {
            contents: [("a".to_owned(), Holding { expires_at: hours(12), identity: "arn:x".to_owned() })]
                .into(),
            ..observed(&[])
        };
        let cases: Vec<Case> = vec![
            ("nothing wanted, nothing there", None, wanted(&[]), Plan::Keep(None)),
            ("a new namespace gets its Secret", None, wanted(&[("a", Some(12))]), write(&["a"], &[])),
            ("no token yet: no empty Secret", None, wanted(&[("a", None)]), Plan::Keep(None)),
            (
                "half of two tokens: what there is",
                None,
                wanted(&[("a", Some(12)), ("b", None)]),
                write(&["a"], &[]),
            ),
            ("fresh", Some(observed(&[("a", 12)])), wanted(&[("a", Some(12))]), Plan::Keep(None)),
            (
                "a new leader does not rewrite what is good",
                Some(observed(&[("a", 9)])),
                wanted(&[("a", Some(12))]),
                Plan::Keep(Some(hours(9) - LIFE.mul_f64(DUE_AT))),
            ),
            (
                "past half of its life",
                Some(observed(&[("a", 6)])),
                wanted(&[("a", Some(12))]),
                write(&["a"], &[]),
            ),
            ("expired", Some(observed(&[("a", -1)])), wanted(&[("a", Some(12))]), write(&["a"], &[])),
            (
                "no token: the old one stays",
                Some(observed(&[("a", 1)])),
                wanted(&[("a", None)]),
                Plan::Keep(None),
            ),
            ("another identity", Some(other), wanted(&[("a", Some(12))]), write(&["a"], &[])),
            ("drift is healed", Some(drifted.clone()), wanted(&[("a", Some(12))]), write(&["a"], &[])),
            ("drift without a token waits", Some(drifted), wanted(&[("a", None)]), Plan::Keep(None)),
            (
                "one more registry; the unavailable one is carried",
                Some(observed(&[("a", 9)])),
                wanted(&[("a", None), ("b", Some(12))]),
                write(&["b"], &["a"]),
            ),
            (
                "one registry less: kept until it expires",
                Some(observed(&[("a", 2), ("b", 6)])),
                wanted(&[("b", Some(12))]),
                write(&["b"], &["a"]),
            ),
            (
                "one registry less, expired",
                Some(observed(&[("a", -2), ("b", 6)])),
                wanted(&[("b", Some(12))]),
                write(&["b"], &[]),
            ),
            ("deselected: grace", Some(observed(&[("a", 2)])), wanted(&[]), Plan::Keep(Some(hours(2)))),
            ("deselected and expired", Some(observed(&[("a", -2)])), wanted(&[]), Plan::Delete),
            ("foreign", Some(foreign.clone()), wanted(&[("a", Some(12))]), Plan::Foreign),
            ("foreign, and nobody asks", Some(foreign), wanted(&[]), Plan::Keep(None)),
        ];
        for (name, observed, wanted, expected) in cases {
            assert_eq!(plan(observed.as_ref(), &wanted, now()), expected, "{name}");
        }
    }

    #[test]
    fn drift_and_ownership_show_in_the_metadata() {
        let secret = |data: &str, annotation: &str, label: &str| -> PartialObjectMeta<Secret> {
            serde_json::from_value(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {
            "name": "ecr-cname", "uid": "u", "resourceVersion": "7", "labels": {MANAGED_BY.0: label},
            "annotations": {CONTENTS: r#"{"a":{"expiresAt":"2026-01-01T02:00:00Z","identity":"operator"}}"#},
            "managedFields": [
                {"manager": annotation, "operation": "Apply",
                 "fieldsV1": {"f:metadata": {"f:annotations": {format!("f:{CONTENTS}"): {}}}}},
                {"manager": data, "operation": "Update",
                 "fieldsV1": {"f:data": {format!("f:{DATA_KEY}"): {}}}},
            ]}}))
            .unwrap()
        };
        let ours = FIELD_MANAGER;
        assert_eq!(Observed::of(&secret(ours, ours, "ecr-cname")), observed(&[("a", 2)]));
        assert!(!Observed::of(&secret("kubectl-edit", ours, "ecr-cname")).intact);
        assert!(!Observed::of(&secret(ours, "kubectl-annotate", "ecr-cname")).intact);
        assert!(!Observed::of(&secret(ours, ours, "helm")).ours);
    }
}
