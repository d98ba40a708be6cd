//! Tests of slot assignment and of the tables.

use std::{collections::BTreeSet, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::{
    mode::PortModes,
    route::{
        HostPort, Routes,
        cluster::{Cluster, TrafficPolicy},
        scope::{Audience, Scoped},
        stream::StreamTable,
    },
    snapshot::{Name, Parts},
};

fn key(last: u8) -> EndpointKey {
    SocketAddr::from(([10, 0, 0, last], 80))
}

fn keys(lasts: &[u8]) -> Vec<EndpointKey> {
    lasts.iter().copied().map(key).collect()
}

#[test]
fn a_removed_endpoint_is_replaced_by_the_last_one() {
    assert_eq!(assign(&keys(&[1, 2, 3, 4]), &keys(&[1, 3, 4])), keys(&[1, 4, 3]));
}

#[test]
fn a_new_endpoint_takes_the_slot_of_a_gone_one() {
    assert_eq!(assign(&keys(&[1, 2, 3]), &keys(&[1, 3, 9])), keys(&[1, 9, 3]));
}

#[test]
fn a_new_endpoint_is_appended_when_none_is_gone() {
    assert_eq!(assign(&keys(&[3, 1]), &keys(&[1, 2, 3])), keys(&[3, 1, 2]));
}

proptest! {
    #[test]
    fn slots_hold_each_endpoint_once_and_as_few_as_possible_move(
        previous in prop::collection::btree_set(0_u8..20, 0..16).prop_map(|s| s.into_iter().collect::<Vec<_>>()).prop_shuffle(),
        now in prop::collection::vec(0_u8..20, 0..16),
    ) {
        let (previous, now) = (keys(&previous), keys(&now));
        let slots = assign(&previous, &now);

        let wanted: BTreeSet<_> = now.iter().copied().collect();
        prop_assert_eq!(slots.len(), wanted.len());
        prop_assert_eq!(slots.iter().copied().collect::<BTreeSet<_>>(), wanted.clone());

        let moved = slots.iter().enumerate().filter(|(i, k)| previous.get(*i) != Some(*k)).count();
        let could_stay = previous.iter().take(slots.len()).filter(|k| wanted.contains(k)).count();
        prop_assert_eq!(moved, slots.len() - could_stay);
        prop_assert_eq!(assign(&slots, &now), slots);
    }
}

fn pod(name: &str, last: u8, meshed: bool, modes: PortModes) -> Arc<Workload> {
    Arc::new(Workload {
        addrs: vec![[10, 0, 0, last].into()],
        meshed,
        ready: true,
        modes,
        ..Workload::named(Name::new("default", name))
    })
}

fn endpoint(addr: &str, ready: bool, workload: Option<&Workload>) -> Endpoint {
    Endpoint {
        addr: addr.parse().unwrap(),
        port: 8080,
        workload: workload.map(|w| w.id),
        ready,
        hostname: None,
        traits: None,
    }
}

fn service(vips: &[&str], endpoints: Vec<Endpoint>) -> Service {
    let port = |port, protocol, endpoints| ServicePort {
        name: "".into(),
        port,
        protocol,
        app_protocol: None,
        endpoints,
    };
    Service {
        vips: vips.iter().map(|v| v.parse().unwrap()).collect(),
        ports: vec![port(80, Protocol::Tcp, endpoints.clone()), port(53, Protocol::Udp, endpoints)],
        ..Service::named(Name::new("default", "web"))
    }
}

fn compute(workloads: &[Arc<Workload>], service: Service, view: &NodeView, previous: &Tables) -> Tables {
    let snapshot = Snapshot::new(
        1,
        Parts { workloads: workloads.to_vec(), services: vec![Arc::new(service)], ..Parts::default() },
    );
    tables(&snapshot, view, previous)
}

fn backends<'a>(tables: &'a Tables, addr: &str, port: u16, protocol: Protocol) -> &'a Arc<[BackendEntry]> {
    let entry = &tables.services[&Frontend { addr: addr.parse().unwrap(), port, protocol }];
    let backends = &tables.backends[&entry.slots];
    assert_eq!(backends.len(), entry.count as usize);
    backends
}

