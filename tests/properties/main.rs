//! Properties of every parser that meets bytes from outside, and the corpus in `tests/corpus/`, which is replayed.
//!
//! With a small budget by `cargo test`; for as long as you like by
//! `PROPTEST_CASES=1000000 cargo test --release --test properties`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dns;
mod docker_config;
mod manifests;
mod references;
mod registries;
mod reviews;

use std::{fs, path::Path};

/// The entries of a directory of the corpus.
fn corpus(directory: &str) -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(directory);
    let entry = |file: Result<fs::DirEntry, _>| {
        let path = file.unwrap().path();
        (path.display().to_string(), fs::read(&path).unwrap())
    };
    let entries: Vec<_> = fs::read_dir(root).unwrap().map(entry).collect();
    assert!(!entries.is_empty());
    entries
}
