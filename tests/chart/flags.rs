//! What the flags say is what the objects are called and what the rights allow, whatever the names.

use clap::Parser as _;
use ecr_cname::args::{CertificateMode, Cli, Command};
use serde_json::{Value, json};

use crate::render::{Objects, args, full_values, path, render, text};

/// Cases in which names differ from the defaults.
async fn renderings() -> Vec<Objects> {
    vec![
        render(&json!({})).await.unwrap(),
        render(&json!({"fullnameOverride": "names", "pullSecret": {"name": "pull"}})).await.unwrap(),
        render(&json!({"nameOverride": "other", "certificate": {"secretName": "cert"}})).await.unwrap(),
        render(&json!({"webhook": {"serviceAccount": {"name": "w"}}, "controller": {"serviceAccount": {"name": "c"}}}))
            .await
            .unwrap(),
        Objects::parse(&text(&["--values", path(&full_values())]).await.unwrap()),
    ]
}

/// The command line of the component, as the binary understands it.
fn command(objects: &Objects, kind: &str, component: &str) -> Command {
    let object = of(objects, kind, component);
    let args = args(object);
    let line = ["ecr-cname"].into_iter().chain(args.iter().copied());
    Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{args:?}: {error}")).command
}

/// The one object of a kind that belongs to a component, in the release's namespace if it is in one.
fn of<'a>(objects: &'a Objects, kind: &str, component: &str) -> &'a Value {
    let found: Vec<_> = objects
        .0
        .iter()
        .filter(|o| o["kind"] == kind && o["metadata"]["labels"]["app.kubernetes.io/component"] == component)
        .filter(|o| o["metadata"]["namespace"].as_str().is_none_or(|namespace| namespace == "ecr-cname"))
        .collect();
    assert_eq!(found.len(), 1, "{kind} of {component}");
    found[0]
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap()
}

