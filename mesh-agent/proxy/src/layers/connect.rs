//! A tunnel through an HTTP proxy: one request by HTTP/1.1, then bytes; or bytes as its body and that of the answer.
//!
//! Invariant: of the proxy's answer at most [`HEAD_MAX`] bytes are held, and what follows its head belongs to the server.

use bytes::{Bytes, BytesMut};
use mesh_core::route::cluster::ConnectTunnel;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::chunked::Framing;

/// Bytes of an answer's head.
const HEAD_MAX: usize = 16 << 10;
/// Interim answers that are passed over.
const INTERIM_MAX: usize = 8;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    /// The proxy's connection failed.
    #[error("the proxy's connection failed")]
    Io(#[from] std::io::Error),
    /// It ended it without an answer.
    #[error("the proxy ended the connection")]
    Ended,
    /// Its answer is none of HTTP/1.
    #[error("the proxy's answer is not HTTP/1")]
    Malformed,
    /// It said no.
    #[error("the proxy refused with {0}")]
    Refused(u16),
}

/// A tunnel that the proxy has agreed to.
#[derive(Debug)]
pub(super) struct Opened {
    /// What came behind its answer: the server's already.
    pub(super) early: Bytes,
    /// How the answer's body ends, if bytes are sent as bodies.
    pub(super) framing: Option<Framing>,
}

/// Asks for a tunnel.
///
/// # Errors
/// The proxy did not agree.
pub(super) async fn open<T: AsyncRead + AsyncWrite + Unpin>(
    io: &mut T,
    tunnel: &ConnectTunnel,
) -> Result<Opened, TunnelError> {
    let ConnectTunnel { host, port, post } = tunnel;
    let target = match host.parse::<std::net::Ipv6Addr>() {
        Ok(addr) => format!("[{addr}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    };
    let request = if *post {
        format!("POST / HTTP/1.1\r\nHost: {target}\r\nTransfer-Encoding: chunked\r\n\r\n")
    } else {
        format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
    };
    io.write_all(request.as_bytes()).await?;
    io.flush().await?;
    let mut held = BytesMut::with_capacity(1024);
    for _ in 0..INTERIM_MAX {
        let end = loop {
            if let Some(end) = end_of_head(&held) {
                break end;
            }
            if held.len() >= HEAD_MAX {
                return Err(TunnelError::Malformed);
            }
            if io.read_buf(&mut held).await? == 0 {
                return Err(TunnelError::Ended);
            }
        };
        let head = held.split_to(end);
        match status(&head).ok_or(TunnelError::Malformed)? {
            100..=199 => {}
            200..=299 => {
                let framing = if *post { Some(framing(&head).ok_or(TunnelError::Malformed)?) } else { None };
                return Ok(Opened { early: held.freeze(), framing });
            }
            other => return Err(TunnelError::Refused(other)),
        }
    }
    Err(TunnelError::Malformed)
}

/// Where the body begins.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

fn status(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"HTTP/1.1 ").or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    let (code, rest) = rest.split_at_checked(3)?;
    let is_over = rest.first().is_some_and(|byte| matches!(byte, b' ' | b'\r'));
    let code: u16 = std::str::from_utf8(code).ok()?.parse().ok()?;
    (is_over && (100..600).contains(&code)).then_some(code)
}

/// How the body behind a head ends; `None` where two parsers could read it differently.
fn framing(head: &[u8]) -> Option<Framing> {
    let head = std::str::from_utf8(head).ok()?;
    let fields = head.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
    let of = |name: &'static str| {
        fields.clone().filter(move |(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let (mut codings, mut lengths) = (of("transfer-encoding"), of("content-length"));
    match (codings.next(), codings.next(), lengths.next(), lengths.next()) {
        (None, _, None, _) => Some(Framing::Open),
        (Some(coding), None, None, _) if coding.eq_ignore_ascii_case("chunked") => Some(Framing::Chunked),
        (None, _, Some(length), None) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().ok().map(Framing::Length)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;

    fn to(host: &str) -> ConnectTunnel {
        ConnectTunnel { post: false, host: host.into(), port: 443 }
    }

    /// What came of an answer, and what the proxy read.
    fn ask(host: &str, answer: &[u8]) -> (Result<Opened, TunnelError>, String) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = duplex(64 << 10);
            theirs.write_all(answer).await.unwrap();
            theirs.shutdown().await.unwrap();
            let outcome = open(&mut ours, &to(host)).await;
            drop(ours);
            let mut read = String::new();
            theirs.read_to_string(&mut read).await.unwrap();
            (outcome, read)
        })
    }

    #[test]
    fn what_follows_the_answer_is_the_servers() {
        let (outcome, asked) = ask("example.com", b"HTTP/1.1 200 OK\r\nvia: x\r\n\r\nhello");
        assert_eq!(&outcome.unwrap().early[..], b"hello");
        assert_eq!(asked, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n");
        let (outcome, asked) = ask("fd00::1", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 204\r\n\r\n");
        assert!(outcome.unwrap().early.is_empty());
        assert!(asked.starts_with("CONNECT [fd00::1]:443 "), "{asked}");
    }

    #[test]
    fn an_answers_body_ends_in_one_way_only() {
        let of = |fields: &str| framing(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes());
        assert_eq!(of("server: x\r\n"), Some(Framing::Open));
        assert_eq!(of("Transfer-Encoding: Chunked\r\n"), Some(Framing::Chunked));
        assert_eq!(of("content-length: 12\r\n"), Some(Framing::Length(12)));
        for unclear in [
            "transfer-encoding: chunked\r\ncontent-length: 1\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "content-length: 1\r\ncontent-length: 2\r\n",
            "content-length: +1\r\n",
            "content-length: 99999999999999999999\r\n",
        ] {
            assert_eq!(of(unclear), None, "{unclear}");
        }
    }

    #[test]
    fn anything_else_is_a_refusal() {
        assert!(matches!(ask("a", b"HTTP/1.1 407 No\r\n\r\n").0, Err(TunnelError::Refused(407))));
        assert!(matches!(ask("a", b"HTTP/1.1 101 X\r\n\r\n").0, Err(TunnelError::Ended)));
        assert!(matches!(ask("a", b"HTTP/1.1 200 OK\r\n").0, Err(TunnelError::Ended)));
        for answer in [
            &b"SSH-2.0-x\r\n\r\n"[..],
            b"HTTP/1.1 2000\r\n\r\n",
            b"HTTP/1.1 +20 \r\n\r\n",
            b"HTTP/1.1 099 \r\n\r\n",
        ] {
            assert!(matches!(ask("a", answer).0, Err(TunnelError::Malformed)), "{answer:?}");
        }
        assert!(matches!(ask("a", &vec![b'x'; HEAD_MAX + 1]).0, Err(TunnelError::Malformed)));
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(ask("a", &answer));
            drop(ask("a", &[b"HTTP/1.1 ", &answer[..]].concat()));
        }
    }
}