#[test]
fn each_address_and_port_is_a_frontend_and_each_family_has_its_own_slots() {
    let endpoints = vec![endpoint("10.0.0.1", true, None), endpoint("fd00::1", true, None)];
    let mut service = service(&["10.96.0.1", "fd96::1"], endpoints);
    service.external_ips = vec!["192.0.2.1".parse().unwrap()];
    service.affinity = Some(Duration::from_secs(10_800));
    let tables = compute(&[], service, &NodeView::default(), &Tables::default());
    assert_eq!(tables.services.len(), 6);
    assert_eq!(tables.backends.len(), 4);
    assert_eq!(backends(&tables, "10.96.0.1", 80, Protocol::Tcp)[0].addr, "10.0.0.1:8080".parse().unwrap());
    assert_eq!(backends(&tables, "192.0.2.1", 80, Protocol::Tcp)[0].addr, "10.0.0.1:8080".parse().unwrap());
    assert_eq!(backends(&tables, "fd96::1", 53, Protocol::Udp)[0].addr, "[fd00::1]:8080".parse().unwrap());
    assert!(tables.services.values().all(|s| s.affinity_s == 10_800 && !s.l7 && s.slots != 0));
}

#[test]
fn only_ready_endpoints_get_slots_and_none_means_refuse() {
    let some = vec![endpoint("10.0.0.1", false, None), endpoint("10.0.0.2", true, None)];
    let tables = compute(&[], service(&["10.96.0.1"], some), &NodeView::default(), &Tables::default());
    assert_eq!(backends(&tables, "10.96.0.1", 80, Protocol::Tcp).len(), 1);
    let none = vec![endpoint("10.0.0.1", false, None)];
    let tables = compute(&[], service(&["10.96.0.1"], none), &NodeView::default(), &Tables::default());
    assert_eq!(backends(&tables, "10.96.0.1", 80, Protocol::Tcp).len(), 0);
}

#[test]
fn a_peer_is_local_only_while_enrolled_and_plain_only_where_disabled() {
    let modes = PortModes { default: Mode::Permissive, ports: [(8080, Mode::Disable)].into() };
    let here = pod("here", 1, true, modes);
    let far = pod("far", 2, true, PortModes { default: Mode::Disable, ..PortModes::default() });
    let bare = pod("bare", 3, false, PortModes { default: Mode::Disable, ..PortModes::default() });
    let endpoints = vec![
        endpoint("10.0.0.1", true, Some(&here)),
        endpoint("10.0.0.2", true, Some(&far)),
        endpoint("10.0.0.3", true, Some(&bare)),
        endpoint("10.0.0.4", true, None),
    ];
    let view = NodeView { enrolled: [(here.id, 77), (bare.id, 78)].into() };
    let all = [Arc::clone(&here), Arc::clone(&far), Arc::clone(&bare)];
    let tables = compute(&all, service(&["10.96.0.1"], endpoints), &view, &Tables::default());

    let peer = |w: &Workload, incarnation, meshed, local, plain| PeerEntry {
        workload: Some(w.id),
        incarnation,
        meshed,
        local,
        plain,
    };
    let peers: Vec<_> = backends(&tables, "10.96.0.1", 80, Protocol::Tcp).iter().map(|b| b.peer).collect();
    assert_eq!(
        peers,
        [
            peer(&here, 77, true, true, true),
            peer(&far, 0, true, false, true),
            peer(&bare, 0, false, false, false),
            PeerEntry::default(),
        ]
    );
    let at = |addr: &str| tables.workloads[&addr.parse().unwrap()];
    assert_eq!(at("10.0.0.1"), peer(&here, 77, true, true, false), "only one of its ports is plain");
    assert_eq!(at("10.0.0.2"), peer(&far, 0, true, false, true));
    assert_eq!(at("10.0.0.3"), peer(&bare, 0, false, false, false));
}

