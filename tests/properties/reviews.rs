//! AdmissionReviews: what is read of one, against `serde_json`'s own tree.

use ecr_cname::review;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Every image in the tree of a pod, as LIST, index and reference.
fn in_the_tree(pod: &Value) -> Vec<(String, usize, String)> {
    let mut found = Vec::new();
    for (list, path) in [
        ("containers", "/image"),
        ("initContainers", "/image"),
        ("ephemeralContainers", "/image"),
        ("volumes", "/image/reference"),
    ] {
        for (index, item) in pod["spec"][list].as_array().into_iter().flatten().enumerate() {
            if let Some(image) = item.pointer(path).and_then(Value::as_str) {
                found.push((list.to_owned(), index, image.to_owned()));
            }
        }
    }
    found.sort();
    found
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec(("\\PC{0,6}", inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// A container or volume, with fields that are not ours to know.
fn item() -> impl Strategy<Value = Value> {
    (proptest::option::of(any::<String>()), json_value(), any::<bool>()).prop_map(|(image, further, null)| {
        let mut item = json!({"name": "n", "further": further});
        match image {
            Some(image) => {
                item["image"] = json!(image);
            }
            None if null => item["image"] = Value::Null,
            None => {}
        }
        item
    })
}

fn volume() -> impl Strategy<Value = Value> {
    (proptest::option::of(any::<String>()), json_value())
        .prop_map(|(image, further)| json!({"name": "v", "image": {"reference": image}, "further": further}))
}

fn wrap(pod: &Value) -> Value {
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": {
        "uid": "u", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE", "object": pod}})
}

fn read(body: &[u8]) -> Option<Vec<(String, usize, String)>> {
    let request = review::parse(body).ok()?;
    let images = request.object.iter().flat_map(|pod| pod.images.iter());
    let mut images: Vec<_> =
        images.map(|i| (i.list.field().to_owned(), i.index, i.reference.clone().into_owned())).collect();
    images.sort();
    Some(images)
}

proptest! {
    #[test]
    fn are_read_as_serde_json_reads_them(
        containers in proptest::collection::vec(item(), 0..4), init in proptest::collection::vec(item(), 0..3),
        volumes in proptest::collection::vec(volume(), 0..3), further in json_value(), pretty in any::<bool>(),
    ) {
        let pod = json!({"metadata": {"name": "p", "further": further}, "spec": {
            "containers": containers, "initContainers": init, "volumes": volumes, "further": further}});
        let review = wrap(&pod);
        let body = if pretty { serde_json::to_vec_pretty(&review) } else { serde_json::to_vec(&review) }.unwrap();
        prop_assert_eq!(read(&body), Some(in_the_tree(&pod)));
    }

    /// What we read is there.
    #[test]
    fn that_are_damaged_are_refused_or_read_as_they_are(
        containers in proptest::collection::vec(item(), 1..3), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        insert in any::<bool>(),
    ) {
        let mut body = serde_json::to_vec(&wrap(&json!({"spec": {"containers": containers}}))).unwrap();
        let at = at.index(body.len());
        if insert { body.insert(at, byte) } else { body[at] = byte }
        // The text of fields that are skipped is not looked at, so that it may be no UTF-8; whoever reads it would refuse it.
        if let (Some(images), Ok(tree)) = (read(&body), serde_json::from_slice::<Value>(&body)) {
            prop_assert_eq!(images, in_the_tree(&tree["request"]["object"]));
        }
    }

    #[test]
    fn of_any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(review::parse(&bytes).is_err());
    }
}

#[test]
fn of_the_corpus() {
    for (name, body) in crate::corpus("reviews") {
        let (Some(images), Ok(tree)) = (read(&body), serde_json::from_slice::<Value>(&body)) else {
            continue;
        };
        assert_eq!(images, in_the_tree(&tree["request"]["object"]), "{name}");
    }
}
