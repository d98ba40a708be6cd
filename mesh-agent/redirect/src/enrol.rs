//! Owns bringing a pod into the mesh and taking it out again.
//!
//! Invariants:
//! - `PODS` is written last and deleted first: a pod whose connects are redirected has everything else in place.
//! - Enrolling and removing break no established connection: hooks see new connections only.
//! - A failed enrolment leaves nothing behind; a failed adoption leaves the pod as the earlier agent did.
//! - After [`Node::remove`] no map holds anything that names the pod's namespace or addresses, so whoever gets
//!   the address next gains nothing.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{Arc, atomic::AtomicUsize, atomic::Ordering},
    thread,
};

use aya_obj::generated::bpf_attach_type;
use ipnet::IpNet;
use mesh_common::{
    Addr,
    pod::{
        DIR_INBOUND, DIR_OUTBOUND, ExcludedKey, INBOUND_FAIL_CLOSED, INBOUND_PORTS, InboundCfg,
        LISTENER_INBOUND, POD_DNS, POD_EXCLUDED, POD_FAIL_CLOSED, POD_NODE, POD_PORTS, PORT_EXCLUDED,
        PORT_FAIL_CLOSED, PORT_FAIL_OPEN, PodCfg, PortKey, ProbeKey, listener_key,
    },
    ports,
};
use mesh_core::{
    id::WorkloadId,
    plan::{ActualPod, PodConfig, PortRule},
    snapshot::Name,
};

use crate::{
    arrival::{self, InstanceError},
    links::{self, AttachError, Attachment},
    listeners::{self, ListenError, Listeners},
    map::{ExcludedPrefix, MapError, Maps},
    netns::Netns,
    node::{Node, lock},
    sockets::PodSockets,
    sys::LinkTarget,
    verdicts,
};

