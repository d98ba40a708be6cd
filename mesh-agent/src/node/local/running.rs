//! Owns looking for running pods again and again.

use std::{sync::Arc, time::Duration};

use mesh_redirect::RunningPods;
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::LocalKnowledge;
use crate::node::shared::Shared;

/// How often anyway. The container runtime says what comes and goes; this is for what it did not say.
const LOOK_EACH: Duration = Duration::from_secs(5);
/// At least this long between two looks.
const PAUSE: Duration = Duration::from_millis(250);

/// Has somebody look when a pod that shall be meshed has no namespace; for ever.
pub(in crate::node) async fn follow_missing(shared: Arc<Shared>, local: Arc<LocalKnowledge>) {
    let mut outcomes = shared.outcomes();
    loop {
        let missing = outcomes.borrow_and_update().pods.iter().any(|row| row.is_missing());
        if missing {
            local.look_soon();
        }
        if outcomes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Looks whenever somebody misses a pod, and every few seconds; for ever.
pub(in crate::node) async fn follow(local: Arc<LocalKnowledge>, mut pods: RunningPods) {
    loop {
        // Either way it is time to look.
        drop(timeout(LOOK_EACH, local.look.notified()).await);
        let known = Arc::clone(&local);
        let looked = spawn_blocking(move || {
            known.set_running(pods.scan());
            pods
        });
        pods = match looked.await {
            Ok(pods) => pods,
            Err(error) => {
                tracing::error!(%error, "look for running pods; this is a defect of the agent");
                return std::future::pending().await;
            }
        };
        sleep(PAUSE).await;
    }
}
