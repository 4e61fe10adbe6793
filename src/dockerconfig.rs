//! `.dockerconfigjson`: the credentials of a pull secret, as kubelet reads them.
//!
//! Keys are exact registry hosts, without scheme, path or glob: kubelet matches label by label and other tools do not
//! know globs. Only `auth` is written; `username` and `password` beside it would say the same twice in a Secret of at
//! most 1 MiB. See <https://kubernetes.io/docs/concepts/containers/images/#config-json>.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::Deserialize;

use crate::registry::EcrHost;

/// The most bytes of data a Secret may hold: <https://kubernetes.io/docs/concepts/configuration/secret/#restriction-data-size>.
pub const MAX_BYTES: usize = 1024 * 1024;

/// Why an `auth` cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAuth {
    /// It is not base64 of text.
    #[error("it is not base64 of USER:PASSWORD")]
    Encoding,
    /// User or password is empty.
    #[error("its user or password is empty")]
    Empty,
}

/// Checks that a text is what `auth` holds: base64 of `USER:PASSWORD`, neither of them empty. An ECR authorization
/// token is of this very form.
///
/// # Errors
/// [`NotAuth`] says why it would be of no use.
pub fn check_auth(text: &str) -> Result<(), NotAuth> {
    let decoded = Zeroizing::new(STANDARD.decode(text).map_err(|_| NotAuth::Encoding)?);
    let decoded = std::str::from_utf8(&decoded).map_err(|_| NotAuth::Encoding)?;
    match decoded.split_once(':') {
        Some((user, password)) if !user.is_empty() && !password.is_empty() => Ok(()),
        Some(_) => Err(NotAuth::Empty),
        None => Err(NotAuth::Encoding),
    }
}

/// Renders a docker config of registry host → `auth`.
#[must_use]
pub fn render<'a>(auths: impl IntoIterator<Item = (&'a str, &'a SecretString)>) -> Zeroizing<String> {
    let auths: BTreeMap<&str, &str> =
        auths.into_iter().map(|(host, auth)| (host, auth.expose_secret())).collect();
    // Sized at once, so that no copy of a token is left behind by growth.
    let size = auths.iter().map(|(host, auth)| host.len() + auth.len() + 16).sum::<usize>() + 16;
    let mut out = Zeroizing::new(String::with_capacity(size));
    out.push_str(r#"{"auths":{"#);
    for (i, (host, auth)) in auths.iter().enumerate() {
        // The hosts of ECR registries and base64 need no escapes.
        for part in [if i == 0 { "\"" } else { ",\"" }, host, r#"":{"auth":""#, auth, "\"}"] {
            out.push_str(part);
        }
    }
    out.push_str("}}");
    out
}

/// Reads registry host → `auth` back from a docker config. What is not the host of an ECR registry, or no usable `auth`,
/// counts as not there.
#[must_use]
pub fn parse(config: &[u8]) -> BTreeMap<String, SecretString> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        auths: BTreeMap<String, Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        auth: Option<SecretString>,
    }
    let config: Config = serde_json::from_slice(config).unwrap_or(Config { auths: BTreeMap::new() });
    let usable = |(host, entry): (String, Entry)| {
        let auth = entry.auth?;
        let valid = host.parse::<EcrHost>().is_ok() && check_auth(auth.expose_secret()).is_ok();
        valid.then_some((host, auth))
    };
    config.auths.into_iter().filter_map(usable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_only_auth_by_exact_host_and_reads_it_back() {
        let auth = SecretString::from(STANDARD.encode("AWS:secret"));
        let (a, b) =
            ("123456789012.dkr.ecr.us-east-1.amazonaws.com", "210987654321.dkr.ecr.us-east-1.amazonaws.com");
        let text = render([(b, &auth), (a, &auth)]);
        let entry = r#"{"auth":"QVdTOnNlY3JldA=="}"#;
        assert_eq!(*text, format!(r#"{{"auths":{{"{a}":{entry},"{b}":{entry}}}}}"#));
        let back = parse(text.as_bytes());
        assert_eq!(back.keys().collect::<Vec<_>>(), [a, b]);
        assert_eq!(back[a].expose_secret(), auth.expose_secret());
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
    }

    #[test]
    fn an_empty_token_is_no_auth() {
        for (text, error) in [("", NotAuth::Encoding), ("!!", NotAuth::Encoding)] {
            assert_eq!(check_auth(text), Err(error));
        }
        assert_eq!(check_auth(&STANDARD.encode("AWS:")), Err(NotAuth::Empty));
        assert_eq!(check_auth(&STANDARD.encode(":x")), Err(NotAuth::Empty));
        assert_eq!(check_auth(&STANDARD.encode("AWS")), Err(NotAuth::Encoding));
        assert_eq!(check_auth(&STANDARD.encode("AWS:x")), Ok(()));
    }

    #[test]
    fn a_broken_config_is_an_empty_one() {
        for text in [
            "",
            "{",
            "[]",
            r#"{"auths":[]}"#,
            r#"{"auths":{"a":{"auth":1}}}"#,
            r#"{"auths":{"a\"b":{"auth":"QVdTOng="}}}"#,
        ] {
            assert!(parse(text.as_bytes()).is_empty(), "{text}");
        }
    }
}
