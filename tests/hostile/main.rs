//! Hostile clients at the webhook's port, which any pod can reach. The real `ecr-cname webhook` beside a real control
//! plane; the attackers come from the address of the API server itself, so that nothing tells them apart but what they do.
//!
//! What holds under every attack: alias pods are admitted and rewritten through the API server, within its timeout; the
//! process lives and its memory stays below [`MEMORY`]; and when the attack is over, no file descriptor is left behind.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../it/cluster.rs"]
mod cluster;

mod attacks;
mod target;
