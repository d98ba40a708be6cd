//! Clients that do not even get as far as HTTP/2: raw bytes, old TLS, half a handshake.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{HboneError, io_error};
use crate::place::Place;
use crate::waiting::limit;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How the server took raw bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What it said.
    pub bytes: Vec<u8>,
    /// How the connection stood at the end.
    pub end: End,
    /// How long the client listened.
    pub after: Duration,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The server closed it.
    Closed,
    /// The server reset it.
    Reset,
    /// The client ran out of patience.
    Open,
}

/// Connect from inside `from`, send `bytes`, and listen until the server ends it or `patience` (scaled) does.
///
/// # Errors
/// When it cannot connect.
pub fn knock(from: &Place, to: SocketAddr, bytes: &[u8], patience: Duration) -> Result<Answer, HboneError> {
    let mut stream =
        from.run(|| TcpStream::connect_timeout(&to, limit(CONNECT_LIMIT)))?.map_err(io_error("connect"))?;
    let began = Instant::now();
    let mut heard = Vec::new();
    let end = match stream.write_all(bytes) {
        Ok(()) => listen(&mut stream, &mut heard, began + limit(patience)),
        Err(_) => End::Reset,
    };
    Ok(Answer { bytes: heard, end, after: began.elapsed() })
}

fn listen(stream: &mut TcpStream, heard: &mut Vec<u8>, until: Instant) -> End {
    let mut buffer = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return End::Open;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return End::Closed,
            Ok(count) => heard.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return End::Open;
            }
            Err(_) => return End::Reset,
        }
    }
}

/// Open `count` connections from inside `from` and send `bytes` on each: half a handshake, or nothing at all. What the
/// server ends at once is not among those returned.
///
/// # Errors
/// When the place cannot be entered.
pub fn half_open(
    from: &Place,
    to: SocketAddr,
    count: usize,
    bytes: &[u8],
) -> Result<Vec<TcpStream>, HboneError> {
    let opened = from.run(|| {
        let mut opened = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = TcpStream::connect_timeout(&to, limit(CONNECT_LIMIT));
            // An error is more than the server takes.
            opened.extend(stream.and_then(|mut stream| stream.write_all(bytes).map(|()| stream)));
        }
        opened
    })?;
    Ok(opened)
}

/// Let this process hold as many sockets as it may at most.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptor_limit() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// A ClientHello as a client of TLS 1.2 sends it: one good record without `supported_versions`, offering ALPN `h2`.
#[must_use]
pub fn client_hello_of_tls12() -> Vec<u8> {
    let mut body = vec![0x03, 0x03];
    body.extend([0x5a; 32]);
    body.push(0);
    // ECDHE with AES-GCM, by ECDSA and by RSA.
    body.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
    body.extend([1, 0]);
    let mut extensions = Vec::new();
    for (kind, content) in [
        // supported_groups: P-256; ec_point_formats: uncompressed; signature_algorithms: ECDSA and RSA-PSS with
        // SHA-256; extended_master_secret; ALPN.
        (0x000a_u16, vec![0, 2, 0, 0x17]),
        (0x000b, vec![1, 0]),
        (0x000d, vec![0, 4, 4, 3, 8, 4]),
        (0x0017, vec![]),
        (0x0010, vec![0, 3, 2, b'h', b'2']),
    ] {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(length(&content));
        extensions.extend(content);
    }
    body.extend(length(&extensions));
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend(length(&body));
    message.extend(body);
    let mut record = vec![0x16, 0x03, 0x01];
    record.extend(length(&message));
    record.extend(message);
    record
}

fn length(bytes: &[u8]) -> [u8; 2] {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes()
}
