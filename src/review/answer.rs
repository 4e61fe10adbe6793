//! The answer to an AdmissionReview: written straight into one buffer, its patch with it.

use std::io::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;

use super::ORIGINAL_IMAGES;
use crate::{
    json,
    mutate::{Edit, ImageList, LEFT_OUT, Mutation, Trace},
};

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
        write_json(&mut out, warning);
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
    write_json(&mut out, message);
    out.extend_from_slice(b"}}}");
    out
}

/// Writes the JSON Patch (RFC 6902) of a mutation: the smallest paths, addressed by index.
fn patch(out: &mut Vec<u8>, mutation: &Mutation<'_>) {
    out.push(b'[');
    for edit in &mutation.edits {
        out.extend_from_slice(br#"{"op":"replace","path":"/spec/"#);
        out.extend_from_slice(edit.image.list.field().as_bytes());
        out.push(b'/');
        write_json(out, &edit.image.index);
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
        let (path, end): (&[u8], &[u8]) = if secret.list_exists {
            (br#"/-","value":{"name":"#, b"}},")
        } else {
            (br#"","value":[{"name":"#, b"}]},")
        };
        out.extend_from_slice(br#"{"op":"add","path":"/spec/imagePullSecrets"#);
        out.extend_from_slice(path);
        write_json(out, secret.name);
        out.extend_from_slice(end);
    }
    if let Some(trace) = &mutation.trace {
        if trace.annotations_exist {
            out.extend_from_slice(
                br#"{"op":"add","path":"/metadata/annotations/ecr-cname.dev~1original-images","value":"#,
            );
            original_images(out, trace, &mutation.edits);
        } else {
            out.extend_from_slice(br#"{"op":"add","path":"/metadata/annotations","value":{""#);
            out.extend_from_slice(ORIGINAL_IMAGES.as_bytes());
            out.extend_from_slice(br#"":"#);
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
    out.extend_from_slice(br#""{"#);
    for (field, name) in &trace.existing {
        out.extend_from_slice(br#"\""#);
        escape_twice(out, field);
        out.extend_from_slice(br#"\":\""#);
        escape_twice(out, name);
        out.extend_from_slice(br#"\","#);
    }
    for Edit { image, .. } in edits.iter().take(trace.added) {
        out.extend_from_slice(br#"\"spec."#);
        out.extend_from_slice(image.list.field().as_bytes());
        out.push(b'{');
        escape_twice(out, &image.owner);
        out.extend_from_slice(br#"}\":\""#);
        // What was rewritten is of the image grammar, which knows nothing to escape.
        out.extend_from_slice(image.reference.as_bytes());
        out.extend_from_slice(br#"\","#);
    }
    let left_out = edits.len() - trace.added;
    if left_out > 0 {
        // Writing to a Vec cannot fail.
        let _ = write!(out, r#"\"{LEFT_OUT}\":\"{left_out} more\","#);
    }
    without_comma(out);
    out.extend_from_slice(br#"}""#);
}

/// Writes a text as it stands in a string of JSON that stands in a string of JSON. Hardly any needs an escape.
fn escape_twice(out: &mut Vec<u8>, text: &str) {
    if json::is_plain(text) {
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
    write_json(&mut out, uid);
    out.extend_from_slice(if allowed { br#","allowed":true"# } else { br#","allowed":false"# });
    out
}

/// Writes a string or a number.
fn write_json(out: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    // It cannot fail: it is no map, and a Vec takes it all.
    let _ = serde_json::to_writer(out, value);
}
