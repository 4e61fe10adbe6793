//! The decision: pod × aliases → edits. A pure function of its arguments.

use std::collections::BTreeMap;

use crate::{
    image::{ImageRef, Relocated},
    review::{Image, Operation, Pod, Request},
    table::{HostTable, Rule},
};

/// The most that the annotation with the original names may hold, in bytes. All annotations of an object together may
/// hold 256 KiB, and the others are not ours to crowd out.
const MAX_TRACE: usize = 16 * 1024;

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
        image: Image<'a>,
    },
}

/// The edits of one pod.
#[derive(Debug)]
pub struct Mutation<'a> {
    /// Images that get a new name.
    pub edits: Vec<Edit<'a>>,
    /// The pull secret to append, if it is missing.
    pub pull_secret: Option<AppendPullSecret<'a>>,
    /// The annotation that keeps the names as written.
    pub trace: Option<Trace>,
}

/// One image that gets a new name.
#[derive(Clone, Copy, Debug)]
pub struct Edit<'a> {
    /// The image as it is.
    pub image: Image<'a>,
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

/// The annotation that keeps the names as written.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The annotation's value: JSON, field → name as written.
    pub value: String,
    /// Whether the pod has annotations to add to.
    pub annotations_exist: bool,
}

/// A list of a pod spec whose members may name an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    let Some(pod) = request.object.as_ref().filter(|pod| !pod.is_mirror()) else { return Verdict::Untouched };
    let before = match request.operation {
        Operation::Create => None,
        Operation::Update => request.old_object.as_ref(),
        Operation::Delete | Operation::Connect => return Verdict::Untouched,
    };
    let mut edits = Vec::new();
    let mut wants_secret = false;
    let mut known = false;
    for image in pod.images().filter(|image| before.is_none_or(|old| !had(old, image))) {
        let Ok(reference) = ImageRef::parse(image.reference) else { continue };
        let rule = table.rule(&reference);
        known |= rule.is_some();
        match rule {
            None => {}
            Some(Rule::Canonical) => wants_secret = true,
            Some(Rule::Unresolved { alias }) => return Verdict::Unresolved { alias, image },
            Some(Rule::Rewrite { registry, prefix, pull_secret }) => {
                wants_secret |= pull_secret;
                edits.push(Edit { image, new: reference.at(registry, prefix.as_deref()) });
            }
        }
    }
    let pull_secret =
        (wants_secret && request.operation == Operation::Create).then(|| append(pod, pull_secret)).flatten();
    // The API server drops every other change from an update of this subresource.
    let traceable = request.sub_resource.as_ref().is_none_or(|s| s.as_str().is_empty());
    let trace = (traceable && !edits.is_empty()).then(|| trace(pod, &edits));
    if edits.is_empty() && pull_secret.is_none() {
        let unknown = !known && request.operation == Operation::Create;
        return if unknown { Verdict::Unknown } else { Verdict::Untouched };
    }
    Verdict::Mutate(Mutation { edits, pull_secret, trace })
}

/// Whether the pod had this very image before.
fn had(old: &Pod<'_>, image: &Image<'_>) -> bool {
    old.images().any(|o| (o.list, o.owner, o.reference) == (image.list, image.owner, image.reference))
}

fn append<'a>(pod: &Pod<'_>, name: &'a str) -> Option<AppendPullSecret<'a>> {
    match pod.pull_secrets() {
        None => Some(AppendPullSecret { name, list_exists: false }),
        Some(mut present) => {
            (!present.any(|p| p == name)).then_some(AppendPullSecret { name, list_exists: true })
        }
    }
}

fn trace(pod: &Pod<'_>, edits: &[Edit<'_>]) -> Trace {
    let existing = pod.original_images();
    let mut names: BTreeMap<String, String> =
        existing.flatten().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut size: usize = names.iter().map(|(k, v)| k.len() + v.len() + 6).sum();
    let mut left_out = 0;
    for Edit { image, .. } in edits {
        let field = format!("spec.{}{{{}}}", image.list.field(), image.owner);
        size += field.len() + image.reference.len() + 6;
        if size > MAX_TRACE {
            left_out += 1;
        } else {
            names.insert(field, image.reference.to_owned());
        }
    }
    if left_out > 0 {
        names.insert("…".to_owned(), format!("{left_out} more"));
    }
    Trace { value: serde_json::to_string(&names).unwrap_or_default(), annotations_exist: existing.is_some() }
}
