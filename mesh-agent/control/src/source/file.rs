//! A directory of manifests as a source: read, watched, compiled and published from one thread.
//!
//! Invariants:
//! - A file that cannot be read or has a bad document keeps its last good state, and is reported. Of a file that was
//!   never good, the good documents are used: a mesh with a gap is better than none after a restart.
//! - Events only say "look again"; what is true is what a look finds. A lost event costs a rescan interval.
//! - Nothing is published unless it changed.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use mesh_core::snapshot::Snapshot;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch;

use super::{
    directory::{self, Fingerprint, Scan},
    document::{self, FILE_BYTES_MAX, Known, Rules},
    pulse::{self, Pulse},
};
use crate::{
    compile::{Compiler, MeshSettings},
    index::Index,
    problem::{Level, SourceError},
    status::{SourceStatus, of_file},
};

/// How long a directory must be quiet before it is read: writers truncate, write and rename.
const QUIET: Duration = Duration::from_millis(50);
/// A directory that is never quiet is read this often all the same.
const QUIET_MAX: Duration = Duration::from_millis(500);
/// How often to look without an event, for changes that make none (links that lead elsewhere, network mounts). Each look is a sign of life.
const RESCAN: Duration = pulse::EACH;
/// The same when the system cannot watch at all.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);

/// Why a file source could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory cannot be listed.
    #[error("cannot list the configuration directory {}", dir.display())]
    List {
        /// Directory.
        dir: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No thread.
    #[error("cannot start the configuration thread")]
    Thread {
        /// Cause.
        source: io::Error,
    },
}

/// Snapshots and status of a source; the newest is always there.
pub type Published = (watch::Receiver<Arc<Snapshot>>, watch::Receiver<Arc<SourceStatus>>);

/// A directory of manifests.
#[derive(Debug)]
pub struct FileSource {
    dir: PathBuf,
    rules: Rules,
    held: BTreeMap<PathBuf, HeldFile>,
    failed: BTreeMap<PathBuf, SourceError>,
    index: Index,
    compiler: Compiler,
    status: SourceStatus,
    pulse: Pulse,
}

/// What is known of one file.
#[derive(Debug, Default)]
struct HeldFile {
    /// `None` when the next look must read it again.
    fingerprint: Option<Fingerprint>,
    /// Of the contents read last; 0 when there are none.
    hash: u64,
    /// The index holds a complete state of this file.
    was_good: bool,
    /// The contents read last are not what the index holds.
    kept_back: bool,
    problems: Vec<SourceError>,
    ignored: BTreeMap<String, usize>,
    known: Known,
}

impl FileSource {
    /// Reads `dir` once, then keeps watching it from a thread of its own for as long as a receiver lives.
    ///
    /// The first snapshot is there on return. Blocks while it is made.
    ///
    /// # Errors
    /// If the directory cannot be listed, or a thread cannot be made. Bad files are no error: see the status.
    pub fn start(dir: impl Into<PathBuf>, mesh: MeshSettings) -> Result<Published, StartError> {
        Self::start_with_pulse(dir, mesh, Pulse::default())
    }

    /// [`FileSource::start`] with the sign of life of its thread, which begins with the thread.
    ///
    /// # Errors
    /// As [`FileSource::start`].
    pub fn start_with_pulse(
        dir: impl Into<PathBuf>,
        mesh: MeshSettings,
        pulse: Pulse,
    ) -> Result<Published, StartError> {
        Self { pulse, ..Self::new(dir, mesh) }.watch(RESCAN)
    }

    /// [`FileSource::start`] with another time between looks without an event.
    fn watch(mut self, rescan: Duration) -> Result<Published, StartError> {
        let (wake, woken) = sync_channel(1);
        // Watching starts before the first look, so that no change falls between.
        let watched = Watched::new(&self.dir, wake, rescan);
        let (snapshot, status) =
            self.refresh().map_err(|error| StartError::List { dir: self.dir.clone(), source: error })?;
        status.log_since(&SourceStatus::default());
        let (snapshot_tx, snapshot_rx) = watch::channel(snapshot);
        let (status_tx, status_rx) = watch::channel(Arc::new(status));
        thread::Builder::new()
            .name("config".to_owned())
            .spawn(move || self.run(watched, &woken, &snapshot_tx, &status_tx))
            .map_err(|error| StartError::Thread { source: error })?;
        Ok((snapshot_rx, status_rx))
    }

