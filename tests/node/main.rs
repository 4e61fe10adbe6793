//! From one end to the other on a real node: the chart is installed with the real Helm, and kubelet pulls with what the
//! operator wrote.
//!
//! Where a node cannot run, the tests say so and do nothing; with `ECR_CNAME_REQUIRE_NODE` set they fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod certificate;
mod outage;
mod pulls;
mod release;
mod tokens;
mod uninstall;
mod world;
