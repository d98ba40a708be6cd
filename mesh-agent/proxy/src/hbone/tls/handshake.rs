//! The TLS handshake on a non-blocking socket, by rustls, up to the hand-over of keys.
//!
//! Records are given to rustls one by one, and none after the handshake's last: what arrives with the end of a
//! handshake belongs to the data phase and is opened by [`super::session`].
//!
//! Invariants:
//! - What a peer may make us keep is bounded by [`INCOMING_MAX`]; the caller bounds the time.
//! - A failed handshake tells the peer by rustls's alert, as far as the socket takes it at once.

use std::{future::poll_fn, io, sync::Arc, task::Poll};

use rustls::{
    ClientConfig, ProtocolVersion, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};

use super::{
    TlsError,
    record::HEADER,
    session::{Schedule, Session},
};
use crate::stream::{Io, Stream};

/// Handshake bytes of a peer held at once: the largest message rustls takes and a record behind it.
const INCOMING_MAX: usize = 96 << 10;
const READ: usize = 4 << 10;
const ALPN: &[u8] = b"h2";

/// An established connection.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) session: Session,
    /// Our last handshake bytes, to be sent with the first data: a client speaks first.
    pub(crate) unsent: Vec<u8>,
    /// Bytes that came behind the handshake: unopened records.
    pub(crate) rest: Vec<u8>,
    /// The peer's certificate and its intermediates, verified by the configuration.
    pub(crate) peer: Vec<CertificateDer<'static>>,
}

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The peer speaks something else than `h2`.
    #[error("no common protocol: the peer did not agree on h2")]
    Alpn,
    /// The peer closed the connection in the middle.
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    /// The first bytes are not TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The socket failed.
    #[error("the connection failed during the TLS handshake")]
    Socket(#[source] io::Error),
    /// rustls refuses the peer, or the peer us.
    #[error("TLS handshake")]
    Tls(#[source] rustls::Error),
    /// The keys could not be taken over.
    #[error("take over the TLS connection")]
    TakeOver(#[source] TlsError),
    /// The peer sent more than a handshake may hold.
    #[error("the TLS handshake is too large")]
    TooLarge,
}

enum Hand {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Again,
    NeedBytes,
    Send,
}

impl Hand {
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>) {
        match self {
            Self::Client(connection) => settle(connection.process_tls_records(incoming), outgoing),
            Self::Server(connection) => settle(connection.process_tls_records(incoming), outgoing),
        }
    }

    fn is_handshaking(&self) -> bool {
        match self {
            Self::Client(connection) => connection.is_handshaking(),
            Self::Server(connection) => connection.is_handshaking(),
        }
    }

    fn finish(self, unsent: Vec<u8>, rest: Vec<u8>) -> Result<Established, HandshakeError> {
        let (version, alpn, peer) = match &self {
            Self::Client(connection) => {
                (connection.protocol_version(), connection.alpn_protocol(), connection.peer_certificates())
            }
            Self::Server(connection) => {
                (connection.protocol_version(), connection.alpn_protocol(), connection.peer_certificates())
            }
        };
        if version != Some(ProtocolVersion::TLSv1_3) {
            return Err(HandshakeError::TakeOver(TlsError::Unexpected));
        }
        if alpn != Some(ALPN) {
            return Err(HandshakeError::Alpn);
        }
        let peer = peer.unwrap_or_default().to_vec();
        let (secrets, schedule) = match self {
            Self::Client(connection) => {
                connection.dangerous_into_kernel_connection().map(|(s, k)| (s, Schedule::Client(k)))
            }
            Self::Server(connection) => {
                connection.dangerous_into_kernel_connection().map(|(s, k)| (s, Schedule::Server(k)))
            }
        }
        .map_err(HandshakeError::Tls)?;
        let session = Session::new(&secrets, schedule).map_err(HandshakeError::TakeOver)?;
        Ok(Established { session, unsent, rest, peer })
    }
}

/// Acts on rustls's state: queues what it wants sent and says what it needs.
fn settle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Step, rustls::Error>) {
    let UnbufferedStatus { discard, state, .. } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut encode)) => {
            let at = outgoing.len();
            let mut space = 0;
            loop {
                outgoing.resize(at + space, 0);
                match encode.encode(&mut outgoing[at..]) {
                    Ok(written) => {
                        outgoing.truncate(at + written);
                        break Ok(Step::Again);
                    }
                    Err(EncodeError::InsufficientSize(size)) => space = size.required_size,
                    Err(EncodeError::AlreadyEncoded) => break Ok(Step::Again),
                }
            }
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Ok(Step::Send)
        }
        Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => Ok(Step::NeedBytes),
        // No early data is offered or taken, and nothing is given to rustls behind the handshake.
        Ok(_) => Err(rustls::Error::General("data or an end within the handshake".into())),
    };
    (discard, step)
}

