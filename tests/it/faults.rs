//! Faults: of AWS, of the API server, of the operator itself. It degrades, shows, and heals.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use testbed::{
    aws::{Fault, Operation, Scope, TOKEN_PREFIX},
    operator::{NAMESPACE, ROLE, Start},
};

use crate::cluster::{Cluster, LIMIT, REGISTRY, images, pull_secrets, tokens, unique};

const MINT: Operation = Operation::GetAuthorizationToken;

/// Webhook down with `Fail` and a broad match: nothing can start, not even the CNI: kyverno #4686, #11122; topolvm #395;
/// capsule #2036. Here only a pod that names an alias depends on the webhook.
#[tokio::test]
async fn while_the_operator_is_down_ordinary_pods_start_and_alias_pods_are_refused() {
    let running = Cluster::start().await.run().await;
    let namespace = running.namespace(&[]).await;
    let old = json!({"containers": [{"name": "app", "image": "a.example.io/app"}]});
    running.try_pod(&namespace, "old", old).await.unwrap();
    let spec = json!({"host": "a.example.io", "registry": REGISTRY, "pullSecret": "Registry"});
    running.alias("internal", spec).await;
    running.pod(&namespace, "canonical", &format!("{REGISTRY}/app")).await;
    running.operator.process().kill().unwrap();
    running.operator.process().wait(LIMIT).expect("the operator ends");

    let pod = running.pod(&namespace, "ordinary", "nginx").await;
    assert_eq!(images(&pod), ["nginx"]);
    // Nor does a change of a pod that is there already, unless it changes what may name an image.
    for name in ["old", "canonical", "ordinary"] {
        let pods: Api<Pod> = Api::namespaced(running.client(), &namespace);
        let labelled = json!({"metadata": {"labels": {"a": "b"}, "finalizers": ["example.io/x"]}});
        pods.patch(name, &PatchParams::default(), &Patch::Merge(labelled)).await.unwrap();
        pods.delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
        let finalized = json!({"metadata": {"finalizers": null}});
        pods.patch(name, &PatchParams::default(), &Patch::Merge(finalized)).await.unwrap();
        assert!(pods.get_opt(name).await.unwrap().is_none(), "{name}");
    }
    let spec = json!({"containers": [{"name": "app", "image": "a.example.io/app"}]});
    let error = running.try_pod(&namespace, "alias", spec.clone()).await.unwrap_err().to_string();
    assert!(error.contains("ecr-cname.dev"), "{error}");

    // It comes back, with another port; what was refused is let in.
    let _operator = running.operator(running.quick(Start::run()).named("again")).await;
    running.ready("internal").await;
    let pod = await_pod(&running, &namespace, spec).await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
}

/// Creates a pod as a ReplicaSet does: again and again until it is let in.
async fn await_pod(cluster: &Cluster, namespace: &str, spec: serde_json::Value) -> Pod {
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        match cluster.try_pod(namespace, &unique("p"), spec.clone()).await {
            Ok(pod) => return pod,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
    }
}

/// The ECR token never renewed; a fixed schedule beside the real expiry: k8s-image-swapper #31; external-secrets #6690;
/// argocd-image-updater #1367; kubernetes #69141. Here tokens live for seconds, and none ever runs out.
#[tokio::test]
async fn a_token_is_refreshed_before_it_expires_by_one_call_for_all_namespaces() {
    let cluster = Cluster::start().await;
    let lifetime = Duration::from_secs(8);
    cluster.aws.set_token_lifetime(lifetime);
    let running = cluster.run().await;
    let namespaces = [running.namespace(&[]).await, running.namespace(&[]).await];
    running.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let mut last = running.token(&namespaces[0], REGISTRY).await;
    let uid = crate::cluster::uid(&running.secrets(&namespaces[0]).get("ecr-cname").await.unwrap());
    for _ in 0..3 {
        let next = running
            .secret(&namespaces[0], |secret| {
                let held = tokens(secret?).remove(REGISTRY)?;
                // At any time what the Secret holds is valid.
                assert!(running.aws.is_valid(&held), "the Secret held a token that had expired");
                (held != last).then_some(held)
            })
            .await;
        running.holds(&namespaces[1], REGISTRY, &next).await;
        last = next;
    }
    let calls = running.aws.calls();
    let minted: Vec<_> = calls.iter().filter(|c| c.operation == MINT).map(|c| c.at).collect();
    assert!((4..=5).contains(&minted.len()), "{} calls", minted.len());
    for pair in minted.windows(2) {
        let pause = pair[1].duration_since(pair[0]).unwrap().as_secs_f64() / lifetime.as_secs_f64();
        assert!((0.3..0.7).contains(&pause), "refreshed after {pause} of a life");
    }
    // In place: kubelet re-authorises cached images by the Secret's UID.
    assert_eq!(crate::cluster::uid(&running.secrets(&namespaces[0]).get("ecr-cname").await.unwrap()), uid);
}

