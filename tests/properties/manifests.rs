//! Manifests for `rewrite`: the corpus. What holds for any text is beside the code, in `src/manifest/tests.rs`.

use ecr_cname::manifest;

/// Whatever the text, it is an error or it is as it should be: rewriting once more changes nothing, and an image that is
/// renamed is the only thing that is.
#[test]
fn of_the_corpus_are_rewritten_or_refused() {
    let rename = |image: &str| image.strip_prefix("a.example.io/").map(|rest| format!("r.example/{rest}"));
    for (name, bytes) in crate::corpus("manifests") {
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let Ok(once) = manifest::rewrite(&text, rename) else { continue };
        let twice = manifest::rewrite(&once.text, rename).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(twice.text, once.text, "{name}");
        assert!(twice.changes.is_empty(), "{name}");
        let back = manifest::rewrite(&once.text, |image| {
            image.strip_prefix("r.example/").map(|rest| format!("a.example.io/{rest}"))
        });
        let (before, after) =
            (manifest::documents(&text).unwrap(), manifest::documents(&back.unwrap().text).unwrap());
        let values = |documents: Vec<manifest::Document>| -> Vec<_> {
            documents.into_iter().map(|d| d.value).collect()
        };
        assert_eq!(values(after), values(before), "{name}");
    }
}