#[test]
fn what_did_not_change_keeps_its_allocation_and_the_rest_keeps_its_slots() {
    let (a, b, c) = (
        endpoint("10.0.0.1", true, None),
        endpoint("10.0.0.2", true, None),
        endpoint("10.0.0.3", true, None),
    );
    let view = NodeView::default();
    let first =
        compute(&[], service(&["10.96.0.1"], vec![a.clone(), b, c.clone()]), &view, &Tables::default());
    let mut next = service(&["10.96.0.1"], vec![a.clone(), c.clone()]);
    next.ports[1].endpoints =
        service(&[], vec![a, endpoint("10.0.0.2", true, None), c]).ports[1].endpoints.clone();
    let second = compute(&[], next, &view, &first);
    let slots: Vec<_> =
        backends(&second, "10.96.0.1", 80, Protocol::Tcp).iter().map(|b| b.addr.to_string()).collect();
    assert_eq!(slots, ["10.0.0.1:8080", "10.0.0.3:8080"]);
    assert!(Arc::ptr_eq(
        backends(&first, "10.96.0.1", 53, Protocol::Udp),
        backends(&second, "10.96.0.1", 53, Protocol::Udp)
    ));
}

#[test]
fn a_port_that_a_route_or_a_policy_names_needs_the_agent_and_no_other_does() {
    let snapshot = |routes: Routes| {
        let services = vec![Arc::new(service(&["10.96.0.1"], vec![endpoint("10.0.0.1", true, None)]))];
        Snapshot::new(1, Parts { services, routes: Arc::new(routes), ..Parts::default() })
    };
    let l7 = |routes: Routes, port: u16, protocol: Protocol| {
        let tables = tables(&snapshot(routes), &NodeView::default(), &Tables::default());
        tables.services[&Frontend { addr: "10.96.0.1".parse().unwrap(), port, protocol }].l7
    };
    let stream = |host: &str, port: u16| {
        let table = StreamTable { tls: Vec::new(), tcp: Vec::new() };
        let key = HostPort { host: host.into(), port };
        Routes { streams: [(key, Scoped::everywhere(Arc::new(table)))].into(), ..Routes::default() }
    };
    let policy = |port: u16, subset: Option<&str>| {
        let cluster = Cluster { origin: None, labels: BTreeMap::new(), policy: TrafficPolicy::default() };
        let service = Name::new("default", "web");
        let key = ClusterKey { service, port, subset: subset.map(Into::into) };
        Routes { clusters: [(key, Scoped::everywhere(Arc::new(cluster)))].into(), ..Routes::default() }
    };
    let host = "web.default.svc.cluster.local";
    assert!(!l7(Routes::default(), 80, Protocol::Tcp));
    assert!(l7(stream(host, 80), 80, Protocol::Tcp));
    assert!(l7(stream("*.default.svc.cluster.local", 80), 80, Protocol::Tcp));
    assert!(!l7(stream(host, 81), 80, Protocol::Tcp));
    assert!(!l7(stream("other.default.svc.cluster.local", 80), 80, Protocol::Tcp));
    assert!(!l7(stream(host, 53), 53, Protocol::Udp));
    assert!(l7(policy(80, None), 80, Protocol::Tcp));
    assert!(l7(policy(80, Some("v1")), 80, Protocol::Tcp));
    assert!(!l7(policy(81, None), 80, Protocol::Tcp));
}

