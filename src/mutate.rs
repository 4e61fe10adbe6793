//! The decision: pod × aliases → edits. A pure function of its arguments.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashSet},
};

use crate::{
    image::{ImageRef, Relocated, split_host},
    review::{Image, Operation, Pod, Request},
    table::{HostTable, Rule},
};

/// The most that the annotation with the original names may hold, in bytes. All annotations of an object together may
/// hold 256 KiB, and the others are not ours to crowd out.
const MAX_TRACE: usize = 16 * 1024;

/// Stands in the annotation for the names that it has no room for.
pub const LEFT_OUT: &str = "…";

/// What to do with a pod.
#[derive(Debug)]
pub enum Verdict<'a> {
    /// Nothing in it is to be changed.
    Untouched,
    /// It is new, and none of its images is at a host that the table knows.
    Unknown,
    /// These edits, and no others.
    Mutate(Mutation<'a>),
    /// It names an alias whose registry is not known.
    Unresolved {
        /// The alias's name.
        alias: &'a str,
        /// The image that names it.
        image: &'a Image<'a>,
    },
}

/// The edits of one pod.
#[derive(Debug)]
pub struct Mutation<'a> {
    /// Images that get a new name.
    pub edits: Vec<Edit<'a>>,
    /// The pull secret to append, if it is missing.
    pub pull_secret: Option<AppendPullSecret<'a>>,
    /// Whether the pod has no pull secret for its new images, and is too old to be given one.
    pub lacks_pull_secret: bool,
    /// The annotation that keeps the names as written.
    pub trace: Option<Trace>,
}

/// One image that gets a new name.
#[derive(Clone, Copy, Debug)]
pub struct Edit<'a> {
    /// The image as it is.
    pub image: &'a Image<'a>,
    /// Its new name.
    pub new: Relocated<'a>,
}

/// A pull secret to append.
#[derive(Clone, Copy, Debug)]
pub struct AppendPullSecret<'a> {
    /// The Secret's name.
    pub name: &'a str,
    /// Whether the pod has a list to append to.
    pub list_exists: bool,
}

/// The annotation that keeps the names as written: JSON, field → name.
#[derive(Clone, Debug)]
pub struct Trace {
    /// What it holds already, less what is written anew.
    pub existing: BTreeMap<String, String>,
    /// How many of the edits are added, the first ones.
    pub added: usize,
    /// Whether the pod has annotations to add to.
    pub annotations_exist: bool,
}

/// A list of a pod spec whose members may name an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageList {
    /// `containers`
    Containers,
    /// `initContainers`
    InitContainers,
    /// `ephemeralContainers`
    EphemeralContainers,
    /// `volumes`, of which image volumes name one
    Volumes,
}

impl ImageList {
    /// The field's name in a pod spec.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Containers => "containers",
            Self::InitContainers => "initContainers",
            Self::EphemeralContainers => "ephemeralContainers",
            Self::Volumes => "volumes",
        }
    }
}

