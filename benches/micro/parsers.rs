//! What the decision needs, read by parsers that others wrote. Each returns the number of images.

use std::borrow::Cow;

use serde::Deserialize;
use sonic_rs::{JsonValueTrait as _, pointer};

#[derive(Deserialize)]
struct Review<'a> {
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    #[serde(borrow)]
    #[allow(dead_code)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    object: Option<Pod<'a>>,
    #[serde(borrow, default)]
    #[allow(dead_code)]
    old_object: Option<Pod<'a>>,
}

#[derive(Deserialize)]
struct Pod<'a> {
    #[serde(borrow)]
    spec: Spec<'a>,
}

#[derive(Deserialize)]
struct Spec<'a> {
    #[serde(borrow)]
    containers: Vec<Container<'a>>,
}

#[derive(Deserialize)]
struct Container<'a> {
    #[serde(borrow)]
    #[allow(dead_code)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    #[allow(dead_code)]
    image: Cow<'a, str>,
}

fn images(review: &Review<'_>) -> usize {
    review.request.object.as_ref().map_or(0, |pod| pod.spec.containers.len())
}

pub fn serde_json(body: &[u8]) -> usize {
    images(&serde_json::from_slice(body).unwrap())
}

pub fn sonic_rs(body: &[u8]) -> usize {
    images(&sonic_rs::from_slice(body).unwrap())
}

pub fn simd_json(body: &mut [u8]) -> usize {
    images(&simd_json::from_slice(body).unwrap())
}

/// Only the new object, by look-ups that check what they pass over.
pub fn sonic_rs_lazy(body: &[u8]) -> usize {
    let containers = sonic_rs::get(body, pointer!["request", "object", "spec", "containers"]).unwrap();
    let has_both = |container: &str| {
        let fields = sonic_rs::to_object_iter(container).map(Result::unwrap);
        let wanted = fields.filter(|(name, _)| name == "name" || name == "image");
        wanted.filter(|(_, value)| value.as_str().is_some()).count() == 2
    };
    sonic_rs::to_array_iter(containers.as_raw_str())
        .filter(|c| has_both(c.as_ref().unwrap().as_raw_str()))
        .count()
}
