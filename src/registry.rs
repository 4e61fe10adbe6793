//! ECR registry hosts: which account, region and partition a host names, and the API endpoint that mints its token.
//!
//! The grammar is that of AWS's own [credential helper][helper] with the end of the text anchored, so that a lookalike
//! such as `….amazonaws.com.evil.example` is never taken for a registry.
//!
//! [helper]: https://github.com/awslabs/amazon-ecr-credential-helper/blob/main/ecr-login/api/client.go

use std::{fmt, str::FromStr};

/// The host of an ECR private registry in canonical (lower-case) form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EcrHost {
    text: Box<str>,
    region: Region,
}

/// Where a token for a registry is minted: everything about an endpoint but who asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Region {
    /// The region's name, for example `us-east-1`.
    pub name: Box<str>,
    /// Whether the FIPS endpoint is used, as the host's `-fips` says.
    pub fips: bool,
    /// Whether the dual-stack (IPv4 and IPv6) endpoint is used, as the host's `on.aws` suffix says.
    pub dual_stack: bool,
}

/// Why a text is not the host of an ECR registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not the host of an ECR private registry: expected ACCOUNT.dkr.ecr.REGION.amazonaws.com or its form in another partition"
)]
pub struct NotEcr {
    text: String,
}

/// The domain suffixes of ECR registries: the suffix, its partition, the API endpoint's suffix, and whether the suffix
/// is that of dual-stack endpoints.
const SUFFIXES: [(&str, &str, &str, bool); 9] = [
    ("amazonaws.com", "aws", "amazonaws.com", false),
    ("amazonaws.com.cn", "aws-cn", "amazonaws.com.cn", false),
    ("amazonaws.eu", "aws-eusc", "amazonaws.eu", false),
    ("on.aws", "aws", "api.aws", true),
    ("on.amazonwebservices.com.cn", "aws-cn", "api.amazonwebservices.com.cn", true),
    ("sc2s.sgov.gov", "aws-iso-b", "sc2s.sgov.gov", false),
    ("c2s.ic.gov", "aws-iso", "c2s.ic.gov", false),
    ("cloud.adc-e.uk", "aws-iso-e", "cloud.adc-e.uk", false),
    ("csp.hci.ic.gov", "aws-iso-f", "csp.hci.ic.gov", false),
];

impl EcrHost {
    /// The host, for example `123456789012.dkr.ecr.us-east-1.amazonaws.com`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The 12-digit account that owns the registry.
    #[must_use]
    pub fn account(&self) -> &str {
        self.text.get(..12).unwrap_or_default()
    }

    /// The region, with the flavour of endpoint that the host asks for.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The AWS partition, for example `aws` or `aws-us-gov`.
    #[must_use]
    pub fn partition(&self) -> &'static str {
        if self.region.name.starts_with("us-gov-") { "aws-us-gov" } else { self.suffix().1 }
    }

    /// The host of the ECR API that mints this registry's token (the one that PrivateLink serves, or its FIPS or
    /// dual-stack form). See <https://docs.aws.amazon.com/general/latest/gr/ecr.html>.
    #[must_use]
    pub fn api_endpoint(&self) -> String {
        let (_, _, suffix, dual_stack) = self.suffix();
        let service = match (self.region.fips, dual_stack) {
            (true, true) => "ecr-fips",
            (true, false) => "api.ecr-fips",
            (false, true) => "ecr",
            (false, false) => "api.ecr",
        };
        format!("{service}.{}.{suffix}", self.region.name)
    }

    fn suffix(&self) -> &'static (&'static str, &'static str, &'static str, bool) {
        // The longest match, because `amazonaws.com.cn` is no suffix of another but `on.aws` might one day be.
        SUFFIXES
            .iter()
            .filter(|(suffix, ..)| self.text.ends_with(suffix))
            .max_by_key(|(suffix, ..)| suffix.len())
            .unwrap_or(&SUFFIXES[0])
    }
}

impl FromStr for EcrHost {
    type Err = NotEcr;

    fn from_str(text: &str) -> Result<Self, NotEcr> {
        let lower = text.to_ascii_lowercase();
        let region = parse_region(&lower).ok_or_else(|| NotEcr { text: text.to_owned() })?;
        Ok(Self { region, text: lower.into() })
    }
}

