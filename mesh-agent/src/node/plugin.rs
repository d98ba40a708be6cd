//! Owns keeping the CNI plugin in the node's chain while the agent runs.
//!
//! Invariants:
//! - A node whose chain lacks the plugin is not ready: pods of the mesh would start outside it.
//! - What another tool rewrites is repaired when it is noticed, and looked at every few seconds in case it is not; two repairs are a
//!   second apart at least, and who does not let it be is said to do so.
//! - The plugin outlives the agent, which may be about to be replaced. It goes with `cni uninstall`, or at the end of an agent
//!   that finds the mark of an uninstallation in its state folder.

use std::{collections::VecDeque, path::Path, sync::Arc, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};

use super::{control::say_ready, shared::Shared};
use crate::{
    cni::install::{Installed, Installer},
    report::report,
};

/// Name of what readiness waits for.
pub(super) const HOLD: &str = "CNI plugin";
/// File in the state folder that tells the agent that it is the last one of this node.
const UNINSTALL: &str = "uninstall";
/// How often anyway.
const LOOK_EACH: Duration = Duration::from_secs(5);
/// Two writes are so far apart at least: somebody who writes it back at once would keep both busy.
const WRITE_EACH: Duration = Duration::from_secs(1);
/// So many writes within [`CONTEST_WITHIN`] are no repair any more.
const CONTEST: usize = 5;
const CONTEST_WITHIN: Duration = Duration::from_secs(60);

/// Writes of late.
#[derive(Debug, Default)]
struct Writes {
    at: VecDeque<Instant>,
    said: Option<Instant>,
}

impl Writes {
    /// Notes one. Whether it is to be said that somebody takes the plugin out again and again, which is once a minute.
    fn note(&mut self, now: Instant) -> bool {
        self.at.push_back(now);
        self.at.retain(|at| now.duration_since(*at) < CONTEST_WITHIN);
        let is_said = self.said.is_some_and(|said| now.duration_since(said) < CONTEST_WITHIN);
        let says = self.at.len() >= CONTEST && !is_said;
        if says {
            self.said = Some(now);
        }
        says
    }

    /// The next one is not before this.
    fn next(&self) -> Option<Instant> {
        self.at.back().map(|last| *last + WRITE_EACH)
    }
}

/// Keeps it in place, for ever.
pub(super) async fn keep(installer: Installer, shared: Arc<Shared>) {
    let changed = Arc::new(Notify::new());
    let watcher = watch(&installer.conf_dir, &changed);
    if let Err(error) = &watcher {
        tracing::warn!(%error, folder = %installer.conf_dir.display(), "watch the CNI configuration; looking every {LOOK_EACH:?} instead");
    }
    let mut copied = false;
    let mut said = None;
    let mut writes = Writes::default();
    loop {
        if let Some(next) = writes.next() {
            sleep_until(next).await;
        }
        let (now, first) = (installer.clone(), !copied);
        let done = spawn_blocking(move || {
            if first {
                // An older one may be there.
                now.copy_program()?;
            }
            now.ensure()
        });
        let missing = match done.await {
            Ok(Ok(Installed::In(_))) => {
                copied = true;
                None
            }
            Ok(Ok(Installed::Put(path))) => {
                copied = true;
                if writes.note(Instant::now()) {
                    tracing::warn!(
                        file = %path.display(),
                        "another program takes the CNI plugin out of the chain again and again; pods that start meanwhile are \
                         outside the mesh until they are found. Cilium does it unless it is told cni.exclusive=false"
                    );
                }
                None
            }
            Ok(Ok(Installed::NoNetwork)) => {
                copied = true;
                Some(format!("no network is configured in {}", installer.conf_dir.display()))
            }
            Ok(Err(error)) => Some(report(&error)),
            Err(error) => {
                Some(format!("it could not be put in place; this is a defect of the agent: {error}"))
            }
        };
        if said != missing {
            if let Some(missing) = &missing {
                tracing::warn!(%missing, "the CNI plugin is not in place");
            }
            said.clone_from(&missing);
        }
        if shared.readiness.hold(HOLD, missing) {
            say_ready(&shared.node);
        }
        // Either way it is time to look.
        drop(timeout(LOOK_EACH, changed.notified()).await);
    }
}

/// Takes the plugin away if this was the last agent of the node. Blocking.
pub(super) fn leave(installer: &Installer, state_dir: &Path) {
    let mark = state_dir.join(UNINSTALL);
    if !mark.exists() {
        return;
    }
    match installer.uninstall() {
        Ok(_) => tracing::info!("the mesh leaves this node: the CNI plugin is gone"),
        Err(error) => tracing::error!(error = %report(&error), "take the CNI plugin away"),
    }
    if let Err(error) = std::fs::remove_file(&mark) {
        tracing::warn!(%error, mark = %mark.display(), "remove the mark of the uninstallation");
    }
}

fn watch(folder: &Path, changed: &Arc<Notify>) -> notify::Result<notify::RecommendedWatcher> {
    let changed = Arc::clone(changed);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading it is no change; errors are a reason to look.
        if event.is_ok_and(|event| event.kind.is_access()) {
            return;
        }
        changed.notify_one();
    })?;
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn writes_keep_a_distance_and_a_contest_is_said_once_a_minute() {
        let mut writes = Writes::default();
        assert_eq!(writes.next(), None, "the first one is at once");
        let mut said = Vec::new();
        for second in 0..150 {
            let now = Instant::now();
            if writes.note(now) {
                said.push(second);
            }
            assert_eq!(writes.next(), Some(now + WRITE_EACH));
            tokio::time::advance(WRITE_EACH).await;
        }
        assert_eq!(said, [4, 64, 124]);
        assert!(writes.at.len() <= 60, "{}", writes.at.len());

        // A repair now and then is what this is for.
        let mut writes = Writes::default();
        for _ in 0..20 {
            assert!(!writes.note(Instant::now()));
            tokio::time::advance(Duration::from_secs(20)).await;
        }
    }
}
