//! DNS that fails, lies or changes all the time, under aliases that follow it. What is refused for its contents (other accounts,
//! loops, ends outside of ECR) is in `aliases`.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::dns::DnsFault;

use crate::cluster::{Cluster, LIMIT, REGISTRY, images, shared, unique};

const ACCOUNTS: [&str; 1] = ["123456789012"];

#[tokio::test]
async fn while_dns_fails_the_last_good_answer_stays_and_it_heals() {
    let cluster = Cluster::start().await.run().await;
    let namespace = cluster.namespace(&[]).await;
    let host = "a.internal.example.io";
    cluster.dns.cname(host, REGISTRY, 0).unwrap();
    cluster.alias("followed", json!({"host": host, "allowedAccounts": ACCOUNTS})).await;
    let token = cluster.token(&namespace, REGISTRY).await;
    for (n, fault) in
        [DnsFault::NxDomain, DnsFault::ServFail, DnsFault::Refused, DnsFault::Drop].into_iter().enumerate()
    {
        cluster.dns.inject(fault);
        let alias = cluster.condition("followed", "Resolved", |c| c.reason == "DNSLookupFailed").await;
        let status = alias.status.unwrap();
        let resolved = status.conditions.iter().find(|c| c.type_ == "Resolved").unwrap();
        assert_eq!(resolved.status, "True", "{fault:?}: {}", resolved.message);
        assert!(resolved.message.contains(host), "{}", resolved.message);
        assert_eq!(status.registry.as_deref(), Some(REGISTRY), "{fault:?}");
        assert!(status.conditions.iter().all(|c| c.status == "True"), "{fault:?}: {:?}", status.conditions);
        let pod = cluster.pod(&namespace, &format!("p{n}"), &format!("{host}/app")).await;
        assert_eq!(images(&pod), [format!("{REGISTRY}/app")], "{fault:?}");
        cluster.dns.heal();
        cluster.condition("followed", "Resolved", |c| c.reason == "FollowedCNAME").await;
    }
    cluster.event("default", "followed", "DNSLookupFailed").await;
    // Nothing of this is a reason to ask AWS, or to write the Secret.
    assert_eq!(cluster.token(&namespace, REGISTRY).await, token);

    // An answer that is cut off is asked for over TCP.
    let moved = "123456789012.dkr.ecr.us-west-2.amazonaws.com";
    cluster.dns.inject(DnsFault::Truncate);
    cluster.dns.cname(host, moved, 0).unwrap();
    cluster.condition("followed", "Resolved", |c| c.message.contains("us-west-2")).await;
    assert!(cluster.dns.questions().iter().any(|q| q.name == host && q.over_tcp));
}

/// A TTL of nothing is no order to ask all the time, and neither is a failure.
#[tokio::test]
async fn dns_is_asked_no_more_often_than_the_bound_says() {
    let cluster = shared().await;
    // The bound of the tests is a second.
    let (eager, missing) = (unique("eager"), unique("missing"));
    let host = |name: &str| format!("{name}.internal.example.io");
    cluster.dns.cname(&host(&eager), REGISTRY, 0).unwrap();
    for name in [&eager, &missing] {
        cluster.create_alias(name, json!({"host": host(name), "allowedAccounts": ACCOUNTS})).await;
    }
    let asked = async |name: &str, times: usize| {
        let host = host(name);
        cluster.dns.wait_for(|dns| dns.count(&host) >= 1, LIMIT).await.unwrap();
        let started = Instant::now();
        cluster.dns.wait_for(|dns| dns.count(&host) >= times, LIMIT).await.unwrap();
        (started.elapsed(), cluster.dns.count(&host))
    };
    let ((eager, a), (missing, b)) = tokio::join!(asked(&eager, 5), asked(&missing, 4));
    // Four pauses of a second; and pauses of one, two and four seconds.
    assert!(a == 5 && eager > Duration::from_millis(3800), "{a} questions in {eager:?}");
    assert!(b == 4 && missing > Duration::from_millis(6500), "{b} questions in {missing:?}");
}