#[test]
fn a_port_without_endpoints_is_the_agents_where_it_has_an_answer() {
    let answered = |name: &str, routes: &Routes| {
        let mut service = service(&["10.96.0.1"], Vec::new());
        service.ports[0].name = name.into();
        let parts =
            Parts { services: vec![Arc::new(service)], routes: Arc::new(routes.clone()), ..Parts::default() };
        let tables = tables(&Snapshot::new(1, parts), &NodeView::default(), &Tables::default());
        let at = Frontend { addr: "10.96.0.1".parse().unwrap(), port: 80, protocol: Protocol::Tcp };
        (tables.services[&at].count == 0).then_some(tables.services[&at].answered)
    };
    let cluster = Cluster { origin: None, labels: BTreeMap::new(), policy: TrafficPolicy::default() };
    let key = ClusterKey { service: Name::new("default", "web"), port: 80, subset: None };
    let policy =
        Routes { clusters: [(key, Scoped::everywhere(Arc::new(cluster)))].into(), ..Routes::default() };
    let at = HostPort { host: "web.default.svc.cluster.local".into(), port: 80 };
    let table = Arc::new(StreamTable { tls: Vec::new(), tcp: Vec::new() });
    let streams = Routes { streams: [(at, Scoped::everywhere(table))].into(), ..Routes::default() };
    for (name, routes, expected) in [
        ("http", &policy, true),
        ("grpc", &policy, true),
        ("", &policy, true),
        ("tcp", &policy, false),
        ("tls", &policy, false),
        ("tcp", &streams, true),
        ("http", &Routes::default(), false),
    ] {
        assert_eq!(answered(name, routes), Some(expected), "{name}");
    }
}

#[test]
fn an_address_that_is_kept_leads_to_itself_and_to_whoever_is_there() {
    let workload = pod("web", 7, true, PortModes::default());
    let service = Service {
        hostname: Some("raw.x".into()),
        resolution: Resolution::Dialled,
        ..service(&["192.0.2.1", "10.0.0.7"], Vec::new())
    };
    let parts = Parts {
        workloads: vec![Arc::clone(&workload)],
        services: vec![Arc::new(service)],
        ..Parts::default()
    };
    let snapshot = Snapshot::new(1, parts);
    let first = tables(&snapshot, &NodeView::default(), &Tables::default());
    for (addr, meshed) in [("192.0.2.1", false), ("10.0.0.7", true)] {
        let addr: IpAddr = addr.parse().unwrap();
        let entry = &first.services[&Frontend { addr, port: 80, protocol: Protocol::Tcp }];
        assert_eq!(entry.count, 1, "{addr}");
        let slots = &first.backends[&entry.slots];
        assert_eq!((slots[0].addr, slots[0].peer.meshed), (SocketAddr::new(addr, 80), meshed));
    }
    let second = tables(&snapshot, &NodeView::default(), &first);
    assert!(second.backends.iter().all(|(id, slots)| Arc::ptr_eq(slots, &first.backends[id])));
}

#[test]
fn a_service_that_some_local_pod_does_not_see_is_marked_for_pods_of_its_kind() {
    let of = |namespace: &str| {
        let addr = IpAddr::from([10, 0, 1, namespace.as_bytes()[0]]);
        Arc::new(Workload {
            meshed: true,
            addrs: vec![addr],
            ..Workload::named(Name::new(namespace.to_owned(), "pod"))
        })
    };
    let (own, other) = (of("default"), of("other"));
    let hidden_from = |enrolled: &[&Arc<Workload>], audience: Audience| {
        let view = NodeView { enrolled: enrolled.iter().map(|pod| (pod.id, 1)).collect() };
        let service = Service { audience, ..service(&["10.96.0.1"], vec![endpoint("10.0.0.1", true, None)]) };
        let tables = compute(&[Arc::clone(&own), Arc::clone(&other)], service, &view, &Tables::default());
        let at = |port, protocol| {
            tables.services[&Frontend { addr: [10, 96, 0, 1].into(), port, protocol }].hidden
        };
        assert_eq!(at(53, Protocol::Udp), 0, "datagrams know no sight");
        at(80, Protocol::Tcp)
    };
    let limited = || Audience::Only(["default".into()].into());
    assert_eq!(hidden_from(&[&own, &other], Audience::Everyone), 0);
    assert_eq!(hidden_from(&[&own], limited()), 0, "nobody here does not see it");
    assert_eq!(hidden_from(&[&own, &other], limited()), 1 << sight_kind(&other));
}

