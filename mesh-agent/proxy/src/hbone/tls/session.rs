//! A TLS connection after its handshake: records in both directions, key updates and alerts.
//!
//! Invariants:
//! - The bytes are the caller's: nothing is buffered here but one unfinished post-handshake message.
//! - A key update asked for by the peer is answered once, however often it is asked before the answer is sent.
//! - After the peer's end of data, or a fatal alert, nothing more is opened.

use std::ops::Range;

use rustls::{
    client::ClientConnectionData,
    kernel::KernelConnection,
    server::ServerConnectionData,
    {ConnectionTrafficSecrets, ExtractedSecrets, SupportedCipherSuite},
};

use super::{
    TlsError,
    record::{self, Content, HEADER, Protection, TRAILER},
};

/// Records without data that a peer may send in a row: session tickets and key updates come one by one.
const BARREN_MAX: u32 = 64;
/// Largest post-handshake message: a session ticket with its certificates-worth of room.
const MESSAGE_MAX: usize = 16 << 10;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const ALERT_WARNING: u8 = 1;
const ALERT_FATAL: u8 = 2;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;

/// The key schedule, which rustls keeps.
pub(crate) enum Schedule {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Schedule {
    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(connection) => connection.negotiated_cipher_suite(),
            Self::Server(connection) => connection.negotiated_cipher_suite(),
        }
    }

    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        match self {
            Self::Client(connection) => connection.update_tx_secret(),
            Self::Server(connection) => connection.update_tx_secret(),
        }
        .map_err(|_| TlsError::Exhausted)
    }

    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
        }
        .map_err(|_| TlsError::Exhausted)
    }
}

/// An established TLS connection.
pub(crate) struct Session {
    tx: Protection,
    rx: Protection,
    schedule: Schedule,
    /// Records after which our key is replaced.
    refresh_after: u64,
    update_owed: bool,
    /// The beginning of a post-handshake message.
    message: Vec<u8>,
    barren: u32,
    ended: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("tx", &self.tx).field("rx", &self.rx).finish_non_exhaustive()
    }
}

/// What the first record of a buffer was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// It is not all there yet.
    Partial,
    /// The peer's bytes, at this range of the buffer; the record ends at `end`.
    Data { range: Range<usize>, end: usize },
    /// A message between the TLS layers; the record ends at `end`.
    Silent { end: usize },
    /// The peer's end of data.
    Closed,
}

impl Session {
    /// Takes a connection over from rustls.
    ///
    /// # Errors
    /// A cipher that is not known here.
    pub(crate) fn new(secrets: &ExtractedSecrets, schedule: Schedule) -> Result<Self, TlsError> {
        let limit = schedule.suite().tls13().map_or(0, |suite| suite.common.confidentiality_limit);
        Ok(Self {
            tx: Protection::new(secrets.tx.0, &secrets.tx.1)?,
            rx: Protection::new(secrets.rx.0, &secrets.rx.1)?,
            schedule,
            // Half: asked before a batch of records, never between them.
            refresh_after: limit / 2,
            update_owed: false,
            message: Vec::new(),
            barren: 0,
            ended: false,
        })
    }

