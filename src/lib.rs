//! `ecr-cname`: your own name for your ECR registry, everywhere in a Kubernetes cluster.
//!
//! This library is what the binary is made of; its interface is not stable.
//!
//! # Layout
//!
//! Three journeys lead through the modules, each a straight line. Core modules decide: they know no client, no clock and
//! no runtime. Edges do what was decided, and do not call one another: [`run`] joins them with channels.
//!
//! **An image name**, from an admission request to its answer: [`webhook`] (edge) → [`review`] (the wire, over [`json`]) → [`image`] →
//! [`table`] → [`mutate`] → [`review::answer`]. Its port is kept by [`server`] and [`client_auth`].
//!
//! **An alias**, from an object to the pods that it concerns: [`watch`] (edge) → [`crd`] → [`alias`] → [`table`], and on
//! the leader [`dns`] (edge) → [`matching`] with [`scope`] → [`registration`] (edge), with a certificate from [`issuer`] and
//! [`serving_cert`] (edges); what came of it all is said by [`status`] and
//! [`events`] (edges).
//!
//! **A token**, from an identity to every namespace, on the leader ([`lease`], edge): [`registry`] → [`ecr`] →
//! [`tokens`] (edges) → [`pull_secret`] and [`dockerconfig`] (core) → [`secrets`] (edge).
//!
//! [`cleanup`] (edge) takes away what is ours. The commands that need no cluster are in [`offline`], over [`manifest`], and
//! decide with the same core. [`probe`] (edge) is what `helm test` runs.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod args;
pub mod run;

pub mod alias;
pub mod crd;
pub mod dockerconfig;
pub mod image;
pub mod json;
pub mod matching;
pub mod mutate;
pub mod pull_secret;
pub mod registry;
pub mod review;
pub mod scope;
pub mod table;

pub mod admin;
pub mod cleanup;
mod client;
pub mod client_auth;
pub mod dns;
pub mod ecr;
pub mod events;
pub mod issuer;
pub mod lease;
pub mod registration;
pub mod secrets;
pub mod server;
pub mod serving_cert;
pub mod status;
pub mod tokens;
pub mod watch;
pub mod webhook;

pub mod manifest;
pub mod offline;
pub mod probe;

pub mod metrics;
pub mod telemetry;