/// Good credentials overwritten with empty ones after a failed refresh: registry-creds #68, #95.
#[tokio::test]
async fn a_failing_refresh_keeps_the_last_good_token_says_why_and_heals() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(60));
    let running = cluster.run().await;
    let namespace = running.namespace(&[]).await;
    running.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let token = running.token(&namespace, REGISTRY).await;
    let version = |s: &k8s_openapi::api::core::v1::Secret| s.metadata.resource_version.clone();
    let before = version(&running.secrets(&namespace).get("ecr-cname").await.unwrap());
    for (fault, reason) in [
        (Fault::AccessDenied, "AccessDenied"),
        (Fault::Throttle, "Throttled"),
        (Fault::ServerError, "AWSError"),
        (Fault::EmptyToken, "BadAnswer"),
        (Fault::NoToken, "BadAnswer"),
        (Fault::ExpiredToken, "TokenExpiredOnArrival"),
        (Fault::MalformedBody, "BadAnswer"),
        (Fault::CloseConnection, "AWSUnreachable"),
        // Global STS endpoint or no timeout: hangs in private clusters: aws-app-mesh-controller #252.
        (Fault::Hang, "AWSUnreachable"),
    ] {
        running.aws.heal();
        running.aws.inject(fault, Scope::of(MINT));
        // Another region asks for a token at once, and so shows what this fault does to a first token …
        let name = unique("fault");
        let region = format!("123456789012.dkr.ecr.{}.amazonaws.com", name.replace("fault", "eu-fault"));
        running.create_alias(&name, json!({"host": format!("{name}.example.io"), "registry": region})).await;
        let alias = running.condition(&name, "TokenReady", |c| c.status == "False").await;
        let conditions = alias.status.unwrap().conditions;
        let condition = conditions.iter().find(|c| c.type_ == "TokenReady").unwrap();
        assert_eq!(condition.reason, reason, "{fault:?}: {}", condition.message);
        running.delete_alias(&name).await;
    }
    // … while the refresh of the one that is there fails, too.
    let alias = running.condition("internal", "TokenReady", |c| c.reason == "RefreshFailing").await;
    let conditions = alias.status.unwrap().conditions;
    let message = &conditions.iter().find(|c| c.type_ == "TokenReady").unwrap().message;
    assert!(message.contains("the last token is valid until"), "{message}");
    running.event("default", "internal", "RefreshFailing").await;
    let secret = running.secrets(&namespace).get("ecr-cname").await.unwrap();
    assert_eq!(tokens(&secret)[REGISTRY], token);
    assert_eq!(version(&secret), before);
    // A network call inside admission: a registry hiccup blocks pods: kyverno #12114; k8s-image-swapper #632. Not here.
    let pod = running.pod(&namespace, "meanwhile", "a.example.io/app").await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
    // A new namespace still gets what is good.
    running.holds(&running.namespace(&[]).await, REGISTRY, &token).await;
    let failures =
        running.operator.metric("ecr_cname_token_refreshes_total{outcome=\"BadAnswer\"}").await.unwrap();
    assert!(failures >= 3.0, "{failures}");

    running.aws.heal();
    running.condition("internal", "TokenReady", |c| c.reason == "TokenValid").await;
    running.secret(&namespace, |s| (tokens(s?).get(REGISTRY)? != &token).then_some(())).await;
}

