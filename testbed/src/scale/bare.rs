//! The baseline: a client that does nothing but server-side applies, one for each namespace, many at a time.

use std::time::{Duration, Instant};

use anyhow::Result;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Namespace, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};

/// How many calls are under way at one time: about what the API server makes the best of on two cores.
const IN_FLIGHT: usize = 32;

/// Creates namespaces.
pub(super) async fn namespaces(client: &Client, names: &[String]) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    each(names, async |name| {
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        api.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await?;
        Ok(())
    })
    .await
}

/// Applies a Secret, as large as a pull secret, in every namespace. Returns how long that took.
pub(super) async fn apply(client: &Client, names: &[String], secret: &str, bytes: usize) -> Result<Duration> {
    let started = Instant::now();
    let metadata = ObjectMeta { name: Some(secret.to_owned()), ..ObjectMeta::default() };
    let data = [("data".to_owned(), ByteString(vec![b'x'; bytes]))].into();
    let body = Secret { metadata, data: Some(data), ..Secret::default() };
    let params = PatchParams::apply("bare").force();
    each(names, async |name| {
        let api: Api<Secret> = Api::namespaced(client.clone(), name);
        api.patch(secret, &params, &Patch::Apply(&body)).await?;
        Ok(())
    })
    .await?;
    Ok(started.elapsed())
}

async fn each(names: &[String], call: impl AsyncFn(&String) -> Result<()>) -> Result<()> {
    stream::iter(names).map(|name| call(name)).buffer_unordered(IN_FLIGHT).try_collect().await
}
