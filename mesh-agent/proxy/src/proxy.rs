//! The data path as a whole: its workers, and the few things the agent tells them.
//!
//! Invariants:
//! - A pod's listeners are spread over the workers when it is added and stay where they are.
//! - Dropping a [`Proxy`] ends its workers and with them every connection.

use std::{
    collections::BTreeMap, fmt, io, net::TcpListener, os::fd::OwnedFd, rc::Rc, sync::Arc, thread,
    time::Duration,
};

use mesh_core::{
    route::{Origin, scope::Scoped},
    snapshot::Snapshot,
};
use mesh_identity::Certificates;
use socket2::SockRef;
use tokio::{
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use crate::{
    close::Direction,
    connect::report,
    connections::{Admission, ConnectionView},
    destination::by_name::CalledNames,
    destination::{
        limits::Limits,
        standing::{DestinationUse, destinations},
    },
    kernel::{Kernel, PodHandle, PodListeners, Sockets},
    layers::tls::{Origination, credential, is_wanted},
    listener::{Listener, Purpose, Queued},
    metrics::Metrics,
    settings::Settings,
    worker::{COMMANDS_MAX, Command, Link, Pod, Shared, Worker, run},
};

/// Tasks a worker runs between two looks at the reactor: small, because a bulk flow's turn takes a millisecond.
const EVENT_INTERVAL: u32 = 16;
/// Time a worker has to answer a question; one that hangs is left out of the answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What the proxy rests on.
pub struct Dependencies {
    /// Makes sockets in pods.
    pub sockets: Arc<dyn Sockets>,
    /// Answers questions about sockets and pods.
    pub kernel: Arc<dyn Kernel>,
    /// The world. Publish before policy generations are bumped in the kernel.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Certificates of this node's workloads, for tunnels.
    pub certificates: Arc<Certificates>,
    /// Called each 100 ms with the oldest liveness stamp of all workers, CLOCK_MONOTONIC nanoseconds.
    pub alive: Box<dyn Fn(u64) + Send + Sync>,
}

impl fmt::Debug for Dependencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dependencies").finish_non_exhaustive()
    }
}

/// Settings for TLS that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnusableTls {
    /// The DestinationRule.
    pub origin: Arc<Origin>,
    /// Why.
    pub reason: String,
    /// What was read before is in use; else connections are refused.
    pub before_in_use: bool,
}

/// The running data path.
pub struct Proxy {
    shared: Arc<Shared>,
    /// Dropped with the proxy, which ends the workers.
    _stop: watch::Sender<()>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("workers", &self.shared.links.len()).finish_non_exhaustive()
    }
}

/// Why the data path does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No event loop.
    #[error("make the event loop of worker {worker}")]
    EventLoop {
        /// Which one.
        worker: usize,
        /// The kernel's verdict.
        #[source]
        source: io::Error,
    },
    /// No thread.
    #[error("start the thread of worker {worker}")]
    Thread {
        /// Which one.
        worker: usize,
        /// The kernel's verdict.
        #[source]
        source: io::Error,
    },
}

/// Why a pod's listeners are not served.
#[derive(Debug, thiserror::Error)]
pub enum AddPodError {
    /// A listener is no usable socket.
    #[error("serve a listener of pod {pod}")]
    Listener {
        /// Namespace and name.
        pod: String,
        /// The kernel's verdict.
        #[source]
        source: io::Error,
    },
    /// A worker is gone: the process is ending.
    #[error("serve pod {pod}: a worker has ended")]
    Stopped {
        /// Namespace and name.
        pod: String,
    },
}

/// Outcome of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were reset because the grace period was over.
    pub aborted: usize,
}

