//! AdmissionReview `admission.k8s.io/v1` on the wire: what of a request is read, and how an answer is written.
//!
//! The types borrow from the body and hold only what the decision needs; everything else is skipped, never decoded and
//! written back, so that a field this program does not know survives. See
//! <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>.

use std::{borrow::Cow, fmt::Write as _, io::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use crate::mutate::{ImageList, Mutation};

/// The annotation that keeps the names as they were written.
pub const ORIGINAL_IMAGES: &str = "ecr-cname.dev/original-images";

/// Why a body is not a request that can be answered.
#[derive(Debug, thiserror::Error)]
pub enum BadReview {
    /// The body is not JSON of the expected shape.
    #[error("the body is not an AdmissionReview: {0}")]
    Malformed(#[from] serde_json::Error),
    /// It is JSON of another kind or version.
    #[error("expected an AdmissionReview of admission.k8s.io/v1, got {kind:?} of {api_version:?}")]
    WrongKind {
        /// The kind that came.
        kind: String,
        /// The API version that came.
        api_version: String,
    },
    /// It has no request, as an answer does.
    #[error("the AdmissionReview has no request")]
    NoRequest,
    /// It is about something else than a pod.
    #[error("the request is about {0:?}: only Pod is rewritten, so the webhook's rules must name pods only")]
    NotPod(String),
}

/// A text that borrows from the body unless it holds an escape.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An admission request about a pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request<'a> {
    /// Comes back in the answer.
    #[serde(borrow)]
    pub uid: Cow<'a, str>,
    #[serde(borrow)]
    kind: GroupVersionKind<'a>,
    /// What is done to the pod.
    pub operation: Operation,
    /// `ephemeralcontainers`, or nothing for the pod itself.
    #[serde(borrow, default)]
    pub sub_resource: Option<Text<'a>>,
    /// The pod's namespace.
    #[serde(borrow, default)]
    pub namespace: Option<Text<'a>>,
    /// The pod's name; not known yet where the API server generates it.
    #[serde(borrow, default)]
    pub name: Option<Text<'a>>,
    /// The pod as it shall be.
    #[serde(borrow, default)]
    pub object: Option<Pod<'a>>,
    /// The pod as it is.
    #[serde(borrow, default)]
    pub old_object: Option<Pod<'a>>,
}

/// What is done to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Operation {
    /// It is made.
    Create,
    /// It is changed.
    Update,
    /// It is deleted.
    Delete,
    /// Something is connected to it.
    Connect,
}

/// What the decision needs of a pod.
#[derive(Debug, Deserialize)]
pub struct Pod<'a> {
    #[serde(borrow, default)]
    metadata: Option<Metadata<'a>>,
    #[serde(borrow, default)]
    spec: Option<Spec<'a>>,
}

/// One image name in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// The list that it stands in.
    pub list: ImageList,
    /// Its place in that list.
    pub index: usize,
    /// The name of the container or volume.
    pub owner: &'a str,
    /// The image reference as written.
    pub reference: &'a str,
}

/// Parses the body of a request.
///
/// # Errors
/// [`BadReview`] says what of it cannot be answered.
pub fn parse(body: &[u8]) -> Result<Request<'_>, BadReview> {
    let review: Review<'_> = serde_json::from_slice(body)?;
    if review.kind != "AdmissionReview" || review.api_version != "admission.k8s.io/v1" {
        return Err(BadReview::WrongKind {
            kind: review.kind.into_owned(),
            api_version: review.api_version.into_owned(),
        });
    }
    let request = review.request.ok_or(BadReview::NoRequest)?;
    if request.kind.kind != "Pod" || !request.kind.group.is_empty() {
        return Err(BadReview::NotPod(request.kind.kind.into_owned()));
    }
    Ok(request)
}

