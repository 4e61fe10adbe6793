//! Keys and certificates of servers.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256,
};

/// A certificate authority and one server certificate that it signed, all in PEM.
pub struct ServingCert {
    /// The authority's certificate.
    pub ca: String,
    /// The server's certificate.
    pub cert: String,
    /// The server's key.
    pub key: String,
}

/// A server certificate for `names`, which may be DNS names and IP addresses.
pub fn serving_cert(names: &[&str]) -> Result<ServingCert> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name = common_name("testbed-ca");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca_cert = ca.self_signed(&ca_key)?;

    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
    leaf.distinguished_name = common_name("testbed");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let cert = leaf.signed_by(&key, &Issuer::new(ca, ca_key))?;

    Ok(ServingCert { ca: ca_cert.pem(), cert: cert.pem(), key: key.serialize_pem() })
}

/// A key that signs service account tokens, in PEM: RSA, as in every cluster that AWS runs.
pub(crate) fn service_account_key() -> Result<String> {
    Ok(KeyPair::generate_for(&PKCS_RSA_SHA256)?.serialize_pem())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