#[tokio::test]
async fn aws_down_at_the_start_is_a_condition_and_heals_by_itself() {
    let cluster = Cluster::start().await;
    cluster.aws.inject(Fault::ServerError, Scope::all());
    let running = cluster.run().await;
    let namespace = running.namespace(&[]).await;
    running.create_alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let alias = running.condition("internal", "TokenReady", |c| c.status == "False").await;
    let conditions = alias.status.unwrap().conditions;
    assert_eq!(conditions.iter().find(|c| c.type_ == "Ready").unwrap().status, "False");
    assert!(running.secrets(&namespace).get_opt("ecr-cname").await.unwrap().is_none());
    // Attempts follow with back-off: no hot loop.
    let scope = Scope::all();
    running.aws.wait_for(|state| state.count(&scope) >= 3, LIMIT).await.unwrap();
    let calls: Vec<_> = running.aws.calls().iter().map(|c| c.at).collect();
    assert!(calls[calls.len() - 1].duration_since(calls[0]).unwrap() > Duration::from_secs(1));
    running.aws.heal();
    running.ready("internal").await;
    running.token(&namespace, REGISTRY).await;
}

/// Deselected namespaces and deleted aliases: the Secret goes when its token has expired, and not before.
#[tokio::test]
async fn what_is_not_needed_any_more_stays_until_it_expires() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(12));
    let running = cluster.run().await;
    let namespace = running.namespace(&[("team", "a")]).await;
    let selector = json!({"matchLabels": {"team": "a"}});
    let spec = |host: &str, registry: &str| json!({"host": host, "registry": registry, "namespaceSelector": selector});
    let other = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
    running.alias("a", spec("a.example.io", REGISTRY)).await;
    running.alias("b", spec("b.example.io", other)).await;
    running.token(&namespace, REGISTRY).await;
    let promised = running.token(&namespace, other).await;

    // One of two registries: its token stays beside the other's fresh ones until it has expired, then it goes.
    running.delete_alias("b").await;
    let seen_beside_a_fresh_one = std::cell::Cell::new(false);
    let first = running.token(&namespace, REGISTRY).await;
    running
        .secret(&namespace, |secret| {
            let held = tokens(secret?);
            match held.get(other) {
                Some(token) => {
                    assert_eq!(*token, promised);
                    seen_beside_a_fresh_one
                        .set(seen_beside_a_fresh_one.get() || held.get(REGISTRY)? != &first);
                    None
                }
                None => {
                    assert!(!running.aws.is_valid(&promised), "taken away while it was valid");
                    Some(())
                }
            }
        })
        .await;
    assert!(seen_beside_a_fresh_one.get());

    // All of it.
    running.label_namespace(&namespace, json!({"team": null})).await;
    let last = running.token(&namespace, REGISTRY).await;
    running
        .secret(&namespace, |secret| match secret {
            Some(_) => None,
            None => {
                assert!(!running.aws.is_valid(&last), "deleted while it was valid");
                Some(())
            }
        })
        .await;
}

/// A watch that died without a word: new namespaces ignored: reflector #150, #478, #545.
#[tokio::test]
async fn an_api_server_that_restarts_is_followed_again() {
    let running = Cluster::start().await.run().await;
    running.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    running.token(&running.namespace(&[]).await, REGISTRY).await;
    running.control_plane.kill_apiserver().await.unwrap();
    running.control_plane.start_apiserver().await.unwrap();
    let namespace = running.namespace(&[]).await;
    running.token(&namespace, REGISTRY).await;
    let spec = json!({"containers": [{"name": "app", "image": "a.example.io/app"}]});
    let pod = await_pod(&running, &namespace, spec).await;
    assert_eq!(images(&pod), [format!("{REGISTRY}/app")]);
    assert_eq!(pull_secrets(&pod), ["ecr-cname"]);
    running.alias("later", json!({"host": "b.example.io", "registry": REGISTRY})).await;
}