impl<'a> Pod<'a> {
    /// Every image name in the pod, in the order of its lists.
    pub fn images(&self) -> impl Iterator<Item = Image<'_>> {
        let spec = self.spec.as_ref();
        let containers = [
            (ImageList::Containers, spec.and_then(|s| s.containers.as_deref())),
            (ImageList::InitContainers, spec.and_then(|s| s.init_containers.as_deref())),
            (ImageList::EphemeralContainers, spec.and_then(|s| s.ephemeral_containers.as_deref())),
        ];
        let volumes = spec.and_then(|s| s.volumes.as_deref()).unwrap_or_default();
        containers
            .into_iter()
            .flat_map(|(list, containers)| {
                containers.unwrap_or_default().iter().enumerate().filter_map(move |(index, c)| {
                    let reference = c.image.as_ref()?.as_str();
                    Some(Image { list, index, owner: name(c.name.as_ref()), reference })
                })
            })
            .chain(volumes.iter().enumerate().filter_map(|(index, v)| {
                let reference = v.image.as_ref()?.reference.as_ref()?.as_str();
                Some(Image { list: ImageList::Volumes, index, owner: name(v.name.as_ref()), reference })
            }))
    }

    /// Whether the pod is a mirror of a static pod.
    #[must_use]
    pub fn is_mirror(&self) -> bool {
        self.annotations().is_some_and(|a| a.mirror.is_some())
    }

    /// Whether the pod has annotations, and of them [`ORIGINAL_IMAGES`].
    #[must_use]
    pub fn original_images(&self) -> Option<Option<&str>> {
        self.annotations().map(|a| a.original_images.as_ref().map(Text::as_str))
    }

    /// The names of the pod's pull secrets; `None` where the pod has no such list.
    #[must_use]
    pub fn pull_secrets(&self) -> Option<impl Iterator<Item = &str>> {
        let secrets = self.spec.as_ref()?.image_pull_secrets.as_ref()?;
        Some(secrets.iter().map(|s| name(s.name.as_ref())))
    }

    fn annotations(&self) -> Option<&Annotations<'a>> {
        self.metadata.as_ref()?.annotations.as_ref()
    }
}

fn name<'a>(name: Option<&'a Text<'_>>) -> &'a str {
    name.map_or("", Text::as_str)
}

