//! The control plane, and the AWS stand-in that trusts it, driven by the real clients.

#![allow(clippy::expect_used)] // a test fails by panicking

mod aws;
mod controlplane;

use anyhow::Result;
use testbed::controlplane::ControlPlane;
use tokio::sync::OnceCell;

/// One control plane for all tests that do not stop it, though each has a runtime of its own.
async fn shared() -> Result<&'static ControlPlane> {
    static SHARED: OnceCell<ControlPlane> = OnceCell::const_new();
    SHARED.get_or_try_init(ControlPlane::start).await
}
