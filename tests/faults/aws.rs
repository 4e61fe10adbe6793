//! Faults of AWS. Whatever it is, it is named, the rest is not affected, the last good token stays, and it heals by itself.

use std::time::{Duration, Instant, SystemTime};

use ecr_cname::crd::RegistryAlias;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde_json::json;
use testbed::{
    aws::{Fault, Operation, Scope},
    operator::{NAMESPACE, Operator, ROLE, Start},
    relay::Relay,
    usage::Usage,
};

use crate::cluster::{Cluster, LIMIT, REGISTRY, tokens, unique};

const MINT: Operation = Operation::GetAuthorizationToken;

fn token_ready(alias: &RegistryAlias) -> Condition {
    let conditions = &alias.status.as_ref().unwrap().conditions;
    conditions.iter().find(|c| c.type_ == "TokenReady").unwrap().clone()
}

async fn failures(operator: &Operator, reason: &str) -> f64 {
    operator.metric(&format!("ecr_cname_token_refreshes_total{{outcome=\"{reason}\"}}")).await.unwrap()
}

/// The peak of a process's memory, in MiB.
fn peak(operator: &Operator) -> u64 {
    Usage::of(operator.process().pid()).unwrap().peak_rss >> 20
}

/// A fault, what it hits, and what the metric and the condition call it.
struct Case {
    fault: Fault,
    operation: Operation,
    outcome: &'static str,
    reason: &'static str,
    words: &'static str,
}

fn cases() -> Vec<Case> {
    let case = |fault, operation, outcome, reason, words| Case { fault, operation, outcome, reason, words };
    let assume = Operation::AssumeRole;
    vec![
        case(Fault::AccessDenied, assume, "AccessDenied", "AccessDenied", "trusts the operator's role"),
        case(Fault::Throttle, assume, "Throttled", "Throttled", "AWS is throttling"),
        case(Fault::ServerError, assume, "ServiceError", "AWSError", "AWS failed"),
        case(Fault::CloseConnection, assume, "Unreachable", "AWSUnreachable", "cannot be reached"),
        case(Fault::Hang, assume, "Unreachable", "AWSUnreachable", "us-east-1"),
        case(Fault::ClockSkew, assume, "ClockSkew", "ClockSkew", "check the clock"),
        case(Fault::AccessDenied, MINT, "AccessDenied", "AccessDenied", "allow ecr:GetAuthorizationToken"),
        case(Fault::ClockSkew, MINT, "ClockSkew", "ClockSkew", "check the clock"),
        case(Fault::MalformedBody, MINT, "BadAnswer", "BadAnswer", "is something else answering"),
        case(Fault::HugeBody, MINT, "BadAnswer", "BadAnswer", "is something else answering"),
        case(Fault::HugeBody, assume, "BadAnswer", "BadAnswer", "is something else answering"),
        case(Fault::ExpiredToken, MINT, "ExpiredOnArrival", "TokenExpiredOnArrival", "check the clock"),
    ]
}

#[tokio::test]
async fn one_identity_of_five_cannot_be_assumed() {
    one_identity_of_five_is_broken(Operation::AssumeRole).await;
}

#[tokio::test]
async fn one_identity_of_five_gets_no_token() {
    one_identity_of_five_is_broken(MINT).await;
}

