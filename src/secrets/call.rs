//! The calls to the API server about one pull secret.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions},
    core::PartialObjectMeta,
};
use secrecy::{
    SecretString,
    zeroize::{Zeroize as _, Zeroizing},
};

use crate::{
    alias::Identity,
    dockerconfig,
    ecr::Token,
    pull_secret::{CONTENTS, Contents, DATA_KEY, EXPIRES_AT, FIELD_MANAGER, Holding, MANAGED_BY, Observed},
    watch::bounded,
};

/// A call about one Secret.
pub(super) enum Call {
    /// Delete it, if it is still the one that was observed.
    Delete(Observed),
    /// Make it hold these.
    Write {
        /// The Secret as it is; `None` to create it.
        old: Option<Observed>,
        /// Registry host → the token that it gets, and whose that is.
        fresh: BTreeMap<String, (Arc<Token>, Identity)>,
        /// What stays as the Secret holds it.
        carried: Contents,
    },
}

/// Why a Secret was not written or deleted.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The API server refused, or could not be reached.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// A Secret holds 1 MiB.
    #[error(
        "the credentials of {registries} registries are {bytes} bytes, and a Secret holds 1 MiB: let fewer aliases select this namespace"
    )]
    TooLarge {
        /// How many registries.
        registries: usize,
        /// How many bytes.
        bytes: usize,
    },
    /// What the API server stored is not what it was given.
    #[error("it is stored otherwise than it was written: does a mutating admission policy change Secrets?")]
    Altered,
    /// It is there already, or has changed since it was observed.
    #[error("it has changed meanwhile: {0}")]
    Changed(String, Box<Option<Observed>>),
}

impl CallError {
    /// Whether the API server works, and says no.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::Api(kube::Error::Api(status)) => (400..500).contains(&status.code) && status.code != 429,
            Self::Api(_) => false,
            Self::TooLarge { .. } | Self::Altered | Self::Changed(..) => true,
        }
    }
}

impl Call {
    /// Makes the call, and returns the Secret as it is then. A conflict comes with the Secret as it really is.
    pub(super) async fn perform(self, api: &Api<Secret>, name: &str) -> Result<Option<Observed>, CallError> {
        let result = match self {
            Self::Delete(old) => delete(api, name, old).await.map(|()| None),
            Self::Write { old, fresh, carried } => write(api, name, old, fresh, carried).await.map(Some),
        };
        match result {
            Err(CallError::Api(kube::Error::Api(status))) if status.code == 409 => {
                let actual = bounded(api.get_metadata_opt(name)).await?;
                Err(CallError::Changed(status.message, Box::new(actual.as_ref().map(Observed::of))))
            }
            other => other,
        }
    }
}

async fn delete(api: &Api<Secret>, name: &str, old: Observed) -> Result<(), CallError> {
    let only_this = Preconditions { uid: Some(old.uid), resource_version: Some(old.resource_version) };
    let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
    match bounded(api.delete(name, &params)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}

async fn write(
    api: &Api<Secret>,
    name: &str,
    old: Option<Observed>,
    fresh: BTreeMap<String, (Arc<Token>, Identity)>,
    mut contents: Contents,
) -> Result<Observed, CallError> {
    let held: BTreeMap<String, SecretString> = if contents.is_empty() {
        BTreeMap::new()
    } else {
        let secret = bounded(api.get(name)).await?;
        let config = Zeroizing::new(secret.data.and_then(|mut d| d.remove(DATA_KEY)).unwrap_or_default().0);
        dockerconfig::parse(&config)
    };
    contents.retain(|host, _| held.contains_key(host));
    let carried = held.iter().filter(|(host, _)| contents.contains_key(*host));
    let config = dockerconfig::render(
        carried
            .map(|(host, auth)| (host.as_str(), auth))
            .chain(fresh.iter().map(|(host, (token, _))| (host.as_str(), &token.auth))),
    );
    for (host, (token, identity)) in &fresh {
        let holding = Holding { expires_at: token.expires_at, identity: identity.to_string() };
        contents.insert(host.clone(), holding);
    }
    if config.len() > dockerconfig::MAX_BYTES {
        return Err(CallError::TooLarge { registries: contents.len(), bytes: config.len() });
    }
    let mut secret = render(name, old.as_ref(), &contents, &config);
    let written = match old {
        // With UID and resourceVersion, a Secret that someone else put in its place, or took over, is a conflict.
        Some(_) => {
            let params = PatchParams::apply(FIELD_MANAGER).force();
            bounded(api.patch(name, &params, &Patch::Apply(&secret))).await
        }
        None => {
            let params =
                PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
            bounded(api.create(&params, &secret)).await
        }
    };
    wipe(&mut secret);
    let mut written = written?;
    wipe(&mut written);
    let stored =
        Observed::of(&PartialObjectMeta { metadata: written.metadata, ..PartialObjectMeta::default() });
    // Otherwise it would look like drift, and be written again at once, for ever.
    if stored.ours && stored.intact && stored.contents == contents {
        Ok(stored)
    } else {
        Err(CallError::Altered)
    }
}

/// Overwrites the data of a Secret, which would otherwise stay in memory that is given back.
fn wipe(secret: &mut Secret) {
    secret.data.iter_mut().flat_map(BTreeMap::values_mut).for_each(|bytes| bytes.0.zeroize());
}

fn render(name: &str, old: Option<&Observed>, contents: &Contents, config: &str) -> Secret {
    let expires_at = contents.values().map(|h| h.expires_at).min().unwrap_or_default();
    let pairs = |pairs: [(&str, String); 2]| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            uid: old.map(|o| o.uid.clone()),
            resource_version: old.map(|o| o.resource_version.clone()),
            labels: Some(pairs([
                (MANAGED_BY.0, MANAGED_BY.1.to_owned()),
                ("app.kubernetes.io/name", "ecr-cname".to_owned()),
            ])),
            annotations: Some(pairs([
                (EXPIRES_AT, format!("{expires_at:.0}")),
                (CONTENTS, serde_json::to_string(contents).unwrap_or_default()),
            ])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/dockerconfigjson".to_owned()),
        data: Some([(DATA_KEY.to_owned(), ByteString(config.as_bytes().to_vec()))].into()),
        ..Secret::default()
    }
}
