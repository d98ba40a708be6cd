//! Owns keeping the CNI plugin in the node's chain while the agent runs.
//!
//! Invariants:
//! - A node whose chain lacks the plugin is not ready: pods of the mesh would start outside it.
//! - What another tool rewrites is repaired when it is noticed, and looked at every few seconds in case it is not.
//! - The plugin outlives the agent, which may be about to be replaced. It goes with `cni uninstall`, or at the end of an agent
//!   that finds the mark of an uninstallation in its state folder.

use std::{path::Path, sync::Arc, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{sync::Notify, task::spawn_blocking, time::timeout};

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

/// Keeps it in place, for ever.
pub(super) async fn keep(installer: Installer, shared: Arc<Shared>) {
    let changed = Arc::new(Notify::new());
    let watcher = watch(&installer.conf_dir, &changed);
    if let Err(error) = &watcher {
        tracing::warn!(%error, folder = %installer.conf_dir.display(), "watch the CNI configuration; looking every {LOOK_EACH:?} instead");
    }
    let mut copied = false;
    let mut said = None;
    loop {
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