    /// Opens the record that `bytes` begins with.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn open(&mut self, bytes: &mut [u8]) -> Result<Opened, TlsError> {
        if self.ended {
            return Ok(Opened::Closed);
        }
        let Some(end) = record::length(bytes)?.filter(|end| *end <= bytes.len()) else {
            return Ok(Opened::Partial);
        };
        let record = &mut bytes[..end];
        let (content, range) = self.rx.open(record)?;
        if content == Content::Data && !range.is_empty() {
            // RFC 8446 §5.1: other records must not come between the pieces of a handshake message.
            if !self.message.is_empty() {
                return Err(TlsError::Unexpected);
            }
            self.barren = 0;
            return Ok(Opened::Data { range, end });
        }
        self.barren += 1;
        if self.barren > BARREN_MAX {
            return Err(TlsError::Flood);
        }
        match content {
            Content::Data => Ok(Opened::Silent { end }),
            Content::Handshake => self.handshake(&record[range]).map(|()| Opened::Silent { end }),
            Content::Alert => self.alert(&record[range], end),
        }
    }

    fn alert(&mut self, alert: &[u8], end: usize) -> Result<Opened, TlsError> {
        match *alert {
            [_, CLOSE_NOTIFY] => {
                self.ended = true;
                Ok(Opened::Closed)
            }
            [_, USER_CANCELED] => Ok(Opened::Silent { end }),
            [_, code] => {
                self.ended = true;
                Err(TlsError::Alert(code))
            }
            _ => Err(TlsError::Unexpected),
        }
    }

    fn handshake(&mut self, piece: &[u8]) -> Result<(), TlsError> {
        if piece.is_empty() {
            return Err(TlsError::Unexpected);
        }
        self.message.extend_from_slice(piece);
        while let [kind, a, b, c, rest @ ..] = &*self.message {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if length > MESSAGE_MAX {
                return Err(TlsError::RecordSize);
            }
            if rest.len() < length {
                return Ok(());
            }
            match (*kind, &rest[..length]) {
                (KEY_UPDATE, [request @ (0 | 1)]) if rest.len() == length => {
                    self.update_owed |= *request == 1;
                    let (sequence, secrets) = self.schedule.next_rx()?;
                    self.rx = Protection::new(sequence, &secrets)?;
                }
                // Connections are not resumed: each handshake proves the peer's identity anew.
                (NEW_SESSION_TICKET, _) if matches!(self.schedule, Schedule::Client(_)) => {}
                _ => return Err(TlsError::Unexpected),
            }
            self.message.drain(..4 + length);
        }
        if self.message.is_empty() {
            self.message = Vec::new();
        }
        Ok(())
    }

    /// Seals a record of the peer's bytes in place: content at `HEADER..record.len() - TRAILER`.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn seal(&mut self, record: &mut [u8]) -> Result<(), TlsError> {
        self.tx.seal(Content::Data, record)
    }

    /// What must be sent before the next batch of records, sealed: a key update that is owed or due. Empty most times.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn before_batch(&mut self) -> Result<Option<[u8; HEADER + 5 + TRAILER]>, TlsError> {
        if !self.update_owed && self.tx.sequence() < self.refresh_after {
            return Ok(None);
        }
        // Without asking for one in turn: the peer knows its own limits.
        let record = self.sealed_key_update(0)?;
        self.update_owed = false;
        Ok(Some(record))
    }

    /// The last record under our present key, and the next key.
    pub(super) fn sealed_key_update(&mut self, request: u8) -> Result<[u8; HEADER + 5 + TRAILER], TlsError> {
        let mut record = [0; HEADER + 5 + TRAILER];
        record[HEADER..HEADER + 5].copy_from_slice(&[KEY_UPDATE, 0, 0, 1, request]);
        self.tx.seal(Content::Handshake, &mut record)?;
        let (sequence, secrets) = self.schedule.next_tx()?;
        self.tx = Protection::new(sequence, &secrets)?;
        Ok(record)
    }

    /// Whether an answer to the peer is owed.
    pub(crate) fn owes_update(&self) -> bool {
        self.update_owed
    }

    /// The sealed end of our data.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn close_notify(&mut self) -> Result<[u8; HEADER + 2 + TRAILER], TlsError> {
        self.sealed_alert([ALERT_WARNING, CLOSE_NOTIFY])
    }

    /// A sealed fatal alert.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn fatal(&mut self, code: u8) -> Result<[u8; HEADER + 2 + TRAILER], TlsError> {
        self.sealed_alert([ALERT_FATAL, code])
    }

    fn sealed_alert(&mut self, alert: [u8; 2]) -> Result<[u8; HEADER + 2 + TRAILER], TlsError> {
        let mut record = [0; HEADER + 2 + TRAILER];
        record[HEADER..HEADER + 2].copy_from_slice(&alert);
        self.tx.seal(Content::Alert, &mut record)?;
        Ok(record)
    }

    #[cfg(test)]
    pub(super) fn refresh_after(&mut self, records: u64) {
        self.refresh_after = records;
    }
}