impl fmt::Display for EcrHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a text is an AWS account id.
#[must_use]
pub fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())
}

fn parse_region(host: &str) -> Option<Region> {
    let (account, rest) = host.split_once('.')?;
    if !is_account(account) {
        return None;
    }
    let rest = rest.strip_prefix("dkr.ecr").or_else(|| rest.strip_prefix("dkr-ecr"))?;
    let (rest, fips) = match rest.strip_prefix("-fips") {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    let (region, suffix) = rest.strip_prefix('.')?.split_once('.')?;
    let valid = region.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && region.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    let (.., dual_stack) = SUFFIXES.iter().find(|(s, ..)| *s == suffix)?;
    valid.then(|| Region { name: region.into(), fips, dual_stack: *dual_stack })
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_ecr::config::endpoint::{DefaultResolver, Params, ResolveEndpoint};

    #[tokio::test]
    async fn every_partition_and_its_endpoint_as_the_sdk_has_it() {
        let cases = [
            ("123456789012.dkr.ecr.us-east-1.amazonaws.com", "us-east-1", "aws"),
            ("123456789012.dkr.ecr-fips.us-east-1.amazonaws.com", "us-east-1", "aws"),
            ("123456789012.dkr-ecr.us-west-2.on.aws", "us-west-2", "aws"),
            ("123456789012.dkr-ecr-fips.us-west-2.on.aws", "us-west-2", "aws"),
            ("123456789012.dkr.ecr.us-gov-west-1.amazonaws.com", "us-gov-west-1", "aws-us-gov"),
            ("123456789012.dkr.ecr-fips.us-gov-east-1.amazonaws.com", "us-gov-east-1", "aws-us-gov"),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", "aws-cn"),
            ("123456789012.dkr-ecr.cn-northwest-1.on.amazonwebservices.com.cn", "cn-northwest-1", "aws-cn"),
            ("123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", "aws-eusc"),
            ("123456789012.dkr.ecr.us-isob-east-1.sc2s.sgov.gov", "us-isob-east-1", "aws-iso-b"),
            ("123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", "us-iso-east-1", "aws-iso"),
            ("123456789012.dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", "eu-isoe-west-1", "aws-iso-e"),
            ("123456789012.dkr.ecr.us-isof-south-1.csp.hci.ic.gov", "us-isof-south-1", "aws-iso-f"),
        ];
        for (text, region, partition) in cases {
            let host: EcrHost = text.parse().unwrap();
            assert_eq!((host.as_str(), host.account()), (text, "123456789012"));
            assert_eq!((&*host.region().name, host.partition()), (region, partition), "{text}");
            let params = Params::builder()
                .region(region)
                .use_fips(host.region().fips)
                .use_dual_stack(host.region().dual_stack)
                .build()
                .unwrap();
            let sdk = DefaultResolver::new().resolve_endpoint(&params).await.unwrap();
            assert_eq!(sdk.url(), format!("https://{}", host.api_endpoint()), "{text}");
        }
    }

    #[test]
    fn upper_case_is_the_same_registry() {
        let host: EcrHost = "123456789012.DKR.ECR.us-east-1.AmazonAWS.com".parse().unwrap();
        assert_eq!(host.as_str(), "123456789012.dkr.ecr.us-east-1.amazonaws.com");
    }

    #[test]
    fn lookalikes_are_refused() {
        for text in [
            "",
            "123456789012",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com.evil.example",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com.",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com:443",
            "123456789012.dkr.ecr.us-east-1.amazonaws.community",
            "x123456789012.dkr.ecr.us-east-1.amazonaws.com",
            "12345678901.dkr.ecr.us-east-1.amazonaws.com",
            "1234567890123.dkr.ecr.us-east-1.amazonaws.com",
            "evil.example/123456789012.dkr.ecr.us-east-1.amazonaws.com",
            "123456789012.dkr.ecr.us-east-1.evil.com",
            "123456789012.dkr.ecr..amazonaws.com",
            "123456789012.dkr.ecr.-us.amazonaws.com",
            "123456789012.dkr.ecr.amazonaws.com",
            "123456789012.dkr.ecrx.us-east-1.amazonaws.com",
            "public.ecr.aws",
        ] {
            assert!(text.parse::<EcrHost>().is_err(), "{text}");
        }
    }
}