/// Of five identities one is broken, in every way: the four others are refreshed all along.
async fn one_identity_of_five_is_broken(operation: Operation) {
    const LIFETIME: Duration = Duration::from_secs(10);
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(LIFETIME);
    let running = cluster.run().await;
    let role = |n: usize| format!("arn:aws:iam::{n}00000000000:role/pull");
    let registry = |n: usize| format!("{n}00000000000.dkr.ecr.us-east-1.amazonaws.com");
    for n in 1..=5 {
        running.aws.role(&role(n)).trusts_role(ROLE);
    }
    let spec = |n: usize| json!({"host": format!("r{n}.example.io"), "registry": registry(n), "credentials": {"roleArn": role(n)}});
    for n in 1..=4 {
        running.create_alias(&format!("role-{n}"), spec(n)).await;
    }
    for n in 1..=4 {
        running.ready(&format!("role-{n}")).await;
    }
    let namespace = running.namespace(&[]).await;
    running.token(&namespace, &registry(1)).await;
    let before = peak(&running.operator);
    for Case { fault, operation, outcome, reason, words } in
        cases().into_iter().filter(|case| case.operation == operation)
    {
        let what = format!("{fault:?} of {operation:?}");
        // Events of one case are not to be taken for those of another.
        let broken = unique("broken");
        let held = tokens(&running.secrets(&namespace).get("ecr-cname").await.unwrap());
        let counted = failures(&running.operator, outcome).await;
        running.aws.inject(fault, Scope::of(operation).role(&role(5)));
        let began = Instant::now();
        running.create_alias(&broken, spec(5)).await;
        let alias = running.condition(&broken, "TokenReady", |c| c.status == "False").await;
        let named = began.elapsed();
        let condition = token_ready(&alias);
        assert_eq!(condition.reason, reason, "{what}: {}", condition.message);
        assert!(condition.message.contains(words), "{what}: {}", condition.message);
        let note = running.event("default", &broken, reason).await;
        assert!(note.contains(words), "{what}: {note}");
        assert!(failures(&running.operator, outcome).await > counted, "{what}");
        // The others have new tokens meanwhile, and what they have is good.
        running
            .secret(&namespace, |secret| {
                let now = tokens(secret?);
                for n in 1..=4 {
                    assert!(
                        running.aws.is_valid(&now[&registry(n)]),
                        "{what}: the token of role {n} has expired"
                    );
                }
                (1..=4).all(|n| now.get(&registry(n)) != held.get(&registry(n))).then_some(())
            })
            .await;
        running.aws.heal();
        let healed = Instant::now();
        running.ready(&broken).await;
        running.token(&namespace, &registry(5)).await;
        println!("{what}: named after {named:?}, healed after {:?}", healed.elapsed());
        running.delete_alias(&broken).await;
        // Its token stays until it has expired, and would make the next case easy.
        running.secret(&namespace, |s| (!tokens(s?).contains_key(&registry(5))).then_some(())).await;
    }
    let grown = peak(&running.operator) - before;
    println!(
        "peak memory grew by {grown} MiB in all of it; a huge answer has {} MiB",
        Fault::HUGE_BODY >> 20
    );
    assert!(grown < 24, "{grown} MiB");
}

/// Attempts that fail come after 1, 2, 4, 8 s, each give or take a quarter, and not in step.
#[tokio::test]
async fn attempts_are_spread_with_jitter() {
    let cluster = Cluster::start().await;
    let regions = ["us-east-1", "eu-west-1", "ap-south-1"];
    cluster.aws.inject(Fault::ServerError, Scope::of(MINT));
    let running = cluster.run().await;
    for region in regions {
        let spec = json!({"host": format!("{region}.example.io"), "registry": format!("123456789012.dkr.ecr.{region}.amazonaws.com")});
        running.create_alias(region, spec).await;
    }
    let of = |region: &str| Scope::of(MINT).region(region);
    let enough = |state: &testbed::aws::State| regions.iter().all(|r| state.count(&of(r)) >= 5);
    running.aws.wait_for(enough, LIMIT).await.unwrap();
    let calls = running.aws.calls();
    let mut all = Vec::new();
    for region in regions {
        let times: Vec<SystemTime> = calls
            .iter()
            .filter(|c| c.operation == MINT && c.region.as_deref() == Some(region))
            .map(|c| c.at)
            .collect();
        let gaps: Vec<f64> =
            times.windows(2).take(4).map(|w| w[1].duration_since(w[0]).unwrap().as_secs_f64()).collect();
        println!("{region}: attempts after {gaps:.2?} s");
        for (gap, nominal) in gaps.iter().zip([1.0, 2.0, 4.0, 8.0]) {
            // The shortest pause is a second; a busy machine may be late.
            assert!((f64::max(nominal * 0.75, 0.99)..nominal * 1.25 + 1.0).contains(gap), "{gaps:?}");
        }
        all.push(gaps);
    }
    let spread = |i: usize| {
        let of_it = all.iter().map(|gaps| gaps[i]);
        of_it.clone().fold(0.0, f64::max) - of_it.fold(f64::MAX, f64::min)
    };
    assert!(spread(2) + spread(3) > 0.1, "in step: {all:?}");
}

