//! The two wire protocols: requests in, answers out.

use std::collections::HashMap;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use hyper::{Response, StatusCode};

/// The operations that the stand-in knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// STS: a role for a token of the cluster.
    AssumeRoleWithWebIdentity,
    /// STS: a role for another role.
    AssumeRole,
    /// ECR: a token for `docker login`.
    GetAuthorizationToken,
}

impl Operation {
    /// The service in the scope of a signature.
    pub(super) fn service(self) -> &'static str {
        match self {
            Self::AssumeRoleWithWebIdentity | Self::AssumeRole => "sts",
            Self::GetAuthorizationToken => "ecr",
        }
    }
}

/// A request, understood as far as its protocol goes.
pub(super) struct Request {
    pub(super) operation: Operation,
    /// The parameters of the query protocol.
    pub(super) parameters: HashMap<String, String>,
    pub(super) signature: Option<Signature>,
}

/// Who signed a request, and for where.
pub(super) struct Signature {
    pub(super) access_key_id: String,
    pub(super) region: String,
    pub(super) service: String,
    pub(super) session_token: Option<String>,
}

impl Request {
    /// Reads a request of either protocol.
    pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, ApiError> {
        let signature = Signature::read(headers);
        if let Some(target) = headers.get("x-amz-target") {
            let operation = match target.as_bytes() {
                b"AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" => {
                    Operation::GetAuthorizationToken
                }
                _ => return Err(ApiError::new(400, "UnknownOperationException", "")),
            };
            return Ok(Self { operation, parameters: HashMap::new(), signature });
        }
        let parameters: HashMap<String, String> = form_urlencoded::parse(body).into_owned().collect();
        let operation = match parameters.get("Action").map(String::as_str) {
            Some("AssumeRoleWithWebIdentity") => Operation::AssumeRoleWithWebIdentity,
            Some("AssumeRole") => Operation::AssumeRole,
            Some(other) => {
                let message = format!("Could not find operation {other} for version 2011-06-15");
                return Err(ApiError::new(400, "InvalidAction", message));
            }
            None => return Err(ApiError::new(400, "MissingAction", "Missing Action")),
        };
        Ok(Self { operation, parameters, signature })
    }

    /// A parameter that must be there.
    pub(super) fn parameter(&self, name: &str) -> Result<&str, ApiError> {
        self.parameters.get(name).map(String::as_str).ok_or_else(|| {
            let message =
                format!("Value null at '{name}' failed to satisfy constraint: Member must not be null");
            ApiError::new(400, "ValidationError", message)
        })
    }
}

impl Signature {
    /// `AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, …`
    fn read(headers: &HeaderMap) -> Option<Self> {
        let authorization = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("AWS4-HMAC-SHA256 ")?;
        let credential = authorization.split(',').find_map(|part| part.trim().strip_prefix("Credential="))?;
        let mut parts = credential.split('/');
        let (access_key_id, _date) = (parts.next()?.into(), parts.next()?);
        let (region, service) = (parts.next()?.into(), parts.next()?.into());
        let session_token =
            headers.get("x-amz-security-token").and_then(|token| token.to_str().ok()).map(str::to_owned);
        Some(Self { access_key_id, region, service, session_token })
    }
}

/// A refusal, with the code that AWS gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: u16,
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl ApiError {
    pub(super) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }
}

/// An answer in JSON 1.1.
pub(super) fn json(status: u16, body: &serde_json::Value) -> Response<Full<Bytes>> {
    response(status, "application/x-amz-json-1.1", body.to_string())
}

/// An answer in XML.
pub(super) fn xml(status: u16, body: String) -> Response<Full<Bytes>> {
    response(status, "text/xml", body)
}

/// Any answer.
pub(super) fn response(
    status: u16,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

/// An error in the words of the operation's protocol.
pub(super) fn error(operation: Option<Operation>, error: &ApiError) -> Response<Full<Bytes>> {
    let ApiError { status, code, message } = error;
    if operation == Some(Operation::GetAuthorizationToken) {
        return json(*status, &serde_json::json!({ "__type": code, "message": message }));
    }
    let kind = if *status < 500 { "Sender" } else { "Receiver" };
    let message = escape(message);
    xml(
        *status,
        format!(
            r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>{kind}</Type><Code>{code}</Code><Message>{message}</Message></Error><RequestId>stand-in</RequestId></ErrorResponse>"#
        ),
    )
}

/// Text as XML has it.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, Result};
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn reads_who_signed() -> Result<()> {
        let mut headers = HeaderMap::new();
        let authorization = "AWS4-HMAC-SHA256 Credential=ASIA1/20260101/eu-west-1/ecr/aws4_request, SignedHeaders=host, Signature=00";
        headers.insert(AUTHORIZATION, HeaderValue::from_static(authorization));
        headers.insert("x-amz-security-token", HeaderValue::from_static("session"));
        let signature = Signature::read(&headers).context("no signature")?;
        assert_eq!(signature.access_key_id, "ASIA1");
        assert_eq!(signature.region, "eu-west-1");
        assert_eq!(signature.service, "ecr");
        assert_eq!(signature.session_token.as_deref(), Some("session"));
        Ok(())
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let refused =
            |body: &str| Request::read(&HeaderMap::new(), body.as_bytes()).err().map(|error| error.code);
        assert_eq!(refused("Action=DeleteEverything"), Some("InvalidAction"));
        assert_eq!(refused(""), Some("MissingAction"));
    }
}
