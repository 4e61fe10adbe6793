//! STS.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;

use super::Shared;
use super::credentials::{Credentials, authenticate};
use super::issuer::AUDIENCE;
use super::protocol::{ApiError, Operation, Request, escape, xml};

/// How long credentials live if the caller does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// Credentials of a role for a token of the cluster.
pub(super) async fn assume_role_with_web_identity(
    shared: &Shared,
    request: &Request,
) -> Result<Response<Full<Bytes>>, ApiError> {
    let role = request.parameter("RoleArn")?;
    let ahead = shared.state.borrow().web_identity_ahead;
    let subject = shared.issuer.verify(request.parameter("WebIdentityToken")?, ahead).await?;
    let trusted = shared.state.borrow().trust(role).is_some_and(|trust| trust.subjects.contains(&subject));
    if !trusted {
        let message = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
        return Err(ApiError::new(403, "AccessDenied", message));
    }
    let credentials = issue(shared, request, role)?;
    let (subject, provider) = (escape(&subject), escape(shared.issuer.url()));
    let extra = format!(
        "<SubjectFromWebIdentityToken>{subject}</SubjectFromWebIdentityToken>\
         <Audience>{AUDIENCE}</Audience><Provider>{provider}</Provider>"
    );
    Ok(answer(request.operation, &credentials, &extra))
}

/// Credentials of a role for another role.
pub(super) fn assume_role(shared: &Shared, request: &Request) -> Result<Response<Full<Bytes>>, ApiError> {
    let role = request.parameter("RoleArn")?;
    {
        let state = shared.state.borrow();
        let caller = authenticate(&state, request.operation, request.signature.as_ref())?;
        let external_id = request.parameters.get("ExternalId");
        let trusted = state.trust(role).is_some_and(|trust| {
            trust.roles.contains(&caller.role)
                && trust.external_id.as_ref().is_none_or(|wanted| Some(wanted) == external_id)
        });
        if !trusted {
            let caller = caller.session_arn();
            let message =
                format!("User: {caller} is not authorized to perform: sts:AssumeRole on resource: {role}");
            return Err(ApiError::new(403, "AccessDenied", message));
        }
    }
    let credentials = issue(shared, request, role)?;
    Ok(answer(request.operation, &credentials, ""))
}

fn issue(shared: &Shared, request: &Request, role: &str) -> Result<Credentials, ApiError> {
    let session = request.parameter("RoleSessionName")?;
    let asked = match request.parameters.get("DurationSeconds") {
        Some(seconds) => seconds
            .parse()
            .ok()
            .filter(|seconds| (900..=43_200).contains(seconds))
            .map(Duration::from_secs)
            .ok_or_else(|| ApiError::new(400, "ValidationError", "DurationSeconds must be 900 to 43200"))?,
        None => DEFAULT_LIFETIME,
    };
    shared
        .modify(|state| state.issue_credentials(role, session, asked.min(state.max_session_lifetime)))
        .map_err(|error| ApiError::new(500, "InternalFailure", error.to_string()))
}

fn answer(operation: Operation, credentials: &Credentials, extra: &str) -> Response<Full<Bytes>> {
    let Credentials { access_key_id, secret_access_key, session_token, .. } = credentials;
    let arn = escape(&credentials.session_arn());
    let id = format!("AROASTANDIN:{}", escape(&credentials.session_name));
    let expiration = jiff::Timestamp::try_from(credentials.expires_at).unwrap_or(jiff::Timestamp::MAX);
    xml(
        200,
        format!(
            r#"<{operation:?}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{operation:?}Result><AssumedRoleUser><Arn>{arn}</Arn><AssumedRoleId>{id}</AssumedRoleId></AssumedRoleUser><Credentials><AccessKeyId>{access_key_id}</AccessKeyId><SecretAccessKey>{secret_access_key}</SecretAccessKey><SessionToken>{session_token}</SessionToken><Expiration>{expiration:.0}</Expiration></Credentials>{extra}</{operation:?}Result><ResponseMetadata><RequestId>stand-in</RequestId></ResponseMetadata></{operation:?}Response>"#
        ),
    )
}