#[tokio::test]
async fn a_process_that_cannot_do_its_work_says_why_and_ends() {
    let cluster = Cluster::start().await;
    // The port is taken.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("--dns-server={}", taken.local_addr().unwrap());
    let listen = format!("--admin-listen={}", taken.local_addr().unwrap());
    let output = tokio::process::Command::new(crate::cluster::binary())
        .args(["controller", "--webhook-url=https://127.0.0.1:1", &address, &listen])
        .env("KUBECONFIG", cluster.control_plane.kubeconfig())
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("cannot listen on") && error.contains("--admin-listen"), "{error}");
}

/// Tokens never appear in logs, events, conditions, annotations or metrics, at the most verbose level, errors included.
#[tokio::test]
async fn no_token_or_key_leaks() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(6));
    let start = cluster.quick(Start::run()).args(["--log=trace", "--log-format=json"]);
    let operator = cluster.operator(start).await;
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    // With keys of an assumed role, too.
    let role = "arn:aws:iam::210987654321:role/pull";
    cluster.aws.role(role).trusts_role(ROLE);
    let other = "210987654321.dkr.ecr.eu-west-1.amazonaws.com";
    let spec = json!({"host": "b.example.io", "registry": other, "credentials": {"roleArn": role}});
    cluster.alias("role", spec).await;
    let first = cluster.token(&namespace, REGISTRY).await;
    cluster.secret(&namespace, |s| (tokens(s?).get(REGISTRY)? != &first).then_some(())).await;
    for fault in [
        Fault::MalformedBody,
        Fault::HugeBody,
        Fault::ExpiredToken,
        Fault::EmptyToken,
        Fault::NoToken,
        Fault::Throttle,
        Fault::AccessDenied,
        Fault::ServerError,
        Fault::CloseConnection,
    ] {
        cluster.aws.heal();
        cluster.aws.inject(fault, Scope::all());
        let seen = cluster.aws.calls().len();
        cluster.aws.wait_for(|state| state.calls().len() > seen, LIMIT).await.unwrap();
    }
    cluster.pod(&namespace, "web", "a.example.io/app").await;
    let log = operator.process().log().unwrap();
    assert!(log.contains("\"level\":\"DEBUG\""), "the log is verbose");
    let (_, metrics) = operator.admin("/metrics").await.unwrap();
    let events = cluster.control_plane.kubectl(&["get", "events", "-A", "-o", "json"]).await.unwrap();
    let aliases = cluster.control_plane.kubectl(&["get", "registryaliases", "-o", "json"]).await.unwrap();
    let pods: Vec<Pod> = Api::<Pod>::all(cluster.client()).list(&Default::default()).await.unwrap().items;
    let pods = serde_json::to_string(&pods).unwrap();
    let issued = cluster.aws.all_tokens();
    assert!(issued.len() >= 2);
    // An auth begins with "AWS:" and the token's prefix, in base64 as it travels; its first characters do not depend on
    // what follows. In a Secret's data it is in base64 twice.
    let auth = STANDARD.encode(format!("AWS:{TOKEN_PREFIX}"));
    let auth = auth.get(..16).unwrap();
    // The keys and tokens that the process was given: each by a part that nothing else has.
    let read = |name: &str| std::fs::read_to_string(cluster.control_plane.dir().join(name)).unwrap();
    let web_identity = read("web-identity-token");
    let kubeconfig = read("ecr-cname.ecr-cname-controller.kubeconfig");
    let account = kubeconfig.split("token: ").nth(1).unwrap().trim();
    let api: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(cluster.client(), NAMESPACE);
    let key = api.get("ecr-cname-tls").await.unwrap().data.unwrap().remove("tls.key").unwrap();
    let key = String::from_utf8(key.0).unwrap();
    let signature = |token: &str| token.trim().rsplit('.').next().unwrap()[..40].to_owned();
    let (web_identity, account) = (signature(&web_identity), signature(account));
    let secrets = [
        TOKEN_PREFIX,
        testbed::aws::SECRET_KEY_PREFIX,
        testbed::aws::SESSION_TOKEN_PREFIX,
        auth,
        &web_identity,
        &account,
        key.lines().nth(1).unwrap(),
        "PRIVATE KEY",
    ];
    let configuration = cluster
        .control_plane
        .kubectl(&["get", "mutatingwebhookconfigurations,leases", "-A", "-o", "json"])
        .await
        .unwrap();
    let metadata = Api::<k8s_openapi::api::core::v1::Secret>::namespaced(cluster.client(), &namespace);
    let metadata = serde_json::to_string(&metadata.get_metadata("ecr-cname").await.unwrap()).unwrap();
    for (place, text) in [
        ("log", &log),
        ("metrics", &metrics),
        ("events", &events),
        ("aliases", &aliases),
        ("pods", &pods),
        ("webhook configuration or Lease", &configuration),
        ("metadata of the pull secret", &metadata),
    ] {
        for line in text.lines() {
            for secret in secrets {
                // Who said it, but not what.
                let target = line.split("\"target\":").nth(1).unwrap_or_default();
                let target = target.split(',').next().unwrap_or_default();
                assert!(!line.contains(secret), "a {secret}… in the {place}, said by {target}");
            }
        }
    }
}

