//! AdmissionReview `admission.k8s.io/v1` on the wire: what of a request is read. [`answer`] writes what goes back.
//!
//! One pass over the body reads what the decision needs, borrowing from it, and skips everything else, so that a field
//! that this program does not know survives. See
//! <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>.

pub mod answer;

use std::borrow::Cow;

use crate::{
    json::{self, Scanner},
    mutate::ImageList,
};

/// The annotation that keeps the names as they were written.
pub const ORIGINAL_IMAGES: &str = "ecr-cname.dev/original-images";

/// The annotation of a mirror pod: the API's picture of a static pod, which kubelet deletes if it was changed.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Why a body is not a request that can be answered.
#[derive(Debug, thiserror::Error)]
pub enum BadReview {
    /// The body is not JSON of the expected shape.
    #[error("the body is not an AdmissionReview: {0}")]
    Malformed(#[from] json::Error),
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

/// An admission request about a pod. Its texts borrow from the body unless they hold an escape.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Comes back in the answer.
    pub uid: Cow<'a, str>,
    /// What is done to the pod.
    pub operation: Operation,
    /// `ephemeralcontainers`, or nothing for the pod itself.
    pub sub_resource: Cow<'a, str>,
    /// The pod's namespace.
    pub namespace: Cow<'a, str>,
    /// The pod's name; not known yet where the API server generates it.
    pub name: Cow<'a, str>,
    /// The pod as it shall be.
    pub object: Option<Pod<'a>>,
    /// The pod as it is.
    pub old_object: Option<Pod<'a>>,
    /// The API group of what the request is about.
    group: Cow<'a, str>,
    /// The kind of what the request is about.
    kind: Cow<'a, str>,
}

/// What is done to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pod<'a> {
    /// Every image name, in the order of the text.
    pub images: Vec<Image<'a>>,
    /// The names of the pull secrets; `None` where the pod has no such list.
    pub pull_secrets: Option<Vec<Cow<'a, str>>>,
    /// The annotations that matter; `None` where the pod has none at all.
    pub annotations: Option<Annotations<'a>>,
}

/// The annotations that matter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Annotations<'a> {
    /// Whether the pod is a mirror of a static pod.
    pub mirror: bool,
    /// [`ORIGINAL_IMAGES`].
    pub original_images: Option<Cow<'a, str>>,
}

/// One image name in a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Image<'a> {
    /// The list that it stands in.
    pub list: ImageList,
    /// Its place in that list.
    pub index: usize,
    /// The name of the container or volume.
    pub owner: Cow<'a, str>,
    /// The image reference as written.
    pub reference: Cow<'a, str>,
}

/// Parses the body of a request.
///
/// # Errors
/// [`BadReview`] says what of it cannot be answered.
pub fn parse(body: &[u8]) -> Result<Request<'_>, BadReview> {
    review(&mut Scanner::new(body))
}

fn review<'a>(json: &mut Scanner<'a>) -> Result<Request<'a>, BadReview> {
    let (mut kind, mut api_version, mut request) = (Cow::default(), Cow::default(), None);
    json.object(&["kind", "apiVersion", "request"], |json, field| {
        match field {
            "kind" => kind = json.text()?,
            "apiVersion" => api_version = json.text()?,
            _ => request = json.nullable(self::request)?,
        }
        Ok(())
    })?;
    json.end()?;
    if kind != "AdmissionReview" || api_version != "admission.k8s.io/v1" {
        return Err(BadReview::WrongKind { kind: kind.into_owned(), api_version: api_version.into_owned() });
    }
    let request = request.ok_or(BadReview::NoRequest)?;
    if request.kind != "Pod" || !request.group.is_empty() {
        return Err(BadReview::NotPod(request.kind.into_owned()));
    }
    Ok(request)
}

fn request<'a>(json: &mut Scanner<'a>) -> Result<Request<'a>, json::Error> {
    let (mut uid, mut about, mut operation) = (None, None, None);
    let (mut sub_resource, mut namespace, mut name) = (None, None, None);
    let (mut object, mut old_object) = (None, None);
    let fields = ["uid", "kind", "operation", "subResource", "namespace", "name", "object", "oldObject"];
    json.object(&fields, |json, field| {
        match field {
            "uid" => uid = Some(json.text()?),
            "kind" => about = Some(group_and_kind(json)?),
            "operation" => operation = Some(self::operation(json)?),
            "subResource" => sub_resource = json.nullable(Scanner::text)?,
            "namespace" => namespace = json.nullable(Scanner::text)?,
            "name" => name = json.nullable(Scanner::text)?,
            "object" => object = json.nullable(pod)?,
            _ => old_object = json.nullable(pod)?,
        }
        Ok(())
    })?;
    let missing = |field| json.error(format_args!("missing field `{field}`"));
    let (group, kind) = about.ok_or_else(|| missing("kind"))?;
    Ok(Request {
        uid: uid.ok_or_else(|| missing("uid"))?,
        operation: operation.ok_or_else(|| missing("operation"))?,
        sub_resource: sub_resource.unwrap_or_default(),
        namespace: namespace.unwrap_or_default(),
        name: name.unwrap_or_default(),
        object,
        old_object,
        group,
        kind,
    })
}