    /// A source that has not looked yet; for offline use with [`FileSource::refresh`].
    pub fn new(dir: impl Into<PathBuf>, mesh: MeshSettings) -> Self {
        let dir = dir.into();
        Self {
            rules: Rules::new(&mesh.root_namespace),
            status: SourceStatus { source: dir.clone(), ..SourceStatus::default() },
            dir,
            held: BTreeMap::new(),
            failed: BTreeMap::new(),
            index: Index::default(),
            compiler: Compiler::new(mesh),
            pulse: Pulse::default(),
        }
    }

    fn run(
        mut self,
        mut watched: Watched,
        woken: &Receiver<()>,
        snapshots: &watch::Sender<Arc<Snapshot>>,
        statuses: &watch::Sender<Arc<SourceStatus>>,
    ) {
        loop {
            self.pulse.beat(Instant::now());
            match woken.recv_timeout(watched.rescan()) {
                Ok(()) => wait_until_quiet(woken),
                // Without a watcher nobody holds the sending side.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(watched.rescan()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if snapshots.is_closed() && statuses.is_closed() {
                return;
            }
            watched.renew(&self.dir);
            let before = self.status.clone();
            let (snapshot, mut status) = match self.refresh() {
                Ok(refreshed) => refreshed,
                Err(error) => {
                    // All of it is as good as before.
                    let mut status = before.clone();
                    let message = format!("cannot be listed: {error}");
                    status.errors.insert(0, of_file(&self.dir, Level::Error, message));
                    status.errors.dedup();
                    (snapshots.borrow().clone(), status)
                }
            };
            if let Some(why) = &watched.failure {
                let message =
                    format!("cannot be watched ({why}); it is read every {} s", RESCAN_UNWATCHED.as_secs());
                status.warnings.insert(0, of_file(&self.dir, Level::Warning, message));
            }
            statuses.send_if_modified(|current| {
                let changed = **current != status;
                if changed {
                    status.log_since(current);
                    *current = Arc::new(status);
                }
                changed
            });
            snapshots.send_if_modified(|current| {
                let changed = !Arc::ptr_eq(current, &snapshot);
                if changed {
                    tracing::info!(version = snapshot.version(), "configuration published");
                    *current = snapshot;
                }
                changed
            });
        }
    }

    /// Looks at the directory and compiles what changed.
    ///
    /// # Errors
    /// If the directory itself cannot be listed; nothing has changed then.
    pub fn refresh(&mut self) -> io::Result<(Arc<Snapshot>, SourceStatus)> {
        let scan = directory::scan(&self.dir)?;
        self.forget_gone(&scan);
        self.failed = scan
            .failed
            .iter()
            .map(|(path, error)| {
                (
                    path.clone(),
                    of_file(
                        path,
                        Level::Error,
                        format!("cannot be read: {error}; its last good state is kept"),
                    ),
                )
            })
            .collect();
        for (path, fingerprint) in &scan.files {
            if self.held.get(path).is_none_or(|held| held.fingerprint != Some(*fingerprint)) {
                self.read(path, *fingerprint);
            }
        }
        let compiled = self.compiler.compile(&mut self.index);

        let mut problems = compiled.problems;
        problems.extend(self.index.duplicates());
        problems.extend(self.failed.values().cloned());
        problems.extend(self.held.values().flat_map(|held| &held.problems).cloned());
        let mut ignored: BTreeMap<String, usize> = BTreeMap::new();
        for (kind, count) in self.held.values().flat_map(|held| &held.ignored) {
            *ignored.entry(kind.clone()).or_default() += count;
        }
        self.status = SourceStatus {
            source: self.dir.clone(),
            version: compiled.snapshot.version(),
            files: self.held.len(),
            resources: self.index.len(),
            by_kind: self.index.count_by_kind(),
            ignored,
            files_kept_back: self
                .held
                .iter()
                .filter(|(_, h)| h.kept_back)
                .map(|(path, _)| path.clone())
                .collect(),
            ..SourceStatus::default()
        };
        self.status.set_problems(problems);
        Ok((compiled.snapshot, self.status.clone()))
    }

