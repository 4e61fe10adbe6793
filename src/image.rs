//! Image references: the grammar of a container image name.
//!
//! The grammar is that of the [distribution project][grammar], and the rule for what counts as a host is that of
//! [its normalisation][host], which every container runtime follows: the part before the first slash is a host if it
//! contains a dot or a colon, if it is `localhost`, or if it has an upper-case letter. A reference is parsed into
//! slices of its text and printed back byte for byte; nothing is normalised, so no `:latest` or `library/` appears.
//!
//! [grammar]: https://github.com/distribution/reference/blob/v0.6.0/reference.go
//! [host]: https://github.com/distribution/reference/blob/v0.6.0/normalize.go

use std::fmt;

/// A parsed image reference that borrows the text it was parsed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRef<'a> {
    host: Option<&'a str>,
    /// All that follows the host.
    rest: &'a str,
    path: &'a str,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

/// Why a text is not an image reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The text is empty.
    #[error("the image reference is empty")]
    Empty,
    /// What stands before the first slash looks like a host but is none.
    #[error("the registry host is not a host name with an optional port")]
    Host,
    /// A path component is empty or has a character that is not allowed.
    #[error(
        "the repository path must be lower-case letters, digits, and single separators . _ - between them"
    )]
    Path,
    /// The path is longer than 255 characters.
    #[error("the repository path is longer than 255 characters")]
    PathTooLong,
    /// The tag is empty, too long, or has a character that is not allowed.
    #[error("the tag must be 1 to 128 letters, digits, _ . or -, and start with a letter, a digit or _")]
    Tag,
    /// The digest is not ALGORITHM:HEX.
    #[error("the digest must be ALGORITHM:HEX with at least 32 hexadecimal digits")]
    Digest,
}

impl<'a> ImageRef<'a> {
    /// Parses an image reference as written in a manifest.
    ///
    /// # Errors
    /// [`ParseError`] tells which part breaks the grammar.
    pub fn parse(text: &'a str) -> Result<Self, ParseError> {
        if text.is_empty() {
            return Err(ParseError::Empty);
        }
        let (host, rest) = split_host(text);
        if host.is_some_and(|h| !is_host(h)) {
            return Err(ParseError::Host);
        }
        Self::at_host(host, rest)
    }

    /// Parses what follows a host that is known to be one.
    ///
    /// # Errors
    /// [`ParseError`] tells which part breaks the grammar.
    pub fn at_host(host: Option<&'a str>, rest: &'a str) -> Result<Self, ParseError> {
        let (name, digest) = split_at(rest, b'@');
        let (path, tag) = split_at(name, b':');
        if path.len() > 255 {
            return Err(ParseError::PathTooLong);
        }
        if !is_path(path) {
            return Err(ParseError::Path);
        }
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(ParseError::Tag);
        }
        if digest.is_some_and(|d| !is_digest(d)) {
            return Err(ParseError::Digest);
        }
        Ok(Self { host, rest, path, tag, digest })
    }

    /// The registry host with its port, as written; `None` where the runtime would fill in its default registry.
    #[must_use]
    pub fn host(&self) -> Option<&'a str> {
        self.host
    }

    /// The repository path, without host, tag and digest.
    #[must_use]
    pub fn path(&self) -> &'a str {
        self.path
    }

    /// The tag, without its colon.
    #[must_use]
    pub fn tag(&self) -> Option<&'a str> {
        self.tag
    }

    /// The digest, as `ALGORITHM:HEX`.
    #[must_use]
    pub fn digest(&self) -> Option<&'a str> {
        self.digest
    }

    /// The same image at another host, optionally below a path prefix. Tag, digest and path stay byte for byte.
    #[must_use]
    pub fn at<'b>(&self, host: &'b str, prefix: Option<&'b str>) -> Relocated<'b>
    where
        'a: 'b,
    {
        Relocated { host, prefix, rest: self.rest }
    }
}

impl fmt::Display for ImageRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = self.host {
            write!(f, "{host}/")?;
        }
        f.write_str(self.rest)
    }
}

/// An image at another host; made by [`ImageRef::at`], and printed without an intermediate string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocated<'a> {
    host: &'a str,
    prefix: Option<&'a str>,
    /// Path, tag and digest.
    rest: &'a str,
}

