//! What cannot be done, and what the error says.

use serde_json::json;

use super::*;

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
