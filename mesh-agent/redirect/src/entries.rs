//! Owns what a pod's configuration looks like in the maps.
//!
//! Invariant: pure; the same configuration gives the same entries, so that two of them can be compared.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;
use mesh_common::{
    Addr,
    pod::{
        DIR_INBOUND, DIR_OUTBOUND, ExcludedKey, INBOUND_FAIL_CLOSED, INBOUND_PORTS, InboundCfg, POD_DNS,
        POD_EXCLUDED, POD_FAIL_CLOSED, POD_PORTS, POD_PROXY_UNKNOWN, POD_SIGHT_SHIFT, PORT_EXCLUDED,
        PORT_FAIL_CLOSED, PORT_FAIL_OPEN, PORT_PROXY_UNKNOWN, PodCfg, PortKey, ProbeKey,
    },
};
use mesh_core::plan::{PodConfig, PortRule};

use crate::maps::ExcludedPrefix;

/// The entry of `PODS`.
pub(crate) fn pod_cfg(pod: u32, config: &PodConfig) -> PodCfg {
    let addr = |v4: bool| {
        config.addrs.iter().find(|addr| addr.is_ipv4() == v4).map_or(Addr::ZERO, |addr| Addr::from(*addr))
    };
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    PodCfg {
        workload: config.workload.0,
        addr4: addr(true),
        addr6: addr(false),
        identity: config.identity_hash,
        prober_cgroup: 0,
        pod,
        flags: flag(config.dns_capture, POD_DNS)
            | flag(!config.outbound_ports.is_empty(), POD_PORTS)
            | flag(!config.excluded.is_empty(), POD_EXCLUDED)
            | flag(config.outbound_fail_closed, POD_FAIL_CLOSED)
            | flag(config.proxy_unknown, POD_PROXY_UNKNOWN)
            | config.sight << POD_SIGHT_SHIFT,
    }
}

/// The entry of `INBOUND`.
pub(crate) fn inbound_cfg(cookie: u64, config: &PodConfig) -> InboundCfg {
    let ports = if config.inbound_ports.is_empty() { 0 } else { INBOUND_PORTS };
    let closed = if config.inbound_fail_closed { INBOUND_FAIL_CLOSED } else { 0 };
    InboundCfg { workload: config.workload.0, incarnation: cookie, flags: ports | closed, pad: 0 }
}

/// The entries of `PORT_CFGS`.
pub(crate) fn port_entries(pod: u32, config: &PodConfig) -> HashMap<PortKey, u32> {
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
    let unknown = if rule.proxy_unknown { PORT_PROXY_UNKNOWN } else { 0 };
    excluded | closed | unknown
}

/// The keys of `EXCLUDED`.
pub(crate) fn excluded_entries(pod: u32, config: &PodConfig) -> HashSet<ExcludedPrefix> {
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

/// The keys of `PROBES`.
pub(crate) fn probe_entries(config: &PodConfig) -> HashSet<ProbeKey> {
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
        let flags =
            |excluded, fail_closed| port_flags(&PortRule { excluded, fail_closed, ..PortRule::default() });
        assert_eq!(flags(true, None), PORT_EXCLUDED);
        assert_eq!(flags(false, Some(true)), PORT_FAIL_CLOSED);
        assert_eq!(flags(true, Some(false)), PORT_EXCLUDED | PORT_FAIL_OPEN);
        assert_eq!(port_flags(&PortRule { proxy_unknown: true, ..PortRule::default() }), PORT_PROXY_UNKNOWN);
    }
}
