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
        let list = |value: &Value| if value.is_null() { Some(Vec::new()) } else { value.as_array().cloned() };
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
        let value = prop_oneof![100 => good.prop_map(Some), 1 => any_value().prop_map(Some), 5 => Just(None)];
        value.prop_map(move |value| value.map(|value| (name.to_owned(), value))).boxed()
    };
    let known: Vec<_> = fields.into_iter().map(one).collect();
    let others = vec(("\\PC{0,9}|status|env|managedFields", any_value()), 0..3);
    (known, others)
        .prop_map(|(known, others)| others.into_iter().chain(known.into_iter().flatten()).collect::<Vec<_>>())
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
            let fields: Vec<_> =
                object.iter().map(|(name, value)| text(name, random) + ":" + &write(value, random)).collect();
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