/// Decides on a request. `pull_secret` is the name of the Secret that pods get.
///
/// An update is patched only where this very update changed an image: anything more would restart running containers,
/// or keep a pod from being deleted (gatekeeper #2196, opentelemetry-operator #1514).
#[must_use]
pub fn mutate<'a>(request: &'a Request<'a>, table: &'a HostTable, pull_secret: &'a str) -> Verdict<'a> {
    let Some(pod) = request.object.as_ref() else { return Verdict::Untouched };
    let before = match request.operation {
        Operation::Create => None,
        Operation::Update => request.old_object.as_ref().map(Before::new),
        Operation::Delete | Operation::Connect => return Verdict::Untouched,
    };
    if pod.annotations.as_ref().is_some_and(|annotations| annotations.mirror) {
        return Verdict::Untouched;
    }
    let mut edits = Vec::new();
    let mut wants_secret = false;
    let mut known = false;
    for (place, image) in pod.images.iter().enumerate() {
        let (Some(host), rest) = split_host(&image.reference) else { continue };
        let Some(rule) = table.rule(host) else { continue };
        let Ok(reference) = ImageRef::at_host(Some(host), rest) else { continue };
        if before.as_ref().is_some_and(|before| before.had(place, image)) {
            continue;
        }
        known = true;
        match rule {
            Rule::Canonical => wants_secret = true,
            Rule::Unresolved { alias } => return Verdict::Unresolved { alias, image },
            Rule::Rewrite { registry, prefix, pull_secret } => {
                wants_secret |= pull_secret;
                if edits.is_empty() {
                    edits.reserve_exact(pod.images.len() - place);
                }
                edits.push(Edit { image, new: reference.at(registry, prefix.as_deref()) });
            }
        }
    }
    let missing = wants_secret.then(|| append(pod, pull_secret)).flatten();
    // The list of an existing pod cannot change.
    let (pull_secret, lacks_pull_secret) =
        if request.operation == Operation::Create { (missing, false) } else { (None, missing.is_some()) };
    // The API server drops every other change from an update of this subresource.
    let trace = (request.sub_resource.is_empty() && !edits.is_empty()).then(|| trace(pod, &edits));
    if edits.is_empty() && pull_secret.is_none() {
        let unknown = !known && request.operation == Operation::Create;
        return if unknown { Verdict::Unknown } else { Verdict::Untouched };
    }
    Verdict::Mutate(Mutation { edits, pull_secret, lacks_pull_secret, trace })
}

/// Whether a pod has an image that the table knows nothing of.
#[must_use]
pub fn names_stranger(request: &Request<'_>, table: &HostTable) -> bool {
    let is_stranger =
        |image: &Image<'_>| split_host(&image.reference).0.is_none_or(|host| table.rule(host).is_none());
    request.object.as_ref().is_some_and(|pod| pod.images.iter().any(is_stranger))
}

/// The images that a pod had before an update.
struct Before<'a> {
    images: &'a [Image<'a>],
    /// The same, for images that have moved.
    anywhere: OnceCell<HashSet<Key<'a>>>,
}

/// What makes an image the same one, wherever it stands in its list.
type Key<'a> = (ImageList, &'a str, &'a str);

impl<'a> Before<'a> {
    fn new(pod: &'a Pod<'a>) -> Self {
        Self { images: &pod.images, anywhere: OnceCell::new() }
    }

    /// Whether the pod had this very image. Most are where they were.
    fn had(&self, place: usize, image: &Image<'_>) -> bool {
        fn key<'b>(image: &'b Image<'_>) -> Key<'b> {
            (image.list, &image.owner, &image.reference)
        }
        self.images.get(place) == Some(image)
            || self.anywhere.get_or_init(|| self.images.iter().map(key).collect()).contains(&key(image))
    }
}

fn append<'a>(pod: &Pod<'_>, name: &'a str) -> Option<AppendPullSecret<'a>> {
    match &pod.pull_secrets {
        None => Some(AppendPullSecret { name, list_exists: false }),
        Some(present) => {
            (!present.iter().any(|p| p == name)).then_some(AppendPullSecret { name, list_exists: true })
        }
    }
}

fn trace(pod: &Pod<'_>, edits: &[Edit<'_>]) -> Trace {
    let text = pod.annotations.as_ref().and_then(|annotations| annotations.original_images.as_deref());
    let mut existing: BTreeMap<String, String> =
        text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut size: usize = existing.iter().map(|(k, v)| k.len() + v.len() + 6).sum();
    let fits = |edit: &&Edit<'_>| {
        size += "spec.{}".len() + edit.image.list.field().len();
        size += edit.image.owner.len() + edit.image.reference.len() + 6;
        size <= MAX_TRACE
    };
    let added = edits.iter().take_while(fits).count();
    if !existing.is_empty() {
        existing.remove(LEFT_OUT);
        for Edit { image, .. } in edits.iter().take(added) {
            existing.remove(&["spec.", image.list.field(), "{", &image.owner, "}"].concat());
        }
    }
    Trace { existing, added, annotations_exist: pod.annotations.is_some() }
}
