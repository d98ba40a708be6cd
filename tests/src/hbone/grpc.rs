//! As much of gRPC as a request for a certificate needs: one unary call of Istio's certificate service, its messages
//! written by hand.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{Method, Request};

use super::{HboneError, Session, http2_error, within};
use crate::authority::Credentials;
use crate::place::Place;

/// How a unary call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallOutcome {
    /// `grpc-status`: 0 is good.
    pub status: u32,
    /// `grpc-message`.
    pub message: String,
    /// PEM certificates of the answer, leaf first.
    pub chain: Vec<String>,
}

/// Ask the certificate service at `to` for what `csr_pem` says, with `token`, without a client certificate.
///
/// # Errors
/// When the service cannot be reached or speaks no gRPC.
pub fn request_certificate(
    from: &Place,
    to: SocketAddr,
    trust: &Credentials,
    token: &str,
    csr_pem: &str,
) -> Result<CallOutcome, HboneError> {
    ask(&Session::open_anonymously(from, to, trust)?, to, token, csr_pem)
}

/// As [`request_certificate`], from the namespace that the test itself is in.
///
/// # Errors
/// As [`request_certificate`].
pub fn request_certificate_here(
    to: SocketAddr,
    trust: &Credentials,
    token: &str,
    csr_pem: &str,
) -> Result<CallOutcome, HboneError> {
    ask(&Session::open_anonymously_here(to, trust)?, to, token, csr_pem)
}

fn ask(session: &Session, to: SocketAddr, token: &str, csr_pem: &str) -> Result<CallOutcome, HboneError> {
    let mut message = BytesMut::new();
    // IstioCertificateRequest.csr = 1, validity_duration = 3.
    put_bytes(&mut message, 1, csr_pem.as_bytes());
    message.put_slice(&[3 << 3]);
    put_varint(&mut message, 3600);
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.extend_from_slice(&message);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("https://{to}/istio.v1.auth.IstioCertificateService/CreateCertificate"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"))
        .body(())?;
    let sender = session.sender();
    within("an answer of the certificate service", async {
        let mut sender = sender.ready().await.map_err(http2_error("open a stream"))?;
        let (answer, mut send) = sender.send_request(request, false).map_err(http2_error("send a call"))?;
        send.send_data(framed.freeze(), true).map_err(http2_error("send a call"))?;
        let (head, mut body) = answer.await.map_err(http2_error("wait for an answer"))?.into_parts();
        let mut received = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data.map_err(http2_error("receive an answer"))?;
            let released = body.flow_control().release_capacity(data.len());
            released.map_err(http2_error("open the window"))?;
            received.extend_from_slice(&data);
        }
        let trailers = body.trailers().await.map_err(http2_error("receive trailers"))?.unwrap_or_default();
        let field = |name: &str| {
            let value = trailers.get(name).or_else(|| head.headers.get(name));
            value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let status = field("grpc-status").and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| HboneError::Gibberish(format!("{head:?} {trailers:?}")))?;
        let message = field("grpc-message").unwrap_or_default();
        // IstioCertificateResponse.cert_chain = 1, behind the five bytes of the frame.
        let chain =
            received.get(5..).map(|bytes| repeated_text(Bytes::copy_from_slice(bytes))).unwrap_or_default();
        Ok(CallOutcome { status, message, chain })
    })
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn put_bytes(out: &mut BytesMut, field: u8, bytes: &[u8]) {
    out.put_u8((field << 3) | 2);
    put_varint(out, bytes.len() as u64);
    out.put_slice(bytes);
}

/// The texts of field 1; anything else ends it.
fn repeated_text(bytes: Bytes) -> Vec<String> {
    let mut texts = Vec::new();
    let mut at = 0;
    while bytes.get(at) == Some(&((1 << 3) | 2)) {
        at += 1;
        let (mut length, mut shift) = (0usize, 0);
        while let Some(byte) = bytes.get(at) {
            at += 1;
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 || shift > 28 {
                break;
            }
        }
        let Some(text) = bytes.get(at..at + length) else { break };
        texts.push(String::from_utf8_lossy(text).into_owned());
        at += length;
    }
    texts
}
