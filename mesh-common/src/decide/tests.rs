//! Tables as fields, one row per decision.

use core::net::IpAddr;

use super::*;
use crate::{
    pod::POD_DNS,
    service::{PROTO_TCP, PROTO_UDP},
};

const POD: u32 = 7;
const SERVER: u64 = 200;
const COOKIE: u64 = 77;
const SERVER_COOKIE: u64 = 88;

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

struct World {
    service_flags: u32,
    count: u32,
    affinity_s: u32,
    backends: [Backend; 2],
    peer_flags: u16,
    port_flags: u32,
    excluded: bool,
    affinity: Option<Affinity>,
    verdict: Option<Verdict>,
    generation: Option<u64>,
    alive: bool,
    listener: bool,
}

impl World {
    fn new(peer_flags: u16) -> Self {
        let backend = |last| Backend {
            addr: addr(last),
            workload: SERVER,
            incarnation: SERVER_COOKIE,
            port: 8080,
            flags: peer_flags,
            pad: 0,
        };
        Self {
            service_flags: 0,
            count: 2,
            affinity_s: 0,
            backends: [backend("10.0.0.8"), backend("10.0.0.9")],
            peer_flags,
            port_flags: 0,
            excluded: false,
            affinity: None,
            verdict: None,
            generation: Some(5),
            alive: true,
            listener: true,
        }
    }
}

impl Tables for World {
    fn service(&self, key: &ServiceKey) -> Option<ServiceVal> {
        (key.addr == addr("10.96.0.1") && key.port == 80).then_some(ServiceVal {
            service: 900,
            slots: 901,
            count: self.count,
            flags: self.service_flags,
            affinity_s: self.affinity_s,
            pad: 0,
        })
    }
    fn backend(&self, key: &BackendKey) -> Option<Backend> {
        assert_eq!(key.slots, 901);
        self.backends.get(key.slot as usize).copied()
    }
    fn backend_slot(&self, key: &BackendIndexKey) -> Option<u32> {
        self.backends.iter().position(|b| b.addr == key.addr && b.port == key.port).map(|i| i as u32)
    }
    fn workload(&self, a: &Addr) -> Option<WorkloadVal> {
        (*a == addr("10.0.0.8")).then_some(WorkloadVal {
            workload: SERVER,
            incarnation: SERVER_COOKIE,
            flags: self.peer_flags,
            pad: [0; 3],
        })
    }
    fn port(&self, key: &PortKey) -> Option<u32> {
        assert_eq!(key.pod, POD);
        Some(self.port_flags)
    }
    fn excluded(&self, _: u32, _: &Addr) -> bool {
        self.excluded
    }
    fn affinity(&self, _: &AffinityKey) -> Option<Affinity> {
        self.affinity
    }
    fn verdict(&self, key: &VerdictKey) -> Option<Verdict> {
        assert_eq!(
            (key.netns_cookie, key.workload, key.incarnation, key.port),
            (COOKIE, SERVER, SERVER_COOKIE, 8080)
        );
        self.verdict
    }
    fn policy_gen(&self, workload: u64) -> Option<u64> {
        assert_eq!(workload, SERVER);
        self.generation
    }
    fn agent_alive(&self, _: u64) -> bool {
        self.alive
    }
    fn outbound_listener(&self, pod: u32, index: u32) -> bool {
        assert_eq!(pod, POD);
        assert!((index as usize) < ports::OUTBOUND.len());
        self.listener
    }
}

fn pod(flags: u32) -> PodCfg {
    PodCfg {
        workload: 100,
        addr4: addr("10.0.0.7"),
        addr6: addr("fd00::7"),
        identity: 0,
        prober_cgroup: 0,
        pod: POD,
        flags: flags | POD_DNS,
    }
}

fn dial(dst: &str, port: u16) -> Dial {
    Dial { dst: addr(dst), netns_cookie: COOKIE, now_ns: 1_000, draw: 0, port, proto: PROTO_TCP }
}

#[track_caller]
fn check(world: &World, pod_flags: u32, dst: &str, port: u16, want: (Outcome, Reason)) -> Decision {
    let got = connect(world, &pod(pod_flags), &dial(dst, port));
    assert_eq!((got.outcome, got.reason), want, "{dst}:{port}");
    got
}

