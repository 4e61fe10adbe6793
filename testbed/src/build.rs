//! The operator's binary, compiled for those who run it outside of `cargo test`.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// How the operator is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quickly, as tests have it.
    Dev,
    /// As it is shipped, and as anything that is measured must be.
    Release,
}

/// The binary that was given, or else the operator of this tree, compiled if need be.
///
/// # Errors
/// It does not compile.
pub async fn operator_or(given: Option<PathBuf>, profile: Profile) -> Result<PathBuf> {
    match given {
        Some(binary) => Ok(binary),
        None => {
            eprintln!("testbed: compiling the operator");
            tokio::task::spawn_blocking(move || operator(profile)).await?
        }
    }
}

/// Compiles the operator, if need be, and returns where the binary is.
///
/// # Errors
/// It does not compile.
pub fn operator(profile: Profile) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--bin=ecr-cname", "--message-format=json", "--package=ecr-cname"]);
    match profile {
        // Both packages, so that features are those of this very build and nothing is compiled twice.
        Profile::Dev => build.arg("--package=testbed"),
        Profile::Release => build.arg("--release"),
    };
    let output = build.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the operator does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "ecr-cname")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo built no operator")
}
