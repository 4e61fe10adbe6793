//! Kubernetes manifests as text: the images of pods and of workloads' pod templates renamed in place.
//!
//! Only the bytes of image references change. Comments, quotes, layout, order and line endings stay, because the text
//! is edited, not printed anew. What is written is read again and compared with what was asked for, so an edit that
//! would mean anything else (through an anchor that is shared, say) is an [`Error`] and never an output.

mod scalar;
mod tree;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
};

use granit_parser::ScalarStyle;
use serde_json::Value;

use scalar::literal;
use tree::{Content, Leaf, Site, Stream, Tree};

/// Returns `text`, YAML or JSON of any number of documents, with every image for which `rewrite` has another name
/// replaced.
///
/// Images are those of containers, init containers, ephemeral containers and image volumes, in a Pod or in the pod
/// template of a built-in workload, also inside a List. A pod (or template) that the admission webhook would leave alone,
/// a mirror pod or one labelled `ecr-cname.dev/rewrite: disabled`, is left alone here too.
///
/// # Errors
///
/// If the text is not YAML that kubectl would read, or if no edit gives exactly the new images.
pub fn rewrite(text: &str, mut rewrite: impl FnMut(&str) -> Option<String>) -> Result<Rewritten, Error> {
    let stream = Stream::parse(text)?;
    let mut edits = Vec::new();
    let mut changes = Vec::new();
    let mut wanted = Vec::with_capacity(stream.roots.len());
    for (index, root) in stream.roots.iter().enumerate() {
        let tree = stream.expand(*root)?;
        let mut images = Vec::new();
        find_images(&tree, "", None, &mut images);
        images.sort_by_key(|(leaf, _)| leaf.number);
        let mut new_names = HashMap::new();
        for (leaf, path) in images {
            let Some(old) = leaf.value.as_str() else { continue };
            let Some(new) = rewrite(old).filter(|new| new != old) else { continue };
            new_names.insert(leaf.number, new.clone());
            changes.push(Change { document: index + 1, path, old: old.to_owned(), new });
        }
        if !new_names.is_empty() {
            edits.extend(edits_for(text, &stream, &tree, &new_names)?);
        }
        wanted.push(tree.value(&new_names));
    }
    if changes.is_empty() {
        return Ok(Rewritten { text: text.to_owned(), changes });
    }
    let edited = apply(text, edits);
    let got = documents(&edited).unwrap_or_default();
    let wrong = wanted
        .iter()
        .enumerate()
        .find(|(index, wanted)| got.get(*index).map(|got| &got.value) != Some(wanted));
    if wrong.is_some() || got.len() != wanted.len() {
        let root = stream.roots.get(wrong.map_or(0, |(index, _)| index)).copied().unwrap_or_default();
        let message = "the images of this document cannot be renamed in place: expand its anchors first";
        return Err(stream.error(root, message));
    }
    Ok(Rewritten { text: edited, changes })
}

/// Returns every document of `text`, YAML or JSON, with aliases and merge keys followed and scalars typed as kubectl
/// types them. An empty document is null.
///
/// # Errors
///
/// If the text is not YAML that kubectl would read.
pub fn documents(text: &str) -> Result<Vec<Document>, Error> {
    let stream = Stream::parse(text)?;
    let none = HashMap::new();
    let document = |root: &usize| {
        let value = stream.expand(*root)?.value(&none);
        let (line, column) = stream.nodes.get(*root).map_or((1, 1), |node| (node.line, node.column));
        Ok(Document { value, line, column })
    };
    stream.roots.iter().map(document).collect()
}

/// A text after [`rewrite`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// The whole text; without changes it is the one that was given, byte for byte.
    pub text: String,
    /// What was replaced, in the text's order.
    pub changes: Vec<Change>,
}

/// An image that was replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The document within the text, from 1.
    pub document: usize,
    /// The field within the document, for example `spec.template.spec.containers[0].image`.
    pub path: String,
    /// The image that the text had.
    pub old: String,
    /// The image that it has now.
    pub new: String,
}

