//! Tests of `meshctl explain` over tables in memory.

use std::collections::HashMap;

use mesh_common::{
    Addr,
    pod::PortKey,
    service::{Affinity, AffinityKey, BackendIndexKey, BackendKey, ServiceVal, WorkloadVal},
    verdict::{VERDICT_DENY, Verdict as CachedVerdict},
};
use mesh_core::{
    mode::{Mode, ModeSources},
    policy::{Action, AuthorizationPolicy, Match, Rule, StringMatch},
    snapshot::{Endpoint, Name, Parts, Protocol, Service, ServicePort, Tunnel},
};

use super::*;

#[derive(Default)]
struct FakeTables {
    services: HashMap<ServiceKey, ServiceVal>,
    backends: HashMap<BackendKey, Backend>,
    verdicts: HashMap<VerdictKey, CachedVerdict>,
    policy_gen: Option<u64>,
    down: bool,
}

impl Tables for FakeTables {
    fn service(&self, key: &ServiceKey) -> Option<ServiceVal> {
        self.services.get(key).copied()
    }
    fn backend(&self, key: &BackendKey) -> Option<Backend> {
        self.backends.get(key).copied()
    }
    fn backend_slot(&self, _: &BackendIndexKey) -> Option<u32> {
        None
    }
    fn workload(&self, _: &Addr) -> Option<WorkloadVal> {
        None
    }
    fn port(&self, _: &PortKey) -> Option<u32> {
        None
    }
    fn excluded(&self, _: u32, _: &Addr) -> bool {
        false
    }
    fn affinity(&self, _: &AffinityKey) -> Option<Affinity> {
        None
    }
    fn verdict(&self, key: &VerdictKey) -> Option<CachedVerdict> {
        self.verdicts.get(key).copied()
    }
    fn policy_gen(&self, _: u64) -> Option<u64> {
        self.policy_gen
    }
    fn agent_alive(&self, _: u64) -> bool {
        !self.down
    }
    fn outbound_listener(&self, _: u32, _: u32) -> bool {
        true
    }
}

const CLIENT: u64 = 11;
const SERVER: u64 = 22;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// `shop/cart` dials service `shop/web` (10.96.0.1:80) with a local backend `web-0` and a remote one `web-1`.
fn scene(mode: Mode) -> (Arc<Snapshot>, FakeTables) {
    let mut cart = Workload::named(Name::new("shop", "cart"));
    cart.addrs = vec![ip("10.1.0.2")];
    let mut local = Workload::named(Name::new("shop", "web-0"));
    (local.meshed, local.addrs, local.modes.default) = (true, vec![ip("10.1.0.3")], mode);
    let mut remote = Workload::named(Name::new("shop", "web-1"));
    (remote.meshed, remote.addrs, remote.node, remote.modes.default) =
        (true, vec![ip("10.2.0.3")], "n2".into(), mode);
    let mut service = Service::named(Name::new("shop", "web"));
    service.vips = vec![ip("10.96.0.1")];
    let endpoint = |addr| Endpoint {
        addr: ip(addr),
        port: 8080,
        workload: None,
        ready: true,
        hostname: None,
        traits: None,
    };
    service.ports = vec![ServicePort {
        name: "".into(),
        port: 80,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: vec![endpoint("10.1.0.3"), endpoint("10.2.0.3")],
    }];
    let mut tables = FakeTables { policy_gen: Some(5), ..FakeTables::default() };
    let key = ServiceKey { addr: ip("10.96.0.1").into(), port: 80, proto: PROTO_TCP };
    tables.services.insert(key, ServiceVal { service: service.id.0, slots: 1, count: 2, ..ServiceVal::ZERO });
    let backend = |workload: &Workload, flags, incarnation| Backend {
        addr: workload.addrs[0].into(),
        workload: workload.id.0,
        incarnation,
        port: 8080,
        flags,
        pad: 0,
    };
    tables
        .backends
        .insert(BackendKey { slots: 1, slot: 0, pad: 0 }, backend(&local, PEER_MESHED | PEER_LOCAL, SERVER));
    tables.backends.insert(BackendKey { slots: 1, slot: 1, pad: 0 }, backend(&remote, PEER_MESHED, 0));
    let workloads = [cart, local, remote].map(Arc::new).to_vec();
    let parts = Parts { workloads, services: vec![Arc::new(service)], ..Parts::default() };
    (Arc::new(Snapshot::new(1, parts)), tables)
}

fn cache(tables: &mut FakeTables, action: u32, policy_gen: u64) {
    let workload = Workload::named(Name::new("shop", "web-0")).id.0;
    let family = u16::from(FAMILY_V4);
    let key = VerdictKey { netns_cookie: CLIENT, workload, incarnation: SERVER, port: 8080, family, pad: 0 };
    tables.verdicts.insert(key, CachedVerdict { policy_gen, action, pad: 0 });
}