impl<'a> Relocated<'a> {
    /// What makes the name when it is put together.
    pub fn parts(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let (prefix, slash) = self.prefix.map_or(("", ""), |prefix| (prefix, "/"));
        [self.host, "/", prefix, slash, self.rest].into_iter()
    }
}

impl fmt::Display for Relocated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().try_for_each(|part| f.write_str(part))
    }
}

/// Whether a text is a registry host: a DNS name, an IPv4 address or a bracketed IPv6 address, with an optional port.
#[must_use]
pub fn is_host(text: &str) -> bool {
    let (name, port) = if let Some(v6) = text.strip_prefix('[') {
        let Some((address, rest)) = v6.split_once(']') else { return false };
        if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return false,
        }
    } else {
        let (name, port) = split_at(text, b':');
        (Some(name), port)
    };
    name.is_none_or(|name| name.as_bytes().split(|byte| *byte == b'.').all(is_domain_component))
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a text is one or more repository path components joined by slashes.
#[must_use]
pub fn is_path(text: &str) -> bool {
    text.as_bytes().split(|byte| *byte == b'/').all(is_path_component)
}

/// Splits what counts as a host from the rest of an image reference, whether either is valid or not.
#[must_use]
pub fn split_host(text: &str) -> (Option<&str>, &str) {
    let mut looks_like_host = false;
    for (place, byte) in text.bytes().enumerate() {
        match byte {
            b'/' if looks_like_host || text.get(..place) == Some("localhost") => {
                return (text.get(..place), text.get(place + 1..).unwrap_or_default());
            }
            // A slash may be in a digest, too, which has no host before it.
            b'/' | b'@' => break,
            _ => looks_like_host |= matches!(byte, b'.' | b':') || byte.is_ascii_uppercase(),
        }
    }
    (None, text)
}

/// Splits a text at the first of an ASCII character. The searches of `str` are made for longer texts than these.
fn split_at(text: &str, at: u8) -> (&str, Option<&str>) {
    let place = text.bytes().position(|byte| byte == at);
    match place.and_then(|place| Some((text.get(..place)?, text.get(place + 1..)?))) {
        Some((before, after)) => (before, Some(after)),
        None => (text, None),
    }
}