/// The names to which a role narrows a resource, in the rule that has this verb.
fn narrowed<'a>(role: &'a Value, resource: &str, verb: &str) -> Vec<&'a str> {
    let has = |list: &Value, item: &str| list.as_array().unwrap().iter().any(|i| i == item);
    let rules = role["rules"].as_array().unwrap();
    let rules = rules.iter().filter(|rule| has(&rule["resources"], resource) && has(&rule["verbs"], verb));
    rules
        .flat_map(|rule| rule["resourceNames"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .collect()
}

#[tokio::test]
async fn names_in_flags_are_those_of_the_objects_and_of_the_rights() {
    for objects in renderings().await {
        let Command::Webhook { process, .. } = command(&objects, "Deployment", "webhook") else {
            panic!("not the webhook")
        };
        let Command::Controller { process: of_controller, controller } =
            command(&objects, "Deployment", "controller")
        else {
            panic!("not the controller")
        };
        let names = &of_controller.names;
        // The two agree, and the namespace is the pod's.
        assert_eq!(process.names.certificate_secret, names.certificate_secret);
        assert_eq!(process.names.pull_secret, names.pull_secret);
        assert_eq!(process.failure_policy, of_controller.failure_policy);

        // What is there already, under the name that the controller is told.
        let configuration = of(&objects, "MutatingWebhookConfiguration", "webhook");
        assert_eq!(controller.kept.webhook_configuration, name(configuration));
        assert_eq!(controller.webhook_service, name(of(&objects, "Service", "webhook")));

        // What it may touch.
        let cluster = of(&objects, "ClusterRole", "controller");
        let own = of(&objects, "Role", "controller");
        assert_eq!(
            narrowed(cluster, "mutatingwebhookconfigurations", "patch"),
            [controller.kept.webhook_configuration.as_str()]
        );
        assert_eq!(narrowed(own, "secrets", "get"), [names.certificate_secret.as_str()]);
        assert_eq!(narrowed(own, "leases", "update"), [controller.kept.lease.as_str()]);
        assert_eq!(
            narrowed(of(&objects, "Role", "webhook"), "secrets", "get"),
            [names.certificate_secret.as_str()]
        );
        let watched = &controller.kept.watch_namespaces;
        if watched.is_empty() {
            assert_eq!(narrowed(cluster, "secrets", "delete"), [names.pull_secret.as_str()]);
        } else {
            assert_eq!(narrowed(cluster, "namespaces", "watch"), *watched);
            for namespace in watched {
                let role = objects.get(&format!("Role/{}/{namespace}", name(own)));
                assert_eq!(narrowed(role, "secrets", "delete"), [names.pull_secret.as_str()]);
            }
        }
        let external = controller.certificate == CertificateMode::External;
        assert_eq!(narrowed(own, "secrets", "patch").is_empty(), external);

        // What it may create.
        let policy = of(&objects, "ValidatingAdmissionPolicy", "controller");
        let account =
            of(&objects, "Deployment", "controller")["spec"]["template"]["spec"]["serviceAccountName"]
                .as_str()
                .unwrap();
        let who = policy.pointer("/spec/matchConditions/0/expression").unwrap().as_str().unwrap();
        assert!(who.ends_with(&format!("'system:serviceaccount:ecr-cname:{account}'")), "{who}");
        let what = policy.pointer("/spec/validations/0/expression").unwrap().as_str().unwrap();
        assert!(what.contains(&format!("== '{}'", names.pull_secret)), "{what}");
        assert_eq!(what.contains(&format!("== '{}'", names.certificate_secret)), !external, "{what}");

        // What is taken away in the end.
        let Command::Cleanup { cleanup } = command(&objects, "Job", "cleanup") else { panic!("not cleanup") };
        assert_eq!(format!("{:?}", cleanup.kept), format!("{:?}", controller.kept));
        assert_eq!(cleanup.names.certificate_secret, names.certificate_secret);
        assert_eq!(cleanup.names.pull_secret, names.pull_secret);
        assert_eq!(cleanup.names.namespace, "ecr-cname");
        let role = of(&objects, "Role", "cleanup");
        assert_eq!(narrowed(role, "secrets", "get"), [names.certificate_secret.as_str()]);
        assert_eq!(narrowed(role, "leases", "delete"), [controller.kept.lease.as_str()]);
    }
}

/// Bindings lead from the account that pods run as to the role of their component.
#[tokio::test]
async fn every_binding_is_for_the_account_of_its_own_component() {
    for objects in renderings().await {
        let mut bindings = 0;
        for binding in objects.of("ClusterRoleBinding").chain(objects.of("RoleBinding")) {
            let component = binding["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap();
            let kind = if component == "cleanup" { "Job" } else { "Deployment" };
            let account = &of(&objects, kind, component)["spec"]["template"]["spec"]["serviceAccountName"];
            assert_eq!(
                binding["subjects"],
                json!([{"kind": "ServiceAccount", "name": account, "namespace": "ecr-cname"}])
            );
            let role = binding["roleRef"]["name"].as_str().unwrap();
            let namespace = binding["metadata"]["namespace"].as_str().unwrap_or_default();
            let kind = binding["roleRef"]["kind"].as_str().unwrap();
            let role = objects.get(&format!("{kind}/{role}/{namespace}"));
            assert_eq!(role["metadata"]["labels"]["app.kubernetes.io/component"], component);
            bindings += 1;
        }
        assert!(bindings >= 6, "{bindings}");
    }
}

/// The certificate must be for the name that the API server calls, and `helm test` asks for.
#[tokio::test]
async fn the_webhook_is_called_by_the_name_in_its_certificate() {
    let values = json!({"fullnameOverride": "names", "certificate": {"mode": "cert-manager"}});
    let objects = render(&values).await.unwrap();
    let service = of(&objects, "Service", "webhook");
    let host = format!("{}.ecr-cname.svc", name(service));
    assert_eq!(objects.get("Certificate/names-webhook")["spec"]["dnsNames"], json!([host]));
    let test = objects.get("Pod/names-test");
    let args: Vec<_> = test.pointer("/spec/containers/0/args").unwrap().as_array().unwrap().clone();
    let line = ["ecr-cname"].into_iter().chain(args.iter().map(|arg| arg.as_str().unwrap()));
    let Command::Probe(probe) = Cli::try_parse_from(line).unwrap().command else { panic!("not probe") };
    assert_eq!((probe.host, probe.port), (host, 443));
}

/// Selectors of what leads to pods must match the pods.
#[tokio::test]
async fn selectors_select_the_pods_of_their_component_only() {
    for objects in renderings().await {
        for component in ["webhook", "controller"] {
            let pods = |component: &str| {
                of(&objects, "Deployment", component)["spec"]["template"]["metadata"]["labels"].clone()
            };
            let selects = |selector: &Value, labels: &Value| {
                selector.as_object().unwrap().iter().all(|(key, value)| labels.get(key) == Some(value))
            };
            let other = if component == "webhook" { "controller" } else { "webhook" };
            let mut selectors = vec![
                of(&objects, "Deployment", component).pointer("/spec/selector/matchLabels").unwrap(),
                of(&objects, "PodDisruptionBudget", component).pointer("/spec/selector/matchLabels").unwrap(),
            ];
            if component == "webhook" {
                selectors.push(of(&objects, "Service", component).pointer("/spec/selector").unwrap());
            }
            for selector in selectors {
                assert!(selects(selector, &pods(component)), "{selector}");
                assert!(!selects(selector, &pods(other)), "{selector}");
                // Pods of hooks are neither.
                let hook = objects.of("Job").next().unwrap();
                assert!(!selects(selector, &hook["spec"]["template"]["metadata"]["labels"]), "{selector}");
            }
        }
    }
}
