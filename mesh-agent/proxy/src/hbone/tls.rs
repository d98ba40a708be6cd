//! The TLS 1.3 leg of a tunnel: rustls shakes hands and keeps the key schedule, records are ours.
//!
//! rustls's stream interface copies every byte several times and reads 4 KiB at a time. Here the bytes of an app are read
//! into their place in a record, sealed there and sent; arriving records are opened where they were read to.
//!
//! Invariants:
//! - TLS 1.3 with ALPN `h2` or nothing; which peers are acceptable is decided by the configurations of `mesh-identity`.
//! - Keys never leave this module; both directions are re-keyed before an AEAD's limit.
//! - Whatever a peer sends is bounded: handshake bytes, record sizes, records that carry no data.

pub(crate) mod handshake;
pub(crate) mod record;
pub(crate) mod session;
#[cfg(test)]
pub(crate) mod tests;

/// Why a TLS connection failed after its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TlsError {
    /// The peer ended it with a fatal alert.
    #[error("the peer sent TLS alert {0}")]
    Alert(u8),
    /// A record that the peer did not seal, or not as the next one.
    #[error("a TLS record does not open")]
    BadRecord,
    /// A cipher that is not known here.
    #[error("a cipher of TLS that is not known here")]
    Cipher,
    /// No sequence number or key is left.
    #[error("TLS keys are used up")]
    Exhausted,
    /// Too many records in a row that carry no data.
    #[error("too many TLS records without data")]
    Flood,
    /// A record longer or shorter than TLS allows.
    #[error("a TLS record of impossible size")]
    RecordSize,
    /// A message that has no place here.
    #[error("an unexpected TLS message")]
    Unexpected,
}

impl TlsError {
    /// The alert that tells the peer, if it is to be told.
    pub(crate) const fn alert(self) -> Option<u8> {
        match self {
            Self::Alert(_) => None,
            Self::BadRecord => Some(20),
            Self::RecordSize => Some(22),
            Self::Unexpected | Self::Flood => Some(10),
            Self::Cipher | Self::Exhausted => Some(80),
        }
    }
}
