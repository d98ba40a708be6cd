//! The address plan of a world, and the `ip` lines that carry it out.
//!
//! Nodes: `192.168.77.N`, `fd00:77::N`. Pods: `10.244.N.SLOT`, `fd00:244:N::SLOT`. Services: `10.96.0.0/16`,
//! `fd00:96::/112`. Whatever no pod owns in these ranges is unreachable on every node, at once and loudly, and
//! no namespace has a default route out of the world.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::pod::{ip4_of, ip6_of};

/// The cluster's name server, by IPv4: where pods send DNS; the mesh answers in its place.
pub const NAMESERVER4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// The cluster's name server, by IPv6.
pub const NAMESERVER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);

/// The slot of the node's own address in its pod range.
const GATEWAY_SLOT: u8 = 1;

/// How pods are connected to their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A host route per pod, as the CNI plugin `ptp` and Calico do: pod-to-pod packets are routed.
    Routed,
    /// One bridge per node, as flannel does: pod-to-pod packets of a node are switched.
    Bridged,
}

pub(crate) fn wire_ip4(slot: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, slot)
}

pub(crate) fn wire_ip6(slot: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, ip6_of(0, slot).segments()[7])
}

pub(crate) fn service_ips(number: u16) -> (Ipv4Addr, Ipv6Addr) {
    let [high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 96, high, low), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number))
}

/// The wire is one switch.
pub(crate) fn wire_lines() -> Vec<String> {
    vec![
        "link set lo up".into(),
        "link add wire type bridge mcast_snooping 0".into(),
        "link set wire up".into(),
    ]
}

/// Lines for the wire: a cable to the namespace `netns`.
pub(crate) fn plug_lines(slot: u8, netns: &str) -> Vec<String> {
    vec![
        format!("link add w{slot} type veth peer name uplink netns {netns}"),
        format!("link set w{slot} master wire up"),
    ]
}

/// Lines for a node: its end of the wire, the ranges that are nobody's, the way to the other nodes' pods.
pub(crate) fn node_lines(index: u8, count: usize, link: Link) -> Vec<String> {
    let mut lines = vec!["link set lo up".into()];
    lines.extend(uplink_lines(index));
    for range in ["10.244.0.0/16", "10.96.0.0/16", "0.0.0.0/0"] {
        lines.push(format!("route add unreachable {range} metric 4096"));
    }
    for range in ["fd00:244::/32", "fd00:96::/112", "::/0"] {
        lines.push(format!("route add unreachable {range} metric 4096"));
    }
    let others = (1..=u8::try_from(count).unwrap_or(u8::MAX)).filter(|other| *other != index);
    lines.extend(others.flat_map(pod_range_lines));
    if link == Link::Bridged {
        lines.push("link add br0 type bridge mcast_snooping 0".into());
        lines.push(format!("addr add {}/24 dev br0", ip4_of(index, GATEWAY_SLOT)));
        lines.push(format!("addr add {}/64 dev br0 nodad", ip6_of(index, GATEWAY_SLOT)));
        lines.push("link set br0 up".into());
    }
    lines
}

/// Lines for an outsider: it knows the way to pods, and pods' nodes know the way back over the wire.
pub(crate) fn outsider_lines(slot: u8, nodes: &[u8]) -> Vec<String> {
    let mut lines = vec!["link set lo up".into()];
    lines.extend(uplink_lines(slot));
    lines.extend(nodes.iter().flat_map(|node| pod_range_lines(*node)));
    lines
}

/// Lines for a node: the host end of a pod's cable.
pub(crate) fn host_end_lines(node: u8, slot: u8, netns: &str, link: Link) -> Vec<String> {
    let mut lines = vec![format!("link add p{slot} type veth peer name eth0 netns {netns}")];
    match link {
        Link::Routed => {
            lines.push(format!("addr add {}/32 dev p{slot}", ip4_of(node, GATEWAY_SLOT)));
            lines.push(format!("addr add {}/128 dev p{slot} nodad", ip6_of(node, GATEWAY_SLOT)));
            lines.push(format!("link set p{slot} up"));
            lines.push(format!("route add {}/32 dev p{slot}", ip4_of(node, slot)));
            lines.push(format!("route add {}/128 dev p{slot}", ip6_of(node, slot)));
        }
        Link::Bridged => lines.push(format!("link set p{slot} master br0 up")),
    }
    lines
}

/// Lines for a pod: its addresses and its way out.
pub(crate) fn pod_end_lines(node: u8, slot: u8, link: Link) -> Vec<String> {
    let (length4, length6) = match link {
        Link::Routed => (32, 128),
        Link::Bridged => (24, 64),
    };
    let (gateway4, gateway6) = (ip4_of(node, GATEWAY_SLOT), ip6_of(node, GATEWAY_SLOT));
    let mut lines = vec![
        "link set lo up".into(),
        format!("addr add {}/{length4} dev eth0", ip4_of(node, slot)),
        format!("addr add {}/{length6} dev eth0 nodad", ip6_of(node, slot)),
        "link set eth0 up".into(),
    ];
    if link == Link::Routed {
        lines.push(format!("route add {gateway4}/32 dev eth0 scope link"));
        lines.push(format!("route add {gateway6}/128 dev eth0"));
    }
    lines.push(format!("route add default via {gateway4}"));
    lines.push(format!("route add default via {gateway6}"));
    lines
}

fn uplink_lines(slot: u8) -> Vec<String> {
    vec![
        format!("addr add {}/24 dev uplink", wire_ip4(slot)),
        format!("addr add {}/64 dev uplink nodad", wire_ip6(slot)),
        "link set uplink up".into(),
    ]
}

/// Lines that send a node's pod range to that node. `onlink`: the other node's cable may come later.
fn pod_range_lines(node: u8) -> [String; 2] {
    let range6 = ip6_of(node, 0);
    [
        format!("route add 10.244.{node}.0/24 via {} dev uplink onlink", wire_ip4(node)),
        format!("route add {range6}/64 via {} dev uplink onlink", wire_ip6(node)),
    ]
}
