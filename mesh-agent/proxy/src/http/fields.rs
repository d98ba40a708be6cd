//! Headers as routes and proxies treat them: looked at, changed, taken away at each hop.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use mesh_core::route::{request::Headers, rewrite::HeaderEdit};

/// Headers as routes see them.
pub(super) struct Fields<'a>(pub(super) &'a HeaderMap);

impl Headers for Fields<'_> {
    fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8])) {
        for value in self.0.get_all(name) {
            each(value.as_bytes());
        }
    }
}

/// Headers that a `connection` header cannot take away: they say what the message is.
const KEPT: [HeaderName; 4] =
    [header::HOST, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::AUTHORIZATION];

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Takes away what is meant for one hop only (RFC 9110 §7.6.1), and gives the protocol that the message would switch to.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let mut switch = None;
    if headers.contains_key(header::CONNECTION) {
        let mut named: Vec<HeaderName> = Vec::new();
        let mut wants_upgrade = false;
        for line in headers.get_all(header::CONNECTION) {
            for token in line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"upgrade") {
                    wants_upgrade = true;
                } else if !token.eq_ignore_ascii_case(b"close")
                    && !token.eq_ignore_ascii_case(b"keep-alive")
                    && let Ok(name) = HeaderName::from_bytes(token)
                    && !KEPT.contains(&name)
                {
                    named.push(name);
                }
            }
        }
        if wants_upgrade {
            switch = headers.get(header::UPGRADE).cloned();
        }
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    for name in [header::UPGRADE, KEEP_ALIVE, PROXY_CONNECTION, header::TRANSFER_ENCODING, HTTP2_SETTINGS] {
        headers.remove(name);
    }
    // `te: trailers` is the only one that means the same to the next hop (gRPC asks for it).
    if headers.contains_key(header::TE) {
        let trailers = headers.get_all(header::TE).iter().any(|line| {
            let mut tokens = line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            tokens.any(|token| token.eq_ignore_ascii_case(b"trailers"))
        });
        headers.remove(header::TE);
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
    }
    switch
}

/// Makes the changes of a rule. What is no header is left out: the compiler has said so already.
pub(super) fn edit<'a>(headers: &mut HeaderMap, edits: impl Iterator<Item = HeaderEdit<'a>>) {
    for edit in edits {
        match edit {
            HeaderEdit::Set(name, value) => {
                if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
            HeaderEdit::Add(name, value) => {
                if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                    headers.append(name, value);
                }
            }
            HeaderEdit::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}

/// A random UUID for `x-request-id`.
pub(super) fn request_id(words: [u64; 2]) -> Option<HeaderValue> {
    let [high, low] = words;
    let mut text = String::with_capacity(36);
    // A `String` takes everything.
    // Writing to a string cannot fail.
    write!(
        text,
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        low >> 48 & 0x3fff | 0x8000,
        low & 0xffff_ffff_ffff
    )
    .ok();
    HeaderValue::try_from(text).ok()
}

/// Whether a message is gRPC's (and not gRPC-Web's).
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else { return false };
    kind.as_bytes()
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| rest.is_empty() || matches!(rest[0], b'+' | b';' | b' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn what_is_meant_for_one_hop_goes_no_farther() {
        let mut headers = map(&[
            ("connection", "close, X-Own, host"),
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("x-own", "1"),
            ("keep-alive", "5"),
            ("te", "gzip, Trailers"),
            ("transfer-encoding", "chunked"),
            ("host", "web"),
            ("x-other", "2"),
        ]);
        let switch = strip_hop_by_hop(&mut headers);
        assert_eq!(switch.unwrap(), "websocket");
        assert_eq!(headers, map(&[("host", "web"), ("x-other", "2"), ("te", "trailers")]));
        let mut headers = map(&[("upgrade", "websocket"), ("te", "gzip")]);
        assert_eq!(strip_hop_by_hop(&mut headers), None, "without `connection: upgrade` it asks for nothing");
        assert!(headers.is_empty());
    }

    #[test]
    fn edits_set_add_and_remove() {
        let mut headers = map(&[("a", "1"), ("a", "2"), ("b", "3"), ("c", "4")]);
        let edits = [HeaderEdit::Set("a", "x"), HeaderEdit::Add("b", "y"), HeaderEdit::Remove("c")];
        edit(&mut headers, edits.into_iter());
        assert_eq!(headers, map(&[("a", "x"), ("b", "3"), ("b", "y")]));
    }

    #[test]
    fn request_ids_are_random_uuids() {
        let id = request_id([u64::MAX, 0]).unwrap();
        assert_eq!(id, "ffffffff-ffff-4fff-8000-000000000000");
        let id = request_id([0, u64::MAX]).unwrap();
        assert_eq!(id, "00000000-0000-4000-bfff-ffffffffffff");
    }

    #[test]
    fn grpc_web_is_no_grpc() {
        for (kind, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&map(&[("content-type", kind)])), grpc, "{kind}");
        }
    }
}
