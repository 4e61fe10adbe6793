//! Logs, as text for people or as JSON for machines, on standard error.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, ParseError, filter_fn},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// Where more than INFO may be logged from. Other libraries see requests and answers, and so tokens and keys, and some
/// log them when they are asked to be verbose; whatever the filter says, they are not heard.
const VERBOSE: [&str; 5] = ["ecr_cname", "kube_runtime", "hickory", "rustls", "axum"];

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// A line that a person reads.
    Text,
    /// A JSON object on a line.
    Json,
}

/// Starts writing logs.
///
/// # Errors
/// The filter is not of the form `info`, or `info,ecr_cname=debug`.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(filter)?.and(filter_fn(is_safe));
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(format == LogFormat::Text && std::io::stderr().is_terminal());
    let layer = match format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
    Ok(())
}

/// Logs the whole of an answer that it cannot parse, at WARN. What it has to say comes back as an error, too.
const SILENT: &str = "kube_client";

fn is_safe(metadata: &Metadata<'_>) -> bool {
    if metadata.target().starts_with(SILENT) {
        return false;
    }
    *metadata.level() <= Level::INFO || VERBOSE.iter().any(|target| metadata.target().starts_with(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The level and target of a call site, as they are judged.
    macro_rules! site {
        ($level:expr, $target:expr) => {{
            let span = tracing::span!(target: $target, $level, "x");
            span.metadata().map(is_safe)
        }};
    }

    #[test]
    fn libraries_that_see_tokens_are_not_heard() {
        let everything = tracing_subscriber::registry().with(tracing_subscriber::fmt::layer());
        tracing::subscriber::with_default(everything, || {
            assert_eq!(site!(Level::TRACE, "ecr_cname::tokens"), Some(true));
            assert_eq!(site!(Level::DEBUG, "kube_runtime::watcher"), Some(true));
            assert_eq!(site!(Level::INFO, "aws_config"), Some(true));
            assert_eq!(site!(Level::DEBUG, "aws_smithy_runtime::client::orchestrator::http"), Some(false));
            assert_eq!(site!(Level::TRACE, "hyper::proto"), Some(false));
            assert_eq!(site!(Level::WARN, "kube_client::client"), Some(false));
        });
    }
}
