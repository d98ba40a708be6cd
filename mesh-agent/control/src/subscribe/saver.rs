//! Owns when the state is written to disk: soon after it changed, in the background, never more than a small share of the
//! time.

use std::{
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};

use super::{
    disk::{DiskError, SnapshotFile},
    report,
    status::LinkStatus,
    store::Held,
};

/// A state is saved this long after it came, so that a burst of changes is written once.
const SAVE_AFTER: Duration = Duration::from_millis(200);
/// After a save that took a while comes a pause this many times as long.
const PAUSE_FACTOR: u32 = 20;

/// Writes states to disk, one at a time.
#[derive(Debug)]
pub(super) struct Saver {
    file: SnapshotFile,
    saving: Option<JoinHandle<()>>,
    due: Option<Instant>,
}

impl Saver {
    pub(super) fn new(file: SnapshotFile) -> Self {
        Self { file, saving: None, due: None }
    }

    /// The state changed.
    pub(super) fn soon(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + SAVE_AFTER);
    }

    /// Waits until there is something to write, for ever if there is not. Cancel safe.
    pub(super) async fn due(&self) {
        match self.due {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Writes the state that `held` returns, unless a write is under way or was only just; then later.
    pub(super) fn save(&mut self, held: impl FnOnce() -> Vec<Held>, status: &watch::Sender<Arc<LinkStatus>>) {
        self.due = None;
        if self.saving.as_ref().is_some_and(|saving| !saving.is_finished()) {
            return self.soon();
        }
        let (file, held, status) = (self.file.clone(), held(), status.clone());
        self.saving = Some(spawn_blocking(move || {
            let started = Clock::now();
            note(&status, file.save(&held).err().as_ref());
            // The pause is part of the task, so that the next write waits for it.
            std::thread::sleep(started.elapsed() * PAUSE_FACTOR);
        }));
    }

    /// Waits for a write under way.
    pub(super) async fn finish(&mut self) {
        if let Some(saving) = self.saving.take()
            && let Err(error) = saving.await
        {
            tracing::error!(%error, "save the state on disk");
        }
    }
}

fn note(status: &watch::Sender<Arc<LinkStatus>>, error: Option<&DiskError>) {
    let error = error.map(|error| report(error));
    if let Some(error) = &error {
        tracing::warn!(error, "save the state on disk");
    }
    status.send_if_modified(|status| {
        let changed = status.disk_error != error;
        if changed {
            Arc::make_mut(status).disk_error = error;
        }
        changed
    });
}
