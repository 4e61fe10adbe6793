//! Hosts of ECR registries, against the expression of AWS's own credential helper.

use std::sync::LazyLock;

use ecr_cname::registry::EcrHost;
use proptest::prelude::*;
use regex::Regex;

/// <https://github.com/awslabs/amazon-ecr-credential-helper/blob/main/ecr-login/api/client.go>, with its end anchored.
static HELPER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"\A(?P<account>[0-9]{12})\.dkr[\.-]ecr(?P<fips>-fips)?\.(?P<region>[a-zA-Z0-9][a-zA-Z0-9-_]*)\.(amazonaws\.(com(\.cn)?|eu)|on\.(aws|amazonwebservices\.com\.cn)|sc2s\.sgov\.gov|c2s\.ic\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)\z",
    )
    .unwrap()
});

fn near() -> impl Strategy<Value = String> {
    let suffix = prop_oneof![
        Just("amazonaws.com"),
        Just("amazonaws.com.cn"),
        Just("amazonaws.eu"),
        Just("on.aws"),
        Just("sc2s.sgov.gov"),
        Just("csp.hci.ic.gov"),
        Just("amazonaws.co"),
        Just("evil.example"),
    ];
    let ecr = "[0-9]{11,13}\\.dkr[.-]?ecr(-fips|-fip|)\\.[a-z0-9_-]{0,9}";
    (ecr, suffix, "(|\\.|:443|\\.evil\\.example|/x|\\.cn)").prop_map(|(a, b, c)| format!("{a}.{b}{c}"))
}

proptest! {
    #[test]
    fn are_those_of_the_credential_helper(text in prop_oneof![4 => near(), 1 => any::<String>()]) {
        let ours = text.parse::<EcrHost>().ok();
        let theirs = HELPER.captures(&text.to_ascii_lowercase()).map(|groups| {
            (groups["account"].to_owned(), groups["region"].to_owned(), groups.name("fips").is_some())
        });
        let ours = ours.map(|h| (h.account().to_owned(), h.region().name.to_string(), h.region().fips));
        prop_assert_eq!(ours, theirs);
    }
}
