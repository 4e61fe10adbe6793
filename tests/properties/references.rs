//! Image references, against the grammar that the distribution project publishes as regular expressions.

use std::sync::LazyLock;

use ecr_cname::image::ImageRef;
use proptest::prelude::*;
use regex::Regex;

/// <https://github.com/distribution/reference/blob/v0.6.0/regexp.go>, put together as it is there.
static REFERENCE: LazyLock<Regex> = LazyLock::new(|| {
    let component = "(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])";
    let host = format!(r"(?:{component}(?:\.{component})*|\[(?:[a-fA-F0-9:]+)\])");
    let path = r"[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*";
    let digest = "[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*[:][[:xdigit:]]{32,}";
    Regex::new(&format!(
        r"\A(?:({host}(?::[0-9]+)?)/)?({path}(?:/{path})*)(?::([0-9A-Za-z_][0-9A-Za-z_.-]{{0,127}}))?(?:@({digest}))?\z"
    ))
    .unwrap()
});

type Parts = (Option<String>, String, Option<String>, Option<String>);

/// Host, path, tag and digest, by that grammar and by the rule of normalize.go for what a host is.
fn reference(text: &str) -> Option<Parts> {
    let (host, rest) = match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':']) || first == "localhost" || first.to_lowercase() != first =>
        {
            (Some(first), rest)
        }
        _ => (None, text),
    };
    // There, what has no host gets one before it is matched.
    let whole = format!("{}/{rest}", host.unwrap_or("docker.io"));
    let groups = REFERENCE.captures(&whole)?;
    let group = |n: usize| groups.get(n).map(|m| m.as_str().to_owned());
    let path = group(2)?;
    (path.len() <= 255).then(|| (host.map(str::to_owned), path, group(3), group(4)))
}

fn ours(text: &str) -> Option<Parts> {
    let own = |text: Option<&str>| text.map(str::to_owned);
    let image = ImageRef::parse(text).ok()?;
    assert_eq!(image.to_string(), text);
    Some((own(image.host()), image.path().to_owned(), own(image.tag()), own(image.digest())))
}

/// Texts near the grammar: its own characters, and its own parts in any order.
fn near() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => "[a-z0-9]{1,5}",
        2 => "[.:/@_-]{1,2}",
        1 => "[A-Z]{1,2}",
        1 => "sha256:[0-9a-f]{30,66}",
        1 => "\\[[0-9a-f:]{0,9}\\]",
        1 => "localhost|\u{e9}|\u{130}| |\n|%41",
        1 => "a{250,260}",
    ];
    proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn are_parsed_as_the_published_grammar_says(text in prop_oneof![near(), "\\PC{0,60}", any::<String>()]) {
        prop_assert_eq!(ours(&text), reference(&text));
    }

    #[test]
    fn of_real_forms_are_parsed_as_the_published_grammar_says(
        text in "(([a-zA-Z0-9-]{1,5}\\.){0,2}[a-zA-Z0-9-]{1,5}(:[0-9]{0,5})?/)?[a-z0-9._-]{1,6}(/[a-z0-9._-]{1,6}){0,2}(:[\\w.-]{0,5})?(@[a-z0-9+.]{1,8}:[0-9a-f]{31,64})?",
    ) {
        prop_assert_eq!(ours(&text), reference(&text));
    }
}

#[test]
fn of_the_corpus() {
    let corpus = include_str!("../corpus/references.txt");
    for text in corpus.lines() {
        assert_eq!(ours(text), reference(text), "{text:?}");
    }
    assert!(corpus.lines().count() > 20);
}
