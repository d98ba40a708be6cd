//! One direction of TLS 1.3 record protection, in place (RFC 8446 §5.2–5.5).
//!
//! A record is `[5 bytes of header][content][1 byte of content type][16 bytes of tag]` in one buffer; the caller reads
//! bytes straight into the content's place, or gets them handed out of it.
//!
//! Invariants:
//! - A sequence number is used once: sealing and opening fail for good before it could wrap.
//! - Nothing of a record is handed out before its tag was checked.

use std::ops::Range;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

use super::TlsError;

/// Bytes before the content.
pub(crate) const HEADER: usize = 5;
/// Bytes after the content: its type and the tag.
pub(crate) const TRAILER: usize = 1 + TAG;
/// Largest content of one record.
pub(crate) const CONTENT_MAX: usize = 1 << 14;
/// Largest protected part of one record: content, type, padding and tag.
const PROTECTED_MAX: usize = CONTENT_MAX + 256;
/// Largest record on the wire.
pub(crate) const RECORD_MAX: usize = HEADER + PROTECTED_MAX;
const TAG: usize = 16;

/// What a record's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Alert,
    Handshake,
    Data,
}

impl Content {
    const fn code(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }

    fn of(code: u8) -> Option<Self> {
        [Self::Alert, Self::Handshake, Self::Data].into_iter().find(|content| content.code() == code)
    }
}

/// The key of one direction, until its next update.
pub(crate) struct Protection {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl std::fmt::Debug for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("Protection").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Protection {
    /// Takes over a direction at a sequence number.
    ///
    /// # Errors
    /// A cipher this build does not know.
    pub(crate) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, TlsError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(TlsError::Cipher),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| TlsError::Cipher)?;
        let iv = iv.as_ref().try_into().map_err(|_| TlsError::Cipher)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// Records protected so far.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Protects `record`, whose content stands at `HEADER..record.len() - TRAILER`.
    ///
    /// # Errors
    /// The sequence numbers are used up.
    pub(crate) fn seal(&mut self, content: Content, record: &mut [u8]) -> Result<(), TlsError> {
        let (nonce, next) = self.nonce()?;
        let tag_at = record.len().checked_sub(TAG).filter(|at| *at > HEADER).ok_or(TlsError::RecordSize)?;
        let protected = record.len() - HEADER;
        let length = u16::try_from(protected)
            .ok()
            .filter(|_| protected <= CONTENT_MAX + TRAILER)
            .ok_or(TlsError::RecordSize)?
            .to_be_bytes();
        let header = [Content::Data.code(), 3, 3, length[0], length[1]];
        record[..HEADER].copy_from_slice(&header);
        record[tag_at - 1] = content.code();
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(header), &mut record[HEADER..tag_at])
            .map_err(|_| TlsError::Exhausted)?;
        record[tag_at..].copy_from_slice(tag.as_ref());
        self.sequence = next;
        Ok(())
    }

    /// Opens a whole record as [`length`] measured it; the content stands at the range that is returned.
    ///
    /// # Errors
    /// It was not sealed by the peer as the next record, or says nothing.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<(Content, Range<usize>), TlsError> {
        let (nonce, next) = self.nonce()?;
        let Some((header, protected)) = record.split_first_chunk_mut::<HEADER>() else {
            return Err(TlsError::RecordSize);
        };
        let inner =
            self.key.open_in_place(nonce, Aad::from(*header), protected).map_err(|_| TlsError::BadRecord)?;
        self.sequence = next;
        // Padding is zeros behind the content's type.
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(TlsError::Unexpected)?;
        let content = Content::of(inner[end]).ok_or(TlsError::Unexpected)?;
        if end > CONTENT_MAX {
            return Err(TlsError::RecordSize);
        }
        Ok((content, HEADER..HEADER + end))
    }

    fn nonce(&self) -> Result<(Nonce, u64), TlsError> {
        let next = self.sequence.checked_add(1).ok_or(TlsError::Exhausted)?;
        let mut nonce = self.iv;
        for (byte, of_sequence) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of_sequence;
        }
        Ok((Nonce::assume_unique_for_key(nonce), next))
    }
}

/// Length of the record that `bytes` begins with, header included; `None` if the header is not all there yet.
///
/// # Errors
/// What cannot be a protected record: another outer type, or a length beyond what TLS allows.
pub(crate) fn length(bytes: &[u8]) -> Result<Option<usize>, TlsError> {
    let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
    if header[0] != Content::Data.code() {
        return Err(TlsError::Unexpected);
    }
    let protected = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if !(TRAILER..=PROTECTED_MAX).contains(&protected) {
        return Err(TlsError::RecordSize);
    }
    Ok(Some(HEADER + protected))
}

#[cfg(test)]
mod tests {
    use rustls::crypto::cipher::{AeadKey, Iv};

    use super::*;