fn ask(snapshot: &Arc<Snapshot>, tables: &FakeTables, host: &str) -> ExplainView {
    let from = snapshot.workload_at(ip("10.1.0.2")).unwrap();
    let pod = PodCfg { workload: from.id.0, addr4: ip("10.1.0.2").into(), pod: 1, ..PodCfg::ZERO };
    let local = Workload::named(Name::new("shop", "web-0")).id;
    let inbound = |id: WorkloadId| {
        let strict = snapshot.workload(id).is_some_and(|w| w.modes.default == Mode::Strict);
        let flags = if strict { INBOUND_FAIL_CLOSED } else { 0 };
        (id == local).then_some((2, InboundCfg { workload: id.0, incarnation: SERVER, flags, pad: 0 }))
    };
    let world = World { tables, snapshot, inbound: &inbound };
    explain(&world, &Question { from, pod: Some((CLIENT, pod)), host, port: 80, now_ns: 1, request: None })
        .unwrap()
}

fn decisions(view: &ExplainView) -> (&HookView, &HookView) {
    let [local, remote] = &view.addresses[0].decisions[..] else { panic!("{view:?}") };
    (local, remote)
}

#[test]
fn each_backend_of_a_service_gets_its_own_story() {
    let (snapshot, tables) = scene(Mode::Permissive);
    let view = ask(&snapshot, &tables, "web");
    assert_eq!(view.resolution.kind, ResolutionKind::Mesh);
    assert_eq!(view.addresses[0].service.as_deref(), Some("shop/web"));
    let (local, remote) = decisions(&view);
    assert_eq!((local.outcome.as_str(), local.reason.as_str()), ("proxy", "no_verdict"));
    assert!(local.outbound_port.is_some_and(|port| ports::OUTBOUND.contains(&port)));
    assert_eq!(local.server.as_ref().unwrap().arrival.reason, "ticket");
    assert_eq!((remote.outcome.as_str(), remote.reason.as_str()), ("proxy", "remote_peer"));
    assert_eq!(remote.backend.as_ref().unwrap().node.as_deref(), Some("n2"));
    assert_eq!(remote.server.as_ref().unwrap().arrival.outcome, "capture");
}

#[test]
fn a_valid_verdict_means_direct_with_a_ticket_also_while_the_agent_is_down() {
    let (snapshot, mut tables) = scene(Mode::Strict);
    cache(&mut tables, VERDICT_ALLOW, 5);
    tables.down = true;
    let view = ask(&snapshot, &tables, "10.96.0.1");
    assert_eq!(view.resolution.kind, ResolutionKind::Literal);
    let (local, remote) = decisions(&view);
    assert_eq!((local.outcome.as_str(), local.ticket), ("direct", true));
    assert!(local.verdict.as_ref().unwrap().valid);
    let server = local.server.as_ref().unwrap();
    assert_eq!((server.arrival.reason.as_str(), server.agent_down.reason.as_str()), ("ticket", "ticket"));
    // The remote one goes out without the agent, and its STRICT side will not have it.
    assert_eq!((remote.outcome.as_str(), remote.reason.as_str()), ("direct", "agent_down"));
    assert_eq!(remote.server.as_ref().unwrap().arrival.reason, "strict_plaintext");
}

#[test]
fn void_and_denying_verdicts_are_told_apart() {
    let (snapshot, mut tables) = scene(Mode::Permissive);
    cache(&mut tables, VERDICT_ALLOW, 4);
    let view = ask(&snapshot, &tables, "web");
    assert_eq!(decisions(&view).0.reason, "stale_verdict");
    assert!(!decisions(&view).0.verdict.as_ref().unwrap().valid);
    cache(&mut tables, VERDICT_DENY, 5);
    let view = ask(&snapshot, &tables, "web");
    assert_eq!(decisions(&view).0.outcome, "deny");
    assert_eq!(decisions(&view).0.server, None, "the server never hears of it");
}

#[test]
fn a_strict_port_refuses_plaintext_when_the_agent_is_down() {
    let (snapshot, tables) = scene(Mode::Strict);
    let view = ask(&snapshot, &tables, "web");
    let server = decisions(&view).0.server.as_ref().unwrap();
    assert_eq!((server.mode.as_str(), server.fail_closed), ("STRICT", true));
    assert_eq!(
        (server.agent_down.outcome.as_str(), server.agent_down.reason.as_str()),
        ("drop", "fail_closed")
    );
}

#[test]
fn names_the_mesh_does_not_know_go_to_the_pods_own_resolver() {
    let (snapshot, tables) = scene(Mode::Permissive);
    let view = ask(&snapshot, &tables, "example.com");
    assert_eq!(view.resolution.kind, ResolutionKind::Forward);
    assert!(view.addresses.is_empty());
}

