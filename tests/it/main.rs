//! The tests: behaviour at the seams that a user sees, on a real API server wherever one is involved.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admission;
mod aliases;
mod client_auth;
mod cluster;
mod dns;
mod faults;
mod generated;
mod offline;
mod pods;
mod roles;
mod secrets;
mod specs;
mod wire;
