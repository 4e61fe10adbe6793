//! Where things are kept.

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().unwrap_or(manifest_dir)
}

/// The directory below cargo's target directory that holds binaries, logs and data.
pub fn testbed_dir() -> PathBuf {
    // `join` keeps an absolute CARGO_TARGET_DIR as it is.
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("testbed")
}
