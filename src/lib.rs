//! `ecr-cname`: your own name for your ECR registry, everywhere in a Kubernetes cluster.
//!
//! # Layout
//!
//! x
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod admin;
pub mod alias;
pub mod args;
pub mod crd;
pub mod dns;
pub mod dockerconfig;
pub mod ecr;
pub mod image;
pub mod issuer;
pub mod lease;
pub mod manifest;
pub mod matching;
pub mod metrics;
pub mod mutate;
pub mod offline;
pub mod pull_secret;
pub mod registration;
pub mod registry;
pub mod review;
pub mod run;
pub mod secrets;
pub mod serving_cert;
pub mod status;
pub mod table;
pub mod telemetry;
pub mod tokens;
pub mod watch;
pub mod webhook;