/// STS is down and ECR is up: the credentials at hand still get tokens. When they have expired, too, the last token stays.
/// Then the web identity token itself has expired; kubelet writes a new one to the same file, and that heals it.
#[tokio::test]
async fn sts_is_down_and_the_web_identity_expires() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(8));
    cluster.aws.set_max_session_lifetime(Duration::from_secs(25));
    let file = cluster.control_plane.dir().join("projected-token");
    let write = async |lifetime: u64| {
        let lifetime = Duration::from_secs(lifetime);
        let (account, audience) = ("ecr-cname-controller", "sts.amazonaws.com");
        let token = cluster.control_plane.service_account_token(NAMESPACE, account, audience, lifetime).await;
        // As kubelet does it: never half a file.
        let next = file.with_extension("next");
        std::fs::write(&next, token.unwrap()).unwrap();
        std::fs::rename(next, &file).unwrap();
    };
    write(3600).await;
    let start = cluster.quick(Start::run()).env("AWS_WEB_IDENTITY_TOKEN_FILE", file.to_str().unwrap());
    let operator = cluster.operator(start).await;
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    cluster.token(&namespace, REGISTRY).await;

    cluster.aws.inject(Fault::CloseConnection, Scope::of(Operation::AssumeRoleWithWebIdentity));
    let minted = || cluster.aws.all_tokens().len();
    let (before, began) = (minted(), Instant::now());
    let alias = cluster.condition("internal", "TokenReady", |c| c.reason == "RefreshFailing").await;
    let while_down = minted() - before;
    println!(
        "STS down: {while_down} more tokens with the credentials at hand; said after {:?}",
        began.elapsed()
    );
    assert!(while_down >= 1);
    let message = token_ready(&alias).message;
    assert!(message.contains("cannot be reached") && message.contains("STS"), "{message}");
    let held = cluster.token(&namespace, REGISTRY).await;
    assert!(cluster.aws.is_valid(&held), "the last good token was kept");
    cluster.aws.heal();
    cluster.condition("internal", "TokenReady", |c| c.reason == "TokenValid").await;

    cluster.aws.age_web_identities(Duration::from_secs(2 * 3600));
    let alias = cluster.condition("internal", "TokenReady", |c| c.reason == "RefreshFailing").await;
    let message = token_ready(&alias).message;
    assert!(message.contains("ExpiredToken") && message.contains("service account"), "{message}");
    assert!(failures(&operator, "NoCredentials").await > 0.0);
    cluster.event("default", "internal", "RefreshFailing").await;
    let rotated = Instant::now();
    write(24 * 3600).await;
    cluster.condition("internal", "TokenReady", |c| c.reason == "TokenValid").await;
    println!("web identity token expired and rotated on disk: healed after {:?}", rotated.elapsed());
    let held = cluster.token(&namespace, REGISTRY).await;
    assert!(cluster.aws.is_valid(&held));
}

/// Nobody listens, or someone who says nothing: noticed in time, named, and healed without a restart.
#[tokio::test]
async fn the_way_to_aws_is_closed_or_silent() {
    let cluster = Cluster::start().await;
    cluster.aws.set_token_lifetime(Duration::from_secs(60));
    let relay = Relay::start(cluster.aws.url().trim_start_matches("http://").parse().unwrap()).unwrap();
    let url = format!("http://{}", relay.address());
    let operator = cluster.operator(cluster.quick(Start::run()).env("AWS_ENDPOINT_URL", &url)).await;
    let namespace = cluster.namespace(&[]).await;
    cluster.alias("internal", json!({"host": "a.example.io", "registry": REGISTRY})).await;
    let held = cluster.token(&namespace, REGISTRY).await;
    for (what, cut) in [("refused", Relay::refuse as fn(&Relay)), ("silent", Relay::silence)] {
        cut(&relay);
        let counted = failures(&operator, "Unreachable").await;
        // An alias that needs a token of another region shows it at once; the first one's is good for a while.
        let began = Instant::now();
        let registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
        cluster.create_alias(what, json!({"host": format!("{what}.example.io"), "registry": registry})).await;
        let alias = cluster.condition(what, "TokenReady", |c| c.reason == "AWSUnreachable").await;
        let named = began.elapsed();
        assert!(named < Duration::from_secs(25), "{what}: {named:?}");
        assert!(token_ready(&alias).message.contains("cannot be reached"), "{}", token_ready(&alias).message);
        assert!(failures(&operator, "Unreachable").await > counted);
        relay.restore();
        let healed = Instant::now();
        cluster.ready(what).await;
        println!("connections to AWS {what}: named after {named:?}, healed after {:?}", healed.elapsed());
        cluster.delete_alias(what).await;
    }
    let now = cluster.token(&namespace, REGISTRY).await;
    assert!(cluster.aws.is_valid(&now) && cluster.aws.is_valid(&held) == (now == held));
}