/// A document of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The document's content.
    pub value: Value,
    /// The line where it starts, from 1.
    pub line: usize,
    /// The column where it starts, from 1, in characters.
    pub column: usize,
}

/// Why a text was not read or not rewritten, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct Error {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

/// Where a kind has its pod (metadata and spec): the API versions, the kind and the path.
const KINDS: [(&[&str], &str, &[&str]); 9] = [
    (&["v1"], "Pod", &[]),
    (&["v1"], "PodTemplate", &["template"]),
    (&["v1"], "ReplicationController", TEMPLATE),
    (APPS, "Deployment", TEMPLATE),
    (APPS, "StatefulSet", TEMPLATE),
    (APPS, "DaemonSet", TEMPLATE),
    (APPS, "ReplicaSet", TEMPLATE),
    (&["batch/v1"], "Job", TEMPLATE),
    (&["batch/v1", "batch/v1beta1"], "CronJob", &["spec", "jobTemplate", "spec", "template"]),
];
const APPS: &[&str] = &["apps/v1", "apps/v1beta1", "apps/v1beta2", "extensions/v1beta1"];
const TEMPLATE: &[&str] = &["spec", "template"];

/// Where a pod's spec has its images: a list, and the path within an item.
const IMAGES: [(&str, &[&str]); 4] = [
    ("initContainers", &["image"]),
    ("containers", &["image"]),
    ("ephemeralContainers", &["image"]),
    ("volumes", &["image", "reference"]),
];

/// Collects the images of an object, or of a list of objects, with their paths. The items of a typed list need not say
/// what they are; `implied` is their API version and kind.
fn find_images<'t>(
    object: &'t Tree<'t>,
    path: &str,
    implied: Option<(&str, &str)>,
    images: &mut Vec<(&'t Leaf<'t>, String)>,
) {
    let said = |key| object.get(key).and_then(Tree::text);
    let (Some(version), Some(kind)) = (
        said("apiVersion").or(implied.map(|(version, _)| version)),
        said("kind").or(implied.map(|(_, kind)| kind)),
    ) else {
        return;
    };
    if let (Some(kind), Some(items)) = (kind.strip_suffix("List"), object.get("items")) {
        for (index, item) in items.items().iter().enumerate() {
            find_images(item, &format!("{path}items[{index}]."), Some((version, kind)), images);
        }
    }
    for (_, _, to_pod) in KINDS.iter().filter(|entry| entry.0.contains(&version) && entry.1 == kind) {
        let Some(pod) = descend(object, to_pod) else { continue };
        if is_left_alone(pod) {
            continue;
        }
        for (list, to_image) in IMAGES {
            let items = descend(pod, &["spec", list]).map_or(&[][..], Tree::items);
            for (index, item) in items.iter().enumerate() {
                if let Some(Tree::Leaf(leaf)) = descend(item, to_image) {
                    let to_pod: String = to_pod.iter().flat_map(|key| [key, "."]).collect();
                    let to_image = to_image.join(".");
                    images.push((leaf, format!("{path}{to_pod}spec.{list}[{index}].{to_image}")));
                }
            }
        }
    }
}

/// Whether a pod is a mirror of a static pod, or labelled to be left alone.
fn is_left_alone(pod: &Tree<'_>) -> bool {
    descend(pod, &["metadata", "annotations", "kubernetes.io/config.mirror"]).is_some()
        || descend(pod, &["metadata", "labels", "ecr-cname.dev/rewrite"]).and_then(Tree::text)
            == Some("disabled")
}

fn descend<'t>(tree: &'t Tree<'t>, path: &[&str]) -> Option<&'t Tree<'t>> {
    path.iter().try_fold(tree, |tree, key| tree.get(key))
}

/// A range of the text, and what stands there afterwards.
type Edit = (Range<usize>, String);

/// What a leaf's site in the text has to come to.
struct Decision<'t> {
    /// The next site farther in, from which this one has its value if it says nothing itself.
    inherits: Option<Site>,
    old: &'t str,
    new: &'t str,
}

