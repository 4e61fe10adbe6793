//! Faults of the control plane and of the way to it. After each: converged, and nothing written twice.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use serde_json::json;
use testbed::{
    apiproxy::{ApiProxy, Call, Fault},
    operator::{NAMESPACE, Operator, Start},
};

use crate::cluster::{Cluster, LIMIT, REGISTRY, await_object, images, pull_secrets, tokens, unique};

/// `ecr-cname run` behind a proxy, with an alias that is ready and a namespace that is served.
struct Bench {
    cluster: Cluster,
    proxy: ApiProxy,
    operator: Operator,
    namespace: String,
}

impl Bench {
    async fn start(args: &[&str]) -> Self {
        let cluster = Cluster::start().await;
        let proxy = ApiProxy::start(&cluster.control_plane).unwrap();
        let start = cluster.quick(Start::run()).via(&proxy).args(args.iter().copied());
        let operator = cluster.operator(start).await;
        let namespace = cluster.namespace(&[]).await;
        cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
        cluster.token(&namespace, REGISTRY).await;
        Self { cluster, proxy, operator, namespace }
    }

    /// The resourceVersion of the pull secret that was there before.
    async fn version(&self) -> Option<String> {
        self.cluster.secrets(&self.namespace).get("ecr-cname").await.unwrap().metadata.resource_version
    }

    /// Waits until everything works again: a new namespace is served, a new alias becomes ready, and a pod that names it is
    /// rewritten. Says how long that took, and checks that it comes to rest and nothing was written twice since `began`.
    async fn converges(&self, what: &str, began: Instant, before: Option<String>) {
        let healed = Instant::now();
        let namespace = self.cluster.namespace(&[]).await;
        let name = unique("after");
        let host = format!("{name}.example.io");
        self.cluster.create_alias(&name, json!({"host": host, "registry": REGISTRY})).await;
        self.cluster.token(&namespace, REGISTRY).await;
        self.cluster.ready(&name).await;
        let took = healed.elapsed();
        let pod = self.cluster.pod(&namespace, &name, &format!("{host}/app")).await;
        assert_eq!(images(&pod), [format!("{REGISTRY}/app")], "{what}");
        assert_eq!(pull_secrets(&pod), ["ecr-cname"], "{what}");
        println!("{what}: converged {took:?} after it was over");

        self.comes_to_rest().await;
        let mut secrets = self.proxy.writes_since(began);
        secrets.retain(|call| call.path.ends_with("/secrets") || call.path.ends_with("/secrets/ecr-cname"));
        assert_eq!(
            secrets.len(),
            1,
            "{what}: of all pull secrets only the new one is written, once: {secrets:#?}"
        );
        assert!(secrets[0].path.contains(&namespace), "{what}");
        assert_eq!(self.version().await, before, "{what}: the pull secret that was good was not touched");
    }

    /// Waits until nothing is written any more while the Lease is renewed three times.
    async fn comes_to_rest(&self) {
        let rests = |calls: &[Call]| {
            let writes = calls.iter().rev().filter(|c| c.is_write() && !c.path.contains("/events"));
            writes.take_while(|call| call.is_lease()).filter(|call| call.succeeded()).count() >= 3
        };
        self.proxy.wait_for(rests, LIMIT).await.unwrap();
    }
}

/// A watch that died without a word: new namespaces ignored: reflector #150, #478, #545.
#[tokio::test]
async fn the_api_server_restarts() {
    let bench = Bench::start(&[]).await;
    let before = bench.version().await;
    let control_plane = &bench.cluster.control_plane;
    for killed in [true, false, true] {
        let began = Instant::now();
        if killed {
            control_plane.kill_apiserver().await.unwrap();
        } else {
            control_plane.stop_apiserver().await.unwrap();
        }
        control_plane.start_apiserver().await.unwrap();
        let how = if killed { "killed" } else { "stopped" };
        bench.converges(&format!("API server {how} and started"), began, before.clone()).await;
    }
}

#[tokio::test]
async fn etcd_restarts() {
    let bench = Bench::start(&[]).await;
    let before = bench.version().await;
    for _ in 0..2 {
        let began = Instant::now();
        bench.cluster.control_plane.stop_etcd().await.unwrap();
        bench.cluster.control_plane.start_etcd().await.unwrap();
        bench.converges("etcd stopped and started", began, before.clone()).await;
    }
}

