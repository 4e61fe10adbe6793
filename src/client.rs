//! The client of the API server, as every part of the program uses it.

use std::time::Duration;

use anyhow::Context as _;
use hyper_timeout::TimeoutConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::{
    Client, Config,
    client::{ClientBuilder, ConfigExt as _},
};
use tower::{BoxError, util::MapErrLayer};
use tracing::{info, warn};

use crate::watch::{bounded, chain};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection is kept that nobody uses. One that has died without a word costs each call that tries it all of its
/// time, one after the other, so there must not be a heap of old ones.
const IDLE: Duration = Duration::from_secs(5);

/// A client, whether the API server can be reached or not. `read_timeout` is how long it may be silent while an answer is
/// awaited.
///
/// # Errors
/// Nothing says where the API server is, or what it says cannot be used.
pub(crate) async fn client(read_timeout: Duration) -> anyhow::Result<Client> {
    let mut config = Config::infer()
        .await
        .context("no way to the API server: run in a cluster, or set KUBECONFIG to a kubeconfig file")?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // A list or the head of a watch that never comes must be noticed, too. A watch that is idle gets bookmarks, and ends
    // before this.
    config.read_timeout = Some(read_timeout);
    // Every loop of ours has a back-off of its own; a second one below it would only hide what happens.
    config.default_retry = false;
    let client = connect(config).context("the client of the API server cannot be set up")?;
    match bounded(client.apiserver_version()).await {
        Ok(version) => info!(kubernetes = version.git_version, "reached the API server"),
        // It may come up later; every watch tries again by itself.
        Err(error) => warn!(error = %chain(&error), "the API server cannot be reached yet"),
    }
    Ok(client)
}

/// What `Client::try_from` does, but for what is kept of idle connections.
fn connect(config: Config) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        // Through a proxy there is no more than kube's own.
        return Client::try_from(config);
    }
    let mut connector = TimeoutConnector::new(config.rustls_https_connector()?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .build::<_, kube::client::Body>(connector);
    let boxed = MapErrLayer::new(BoxError::from);
    let client = ClientBuilder::new(http, config.default_namespace.clone()).with_layer(&boxed);
    let base = config.base_uri_layer();
    Ok(match config.auth_layer()? {
        Some(auth) => client.with_layer(&auth).with_layer(&base).build(),
        None => client.with_layer(&base).build(),
    })
}
