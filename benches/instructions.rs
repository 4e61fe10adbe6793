//! Instructions per request, from its body to its answer, counted by callgrind: the same on every run, whatever else the
//! machine does. Fails if one takes more than its bound.
//!
//! ```sh
//! cargo bench --bench instructions
//! ```
//!
//! Needs `valgrind`; without it, says so and passes. The bounds are what is needed today on x86-64 with AVX2, and a tenth.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{env, hint::black_box, process::Command};

use ecr_cname::table::AliasTable;

use crate::common::{FIXTURES, aliases, answer, fixture};

/// In the order of [`FIXTURES`].
const BOUNDS: [u64; 5] = [41_000, 50_000, 67_000, 267_000, 74_000];

const MANY: u64 = 51;

fn main() {
    let args: Vec<String> = env::args().collect();
    if let [_, run, name, times] = args.as_slice()
        && run == "--run"
    {
        let (body, table) = (fixture(name), AliasTable::new(&aliases(10)));
        for _ in 0..times.parse::<u64>().unwrap() {
            black_box(answer(black_box(&body), &table));
        }
        return;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        return println!("instructions are not counted: there is no valgrind");
    }
    let mut failed = false;
    for (name, bound) in FIXTURES.into_iter().zip(BOUNDS) {
        // The difference is without what comes before the first request.
        let instructions = (count(name, MANY) - count(name, 1)) / (MANY - 1);
        let bytes = fixture(name).len();
        println!(
            "{name}: {instructions} instructions for {bytes} bytes, {:.2} for each; at most {bound}",
            instructions as f64 / bytes as f64
        );
        failed |= instructions > bound;
    }
    assert!(!failed, "more instructions than the bound");
}

fn count(name: &str, times: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(env::current_exe().unwrap())
        .args(["--run", name, &times.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| line.contains("Collected")).unwrap_or_else(|| panic!("{text}"));
    line.split_whitespace().last().unwrap().parse().unwrap()
}
