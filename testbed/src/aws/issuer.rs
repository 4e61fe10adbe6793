//! Web identity tokens, checked as STS checks them.

use std::time::Duration;

use anyhow::Result;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use tokio::time::timeout;

use super::protocol::ApiError;

/// The audience that STS wants.
pub(super) const AUDIENCE: &str = "sts.amazonaws.com";

const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// An OIDC provider whose tokens are trusted, as IAM has it registered.
#[derive(Clone)]
pub struct Issuer {
    url: String,
    keys: Keys,
}

#[derive(Clone)]
enum Keys {
    None,
    ApiServer(Box<kube::Config>),
}

impl Issuer {
    /// Nobody: there are no web identities, only credentials that the stand-in issued.
    pub fn none() -> Self {
        Self { url: "https://nobody.invalid".into(), keys: Keys::None }
    }

    /// An API server: `url` is what it writes into its tokens, `config` how to ask it for its keys.
    pub fn api_server(url: &str, config: kube::Config) -> Self {
        Self { url: url.into(), keys: Keys::ApiServer(Box::new(config)) }
    }

    /// What the provider calls itself.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The subject of a token that is good, and will be for a while.
    pub(super) async fn verify(&self, token: &str, ahead: Duration) -> Result<String, ApiError> {
        // A new look at the keys each time: an API server that is down shows as it would at AWS.
        let keys = match &self.keys {
            Keys::None => JwkSet { keys: Vec::new() },
            Keys::ApiServer(config) => fetch(config).await.map_err(|error| {
                ApiError::new(
                    400,
                    "IDPCommunicationError",
                    format!("cannot get the keys of {}: {error:#}", self.url),
                )
            })?,
        };
        verify(token, &keys, &self.url, ahead)
    }
}

async fn fetch(config: &kube::Config) -> Result<JwkSet> {
    let client = kube::Client::try_from(config.clone())?;
    let request = hyper::Request::get("/openid/v1/jwks").body(Vec::new())?;
    let keys = timeout(FETCH_TIMEOUT, client.request_text(request)).await??;
    Ok(serde_json::from_str(&keys)?)
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
}

/// Checks signature, times, issuer and audience.
fn verify(token: &str, keys: &JwkSet, issuer: &str, ahead: Duration) -> Result<String, ApiError> {
    let invalid = |message: &str| ApiError::new(400, "InvalidIdentityToken", message);

    let header = decode_header(token).map_err(|_| invalid("The ID Token provided is not a valid JWT."))?;
    let key = header
        .kid
        .as_deref()
        .and_then(|kid| keys.find(kid))
        .ok_or_else(|| invalid("Couldn't retrieve verification key from your identity provider"))?;
    let key =
        DecodingKey::from_jwk(key).map_err(|_| invalid("The key of the identity provider is unusable"))?;

    // The key has a family of its own, which the algorithm that the token names must fit.
    let mut validation = Validation::new(header.alg);
    validation.leeway = 0;
    validation.reject_tokens_expiring_in_less_than = ahead.as_secs();
    validation.validate_nbf = true;
    validation.set_audience(&[AUDIENCE]);
    validation.set_issuer(&[issuer]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    match decode::<Claims>(token, &key, &validation) {
        Ok(token) => Ok(token.claims.sub),
        Err(error) => Err(match error.kind() {
            ErrorKind::ExpiredSignature => {
                ApiError::new(400, "ExpiredTokenException", "Token must not be expired")
            }
            ErrorKind::InvalidAudience => invalid("Incorrect token audience"),
            ErrorKind::InvalidIssuer => {
                invalid("No OpenIDConnect provider found in your account for the issuer")
            }
            ErrorKind::InvalidSignature => invalid("Signature of the ID Token is invalid"),
            _ => invalid(&format!("The ID Token provided is not acceptable: {error}")),
        }),
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::jwk::Jwk;
    use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
    use rcgen::KeyPair;
    use serde_json::{Value, json};

    use super::*;

    struct Signer {
        key: EncodingKey,
        jwk: Jwk,
    }

    impl Signer {
        fn new() -> Result<Self> {
            let key = EncodingKey::from_ec_der(&KeyPair::generate()?.serialize_der());
            let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256)?;
            jwk.common.key_id = Some("key".into());
            Ok(Self { key, jwk })
        }

        fn sign(&self, claims: &Value) -> Result<String> {
            let header = Header { kid: Some("key".into()), ..Header::new(Algorithm::ES256) };
            Ok(encode(&header, claims, &self.key)?)
        }
    }

    #[test]
    fn every_claim_counts() -> Result<()> {
        crate::install_crypto_provider();
        let (signer, stranger) = (Signer::new()?, Signer::new()?);
        let keys = JwkSet { keys: vec![signer.jwk.clone()] };
        let now = get_current_timestamp();
        let good = json!({"iss": "https://issuer", "aud": [AUDIENCE], "sub": "me", "exp": now + 60});
        let check = |signer: &Signer, name: &str, value: Value| {
            let mut claims = good.clone();
            claims[name] = value;
            Ok::<_, anyhow::Error>(
                verify(&signer.sign(&claims)?, &keys, "https://issuer", Duration::ZERO).map_err(|e| e.code),
            )
        };

        assert_eq!(check(&signer, "sub", json!("me"))?, Ok("me".into()));
        assert_eq!(check(&signer, "exp", json!(now - 1))?, Err("ExpiredTokenException"));
        assert_eq!(check(&signer, "nbf", json!(now + 60))?, Err("InvalidIdentityToken"));
        assert_eq!(check(&signer, "aud", json!(["https://issuer"]))?, Err("InvalidIdentityToken"));
        assert_eq!(check(&signer, "iss", json!("https://other"))?, Err("InvalidIdentityToken"));
        assert_eq!(check(&signer, "sub", Value::Null)?, Err("InvalidIdentityToken"));
        assert_eq!(check(&stranger, "sub", json!("me"))?, Err("InvalidIdentityToken"));
        let no_keys = JwkSet { keys: Vec::new() };
        let token = signer.sign(&good)?;
        let unknown = verify(&token, &no_keys, "https://issuer", Duration::ZERO).map_err(|error| error.code);
        assert_eq!(unknown, Err("InvalidIdentityToken"));
        let later = verify(&token, &keys, "https://issuer", Duration::from_secs(61));
        assert_eq!(later.map_err(|error| error.code), Err("ExpiredTokenException"));
        Ok(())
    }
}
