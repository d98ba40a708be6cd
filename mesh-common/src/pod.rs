//! What the kernel knows of a local pod.

use crate::Addr;

shared! {
    /// Value of `PODS`, keyed by netns cookie: one meshed local pod (or the node itself, see [`POD_NODE`]).
    pub struct PodCfg {
        /// Workload id; 0 for the node entry.
        pub workload: u64,
        /// Own IPv4 address in mapped form, or zero.
        pub addr4: Addr,
        /// Own IPv6 address, or zero.
        pub addr6: Addr,
        /// Hash of the pod's identity, for the agent alone: verdicts on the pod were made for this one.
        pub identity: u64,
        /// For [`POD_NODE`]: the exact cgroup id of the kubelet, whose probes get tickets.
        pub prober_cgroup: u64,
        /// Local pod id: key of `INBOUND`, part of listener and port keys. Never reused within a boot.
        pub pod: u32,
        /// `POD_*` flags.
        pub flags: u32,
    }
}

/// DNS (port 53) is redirected to the in-pod DNS proxy while the agent is alive.
pub const POD_DNS: u32 = 1;
/// `PORT_CFGS` holds outbound entries of this pod.
pub const POD_PORTS: u32 = 1 << 1;
/// `EXCLUDED` holds prefixes of this pod.
pub const POD_EXCLUDED: u32 = 1 << 2;
/// While the agent is down, a connect that needs the proxy is refused rather than let through.
pub const POD_FAIL_CLOSED: u32 = 1 << 3;
/// Destinations outside the mesh go through the proxy too (telemetry, or REGISTRY_ONLY decided there).
pub const POD_PROXY_UNKNOWN: u32 = 1 << 4;
/// The entry is the node's own namespace: nothing is redirected, only probes get tickets.
pub const POD_NODE: u32 = 1 << 5;
/// First of the bits of the flags that hold the kind of the pod's sight, see [`crate::service::SERVICE_HIDDEN_SHIFT`].
pub const POD_SIGHT_SHIFT: u32 = 24;

shared! {
    /// Value of `INBOUND`: what `sk_lookup` needs of the pod it guards.
    pub struct InboundCfg {
        /// Workload id of the pod.
        pub workload: u64,
        /// The pod's netns cookie: a ticket for another incarnation is refused.
        pub incarnation: u64,
        /// `INBOUND_*` flags.
        pub flags: u32,
        /// Zero.
        pub pad: u32,
    }
}

/// `PORT_CFGS` holds inbound entries of this pod.
pub const INBOUND_PORTS: u32 = 1;
/// While the agent is down, plaintext arrivals are dropped (unless the port says otherwise).
pub const INBOUND_FAIL_CLOSED: u32 = 1 << 1;

shared! {
    /// Key of `PORT_CFGS`; the value is `PORT_*` flags.
    pub struct PortKey {
        /// Local pod id.
        pub pod: u32,
        /// Port, host order.
        pub port: u16,
        /// [`DIR_INBOUND`] or [`DIR_OUTBOUND`].
        pub dir: u16,
    }
}

/// Direction of traffic towards a local workload.
pub const DIR_INBOUND: u16 = 0;
/// Direction of traffic from a local workload.
pub const DIR_OUTBOUND: u16 = 1;

/// The port is left alone.
pub const PORT_EXCLUDED: u32 = 1;
/// Overrides the pod's default: closed while the agent is down.
pub const PORT_FAIL_CLOSED: u32 = 1 << 1;
/// Overrides the pod's default: open while the agent is down.
pub const PORT_FAIL_OPEN: u32 = 1 << 2;
/// Of an outbound port: destinations that no table knows go to the agent too, which may know them by the name that is asked for.
pub const PORT_PROXY_UNKNOWN: u32 = 1 << 3;

shared! {
    /// Key of `PROBES`: a declared probe port of a local pod; the value is the workload id.
    pub struct ProbeKey {
        /// Pod address.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: u16,
    }
}

/// Which listener of a pod, second half of [`listener_key`]: the outbound ports are 0..4.
pub const LISTENER_INBOUND: u32 = 16;

/// Key of `LISTENERS`: local pod id in the upper half, listener kind in the lower.
#[inline(always)]
pub const fn listener_key(pod: u32, kind: u32) -> u64 {
    ((pod as u64) << 32) | kind as u64
}

shared! {
    /// Data part of the LPM key of `EXCLUDED`: the pod's 32 bits, then the address. A prefix of an IPv4
    /// network of length n has length 32 + 96 + n.
    pub struct ExcludedKey {
        /// Local pod id in big-endian bytes, because LPM compares from the first byte.
        pub pod_be: u32,
        /// Address.
        pub addr: Addr,
    }
}
