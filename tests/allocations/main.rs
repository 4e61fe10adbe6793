//! What a request allocates: a guard on the hot path that does not depend on how fast the machine is.
//!
//! The bounds are what is needed today, and a little. Whoever needs more says here why.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../../benches/common.rs"]
mod common;

use std::{sync::Arc, time::Duration};

use allocation_counter::{AllocationInfo, measure};
use arc_swap::ArcSwap;
use axum::{
    body::Body,
    http::{Request, header::CONTENT_TYPE},
    routing::MethodRouter,
};
use ecr_cname::{
    matching::{self, FailurePolicy},
    metrics, review,
    server::Limits,
    table::AliasTable,
    webhook::{Settings, Webhook},
};
use serde_json::json;
use tower::ServiceExt as _;

use crate::common::fixture;

/// A captured review; the most allocations and bytes from the body to the answer; the most of the whole handler: routing,
/// taking the body, and the response besides.
const BOUNDS: [(&str, [u64; 2], [u64; 2]); 5] = [
    ("ordinary-2", [2, 1_000], [12, 4_000]),
    ("create-2", [4, 4_000], [13, 6_000]),
    ("create-4", [4, 5_000], [13, 8_000]),
    ("create-26", [6, 30_000], [15, 32_000]),
    ("update-2", [6, 4_000], [15, 6_000]),
];

#[test]
fn a_request_allocates_no_more_than_it_needs() {
    let (webhook, path) = webhook(1);
    let route = webhook.clone().route(ecr_cname::admin::Readiness::default());
    let mut complaints = Vec::new();
    for (name, core, handler) in BOUNDS {
        let body = fixture(name);
        // What a thread does once in its life does not count.
        drop(decide(&webhook, &path, &body));
        let decided = measure(|| drop(decide(&webhook, &path, &body)));
        let (request, runtime) = (request(&path, &body), runtime());
        let handled = measure_handler(&route, request, &runtime);
        for (what, info, bound) in [("decision", decided, core), ("handler", handled, handler)] {
            let found = [info.count_total, info.bytes_total];
            println!("{name}, {what}: {} allocations, {} bytes", found[0], found[1]);
            if found[0] > bound[0] || found[1] > bound[1] {
                complaints
                    .push(format!("{name}, {what}: {found:?} allocations and bytes, at most {bound:?}"));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Neither what is skipped nor how many aliases there are makes a difference.
#[test]
fn allocations_grow_with_nothing_but_the_images_that_are_rewritten() {
    let body = fixture("create-2");
    let few = webhook(1);
    let many = webhook(10_000);
    let count = |(webhook, path): &(Arc<Webhook>, String), body: &[u8]| {
        let info = measure(|| drop(decide(webhook, path, body)));
        (info.count_total, info.bytes_total)
    };
    assert_eq!(count(&few, &body), count(&many, &body));

    let mut larger: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let noise: Vec<_> = (0..10_000).map(|n| json!({"f:spec": {"k": [n, "\"{[", null]}})).collect();
    larger["request"]["object"]["metadata"]["managedFields"] = json!(noise);
    larger["request"]["object"]["spec"]["containers"][0]["env"] = json!(noise);
    assert_eq!(count(&few, &body), count(&few, &serde_json::to_vec(&larger).unwrap()));
}

fn decide(webhook: &Webhook, path: &str, body: &[u8]) -> Vec<u8> {
    let (group, digest) = path.trim_start_matches("/mutate/").split_once('/').unwrap();
    webhook.answer(group, digest, review::parse(body)).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn request(path: &str, body: &[u8]) -> Request<Body> {
    let request = Request::post(path).header(CONTENT_TYPE, "application/json");
    request.body(Body::from(body.to_vec())).unwrap()
}

fn measure_handler(
    route: &MethodRouter,
    request: Request<Body>,
    runtime: &tokio::runtime::Runtime,
) -> AllocationInfo {
    let route = route.clone();
    measure(|| {
        let response = runtime.block_on(route.oneshot(request)).unwrap();
        assert_eq!(response.status(), 200);
    })
}

/// A webhook that knows so many aliases, one of which the fixtures name, and the path that it is called by for that one.
fn webhook(aliases: usize) -> (Arc<Webhook>, String) {
    let aliases = common::aliases(aliases);
    let part = matching::parts(&aliases).into_iter().next().unwrap();
    let path = format!("/mutate/{}/{}", part.group.as_str(), part.digest);
    let table = Arc::new(ArcSwap::from_pointee(AliasTable::new(&aliases)));
    let (_, updates) = tokio::sync::watch::channel(Arc::default());
    let settings =
        Settings { pull_secret: "ecr-cname".to_owned(), audit: false, failure_policy: FailurePolicy::Fail };
    let limits = Limits { connections: 4, memory: 4 << 20, body: 1 << 20, time: Duration::from_secs(5) };
    (Webhook::new(table, updates, settings, limits, &mut metrics::registry()), path)
}