#[test]
fn what_is_no_business_of_the_mesh_is_left_alone() {
    let mut world = World::new(PEER_MESHED);
    check(&world, 0, "127.0.0.1", 80, (Outcome::Bypass, Reason::Loopback));
    check(&world, 0, "::1", 80, (Outcome::Bypass, Reason::Loopback));
    check(&world, 0, "0.0.0.0", 80, (Outcome::Bypass, Reason::Loopback));
    check(&world, 0, "10.0.0.7", 80, (Outcome::Bypass, Reason::OwnAddress));
    check(&world, 0, "fd00::7", 80, (Outcome::Bypass, Reason::OwnAddress));
    check(&world, 0, "192.0.2.1", 80, (Outcome::Bypass, Reason::UnknownDestination));
    world.port_flags = PORT_EXCLUDED;
    check(&world, POD_PORTS, "10.96.0.1", 80, (Outcome::Bypass, Reason::ExcludedPort));
    world.port_flags = 0;
    world.excluded = true;
    check(&world, POD_EXCLUDED, "10.96.0.1", 80, (Outcome::Bypass, Reason::ExcludedPrefix));
}

#[test]
fn a_remote_meshed_peer_goes_through_the_proxy_with_the_drawn_backend_as_a_hint() {
    let got = check(&World::new(PEER_MESHED), 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::RemotePeer));
    assert!(got.has_backend && !got.ticket);
    assert_eq!(got.service, 900);
}

#[test]
fn a_local_peer_goes_direct_only_with_a_current_verdict() {
    let mut world = World::new(PEER_MESHED | PEER_LOCAL);
    check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::NoVerdict));
    world.verdict = Some(Verdict { policy_gen: 4, action: VERDICT_ALLOW, pad: 0 });
    check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::StaleVerdict));
    world.verdict = Some(Verdict { policy_gen: 5, action: VERDICT_ALLOW, pad: 0 });
    let got = check(&world, 0, "10.96.0.1", 80, (Outcome::Direct, Reason::VerdictAllow));
    assert!(got.ticket);
    assert_eq!(got.policy_gen, 5);
    world.verdict = Some(Verdict { policy_gen: 5, action: VERDICT_DENY, pad: 0 });
    check(&world, 0, "10.96.0.1", 80, (Outcome::Deny, Reason::VerdictDeny));
    world.generation = None;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::NoVerdict));
}

#[test]
fn a_direct_connection_needs_no_living_agent() {
    let mut world = World::new(PEER_MESHED | PEER_LOCAL);
    world.verdict = Some(Verdict { policy_gen: 5, action: VERDICT_ALLOW, pad: 0 });
    world.alive = false;
    world.listener = false;
    check(&world, POD_FAIL_CLOSED, "10.96.0.1", 80, (Outcome::Direct, Reason::VerdictAllow));
}

#[test]
fn a_dead_agent_is_bypassed_or_refused_as_the_pod_says() {
    let mut world = World::new(PEER_MESHED);
    world.alive = false;
    let got = check(&world, 0, "10.96.0.1", 80, (Outcome::Direct, Reason::AgentDown));
    assert!(got.has_backend && !got.ticket, "balanced by the kernel, no ticket");
    check(&world, POD_FAIL_CLOSED, "10.96.0.1", 80, (Outcome::Deny, Reason::FailClosed));
    check(&world, POD_PROXY_UNKNOWN, "192.0.2.1", 80, (Outcome::Bypass, Reason::AgentDown));
    world.alive = true;
    world.listener = false;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Direct, Reason::NoListener));
    check(&world, POD_FAIL_CLOSED, "10.96.0.1", 80, (Outcome::Deny, Reason::FailClosed));
}

#[test]
fn peers_outside_the_mesh_and_plain_ones_are_balanced_by_the_kernel() {
    check(&World::new(0), 0, "10.96.0.1", 80, (Outcome::Direct, Reason::Unmeshed));
    check(&World::new(PEER_MESHED | PEER_PLAIN), 0, "10.96.0.1", 80, (Outcome::Direct, Reason::PlainPeer));
}

#[test]
fn a_pod_that_draws_itself_goes_over_loopback() {
    let mut world = World::new(PEER_MESHED | PEER_LOCAL);
    world.backends[0].addr = addr("10.0.0.7");
    let got = check(&world, 0, "10.96.0.1", 80, (Outcome::Direct, Reason::Hairpin));
    assert!(!got.ticket);
}