/// Writes the answer that lets the pod pass, with a patch if there is one.
#[must_use]
pub fn allow(uid: &str, mutation: Option<&Mutation<'_>>, warning: Option<&str>) -> Vec<u8> {
    let mut out = open(uid, true);
    if let Some(mutation) = mutation {
        out.extend_from_slice(br#","patchType":"JSONPatch","patch":""#);
        out.extend_from_slice(STANDARD.encode(patch(mutation)).as_bytes());
        out.push(b'"');
    }
    if let Some(warning) = warning {
        out.extend_from_slice(br#","warnings":["#);
        write_string(&mut out, warning);
        out.push(b']');
    }
    out.extend_from_slice(b"}}");
    out
}

/// Writes the answer that refuses the pod, with the HTTP status that the client shall see.
#[must_use]
pub fn deny(uid: &str, code: u16, reason: &str, message: &str) -> Vec<u8> {
    let mut out = open(uid, false);
    // Writing to a Vec cannot fail.
    let _ = write!(out, r#","status":{{"code":{code},"reason":"{reason}","message":"#);
    write_string(&mut out, message);
    out.extend_from_slice(b"}}}");
    out
}

/// The JSON Patch (RFC 6902) of a mutation: the smallest paths, addressed by index.
#[must_use]
pub fn patch(mutation: &Mutation<'_>) -> Vec<u8> {
    let mut out = String::with_capacity(256);
    out.push('[');
    for edit in &mutation.edits {
        let path = match edit.image.list {
            ImageList::Volumes => "image/reference",
            _ => "image",
        };
        // The new name needs no escapes: every part of it is of the image grammar.
        let _ = write!(
            out,
            r#"{{"op":"replace","path":"/spec/{}/{}/{path}","value":"{}"}},"#,
            edit.image.list.field(),
            edit.image.index,
            edit.new
        );
    }
    let mut out = out.into_bytes();
    if let Some(secret) = &mutation.pull_secret {
        let (suffix, open, close) = if secret.list_exists { ("/-", "", "") } else { ("", "[", "]") };
        let _ = write!(
            out,
            r#"{{"op":"add","path":"/spec/imagePullSecrets{suffix}","value":{open}{{"name":"{}"}}{close}}},"#,
            secret.name
        );
    }
    if let Some(trace) = &mutation.trace {
        if trace.annotations_exist {
            out.extend_from_slice(
                br#"{"op":"add","path":"/metadata/annotations/ecr-cname.dev~1original-images","value":"#,
            );
            write_string(&mut out, &trace.value);
        } else {
            let _ =
                write!(out, r#"{{"op":"add","path":"/metadata/annotations","value":{{"{ORIGINAL_IMAGES}":"#);
            write_string(&mut out, &trace.value);
            out.push(b'}');
        }
        out.extend_from_slice(b"},");
    }
    if out.last() == Some(&b',') {
        out.pop();
    }
    out.push(b']');
    out
}

fn open(uid: &str, allowed: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    out.extend_from_slice(
        br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","response":{"uid":"#,
    );
    write_string(&mut out, uid);
    let _ = write!(out, r#","allowed":{allowed}"#);
    out
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    // Writing a string to a Vec cannot fail.
    let _ = serde_json::to_writer(out, text);
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review<'a> {
    #[serde(borrow, default)]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    api_version: Cow<'a, str>,
    #[serde(borrow, default)]
    request: Option<Request<'a>>,
}

#[derive(Debug, Deserialize)]
struct GroupVersionKind<'a> {
    #[serde(borrow, default)]
    group: Cow<'a, str>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
}

#[derive(Debug, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow, default)]
    annotations: Option<Annotations<'a>>,
}

#[derive(Debug, Deserialize)]
struct Annotations<'a> {
    /// Such a pod is the API's picture of a static pod, and kubelet deletes a picture that was changed.
    #[serde(borrow, default, rename = "kubernetes.io/config.mirror")]
    mirror: Option<Text<'a>>,
    #[serde(borrow, default, rename = "ecr-cname.dev/original-images")]
    original_images: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec<'a> {
    #[serde(borrow, default)]
    containers: Option<Vec<Container<'a>>>,
    #[serde(borrow, default)]
    init_containers: Option<Vec<Container<'a>>>,
    #[serde(borrow, default)]
    ephemeral_containers: Option<Vec<Container<'a>>>,
    #[serde(borrow, default)]
    volumes: Option<Vec<Volume<'a>>>,
    #[serde(borrow, default)]
    image_pull_secrets: Option<Vec<PullSecretRef<'a>>>,
}

#[derive(Debug, Deserialize)]
struct Container<'a> {
    #[serde(borrow, default)]
    name: Option<Text<'a>>,
    #[serde(borrow, default)]
    image: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Volume<'a> {
    #[serde(borrow, default)]
    name: Option<Text<'a>>,
    #[serde(borrow, default)]
    image: Option<ImageVolume<'a>>,
}

#[derive(Debug, Deserialize)]
struct ImageVolume<'a> {
    #[serde(borrow, default)]
    reference: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct PullSecretRef<'a> {
    #[serde(borrow, default)]
    name: Option<Text<'a>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rename_is_the_constant() {
        let json = format!(
            r#"{{"metadata":{{"annotations":{{"kubernetes.io/config.mirror":"x","{ORIGINAL_IMAGES}":"y"}}}}}}"#
        );
        let pod: Pod<'_> = serde_json::from_str(&json).unwrap();
        assert!(pod.is_mirror());
        assert_eq!(pod.original_images(), Some(Some("y")));
    }

    #[test]
    fn says_what_is_wrong_with_a_body() {
        let cases: [(&str, &str); 8] = [
            ("", "not an AdmissionReview: EOF"),
            ("{", "not an AdmissionReview: EOF"),
            ("3", "not an AdmissionReview"),
            ("{}", "got \"\" of \"\""),
            (r#"{"kind":"Pod","apiVersion":"v1"}"#, "got \"Pod\" of \"v1\""),
            (r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1"}"#, "v1beta1"),
            (r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","response":{}}"#, "no request"),
            (
                r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","kind":{"group":"apps","version":"v1","kind":"Deployment"},"operation":"CREATE"}}"#,
                "\"Deployment\"",
            ),
        ];
        for (body, expected) in cases {
            let error = parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{body}: {error}");
        }
    }
}
