//! Tables of before and after, and properties over generated manifests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::json;

use super::*;

const ECR: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

/// `acme/…` becomes `ECR/…`.
fn to_ecr(image: &str) -> Option<String> {
    image.strip_prefix("acme/").map(|rest| format!("{ECR}/{rest}"))
}

fn renamed(text: &str) -> String {
    rewrite(text, to_ecr).unwrap_or_else(|error| panic!("{error}\n{text}")).text
}

fn error(text: &str) -> String {
    rewrite(text, to_ecr).map_or_else(|error| error.to_string(), |it| panic!("no error:\n{}", it.text))
}

/// The kinds' paths once more, as data of the test's own.
fn paths(version: &str, kind: &str) -> Option<&'static str> {
    Some(match (version, kind) {
        ("v1", "Pod") => "",
        ("v1", "PodTemplate") => "/template",
        ("v1", "ReplicationController") | ("batch/v1", "Job") => "/spec/template",
        (
            "apps/v1" | "apps/v1beta1" | "apps/v1beta2" | "extensions/v1beta1",
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet",
        ) => "/spec/template",
        ("batch/v1" | "batch/v1beta1", "CronJob") => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

/// What `rewrite` should do to the content, independently of it.
fn expected(value: &mut Value) -> usize {
    let (version, kind) = (value["apiVersion"].as_str(), value["kind"].as_str());
    let (Some(version), Some(kind)) = (version, kind) else { return 0 };
    let path = paths(version, kind);
    if kind.ends_with("List") {
        return value["items"].as_array_mut().into_iter().flatten().map(expected).sum();
    }
    let Some(pod) = path.and_then(|path| value.pointer_mut(path)) else { return 0 };
    if pod["metadata"]["labels"]["ecr-cname.dev/rewrite"] == "disabled"
        || pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some()
    {
        return 0;
    }
    let mut count = 0;
    for list in ["containers", "initContainers", "ephemeralContainers", "volumes"] {
        let Some(items) = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut) else {
            continue;
        };
        for item in items {
            let image = item.pointer_mut(if list == "volumes" { "/image/reference" } else { "/image" });
            if let Some(image) = image
                && let Some(new) = image.as_str().and_then(to_ecr)
            {
                *image = Value::String(new);
                count += 1;
            }
        }
    }
    count
}

fn values(text: &str) -> Vec<Value> {
    let documents = documents(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    documents.into_iter().map(|document| document.value).collect()
}

/// The text as libyaml, and so as another parser than ours, reads it.
fn libyaml(text: &str) -> Vec<Value> {
    let values = serde_yaml_ng::Deserializer::from_str(text).map(|document| {
        let mut value = <serde_yaml_ng::Value as serde::Deserialize>::deserialize(document).expect(text);
        value.apply_merge().expect(text);
        serde_json::to_value(value).expect(text)
    });
    values.collect()
}

/// A pod's text with `body`, in which `ECR` may be written for the host, as its containers.
fn pod(body: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nspec:\n  containers:\n{body}").replace("ECR", ECR)
}

#[test]
fn renames_in_place() {
    let cases = [
        // Plain, quoted, with comments and odd spaces.
        ("  - image: acme/a:1 # why\n", "  - image: ECR/a:1 # why\n"),
        ("  - image:   'acme/a:1'   \n", "  - image:   'ECR/a:1'   \n"),
        ("  - \"image\" : \"acme/a\\x3a1\"\n", "  - \"image\" : \"ECR/a:1\"\n"),
        ("  - image: \"acme\\/a\\u003a1\"", "  - image: \"ECR/a:1\""),
        ("  - ? image\n    : acme/a\n", "  - ? image\n    : ECR/a\n"),
        ("  - {name: a, image: acme/a, x: [1,2]}\n", "  - {name: a, image: ECR/a, x: [1,2]}\n"),
        ("  - {\"image\":acme/a}\n", "  - {\"image\":ECR/a}\n"),
        ("   [ {image: acme/a:1} , ]\n", "   [ {image: ECR/a:1} , ]\n"),
        ("  - image: !!str acme/a\n", "  - image: !!str ECR/a\n"),
        ("  - image: &i acme/a\n", "  - image: &i ECR/a\n"),
        ("  - image: &i !!str 'acme/a'\n", "  - image: &i !!str 'ECR/a'\n"),
        ("  - image:\n\n      acme/a\n    name: é\n", "  - image:\n\n      ECR/a\n    name: é\n"),
        // Block scalars.
        ("  - image: |-\n      acme/a\n    name: b\n", "  - image: ECR/a\n    name: b\n"),
        ("  - image: >- # c\n      acme/a\n\n\n# d\n", "  - image: ECR/a # c\n\n\n# d\n"),
        (
            "  - image: &a|b |-2\n\n\n      acme/a\n    m: 1\n",
            "  - image: &a|b |-2\n\n\n      acme/a\n    m: 1\n",
        ),
        ("  - image: &a|b >2-\n      acme/a\n", "  - image: &a|b ECR/a\n"),
        ("  - image: !!str |-\n        acme/a\n  # c |-\n", "  - image: !!str ECR/a\n  # c |-\n"),
        ("  - image: |-\n\n      acme/a\n", "  - image: |-\n\n      acme/a\n"),
        ("  - image: |-\n     acme/b\u{a0}\n", "  - image: \"ECR/b\\u00a0\"\n"),
        ("  - name: |\n     x\n    image: |-\n     acme/a", "  - name: |\n     x\n    image: ECR/a"),
        // Not strings, or not there.
        (
            "  - image: null\n  - image:\n  - image: 1\n  - {}\n",
            "  - image: null\n  - image:\n  - image: 1\n  - {}\n",
        ),
        ("  - [image, acme/a]\n  - acme/a\n", "  - [image, acme/a]\n  - acme/a\n"),
        ("  - env: [{value: acme/a}]\n", "  - env: [{value: acme/a}]\n"),
        // Aliases where the image is shared with images only.
        ("  - image: &i acme/a\n  - image: *i\n", "  - image: &i ECR/a\n  - image: *i\n"),
        (
            "    &c\n  - image: acme/a\n  initContainers: *c\n",
            "    &c\n  - image: ECR/a\n  initContainers: *c\n",
        ),
        (
            "  - &b\n    image: acme/a\n  - <<: *b\n    m: 1\n",
            "  - &b\n    image: ECR/a\n  - <<: *b\n    m: 1\n",
        ),
        // … and where it is shared with something else.
        (
            "  - env: [&i acme/a]\n    image: *i\n  - image: *i\n",
            "  - env: [&i acme/a]\n    image: ECR/a\n  - image: ECR/a\n",
        ),
        ("  - image: &i acme/a\n    args: [*i , x]\n", "  - image: &i ECR/a\n    args: [acme/a , x]\n"),
        (
            "  - image: acme/b\n    x: &b {image: acme/a}\n  - <<: *b # c\n    m: 1\n",
            "  - image: ECR/b\n    x: &b {image: acme/a}\n  - <<: *b # c\n    image: ECR/a\n    m: 1\n",
        ),
        (
            "  - x: &b {image: acme/a}\n  - <<:\n    - *b\n    - m: 1\n  - {<<: [*b]}",
            "  - x: &b {image: acme/a}\n  - <<:\n    - *b\n    - m: 1\n    image: ECR/a\n  - {<<: [*b], image: ECR/a}",
        ),
        (
            "  - &b {image: acme/a}\n  - x:\n      <<: *b",
            "  - &b {image: ECR/a}\n  - x:\n      <<: *b\n      image: acme/a",
        ),
        (
            "  - x: [&i acme/a, &b {image: *i }]\n  - &c\n    <<: *b\n  - <<: *c\n",
            "  - x: [&i acme/a, &b {image: *i }]\n  - &c\n    <<: *b\n    image: ECR/a\n  - <<: *c\n",
        ),
        (
            "  - x: &b {image: acme/a}\n  - <<: *b\n    image: acme/c\n",
            "  - x: &b {image: acme/a}\n  - <<: *b\n    image: ECR/c\n",
        ),
        ("  - <<: {image: acme/a}\n", "  - <<: {image: ECR/a}\n"),
        ("  - \"<<\": {image: acme/a}\n", "  - \"<<\": {image: acme/a}\n"),
        ("  - !!str <<: {image: acme/a}\n", "  - !!str <<: {image: acme/a}\n"),
    ];
    for (before, after) in cases {
        for line_end in ["\n", "\r\n"] {
            let (before, after) = (pod(before).replace('\n', line_end), pod(after).replace('\n', line_end));
            assert_eq!(renamed(&before), after);
            assert_eq!(renamed(&format!("\u{feff}# é\n{before}")), format!("\u{feff}# é\n{after}"));
            // What libyaml makes of it (these it reads in another way).
            if !["|b", "!!str", "\"<<\"", "<<: *c"].iter().any(|text| before.contains(text)) {
                assert_eq!(libyaml(&after), values(&after));
            }
        }
    }
}

#[test]
fn finds_images_by_kind() {
    let spec = |image: &str| {
        let name = json!({"image": image});
        json!({"containers": [name, {}], "initContainers": [name], "ephemeralContainers": [name],
                "volumes": [{"image": {"reference": image}}, {"configMap": {"image": image}}],
                "nodeSelector": {"image": image}, "image": image})
    };
    let pod = json!({"spec": spec("acme/a")});
    let cases = [
        ("v1", "Pod", pod.clone(), 4),
        ("v1", "PodTemplate", json!({"template": pod}), 4),
        ("v1", "ReplicationController", json!({"spec": {"template": pod}}), 4),
        ("apps/v1", "Deployment", json!({"spec": {"template": pod}}), 4),
        ("apps/v1beta1", "StatefulSet", json!({"spec": {"template": pod}}), 4),
        ("apps/v1beta2", "DaemonSet", json!({"spec": {"template": pod}}), 4),
        ("extensions/v1beta1", "ReplicaSet", json!({"spec": {"template": pod}}), 4),
        ("batch/v1", "Job", json!({"spec": {"template": pod}}), 4),
        ("batch/v1", "CronJob", json!({"spec": {"jobTemplate": {"spec": {"template": pod}}}}), 4),
        ("batch/v1beta1", "CronJob", json!({"spec": {"jobTemplate": {"spec": {"template": pod}}}}), 4),
        ("batch/v1beta1", "Job", json!({"spec": {"template": pod}}), 0),
        ("v2", "Pod", pod.clone(), 0),
        ("example.com/v1", "Deployment", json!({"spec": {"template": pod}}), 0),
        ("v1", "ConfigMap", json!({"data": {"pod.yaml": pod.to_string()}, "spec": pod["spec"]}), 0),
    ];
    for (version, kind, mut object, count) in cases {
        object["apiVersion"] = version.into();
        object["kind"] = kind.into();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": [{"kind": "List", "apiVersion": "v1", "items": [object]}]});
        for mut object in [object.clone(), list] {
            let text = serde_yaml_ng::to_string(&object).unwrap();
            let rewritten = rewrite(&text, to_ecr).unwrap();
            assert_eq!(rewritten.changes.len(), count, "{text}");
            for change in &rewritten.changes {
                let pointer = change.path.replace(['.', '['], "/").replace(']', "");
                assert_eq!(object.pointer(&format!("/{pointer}")), Some(&json!("acme/a")), "{}", change.path);
                *object.pointer_mut(&format!("/{pointer}")).unwrap() = json!(format!("{ECR}/a"));
            }
            assert_eq!(values(&rewritten.text), [object]);
        }
    }
}

#[test]
fn takes_the_kind_of_items_from_a_typed_list() {
    let text =
        r#"{"kind":"PodList","apiVersion":"v1","items":[{"spec":{"containers":[{"image":"acme/a"}]}}]}"#;
    let rewritten = rewrite(text, to_ecr).unwrap();
    let old = "acme/a".to_owned();
    let path = "items[0].spec.containers[0].image".to_owned();
    assert_eq!(rewritten.changes, [Change { document: 1, path, old, new: format!("{ECR}/a") }]);
    assert_eq!(rewritten.text, text.replace("acme", ECR));
}

#[test]
fn leaves_alone_what_the_webhook_leaves_alone() {
    let cases = [
        ("labels: {ecr-cname.dev/rewrite: disabled}", 0),
        ("labels: {ecr-cname.dev/rewrite: enabled}", 1),
        ("annotations: {kubernetes.io/config.mirror: x}", 0),
        ("annotations: {ecr-cname.dev/rewrite: disabled}", 1),
    ];
    for (metadata, count) in cases {
        let pod = format!("metadata:\n  {metadata}\nspec: {{containers: [{{image: acme/a}}]}}");
        let text = format!("apiVersion: v1\nkind: Pod\n{pod}\n");
        assert_eq!(rewrite(&text, to_ecr).unwrap().changes.len(), count, "{text}");
        let pod = pod.replace('\n', "\n  ");
        let text =
            format!("apiVersion: v1\nkind: PodTemplate\nmetadata:\n  {metadata}\ntemplate:\n  {pod}\n");
        assert_eq!(rewrite(&text, to_ecr).unwrap().changes.len(), count, "{text}");
    }
}

#[test]
fn reads_streams_of_documents() {
    let json = r#"{"apiVersion":"v1","kind":"Pod","spec":{"containers":[{"image":"acme/a"}]}}"#;
    let yaml = "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - image: acme/a\n";
    let streams = [
        (format!("%YAML 1.1\n---\n{yaml}...\n# x\n---\n---\n# y\n--- # z\n{yaml}"), vec![1, 4]),
        (format!("# x\n\n---\n{yaml}---\n{json}\n---\n"), vec![1, 2]),
        (format!("{json}\n---\n{yaml}"), vec![1, 2]),
        (format!("{json}{json}\r\n{json} \n"), vec![1, 2, 3]),
        (format!("\u{feff}\n[1]\n{{}} [{json}]{json}"), vec![4]),
        (yaml.replace('\n', "\r"), vec![1]),
        (json.replace(':', "\t:\n\t"), vec![1]),
        (format!("---\n- {json}\n"), vec![]),
    ];
    for (text, numbers) in streams {
        let rewritten = match rewrite(&text, to_ecr) {
            Ok(rewritten) => rewritten,
            Err(error) => panic!("{error}\n{text}"),
        };
        assert_eq!(
            rewritten.changes.iter().map(|change| change.document).collect::<Vec<_>>(),
            numbers,
            "{text}"
        );
        if numbers.len() == text.matches("acme").count() {
            assert_eq!(rewritten.text, text.replace("acme", ECR));
        }
    }
    let positions = |text| -> Vec<_> {
        documents(text)
            .unwrap()
            .into_iter()
            .map(|document| (document.line, document.column, document.value))
            .collect()
    };
    assert_eq!(
        positions("# é\n--- a\n---\n\n  é: ü # é\n--- \n"),
        [(2, 5, json!("a")), (5, 3, json!({"é": "ü"})), (6, 4, json!(null))]
    );
    assert_eq!(
        positions("{\"é\":\r\n1} [] {}"),
        [(1, 1, json!({"é": 1})), (2, 4, json!([])), (2, 7, json!({}))]
    );
    assert_eq!(positions(""), []);
    assert_eq!(error("{\"é\":1}{\"a\":1,\n\"a\":2}"), "2:1: the key \"a\" is there twice");
    assert_eq!(error("{\"é\":1} {\"a\":1,\"a\":2}"), "1:16: the key \"a\" is there twice");
}

#[test]
fn types_scalars_as_kubectl_does() {
    let cases = [
        ("", json!(null)),
        ("~", json!(null)),
        ("NULL", json!(null)),
        ("nuLL", json!("nuLL")),
        ("true", json!(true)),
        ("off", json!(false)),
        ("oN", json!("oN")),
        ("12", json!(12)),
        ("-1_000", json!(-1000)),
        ("+0x1F", json!(31)),
        ("0o17", json!(15)),
        ("017", json!(15)),
        ("08", json!(8.0)),
        ("-0b11", json!(-3)),
        ("18446744073709551615", json!(u64::MAX)),
        ("-9223372036854775808", json!(i64::MIN)),
        ("18446744073709551616", json!(18446744073709551616.0)),
        ("1e3", json!(1000.0)),
        ("-1.5E-1", json!(-0.15)),
        (".5", json!(0.5)),
        ("5.", json!(5.0)),
        (".", json!(".")),
        ("+", json!("+")),
        ("1e", json!("1e")),
        ("e1", json!("e1")),
        ("0x", json!("0x")),
        ("0x+1", json!("0x+1")),
        ("1.2.3", json!("1.2.3")),
        (".inf", json!(".inf")),
        ("inf", json!("inf")),
        ("2001-01-01", json!("2001-01-01")),
        ("1:30", json!("1:30")),
        ("'1'", json!("1")),
        ("\"true\"", json!("true")),
        ("!!str 1", json!("1")),
        ("!x 1", json!("1")),
        ("!!int '1'", json!(1)),
        ("!!bool \"yes\"", json!(true)),
        ("!!null ''", json!(null)),
        ("! 1", json!("1")),
        ("|\n  1", json!("1\n")),
    ];
    for (text, value) in cases {
        assert_eq!(values(&format!("- {text}\n")), [json!([value])], "{text}");
    }
    assert_eq!(
        values("{1: a, true: b, 0x10: c, '': d}"),
        [json!({"1": "a", "true": "b", "16": "c", "": "d"})]
    );
}

#[test]
fn explains_what_it_cannot_do() {
    let shared = "this is used both as an image to rename and for something else: expand the anchor first";
    let moved = "`<<` overrides the key \"image\" for some readers only: move `<<` to the front";
    let cases = [
        ("a: 1\nb: 2\na: 3\n".to_owned(), "3:1: the key \"a\" is there twice".to_owned()),
        ("é: {b: 1, 'b': 2}".to_owned(), "1:11: the key \"b\" is there twice".to_owned()),
        ("&a x: 1\n*a : 2".to_owned(), "2:1: the key \"x\" is there twice".to_owned()),
        ("a: &a {}\nb: {<<: *a, <<: *a}".to_owned(), "2:13: the key \"<<\" is there twice".to_owned()),
        (
            "{{ .Values.image }}".to_owned(),
            "1:2: a mapping key has to be a string, number or boolean".to_owned(),
        ),
        ("~: 1".to_owned(), "1:1: a mapping key has to be a string, number or boolean".to_owned()),
        ("&a [b, *a ]".to_owned(), "1:8: an alias inside of what it stands for".to_owned()),
        ("<<: 1".to_owned(), "1:5: only mappings can be merged by `<<`".to_owned()),
        ("[".repeat(150) + &"]".repeat(150), "1:101: nested too deeply".to_owned()),
        ("a: [&x {image: b}, {image: c, <<: *x }]".to_owned(), format!("1:35: {moved}")),
        (pod("  - &b {image: acme/a}\n  - *b\n  - x: *b\n"), format!("5:16: {shared}")),
        (pod("  - args: &b [{image: acme/a}]\n  initContainers: *b\n"), format!("5:23: {shared}")),
    ];
    for (text, message) in cases {
        assert_eq!(error(&text), message, "{text}");
    }
    // Kept when the same, whatever the order.
    assert_eq!(values("[&x {a: b}, {a: b, <<: *x }]"), [json!([{"a": "b"}, {"a": "b"}])]);
    // `<<` after the key: equal before, but not afterwards.
    let late = pod("  - x: &b {image: acme/a}\n  - image: acme/a\n    <<: *b\n");
    assert_eq!(
        error(&late),
        "1:1: the images of this document cannot be renamed in place: expand its anchors first"
    );
    assert!(error(r#"["\ud800"]"#).starts_with("1:2: "));
    let unknown = error("a: *b");
    assert!(unknown.starts_with("1:4: "), "{unknown}");
}

#[test]
fn bounds_aliases_and_depth() {
    let mut lists = "a0: &a0 [x]\n".to_owned();
    let mut merges = "a0: &a0 {x: 1}\n".to_owned();
    let mut nested = "a0: &a0 {x: 1}\n".to_owned();
    for level in 1..60 {
        let up = level - 1;
        lists += &format!("a{level}: &a{level} [{}]\n", vec![format!("*a{up} "); 9].join(","));
        merges += &format!("a{level}: &a{level} {{<<: [*a{up} ,*a{up} ,*a{up} ]}}\n");
        nested += &format!("a{level}: &a{level} {{y: {{y: {{y: *a{up} }}}}}}\n");
    }
    for text in [lists, merges] {
        assert!(error(&text).ends_with("the document's aliases repeat too much"));
    }
    assert!(error(&nested).ends_with("nested too deeply"));
    for bomb in [
        "[", "{a: ", "- ", "? ", "a: &x [", "&a ", "!t ", "'", "- - -\n", "*", "%", "{\"a\":[", "|", "#",
        "\t", "---\n",
    ] {
        for text in [bomb.repeat(20_000), format!("a:\n {}", bomb.repeat(5_000))] {
            let _ = rewrite(&text, to_ecr);
        }
    }
}

#[test]
fn writes_any_name_in_any_style() {
    let names = [
        "host/a:1",
        "a b",
        "x: y",
        "#x",
        "'",
        "\"\\",
        "é\u{85}\u{7f}\u{0}\u{feff}😀\n",
        "",
        "true",
        "1",
        "1.5",
        "a:",
        "-",
        "y",
    ];
    for quote in ["", "'", "\""] {
        for name in names {
            for text in [
                pod(&format!("  - image: {quote}acme/a{quote} # x\n")),
                pod(&format!("  - {{image: {quote}acme/a{quote}}}")),
                pod("  - image: |-\n     acme/a\n    name: x"),
                pod("  - name: &x acme/a\n    image: *x"),
            ] {
                let after = rewrite(&text, |_| Some(name.to_owned())).unwrap().text;
                assert_eq!(values(&after)[0]["spec"]["containers"][0]["image"], name, "{after}");
                if !name.contains('\u{0}') {
                    assert_eq!(libyaml(&after)[0]["spec"]["containers"][0]["image"], name, "{after}");
                }
            }
        }
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    // libyaml's emitter does not quote `<<`.
    let text = prop_oneof![
        ".*",
        vec(any::<char>(), 0..4).prop_map(String::from_iter),
        "[a-z:#,\\[\\]{}&*!|>'\"%@` ]{0,6}"
    ]
    .prop_filter("a merge key", |text| text != "<<");
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1_000_000i32..1_000_000).prop_map(|n| Value::from(f64::from(n) / 64.0)),
        text.clone().prop_map(Value::from),
        image().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 5, move |inner| {
        let key = prop_oneof![text.clone(), Just("image".to_owned()), Just("containers".to_owned())];
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((key, inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// JSON without the characters that YAML does not allow.
fn escaped(json: &str) -> String {
    let escape = |c: char| {
        if matches!(c, '\u{7f}'..='\u{ffff}') { format!("\\u{:04x}", u32::from(c)) } else { c.into() }
    };
    json.chars().map(escape).collect()
}

fn image() -> impl Strategy<Value = String> {
    select(vec!["acme/a", "acme/b:1", "acme/c@sha256:0", "other/a", "busybox", ""]).prop_map(str::to_owned)
}

fn object() -> impl Strategy<Value = Value> {
    let container = (image(), json_value(), 0..8)
        .prop_map(|(image, other, choice)| match choice {
            0 => json!({"image": other}),
            1 => json!({"name": other}),
            2 => json!({"env": [{"value": image}], "image": image}),
            _ => json!({"name": other, "image": image, "x": 1}),
        })
        .boxed();
    let volume = (image(), 0..3).prop_map(|(image, choice)| match choice {
        0 => json!({"image": image}),
        _ => json!({"name": "v", "image": {"reference": image, "pullPolicy": "Always"}}),
    });
    let metadata = select(vec![
        json!({}),
        json!({"labels": {"ecr-cname.dev/rewrite": "disabled"}}),
        json!({"annotations": {"kubernetes.io/config.mirror": ""}}),
        json!({"labels": {"a": "acme/a"}}),
        Value::Null,
    ]);
    let pod = (metadata, vec(container.clone(), 0..3), vec(container, 0..2), vec(volume, 0..2), json_value())
        .prop_map(|(metadata, containers, others, volumes, x)| {
            json!({"metadata": metadata, "spec": {
                    "containers": containers, "initContainers": others, "ephemeralContainers": others,
                    "volumes": volumes, "x": x, "y": containers}})
        });
    let kinds = vec![
        ("v1", "Pod"),
        ("v1", "PodTemplate"),
        ("apps/v1", "Deployment"),
        ("extensions/v1beta1", "DaemonSet"),
        ("batch/v1", "CronJob"),
        ("v1", "ConfigMap"),
        ("v1", "Deployment"),
    ];
    let object = (pod, select(kinds)).prop_map(|(pod, (version, kind))| {
        let path = paths(version, kind).unwrap_or("/spec");
        let mut object =
            path.rsplit('/').filter(|key| !key.is_empty()).fold(pod, |inner, key| json!({key: inner}));
        object["apiVersion"] = version.into();
        object["kind"] = kind.into();
        object
    });
    object.prop_recursive(2, 4, 3, |inner| {
        vec(inner, 0..3).prop_map(|items| json!({"apiVersion": "v1", "kind": "List", "items": items}))
    })
}

/// Writes YAML in many ways, each decided by the next of `choices`; equal texts may share an anchor, equal mappings
/// may be merged.
struct Writer<'c> {
    choices: std::iter::Cycle<std::slice::Iter<'c, u8>>,
    anchors: Vec<(Value, String)>,
    text: String,
}

impl Writer<'_> {
    fn choose(&mut self, of: u8) -> u8 {
        self.choices.next().map_or(0, |choice| choice % of)
    }

    fn write(&mut self, value: &Value, indent: usize, flow: bool) {
        let known = self.anchors.iter().find(|(known, _)| known == value).map(|(_, anchor)| anchor.clone());
        match (known, self.choose(4)) {
            (Some(anchor), 0 | 1) => return self.text += &format!(" *{anchor} "),
            (Some(anchor), 2) if value.is_object() => return self.merge(&anchor, value, indent, flow),
            _ => self.text.push(' '),
        }
        if self.choose(3) == 0 {
            let anchor = format!("a{}", self.anchors.len());
            self.text += &format!("&{anchor} ");
            self.anchors.push((value.clone(), anchor));
        }
        let flow = flow || self.choose(8) == 0;
        match value {
            Value::Object(map) if !flow && !map.is_empty() => {
                for (key, value) in map {
                    self.line(indent);
                    self.text += &format!("{}:", literal(key, ScalarStyle::Plain));
                    self.write(value, indent + 2, false);
                }
            }
            Value::Array(items) if !flow && !items.is_empty() => {
                for item in items {
                    self.line(indent);
                    self.text.push('-');
                    self.write(item, indent + 2, false);
                }
            }
            Value::Object(map) => {
                self.text.push('{');
                for (key, value) in map {
                    self.text += &format!("{}:", literal(key, ScalarStyle::SingleQuoted));
                    self.write(value, indent, true);
                    self.text.push(',');
                }
                self.text.push('}');
            }
            Value::Array(items) => {
                self.text.push('[');
                for item in items {
                    self.write(item, indent, true);
                    self.text.push(',');
                }
                self.text.push(']');
            }
            Value::String(text) => {
                let visible = text.bytes().all(|byte| byte.is_ascii_graphic()) && !text.is_empty();
                match self.choose(4) {
                    0 if visible && !flow => {
                        let header = self.choose(3);
                        self.text += ["|-", ">-", "|- # |-"][usize::from(header)];
                        self.line(indent + 1);
                        self.text += text;
                    }
                    1 => self.text += &literal(text, ScalarStyle::SingleQuoted),
                    2 => self.text += &literal(text, ScalarStyle::DoubleQuoted),
                    _ => self.text += &literal(text, ScalarStyle::Plain),
                }
            }
            other => self.text += &other.to_string(),
        }
    }

    /// Writes a merge of an equal mapping, and some of the keys again.
    fn merge(&mut self, anchor: &str, value: &Value, indent: usize, flow: bool) {
        if flow {
            return self.text += &format!(" {{<<: *{anchor} }}");
        }
        self.line(indent);
        self.text += &format!("<<: *{anchor} # merged");
        for (key, value) in value.as_object().into_iter().flatten() {
            if self.choose(3) == 0 {
                self.line(indent);
                self.text += &format!("{}:", literal(key, ScalarStyle::Plain));
                self.write(value, indent + 2, false);
            }
        }
    }

    fn line(&mut self, indent: usize) {
        self.text += &format!("\n{}", " ".repeat(indent));
    }
}

fn written(value: &Value, choices: &[u8]) -> String {
    let mut writer = Writer { choices: choices.iter().cycle(), anchors: Vec::new(), text: "---".to_owned() };
    writer.write(value, 0, false);
    let text = writer.text + "\n";
    if choices.first().is_some_and(|choice| choice % 2 == 0) { text } else { text.replace('\n', "\r\n") }
}

proptest! {
    #![proptest_config(ProptestConfig {  failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_panics(text in prop_oneof![
        ".*",
        "([\\-?:,\\[\\]{}#&*!|>'\"%@` \n\r\ta<.]|image|: |- |\n  |<<: \\*a|&a |\\*a |---\n)*",
        "(apiVersion: v1\nkind: Pod\nspec:\n containers:\n)([\\-?:,\\[\\]{}#&*!|> \n]|- image: acme/a\n| image: |&a |\\*a |\n  |<<: \\*a|acme/a)*",
    ]) {
        if let Ok(rewritten) = rewrite(&text, to_ecr) {
            prop_assert_eq!(rewritten.changes.is_empty(), rewritten.text == text);
            prop_assert_eq!(rewrite(&rewritten.text, to_ecr).unwrap().text, rewritten.text);
        }
    }

    #[test]
    fn never_panics_near_manifests(
        object in object(), choices in vec(any::<u8>(), 1..99), at in any::<prop::sample::Index>(), length in 0usize..9,
        other in "[\\-?:,\\[\\]{}#&*!|>'\"%@` \n\r\ta0.]{0,3}",
    ) {
        let mut text: Vec<char> = written(&object, &choices).chars().collect();
        let start = at.index(text.len());
        text.splice(start..(start + length).min(text.len()), other.chars());
        let text = String::from_iter(text);
        if let Ok(rewritten) = rewrite(&text, to_ecr) {
            prop_assert_eq!(rewrite(&rewritten.text, to_ecr).unwrap().text, rewritten.text);
        }
    }

    #[test]
    fn reads_json_as_serde_json_does(value in json_value()) {
        let value = json!([value]);
        let pretty = serde_json::to_string_pretty(&value).unwrap();
        for text in [value.to_string(), pretty.replace("  ", "\t"), pretty.replace('\n', "\r\n").replace('/', "\\/")] {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                prop_assert_eq!(values(&text), [value], "{}", text);
            }
        }
    }

    #[test]
    fn changes_exactly_the_images(objects in vec(object(), 1..3), choices in vec(any::<u8>(), 1..99)) {
        let mut after = objects.clone();
        let count: usize = after.iter_mut().map(expected).sum();
        let yaml = |value: &Value| format!("---\n{}", serde_yaml_ng::to_string(value).unwrap());
        let texts: [String; 4] = [
            objects.iter().map(yaml).collect(),
            objects.iter().map(|value| format!("{value:#}\n")).collect(),
            objects.iter().map(|value| format!("--- {}\n", escaped(&value.to_string()))).collect(),
            objects.iter().map(|value| written(value, &choices)).collect(),
        ];
        for (way, text) in texts.into_iter().enumerate() {
            let before = values(&text);
            if way > 0 {
                prop_assert_eq!(&before, &objects, "{}", text);
            }
            let rewritten = match rewrite(&text, to_ecr) {
                // Only anchors may be too much for it.
                Err(error) if way == 3 && error.message.contains("anchor") => continue,
                result => result.unwrap(),
            };
            prop_assert_eq!(rewritten.changes.len(), count, "{}", text);
            if way == 3 && !text.contains("<<") {
                prop_assert_eq!(libyaml(&rewritten.text), values(&rewritten.text));
            }
            prop_assert_eq!(count == 0, text == rewritten.text);
            let mut wanted = before;
            wanted.iter_mut().map(expected).for_each(drop);
            prop_assert_eq!(&values(&rewritten.text), &wanted, "{}\n{}", text, rewritten.text);
            if way < 3 {
                let back = |image: &str| image.strip_prefix(ECR).map(|rest| format!("acme{rest}"));
                prop_assert_eq!(&rewrite(&rewritten.text, back).unwrap().text, &text);
            }
            let again = rewrite(&rewritten.text, to_ecr).unwrap();
            prop_assert_eq!(again, Rewritten { text: rewritten.text, changes: vec![] });
            prop_assert_eq!(rewrite(&text, |_| None).unwrap().text, text);
        }
    }
}
