//! A cluster's API server as a source: each kind is listed and watched, what the mesh reads of an object goes into the same index as a
//! manifest's, and a thread compiles and publishes.
//!
//! ```text
//! watch (one a kind) ─▶ object ─▶ changes ─▶ world (index, compiler) ─▶ Snapshot, SourceStatus
//! crds ─▶ which kinds there are, and in which version
//! ```
//!
//! Invariants:
//! - Nothing is published before every kind was listed once; a kind that the cluster does not have counts as listed.
//! - A changed object costs what it is, not what the cluster is, on its way into the index.
//! - An object that cannot be used leaves its last good state in force, and is reported.
//! - An API server that is away takes nothing away.

mod crds;
mod listed;
pub mod node_pods;
mod object;
mod raw;
mod secrets;
#[cfg(test)]
mod tests;
mod verdict;
mod watch;
mod world;

use std::{collections::BTreeSet, io, sync::Arc, thread, time::Duration};

use kube::Client;
use mesh_core::snapshot::{Name, Snapshot};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch as latest},
    time::{Instant, sleep, timeout_at},
};

use self::world::World;
pub(crate) use self::{listed::Listed, object::api_resource};
pub use self::{
    object::{Judged, Object, Told},
    verdict::{ParentVerdict, Refusal, Verdict},
};
use super::{
    document::Rules,
    pulse::{self, Pulse},
};
use crate::{
    compile::MeshSettings,
    resource::{Key, Kind},
    status::SourceStatus,
};

/// Changes on their way to the index: a list of ten thousand pods waits for the index, not in memory.
const CHANGES_MAX: usize = 4096;
/// A change waits so long for others.
const QUIET: Duration = Duration::from_millis(10);
/// And never longer than this, in quiet times.
const QUIET_MAX: Duration = Duration::from_millis(50);
/// States follow one another at this distance at least. A state costs by the pods of the cluster and by agents, hardly by what is new in it:
/// under changes without end more of them in fewer states leave the CPU to what else the changes need.
const PACE: Duration = Duration::from_millis(150);

/// What of a cluster is read, and how.
#[derive(Clone, Debug)]
pub struct KubernetesOptions {
    /// Settings of the mesh.
    pub mesh: MeshSettings,
    /// The ConfigMap with the mesh configuration.
    pub mesh_config: Name,
}

/// Why the source could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No thread.
    #[error("cannot start the configuration thread")]
    Thread(#[source] io::Error),
    /// The thread ended.
    #[error("the configuration thread ended; this is a defect")]
    Defect,
}

/// A running source; it ends when every receiver is gone.
#[derive(Debug)]
pub struct KubernetesSource {
    /// The newest snapshot.
    pub snapshots: latest::Receiver<Arc<Snapshot>>,
    /// What is wrong with objects, and with reading them.
    pub sources: latest::Receiver<Arc<SourceStatus>>,
    /// What users are told about their resources: each batch of changes, with all that is judged.
    pub judged: latest::Receiver<Arc<Judged>>,
}

/// Something that happened to an object or a kind.
#[derive(Debug)]
pub(crate) enum Change {
    /// An object as it is now.
    Put(Box<Object>),
    /// An object that is gone.
    Gone(Key),
    /// A kind was listed.
    Listed(Kind),
    /// A kind cannot be read, for this reason; or can again.
    Trouble(Kind, Option<String>),
}

/// Lists and watches the cluster from now on. Returns when the first snapshot is there, which needs an API server that answers, however
/// long that takes. Must be called within a runtime, which then carries the watches. `pulse` is the sign of life of the thread that publishes.
///
/// # Errors
/// No thread.
pub async fn start(
    client: Client,
    options: KubernetesOptions,
    pulse: Pulse,
) -> Result<KubernetesSource, StartError> {
    let (changes, received) = mpsc::channel(CHANGES_MAX);
    let rules = Arc::new(Rules {
        root_namespace: options.mesh.root_namespace.clone(),
        mesh_config: options.mesh_config.clone(),
    });
    let served = crds::follow(client.clone());
    // Of Secrets only those that are asked for by name.
    for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::Secret) {
        tokio::spawn(watch::run(*kind, client.clone(), Arc::clone(&rules), served.clone(), changes.clone()));
    }
    let (wanted_tx, wanted) = latest::channel(BTreeSet::new());
    if options.mesh.read_secrets {
        tokio::spawn(secrets::follow(client, rules, wanted, changes));
    }
    let world = World::new(options.mesh);
    let (snapshots_tx, snapshots) = latest::channel(Arc::default());
    let (sources_tx, sources) = latest::channel(Arc::default());
    let (judged_tx, judged) = latest::channel(Arc::default());
    let (first_tx, first) = oneshot::channel();
    let publisher = Publisher {
        world,
        received,
        snapshots: snapshots_tx,
        sources: sources_tx,
        judged: judged_tx,
        wanted: wanted_tx,
        first: Some(first_tx),
        next: Instant::now(),
        pulse,
    };
    let runtime = Handle::current();
    thread::Builder::new()
        .name("config".to_owned())
        .spawn(move || runtime.block_on(publisher.run()))
        .map_err(StartError::Thread)?;
    first.await.map_err(|_| StartError::Defect)?;
    Ok(KubernetesSource { snapshots, sources, judged })
}

/// Owns what is published.
struct Publisher {
    world: World,
    received: mpsc::Receiver<Change>,
    snapshots: latest::Sender<Arc<Snapshot>>,
    sources: latest::Sender<Arc<SourceStatus>>,
    judged: latest::Sender<Arc<Judged>>,
    /// The Secrets to follow.
    wanted: latest::Sender<BTreeSet<Name>>,
    first: Option<oneshot::Sender<()>>,
    /// When the next state may follow.
    next: Instant,
    pulse: Pulse,
}

impl Publisher {
    /// Takes changes and publishes, until nobody listens. It is the only work of its thread, so compiling may take its time.
    async fn run(mut self) {
        loop {
            self.pulse.beat(std::time::Instant::now());
            let first = tokio::select! {
                first = self.received.recv() => first,
                () = self.snapshots.closed(), if self.first.is_none() => return,
                () = sleep(pulse::EACH) => continue,
            };
            let Some(first) = first else { return };
            self.world.apply(first);
            let latest = self.next.max(Instant::now() + QUIET_MAX);
            while let Ok(Some(next)) = {
                let quiet = self.next.max(Instant::now() + QUIET);
                timeout_at(latest.min(quiet), self.received.recv()).await
            } {
                self.world.apply(next);
                if Instant::now() >= latest {
                    break;
                }
            }
            if self.world.is_listed() {
                self.next = Instant::now() + PACE;
                self.publish();
            }
        }
    }

    fn publish(&mut self) {
        let state = self.world.compile();
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != state.secrets;
            if changed {
                wanted.clone_from(&state.secrets);
            }
            changed
        });
        self.snapshots.send_if_modified(|current| {
            let changed = !Arc::ptr_eq(current, &state.snapshot);
            if changed {
                tracing::info!(version = state.snapshot.version(), "configuration published");
                *current = state.snapshot;
            }
            changed
        });
        self.sources.send_if_modified(|current| {
            let changed = **current != state.status;
            if changed {
                state.status.log_since(current);
                *current = Arc::new(state.status);
            }
            changed
        });
        if let Some(judged) = state.judged {
            self.judged.send_replace(Arc::new(judged));
        }
        if let Some(first) = self.first.take() {
            // Whoever started us may have given up.
            first.send(()).ok();
        }
    }
}
