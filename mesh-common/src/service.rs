//! Services, their backends, and workloads by address.

use crate::Addr;

shared! {
    /// Key of `SERVICES`: where an app dials.
    pub struct ServiceKey {
        /// Virtual address.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// IP protocol: 6 or 17.
        pub proto: u16,
    }
}

/// IP protocol number of TCP.
pub const PROTO_TCP: u16 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u16 = 17;

shared! {
    /// Value of `SERVICES`.
    pub struct ServiceVal {
        /// Service id (hash of namespace and name), for telemetry.
        pub service: u64,
        /// Slot table id: names service, port, protocol and family.
        pub slots: u64,
        /// Number of slots; 0 means refuse, unless [`SERVICE_ANSWERED`] is set.
        pub count: u32,
        /// `SERVICE_*` flags.
        pub flags: u32,
        /// Session affinity time-out in seconds; 0 for none.
        pub affinity_s: u32,
        /// Zero.
        pub pad: u32,
    }
}

/// The service needs the proxy for every connection (L7 routes or protocol).
pub const SERVICE_L7: u32 = 1;
/// While the service has no endpoint the agent takes its connections, and answers them or knows where else they go.
pub const SERVICE_ANSWERED: u32 = 2;
/// First of the bits of the flags that say, by the kind of a pod's sight, that the agent has to decide whether the pod sees the service.
pub const SERVICE_HIDDEN_SHIFT: u32 = 8;

shared! {
    /// Key of `BACKENDS`.
    pub struct BackendKey {
        /// [`ServiceVal::slots`].
        pub slots: u64,
        /// 0 ≤ slot < [`ServiceVal::count`].
        pub slot: u32,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Value of `BACKENDS`: one ready endpoint.
    pub struct Backend {
        /// Address.
        pub addr: Addr,
        /// Workload id, or 0 when the endpoint is no known pod.
        pub workload: u64,
        /// Netns cookie of the pod when it is local, else 0.
        pub incarnation: u64,
        /// Port, host order.
        pub port: u16,
        /// `PEER_*` flags.
        pub flags: u16,
        /// Zero.
        pub pad: u32,
    }
}

/// The peer is part of the mesh.
pub const PEER_MESHED: u16 = 1;
/// The peer is on this node and enrolled, so that a ticket works.
pub const PEER_LOCAL: u16 = 1 << 1;
/// The peer takes plaintext on purpose (mode DISABLE for that port).
pub const PEER_PLAIN: u16 = 1 << 2;

shared! {
    /// Key of `BACKEND_INDEX`; the value is the slot.
    pub struct BackendIndexKey {
        /// [`ServiceVal::slots`].
        pub slots: u64,
        /// Address.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}

shared! {
    /// Value of `WORKLOADS`: a pod dialled by its own address (headless services, StatefulSets).
    pub struct WorkloadVal {
        /// Workload id.
        pub workload: u64,
        /// Netns cookie when local, else 0.
        pub incarnation: u64,
        /// `PEER_*` flags.
        pub flags: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}

shared! {
    /// Key of `AFFINITY`. The client is its netns, as kube-proxy's is its address.
    pub struct AffinityKey {
        /// Netns cookie of the client.
        pub netns_cookie: u64,
        /// [`ServiceVal::slots`].
        pub slots: u64,
    }
}

shared! {
    /// Value of `AFFINITY`.
    pub struct Affinity {
        /// Address of the backend chosen last.
        pub addr: Addr,
        /// CLOCK_MONOTONIC nanoseconds of the last use.
        pub used_ns: u64,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}
