//! `RegistryAlias`, the custom resource: its wire format, and what the API server itself refuses.
//!
//! These types are what a person writes and what the schema is generated from. The rest of the code works with
//! [`crate::alias::Alias`], which is made from them once and cannot be wrong.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A friendly registry name and the ECR registry that it stands for.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "ecr-cname.dev",
    version = "v1alpha1",
    kind = "RegistryAlias",
    plural = "registryaliases",
    shortname = "regalias",
    status = "RegistryAliasStatus",
    derive = "PartialEq",
    doc = "A friendly registry name, and the ECR registry that it stands for in this cluster.",
    printcolumn = r#"{"name": "Host", "type": "string", "jsonPath": ".spec.host"}"#,
    printcolumn = r#"{"name": "Registry", "type": "string", "jsonPath": ".status.registry"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name": "Token-Expires", "type": "string", "jsonPath": ".status.tokenExpiresAt"}"#,
    printcolumn = r#"{"name": "Namespaces", "type": "integer", "jsonPath": ".status.namespaces.synced"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.registry) || (has(self.allowedAccounts) && size(self.allowedAccounts) > 0)")
        .message("allowedAccounts is required when registry is omitted: DNS may not choose any other account"),
    validation = Rule::new("!has(self.registry) || !has(self.allowedAccounts) || size(self.allowedAccounts) == 0 || self.registry.substring(0, 12) in self.allowedAccounts")
        .message("registry belongs to an account that is not in allowedAccounts")
)]
pub struct RegistryAliasSpec {
    /// The friendly name as it stands in manifests: a host name, with a port if one is written there. Unique over all
    /// aliases, compared without regard to case; of two, the older wins.
    #[schemars(
        length(min = 1, max = 259),
        regex(
            pattern = r"^([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?$"
        )
    )]
    #[x_kube(
        validation = Rule::new("self.contains('.') || self.contains(':') || self == 'localhost'")
            .message("a host needs a dot or a port: without one, container runtimes take it for a part of the repository path"),
        validation = Rule::new(r"!self.lowerAscii().matches('^[0-9]{12}[.]dkr[.-]ecr')")
            .message("host is itself an ECR host: rewriting it would not end; write the friendly name here and the ECR host in registry")
    )]
    pub host: String,

    /// The canonical ECR host, `ACCOUNT.dkr.ecr.REGION.amazonaws.com` or its form in another partition. Omit it to
    /// follow the host's CNAME in DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::new(r"self.matches('^[0-9]{12}[.]dkr[.-]ecr(-fips)?[.][a-z0-9][a-z0-9_-]*[.](amazonaws[.]com|amazonaws[.]com[.]cn|amazonaws[.]eu|on[.]aws|on[.]amazonwebservices[.]com[.]cn|sc2s[.]sgov[.]gov|c2s[.]ic[.]gov|cloud[.]adc-e[.]uk|csp[.]hci[.]ic[.]gov)$')")
        .message("registry is not the host of an ECR private registry: expected ACCOUNT.dkr.ecr.REGION.amazonaws.com or its form in another partition, in lower case, without scheme, port or path"))]
    pub registry: Option<String>,

    /// The AWS accounts that the registry may belong to. Required when `registry` is omitted: DNS may choose no other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"), inner(regex(pattern = r"^[0-9]{12}$"), length(max = 12)))]
    pub allowed_accounts: Vec<String>,

    /// Put before every repository: `HOST/app` becomes `REGISTRY/PREFIX/app`. For a pull-through cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$")
    )]
    pub repository_prefix: Option<String>,

    /// The namespaces in which the name holds and which get the pull secret. Default: every namespace.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn', 'Exists', 'DoesNotExist'])")
            .message("an operator of a namespaceSelector is In, NotIn, Exists or DoesNotExist"),
        validation = Rule::new("!has(self.matchExpressions) || self.matchExpressions.all(e, (e.operator in ['In', 'NotIn']) == (has(e.values) && size(e.values) > 0))")
            .message("In and NotIn need values, Exists and DoesNotExist take none")
    )]
    pub namespace_selector: LabelSelector,

    /// The identity that asks for the token. Default: the operator's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,

    /// Which pods get the pull secret.
    #[serde(default)]
    pub pull_secret: PullSecret,
}

/// A role that the operator assumes for one alias.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Credentials {
    /// The role's ARN. Its trust policy must allow the operator's own role to assume it.
    #[schemars(
        length(max = 2048),
        regex(pattern = r"^arn:aws[a-z0-9-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$")
    )]
    pub role_arn: String,

    /// The external ID that the role's trust policy asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1224), regex(pattern = r"^[A-Za-z0-9_+=,.@:/-]+$"))]
    pub external_id: Option<String>,
}

/// Which pods get the pull secret.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullSecret {
    /// Pods of which an image was rewritten.
    #[default]
    Rewritten,
    /// Also pods that already name the registry itself.
    Registry,
    /// No pod, and no secret is made: names are rewritten only.
    None,
}

/// What the controller found out about an alias.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RegistryAliasStatus {
    /// The canonical ECR host that the alias resolves to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,

    /// The friendly host that `registry` was found for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,

    /// Until when the token at hand is valid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_expires_at: Option<Time>,

    /// How many namespaces the alias selects, and how many of them hold its pull secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Namespaces>,

    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// `Resolved`, `TokenReady`, `SecretsSynced` and `Ready`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Namespaces that an alias selects.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// How many it selects.
    pub selected: i32,
    /// How many of them hold its pull secret.
    pub synced: i32,
}