    /// Drops the files that are gone, unless they may only be out of sight.
    fn forget_gone(&mut self, scan: &Scan) {
        let hidden = |path: &Path| path.ancestors().any(|above| scan.failed.contains_key(above));
        let gone: Vec<PathBuf> = self
            .held
            .keys()
            .filter(|path| !scan.files.contains_key(*path) && !hidden(path))
            .cloned()
            .collect();
        for path in gone {
            self.held.remove(&path);
            self.index.replace(&path, Vec::new());
        }
    }

    fn read(&mut self, path: &Path, fingerprint: Fingerprint) {
        let now = SystemTime::now();
        let held = self.held.entry(path.to_owned()).or_default();
        let text = match read_text(path, fingerprint.len()) {
            Ok(text) => text,
            // Gone since the scan: the next one says so for sure.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                let message = format!("cannot be read: {error}; its last good state is kept");
                held.problems = vec![of_file(path, Level::Error, message)];
                (held.fingerprint, held.hash, held.kept_back) = (None, 0, true);
                return;
            }
        };
        held.fingerprint = fingerprint.is_settled(now).then_some(fingerprint);
        let hash = document::hash_of(&text);
        if held.hash == hash {
            return;
        }
        held.hash = hash;
        let parsed = document::parse(path, &text, &self.rules, &held.known);
        let good = !parsed.has_errors();
        held.problems = parsed.problems;
        held.ignored = parsed.ignored;
        held.known = parsed.known;
        held.kept_back = !good;
        if good || !held.was_good {
            held.was_good |= good;
            self.index.replace_placed(path, parsed.resources, &parsed.lines);
        }
    }
}

/// Reads a file, but not without bounds.
fn read_text(path: &Path, len: u64) -> io::Result<String> {
    let too_long = || io::Error::other(format!("it is larger than {} MiB", FILE_BYTES_MAX >> 20));
    if len > FILE_BYTES_MAX {
        return Err(too_long());
    }
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(too_long());
    }
    Ok(text)
}

fn wait_until_quiet(woken: &Receiver<()>) {
    let until = Instant::now() + QUIET_MAX;
    while Instant::now() < until && woken.recv_timeout(QUIET).is_ok() {}
}

/// The watch on the directory, which wakes the thread.
struct Watched {
    wake: SyncSender<()>,
    rescan: Duration,
    watcher: Option<RecommendedWatcher>,
    /// Device and inode that is watched: a directory that was replaced needs a new watch.
    watching: Option<(u64, u64)>,
    failure: Option<String>,
}

impl Watched {
    fn new(dir: &Path, wake: SyncSender<()>, rescan: Duration) -> Self {
        let mut watched = Self { wake, rescan, watcher: None, watching: None, failure: None };
        watched.renew(dir);
        watched
    }

    fn rescan(&self) -> Duration {
        if self.watcher.is_some() { self.rescan } else { RESCAN_UNWATCHED }
    }

    fn renew(&mut self, dir: &Path) {
        use std::os::unix::fs::MetadataExt;
        let Ok(meta) = fs::metadata(dir) else { return };
        let inode = Some((meta.dev(), meta.ino()));
        if self.watcher.is_some() && self.watching == inode {
            return;
        }
        let wake = self.wake.clone();
        let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading makes access events; everything else, lost events too, is worth a look.
            let only_read = event.is_ok_and(|event| {
                event.kind.is_access()
                    && event.kind
                        != notify::EventKind::Access(notify::event::AccessKind::Close(
                            notify::event::AccessMode::Write,
                        ))
            });
            if !only_read {
                // Full means that a look is due already.
                wake.try_send(()).ok();
            }
        });
        let watching =
            made.and_then(|mut watcher| watcher.watch(dir, RecursiveMode::Recursive).map(|()| watcher));
        match watching {
            Ok(watcher) => (self.watcher, self.watching, self.failure) = (Some(watcher), inode, None),
            Err(error) => (self.watcher, self.watching, self.failure) = (None, None, Some(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests;
