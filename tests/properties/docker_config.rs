//! `.dockerconfigjson`, as it is read back from a Secret that someone else may have written.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ecr_cname::{dockerconfig, registry::EcrHost};
use proptest::prelude::*;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;

fn auth() -> impl Strategy<Value = String> {
    "[A-Za-z]{1,4}:[ -~]{1,40}".prop_map(|auth| STANDARD.encode(auth))
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = dockerconfig::parse(&bytes);
    }

    #[test]
    fn what_is_read_stands_there_and_can_be_used(
        entries in proptest::collection::btree_map(
            prop_oneof![3 => "[0-9]{12}\\.dkr\\.ecr\\.[a-z]{2}-east-1\\.amazonaws\\.com", 1 => "\\PC{0,20}"],
            prop_oneof![3 => auth(), 1 => "\\PC{0,20}"],
            0..5,
        ),
        further in any::<bool>(),
    ) {
        let auths: BTreeMap<_, _> = entries
            .iter()
            .map(|(host, auth)| (host.clone(), serde_json::json!({"auth": auth, "email": further.then_some("x")})))
            .collect();
        let config = serde_json::to_vec(&serde_json::json!({"auths": auths, "credsStore": "x"})).unwrap();
        let read = dockerconfig::parse(&config);
        for (host, auth) in &entries {
            let usable = host.parse::<EcrHost>().is_ok() && dockerconfig::check_auth(auth).is_ok();
            prop_assert_eq!(read.get(host).map(|a| a.expose_secret()), usable.then_some(auth.as_str()));
        }
        prop_assert!(read.len() <= entries.len());
    }

    #[test]
    fn what_is_written_is_json_and_is_read_back(
        entries in proptest::collection::btree_map("[0-9]{12}\\.dkr\\.ecr\\.[a-z]{2}-east-1\\.amazonaws\\.com", auth(), 0..5),
    ) {
        let secrets: BTreeMap<_, _> = entries.iter().map(|(h, a)| (h.clone(), SecretString::from(a.clone()))).collect();
        let text = dockerconfig::render(secrets.iter().map(|(host, auth)| (host.as_str(), auth)));
        let value: Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(value["auths"].as_object().unwrap().len(), entries.len());
        let read = dockerconfig::parse(text.as_bytes());
        let read: BTreeMap<_, _> = read.iter().map(|(h, a)| (h.clone(), a.expose_secret().to_owned())).collect();
        prop_assert_eq!(read, entries);
    }

    /// What is no `USER:PASSWORD` never counts as a token, as AWS might send it.
    #[test]
    fn an_auth_is_base64_of_user_and_password(text in prop_oneof![auth(), "\\PC{0,30}", "[A-Za-z0-9+/]{0,12}={0,2}"]) {
        let decoded = STANDARD.decode(&text).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let usable = decoded.is_some_and(|auth| auth.find(':').is_some_and(|at| at > 0 && at + 1 < auth.len()));
        prop_assert_eq!(dockerconfig::check_auth(&text).is_ok(), usable);
    }
}
