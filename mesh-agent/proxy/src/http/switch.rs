//! Connections and streams that switch protocols: WebSocket and other upgrades of HTTP/1.1, CONNECT, and both of them in HTTP/2.
//!
//! Invariants:
//! - Bytes of the new protocol flow only after the server agreed and the client was told so.
//! - What the client sent early is not lost, and not taken for a request.

use std::rc::Rc;

use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use hyper::{body::Incoming, ext::Protocol, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    task::spawn_local,
};

use super::{body::Body, client_io::ClientIo, exchange::Upgraded, session::Session};
use crate::close::CloseReason;

const WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// A stream of HTTP/2 that asks for a tunnel (RFC 9113 §8.5) or for another protocol (RFC 8441).
pub(super) struct Http2Switch {
    protocol: Option<HeaderValue>,
    stream: OnUpgrade,
}

impl Http2Switch {
    /// What a request asks for, if it is a CONNECT.
    pub(super) fn of(request: &mut Request<Incoming>) -> Option<Self> {
        if request.method() != Method::CONNECT {
            return None;
        }
        let protocol = match request.extensions().get::<Protocol>() {
            Some(protocol) => Some(HeaderValue::try_from(protocol.as_str()).ok()?),
            None => None,
        };
        Some(Self { protocol, stream: hyper::upgrade::on(request) })
    }

    /// The other protocol; `None` for a plain tunnel.
    pub(super) fn protocol(&self) -> Option<&HeaderValue> {
        self.protocol.as_ref()
    }

    /// Makes the request what HTTP/1.1 has for it. `random` is for the key that WebSocket wants there.
    pub(super) fn as_http1(&self, parts: &mut Parts, random: [u64; 2]) {
        if self.protocol.is_none() {
            return;
        }
        parts.method = Method::GET;
        parts.extensions.remove::<Protocol>();
        if !parts.headers.contains_key(WEBSOCKET_KEY)
            && let Ok(key) = HeaderValue::try_from(base64_of(random))
        {
            parts.headers.insert(WEBSOCKET_KEY, key);
        }
    }

    /// Tells the client that the server agreed, and lets bytes flow.
    pub(super) fn answer(
        self,
        session: &Rc<Session>,
        mut response: Response<Body>,
        upgraded: Upgraded,
    ) -> Response<Body> {
        *response.status_mut() = StatusCode::OK;
        for name in [header::CONNECTION, header::UPGRADE, WEBSOCKET_ACCEPT] {
            response.headers_mut().remove(name);
        }
        let session = Rc::clone(session);
        let open = session.live.begin_request();
        // Ends with the stream, which ends with the connection at the latest.
        drop(spawn_local(async move {
            if let Ok(stream) = self.stream.await {
                relay(&mut TokioIo::new(stream), &[], upgraded).await;
            }
            drop((session, open));
        }));
        response.map(|_| Body::Empty)
    }
}

/// 16 bytes in base64, as a WebSocket's key is.
fn base64_of(words: [u64; 2]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes = [words[0].to_be_bytes(), words[1].to_be_bytes()].concat();
    let mut text = String::with_capacity(24);
    for three in bytes.chunks(3) {
        let word =
            three.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for sextet in 0..4 {
            if sextet <= three.len() {
                text.push(char::from(ALPHABET[(word >> (18 - 6 * sextet) & 63) as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// Carries the bytes of a connection that has switched protocols; `early` are those that came with the last request.
pub(super) async fn carry(session: &Rc<Session>, early: &[u8], upgraded: Upgraded) -> CloseReason {
    session.socket.borrow_mut().guard.switched();
    let _open = session.live.begin_request();
    relay(&mut TokioIo::new(ClientIo(Rc::clone(session))), early, upgraded).await
}

async fn relay(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    early: &[u8],
    Upgraded(mut server): Upgraded,
) -> CloseReason {
    if server.write_all(early).await.is_err() || server.flush().await.is_err() {
        return CloseReason::UpstreamReset;
    }
    match copy_bidirectional(client, &mut server).await {
        Ok(_) => CloseReason::Finished,
        Err(_) => CloseReason::UpstreamReset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sixteen_bytes_in_base64() {
        assert_eq!(base64_of([0x7468_6520_7361_6d70, 0x6c65_206e_6f6e_6365]), "dGhlIHNhbXBsZSBub25jZQ==");
    }
}
