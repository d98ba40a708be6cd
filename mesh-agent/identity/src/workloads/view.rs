//! Certificates as `meshctl certificates` shows them.

use std::time::SystemTime;

use mesh_core::identity::Identity;
use serde::Serialize;
use time::OffsetDateTime;

use super::State;
use crate::{bundle::Bundle, clock::unix_seconds, svid::fingerprint};

/// One identity's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CertificateView {
    /// For whom.
    pub identity: String,
    /// `valid`, `pending`, `failed`, `expired`, or `untrusted` (valid in time, but not by the current roots and revocations).
    pub state: &'static str,
    /// Serial number, lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Kind of its key, as [`PrivateKey::kind`](crate::key::PrivateKey::kind) says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'static str>,
    /// Start of its life, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    /// End of its life.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// Seconds until its end; 0 after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_in_s: Option<u64>,
    /// When it will be replaced, or the next attempt is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renew_at: Option<String>,
    /// SHA-256 fingerprints of leaf and intermediates.
    pub chain: Vec<String>,
    /// SHA-256 fingerprints of the roots that are trusted now.
    pub roots: Vec<String>,
    /// Why the last attempt failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl CertificateView {
    pub(super) fn new(identity: &Identity, state: &State, bundle: &Bundle, now: SystemTime) -> Self {
        let slot = state.slot.as_deref();
        let validity = slot.map(|slot| slot.svid.validity());
        let label = match (slot, &state.error) {
            (Some(slot), _) if !slot.svid.validity().contains(now) => "expired",
            (Some(slot), _) if slot.svid.check(bundle, now).is_err() => "untrusted",
            (Some(_), _) => "valid",
            (None, Some(_)) => "failed",
            (None, None) => "pending",
        };
        Self {
            identity: identity.to_string(),
            state: label,
            serial: slot.map(|slot| slot.svid.serial().to_owned()),
            key: slot.map(|slot| slot.svid.key_kind()),
            not_before: validity.map(|validity| rfc3339(validity.not_before)),
            not_after: validity.map(|validity| rfc3339(validity.not_after)),
            expires_in_s: validity
                .map(|validity| validity.not_after.duration_since(now).map_or(0, |left| left.as_secs())),
            renew_at: state.retry_at.or_else(|| slot.map(|slot| slot.renew_at)).map(rfc3339),
            chain: slot.iter().flat_map(|slot| slot.svid.chain()).map(|der| fingerprint(der)).collect(),
            roots: bundle.material().roots.iter().map(|der| fingerprint(der)).collect(),
            last_error: state.error.as_ref().map(ToString::to_string),
        }
    }
}

/// A time as text, in UTC.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let seconds = i64::try_from(unix_seconds(time)).unwrap_or(i64::MAX);
    let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second) = time.to_hms();
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}
