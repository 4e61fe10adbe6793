//! Prometheus metrics: the registry they share. Each metric is defined and registered by the module that moves it, and
//! labels are closed sets, never names or error texts that a stranger chooses.

use prometheus_client::{encoding::text, registry::Registry};

/// The `Content-Type` of [`render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A registry whose metrics are named `ecr_cname_…`.
#[must_use]
pub fn registry() -> Registry {
    Registry::with_prefix("ecr_cname")
}

/// The metrics as text.
///
/// # Errors
/// A metric could not be written, which no metric of ours does.
pub fn render(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    text::encode(&mut out, registry)?;
    Ok(out)
}
