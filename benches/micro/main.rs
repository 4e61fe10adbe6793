//! Micro benchmarks: one request, in its parts, without a network.
//!
//! ```sh
//! cargo bench --bench micro
//! ```
//!
//! They say where time goes, and compare parsers. What a request costs is for the server benchmark to say.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common.rs"]
mod common;
mod parsers;

use divan::{Bencher, black_box, counter::BytesCount};
use ecr_cname::{
    review,
    table::{AliasTable, HostTable},
};
use serde_json::{Value, json};

use crate::common::{FIXTURES, aliases, answer, decide, fixture};

const CONTAINERS: [usize; 4] = [1, 4, 25, 100];
const ALIASES: [usize; 5] = [1, 10, 100, 1000, 10_000];

fn main() {
    divan::main();
}

/// A review of so many containers, each as in the captured ones.
fn review_of(containers: usize) -> Vec<u8> {
    let mut review: Value = serde_json::from_slice(&fixture("create-26")).unwrap();
    let list = review["request"]["object"]["spec"]["containers"].as_array_mut().unwrap();
    *list = (0..containers)
        .map(|n| {
            let mut container = list[n % list.len()].clone();
            container["name"] = json!(format!("web-{n}"));
            container
        })
        .collect();
    serde_json::to_vec(&review).unwrap()
}

#[divan::bench(args = FIXTURES)]
fn all_of_it(bencher: Bencher<'_, '_>, name: &str) {
    let (body, table) = (fixture(name), AliasTable::new(&aliases(10)));
    bencher.counter(BytesCount::of_slice(&body)).bench(|| answer(black_box(&body), &table));
}

#[divan::bench(args = CONTAINERS)]
fn all_of_it_by_containers(bencher: Bencher<'_, '_>, containers: usize) {
    let (body, table) = (review_of(containers), AliasTable::new(&aliases(10)));
    bencher.counter(BytesCount::of_slice(&body)).bench(|| answer(black_box(&body), &table));
}

#[divan::bench(args = ALIASES)]
fn all_of_it_by_aliases(bencher: Bencher<'_, '_>, count: usize) {
    let (body, table) = (fixture("create-2"), AliasTable::new(&aliases(count)));
    bencher.counter(BytesCount::of_slice(&body)).bench(|| answer(black_box(&body), &table));
}

#[divan::bench(args = FIXTURES)]
fn parse(bencher: Bencher<'_, '_>, name: &str) {
    let body = fixture(name);
    bencher.counter(BytesCount::of_slice(&body)).bench(|| review::parse(black_box(&body)).is_ok());
}

#[divan::bench(name = "decide", args = FIXTURES)]
fn bench_decide(bencher: Bencher<'_, '_>, name: &str) {
    let (body, hosts) = (fixture(name), HostTable::of_all(&aliases(10)));
    let request = review::parse(&body).unwrap();
    bencher.bench(|| decide(black_box(&request), &hosts).is_some());
}

#[divan::bench(args = FIXTURES)]
fn write_the_answer(bencher: Bencher<'_, '_>, name: &str) {
    let (body, hosts) = (fixture(name), HostTable::of_all(&aliases(10)));
    let request = review::parse(&body).unwrap();
    let mutation = decide(&request, &hosts);
    bencher.bench(|| review::answer::allow(&request.uid, black_box(mutation.as_ref()), None));
}

/// What it would take to read the same with other parsers.
mod other_parsers {
    use super::*;

    #[divan::bench(args = FIXTURES)]
    fn serde_json_borrowed(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher.counter(BytesCount::of_slice(&body)).bench(|| parsers::serde_json(black_box(&body)));
    }

    #[divan::bench(args = FIXTURES)]
    fn serde_json_skipping_all(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher
            .counter(BytesCount::of_slice(&body))
            .bench(|| serde_json::from_slice::<serde::de::IgnoredAny>(black_box(&body)).is_ok());
    }

    #[divan::bench(args = FIXTURES)]
    fn serde_json_value(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher
            .counter(BytesCount::of_slice(&body))
            .bench(|| serde_json::from_slice::<Value>(black_box(&body)).is_ok());
    }

    #[divan::bench(args = FIXTURES)]
    fn sonic_rs_borrowed(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher.counter(BytesCount::of_slice(&body)).bench(|| parsers::sonic_rs(black_box(&body)));
    }

    #[divan::bench(args = FIXTURES)]
    fn sonic_rs_lazy(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher.counter(BytesCount::of_slice(&body)).bench(|| parsers::sonic_rs_lazy(black_box(&body)));
    }

    /// It parses in place, so it needs a copy.
    #[divan::bench(args = FIXTURES)]
    fn simd_json_borrowed(bencher: Bencher<'_, '_>, name: &str) {
        let body = fixture(name);
        bencher
            .counter(BytesCount::of_slice(&body))
            .bench(|| parsers::simd_json(&mut black_box(&body).clone()));
    }
}
