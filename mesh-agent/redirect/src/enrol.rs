//! Owns bringing a pod into the mesh and changing what it is configured to.
//!
//! Invariants:
//! - `PODS` is written last: a pod whose connects are redirected has everything else in place.
//! - Enrolling and removing break no established connection: hooks see new connections only.
//! - A failed enrolment leaves nothing behind; a failed adoption leaves the pod as the earlier agent did.
//!
//! Not here: taking pods out (`removal.rs`).

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Arc,
};

use aya_obj::generated::bpf_attach_type;
use mesh_common::{
    Addr,
    pod::{LISTENER_INBOUND, POD_NODE, listener_key},
};
use mesh_core::{
    id::WorkloadId,
    plan::{ActualPod, PodConfig},
    snapshot::Name,
};
use socket2::SockRef;

use crate::{
    arrival::{self, InstanceError},
    entries::{excluded_entries, inbound_cfg, pod_cfg, port_entries, probe_entries},
    host::HOST,
    links::{self, AttachError, Attachment},
    listeners::{self, ListenError, Listeners},
    map::MapError,
    netns::Netns,
    node::{Node, lock},
    removal::{Doomed, purge},
    sockets::PodSockets,
    sys::LinkTarget,
    verdicts,
};

/// A request to bring one pod in (or to take over one found in pins).
#[derive(Clone, Debug)]
pub struct EnrolRequest {
    /// Local pod id: a new one ([`Node::next_pod_id`]), or the pod's own when adopting.
    pub pod: u32,
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// What it shall be.
    pub config: PodConfig,
}

/// What an enrolment hands to the proxy.
#[derive(Debug)]
pub struct EnrolledPod {
    /// Local pod id.
    pub pod: u32,
    /// Makes sockets in the pod.
    pub sockets: PodSockets,
    /// Where its connections arrive.
    pub listeners: Listeners,
    /// The arrival link was taken over: there was no moment without it.
    pub adopted: bool,
    /// Something that works less well than it could.
    pub warnings: Vec<String>,
}

/// Why a pod could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The app has one of the agent's ports.
    #[error("pod {pod}: {protocol} port {port}, which the agent needs inside the pod, is taken (EADDRINUSE)")]
    PortTaken {
        /// Pod.
        pod: Name,
        /// Port.
        port: u16,
        /// `TCP` or `UDP`.
        protocol: &'static str,
    },
    /// A listener could not be made.
    #[error("pod {pod}: listen on port {port}")]
    Listen {
        /// Pod.
        pod: Name,
        /// Port.
        port: u16,
        /// Cause.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error("pod {pod}: enter its network namespace")]
    Enter {
        /// Pod.
        pod: Name,
        /// Cause.
        source: io::Error,
    },
    /// A map refused an entry.
    #[error("pod {pod}: write its entries")]
    Table {
        /// Pod.
        pod: Name,
        /// Cause.
        source: MapError,
    },
    /// The arrival program could not be loaded.
    #[error("pod {pod}: load its arrival program")]
    Program {
        /// Pod.
        pod: Name,
        /// Cause.
        source: InstanceError,
    },
    /// The arrival program could not be attached.
    #[error("pod {pod}: guard its arrivals")]
    Attach {
        /// Pod.
        pod: Name,
        /// Cause.
        source: AttachError,
    },
    /// No such pod in this agent.
    #[error("pod {pod}: not enrolled")]
    Unknown {
        /// Pod.
        pod: Name,
    },
}

impl EnrolError {
    /// The map that had no room, if that is why.
    pub fn full_map(&self) -> Option<&'static str> {
        match self {
            Self::Table { source, .. } if source.is_full() => Some(source.map),
            _ => None,
        }
    }
}

/// A pod this agent serves.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) sockets: PodSockets,
    pub(crate) config: PodConfig,
    /// Another process may have written other things since.
    pub(crate) is_stale: bool,
    pub(crate) program: OwnedFd,
    _link: OwnedFd,
}

impl Node {
    /// The pods as the kernel has them, by local pod id, for [`mesh_core::plan::plan`].
    pub fn actual(&self) -> Result<BTreeMap<u32, ActualPod>, MapError> {
        let served = lock(&self.pods);
        let mut actual = BTreeMap::new();
        self.maps.pods.each(|cookie, pod| {
            if pod.flags & POD_NODE != 0 {
                return;
            }
            let here = served.get(&pod.pod).filter(|here| here.sockets.netns().cookie() == *cookie);
            actual.insert(
                pod.pod,
                ActualPod {
                    workload: WorkloadId(pod.workload),
                    netns_cookie: *cookie,
                    listening: here.is_some(),
                    applied: here.filter(|here| !here.is_stale).map(|here| here.config.clone()),
                },
            );
        })?;
        Ok(actual)
    }

