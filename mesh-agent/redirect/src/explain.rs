//! Owns answering "what would happen to this connect" from the live maps, with the programs' own decision code.

use std::{net::SocketAddr, sync::Arc};

use mesh_common::{
    Addr,
    decide::{self, Decision, Dial, Tables},
    limits::HEARTBEAT_STALE_NS,
    pod::{ExcludedKey, InboundCfg, PodCfg, PortKey, listener_key},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, PROTO_TCP, PROTO_UDP, ServiceKey,
        ServiceVal, WorkloadVal,
    },
    stats::{Outcome, Reason},
    verdict::{Verdict, VerdictKey},
};
use mesh_core::snapshot::Protocol;

use crate::{
    map::MapError,
    maps::{ExcludedPrefix, Maps},
    stats::socket_addr,
};

/// The maps as the decision code wants them. A map that cannot be read looks empty, as to the programs.
#[derive(Clone, Debug)]
pub struct LiveTables {
    maps: Arc<Maps>,
}

/// What the kernel would do with a connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Bypass, Direct, Proxy or Deny.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// Service id, when a service was dialled.
    pub service: Option<u64>,
    /// The backend drawn: destination of Direct, hint for Proxy.
    pub backend: Option<SocketAddr>,
    /// Workload of the backend.
    pub workload: Option<u64>,
    /// Other backends a draw could have hit.
    pub slots: u32,
}

impl LiveTables {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// The pod entry of a namespace; `None` when it is not enrolled.
    pub fn pod(&self, netns_cookie: u64) -> Result<Option<PodCfg>, MapError> {
        self.maps.pods.get(&netns_cookie)
    }

    /// The inbound entry of a local pod id.
    pub fn inbound(&self, pod: u32) -> Result<Option<InboundCfg>, MapError> {
        self.maps.inbound.get(&pod)
    }

    /// What the connect hook would decide now. `draw` picks the slot.
    pub fn explain(
        &self,
        netns_cookie: u64,
        dst: SocketAddr,
        protocol: Protocol,
        now_ns: u64,
        draw: u32,
    ) -> Result<Option<Explanation>, MapError> {
        let Some(pod) = self.pod(netns_cookie)? else {
            return Ok(None);
        };
        let proto = match protocol {
            Protocol::Tcp => PROTO_TCP,
            Protocol::Udp => PROTO_UDP,
        };
        let dial = Dial { dst: dst.ip().into(), netns_cookie, now_ns, draw, port: dst.port(), proto };
        let decision = match protocol {
            Protocol::Tcp => decide::connect(self, &pod, &dial),
            Protocol::Udp => decide::datagram(self, &pod, &dial),
        };
        let key = ServiceKey { addr: dial.dst, port: dial.port, proto };
        let slots = self.service(&key).map_or(0, |service| service.count);
        Ok(Some(explanation(&decision, slots)))
    }
}

fn explanation(decision: &Decision, slots: u32) -> Explanation {
    let backend = decision.has_backend.then_some(decision.backend);
    Explanation {
        outcome: decision.outcome,
        reason: decision.reason,
        service: (decision.service != 0).then_some(decision.service),
        backend: backend.map(|backend| socket_addr(backend.addr, backend.port)),
        workload: backend.map(|backend| backend.workload).filter(|id| *id != 0),
        slots,
    }
}

fn readable<T>(result: Result<Option<T>, MapError>) -> Option<T> {
    result.unwrap_or_else(|error| {
        tracing::warn!(error = %crate::report(&error), "map not readable");
        None
    })
}

impl Tables for LiveTables {
    fn service(&self, key: &ServiceKey) -> Option<ServiceVal> {
        readable(self.maps.services.get(key))
    }

    fn backend(&self, key: &BackendKey) -> Option<Backend> {
        readable(self.maps.backends.get(key))
    }

    fn backend_slot(&self, key: &BackendIndexKey) -> Option<u32> {
        readable(self.maps.backend_index.get(key))
    }

    fn workload(&self, addr: &Addr) -> Option<WorkloadVal> {
        readable(self.maps.workloads.get(addr))
    }

    fn port(&self, key: &PortKey) -> Option<u32> {
        readable(self.maps.port_cfgs.get(key))
    }

    fn excluded(&self, pod: u32, dst: &Addr) -> bool {
        let data = ExcludedKey { pod_be: pod.to_be(), addr: *dst };
        readable(self.maps.excluded.get(&ExcludedPrefix { prefix_len: 160, data })).is_some()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        readable(self.maps.affinity.get(key))
    }

    fn verdict(&self, key: &VerdictKey) -> Option<Verdict> {
        readable(self.maps.verdicts.get(key))
    }

    fn policy_gen(&self, workload: u64) -> Option<u64> {
        readable(self.maps.policy_gen.get(&workload)).map(|now| now.generation)
    }

    fn agent_alive(&self, now_ns: u64) -> bool {
        readable(self.maps.heartbeat.get(&0))
            .is_some_and(|stamp| stamp != 0 && now_ns < stamp + HEARTBEAT_STALE_NS)
    }

    fn outbound_listener(&self, pod: u32, index: u32) -> bool {
        readable(self.maps.listeners.get(&listener_key(pod, index))).is_some()
    }
}