#[test]
fn only_pods_of_a_kind_that_may_not_see_a_service_ask_the_agent() {
    let mut world = World::new(0);
    world.service_flags = (1 << 5 | 1 << 23) << SERVICE_HIDDEN_SHIFT;
    for kind in 0..24 {
        let want = if kind == 5 || kind == 23 {
            (Outcome::Proxy, Reason::L7)
        } else {
            (Outcome::Direct, Reason::Unmeshed)
        };
        check(&world, kind << POD_SIGHT_SHIFT, "10.96.0.1", 80, want);
    }
}

#[test]
fn under_registry_only_the_agent_decides_on_what_is_unknown_but_not_on_the_nodes_own_link() {
    let world = World::new(0);
    check(&world, POD_PROXY_UNKNOWN, "192.0.2.1", 80, (Outcome::Proxy, Reason::UnknownDestination));
    check(&world, POD_PROXY_UNKNOWN, "2001:db8::1", 80, (Outcome::Proxy, Reason::UnknownDestination));
    for link in ["169.254.169.254", "fe80::1", "febf::1"] {
        check(&world, POD_PROXY_UNKNOWN, link, 80, (Outcome::Bypass, Reason::UnknownDestination));
    }
    for wide in ["169.253.0.1", "169.255.0.1", "fec0::1"] {
        check(&world, POD_PROXY_UNKNOWN, wide, 80, (Outcome::Proxy, Reason::UnknownDestination));
    }
}

#[test]
fn at_some_ports_the_agent_decides_on_what_is_unknown() {
    let mut world = World::new(0);
    world.port_flags = PORT_PROXY_UNKNOWN;
    check(&world, POD_PORTS, "192.0.2.1", 80, (Outcome::Proxy, Reason::UnknownDestination));
    check(&world, POD_PORTS, "169.254.169.254", 80, (Outcome::Bypass, Reason::UnknownDestination));
    check(&world, 0, "192.0.2.1", 80, (Outcome::Bypass, Reason::UnknownDestination));
    check(&world, POD_PORTS, "10.96.0.1", 80, (Outcome::Direct, Reason::Unmeshed));
    world.port_flags |= PORT_EXCLUDED;
    check(&world, POD_PORTS, "192.0.2.1", 80, (Outcome::Bypass, Reason::ExcludedPort));
    world.port_flags = PORT_PROXY_UNKNOWN;
    world.alive = false;
    check(&world, POD_PORTS, "192.0.2.1", 80, (Outcome::Bypass, Reason::AgentDown));
}

#[test]
fn an_l7_service_is_always_proxied_and_an_empty_one_refused() {
    let mut world = World::new(0);
    world.service_flags = SERVICE_L7;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::L7));
    world.count = 0;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Deny, Reason::NoEndpoints));
}

#[test]
fn an_empty_service_that_the_agent_answers_for_is_proxied_while_it_lives_and_refused_otherwise() {
    let mut world = World::new(0);
    world.service_flags = SERVICE_L7 | SERVICE_ANSWERED;
    world.count = 0;
    let got = check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::NoEndpoints));
    assert!(!got.has_backend && got.service == 900);
    world.alive = false;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Deny, Reason::NoEndpoints));
    check(&world, POD_FAIL_CLOSED, "10.96.0.1", 80, (Outcome::Deny, Reason::FailClosed));
    world.count = 2;
    world.alive = true;
    check(&world, 0, "10.96.0.1", 80, (Outcome::Proxy, Reason::L7));
}

#[test]
fn a_pod_address_pins_that_pod() {
    let got = check(&World::new(PEER_MESHED), 0, "10.0.0.8", 9000, (Outcome::Proxy, Reason::RemotePeer));
    assert_eq!((got.backend.addr, got.backend.port), (addr("10.0.0.8"), 9000));
}

#[test]
fn affinity_sticks_until_it_ages_or_the_backend_goes() {
    let mut world = World::new(0);
    world.affinity_s = 1;
    world.affinity = Some(Affinity { addr: addr("10.0.0.9"), used_ns: 500, port: 8080, pad: [0; 3] });
    let at = |world: &World, now_ns| {
        let got = connect(world, &pod(0), &Dial { now_ns, ..dial("10.96.0.1", 80) });
        assert_eq!(got.affinity_slots, 901);
        got.backend.addr
    };
    assert_eq!(at(&world, 1_000), addr("10.0.0.9"));
    assert_eq!(at(&world, 2_000_000_000), addr("10.0.0.8"));
    world.affinity = Some(Affinity { addr: addr("10.0.0.5"), used_ns: 500, port: 8080, pad: [0; 3] });
    assert_eq!(at(&world, 1_000), addr("10.0.0.8"));
}

