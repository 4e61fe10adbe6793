//! AdmissionReview `admission.k8s.io/v1` on the wire: what of a request is read, and how an answer is written.
//!
//! One pass over the body reads what the decision needs, borrowing from it, and skips everything else, so that a field
//! that this program does not know survives. See
//! <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>.

use std::{borrow::Cow, io::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::{
    json::{self, Scanner},
    mutate::{Edit, ImageList, LEFT_OUT, Mutation, Trace},
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
    json.object(["kind", "apiVersion", "request"], |json, field| {
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
    json.object(fields, |json, field| {
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
    json.object(["group", "kind"], |json, field| {
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
    json.object(["metadata", "spec"], |json, field| {
        match field {
            "metadata" => drop(json.nullable(|json| metadata(json, &mut pod))?),
            _ => drop(json.nullable(|json| spec(json, &mut pod))?),
        }
        Ok(())
    })?;
    Ok(pod)
}

fn metadata<'a>(json: &mut Scanner<'a>, pod: &mut Pod<'a>) -> Result<(), json::Error> {
    json.object(["annotations"], |json, _| {
        pod.annotations = json.nullable(|json| {
            let mut annotations = Annotations::default();
            json.object([MIRROR, ORIGINAL_IMAGES], |json, field| {
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
    json.object(fields, |json, field| {
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
        json.object(["name", "image"], |json, field| {
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
    json.object(["reference"], |json, _| {
        reference = json.nullable(Scanner::text)?;
        Ok(())
    })?;
    Ok(reference)
}

fn pull_secrets<'a>(json: &mut Scanner<'a>) -> Result<Vec<Cow<'a, str>>, json::Error> {
    let mut names = Vec::new();
    json.array(|json, _| {
        let mut name = None;
        json.object(["name"], |json, _| {
            name = json.nullable(Scanner::text)?;
            Ok(())
        })?;
        names.push(name.unwrap_or_default());
        Ok(())
    })?;
    Ok(names)
}

/// Writes the answer that lets the pod pass, with a patch if there is one.
#[must_use]
pub fn allow(uid: &str, mutation: Option<&Mutation<'_>>, warning: Option<&str>) -> Vec<u8> {
    let mut out = open(uid, true, mutation.map_or(0, room));
    if let Some(mutation) = mutation {
        out.extend_from_slice(br#","patchType":"JSONPatch","patch":""#);
        in_base64(&mut out, |out| patch(out, mutation));
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
    let mut out = open(uid, false, message.len());
    // Writing to a Vec cannot fail.
    let _ = write!(out, r#","status":{{"code":{code},"reason":"{reason}","message":"#);
    write_string(&mut out, message);
    out.extend_from_slice(b"}}}");
    out
}

/// Writes the JSON Patch (RFC 6902) of a mutation: the smallest paths, addressed by index.
fn patch(out: &mut Vec<u8>, mutation: &Mutation<'_>) {
    out.push(b'[');
    for edit in &mutation.edits {
        out.extend_from_slice(br#"{"op":"replace","path":"/spec/"#);
        out.extend_from_slice(edit.image.list.field().as_bytes());
        // Writing to a Vec cannot fail.
        let _ = write!(out, "/{}", edit.image.index);
        out.extend_from_slice(match edit.image.list {
            ImageList::Volumes => b"/image/reference",
            _ => b"/image",
        });
        out.extend_from_slice(br#"","value":""#);
        // The new name needs no escapes: every part of it is of the image grammar.
        edit.new.parts().for_each(|part| out.extend_from_slice(part.as_bytes()));
        out.extend_from_slice(br#""},"#);
    }
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
            original_images(out, trace, &mutation.edits);
        } else {
            let _ =
                write!(out, r#"{{"op":"add","path":"/metadata/annotations","value":{{"{ORIGINAL_IMAGES}":"#);
            original_images(out, trace, &mutation.edits);
            out.push(b'}');
        }
        out.extend_from_slice(b"},");
    }
    without_comma(out);
    out.push(b']');
}

/// Writes the annotation with the original names: JSON in a string of JSON.
fn original_images(out: &mut Vec<u8>, trace: &Trace, edits: &[Edit<'_>]) {
    let entry = |out: &mut Vec<u8>, field: &[&str], name: &str| {
        out.extend_from_slice(br#"\""#);
        field.iter().for_each(|part| escape_twice(out, part));
        out.extend_from_slice(br#"\":\""#);
        escape_twice(out, name);
        out.extend_from_slice(br#"\","#);
    };
    out.extend_from_slice(br#""{"#);
    for (field, name) in &trace.existing {
        entry(out, &[field], name);
    }
    for Edit { image, .. } in edits.iter().take(trace.added) {
        entry(out, &["spec.", image.list.field(), "{", &image.owner, "}"], &image.reference);
    }
    let left_out = edits.len() - trace.added;
    if left_out > 0 {
        entry(out, &[LEFT_OUT], &format!("{left_out} more"));
    }
    without_comma(out);
    out.extend_from_slice(br#"}""#);
}

/// Writes a text as it stands in a string of JSON that stands in a string of JSON. Hardly any needs an escape.
fn escape_twice(out: &mut Vec<u8>, text: &str) {
    if !text.bytes().any(|byte| matches!(byte, b'"' | b'\\' | ..b' ')) {
        return out.extend_from_slice(text.as_bytes());
    }
    let once = serde_json::Value::from(text).to_string();
    let twice = serde_json::Value::from(once).to_string();
    // Without the quotes of both.
    out.extend_from_slice(twice.get(3..twice.len() - 3).unwrap_or_default().as_bytes());
}

fn without_comma(out: &mut Vec<u8>) {
    if out.last() == Some(&b',') {
        out.pop();
    }
}

/// About how many bytes [`allow`] takes to write a mutation: the patch, and the same in base64 beside it.
fn room(mutation: &Mutation<'_>) -> usize {
    let edit = |edit: &Edit<'_>| 200 + edit.image.owner.len() + 2 * edit.image.reference.len();
    let edits: usize = mutation.edits.iter().map(edit).sum();
    let existing = mutation.trace.iter().flat_map(|trace| &trace.existing);
    let existing: usize = existing.map(|(field, name)| 10 + field.len() + name.len()).sum();
    (256 + edits + existing) * 7 / 3
}

/// Has `write` append to the buffer, and replaces what it appended by its base64, within the buffer.
fn in_base64(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    write(out);
    let end = out.len();
    out.resize(end + (end - start).div_ceil(3) * 4, 0);
    let (plain, encoded) = out.split_at_mut(end);
    // It cannot fail: there is just enough room.
    let written = STANDARD.encode_slice(plain.get(start..).unwrap_or_default(), encoded).unwrap_or_default();
    out.copy_within(end..end + written, start);
    out.truncate(start + written);
}

fn open(uid: &str, allowed: bool, room: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(256 + room);
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use serde_json::Value;

    use super::*;

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

    /// The same by another way: everything decoded by serde_json, then looked up.
    fn reference(body: &[u8]) -> Option<Request<'static>> {
        let review: Value = serde_json::from_slice(body).ok()?;
        let text = |value: &Value| value.as_str().map(|text| Cow::Owned(text.to_owned()));
        let object = |value: &Value| value.is_object().then_some(());
        let optional = |value: &Value| if value.is_null() { Some(None) } else { text(value).map(Some) };
        object(&review)?;
        let kind = review.get("kind").map_or(Some(Cow::default()), text)?;
        let api_version = review.get("apiVersion").map_or(Some(Cow::default()), text)?;
        let request = &review["request"];
        if request.is_null() || kind != "AdmissionReview" || api_version != "admission.k8s.io/v1" {
            return None;
        }
        object(request)?;
        object(&request["kind"])?;
        let pod = |pod: &Value| -> Option<Option<Pod<'static>>> {
            if pod.is_null() {
                return Some(None);
            }
            object(pod)?;
            let list =
                |value: &Value| if value.is_null() { Some(Vec::new()) } else { value.as_array().cloned() };
            let (metadata, spec) = (&pod["metadata"], &pod["spec"]);
            let annotations = &metadata["annotations"];
            for value in [metadata, spec, annotations] {
                (value.is_null() || value.is_object()).then_some(())?;
            }
            let mut pod = Pod::default();
            for (field, kind) in [
                ("containers", ImageList::Containers),
                ("initContainers", ImageList::InitContainers),
                ("ephemeralContainers", ImageList::EphemeralContainers),
                ("volumes", ImageList::Volumes),
            ] {
                for (index, member) in list(&spec[field])?.iter().enumerate() {
                    object(member)?;
                    let mut image = &member["image"];
                    if kind == ImageList::Volumes {
                        (image.is_null() || image.is_object()).then_some(())?;
                        image = &image["reference"];
                    }
                    let owner = optional(&member["name"])?.unwrap_or_default();
                    if let Some(reference) = optional(image)? {
                        pod.images.push(Image { list: kind, index, owner, reference });
                    }
                }
            }
            if !spec["imagePullSecrets"].is_null() {
                let names = list(&spec["imagePullSecrets"])?
                    .iter()
                    .map(|secret| {
                        object(secret)?;
                        optional(&secret["name"]).map(Option::unwrap_or_default)
                    })
                    .collect::<Option<_>>()?;
                pod.pull_secrets = Some(names);
            }
            if annotations.is_object() {
                pod.annotations = Some(Annotations {
                    mirror: optional(&annotations[MIRROR])?.is_some(),
                    original_images: optional(&annotations[ORIGINAL_IMAGES])?,
                });
            }
            Some(Some(pod))
        };
        let request = Request {
            uid: text(&request["uid"])?,
            operation: match request["operation"].as_str()? {
                "CREATE" => Operation::Create,
                "UPDATE" => Operation::Update,
                "DELETE" => Operation::Delete,
                "CONNECT" => Operation::Connect,
                _ => return None,
            },
            sub_resource: optional(&request["subResource"])?.unwrap_or_default(),
            namespace: optional(&request["namespace"])?.unwrap_or_default(),
            name: optional(&request["name"])?.unwrap_or_default(),
            object: pod(&request["object"])?,
            old_object: pod(&request["oldObject"])?,
            group: request["kind"].get("group").map_or(Some(Cow::default()), text)?,
            kind: text(&request["kind"]["kind"])?,
        };
        (request.kind == "Pod" && request.group.is_empty()).then_some(request)
    }

    /// The order of the text, as lists are read in any.
    fn sorted(mut request: Request<'_>) -> Request<'_> {
        for pod in [&mut request.object, &mut request.old_object].into_iter().flatten() {
            pod.images.sort_by_key(|image| (image.list as u8, image.index));
        }
        request
    }

    /// Any JSON, small.
    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[\\PC\"\\\\{}\\[\\]:,\n]{0,90}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..3).prop_map(Value::from),
                vec(("[\\PC\"\\\\{}]{0,12}|kind|name|image|spec", inner), 0..3)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// An object that has some of the fields, most of them as they should be, some not, and others besides, in any order.
    fn object(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
        let one = |(name, good): (&'static str, BoxedStrategy<Value>)| {
            let value =
                prop_oneof![100 => good.prop_map(Some), 1 => any_value().prop_map(Some), 5 => Just(None)];
            value.prop_map(move |value| value.map(|value| (name.to_owned(), value))).boxed()
        };
        let known: Vec<_> = fields.into_iter().map(one).collect();
        let others = vec(("\\PC{0,9}|status|env|managedFields", any_value()), 0..3);
        (known, others)
            .prop_map(|(known, others)| {
                others.into_iter().chain(known.into_iter().flatten()).collect::<Vec<_>>()
            })
            .prop_shuffle()
            .prop_map(|fields| Value::Object(fields.into_iter().collect()))
            .boxed()
    }

    fn text(pattern: &'static str) -> BoxedStrategy<Value> {
        pattern.prop_map(Value::from).boxed()
    }

    fn list(member: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
        vec(member, 0..3).prop_map(Value::from).boxed()
    }

    fn any_pod() -> BoxedStrategy<Value> {
        let (name, image) = (text("[a-z]{1,9}|\\PC{0,9}"), text("[a-z.:/@\"\\\\]{0,40}"));
        let container = object(vec![("name", name.clone()), ("image", image.clone())]);
        let volume = object(vec![("name", name.clone()), ("image", object(vec![("reference", image)]))]);
        let annotations = object(vec![(MIRROR, text("x")), (ORIGINAL_IMAGES, text("\\PC{0,9}"))]);
        let spec = object(vec![
            ("containers", list(container.clone())),
            ("initContainers", list(container.clone())),
            ("ephemeralContainers", list(container)),
            ("volumes", list(volume)),
            ("imagePullSecrets", list(object(vec![("name", name)]))),
        ]);
        let metadata = object(vec![("annotations", annotations)]);
        prop_oneof![9 => object(vec![("metadata", metadata), ("spec", spec)]), 1 => Just(Value::Null)].boxed()
    }

    fn any_review() -> BoxedStrategy<Value> {
        let operation = text("CREATE|UPDATE|DELETE|CONNECT");
        let request = object(vec![
            ("uid", text("[a-f0-9-]{36}")),
            ("kind", object(vec![("group", text("")), ("kind", text("Pod"))])),
            ("operation", operation),
            ("subResource", text("|ephemeralcontainers")),
            ("namespace", text("[a-z]{1,9}")),
            ("name", text("[a-z]{1,9}")),
            ("object", any_pod()),
            ("oldObject", any_pod()),
        ]);
        let review = vec![
            ("kind", text("AdmissionReview")),
            ("apiVersion", text("admission.k8s.io/v1")),
            ("request", request),
        ];
        object(review)
    }

    /// Writes JSON in one of the many ways to write it: white space, and characters as escapes.
    fn write(value: &Value, random: &mut impl FnMut(u32) -> bool) -> String {
        let text = |text: &str, random: &mut dyn FnMut(u32) -> bool| {
            let mut out = String::from('"');
            for char in text.chars() {
                if char < ' ' || matches!(char, '"' | '\\') || random(20) {
                    char.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out += &format!("\\u{unit:04x}"));
                } else {
                    out.push(char);
                }
            }
            out + "\""
        };
        let mut out = String::new();
        match value {
            Value::String(string) => out += &text(string, random),
            Value::Array(array) => {
                let members: Vec<_> = array.iter().map(|member| write(member, random)).collect();
                out += &format!("[{}]", members.join(","));
            }
            Value::Object(object) => {
                let fields: Vec<_> = object
                    .iter()
                    .map(|(name, value)| text(name, random) + ":" + &write(value, random))
                    .collect();
                out += &format!("{{{}}}", fields.join(","));
            }
            other => out += &other.to_string(),
        }
        if random(10) { format!(" {out}\n\t") } else { out }
    }

    fn written(value: &Value, seed: u64) -> String {
        let mut state = seed | 1;
        write(value, &mut |one_in| {
            // xorshift
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.is_multiple_of(u64::from(one_in))
        })
    }

    proptest! {
                #[test]
        fn whatever_is_json_is_read_as_serde_json_reads_it(review in any_review(), seed in any::<u64>()) {
            let body = written(&review, seed);
            let parsed = parse(body.as_bytes());
            let expected = reference(body.as_bytes()).map(sorted);
            prop_assert_eq!(parsed.as_ref().err().map(ToString::to_string).is_none(), expected.is_some(), "{:?}\n{}", parsed, body);
            prop_assert_eq!(parsed.ok().map(sorted), expected, "{}", body);
        }

        /// What is no JSON is refused, unless all that is wrong is in what was skipped, and then that has no effect.
        #[test]
        fn what_is_read_is_json_whatever_is_skipped(
            review in any_review(), seed in any::<u64>(),
            damage in vec((any::<proptest::sample::Index>(), any::<Option<u8>>()), 1..4),
        ) {
            let mut body = written(&review, seed).into_bytes();
            for (at, byte) in damage {
                if body.is_empty() { break }
                let at = at.index(body.len());
                match byte {
                    Some(byte) => body[at] = byte,
                    None => drop(body.remove(at)),
                }
            }
            let mut scanner = Scanner::new(&body);
            if let Ok(request) = super::review(&mut scanner) {
                let mut read = Vec::new();
                let mut end = 0;
                for span in std::mem::take(&mut scanner.skipped) {
                    read.extend_from_slice(&body[end..span.start]);
                    read.extend_from_slice(b"\"skipped\":null");
                    end = span.end;
                }
                read.extend_from_slice(&body[end..]);
                prop_assert_eq!(Some(sorted(request)), reference(&read).map(sorted), "{}", String::from_utf8_lossy(&read));
            }
        }
    }

    #[test]
    fn a_field_that_comes_twice_is_refused_or_the_first_counts() {
        let review = |pod: &str| {
            format!(
                r#"{{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{{"uid":"u","kind":{{"kind":"Pod"}},"operation":"CREATE","object":{pod}}}}}"#
            )
        };
        let twice = review(r#"{"spec":{"containers":[{"image":"a","image":"b"}]}}"#);
        let error = parse(twice.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("duplicate field `image`"), "{error}");
        let escaped = review(r#"{"spec":{"containers":[{"image":"a","\u0069mage":"b"}]}}"#);
        assert!(parse(escaped.as_bytes()).is_err());
        // Once all that matters of a container is known, the rest of it is not looked at.
        let late = review(r#"{"spec":{"containers":[{"name":"n","image":"a","image":"b"}]}}"#);
        assert_eq!(parse(late.as_bytes()).unwrap().object.unwrap().images[0].reference, "a");
    }

    #[test]
    fn texts_that_json_does_not_allow_are_refused_where_they_are_read() {
        for image in [&b"a\xffb"[..], b"a\nb", b"\\x", b"\\ud800", b"\\u00g0", b"a\\"] {
            let before = br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","kind":{"kind":"Pod"},"operation":"CREATE","object":{"spec":{"containers":[{"image":""#;
            let body = [before, image, br#""}]}}}}"#].concat();
            assert!(parse(&body).is_err(), "{}", String::from_utf8_lossy(image));
        }
    }

    /// An escape in an image name hides nothing.
    #[test]
    fn escapes_are_decoded() {
        let body = br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io\/v1","request":{"uid":"u","kind":{"kind":"P\u006fd"},"operation":"CREATE","object":{"spec":{"containers":[{"\u0069mage":"docker-ecr\u002eexample\u002eio\/app"}]}}}}"#;
        assert_eq!(parse(body).unwrap().object.unwrap().images[0].reference, "docker-ecr.example.io/app");
    }
}
