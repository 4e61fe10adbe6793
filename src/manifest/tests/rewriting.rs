//! Tables of before and after: which images get a new name, and that nothing else changes.

use serde_json::json;

use super::*;

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