/// What a watch would have said is gone: 410. What changed meanwhile is found all the same.
#[tokio::test]
async fn etcd_is_compacted_while_nothing_is_heard() {
    let bench = Bench::start(&[]).await;
    let (before, control_plane) = (bench.version().await, &bench.cluster.control_plane);
    let began = Instant::now();
    bench.proxy.inject(Fault::CloseConnection, |_| true);
    // With it go the connections of the watches.
    control_plane.stop_apiserver().await.unwrap();
    control_plane.start_apiserver().await.unwrap();
    bench.cluster.create_alias("meanwhile", json!({"host": "m.example.io", "registry": REGISTRY})).await;
    control_plane.compact_etcd().await.unwrap();
    // The API server remembers no more than etcd does.
    control_plane.stop_apiserver().await.unwrap();
    control_plane.start_apiserver().await.unwrap();
    bench.proxy.heal();
    bench.cluster.ready("meanwhile").await;
    bench.converges("etcd compacted, API server restarted", began, before).await;
    let log = bench.operator.process().log().unwrap();
    assert!(log.contains("too old resource version"), "no watch was told that its past is gone");
}

/// A NAT or firewall forgets connections: nothing comes any more, and nobody says so.
#[tokio::test]
async fn connections_fall_silent() {
    let bench = Bench::start(&["--watch-timeout=5s"]).await;
    let before = bench.version().await;
    for _ in 0..2 {
        let began = Instant::now();
        bench.proxy.silence_connections();
        bench.converges("all connections silent", began, before.clone()).await;
        // 5 s of the watch, 5 s of grace, and the back-off.
        let noticed = bench.proxy.calls().into_iter().find(|call| call.watch && call.at > began).unwrap();
        println!("all connections silent: noticed after {:?}", noticed.at - began);
        assert!(noticed.at - began < Duration::from_secs(12));
    }
}

/// Every call takes 5 s: the leader stays the leader, and gets done what there is to do.
#[tokio::test]
async fn the_api_server_is_slow() {
    let bench = Bench::start(&["--lease-duration=15s"]).await;
    let before = bench.version().await;
    let began = Instant::now();
    bench.proxy.inject(Fault::Delay(Duration::from_secs(5)), |_| true);
    bench.converges("every call takes 5 s", began, before).await;
    let leases: Api<Lease> = Api::namespaced(bench.cluster.client(), NAMESPACE);
    let spec = leases.get("ecr-cname").await.unwrap().spec.unwrap();
    assert_eq!(spec.lease_transitions, Some(0), "the Lease was lost");
    let log = bench.operator.process().log().unwrap();
    assert_eq!(log.matches("leads=true").count(), 1, "leadership was lost and found again");
}

/// Refusals of whatever kind: tried again with back-off, and done once when they end.
#[tokio::test]
async fn the_api_server_refuses() {
    let bench = Bench::start(&[]).await;
    let before = bench.version().await;
    let secret = |call: &Call| call.is_write() && call.path.contains("/secrets");
    for (status, retry_after) in [(429, Some(1)), (409, None), (500, None), (503, Some(1)), (504, None)] {
        let what = format!("every write is answered with {status}");
        let began = Instant::now();
        bench.proxy.inject(Fault::Answer(status, retry_after), |call| call.is_write() && !call.is_lease());
        let namespace = bench.cluster.namespace(&[]).await;
        let attempts = |calls: &[Call]| -> Vec<Instant> {
            let of_it = |c: &&Call| secret(c) && c.path.contains(&namespace);
            calls.iter().filter(of_it).map(|c| c.at).collect()
        };
        bench.proxy.wait_for(|calls| attempts(calls).len() >= 3, LIMIT).await.unwrap();
        // A second, then two, each give or take a quarter.
        let times = attempts(&bench.proxy.calls());
        let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        assert!((0.7..1.5).contains(&gaps[0]) && (1.4..2.8).contains(&gaps[1]), "{what}: {gaps:?}");
        bench.proxy.heal();
        bench.cluster.token(&namespace, REGISTRY).await;
        let written =
            |calls: &[Call]| calls.iter().filter(|c| c.at >= began && secret(c) && c.succeeded()).count();
        bench.proxy.wait_for(|calls| written(calls) == 1, LIMIT).await.unwrap();
        bench.converges(&what, Instant::now(), before.clone()).await;
    }
    // Everything at once, for longer than the Lease holds.
    let began = Instant::now();
    bench.proxy.inject(Fault::Answer(503, None), |_| true);
    bench.cluster.control_plane.stop_apiserver().await.unwrap();
    bench.cluster.control_plane.start_apiserver().await.unwrap();
    let refused = |calls: &[Call]| calls.iter().filter(|c| c.is_lease() && c.at > began).count();
    bench.proxy.wait_for(|calls| refused(calls) >= 12, LIMIT).await.unwrap();
    assert_eq!(bench.operator.metric("ecr_cname_leader").await.unwrap().to_bits(), 0);
    bench.proxy.heal();
    bench.converges("every call is answered with 503", began, before).await;
}

