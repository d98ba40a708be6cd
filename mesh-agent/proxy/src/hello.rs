//! The server name that a TLS client asks for, read from its first bytes without taking them.
//!
//! Invariants:
//! - Bytes are looked at, never taken: what is relayed begins with them.
//! - Bounded: at most [`HELLO_MAX`] bytes are looked at, for a limited time; whoever sends more, or slower, asks for no name.
//! - Total: no bytes make it panic.
//!
//! Not here: what a name leads to ([`crate::streams`]).

use std::{future::poll_fn, io, task::Poll, time::Duration};

use tokio::time::timeout;

use crate::{stream::Stream, worker::Worker};

/// Bytes of a connection that are looked at: as many as Envoy takes for a ClientHello.
pub(crate) const HELLO_MAX: usize = 16 << 10;

const RECORD_HEAD: usize = 5;
/// Payload of a record at most, expansion by protection included (RFC 8446 §5.2).
const RECORD_MAX: usize = (16 << 10) + 256;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
/// Longest name (RFC 1035).
const NAME_MAX: usize = 255;

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hello {
    /// Too few yet.
    Partial,
    /// Something else.
    NotTls,
    /// A TLS handshake.
    Tls {
        /// The server's name as the client gives it, lower case.
        sni: Option<String>,
    },
}

/// Waits until the first bytes say what they are. Who says nothing in time, or ends, does not speak TLS.
pub(crate) async fn look(worker: &Worker, accepted: &mut Stream, limit: Duration) -> Hello {
    let seen = poll_fn(|cx| {
        accepted.observe(cx);
        if !accepted.has_bytes() {
            return if accepted.is_read_closed() { Poll::Ready(Hello::NotTls) } else { Poll::Pending };
        }
        let peeked = worker.buffers().with_scratch(|scratch| {
            let room = scratch.len().min(HELLO_MAX);
            let count = accepted.socket().peek(&mut scratch[..room])?;
            Ok::<_, io::Error>((count, read(&scratch[..count])))
        });
        match peeked {
            // More bytes make another edge; after the end there is none.
            Ok((0, _)) => Poll::Ready(Hello::NotTls),
            Ok((_, Hello::Partial)) if accepted.is_read_closed() => Poll::Ready(Hello::NotTls),
            Ok((HELLO_MAX.., Hello::Partial)) => Poll::Ready(Hello::Tls { sni: None }),
            Ok((_, Hello::Partial)) => Poll::Pending,
            Ok((_, clear)) => Poll::Ready(clear),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            // The relay will meet it again, and say so.
            Err(_) => Poll::Ready(Hello::NotTls),
        }
    });
    timeout(limit, seen).await.unwrap_or(Hello::NotTls)
}

/// Reads the beginning of a connection.
pub(crate) fn read(bytes: &[u8]) -> Hello {
    let mut message = Vec::new();
    let mut rest = bytes;
    while let Some((kind, tail)) = rest.split_first() {
        // What can be told from few bytes is told at once: others should not wait for more.
        if *kind != HANDSHAKE || tail.first().is_some_and(|major| *major != 3) {
            return Hello::NotTls;
        }
        let Some(head) = rest.get(..RECORD_HEAD) else { break };
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if length == 0 || length > RECORD_MAX {
            return Hello::NotTls;
        }
        let payload = &rest[RECORD_HEAD..];
        let payload = payload.get(..length).unwrap_or(payload);
        message.extend_from_slice(payload);
        rest = &rest[RECORD_HEAD + payload.len()..];
        match whole(&message) {
            Some(Ok(body)) => return Hello::Tls { sni: server_name(body) },
            Some(Err(other)) => return other,
            None => {}
        }
    }
    Hello::Partial
}

/// The message that a handshake begins with, without its head; `None` while it is not whole.
fn whole(message: &[u8]) -> Option<Result<&[u8], Hello>> {
    if *message.first()? != CLIENT_HELLO {
        return Some(Err(Hello::NotTls));
    }
    let length = u32::from_be_bytes([0, *message.get(1)?, *message.get(2)?, *message.get(3)?]) as usize;
    if length > HELLO_MAX {
        return Some(Err(Hello::Tls { sni: None }));
    }
    message.get(4..4 + length).map(Ok)
}