    /// Brings a pod into the mesh, or takes over one that an earlier agent enrolled under the same id.
    pub fn enrol(&self, request: EnrolRequest) -> Result<EnrolledPod, EnrolError> {
        let EnrolRequest { pod, netns, config } = request;
        let name = config.name.clone();
        let known = self
            .maps
            .pods
            .get(&netns.cookie())
            .map_err(|source| EnrolError::Table { pod: name, source })?
            .is_some_and(|known| known.pod == pod);
        let brought_in = self.bring_in(pod, &netns, &config, known);
        if brought_in.is_err() && !known {
            let (cookie, addrs) = (Some(netns.cookie()), config.addrs.clone());
            self.take_out(&[Doomed { pod, cookie, addrs }]);
        }
        brought_in
    }

    fn bring_in(
        &self,
        pod: u32,
        netns: &Arc<Netns>,
        config: &PodConfig,
        known: bool,
    ) -> Result<EnrolledPod, EnrolError> {
        let name = &config.name;
        let table = |source| EnrolError::Table { pod: name.clone(), source };
        let cookie = netns.cookie();
        let (listeners, warnings) = self.open_listeners(netns, name)?;

        for (kind, listener) in listeners.outbound.iter().enumerate() {
            self.put_listener(pod, kind as u32, listener).map_err(table)?;
        }
        self.put_listener(pod, LISTENER_INBOUND, &listeners.inbound).map_err(table)?;
        self.maps.tickets_used.put_new(&cookie, &0).map_err(table)?;
        self.void_foreign_verdicts(cookie, config).map_err(table)?;
        self.write_config(pod, cookie, config, None).map_err(table)?;

        let program =
            self.template.load(pod).map_err(|source| EnrolError::Program { pod: name.clone(), source })?;
        let what = Attachment {
            name: arrival::PROGRAM,
            program: program.as_fd(),
            target: netns.as_fd(),
            identity: LinkTarget::Netns {
                // The kernel's link info has 32 bits for it, and so have its inode numbers of namespaces.
                inode: netns.inode() as u32,
                attach_type: bpf_attach_type::BPF_SK_LOOKUP as u32,
            },
            attach_type: bpf_attach_type::BPF_SK_LOOKUP,
        };
        let earlier: Vec<_> = lock(&self.inherited).remove(&netns.inode()).into_iter().collect();
        let attached = links::attach(&what, &self.folders.arrival(pod), &earlier)
            .map_err(|source| EnrolError::Attach { pod: name.clone(), source })?;

        self.maps.pods.put(&cookie, &pod_cfg(pod, config)).map_err(table)?;
        let sockets = PodSockets::new(Arc::clone(netns), Arc::clone(&self.maps));
        let enrolled = Enrolled {
            sockets: sockets.clone(),
            config: config.clone(),
            is_stale: false,
            program,
            _link: attached.link,
        };
        lock(&self.pods).insert(pod, enrolled);
        tracing::info!(pod = %name, id = pod, netns_cookie = cookie, adopted = known, "pod enrolled");
        Ok(EnrolledPod { pod, sockets, listeners, adopted: attached.adopted, warnings })
    }

    fn open_listeners(&self, netns: &Netns, name: &Name) -> Result<(Listeners, Vec<String>), EnrolError> {
        let (maps, inherited) = (&self.maps, &self.inherited_sockets);
        let cookie = netns.cookie();
        let (listeners, warnings) = netns
            .on_own_thread(|| (listeners::listen(maps, cookie, inherited), reuse_time_wait()))
            .map_err(|source| EnrolError::Enter { pod: name.clone(), source })?;
        let listeners = listeners.map_err(|error| match error {
            ListenError::Taken { port, protocol } => {
                EnrolError::PortTaken { pod: name.clone(), port, protocol }
            }
            ListenError::Socket { port, source } => EnrolError::Listen { pod: name.clone(), port, source },
            ListenError::Role { source } => EnrolError::Table { pod: name.clone(), source },
        })?;
        Ok((listeners, warnings.err().into_iter().collect()))
    }

    fn put_listener(&self, pod: u32, kind: u32, listener: &OwnedFd) -> Result<(), MapError> {
        // One that an earlier agent left is there already: there is no moment without it.
        let there = self.maps.listeners.get(&listener_key(pod, kind))?;
        if there.is_some() && there == SockRef::from(listener).cookie().ok() {
            return Ok(());
        }
        // The value goes in as a descriptor and comes out as the socket's cookie.
        self.maps.listeners.put(&listener_key(pod, kind), &(listener.as_raw_fd() as u64))
    }