/// A token that was superseded is not left lying about: the copies of ours are wiped when they are dropped, and those of
/// libraries (TLS, HTTP, the AWS SDK) by the allocator, as the controller's Deployment sets it.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_superseded_token_is_not_left_in_memory() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(6));
    // Without the cache of small pieces, which are not overwritten.
    let tunables = "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0";
    let start = cluster.quick(Start::run()).env("GLIBC_TUNABLES", tunables);
    let operator = cluster.operator(start).await;
    let namespaces = [cluster.namespace(&[]).await, cluster.namespace(&[]).await];
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let first = cluster.token(&namespaces[0], REGISTRY).await;
    for namespace in &namespaces {
        cluster.secret(namespace, |s| (tokens(s?).get(REGISTRY)? != &first).then_some(())).await;
    }
    // What does not depend on where in a text it stands when it is encoded: in itself, as an auth, and as an auth in base64.
    let forms = |token: &str| -> Vec<Vec<u8>> {
        let auth = STANDARD.encode(format!("AWS:{token}"));
        let inner = |skip: usize| {
            let twice = STANDARD.encode(auth.get(16 + skip..).unwrap());
            twice.as_bytes()[4..44].to_vec()
        };
        let tail = token.get(token.len() - 30..).unwrap().as_bytes().to_vec();
        vec![tail, auth.as_bytes()[20..60].to_vec(), inner(0), inner(1), inner(2)]
    };
    let copies = |token: &str| -> Vec<usize> {
        let memory = memory(operator.process().pid());
        let count = |form: &Vec<u8>| {
            let form = regex::bytes::Regex::new(&regex::escape(std::str::from_utf8(form).unwrap())).unwrap();
            memory.iter().map(|area| form.find_iter(area).count()).sum()
        };
        forms(token).iter().map(count).collect()
    };
    // What stands in a buffer that is still in use goes with the next thing that is sent or read.
    let deadline = tokio::time::Instant::now() + LIMIT;
    while copies(&first).iter().sum::<usize>() > 0 {
        assert!(tokio::time::Instant::now() < deadline, "copies by form: {:?}", copies(&first));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // And what is looked for can be found: the token at hand is somewhere.
    while copies(&cluster.aws.all_tokens().pop().unwrap().token).iter().sum::<usize>() == 0 {
        assert!(tokio::time::Instant::now() < deadline, "not even the token at hand is found");
    }
}

/// The writable memory of a process.
#[cfg(target_os = "linux")]
fn memory(pid: u32) -> Vec<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let areas = maps.lines().filter(|line| line.contains(" rw-p ")).filter_map(|line| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        let from = u64::from_str_radix(from, 16).ok()?;
        let mut area = vec![0; usize::try_from(u64::from_str_radix(to, 16).ok()? - from).ok()?];
        let read = memory.read_at(&mut area, from).ok()?;
        area.truncate(read);
        Some(area)
    });
    areas.collect()
}