/// The edits that give the leaves in `new_names`, by their numbers, their new names, and leave all others as they are.
///
/// Aliases and merge keys put a scalar into several places. Each place is decided by one site in the text, and a site
/// that should differ from what it inherits gets a value of its own.
fn edits_for(
    text: &str,
    stream: &Stream,
    tree: &Tree<'_>,
    new_names: &HashMap<usize, String>,
) -> Result<Vec<Edit>, Error> {
    let mut leaves = Vec::new();
    tree.leaves(&mut leaves);
    let renamed = leaves.iter().filter(|leaf| new_names.contains_key(&leaf.number));
    let renamed: HashSet<Site> = renamed.filter_map(|leaf| leaf.sites.first().copied()).collect();
    let mut decisions: BTreeMap<Site, Decision<'_>> = BTreeMap::new();
    for leaf in &leaves {
        let (Some(old), Some((site, farther_in))) = (leaf.value.as_str(), leaf.sites.split_last()) else {
            continue;
        };
        if leaf.sites.first().is_none_or(|scalar| !renamed.contains(scalar)) {
            continue;
        }
        let new = new_names.get(&leaf.number).map_or(old, String::as_str);
        let inherits = farther_in.last().copied();
        if decisions.entry(*site).or_insert(Decision { inherits, old, new }).new != new {
            let message =
                "this is used both as an image to rename and for something else: expand the anchor first";
            return Err(stream.error(site.node(), message));
        }
    }
    let edits = decisions.iter().filter_map(|(site, Decision { inherits, old, new })| {
        let inherited = inherits.and_then(|site| decisions.get(&site)).map_or(*old, |decision| decision.new);
        if inherited == *new { None } else { edit(text, stream, *site, new) }
    });
    Ok(edits.collect())
}

/// The edit that gives a site the value `new`.
fn edit(text: &str, stream: &Stream, site: Site, new: &str) -> Option<Edit> {
    let node = stream.nodes.get(site.node())?;
    match (site, &node.content) {
        (Site::Scalar(_), Content::Scalar { style, .. }) => {
            let mut literal = literal(new, *style);
            let header = text.get(node.span.clone())?.lines().next()?;
            if let (ScalarStyle::Literal | ScalarStyle::Folded, Some(comment)) = (style, header.find('#')) {
                literal = format!("{literal} {}", header.get(comment..)?.trim_end());
            }
            Some((node.span.clone(), literal))
        }
        (Site::Alias(_), _) => Some((node.span.clone(), literal(new, ScalarStyle::Plain))),
        (Site::Merge { key, .. }, Content::Mapping { flow, pairs }) => {
            let entry = format!(
                "{}: {}",
                literal(&stream.key(key)?, ScalarStyle::Plain),
                literal(new, ScalarStyle::Plain)
            );
            let (merge, merged) = pairs.iter().find(|(key, _)| stream.is_merge(*key))?;
            let (merge, end) = (stream.nodes.get(*merge)?, stream.nodes.get(*merged)?.span.end);
            if *flow {
                return Some((end..end, format!(", {entry}")));
            }
            let rest = text.get(end..)?;
            let end = rest.find(['\r', '\n']).map_or(text.len(), |length| end + length);
            let line_end = if text.contains("\r\n") { "\r\n" } else { "\n" };
            Some((end..end, format!("{line_end}{}{entry}", " ".repeat(merge.column.saturating_sub(1)))))
        }
        _ => None,
    }
}

/// The text with the edits made.
fn apply(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|(range, _)| range.start);
    let mut edited = String::with_capacity(text.len() + edits.len() * 64);
    let mut done = 0;
    for (range, new) in edits {
        edited.push_str(text.get(done..range.start).unwrap_or_default());
        edited.push_str(&new);
        done = range.end;
    }
    edited.push_str(text.get(done..).unwrap_or_default());
    edited
}

#[cfg(test)]
mod tests;