/// The API server has done it, and its answer never came: it is not done again.
#[tokio::test]
async fn answers_are_lost() {
    let bench = Bench::start(&[]).await;
    let before = bench.version().await;
    for part in ["/secrets", "/mutatingwebhookconfigurations/", "/status", "/leases/"] {
        let began = Instant::now();
        bench
            .proxy
            .inject_times(1, Fault::LoseAnswer, move |call| call.is_write() && call.path.contains(part));
        bench.converges(&format!("the answer to a write of {part} is lost"), began, before.clone()).await;
        let lost = |call: &Call| call.fault == Some(Fault::LoseAnswer) && call.at > began;
        assert!(bench.proxy.calls().iter().any(lost), "{part}");
        bench.proxy.heal();
    }
}

/// Clocks that are wrong by an hour, either way, do not make a second leader: only that a Lease changes counts.
#[tokio::test]
async fn clocks_disagree_about_the_lease() {
    let cluster = Cluster::start().await;
    let leases: Api<Lease> = Api::namespaced(cluster.client(), NAMESPACE);
    let mut operators = Vec::new();
    for skew in [-1, 1] {
        // Another holds the Lease, and renews it by its own clock.
        let renewed = || MicroTime(jiff::Timestamp::now() + jiff::SignedDuration::from_hours(skew));
        let mut lease = Lease {
            metadata: ObjectMeta { name: Some("ecr-cname".to_owned()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                holder_identity: Some("other".to_owned()),
                lease_duration_seconds: Some(3),
                renew_time: Some(renewed()),
                ..LeaseSpec::default()
            }),
        };
        lease = leases.create(&PostParams::default(), &lease).await.unwrap();
        let name = format!("skewed-{skew}");
        let operator = cluster.operator_unready(cluster.quick(Start::run()).named(&name)).await;
        let began = Instant::now();
        let mut renew = tokio::time::interval(Duration::from_millis(500));
        // For three times as long as it holds.
        while began.elapsed() < Duration::from_secs(9) {
            renew.tick().await;
            lease.spec.as_mut().unwrap().renew_time = Some(renewed());
            lease = leases.replace("ecr-cname", &PostParams::default(), &lease).await.unwrap();
            assert_eq!(operator.metric("ecr_cname_leader").await.unwrap_or_default().to_bits(), 0);
        }
        // It dies.
        let died = Instant::now();
        await_object(leases.clone(), "ecr-cname", "the Lease", |lease| {
            let holder = lease?.spec.as_ref()?.holder_identity.as_ref()?;
            holder.starts_with(&name).then_some(())
        })
        .await;
        println!(
            "a holder whose clock is wrong by {skew} h: kept out for 9 s, taken over {:?} after its last word",
            died.elapsed()
        );
        assert!(died.elapsed() >= Duration::from_millis(2500));
        operator.process().kill().unwrap();
        leases.delete("ecr-cname", &Default::default()).await.unwrap();
        operators.push(operator);
    }
}

/// Two controllers, each behind a proxy of its own.
struct Pair {
    cluster: Cluster,
    proxies: [ApiProxy; 2],
    controllers: [Operator; 2],
    _webhook: Operator,
}

impl Pair {
    async fn start() -> Self {
        let cluster = Cluster::start().await;
        let webhook = cluster.quick_webhook("webhook").await;
        let proxies = [(); 2].map(|()| ApiProxy::start(&cluster.control_plane).unwrap());
        let start = |i: usize, name: &str| {
            cluster.quick(Start::controller(webhook.webhook_address())).named(name).via(&proxies[i])
        };
        let first = cluster.operator(start(0, "first")).await;
        leads(&first, true).await;
        let second = cluster.operator(start(1, "second")).await;
        webhook.wait_ready().await.unwrap();
        cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
        Self { cluster, proxies, controllers: [first, second], _webhook: webhook }
    }
}

