//! Properties over generated manifests.

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::json;

use super::*;

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
            prop_assert_eq!(renamed(&rewritten.text), rewritten.text);
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
            prop_assert_eq!(renamed(&rewritten.text), rewritten.text);
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
