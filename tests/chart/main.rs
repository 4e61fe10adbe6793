//! The Helm chart: what it renders, what it refuses, what the API server says to it, and what a release lives through.
//!
//! Everything is rendered by the real Helm.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod apply;
mod cases;
mod docs;
mod flags;
mod generated;
mod release;
mod render;
mod rights;
mod schema;
