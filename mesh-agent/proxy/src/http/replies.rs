//! Responses that are made here, with the statuses and texts of Istio's proxy.
//!
//! Invariant: a gRPC client gets a `grpc-status` in a response of status 200, whatever happened.

use std::fmt::Write as _;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use super::{body::Body, exchange::Failure, fields};

/// A response of ours with a text.
pub(super) fn text(status: u16, text: impl Into<Bytes>) -> Response<Body> {
    let body = Body::full(text);
    let is_empty = matches!(body, Body::Empty);
    let mut response = Response::new(body);
    *response.status_mut() = code(status);
    let headers = response.headers_mut();
    if !is_empty {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    name_server(headers);
    response
}

/// A redirect.
pub(super) fn redirect(status: u16, location: &str) -> Response<Body> {
    let mut response = text(status, Bytes::new());
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A response for a request that no server answered.
pub(super) fn failure(failure: &Failure, grpc: bool) -> Response<Body> {
    let mut response = if grpc {
        grpc_status(grpc_code(failure.status), &failure.text)
    } else {
        text(failure.status, failure.text.clone().into_owned())
    };
    if failure.overloaded {
        response.headers_mut().insert("x-envoy-overloaded", HeaderValue::from_static("true"));
    }
    response
}

/// A response of ours to any client: gRPC's get the status as they know it.
pub(super) fn any(status: u16, message: &'static str, grpc: bool) -> Response<Body> {
    if grpc { grpc_status(grpc_code(status), message) } else { text(status, message) }
}

/// A gRPC response that is nothing but a status.
pub(super) fn grpc_status(code: u8, message: &str) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, fields::GRPC);
    headers.insert("grpc-status", HeaderValue::from(u16::from(code)));
    if let Some(message) = grpc_message(message) {
        headers.insert("grpc-message", message);
    }
    name_server(headers);
    response
}

fn name_server(headers: &mut HeaderMap) {
    headers.insert(header::SERVER, HeaderValue::from_static("nodemesh"));
}

fn code(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// The gRPC code for an HTTP status.
fn grpc_code(status: u16) -> u8 {
    match status {
        200..=299 => 0,
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// A message as headers can carry it: percent-encoded.
fn grpc_message(message: &str) -> Option<HeaderValue> {
    if message.is_empty() {
        return None;
    }
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // A `String` takes everything.
            // Writing to a string cannot fail.
            write!(encoded, "%{byte:02X}").ok();
        }
    }
    HeaderValue::try_from(encoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::exchange::Flag;

    fn overflow() -> Failure {
        Failure {
            status: 503,
            flag: Flag::Overflow,
            details: "overflow",
            text: "100 % full".into(),
            overloaded: true,
        }
    }

    #[test]
    fn a_failure_is_a_status_with_a_text() {
        let response = failure(&overflow(), false);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["x-envoy-overloaded"], "true");
        assert_eq!(response.headers()["content-type"], "text/plain");
    }

    #[test]
    fn grpc_clients_get_a_grpc_status() {
        let response = failure(&overflow(), true);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(response.headers()["grpc-message"], "100 %25 full");
        for (status, code) in [(404, 12), (401, 16), (403, 7), (500, 2), (504, 14), (400, 13)] {
            assert_eq!(grpc_code(status), code);
        }
    }
}