    fn secrets() -> ConnectionTrafficSecrets {
        ConnectionTrafficSecrets::Aes128Gcm {
            // 32 bytes of which AES-128 takes the first 16 would be refused by length, so use the larger cipher.
            key: AeadKey::from([7; 32]),
            iv: Iv::from([9; 12]),
        }
    }

    fn both() -> (Protection, Protection) {
        let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets() else { unreachable!() };
        let secrets = ConnectionTrafficSecrets::Aes256Gcm { key, iv };
        (Protection::new(0, &secrets).unwrap(), Protection::new(0, &secrets).unwrap())
    }

    fn sealed(protection: &mut Protection, content: Content, text: &[u8]) -> Vec<u8> {
        let mut record = [vec![0; HEADER], text.to_vec(), vec![0; TRAILER]].concat();
        protection.seal(content, &mut record).unwrap();
        record
    }

    #[test]
    fn what_one_side_seals_the_other_opens_in_order() {
        let (mut ours, mut theirs) = both();
        for text in [&b"one"[..], b"", &[5; CONTENT_MAX]] {
            let mut record = sealed(&mut ours, Content::Data, text);
            assert_eq!(length(&record).unwrap(), Some(record.len()));
            let (content, range) = theirs.open(&mut record).unwrap();
            assert_eq!((content, &record[range]), (Content::Data, text));
        }
        let mut alert = sealed(&mut ours, Content::Alert, &[1, 0]);
        assert_eq!(theirs.open(&mut alert).unwrap(), (Content::Alert, HEADER..HEADER + 2));
    }

    #[test]
    fn a_changed_replayed_or_reordered_record_is_refused() {
        let (mut ours, mut theirs) = both();
        let (first, second) =
            (sealed(&mut ours, Content::Data, b"first"), sealed(&mut ours, Content::Data, b"second"));
        for at in 0..first.len() {
            let mut changed = first.clone();
            changed[at] ^= 1;
            assert!(theirs.open(&mut changed).is_err(), "byte {at}");
        }
        assert!(theirs.open(&mut second.clone()).is_err(), "reordered");
        assert!(theirs.open(&mut first.clone()).is_ok());
        assert!(theirs.open(&mut first.clone()).is_err(), "replayed");
        assert!(theirs.open(&mut second.clone()).is_ok());
    }

    #[test]
    fn padding_is_taken_off_and_nothing_but_padding_is_refused() {
        let (mut ours, mut theirs) = both();
        // Content `hi`, its type, three zeros: the type that `seal` appends is turned into padding by hand.
        let mut padded = |inner: &[u8]| {
            let mut record = [vec![0; HEADER], inner.to_vec(), vec![0; TAG]].concat();
            let (nonce, next) = ours.nonce().unwrap();
            let length = u16::try_from(record.len() - HEADER).unwrap().to_be_bytes();
            let header = [23, 3, 3, length[0], length[1]];
            record[..HEADER].copy_from_slice(&header);
            let end = record.len() - TAG;
            let tag = ours
                .key
                .seal_in_place_separate_tag(nonce, Aad::from(header), &mut record[HEADER..end])
                .unwrap();
            record[end..].copy_from_slice(tag.as_ref());
            ours.sequence = next;
            record
        };
        let mut record = padded(b"hi\x17\0\0\0");
        let (content, range) = theirs.open(&mut record).unwrap();
        assert_eq!((content, &record[range]), (Content::Data, &b"hi"[..]));
        assert_eq!(theirs.open(&mut padded(&[0; 4])), Err(TlsError::Unexpected));
        assert_eq!(theirs.open(&mut padded(b"x\x18")), Err(TlsError::Unexpected));
    }

    #[test]
    fn lengths_beyond_tls_and_other_outer_types_are_refused_before_more_is_read() {
        assert_eq!(length(&[23, 3, 3, 0x41]), Ok(None));
        assert_eq!(length(&[23, 3, 3, 0x41, 0]), Ok(Some(RECORD_MAX)));
        assert_eq!(length(&[23, 3, 3, 0x41, 1]), Err(TlsError::RecordSize));
        assert_eq!(length(&[23, 3, 3, 0, 16]), Err(TlsError::RecordSize));
        assert_eq!(length(&[20, 3, 3, 0, 1]), Err(TlsError::Unexpected));
        assert_eq!(length(b"GET / HTTP/1.1"), Err(TlsError::Unexpected));
    }

    #[test]
    fn sequence_numbers_never_wrap() {
        let (mut ours, mut theirs) = both();
        (ours.sequence, theirs.sequence) = (u64::MAX - 1, u64::MAX - 1);
        let mut last = sealed(&mut ours, Content::Data, b"last");
        assert!(theirs.open(&mut last).is_ok());
        let mut record = [0; HEADER + TRAILER];
        assert_eq!(ours.seal(Content::Data, &mut record), Err(TlsError::Exhausted));
        assert_eq!(theirs.open(&mut record), Err(TlsError::Exhausted));
    }
}