/// Shakes hands as the client.
///
/// Cancel safety: the socket is left in the middle of a handshake; close it.
///
/// # Errors
/// Why there is no connection.
pub(crate) async fn client(
    stream: &mut Stream,
    config: Arc<ClientConfig>,
) -> Result<Established, HandshakeError> {
    // Identities are verified, never names. The name only steers SNI, which the configuration turns off.
    let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let connection = UnbufferedClientConnection::new(config, nobody).map_err(HandshakeError::Tls)?;
    shake(stream, Hand::Client(connection)).await
}

/// Shakes hands as the server.
///
/// Cancel safety: the socket is left in the middle of a handshake; close it.
///
/// # Errors
/// Why there is no connection.
pub(crate) async fn server(
    stream: &mut Stream,
    config: Arc<ServerConfig>,
) -> Result<Established, HandshakeError> {
    let connection = UnbufferedServerConnection::new(config).map_err(HandshakeError::Tls)?;
    shake(stream, Hand::Server(connection)).await
}

async fn shake(stream: &mut Stream, mut hand: Hand) -> Result<Established, HandshakeError> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    let mut offered = 0;
    loop {
        let (discard, step) = hand.step(&mut incoming[..offered], &mut outgoing);
        incoming.drain(..discard);
        offered -= discard;
        match step {
            Ok(Step::Again) => {}
            Ok(Step::Send) if !hand.is_handshaking() => {}
            Ok(Step::Send) => send(stream, &mut outgoing).await.map_err(HandshakeError::Socket)?,
            Ok(Step::NeedBytes) if !hand.is_handshaking() => return hand.finish(outgoing, incoming),
            Ok(Step::NeedBytes) => match next_record(&incoming[offered..])? {
                Some(length) => offered += length,
                None if incoming.len() > INCOMING_MAX => return Err(HandshakeError::TooLarge),
                None => receive(stream, &mut incoming).await?,
            },
            Err(error) => {
                // rustls gives its alert with the next steps. It must see what it has not discarded: messages behind
                // the refused one are noted by their place in these bytes.
                while let (discard, Ok(Step::Again | Step::Send)) =
                    hand.step(&mut incoming[..offered], &mut outgoing)
                {
                    incoming.drain(..discard);
                    offered -= discard;
                }
                // Best effort: a peer whose socket is full learns of it by the close.
                stream.write(&outgoing).ok();
                return Err(HandshakeError::Tls(error));
            }
        }
    }
}

/// Length of the first record, if all of it is there.
fn next_record(bytes: &[u8]) -> Result<Option<usize>, HandshakeError> {
    // Said early, because what is no TLS may never send as much as its "length" wants.
    match bytes {
        [kind, ..] if !(20..=23).contains(kind) => return Err(HandshakeError::NotTls),
        [_, major, ..] if *major != 3 => return Err(HandshakeError::NotTls),
        _ => {}
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    Ok((rest.len() >= length).then_some(HEADER + length))
}

async fn send(stream: &mut Stream, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let mut sent = 0;
    while sent < outgoing.len() {
        match stream.write(&outgoing[sent..])? {
            Io::Bytes(count) => sent += count,
            Io::Blocked => wait(stream, Stream::is_writable).await,
        }
    }
    outgoing.clear();
    Ok(())
}

async fn receive(stream: &mut Stream, incoming: &mut Vec<u8>) -> Result<(), HandshakeError> {
    let held = incoming.len();
    loop {
        incoming.resize(held + READ, 0);
        let outcome = stream.read(&mut incoming[held..]);
        let count = if let Ok(Io::Bytes(count)) = outcome { count } else { 0 };
        incoming.truncate(held + count);
        match outcome.map_err(HandshakeError::Socket)? {
            Io::Bytes(0) => return Err(HandshakeError::Closed),
            Io::Bytes(_) => return Ok(()),
            Io::Blocked => wait(stream, Stream::is_readable).await,
        }
    }
}

/// Waits until an edge changed what `ready` asks for.
pub(super) async fn wait(stream: &mut Stream, ready: impl Fn(&Stream) -> bool) {
    poll_fn(|cx| {
        stream.observe(cx);
        if ready(stream) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