impl Proxy {
    /// Starts the workers.
    ///
    /// # Errors
    /// No thread or no event loop; those that were started end again.
    pub fn start(settings: Settings, dependencies: Dependencies) -> Result<Self, StartError> {
        let Dependencies { sockets, kernel, snapshots, metrics, certificates, alive } = dependencies;
        let workers = settings.workers.get();
        let (links, commands): (Vec<_>, Vec<_>) = (0..workers)
            .map(|_| {
                let (commands_tx, commands_rx) = mpsc::channel(COMMANDS_MAX);
                (Link::new(commands_tx), commands_rx)
            })
            .unzip();
        let admission = Arc::new(Admission::new(settings.connections_max));
        let handshakes = Admission::new(settings.hbone.handshakes_max);
        let shared = Arc::new(Shared {
            called_names: CalledNames::default(),
            origination: Origination::new(&settings.tls_files),
            settings,
            sockets,
            kernel,
            metrics,
            certificates,
            handshakes,
            limits: Limits::default(),
            inbound: Limits::default(),
            admission,
            links,
            alive,
        });
        let (stop, _) = watch::channel(());
        for (index, commands) in commands.into_iter().enumerate() {
            let (shared, snapshots, stop) = (Arc::clone(&shared), snapshots.clone(), stop.subscribe());
            let (ready_tx, ready_rx) = std::sync::mpsc::sync_channel(1);
            thread::Builder::new()
                .name(format!("mesh-worker-{index}"))
                .spawn(move || {
                    // The runtime must live and die on its own thread.
                    let runtime = match event_loop() {
                        Ok(runtime) => runtime,
                        Err(error) => {
                            ready_tx.send(Err(error)).ok();
                            return;
                        }
                    };
                    ready_tx.send(Ok(())).ok();
                    let worker = Rc::new(Worker::new(index, shared, snapshots));
                    runtime.block_on(run(worker, commands, stop));
                })
                .map_err(|source| StartError::Thread { worker: index, source })?;
            let ended = || io::Error::other("the thread ended");
            ready_rx
                .recv()
                .unwrap_or_else(|_| Err(ended()))
                .map_err(|source| StartError::EventLoop { worker: index, source })?;
        }
        Ok(Self { shared, _stop: stop })
    }

    /// Serves a pod's listeners; returns when all workers do.
    ///
    /// # Errors
    /// A socket is unusable; then none of the pod's listeners is served.
    pub async fn add_pod(&self, handle: PodHandle, listeners: PodListeners) -> Result<(), AddPodError> {
        let name = handle.name.to_string();
        let unusable = |source| AddPodError::Listener { pod: name.clone(), source };
        let inbound = TcpListener::from(listeners.inbound);
        let inbound_port = inbound.local_addr().map_err(unusable)?.port();
        let port_of = |socket: &OwnedFd| {
            let addr = SockRef::from(socket).local_addr()?.as_socket();
            Ok::<u16, io::Error>(addr.map_or(0, |addr| addr.port()))
        };
        let mut private_ports = vec![inbound_port];
        for socket in
            listeners.outbound.iter().chain([&listeners.hbone, &listeners.dns_tcp, &listeners.dns_udp])
        {
            private_ports.push(port_of(socket).map_err(unusable)?);
        }
        let settings = &self.shared.settings;
        let id = handle.pod;
        let pod = Arc::new(Pod {
            handle: Arc::new(handle),
            admission: Arc::new(Admission::new(settings.pod_connections_max)),
            inbound_port,
            private_ports,
            handshakes: Admission::new(settings.hbone.pod_handshakes_max),
            dns_in_flight: Admission::new(settings.dns.in_flight_max),
            dns_connections: Admission::new(settings.dns.tcp_connections_max),
        });
        let all = listeners
            .outbound
            .into_iter()
            .map(|socket| (socket, Purpose::Tcp(Direction::Outbound)))
            .chain([
                (inbound.into(), Purpose::Tcp(Direction::Inbound)),
                (listeners.hbone, Purpose::Hbone),
                (listeners.dns_udp, Purpose::DnsUdp),
                (listeners.dns_tcp, Purpose::DnsTcp),
            ])
            .map(|(socket, purpose)| Listener { socket, purpose });
        let workers = self.shared.links.len();
        let mut shares: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
        for (index, listener) in all.enumerate() {
            // Pods start at different workers, so that those with one busy listener do not meet on one.
            shares[(id as usize + index) % workers].push(listener);
        }
        let mut outcome = Ok(());
        for (link, listeners) in self.shared.links.iter().zip(shares) {
            let (done_tx, done_rx) = oneshot::channel();
            let command = Command::Serve { pod: Arc::clone(&pod), listeners, done: done_tx };
            let served = match link.commands.send(command).await {
                Ok(()) => done_rx.await,
                Err(_) => return Err(AddPodError::Stopped { pod: name }),
            };
            let served = served.map_err(|_| AddPodError::Stopped { pod: name.clone() })?;
            outcome = outcome.and(served.map_err(unusable));
        }
        if outcome.is_err() {
            self.remove_pod(id).await;
        }
        outcome
    }

