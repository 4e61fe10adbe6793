//! Faults and nothing lost: each test has a control plane of its own, and breaks something of it, of AWS, of the way
//! between, or of the operator, while pods are created.
//!
//! The figures that these tests print (`--nocapture`) are those of `docs/reliability.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)] // What tests/it needs of it, and we do not.
#[path = "../it/cluster.rs"]
mod cluster;

mod admissions;
mod aws;
mod control_plane;
