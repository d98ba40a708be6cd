//! Where a rotation of the root stands, and its steps.
//!
//! A new root is *announced* (trusted everywhere, signs nothing), after a while signing *switches* to it, and the old one stays
//! *retired* (trusted, signs nothing) until whatever it signed has ended. The journal is a file; each step is written down before
//! it is done, so a process that dies in the middle leaves something the next one finishes.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{
    options::KnownRoot,
    store::{CA_KEY, JOURNAL, Locked, NEXT_KEY, ROOT_CERT, StoreError},
};
use crate::clock::unix_seconds;

/// Most roots kept for the sake of what they once signed; the one to end first gives way.
const RETIRED_MAX: usize = 32;

/// An announced root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Announced {
    /// Its certificate, PEM. Its key is in `next-key.pem`.
    pub(crate) root: String,
    /// When signing goes over to it, seconds since 1970.
    pub(crate) switch_at: u64,
}

/// A retired root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retired {
    /// Its certificate, PEM.
    pub(crate) root: String,
    /// Until when it is trusted, seconds since 1970.
    pub(crate) until: u64,
}

/// The file `rotation.json`. Removing it makes the mesh forget retired roots at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Journal {
    pub(crate) announced: Option<Announced>,
    /// A switch to this root (PEM) has begun and may not be complete.
    pub(crate) switching: Option<String>,
    pub(crate) retired: Vec<Retired>,
    /// The roots (PEM) that were in use when the folder was last looked at.
    pub(crate) known: Vec<String>,
}

impl Journal {
    /// Reads the journal, if there is one. One that does not parse counts as absent, with a warning: it holds nothing the CA could
    /// not do without.
    pub(crate) fn find(folder: &Locked<'_>) -> Result<Option<Self>, StoreError> {
        let Some(content) = folder.read(JOURNAL)? else { return Ok(None) };
        let read = serde_json::from_slice(&content);
        Ok(read.map_err(|error| {
            tracing::warn!(%error, "{JOURNAL} of the CA is unreadable; an unfinished rotation is forgotten");
        }).ok())
    }

    /// As [`Self::find`]; an empty one if there is none.
    pub(crate) fn read(folder: &Locked<'_>) -> Result<Self, StoreError> {
        Ok(Self::find(folder)?.unwrap_or_default())
    }

    /// The journal of a folder that has none, from what others remember; nothing stays retired longer than until `latest`.
    /// [`Self::note`] then retires what is not in use.
    pub(crate) fn recalled(known: Vec<KnownRoot>, latest: SystemTime) -> Self {
        let mut journal = Self::default();
        for root in known {
            let pem = crate::key::pem("CERTIFICATE", &root.certificate).to_string();
            match root.until {
                Some(until) => journal.retire(pem, until.min(latest)),
                None => journal.known.push(pem),
            }
        }
        journal
    }

    /// Writes the journal.
    pub(crate) fn write(&self, folder: &Locked<'_>) -> Result<(), StoreError> {
        // Strings and numbers only: serialising cannot fail; an empty journal would be the safe reading of a failure.
        folder.write(JOURNAL, &serde_json::to_vec_pretty(self).unwrap_or_default())
    }

    /// Does what is due at `now` to a self-signed CA's folder. Says whether signing went over to another root. The old root is
    /// still in `known`, so that [`Self::note`] retires it, now or after whoever died here.
    pub(crate) fn advance(&mut self, folder: &Locked<'_>, now: SystemTime) -> Result<bool, StoreError> {
        if self.switching.is_none()
            && let Some(announced) = self.announced.take_if(|next| next.switch_at <= unix_seconds(now))
        {
            self.switching = Some(announced.root);
            self.write(folder)?;
        }
        let Some(root) = &self.switching else { return Ok(false) };
        folder.rename(NEXT_KEY, CA_KEY)?;
        folder.write(ROOT_CERT, root.as_bytes())?;
        self.switching = None;
        // At once: as long as the journal says "switching", the next key is taken for this root's.
        self.write(folder)?;
        Ok(true)
    }

    /// Gives up a rotation that has not switched: the CA is plugged in now. Says whether there was one.
    pub(crate) fn abandon(&mut self) -> bool {
        self.announced.take().is_some() | self.switching.take().is_some()
    }

    /// Keeps a root trusted until `until`.
    pub(crate) fn retire(&mut self, root: String, until: SystemTime) {
        let until = unix_seconds(until);
        match self.retired.iter_mut().find(|retired| retired.root == root) {
            Some(retired) => retired.until = retired.until.max(until),
            None => self.retired.push(Retired { root, until }),
        }
        self.retired.sort_by_key(|retired| retired.until);
        let excess = self.retired.len().saturating_sub(RETIRED_MAX);
        self.retired.drain(..excess);
    }

    /// Notes which roots are in use: those that were and are not any more are retired. Forgets retired ones whose time has
    /// come. Says whether anything changed.
    pub(crate) fn note(&mut self, roots: Vec<String>, now: SystemTime, retire: Duration) -> bool {
        let before = self.clone();
        for gone in std::mem::take(&mut self.known) {
            if !roots.contains(&gone) {
                self.retire(gone, now + retire);
            }
        }
        self.retired.retain(|retired| retired.until > unix_seconds(now) && !roots.contains(&retired.root));
        self.known = roots;
        *self != before
    }
}
