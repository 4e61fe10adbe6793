//! Streams of documents, and scalars as kubectl types them.

use serde_json::json;

use super::*;

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