/// The name in a ClientHello; `None` as well for one that cannot be read, which no server will take.
fn server_name(hello: &[u8]) -> Option<String> {
    // Version and random; then session, cipher suites and compression methods.
    let rest = hello.get(34..)?;
    let (_, rest) = vector8(rest)?;
    let (_, rest) = vector16(rest)?;
    let (_, rest) = vector8(rest)?;
    let (mut extensions, _) = vector16(rest)?;
    while let Some((kind, rest)) = extensions.split_first_chunk::<2>() {
        let (content, rest) = vector16(rest)?;
        extensions = rest;
        if u16::from_be_bytes(*kind) != SERVER_NAME {
            continue;
        }
        let (mut names, _) = vector16(content)?;
        while let Some((kind, rest)) = names.split_first() {
            let (name, rest) = vector16(rest)?;
            names = rest;
            if *kind == HOST_NAME {
                return host(name);
            }
        }
        return None;
    }
    None
}

fn host(name: &[u8]) -> Option<String> {
    let is_meant = (1..=NAME_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
    is_meant.then(|| String::from_utf8_lossy(name).to_ascii_lowercase())
}

fn vector8(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

fn vector16(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    /// What rustls sends first.
    fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = name.to_owned().try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    fn tls(sni: Option<&str>) -> Hello {
        Hello::Tls { sni: sni.map(str::to_owned) }
    }

    /// The same handshake in records of so many bytes.
    fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
        let mut records = Vec::new();
        for piece in hello[RECORD_HEAD..].chunks(size) {
            records.extend([HANDSHAKE, 3, 1]);
            records.extend(u16::try_from(piece.len()).unwrap().to_be_bytes());
            records.extend(piece);
        }
        records
    }

    #[test]
    fn the_name_is_found_once_the_hello_is_whole_and_not_before() {
        let hello = hello("API.example.com");
        assert_eq!(read(&hello), tls(Some("api.example.com")));
        for length in 0..hello.len() {
            assert_eq!(read(&hello[..length]), Hello::Partial, "{length} bytes");
        }
        let mut with_more = hello;
        with_more.extend(b"early data");
        assert_eq!(read(&with_more), tls(Some("api.example.com")));
    }

    #[test]
    fn a_hello_in_many_records_reads_alike() {
        let hello = hello("web.example.com");
        for size in [1, 2, 3, 100] {
            let records = in_records(&hello, size);
            assert_eq!(read(&records), tls(Some("web.example.com")), "records of {size}");
            assert_eq!(read(&records[..records.len() - 1]), Hello::Partial);
        }
    }

    #[test]
    fn an_address_is_asked_for_without_a_name() {
        assert_eq!(read(&hello("192.0.2.1")), tls(None));
    }

    #[test]
    fn what_is_no_hello_is_told_by_its_first_bytes() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"EHLO",
            b"\x16\x04",
            b"\x16\x03\x01\x00\x00",
            b"\x16\x03\x01\xff\xff",
            b"\x16\x03\x01\x00\x05\x02",
            b"\x15\x03\x03\x00\x02",
            b"\0",
        ] {
            assert_eq!(read(bytes), Hello::NotTls, "{bytes:?}");
        }
    }

    #[test]
    fn one_that_is_too_long_or_lies_about_lengths_asks_for_no_name() {
        assert_eq!(read(b"\x16\x03\x01\x40\x00\x01\x00\xff\xff"), tls(None));
        let mut lying = hello("web.example.com");
        // The length of the session id.
        lying[RECORD_HEAD + 4 + 34] = 255;
        assert!(matches!(read(&lying), Hello::Tls { .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            read(&bytes);
            let mut framed = vec![HANDSHAKE, 3, 3];
            framed.extend(u16::try_from(bytes.len()).unwrap().to_be_bytes());
            framed.extend(&bytes);
            read(&framed);
        }

        #[test]
        fn a_damaged_hello_is_judged_the_same_in_any_pieces(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            size in 1_usize..400,
        ) {
            let mut hello = hello("web.example.com");
            for (at, byte) in damage {
                let at = RECORD_HEAD + at.index(hello.len() - RECORD_HEAD);
                hello[at] = byte;
            }
            let seen = read(&hello);
            prop_assert_eq!(&seen, &read(&in_records(&hello, size)));
            if let Hello::Tls { sni: Some(name) } = seen {
                prop_assert!(name.len() <= NAME_MAX && name.bytes().all(|byte| byte.is_ascii_graphic()));
            }
        }
    }
}