    /// Closes a pod's listeners; its connections live on. Returns when no worker accepts any more.
    pub async fn remove_pod(&self, pod: u32) {
        for link in &self.shared.links {
            let (done_tx, done_rx) = oneshot::channel();
            // A worker that has ended accepts nothing either.
            if link.commands.send(Command::Remove { pod, done: done_tx }).await.is_ok() {
                done_rx.await.ok();
            }
        }
    }

    /// Second descriptors of all listeners, for another process; they are served here as before.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub async fn duplicate_listeners(&self) -> io::Result<Vec<OwnedFd>> {
        let mut listeners = Vec::new();
        for link in &self.shared.links {
            let (done_tx, done_rx) = oneshot::channel();
            let ask = async {
                link.commands.send(Command::Duplicate { done: done_tx }).await.ok()?;
                done_rx.await.ok()
            };
            // The listeners of a worker that hangs or has ended are made anew.
            if let Some(of_worker) = timeout(ANSWER_MAX, ask).await.ok().flatten() {
                listeners.append(&mut of_worker?);
            }
        }
        Ok(listeners)
    }

    /// Closes all listeners and waits for connections to end; those left after `grace` are reset. `queued` says what becomes of
    /// those nobody has accepted yet.
    pub async fn drain(&self, grace: Duration, queued: Queued) -> Drained {
        let deadline = Instant::now() + grace;
        let mut waiting = Vec::new();
        for link in &self.shared.links {
            let (done_tx, done_rx) = oneshot::channel();
            if link.commands.send(Command::Drain { deadline, queued, done: done_tx }).await.is_ok() {
                waiting.push(done_rx);
            }
        }
        let mut aborted = 0;
        for done in waiting {
            // A worker that hangs must not hold the process back for ever.
            let limit = deadline + 2 * ANSWER_MAX;
            aborted += tokio::time::timeout_at(limit, done).await.map_or(0, |rest| rest.unwrap_or(0));
        }
        Drained { aborted }
    }

    /// Up to `max` live connections of each worker, oldest first.
    pub async fn connections(&self, max: usize) -> Vec<ConnectionView> {
        let mut rows = Vec::new();
        for link in &self.shared.links {
            let (done_tx, done_rx) = oneshot::channel();
            let ask = async {
                link.commands.send(Command::List { max, done: done_tx }).await.ok()?;
                done_rx.await.ok()
            };
            rows.extend(timeout(ANSWER_MAX, ask).await.ok().flatten().unwrap_or_default());
        }
        rows.sort_by_key(|row| (std::cmp::Reverse(row.age_ms), row.id));
        rows
    }

    /// What requests and connections of this node's pods have in use at their destinations, and which endpoints failed.
    pub async fn destinations(&self) -> Vec<DestinationUse> {
        let mut active = Vec::new();
        for link in &self.shared.links {
            let (done_tx, done_rx) = oneshot::channel();
            let ask = async {
                link.commands.send(Command::ListActive { done: done_tx }).await.ok()?;
                done_rx.await.ok()
            };
            active.extend(timeout(ANSWER_MAX, ask).await.ok().flatten().unwrap_or_default());
        }
        destinations(&self.shared.limits, active)
    }

    /// Policies whose settings for TLS were wanted by connections and cannot be used as their files are now, by where they are written.
    /// Reads files.
    pub fn unusable_tls(&self, snapshot: &Snapshot) -> Vec<UnusableTls> {
        let clusters = snapshot.routes().clusters.values().flat_map(Scoped::values);
        let wanted = clusters.filter_map(|cluster| {
            let tls = cluster.policy.tls.as_ref().filter(|tls| is_wanted(tls, None))?;
            Some((cluster.origin.clone()?, tls))
        });
        // Of ports and clients that one rule is about, one stands for all.
        let wanted: BTreeMap<_, _> = wanted.collect();
        let told = wanted.into_iter().filter_map(|(origin, tls)| {
            let credential = credential(snapshot, &self.shared.settings.node, tls);
            let (error, before_in_use) = self.shared.origination.unusable(tls, credential)?;
            Some(UnusableTls { origin, reason: report(&error), before_in_use })
        });
        told.collect()
    }
}

fn event_loop() -> io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .build_local(LocalOptions::default())
}