fn group_and_kind<'a>(json: &mut Scanner<'a>) -> Result<(Cow<'a, str>, Cow<'a, str>), json::Error> {
    let (mut group, mut kind) = (Cow::default(), None);
    json.object(&["group", "kind"], |json, field| {
        match field {
            "group" => group = json.text()?,
            _ => kind = Some(json.text()?),
        }
        Ok(())
    })?;
    Ok((group, kind.ok_or_else(|| json.error("missing field `kind`"))?))
}

fn operation(json: &mut Scanner<'_>) -> Result<Operation, json::Error> {
    match json.text()?.as_ref() {
        "CREATE" => Ok(Operation::Create),
        "UPDATE" => Ok(Operation::Update),
        "DELETE" => Ok(Operation::Delete),
        "CONNECT" => Ok(Operation::Connect),
        other => Err(json.error(format_args!("unknown operation {other:?}"))),
    }
}

fn pod<'a>(json: &mut Scanner<'a>) -> Result<Pod<'a>, json::Error> {
    let mut pod = Pod::default();
    json.object(&["metadata", "spec"], |json, field| {
        match field {
            "metadata" => drop(json.nullable(|json| metadata(json, &mut pod))?),
            _ => drop(json.nullable(|json| spec(json, &mut pod))?),
        }
        Ok(())
    })?;
    Ok(pod)
}

fn metadata<'a>(json: &mut Scanner<'a>, pod: &mut Pod<'a>) -> Result<(), json::Error> {
    json.object(&["annotations"], |json, _| {
        pod.annotations = json.nullable(|json| {
            let mut annotations = Annotations::default();
            json.object(&[MIRROR, ORIGINAL_IMAGES], |json, field| {
                let value = json.nullable(Scanner::text)?;
                match field {
                    MIRROR => annotations.mirror = value.is_some(),
                    _ => annotations.original_images = value,
                }
                Ok(())
            })?;
            Ok(annotations)
        })?;
        Ok(())
    })
}

fn spec<'a>(json: &mut Scanner<'a>, pod: &mut Pod<'a>) -> Result<(), json::Error> {
    let fields = ["containers", "initContainers", "ephemeralContainers", "volumes", "imagePullSecrets"];
    json.object(&fields, |json, field| {
        let list = match field {
            "containers" => ImageList::Containers,
            "initContainers" => ImageList::InitContainers,
            "ephemeralContainers" => ImageList::EphemeralContainers,
            "volumes" => ImageList::Volumes,
            _ => {
                pod.pull_secrets = json.nullable(pull_secrets)?;
                return Ok(());
            }
        };
        json.nullable(|json| images(json, list, &mut pod.images))?;
        Ok(())
    })
}

/// The image names of a list whose members are containers or volumes.
fn images<'a>(
    json: &mut Scanner<'a>,
    list: ImageList,
    images: &mut Vec<Image<'a>>,
) -> Result<(), json::Error> {
    json.array(|json, index| {
        let (mut owner, mut reference) = (None, None);
        json.object(&["name", "image"], |json, field| {
            match field {
                "name" => owner = json.nullable(Scanner::text)?,
                _ if list == ImageList::Volumes => reference = json.nullable(image_volume)?.flatten(),
                _ => reference = json.nullable(Scanner::text)?,
            }
            Ok(())
        })?;
        if let Some(reference) = reference {
            if images.is_empty() {
                images.reserve(8);
            }
            images.push(Image { list, index, owner: owner.unwrap_or_default(), reference });
        }
        Ok(())
    })
}

fn image_volume<'a>(json: &mut Scanner<'a>) -> Result<Option<Cow<'a, str>>, json::Error> {
    let mut reference = None;
    json.object(&["reference"], |json, _| {
        reference = json.nullable(Scanner::text)?;
        Ok(())
    })?;
    Ok(reference)
}

fn pull_secrets<'a>(json: &mut Scanner<'a>) -> Result<Vec<Cow<'a, str>>, json::Error> {
    let mut names = Vec::new();
    json.array(|json, _| {
        let mut name = None;
        json.object(&["name"], |json, _| {
            name = json.nullable(Scanner::text)?;
            Ok(())
        })?;
        names.push(name.unwrap_or_default());
        Ok(())
    })?;
    Ok(names)
}

#[cfg(test)]
mod tests;
