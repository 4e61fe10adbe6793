//! Uninstalling: everything that is ours is taken away, and nothing else.

use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Secret};
use kube::{
    Api, Client,
    api::{DeleteParams, Preconditions},
};
use tracing::info;

use crate::{
    args::CleanupArgs, client::client, pull_secret::Observed, registration, scope::Scope, secrets,
    watch::bounded,
};

/// How long the API server may be silent while an answer is awaited.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Deletes the webhook entries, the pull secrets, the self-managed certificate and the Lease. A controller that still runs
/// would make them again.
///
/// # Errors
/// The API server cannot be reached, or refuses.
pub async fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    let (names, kept) = (&args.names, &args.kept);
    let client = client(READ_TIMEOUT).await?;
    let entries = registration::remove_all(&client, &kept.webhook_configuration)
        .await
        .with_context(|| format!("the entries of {:?} cannot be removed", kept.webhook_configuration))?;
    let scope = Scope { watched: kept.watch_namespaces.clone(), excluded: Vec::new() };
    let (deleted, failed) = secrets::delete_all(&client, &names.pull_secret, &scope)
        .await
        .with_context(|| format!("the pull secrets {:?} cannot be listed", names.pull_secret))?;
    let certificate = delete_certificate(&client, &names.namespace, &names.certificate_secret)
        .await
        .with_context(|| format!("the Secret {:?} cannot be deleted", names.certificate_secret))?;
    delete_lease(&client, &names.namespace, &kept.lease)
        .await
        .with_context(|| format!("the Lease {:?} cannot be deleted", kept.lease))?;
    info!(webhook_entries = entries, pull_secrets = deleted - failed, certificate, "cleaned up");
    if failed > 0 {
        bail!("{failed} of {deleted} pull secrets could not be deleted; the log says why");
    }
    Ok(())
}

/// Deletes the Secret of the serving certificate if it is ours; one of cert-manager's or the user's is theirs to keep.
async fn delete_certificate(client: &Client, namespace: &str, name: &str) -> kube::Result<bool> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let Some(secret) = bounded(api.get_metadata_opt(name)).await? else { return Ok(false) };
    let observed = Observed::of(&secret);
    if !observed.ours {
        return Ok(false);
    }
    let only_this = Preconditions { uid: Some(observed.uid), resource_version: None };
    gone(
        bounded(api.delete(name, &DeleteParams { preconditions: Some(only_this), ..Default::default() }))
            .await,
    )
}

async fn delete_lease(client: &Client, namespace: &str, name: &str) -> kube::Result<bool> {
    let api: Api<Lease> = Api::namespaced(client.clone(), namespace);
    gone(bounded(api.delete(name, &DeleteParams::default())).await)
}

/// Whether it was there; that it was not is no error.
fn gone<T>(deleted: kube::Result<T>) -> kube::Result<bool> {
    match deleted {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}
