//! The self-managed serving certificate: a CA and a leaf in a Secret, renewed well before they expire.
//!
//! Each leaf has a CA of its own whose key is thrown away once it has signed, so nothing that could sign is kept. A
//! renewal goes in two steps, so that no admission is lost: first the new CA joins the old one in `ca.crt` while the
//! old leaf serves on; when the API server trusts both, the new leaf takes over.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    ByteString,
    api::{admissionregistration::v1::MutatingWebhookConfiguration, core::v1::Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    pull_secret::{FIELD_MANAGER, MANAGED_BY},
    serving_cert::{ca_bundle, not_after},
    watch::{bounded, chain},
};

const CRT: &str = "tls.crt";
const KEY: &str = "tls.key";
const CA: &str = "ca.crt";
const NEXT_CRT: &str = "next.crt";
const NEXT_KEY: &str = "next.key";

/// What kind of certificate is issued.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The Secret that holds it, in the operator's namespace.
    pub secret: String,
    /// The DNS names and IP addresses that it is for.
    pub names: Vec<String>,
    /// How long a leaf is valid; it is renewed when a third of that is left.
    pub lifetime: SignedDuration,
    /// How long the API server is given to learn of a new CA before a leaf of it serves.
    pub overlap: Duration,
}

/// Why a certificate could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// rcgen refused.
    #[error("cannot issue a certificate: {0}")]
    Rcgen(#[from] rcgen::Error),
    /// The Secret could not be written.
    #[error("cannot write the Secret {name:?} of the serving certificate: {source}")]
    Write {
        /// The Secret's name.
        name: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// What to do about the certificate.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Nothing until that time.
    Wait(Timestamp),
    /// Nothing until the API server trusts the next CA, or the leaf expires.
    WaitForTrust(Timestamp),
    /// Issue a first certificate, or one in place of what cannot be used: there is nothing to overlap with.
    Issue,
    /// Issue the next certificate, and have both CAs trusted.
    Prepare,
    /// Let the next leaf take over.
    Promote,
    /// Nothing: the Secret is someone else's.
    LeaveAlone,
}

/// The shortest time between two writes.
const MIN_PAUSE: Duration = Duration::from_millis(500);

/// Keeps the certificate, for ever. `registered` is the webhook configuration as a watch sees it.
pub async fn keep(
    client: Client,
    namespace: String,
    settings: Settings,
    mut secret: watch::Receiver<Option<Arc<Secret>>>,
    mut registered: watch::Receiver<Option<Arc<MutatingWebhookConfiguration>>>,
) {
    let api: Api<Secret> = Api::namespaced(client, &namespace);
    let mut trusted_since = None;
    loop {
        let current = secret.borrow_and_update().clone();
        let trusts =
            current.as_deref().is_some_and(|s| trusts_next(registered.borrow_and_update().as_deref(), s));
        trusted_since = if trusts { trusted_since.or(Some(Timestamp::now())) } else { None };
        let step = step(current.as_deref(), &settings, trusted_since, Timestamp::now());
        let pause = match &step {
            Step::Wait(until) | Step::WaitForTrust(until) => {
                Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or_default()
            }
            Step::LeaveAlone => {
                warn!(
                    secret = settings.secret,
                    "the Secret of the serving certificate is not ours (no label {}={}): \
                     start with --certificate=external, or delete it",
                    MANAGED_BY.0,
                    MANAGED_BY.1
                );
                Duration::from_secs(3600)
            }
            doing => {
                if let Err(error) = perform(&api, &settings, current.as_deref(), doing).await {
                    warn!(error = %chain(&error), "the serving certificate could not be renewed; trying again");
                }
                // Only what the watch says of the Secret is the next step's ground; it says so within moments.
                tokio::select! {
                    alive = secret.changed() => if alive.is_err() { return },
                    () = tokio::time::sleep(Duration::from_secs(5)) => {}
                }
                // Whoever else might write it, this is no race.
                tokio::time::sleep(MIN_PAUSE).await;
                continue;
            }
        };
        tokio::select! {
            alive = secret.changed() => if alive.is_err() { return },
            alive = registered.changed() => if alive.is_err() { return },
            () = tokio::time::sleep(pause.max(Duration::from_millis(100)).min(Duration::from_secs(3600))) => {}
        }
    }
}

/// Decides on the next step.
fn step(
    secret: Option<&Secret>,
    settings: &Settings,
    trusted_since: Option<Timestamp>,
    now: Timestamp,
) -> Step {
    let ours = |s: &Secret| s.metadata.labels.as_ref()?.get(MANAGED_BY.0).map(|v| v == MANAGED_BY.1);
    if secret.is_some_and(|s| ours(s) != Some(true)) {
        return Step::LeaveAlone;
    }
    let Some((serving, _)) = secret.and_then(|s| pair(s, CRT, KEY)) else { return Step::Issue };
    let Ok(expires) = not_after(&serving) else { return Step::Issue };
    let for_our_names = secret.is_some_and(|s| names_of(s) == settings.names.join(","));
    if expires <= now || !for_our_names || secret.and_then(ca_bundle).is_none() {
        return Step::Issue;
    }
    if secret.is_some_and(|s| pair(s, NEXT_CRT, NEXT_KEY).is_some()) {
        let overlap = SignedDuration::try_from(settings.overlap).unwrap_or_default();
        return match trusted_since.map(|since| since + overlap) {
            Some(ready) if ready <= now => Step::Promote,
            Some(ready) => Step::Wait(ready),
            None => Step::WaitForTrust(expires),
        };
    }
    let renew = expires - settings.lifetime / 3;
    if renew <= now { Step::Prepare } else { Step::Wait(renew) }
}

/// Whether every entry of the webhook configuration trusts all that the Secret's `ca.crt` holds.
fn trusts_next(configuration: Option<&MutatingWebhookConfiguration>, secret: &Secret) -> bool {
    let bundle = ca_bundle(secret);
    bundle.is_some()
        && configuration.is_some_and(|c| {
            c.webhooks.iter().flatten().all(|w| w.client_config.ca_bundle.as_ref() == bundle)
        })
}

async fn perform(
    api: &Api<Secret>,
    settings: &Settings,
    current: Option<&Secret>,
    step: &Step,
) -> Result<(), IssueError> {
    let old = |key: &str| current.and_then(|s| s.data.as_ref()?.get(key)).map(|b| b.0.clone());
    let mut data: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    match step {
        Step::Wait(_) | Step::WaitForTrust(_) | Step::LeaveAlone => return Ok(()),
        Step::Issue => {
            let issued = issue(settings)?;
            info!(names = ?settings.names, "issuing the serving certificate");
            data.extend([(CRT, issued.crt), (KEY, issued.key), (CA, issued.ca)]);
        }
        Step::Prepare => {
            let issued = issue(settings)?;
            info!("renewing the serving certificate: its new CA joins the old one");
            let trusted =
                [old(CA).map(|old| live(&old, Timestamp::now())).unwrap_or_default(), issued.ca].concat();
            data.extend([(CA, trusted), (NEXT_CRT, issued.crt), (NEXT_KEY, issued.key)]);
            data.extend([CRT, KEY].into_iter().filter_map(|key| Some((key, old(key)?))));
        }
        Step::Promote => {
            info!("renewing the serving certificate: the new leaf takes over");
            let moves = [(CRT, NEXT_CRT), (KEY, NEXT_KEY), (CA, CA)];
            data.extend(moves.into_iter().filter_map(|(to, from)| Some((to, old(from)?))));
        }
    }
    let data = data.into_iter().map(|(k, v)| (k.to_owned(), ByteString(v))).collect();
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(settings.secret.clone()),
            labels: Some(
                [pair(MANAGED_BY.0, MANAGED_BY.1), pair("app.kubernetes.io/name", "ecr-cname")].into(),
            ),
            annotations: Some([pair(NAMES, &settings.names.join(","))].into()),
            // Were there two leaders, the second would fail here and look again.
            resource_version: current.and_then(|s| s.metadata.resource_version.clone()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    let written = match current {
        Some(_) => {
            let params = PatchParams::apply(FIELD_MANAGER).force();
            bounded(api.patch(&settings.secret, &params, &Patch::Apply(&secret))).await
        }
        // Where one has come to be meanwhile, this is a conflict.
        None => {
            let params =
                PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
            bounded(api.create(&params, &secret)).await
        }
    };
    written
        .map_err(|source| IssueError::Write { name: settings.secret.clone(), source: Box::new(source) })?;
    Ok(())
}

/// The annotation that says for which names the certificate is.
const NAMES: &str = "ecr-cname.dev/certificate-names";

fn names_of(secret: &Secret) -> &str {
    secret.metadata.annotations.as_ref().and_then(|a| a.get(NAMES)).map_or("", String::as_str)
}

/// The certificates of a PEM bundle that have not expired.
fn live(bundle: &[u8], now: Timestamp) -> Vec<u8> {
    let certificates = CertificateDer::pem_slice_iter(bundle).filter_map(Result::ok);
    let live = certificates.filter(|der| not_after(der).is_ok_and(|expires| expires > now));
    live.map(|der| pem(&der)).collect::<String>().into_bytes()
}

fn pem(der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap_or_default()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// A certificate (DER) and its key (PEM) in a Secret.
fn pair<'a>(secret: &'a Secret, crt: &str, key: &str) -> Option<(CertificateDer<'static>, &'a ByteString)> {
    let data = secret.data.as_ref()?;
    let certificate = CertificateDer::from_pem_slice(&data.get(crt)?.0).ok()?;
    Some((certificate, data.get(key)?))
}

struct Issued {
    crt: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

fn issue(settings: &Settings) -> Result<Issued, IssueError> {
    // A little in the past, for nodes whose clock is behind.
    let now = Timestamp::now();
    let from = time_of(now - SignedDuration::from_mins(5));
    let until = time_of(now + settings.lifetime);
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.distinguished_name = named("ecr-cname webhook CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (ca.not_before, ca.not_after) = (from, until);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let mut leaf = CertificateParams::new(settings.names.clone())?;
    leaf.distinguished_name = named("ecr-cname webhook");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    (leaf.not_before, leaf.not_after) = (from, until);
    let key = KeyPair::generate()?;
    let leaf = leaf.signed_by(&key, &ca)?;
    Ok(Issued {
        crt: leaf.pem().into_bytes(),
        key: key.serialize_pem().into_bytes(),
        ca: ca.pem().into_bytes(),
    })
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    // The serial tells one CA from the next where a client looks them up by name.
    names.push(DnType::CommonName, format!("{name} {:08x}", fastrand::u32(..)));
    names
}

fn time_of(at: Timestamp) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(at.as_second()).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            secret: "ecr-cname-tls".to_owned(),
            names: vec!["ecr-cname-webhook.ecr-cname.svc".to_owned()],
            lifetime: SignedDuration::from_hours(30),
            overlap: Duration::from_secs(60),
        }
    }

    fn secret(data: &[(&str, Vec<u8>)]) -> Secret {
        let mut secret = Secret::default();
        secret.metadata.labels = Some([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into());
        secret.metadata.annotations = Some([(NAMES.to_owned(), settings().names.join(","))].into());
        secret.data = Some(data.iter().map(|(k, v)| ((*k).to_owned(), ByteString(v.clone()))).collect());
        secret
    }

    #[test]
    fn a_certificate_is_renewed_in_two_steps_and_never_without_trust() {
        let settings = settings();
        let now = Timestamp::now();
        let issued = issue(&settings).unwrap();
        let serving = [(CRT, issued.crt.clone()), (KEY, issued.key.clone()), (CA, issued.ca.clone())];
        assert_eq!(step(None, &settings, None, now), Step::Issue);
        assert_eq!(step(Some(&secret(&serving[..1])), &settings, None, now), Step::Issue);
        assert!(matches!(step(Some(&secret(&serving)), &settings, None, now), Step::Wait(_)));
        let soon = now + SignedDuration::from_hours(21);
        assert_eq!(step(Some(&secret(&serving)), &settings, None, soon), Step::Prepare);
        let next = issue(&settings).unwrap();
        let both = [&serving[..], &[(NEXT_CRT, next.crt), (NEXT_KEY, next.key)]].concat();
        assert!(matches!(step(Some(&secret(&both)), &settings, None, soon), Step::WaitForTrust(_)));
        let trusted = Some(soon);
        assert!(matches!(step(Some(&secret(&both)), &settings, trusted, soon), Step::Wait(_)));
        assert_eq!(
            step(Some(&secret(&both)), &settings, trusted, soon + SignedDuration::from_secs(60)),
            Step::Promote
        );
        let late = now + SignedDuration::from_hours(31);
        assert_eq!(step(Some(&secret(&both)), &settings, None, late), Step::Issue);
        let mut foreign = secret(&serving);
        foreign.metadata.labels = None;
        assert_eq!(step(Some(&foreign), &settings, None, late), Step::LeaveAlone);
        let renamed = Settings { names: vec!["other".to_owned()], ..settings };
        assert_eq!(step(Some(&secret(&serving)), &renamed, None, now), Step::Issue);
    }

    #[test]
    fn expired_authorities_leave_the_bundle() {
        let issued = issue(&settings()).unwrap();
        let now = Timestamp::now();
        assert_eq!(live(&issued.ca, now), issued.ca);
        assert!(live(&issued.ca, now + SignedDuration::from_hours(31)).is_empty());
    }
}