#[test]
fn b9_a_preference_leaves_the_nearest_ready_endpoints() {
    let at = |name: &str, last: u8, zone: &str, node: &str| {
        let place = Place { region: "r".into(), zone: zone.into(), node: node.into(), ..Place::default() };
        Arc::new(Workload {
            place,
            addrs: vec![[10, 0, 0, last].into()],
            ready: true,
            meshed: true,
            ..Workload::named(Name::new("default", name))
        })
    };
    let pods =
        [at("client", 9, "z1", "n1"), at("a", 1, "z1", "n1"), at("b", 2, "z1", "n2"), at("c", 3, "z2", "n3")];
    let view = NodeView { enrolled: [(pods[0].id, 1)].into() };
    let slots = |distribution, ready: [bool; 3], previous: &Tables| {
        let endpoints: Vec<Endpoint> = pods[1..]
            .iter()
            .zip(ready)
            .map(|(pod, ready)| endpoint(&pod.addrs[0].to_string(), ready, Some(pod)))
            .collect();
        let service = Service { distribution, ..service(&["10.96.0.1"], endpoints) };
        compute(&pods, service, &view, previous)
    };
    let shown = |tables: &Tables| -> Vec<u8> {
        let mut lasts: Vec<u8> = backends(tables, "10.96.0.1", 80, Protocol::Tcp)
            .iter()
            .map(|backend| match backend.addr.ip() {
                IpAddr::V4(v4) => v4.octets()[3],
                IpAddr::V6(_) => 0,
            })
            .collect();
        lasts.sort_unstable();
        lasts
    };
    let none = Tables::default();
    let (zone, node) = (Some(Distribution::SameZone), Some(Distribution::SameNode));
    assert_eq!(shown(&slots(None, [true; 3], &none)), [1, 2, 3]);
    let near = slots(zone, [true; 3], &none);
    assert_eq!(shown(&near), [1, 2]);
    assert_eq!(shown(&slots(node, [true; 3], &near)), [1]);
    assert_eq!(shown(&slots(node, [false, true, true], &near)), [2], "the zone comes next");
    assert_eq!(shown(&slots(zone, [false, false, true], &near)), [3], "better far than not at all");
    assert_eq!(shown(&slots(None, [true; 3], &near)), [1, 2, 3]);
    let again = slots(zone, [true; 3], &near);
    let key = Frontend { addr: [10, 96, 0, 1].into(), port: 80, protocol: Protocol::Tcp };
    let of = |tables: &Tables| Arc::clone(&tables.backends[&tables.services[&key].slots]);
    assert!(Arc::ptr_eq(&of(&near), &of(&again)), "nothing changed");
}

#[test]
fn an_address_that_several_hosts_share_is_the_agents() {
    let hosted = |host: &str, endpoints: Vec<Endpoint>| {
        let mut service = service(&["192.0.2.1"], endpoints);
        service.ports[0].name = "http".into();
        let name = Name::new("default", host);
        Arc::new(Service { hostname: Some(host.into()), name, ..service })
    };
    let entry = |services: Vec<Arc<Service>>| {
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let tables = tables(&snapshot, &NodeView::default(), &Tables::default());
        let at = Frontend { addr: "192.0.2.1".parse().unwrap(), port: 80, protocol: Protocol::Tcp };
        (tables.services[&at].l7, tables.services[&at].answered)
    };
    let far = || vec![endpoint("10.0.0.1", true, None)];
    assert_eq!(entry(vec![hosted("a.x", far())]), (false, false));
    // The first one's endpoints say nothing of the other's.
    assert_eq!(entry(vec![hosted("a.x", Vec::new()), hosted("b.x", far())]), (true, true));
}
