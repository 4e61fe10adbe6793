//! The HTTP server.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::anyhow;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use super::Shared;
use super::credentials::authenticate;
use super::fault::Fault;
use super::protocol::{self, ApiError, Operation, Request};
use super::state::Call;
use super::{ecr, sts};

/// No request of these operations comes near.
const MAX_REQUEST: usize = 256 << 10;

type Response = hyper::Response<Full<Bytes>>;

/// Answers requests until dropped.
pub(super) async fn serve(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("testbed: the AWS stand-in cannot listen: {error}"),
    };
    loop {
        // What cannot be accepted is the caller's to notice.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&shared, request));
            // An error is a caller that went away, or a fault that was asked for.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// Answers one request; an error closes the connection.
async fn answer(shared: &Shared, request: hyper::Request<Incoming>) -> anyhow::Result<Response> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, MAX_REQUEST).collect().await.map_err(|error| anyhow!(error))?.to_bytes();
    let request = match Request::read(&head.headers, &body) {
        Ok(request) => request,
        Err(error) => return Ok(protocol::error(None, &error)),
    };
    let operation = request.operation;
    let role = concerned_role(shared, &request);
    let region = request.signature.as_ref().map(|signature| signature.region.clone());
    let fault = shared.state.borrow().fault(operation, role.as_deref(), region.as_deref());
    let record = |answer: String| {
        let call =
            Call { operation, role: role.clone(), region: region.clone(), answer, at: SystemTime::now() };
        shared.modify(|state| state.record_call(call));
    };

    let result = match fault {
        Some(fault @ (Fault::Hang | Fault::CloseConnection | Fault::MalformedBody | Fault::HugeBody)) => {
            record(format!("{fault:?}"));
            return spoil(fault).await;
        }
        Some(Fault::Throttle) => Err(throttled(operation)),
        Some(Fault::ServerError) => Err(failed(operation)),
        Some(Fault::AccessDenied) => Err(denied(operation)),
        Some(Fault::ClockSkew) => Err(skewed(operation)),
        Some(Fault::ExpiredToken | Fault::EmptyToken | Fault::NoToken) | None => match operation {
            Operation::AssumeRoleWithWebIdentity => {
                sts::assume_role_with_web_identity(shared, &request).await
            }
            Operation::AssumeRole => sts::assume_role(shared, &request),
            Operation::GetAuthorizationToken => ecr::get_authorization_token(shared, &request, fault),
        },
    };
    record(result.as_ref().map_or_else(|error| error.code, |_| "OK").into());
    Ok(result.unwrap_or_else(|error| protocol::error(Some(operation), &error)))
}

/// The role to be assumed, or the role that calls.
fn concerned_role(shared: &Shared, request: &Request) -> Option<String> {
    match request.operation {
        Operation::AssumeRoleWithWebIdentity | Operation::AssumeRole => {
            request.parameters.get("RoleArn").cloned()
        }
        operation => {
            let state = shared.state.borrow();
            let caller = authenticate(&state, operation, request.signature.as_ref());
            caller.ok().map(|credentials| credentials.role.clone())
        }
    }
}

async fn spoil(fault: Fault) -> anyhow::Result<Response> {
    match fault {
        Fault::Hang => std::future::pending().await,
        Fault::MalformedBody => Ok(protocol::response(200, "application/x-amz-json-1.1", "<{ not an answer")),
        Fault::HugeBody => {
            Ok(protocol::response(200, "application/x-amz-json-1.1", vec![b' '; Fault::HUGE_BODY]))
        }
        _ => Err(anyhow!("hanging up")),
    }
}

fn throttled(operation: Operation) -> ApiError {
    let code = match operation {
        Operation::GetAuthorizationToken => "ThrottlingException",
        _ => "Throttling",
    };
    ApiError::new(400, code, "Rate exceeded")
}

fn failed(operation: Operation) -> ApiError {
    let code = match operation {
        Operation::GetAuthorizationToken => "ServerException",
        _ => "InternalFailure",
    };
    ApiError::new(500, code, "The server could not serve")
}

fn skewed(operation: Operation) -> ApiError {
    let (status, code) = match operation {
        Operation::GetAuthorizationToken => (400, "InvalidSignatureException"),
        _ => (403, "SignatureDoesNotMatch"),
    };
    let message = "Signature expired: 20260101T000000Z is now earlier than 20260101T001500Z (20260101T002000Z - 5 min.)";
    ApiError::new(status, code, message)
}

fn denied(operation: Operation) -> ApiError {
    let (status, code) = match operation {
        Operation::GetAuthorizationToken => (400, "AccessDeniedException"),
        _ => (403, "AccessDenied"),
    };
    ApiError::new(status, code, format!("The caller is not authorized to perform: {operation:?}"))
}
