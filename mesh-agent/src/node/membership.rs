//! Owns carrying one pod in or out through its three parts: the kernel, the bridge, and the data path.
//!
//! Invariants:
//! - A pod's listeners are served as soon as it is enrolled, whatever its neighbours take: connects that were
//!   redirected meanwhile wait in their backlog.
//! - Going out, redirection ends first, then the listeners close; established connections live on.
//! - Pods that were enrolled by an earlier agent know of each other before the first of them is served.
//! - An enrolment whose listeners cannot be served is taken back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use mesh_core::id::WorkloadId;
use mesh_proxy::{
    AddPodError, Proxy,
    kernel::{PodHandle, PodListeners},
};
use mesh_redirect::{EnrolError, EnrolRequest, EnrolledPod, Node};
use tokio::runtime::Handle;

use super::bridge::Bridge;
use crate::report::report;

/// Pods enrolled at once. The work is system calls, much of it waiting for the verifier, so a few more threads
/// than cores pay.
const THREADS_MAX: usize = 8;

/// Why a pod did not get in.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error(transparent)]
    Kernel(#[from] EnrolError),
    #[error(transparent)]
    Proxy(#[from] AddPodError),
}

/// What became of each pod: a warning, or why it did not get in.
pub(super) type Joined = BTreeMap<WorkloadId, Result<Option<String>, JoinError>>;

/// The three parts.
#[derive(Debug)]
pub(super) struct Membership {
    kernel: Arc<Node>,
    bridge: Arc<Bridge>,
    proxy: Arc<Proxy>,
    /// The control thread's; the blocking threads wait on it for the workers' answers.
    runtime: Handle,
}

impl Membership {
    pub(super) fn new(
        kernel: &Arc<Node>,
        bridge: &Arc<Bridge>,
        proxy: &Arc<Proxy>,
        runtime: &Handle,
    ) -> Self {
        Self {
            kernel: Arc::clone(kernel),
            bridge: Arc::clone(bridge),
            proxy: Arc::clone(proxy),
            runtime: runtime.clone(),
        }
    }

    /// Brings pods in, several at a time. `adopted` are those of them that the kernel has as enrolled. Blocking.
    pub(super) fn join(&self, requests: &[EnrolRequest], adopted: &BTreeSet<WorkloadId>) -> Joined {
        let expected = requests.iter().filter(|request| adopted.contains(&request.config.workload));
        for request in expected.clone() {
            self.bridge.expect(request.config.workload, request.netns.cookie());
        }
        let next = AtomicUsize::new(0);
        let joined = Mutex::new(Joined::new());
        let work = || {
            while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome = self.join_one(request);
                let mut joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
                joined.insert(request.config.workload, outcome);
            }
        };
        thread::scope(|scope| {
            let threads = THREADS_MAX.min(requests.len());
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                // A panic is its pod's: the caller misses it in the result.
                drop(worker.join());
            }
        });
        let joined = joined.into_inner().unwrap_or_else(PoisonError::into_inner);
        for request in expected {
            let workload = request.config.workload;
            if !matches!(joined.get(&workload), Some(Ok(_))) {
                self.bridge.expect_no_more(workload, request.netns.cookie());
            }
        }
        joined
    }

    fn join_one(&self, request: &EnrolRequest) -> Result<Option<String>, JoinError> {
        let EnrolledPod { pod, sockets, listeners, warnings, .. } = self.kernel.enrol(request.clone())?;
        let config = &request.config;
        let handle = PodHandle {
            pod,
            workload: config.workload,
            name: config.name.clone(),
            netns_cookie: request.netns.cookie(),
            addrs: config.addrs.clone(),
        };
        let listeners = PodListeners {
            outbound: listeners.outbound,
            inbound: listeners.inbound,
            hbone: listeners.hbone,
            dns_udp: listeners.dns_udp,
            dns_tcp: listeners.dns_tcp,
        };
        self.bridge.add(pod, config.workload, sockets);
        if let Err(error) = self.runtime.block_on(self.proxy.add_pod(handle, listeners)) {
            self.leave(&BTreeSet::from([pod]));
            return Err(error.into());
        }
        Ok((!warnings.is_empty()).then(|| warnings.join("; ")))
    }

    /// Takes pods out. Blocking.
    pub(super) fn leave(&self, pods: &BTreeSet<u32>) {
        if pods.is_empty() {
            return;
        }
        let pods: Vec<u32> = pods.iter().copied().collect();
        self.kernel.remove(&pods);
        self.forget(&pods);
    }

    /// Stops serving pods that are out of the kernel. Blocking.
    pub(super) fn forget(&self, pods: &[u32]) {
        for pod in pods {
            self.runtime.block_on(self.proxy.remove_pod(*pod));
            self.bridge.remove(*pod);
            tracing::info!(id = pod, "pod removed");
        }
    }
}

impl JoinError {
    /// The error with its causes.
    pub(super) fn reason(&self) -> String {
        report(self)
    }
}
