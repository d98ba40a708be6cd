//! Headers as routes and proxies treat them: looked at, changed, taken away at each hop.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use mesh_core::route::{request::Headers, rewrite::HeaderEdit, variables::HeaderText};

/// Headers as routes see them.
pub(super) struct Fields<'a>(pub(super) &'a HeaderMap);

impl Headers for Fields<'_> {
    fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8])) {
        for value in self.0.get_all(name) {
            each(value.as_bytes());
        }
    }
}

/// Headers that a `connection` header cannot take away: they say what the message is, or (`te`) are looked at below.
const KEPT: [HeaderName; 5] =
    [header::HOST, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::AUTHORIZATION, header::TE];

/// `content-type` of gRPC.
pub(super) const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// `host`, which every request has that is routed; empty where it is no text.
pub(super) fn host(headers: &HeaderMap) -> &str {
    headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default()
}

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
            switch = protocols(headers);
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

/// The protocols that a message would switch to, without those that would only hide requests from the rules: further
/// HTTP (RFC 9113 deprecates `h2c` by upgrade; a request is as good in HTTP/1.1) and TLS.
fn protocols(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut kept: Vec<u8> = Vec::new();
    for line in headers.get_all(header::UPGRADE) {
        for token in line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if is_switch(token) {
                if !kept.is_empty() {
                    kept.extend_from_slice(b", ");
                }
                kept.extend_from_slice(token);
            }
        }
    }
    if kept.is_empty() { None } else { HeaderValue::from_bytes(&kept).ok() }
}

/// Whether a protocol may be switched to.
pub(super) fn is_switch(protocol: &[u8]) -> bool {
    let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default();
    let hides = [&b"h2"[..], b"h2c", b"http", b"tls"].iter().any(|own| name.eq_ignore_ascii_case(own));
    !name.is_empty() && !hides
}

/// Whether a protocol that a server switches to is one that it was asked for.
pub(super) fn is_asked_for(answered: &HeaderValue, asked: &HeaderValue) -> bool {
    let mut tokens = asked.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    tokens.any(|token| token.eq_ignore_ascii_case(answered.as_bytes().trim_ascii()))
}

/// Whether a client wants to know whether its body is wanted before it sends it.
pub(super) fn asks_first(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|expect| expect.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Makes one `cookie` header of several: clients of HTTP/2 may split it, servers of HTTP/1 and rules know one (RFC 9113
/// §8.2.3).
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(header::COOKIE).iter();
    let (Some(first), Some(second)) = (lines.next(), lines.next()) else { return };
    let mut joined = first.as_bytes().to_vec();
    for line in std::iter::once(second).chain(lines) {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(line.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Makes the changes of a rule, with the values of those that have variables. What is no header is left out: the compiler has said so
/// already.
pub(super) fn edit<'a>(
    headers: &mut HeaderMap,
    edits: impl Iterator<Item = HeaderEdit<'a>>,
    filled: Vec<Option<HeaderValue>>,
) {
    let mut filled = filled.into_iter();
    let mut value_of = |text: &HeaderText| match text {
        HeaderText::Plain(text) => HeaderValue::try_from(&**text).ok(),
        HeaderText::Template(_) => filled.next().flatten(),
    };
    for edit in edits {
        match edit {
            HeaderEdit::Set(name, text) => {
                if let (Some(value), Ok(name)) = (value_of(text), HeaderName::try_from(name)) {
                    headers.insert(name, value);
                }
            }
            HeaderEdit::Add(name, text) => {
                if let (Some(value), Ok(name)) = (value_of(text), HeaderName::try_from(name)) {
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
    fn a_switch_to_more_http_is_not_passed_on() {
        for (asked, kept) in [
            ("websocket", Some("websocket")),
            ("h2c", None),
            ("H2C, websocket", Some("websocket")),
            ("HTTP/2.0, foo/1", Some("foo/1")),
            ("TLS/1.2", None),
            (" , ", None),
        ] {
            let mut headers = map(&[("connection", "upgrade"), ("upgrade", asked)]);
            let switch = strip_hop_by_hop(&mut headers);
            assert_eq!(switch.as_ref().map(HeaderValue::as_bytes), kept.map(str::as_bytes), "{asked}");
        }
        let mut headers =
            map(&[("connection", "upgrade"), ("upgrade", "a"), ("upgrade", "h2c"), ("upgrade", "b")]);
        assert_eq!(strip_hop_by_hop(&mut headers).unwrap(), "a, b");
        let asked = HeaderValue::from_static("a, WebSocket");
        assert!(is_asked_for(&HeaderValue::from_static("websocket"), &asked));
        assert!(!is_asked_for(&HeaderValue::from_static("h2c"), &asked));
    }

    #[test]
    fn te_survives_being_named_as_hop_by_hop() {
        let mut headers = map(&[("connection", "te, x"), ("te", "trailers"), ("x", "1")]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("te", "trailers")]));
    }

    #[test]
    fn cookies_become_one_header() {
        let mut headers = map(&[("cookie", "a=1"), ("x", "1"), ("cookie", "b=2"), ("cookie", "c=3")]);
        join_cookies(&mut headers);
        assert_eq!(headers, map(&[("cookie", "a=1; b=2; c=3"), ("x", "1")]));
        join_cookies(&mut headers);
        assert_eq!(headers["cookie"], "a=1; b=2; c=3");
    }

    #[test]
    fn edits_set_add_and_remove() {
        let mut headers = map(&[("a", "1"), ("a", "2"), ("b", "3"), ("c", "4")]);
        let (x, y) = (HeaderText::from("x"), HeaderText::from("y"));
        let edits = [HeaderEdit::Set("a", &x), HeaderEdit::Add("b", &y), HeaderEdit::Remove("c")];
        edit(&mut headers, edits.into_iter(), Vec::new());
        assert_eq!(headers, map(&[("a", "x"), ("b", "3"), ("b", "y")]));
    }

    #[test]
    fn a_variable_without_a_value_leaves_what_is_there() {
        let mut headers = map(&[("a", "1"), ("b", "2")]);
        let text = HeaderText::parse("%PROTOCOL%").unwrap();
        let edits = [HeaderEdit::Set("a", &text), HeaderEdit::Set("b", &text), HeaderEdit::Add("b", &text)];
        let filled = vec![None, Some(HeaderValue::from_static("x")), None];
        edit(&mut headers, edits.into_iter(), filled);
        assert_eq!(headers, map(&[("a", "1"), ("b", "x")]));
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
