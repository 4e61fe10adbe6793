//! Two judges of an alias: the CRD's schema and CEL, asked of a real API server, and our own code, which meets aliases that
//! never came through this CRD: from an older one, or from a file.

use ecr_cname::{alias::accept, crd::RegistryAlias};
use kube::{
    Api,
    api::PostParams,
    core::{ApiResource, DynamicObject},
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::cluster::{REGISTRY, shared};

fn host() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-zA-Z0-9-]{1,8}(\\.[a-zA-Z0-9-]{0,8}){0,3}(:[0-9]{0,6})?",
        2 => "[a-z]{1,5}\\.[a-z]{2,4}(:[0-9]{1,5})?",
        1 => "\\[[0-9a-f:]{0,12}\\](:[0-9]{1,3})?",
        1 => "[0-9]{12}\\.dkr[.-]ecr(-fips)?\\.us-east-1\\.(amazonaws\\.com|on\\.aws|example\\.io)",
        1 => "[ -~]{0,12}|localhost|a{1,70}\\.b",
    ]
}

fn registry() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just(REGISTRY.to_owned()),
        4 => "[0-9]{11,13}\\.dkr[.-]ecr(-fips)?\\.[a-z0-9_-]{0,10}\\.(amazonaws\\.com(\\.cn)?|amazonaws\\.eu|on\\.aws|sc2s\\.sgov\\.gov|evil\\.com)",
        1 => "[ -~]{0,12}",
    ]
}

fn spec() -> impl Strategy<Value = Value> {
    let accounts =
        proptest::collection::vec(prop_oneof![Just("123456789012".to_owned()), "[0-9a]{11,13}"], 0..3);
    let label = "[a-zA-Z0-9._/-]{0,10}";
    let expression =
        ("[a-z./]{0,6}", "(In|NotIn|Exists|DoesNotExist|in)", proptest::collection::vec(label, 0..2))
            .prop_map(|(key, operator, values)| json!({"key": key, "operator": operator, "values": values}));
    let selector = prop_oneof![
        3 => Just(json!({})),
        1 => (label, label).prop_map(|(k, v)| json!({"matchLabels": {k: v}})),
        2 => proptest::collection::vec(expression, 0..2).prop_map(|e| json!({"matchExpressions": e})),
    ];
    let prefix = prop_oneof![3 => Just(None), 1 => "[a-z0-9._/-]{0,8}".prop_map(Some)];
    (host(), proptest::option::weighted(0.8, registry()), accounts, selector, prefix).prop_map(
        |(host, registry, accounts, selector, prefix)| {
            let mut spec = json!({"host": host, "allowedAccounts": accounts, "namespaceSelector": selector});
            if let Some(registry) = registry {
                spec["registry"] = json!(registry);
            }
            if let Some(prefix) = prefix {
                spec["repositoryPrefix"] = json!(prefix);
            }
            spec
        },
    )
}

/// What the API server stores is never refused later. (Labels of selectors are: their syntax is too long for CEL.)
#[tokio::test]
async fn what_the_api_server_accepts_is_an_alias() {
    let cluster = shared().await;
    let api: Api<DynamicObject> = Api::all_with(cluster.client(), &ApiResource::erase::<RegistryAlias>(&()));
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let mut runner = TestRunner::new(ProptestConfig::default());
    let cases = ProptestConfig::default().cases;
    let (mut accepted, mut both) = (0, 0);
    for case in 0..cases {
        let spec = spec().new_tree(&mut runner).unwrap().current();
        let object = json!({"apiVersion": "ecr-cname.dev/v1alpha1", "kind": "RegistryAlias",
            "metadata": {"name": format!("generated-{case}")}, "spec": spec});
        let theirs = api.create(&dry_run, &serde_json::from_value(object.clone()).unwrap()).await;
        let ours = serde_json::from_value::<RegistryAlias>(object).map(|alias| accept([alias]).refused);
        match (theirs, ours) {
            (Ok(_), Ok(refused)) => {
                accepted += 1;
                let by_label =
                    refused.iter().any(|(_, refusal)| refusal.to_string().contains("is not a label"));
                assert!(refused.is_empty() || by_label, "{spec}: {refused:?}");
            }
            (Err(kube::Error::Api(status)), ours) => {
                assert_eq!(status.code, 422, "{spec}: {status:?}");
                // Nor is what it refuses for its host or registry an alias for us; but it knows only the beginning of an ECR host.
                if ours.is_ok_and(|refused| refused.is_empty()) {
                    let small =
                        ["itself an ECR host", "allowedAccounts", "repositoryPrefix", "namespaceSelector"];
                    assert!(
                        small.iter().any(|field| status.message.contains(field)),
                        "{spec}: {}",
                        status.message
                    );
                    both += 1;
                }
            }
            (theirs, ours) => panic!("{spec}: {theirs:?} {ours:?}"),
        }
    }
    assert!(accepted > cases / 20, "only {accepted} of {cases} specs were accepted");
    assert!(both < cases / 4, "{both} of {cases} specs were refused by the API server only");
}