#[test]
fn a_pod_outside_the_mesh_has_no_decisions() {
    let (snapshot, tables) = scene(Mode::Permissive);
    let from = snapshot.workload_at(ip("10.1.0.2")).unwrap();
    let world = World { tables: &tables, snapshot: &snapshot, inbound: &|_| None };
    let view =
        explain(&world, &Question { from, pod: None, host: "web", port: 80, now_ns: 1, request: None })
            .unwrap();
    assert!(!view.enrolled && view.addresses.is_empty());
    assert_eq!(view.resolution.addrs, [ip("10.96.0.1")]);
}

/// The scene with tunnels and two policies of both servers: `web` about one principal, and a dry run that denies all.
fn policed(action: Action, principal: &str) -> (Arc<Snapshot>, FakeTables) {
    let (snapshot, tables) = scene(Mode::Permissive);
    let only = Match { principals: vec![StringMatch::parse(principal)], ..Match::default() };
    let web = AuthorizationPolicy {
        action,
        rules: vec![Rule { clauses: vec![vec![only]] }],
        ..AuthorizationPolicy::named(Name::new("shop", "web"))
    };
    let soon = AuthorizationPolicy {
        action: Action::Deny,
        dry_run: true,
        rules: vec![Rule::default()],
        ..AuthorizationPolicy::named(Name::new("shop", "soon"))
    };
    let with_policies = |w: &Arc<Workload>| {
        let mut w = (**w).clone();
        if w.meshed {
            w.policies = vec![soon.name.clone(), web.name.clone()];
            w.tunnel = Tunnel::Hbone;
            w.mode_sources =
                ModeSources { default: Some(Name::new("istio-system", "mesh")), ..ModeSources::default() };
        }
        Arc::new(w)
    };
    let parts = Parts {
        workloads: snapshot.workloads().map(with_policies).collect(),
        services: snapshot.services().cloned().collect(),
        policies: [soon.clone(), web.clone()].map(Arc::new).to_vec(),
        ..Parts::default()
    };
    (Arc::new(Snapshot::new(2, parts)), tables)
}

#[test]
fn identities_transport_mode_and_the_deciding_rule_are_told_for_both_nodes() {
    let (snapshot, tables) = policed(Action::Allow, "*/ns/shop/sa/default");
    let view = ask(&snapshot, &tables, "web");
    let (local, remote) = decisions(&view);
    for (decision, transport, arrival) in
        [(local, TransportView::Kernel, "ticket"), (remote, TransportView::MutualTls, "hbone")]
    {
        let policy = decision.policy.as_ref().unwrap();
        assert_eq!(policy.transport, transport);
        assert_eq!(policy.source_identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/default"));
        assert_eq!(policy.destination_identity, "spiffe://cluster.local/ns/shop/sa/default");
        assert_eq!((&*policy.mode, policy.mode_from.as_deref()), ("PERMISSIVE", Some("istio-system/mesh")));
        assert_eq!((&*policy.verdict, &*policy.reason), ("allow", "policy_allows"));
        assert_eq!(policy.text, "AuthorizationPolicy shop/web, rule 0 allows it");
        let by = policy.decided_by.as_ref().unwrap();
        assert_eq!((&*by.policy, by.rule), ("shop/web", Some(0)));
        let [dry] = &policy.dry_run[..] else { panic!("{policy:?}") };
        assert_eq!((&*dry.policy, dry.would_deny), ("shop/soon", true));
        assert_eq!(decision.server.as_ref().unwrap().arrival.reason, arrival);
    }
}

#[test]
fn a_refusal_names_its_policy_also_when_the_kernel_knows_it_already() {
    let (snapshot, mut tables) = policed(Action::Deny, "*/ns/shop/*");
    assert_eq!(decisions(&ask(&snapshot, &tables, "web")).1.policy.as_ref().unwrap().verdict, "allow");
    let (denying, _) = policed(Action::Deny, "cluster.local/ns/shop/*");
    cache(&mut tables, VERDICT_DENY, 5);
    let view = ask(&denying, &tables, "web");
    let (local, remote) = decisions(&view);
    for decision in [local, remote] {
        let policy = decision.policy.as_ref().unwrap();
        assert_eq!((&*policy.verdict, &*policy.reason), ("deny", "policy_denied"));
        assert_eq!(policy.text, "AuthorizationPolicy shop/web, rule 0 denies it");
    }
    assert_eq!(local.server, None);
    let arrival = &remote.server.as_ref().unwrap().arrival;
    assert_eq!((&*arrival.outcome, &*arrival.reason), ("deny", "policy_denied"));
    assert!(remote.server.as_ref().unwrap().fail_closed, "whoever is policed fails closed");
}

#[test]
fn plaintext_proves_nobody() {
    let (snapshot, mut tables) = policed(Action::Allow, "*");
    tables.down = true;
    let view = ask(&snapshot, &tables, "web");
    let policy = decisions(&view).1.policy.as_ref().unwrap();
    assert_eq!((policy.transport, &policy.source_identity), (TransportView::Plaintext, &None));
    assert_eq!((&*policy.verdict, &*policy.reason), ("deny", "no_policy_allows"));
}