#[test]
fn datagrams_are_balanced_or_left_alone() {
    let world = World::new(PEER_MESHED);
    let udp = |dst| datagram(&world, &pod(0), &Dial { proto: PROTO_UDP, ..dial(dst, 80) });
    assert_eq!((udp("10.96.0.1").outcome, udp("10.96.0.1").reason), (Outcome::Direct, Reason::UdpService));
    assert_eq!((udp("192.0.2.1").outcome, udp("192.0.2.1").reason), (Outcome::Bypass, Reason::Udp));
}

fn arrival(dport: u16, proto: u16, ifindex: u32) -> Option<(Outcome, Reason)> {
    let (src, dst) = (addr("10.0.0.1"), addr("10.0.0.2"));
    arrival_by_port(&Arrival { src, dst, now_ns: 0, ifindex, sport: 1, dport, proto })
}

#[test]
fn private_ports_are_reachable_over_loopback_only() {
    for port in [15001, 15002, 15003, 15004, 15006, 15053] {
        assert_eq!(arrival(port, PROTO_TCP, 2), Some((Outcome::Drop, Reason::PrivatePort)));
        assert_eq!(arrival(port, PROTO_TCP, 1), Some((Outcome::Pass, Reason::Loopback)));
    }
    let own = addr("10.0.0.2");
    let to_itself =
        Arrival { src: own, dst: own, now_ns: 0, ifindex: 2, sport: 1, dport: 15001, proto: PROTO_TCP };
    assert_eq!(arrival_by_port(&to_itself), Some((Outcome::Pass, Reason::Loopback)));
    assert_eq!(arrival(15053, PROTO_UDP, 2), Some((Outcome::Drop, Reason::PrivatePort)));
    assert_eq!(arrival(9999, PROTO_UDP, 2), Some((Outcome::Pass, Reason::Udp)));
    assert_eq!(arrival(15008, PROTO_TCP, 2), Some((Outcome::Pass, Reason::Hbone)));
    assert_eq!(arrival(8080, PROTO_TCP, 2), None);
}

#[test]
fn a_ticket_is_good_for_one_workload_incarnation_generation_and_time() {
    let pod = InboundCfg { workload: SERVER, incarnation: SERVER_COOKIE, flags: 0, pad: 0 };
    let good = Ticket {
        src_workload: 100,
        dst_workload: SERVER,
        incarnation: SERVER_COOKIE,
        policy_gen: 5,
        expires_ns: 100,
        netns_cookie: COOKIE,
    };
    assert_eq!(judge_ticket(&good, &pod, Some(5), 99), Reason::Ticket);
    assert_eq!(judge_ticket(&good, &pod, Some(5), 101), Reason::TicketExpired);
    assert_eq!(judge_ticket(&good, &pod, Some(6), 99), Reason::TicketStale);
    assert_eq!(judge_ticket(&good, &pod, None, 99), Reason::TicketStale);
    assert_eq!(judge_ticket(&Ticket { dst_workload: 1, ..good }, &pod, Some(5), 99), Reason::TicketStale);
    assert_eq!(judge_ticket(&Ticket { incarnation: 1, ..good }, &pod, Some(5), 99), Reason::TicketStale);
}

#[test]
fn a_dead_agent_closes_only_what_is_fail_closed() {
    let pod = |flags| InboundCfg { workload: 1, incarnation: 1, flags, pad: 0 };
    assert_eq!(agent_gone(&pod(0), 0), (Outcome::Pass, Reason::AgentDown));
    assert_eq!(agent_gone(&pod(0), PORT_FAIL_CLOSED), (Outcome::Drop, Reason::FailClosed));
    assert_eq!(agent_gone(&pod(INBOUND_FAIL_CLOSED), 0), (Outcome::Drop, Reason::FailClosed));
    assert_eq!(agent_gone(&pod(INBOUND_FAIL_CLOSED), PORT_FAIL_OPEN), (Outcome::Pass, Reason::AgentDown));
}