async fn leads(controller: &Operator, wanted: bool) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let leads = controller.metric("ecr_cname_leader").await.is_ok_and(|leads| leads > 0.0);
        if leads == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{} leads: {leads}", controller.process().name());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Two leaders are impossible: a leader that was suspended for longer than its Lease held (a live migration, a node out of
/// memory) wakes up with work that is due, and does none of it.
#[tokio::test]
async fn a_suspended_leader_wakes_up_and_writes_nothing() {
    const TRIALS: usize = 6;
    let pair = Pair::start().await;
    for trial in 0..TRIALS {
        let (leader, other) = (trial % 2, 1 - trial % 2);
        leads(&pair.controllers[leader], true).await;
        pair.controllers[leader].process().pause().unwrap();
        // What is due when it wakes up: drift, and a namespace without a Secret, on watches of its own.
        let namespace = pair.cluster.namespace(&[]).await;
        leads(&pair.controllers[other], true).await;
        pair.cluster.token(&namespace, REGISTRY).await;
        pair.cluster.secrets(&namespace).delete("ecr-cname", &Default::default()).await.unwrap();
        pair.cluster.token(&namespace, REGISTRY).await;
        let woken = Instant::now();
        pair.controllers[leader].process().resume().unwrap();
        // It has looked twice who leads, and knows that it is not itself.
        let looked =
            |calls: &[Call]| calls.iter().filter(|c| c.is_lease() && !c.is_write() && c.at > woken).count();
        pair.proxies[leader].wait_for(|calls| looked(calls) >= 2, LIMIT).await.unwrap();
        leads(&pair.controllers[leader], false).await;
        let wrote: Vec<_> =
            pair.proxies[leader].calls().into_iter().filter(|c| c.is_write() && c.at > woken).collect();
        assert!(wrote.is_empty(), "{wrote:#?}");
        leads(&pair.controllers[other], true).await;
    }
    println!("a suspended leader woke up {TRIALS} times: 0 writes");
}

/// What a leader sent that was held up on its way until another led: the API server refuses it, for it carries the
/// resourceVersion that was read.
#[tokio::test]
async fn a_write_that_comes_too_late_is_a_conflict() {
    let pair = Pair::start().await;
    let namespace = pair.cluster.namespace(&[]).await;
    let first = pair.cluster.token(&namespace, REGISTRY).await;
    // The leader's answer to drift is held up, and so is the renewal of its Lease.
    pair.proxies[0].inject(Fault::Hold, |call| call.is_write());
    let drift = json!({"metadata": {"annotations": {"ecr-cname.dev/contents": null}}});
    let secrets = pair.cluster.secrets(&namespace);
    let merge = kube::api::Patch::Merge(drift);
    secrets.patch("ecr-cname", &Default::default(), &merge).await.unwrap();
    leads(&pair.controllers[1], true).await;
    let healed = pair
        .cluster
        .secret(&namespace, |s| {
            let secret = s?;
            let contents = secret.metadata.annotations.as_ref()?.contains_key("ecr-cname.dev/contents");
            (contents && tokens(secret).get(REGISTRY)? != &first).then(|| secret.clone())
        })
        .await;
    let released = Instant::now();
    pair.proxies[0].heal();
    let held =
        |call: &&Call| call.fault == Some(Fault::Hold) && (call.is_lease() || call.path.contains("/secrets"));
    pair.proxies[0]
        .wait_for(|calls| calls.iter().filter(held).all(|call| call.answer.is_some()), LIMIT)
        .await
        .unwrap();
    let calls = pair.proxies[0].calls();
    let late: Vec<_> = calls.iter().filter(held).collect();
    assert!(late.iter().any(|c| c.is_lease()) && late.iter().any(|c| !c.is_lease()), "{late:#?}");
    assert!(late.iter().all(|call| call.answer == Some(409)), "{late:#?}");
    println!(
        "{} writes that came {:?} and more too late: all refused with 409",
        late.len(),
        late.last().map(|c| released - c.at)
    );
    let after = secrets.get("ecr-cname").await.unwrap();
    assert_eq!(after.metadata.resource_version, healed.metadata.resource_version);
    leads(&pair.controllers[1], true).await;
}