fn is_domain_component(bytes: &[u8]) -> bool {
    matches!((bytes.first(), bytes.last()), (Some(a), Some(b)) if a.is_ascii_alphanumeric() && b.is_ascii_alphanumeric())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(text: &[u8]) -> bool {
    let mut separator: Option<(u8, usize)> = Some((b'/', 0));
    for &byte in text {
        separator = match (byte, separator) {
            (b'a'..=b'z' | b'0'..=b'9', _) => None,
            (b'.' | b'_' | b'-', None) => Some((byte, 1)),
            (b'_', Some((b'_', 1))) => Some((b'_', 2)),
            (b'-', Some((b'-', n))) => Some((b'-', n + 1)),
            _ => return false,
        };
    }
    separator.is_none()
}

fn is_tag(text: &str) -> bool {
    text.len() <= 128
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn is_digest(text: &str) -> bool {
    let (algorithm, Some(hex)) = split_at(text, b':') else { return false };
    algorithm.split(['+', '.', '-', '_']).all(|part| {
        part.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
            && part.bytes().all(|b| b.is_ascii_alphanumeric())
    }) && hex.len() >= 32
        && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHA: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn parses_every_form() {
        let cases: &[(&str, Option<&str>, &str, Option<&str>)] = &[
            ("app", None, "app", None),
            ("app:1", None, "app", Some("1")),
            ("library/app:1.2.3", None, "library/app", Some("1.2.3")),
            // A dotted tag is not a host (imageswap-webhook #46).
            ("app:v1.2", None, "app", Some("v1.2")),
            ("team/app:v1.2", None, "team/app", Some("v1.2")),
            ("example.io/app", Some("example.io"), "app", None),
            ("Example.IO:5000/app:1", Some("Example.IO:5000"), "app", Some("1")),
            ("UPPER/app", Some("UPPER"), "app", None),
            ("localhost/app", Some("localhost"), "app", None),
            ("localhost:5000/a/b/c", Some("localhost:5000"), "a/b/c", None),
            ("127.0.0.1:5000/app", Some("127.0.0.1:5000"), "app", None),
            ("[::1]:5000/app:1", Some("[::1]:5000"), "app", Some("1")),
            ("[2001:db8::1]/app", Some("[2001:db8::1]"), "app", None),
            ("a.b/c__d/e-f.g", Some("a.b"), "c__d/e-f.g", None),
            ("a.b/c---d", Some("a.b"), "c---d", None),
        ];
        for (text, host, path, tag) in cases {
            let image = ImageRef::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(
                (image.host(), image.path(), image.tag(), image.digest()),
                (*host, *path, *tag, None),
                "{text}"
            );
            assert_eq!(image.to_string(), *text);
        }
        // Tag and digest together are both kept (k8s-image-swapper #48).
        let both = format!("example.io/app:1@{SHA}");
        let image = ImageRef::parse(&both).unwrap();
        assert_eq!((image.tag(), image.digest()), (Some("1"), Some(SHA)));
        assert_eq!(image.to_string(), both);
    }

    #[test]
    fn refuses_what_no_runtime_accepts() {
        use ParseError::*;
        let long = format!("example.io/{}", "a".repeat(256));
        let cases: &[(&str, ParseError)] = &[
            ("", Empty),
            ("/app", Path),
            ("example.io/", Path),
            ("example.io/App", Path),
            ("example.io/a//b", Path),
            ("example.io/a..b", Path),
            ("example.io/a___b", Path),
            ("example.io/-a", Path),
            ("example.io/a-", Path),
            ("-example.io/a", Host),
            ("exa_mple.io/a", Host),
            ("example.io:/a", Host),
            ("example.io:x/a", Host),
            ("[::1/a:b", Host),
            ("https://example.io/a", Host),
            ("example.io/a:", Tag),
            ("example.io/a:-1", Tag),
            ("example.io/a:1:2", Tag),
            ("example.io/a@", Digest),
            ("example.io/a@sha256:abc", Digest),
            ("example.io/a:1 ", Tag),
            (" example.io/a", Host),
            (&long, PathTooLong),
        ];
        for (text, error) in cases {
            assert_eq!(ImageRef::parse(text), Err(*error), "{text:?}");
        }
    }

    #[test]
    fn relocates_without_touching_the_rest() {
        let text = format!("Docker-ECR.example.io:443/team/app:1.2@{SHA}");
        let image = ImageRef::parse(&text).unwrap();
        assert_eq!(image.at("r.example", None).to_string(), format!("r.example/team/app:1.2@{SHA}"));
        assert_eq!(
            image.at("r.example", Some("hub/x")).to_string(),
            format!("r.example/hub/x/team/app:1.2@{SHA}")
        );
    }

    proptest! {
        #[test]
        fn printing_is_the_inverse_of_parsing(text in "\\PC{0,80}|[a-zA-Z0-9.:/@_\\[\\]-]{0,80}") {
            if let Ok(image) = ImageRef::parse(&text) {
                prop_assert_eq!(image.to_string(), text);
            }
        }

        #[test]
        fn every_generated_reference_parses(
            host in proptest::option::of("[a-z0-9]{1,8}(\\.[A-Za-z0-9]{1,8}){1,3}(:[0-9]{1,5})?"),
            path in "[a-z0-9]{1,8}((_|__|-{1,3})[a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,8}(\\.[a-z0-9]{1,3})?){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in proptest::option::of("sha256:[0-9a-f]{64}"),
        ) {
            let mut text = host.as_ref().map(|h| format!("{h}/")).unwrap_or_default();
            text += &path;
            if let Some(tag) = &tag { text += &format!(":{tag}"); }
            if let Some(digest) = &digest { text += &format!("@{digest}"); }
            let image = ImageRef::parse(&text).unwrap();
            prop_assert_eq!(image.host(), host.as_deref());
            prop_assert_eq!(image.path(), path);
            prop_assert_eq!(image.tag(), tag.as_deref());
            prop_assert_eq!(image.digest(), digest.as_deref());
        }
    }
}