    /// Writes a changed configuration of an enrolled pod. Listeners and connections stay.
    ///
    /// The new snapshot must be with the proxy's workers before this: a changed policy moves the generation, and
    /// a verdict made from the old snapshot must carry the old one.
    pub fn update(&self, pod: u32, config: &PodConfig) -> Result<(), EnrolError> {
        let table = |source| EnrolError::Table { pod: config.name.clone(), source };
        let mut served = lock(&self.pods);
        let Some(enrolled) = served.get_mut(&pod) else {
            return Err(EnrolError::Unknown { pod: config.name.clone() });
        };
        let cookie = enrolled.sockets.netns().cookie();
        if enrolled.is_stale {
            self.void_foreign_verdicts(cookie, config).map_err(table)?;
        }
        let before = (!enrolled.is_stale).then_some(&enrolled.config);
        self.write_config(pod, cookie, config, before).map_err(table)?;
        self.maps.pods.put(&cookie, &pod_cfg(pod, config)).map_err(table)?;
        if enrolled.config.policy_hash != config.policy_hash {
            verdicts::renew(&self.maps, config.workload, verdicts::basis(config.policy_hash))
                .map_err(table)?;
        }
        if enrolled.config.identity_hash != config.identity_hash {
            verdicts::renew_all(&self.maps).map_err(table)?;
        }
        let lost: Vec<IpAddr> =
            enrolled.config.addrs.iter().filter(|addr| !config.addrs.contains(addr)).copied().collect();
        if !lost.is_empty() {
            purge(&self.maps, &HashSet::new(), &lost.iter().map(|addr| Addr::from(*addr)).collect());
        }
        enrolled.config = config.clone();
        enrolled.is_stale = false;
        Ok(())
    }

    /// Voids the verdicts that another process made for a pod, or for its clients, from other policies or of another identity.
    fn void_foreign_verdicts(&self, cookie: u64, config: &PodConfig) -> Result<(), MapError> {
        let earlier = self.maps.pods.get(&cookie)?;
        if earlier.is_some_and(|earlier| earlier.identity != config.identity_hash) {
            verdicts::renew_all(&self.maps)?;
        }
        verdicts::keep_or_renew(&self.maps, config.workload, verdicts::basis(config.policy_hash))
    }

    /// Writes everything but `PODS`: new entries first, then the flags that make them count, then deletions.
    fn write_config(
        &self,
        pod: u32,
        cookie: u64,
        config: &PodConfig,
        before: Option<&PodConfig>,
    ) -> Result<(), MapError> {
        let ports = port_entries(pod, config);
        let excluded = excluded_entries(pod, config);
        let probes = probe_entries(config);
        for (key, flags) in &ports {
            self.maps.port_cfgs.put(key, flags)?;
        }
        for key in &excluded {
            self.maps.excluded.put(key, &1)?;
        }
        for key in &probes {
            self.maps.probes.put(key, &config.workload.0)?;
        }
        self.maps.inbound.put(&pod, &inbound_cfg(cookie, config))?;
        match before {
            Some(before) => {
                for key in port_entries(pod, before).keys().filter(|key| !ports.contains_key(key)) {
                    self.maps.port_cfgs.delete(key)?;
                }
                for key in excluded_entries(pod, before).difference(&excluded) {
                    self.maps.excluded.delete(key)?;
                }
                for key in probe_entries(before).difference(&probes) {
                    self.maps.probes.delete(key)?;
                }
            }
            // After a restart only the maps know what there was.
            None => {
                self.maps.port_cfgs.delete_where(|key, _| key.pod == pod && !ports.contains_key(key))?;
                self.maps
                    .excluded
                    .delete_where(|key, _| key.data.pod_be == pod.to_be() && !excluded.contains(key))?;
                self.maps
                    .probes
                    .delete_where(|key, workload| *workload == config.workload.0 && !probes.contains(key))?;
            }
        }
        Ok(())
    }

    /// Makes sockets in an enrolled pod.
    pub fn sockets(&self, pod: u32) -> Option<PodSockets> {
        lock(&self.pods).get(&pod).map(|enrolled| enrolled.sockets.clone())
    }
}

/// Proxied connects of a pod all go to its own address, so their source ports come back late from TIME_WAIT
/// unless the kernel may reuse them. The default (2) does that for loopback addresses only.
fn reuse_time_wait() -> Result<(), String> {
    // /proc/sys/net shows the namespace of the thread that opens it.
    const SETTING: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";
    let write = || match fs::write(SETTING, "1") {
        // Containers have it read-only; the host's own view has not.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(format!("{HOST}/root{SETTING}"), "1")
        }
        written => written,
    };
    write().map_err(|error| {
        format!("cannot set {SETTING} in the pod: {error}; many short connections may run out of ports")
    })
}
