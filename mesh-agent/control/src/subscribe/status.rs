//! Owns what an agent shows of its link to the controller.

use std::time::SystemTime;

/// State of the link at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LinkStatus {
    /// URL of the controller.
    pub controller: String,
    /// Whether there is a stream now.
    pub connected: bool,
    /// Since when it is as `connected` says.
    pub since: Option<SystemTime>,
    /// When the controller was heard last.
    pub last_contact: Option<SystemTime>,
    /// Why the last attempt or stream ended.
    pub last_error: Option<String>,
    /// Attempts since there was a stream.
    pub attempts: u32,
    /// The controller's number of the state in force; absent while it is the one saved on disk.
    pub generation: Option<u64>,
    /// Resources refused since the start.
    pub refused_resources: u64,
    /// Until when the node's own certificate is valid.
    pub certificate_expires: Option<SystemTime>,
    /// Why the state could not be saved on disk, if it could not.
    pub disk_error: Option<String>,
}

impl LinkStatus {
    pub(super) fn connected(&mut self, now: SystemTime) {
        if !self.connected {
            (self.connected, self.since, self.attempts) = (true, Some(now), 0);
        }
        (self.last_contact, self.last_error) = (Some(now), None);
    }

    pub(super) fn failed(&mut self, now: SystemTime, error: String) {
        if self.connected || self.since.is_none() {
            (self.connected, self.since) = (false, Some(now));
        }
        self.attempts = self.attempts.saturating_add(1);
        self.last_error = Some(error);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn being_away_counts_from_the_first_failure() {
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        let mut status = LinkStatus::default();
        status.connected(at(1));
        status.failed(at(5), "gone".into());
        status.failed(at(9), "refused".into());
        assert_eq!((status.since, status.last_contact, status.attempts), (Some(at(5)), Some(at(1)), 2));
        assert_eq!(status.last_error.as_deref(), Some("refused"));
        status.connected(at(12));
        assert_eq!((status.since, status.attempts, status.last_error), (Some(at(12)), 0, None));
    }
}