/// Threads for [`Node::enrol_all`]: the work is system calls, half of them waiting for the verifier's lock-free
/// check, so a few more threads than cores pay.
const ENROL_THREADS: usize = 8;

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
                    applied: here.map(|here| here.config.clone()),
                },
            );
        })?;
        Ok(actual)
    }

    /// Enrols many pods at once, in parallel. Results are in the order of the requests.
    pub fn enrol_all(&self, requests: Vec<EnrolRequest>) -> Vec<Result<EnrolledPod, EnrolError>> {
        let next = AtomicUsize::new(0);
        let mut results: Vec<(usize, Result<EnrolledPod, EnrolError>)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..ENROL_THREADS.min(requests.len()))
                .map(|_| {
                    scope.spawn(|| {
                        let mut done = Vec::new();
                        while let Some((at, request)) = {
                            let at = next.fetch_add(1, Ordering::Relaxed);
                            requests.get(at).map(|request| (at, request))
                        } {
                            done.push((at, self.enrol(request.clone())));
                        }
                        done
                    })
                })
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
        });
        results.sort_by_key(|(at, _)| *at);
        results.into_iter().map(|(_, result)| result).collect()
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
            self.take_out(&[(pod, Some(netns.cookie()), config.addrs.clone())]);
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
        // What an earlier agent's verdicts were made of is unknown, so adoption voids them.
        verdicts::renew(&self.maps, config.workload).map_err(table)?;
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
        let enrolled =
            Enrolled { sockets: sockets.clone(), config: config.clone(), program, _link: attached.link };
        lock(&self.pods).insert(pod, enrolled);
        tracing::info!(pod = %name, id = pod, netns_cookie = cookie, adopted = known, "pod enrolled");
        Ok(EnrolledPod { pod, sockets, listeners, adopted: attached.adopted, warnings })
    }

    fn open_listeners(&self, netns: &Netns, name: &Name) -> Result<(Listeners, Vec<String>), EnrolError> {
        let maps = &self.maps;
        let cookie = netns.cookie();
        let (listeners, warnings) = netns
            .on_own_thread(|| (listeners::listen(maps, cookie), reuse_time_wait()))
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
        self.write_config(pod, cookie, config, Some(&enrolled.config)).map_err(table)?;
        self.maps.pods.put(&cookie, &pod_cfg(pod, config)).map_err(table)?;
        if enrolled.config.policy_hash != config.policy_hash {
            verdicts::renew(&self.maps, config.workload).map_err(table)?;
        }
        let lost: Vec<IpAddr> =
            enrolled.config.addrs.iter().filter(|addr| !config.addrs.contains(addr)).copied().collect();
        if !lost.is_empty() {
            purge(&self.maps, &HashSet::new(), &lost.iter().map(|addr| Addr::from(*addr)).collect());
        }
        enrolled.config = config.clone();
        Ok(())
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

    /// Takes pods out of the mesh and forgets everything about them before it returns. Unknown ids are ignored.
    ///
    /// Established connections live on. The caller tells the proxy to close the listeners.
    pub fn remove(&self, pods: &[u32]) {
        let mut known: HashMap<u32, (u64, Vec<IpAddr>)> = HashMap::new();
        let listed = self.maps.pods.each(|cookie, entry| {
            if entry.flags & POD_NODE == 0 && pods.contains(&entry.pod) {
                let addrs = [entry.addr4, entry.addr6].into_iter().filter(|addr| !addr.is_unspecified());
                known.insert(entry.pod, (*cookie, addrs.map(IpAddr::from).collect()));
            }
        });
        if let Err(error) = listed {
            tracing::warn!(%error, "cannot list the pods in the kernel");
        }
        let doomed: Vec<(u32, Option<u64>, Vec<IpAddr>)> = pods
            .iter()
            .map(|pod| {
                let served = lock(&self.pods).remove(pod);
                let mut addrs = served.as_ref().map(|s| s.config.addrs.clone()).unwrap_or_default();
                let mut cookie = served.as_ref().map(|s| s.sockets.netns().cookie());
                if let Some((found, also)) = known.remove(pod) {
                    cookie = Some(found);
                    addrs.extend(also);
                }
                (*pod, cookie, addrs)
            })
            .collect();
        self.take_out(&doomed);
    }

    /// Each part is tried whatever became of the others: a leftover is swept later, a skipped part is not.
    fn take_out(&self, doomed: &[(u32, Option<u64>, Vec<IpAddr>)]) {
        let maps = &self.maps;
        let mut failures: Vec<MapError> = Vec::new();
        let mut note = |result: Result<bool, MapError>| {
            if let Err(error) = result {
                failures.push(error);
            }
        };
        for (pod, cookie, _) in doomed {
            let Some(cookie) = cookie else { continue };
            // Another pod id may own the namespace by now.
            match maps.pods.get(cookie) {
                Ok(Some(entry)) if entry.pod == *pod => note(maps.pods.delete(cookie)),
                Ok(_) => {}
                Err(error) => note(Err(error)),
            }
        }
        let ids: HashSet<u32> = doomed.iter().map(|(pod, ..)| *pod).collect();
        let mut workloads: HashSet<u64> = HashSet::new();
        for pod in &ids {
            links::remove(&self.folders.arrival(*pod));
            if let Ok(Some(inbound)) = maps.inbound.get(pod) {
                workloads.insert(inbound.workload);
            }
            note(maps.inbound.delete(pod));
            for kind in (0..ports::OUTBOUND.len() as u32).chain([LISTENER_INBOUND]) {
                note(maps.listeners.delete(&listener_key(*pod, kind)));
            }
        }
        // A workload that is enrolled under another id keeps what is keyed by it.
        let kept = maps.inbound.each(|_, other| {
            workloads.remove(&other.workload);
        });
        note(kept.map(|()| true));
        for workload in &workloads {
            note(maps.policy_gen.delete(workload));
        }
        let addrs: HashSet<Addr> =
            doomed.iter().flat_map(|(.., addrs)| addrs).map(|addr| Addr::from(*addr)).collect();
        note(maps.probes.delete_where(|key, _| addrs.contains(&key.addr)).map(|_| true));
        note(maps.port_cfgs.delete_where(|key, _| ids.contains(&key.pod)).map(|_| true));
        note(maps.excluded.delete_where(|key, _| ids.contains(&u32::from_be(key.data.pod_be))).map(|_| true));
        let cookies: HashSet<u64> = doomed.iter().filter_map(|(_, cookie, _)| *cookie).collect();
        for cookie in &cookies {
            note(maps.tickets_used.delete(cookie));
        }
        for error in failures {
            tracing::warn!(error = %crate::report(&error), "leftover of a removed pod");
        }
        purge(maps, &cookies, &addrs);
    }

    /// Makes sockets in an enrolled pod.
    pub fn sockets(&self, pod: u32) -> Option<PodSockets> {
        lock(&self.pods).get(&pod).map(|enrolled| enrolled.sockets.clone())
    }
}

/// Deletes what the programs and the agent cached about namespaces and addresses.
fn purge(maps: &Maps, cookies: &HashSet<u64>, addrs: &HashSet<Addr>) {
    let results = [
        maps.verdicts
            .delete_where(|key, _| cookies.contains(&key.netns_cookie) || cookies.contains(&key.incarnation)),
        maps.tickets.delete_where(|key, ticket| {
            cookies.contains(&ticket.netns_cookie)
                || cookies.contains(&ticket.incarnation)
                || addrs.contains(&key.src)
                || addrs.contains(&key.dst)
        }),
        maps.affinity.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.orig_dst.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.dns_orig.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.client_addr.delete_where(|key, _| addrs.contains(&key.src) || addrs.contains(&key.dst)),
    ];
    for error in results.into_iter().filter_map(Result::err) {
        tracing::warn!(error = %crate::report(&error), "cache entries of a removed pod stay");
    }
}

/// Proxied connects of a pod all go to its own address, so their source ports come back late from TIME_WAIT
/// unless the kernel may reuse them. The default (2) does that for loopback addresses only.
fn reuse_time_wait() -> Result<(), String> {
    // /proc/sys/net shows the namespace of the thread that opens it.
    const SETTING: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";
    fs::write(SETTING, "1").map_err(|error| {
        format!("cannot set {SETTING} in the pod: {error}; many short connections may run out of ports")
    })
}

fn pod_cfg(pod: u32, config: &PodConfig) -> PodCfg {
    let addr = |v4: bool| {
        config.addrs.iter().find(|addr| addr.is_ipv4() == v4).map_or(Addr::ZERO, |addr| Addr::from(*addr))
    };
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    PodCfg {
        workload: config.workload.0,
        addr4: addr(true),
        addr6: addr(false),
        prober_cgroup: 0,
        pod,
        flags: flag(config.dns_capture, POD_DNS)
            | flag(!config.outbound_ports.is_empty(), POD_PORTS)
            | flag(!config.excluded.is_empty(), POD_EXCLUDED)
            | flag(config.outbound_fail_closed, POD_FAIL_CLOSED),
    }
}

fn inbound_cfg(cookie: u64, config: &PodConfig) -> InboundCfg {
    let ports = if config.inbound_ports.is_empty() { 0 } else { INBOUND_PORTS };
    let closed = if config.inbound_fail_closed { INBOUND_FAIL_CLOSED } else { 0 };
    InboundCfg { workload: config.workload.0, incarnation: cookie, flags: ports | closed, pad: 0 }
}

fn port_entries(pod: u32, config: &PodConfig) -> HashMap<PortKey, u32> {
    let inbound = config.inbound_ports.iter().map(|(port, rule)| (*port, DIR_INBOUND, rule));
    let outbound = config.outbound_ports.iter().map(|(port, rule)| (*port, DIR_OUTBOUND, rule));
    inbound.chain(outbound).map(|(port, dir, rule)| (PortKey { pod, port, dir }, port_flags(rule))).collect()
}

fn port_flags(rule: &PortRule) -> u32 {
    let excluded = if rule.excluded { PORT_EXCLUDED } else { 0 };
    let closed = match rule.fail_closed {
        Some(true) => PORT_FAIL_CLOSED,
        Some(false) => PORT_FAIL_OPEN,
        None => 0,
    };
    excluded | closed
}

fn excluded_entries(pod: u32, config: &PodConfig) -> HashSet<ExcludedPrefix> {
    let entry = |addr: IpAddr, bits: u32| ExcludedPrefix {
        // The pod's 32 bits, then the address in its mapped form.
        prefix_len: 32 + bits,
        data: ExcludedKey { pod_be: pod.to_be(), addr: Addr::from(addr) },
    };
    let mut entries = HashSet::new();
    for net in &config.excluded {
        match net {
            IpNet::V4(net) => {
                entries.insert(entry(net.network().into(), 96 + u32::from(net.prefix_len())));
            }
            IpNet::V6(net) => {
                entries.extend(pure_v6(net).into_iter().map(|(addr, bits)| entry(addr.into(), bits)));
            }
        }
    }
    entries
}

/// An IPv6 network without the block of mapped IPv4 addresses, as prefixes: `::/0` is no word about IPv4.
fn pure_v6(net: &ipnet::Ipv6Net) -> Vec<(Ipv6Addr, u32)> {
    const MAPPED: u128 = 0xffff << 32;
    let bits = u32::from(net.prefix_len());
    if bits > 96 || !net.contains(&Ipv6Addr::from(MAPPED)) {
        return vec![(net.network(), bits)];
    }
    // Each prefix agrees with the mapped block up to one bit and differs there.
    (bits..96)
        .map(|at| {
            let bit = 1_u128 << (127 - at);
            let above = !(bit - 1) & !bit;
            (Ipv6Addr::from((MAPPED & above) | (!MAPPED & bit)), at + 1)
        })
        .collect()
}

fn probe_entries(config: &PodConfig) -> HashSet<ProbeKey> {
    config
        .addrs
        .iter()
        .flat_map(|addr| {
            config.probe_ports.iter().map(|port| ProbeKey { addr: Addr::from(*addr), port: *port, pad: 0 })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excluding_all_of_ipv6_leaves_ipv4_alone() {
        let prefixes = pure_v6(&"::/0".parse().unwrap());
        let covers = |addr: &str| {
            let addr = u128::from(addr.parse::<Ipv6Addr>().unwrap());
            prefixes.iter().any(|(net, bits)| (addr ^ u128::from(*net)) >> (128 - bits) == 0)
        };
        for inside in ["fd00::1", "2001:db8::1", "::1", "::fffe:1.2.3.4", "8000::"] {
            assert!(covers(inside), "{inside}");
        }
        for outside in ["::ffff:10.0.0.1", "::ffff:0.0.0.0", "::ffff:255.255.255.255"] {
            assert!(!covers(outside), "{outside}");
        }
        assert_eq!(pure_v6(&"fd00::/8".parse().unwrap()), [("fd00::".parse().unwrap(), 8)]);
    }

    #[test]
    fn port_rules_become_flags() {
        let flags = |excluded, fail_closed| port_flags(&PortRule { excluded, fail_closed });
        assert_eq!(flags(true, None), PORT_EXCLUDED);
        assert_eq!(flags(false, Some(true)), PORT_FAIL_CLOSED);
        assert_eq!(flags(true, Some(false)), PORT_EXCLUDED | PORT_FAIL_OPEN);
    }
}
