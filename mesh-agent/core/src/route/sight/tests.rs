//! Tests of sight.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    route::{
        HostPort, Origin, Routes,
        cluster::ClusterKey,
        defaults::MeshDefaults,
        http::{Action, HttpRule},
        scope::{Audience, EgressHost, EgressListener, InboundPools, Scoped},
    },
    snapshot::{Endpoint, Mesh, Parts, Resolution},
};

fn service(namespace: &str, name: &str, vip: &str, audience: Audience) -> Arc<Service> {
    let port = |port| ServicePort {
        name: "".into(),
        port,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: Vec::new(),
    };
    Arc::new(Service {
        vips: vec![vip.parse().unwrap()],
        ports: vec![port(80), port(81)],
        audience,
        ..Service::named(Name::new(namespace, name))
    })
}

/// Of a ServiceEntry: no address, but networks.
fn declared(namespace: &str, host: &str, audience: Audience, networks: &[&str]) -> Arc<Service> {
    let service = service(namespace, host, "192.0.2.99", audience);
    Arc::new(Service {
        hostname: Some(host.into()),
        vips: Vec::new(),
        networks: networks.iter().map(|net| net.parse().unwrap()).collect(),
        resolution: Resolution::Dialled,
        ..(*service).clone()
    })
}

fn only(namespaces: &[&str]) -> Audience {
    Audience::Only(namespaces.iter().map(|name| (*name).into()).collect::<BTreeSet<_>>())
}

fn host(namespace: Option<&str>, host: &str) -> EgressHost {
    EgressHost { excluded: false, namespace: namespace.map(Into::into), host: host.into() }
}

fn client(namespace: &str, sidecar: Option<&str>) -> Workload {
    Workload {
        sidecar: sidecar.map(|name| Name::new(namespace, name)),
        ..Workload::named(Name::new(namespace, "client"))
    }
}

fn world(mesh: OutboundPolicy, sidecars: Vec<(Name, SidecarScope)>) -> Snapshot {
    let defaults = MeshDefaults { outbound: mesh, ..MeshDefaults::default() };
    let routes = Routes {
        sidecars: sidecars.into_iter().map(|(name, scope)| (name, Arc::new(scope))).collect(),
        ..Routes::default()
    };
    let services = vec![
        service("a", "web", "10.96.0.1", Audience::Everyone),
        service("b", "api", "10.96.0.2", Audience::Everyone),
        service("b", "secret", "10.96.0.3", only(&["b", "c"])),
        service("b", "nobody", "10.96.0.4", only(&[])),
        declared("b", "*.net.example", Audience::Everyone, &["198.51.100.0/24"]),
        declared("b", "*.own.example", only(&["b"]), &["203.0.113.0/24"]),
    ];
    let pod = Workload { addrs: vec!["10.0.0.9".parse().unwrap()], ..Workload::named(Name::new("b", "pod")) };
    let mesh = Arc::new(Mesh { defaults: Arc::new(defaults), ..Mesh::default() });
    let workloads = vec![Arc::new(pod)];
    Snapshot::new(1, Parts { workloads, services, routes: Arc::new(routes), mesh, ..Parts::default() })
}

fn rule(origin: Origin) -> HttpRule {
    HttpRule::new(origin, Action::Passthrough)
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn b6_a_service_is_seen_by_the_namespaces_it_is_exported_to() {
    let world = world(OutboundPolicy::AllowAny, Vec::new());
    let seen = |namespace: &str, vip: &str| {
        let client = client(namespace, None);
        world.sight_of(&client).service_at(at(vip), Protocol::Tcp).is_some()
    };
    assert!(seen("z", "10.96.0.1:80"));
    assert_eq!(["a", "b", "c"].map(|ns| seen(ns, "10.96.0.3:80")), [false, true, true]);
    assert_eq!(["a", "b", "c"].map(|ns| seen(ns, "10.96.0.4:80")), [false; 3]);
    assert!(world.hides_anything());
}

#[test]
fn s65_s67_a_sidecar_limits_what_is_seen_port_by_port() {
    let egress = vec![
        EgressListener { port: Some(81), hosts: vec![host(Some("b"), "*")] },
        EgressListener { port: None, hosts: vec![host(Some("a"), "*")] },
    ];
    let scope = SidecarScope { egress, outbound: None, egress_proxy: None, inbound: InboundPools::default() };
    let world = world(OutboundPolicy::AllowAny, vec![(Name::new("a", "own"), scope)]);
    let limited = client("a", Some("own"));
    let sight = world.sight_of(&limited);
    let seen = |vip: &str| sight.service_at(at(vip), Protocol::Tcp).is_some();
    assert_eq!(["10.96.0.1:80", "10.96.0.1:81"].map(seen), [true, false]);
    assert_eq!(["10.96.0.2:80", "10.96.0.2:81"].map(seen), [false, true]);
    assert!(!seen("10.96.0.3:81"), "what is not exported stays hidden");
    let named = |namespace, name| sight.sees_name(world.service(&Name::new(namespace, name)).unwrap());
    assert!(named("a", "web") && named("b", "api") && !named("b", "secret"));
    let other = client("a", None);
    assert!(world.sight_of(&other).service_at(at("10.96.0.2:80"), Protocol::Tcp).is_some());
    let gone = client("a", Some("gone"));
    assert!(world.sight_of(&gone).sees_name(world.service(&Name::new("b", "api")).unwrap()));
}

#[test]
fn s66_rules_of_virtual_services_are_seen_by_their_own_namespace() {
    let scope = |namespace| SidecarScope {
        egress: vec![EgressListener { port: None, hosts: vec![host(Some(namespace), "*")] }],
        outbound: None,
        egress_proxy: None,
        inbound: InboundPools::default(),
    };
    let sidecars = vec![(Name::new("a", "a"), scope("a")), (Name::new("a", "b"), scope("b"))];
    let world = world(OutboundPolicy::AllowAny, sidecars);
    let api = world.service(&Name::new("b", "api")).unwrap();
    let table = |kind: &str, namespace: &str| {
        let origin = Origin {
            kind: kind.into(),
            name: Name::new(namespace, "rule"),
            field: "spec".into(),
            place: None,
        };
        let unmatched = Action::Passthrough;
        HttpTable::new(vec![rule(origin)], unmatched)
    };
    let sees = |sidecar: &str, table: &HttpTable| {
        let client = client("a", Some(sidecar));
        world.sight_of(&client).sees_rules(table, "api.b.svc.cluster.local", Some(api), 80)
    };
    assert!(
        sees("a", &table("VirtualService", "a")),
        "rules of its own namespace about what it does not see"
    );
    assert!(!sees("a", &table("VirtualService", "b")));
    assert!(!sees("a", &table("HTTPRoute", "a")), "they are attached to the service");
    assert!(sees("b", &table("HTTPRoute", "b")) && !sees("b", &table("VirtualService", "a")));
    // Its rules are a delegate's of another namespace.
    let delegating = HttpTable { owner: Some("a".into()), ..table("VirtualService", "b") };
    assert!(sees("a", &delegating) && !sees("b", &delegating));
}

#[test]
fn s68_f10_under_registry_only_what_nothing_describes_is_refused() {
    let open = SidecarScope {
        egress: vec![EgressListener { port: None, hosts: vec![host(None, "*")] }],
        outbound: Some(OutboundPolicy::AllowAny),
        egress_proxy: None,
        inbound: InboundPools::default(),
    };
    let blind = SidecarScope {
        egress: Vec::new(),
        outbound: None,
        egress_proxy: None,
        inbound: InboundPools::default(),
    };
    let sidecars = vec![(Name::new("a", "open"), open), (Name::new("a", "blind"), blind)];
    let world = world(OutboundPolicy::RegistryOnly, sidecars);
    let refuses = |sidecar: Option<&str>, addr: &str| {
        let client = client("a", sidecar);
        world.sight_of(&client).refuses(at(addr))
    };
    assert!(refuses(None, "192.0.2.1:80"));
    assert!(!refuses(None, "10.96.0.1:80") && refuses(None, "10.96.0.1:82"), "a port that it does not have");
    assert!(refuses(None, "10.96.0.3:80"), "not exported to it");
    assert!(!refuses(None, "10.0.0.9:1234"), "a pod");
    assert!(!refuses(None, "198.51.100.7:80"), "in a network of a service");
    assert!(refuses(None, "198.51.100.7:82"), "not at its ports");
    assert!(refuses(None, "203.0.113.7:80"), "in a network of one that is not exported to it");
    assert!(!refuses(Some("open"), "192.0.2.1:80"));
    assert!(refuses(Some("blind"), "10.96.0.1:80"));
}

#[test]
fn s68_what_nothing_describes_goes_through_the_egress_proxy_but_for_those_who_are_it() {
    let origin = Origin { kind: "Sidecar".into(), name: Name::new("a", "x"), field: "".into(), place: None };
    let through = |backend| SidecarScope {
        egress: vec![EgressListener { port: None, hosts: vec![host(Some("a"), "*")] }],
        outbound: Some(OutboundPolicy::AllowAny),
        egress_proxy: Some(EgressProxy { origin: Arc::new(origin.clone()), backend }),
        inbound: InboundPools::default(),
    };
    let key = ClusterKey { service: Name::new("b", "out"), port: 80, subset: None };
    let broken = Backend::Broken { status: 503, reason: "gone".into() };
    let sidecars = [("set", through(Backend::Cluster(key))), ("broken", through(broken))];
    let base =
        world(OutboundPolicy::RegistryOnly, sidecars.map(|(name, s)| (Name::new("a", name), s)).into());
    // Behind it are a workload, and an address that is another's.
    let endpoint = |addr: &str, workload| Endpoint {
        addr: addr.parse().unwrap(),
        port: 8080,
        workload,
        ready: true,
        hostname: None,
        traits: None,
    };
    let mut out = (*service("b", "out", "10.96.0.9", Audience::Everyone)).clone();
    let own = Name::new("a", "own");
    let of_own = Workload::named(own.clone()).id;
    out.ports[1].endpoints = vec![endpoint("10.0.0.7", Some(of_own)), endpoint("10.0.0.8", None)];
    let parts = Parts {
        services: base.services().cloned().chain([Arc::new(out)]).collect(),
        workloads: base.workloads().cloned().collect(),
        routes: Arc::clone(base.routes()),
        mesh: Arc::clone(base.mesh()),
        ..Parts::default()
    };
    let world = Snapshot::new(1, parts);
    let of = |name: &str, sidecar: Option<&str>, addr: &str| {
        let workload = Workload {
            sidecar: sidecar.map(|sidecar| Name::new("a", sidecar)),
            addrs: vec![addr.parse().unwrap()],
            ..Workload::named(Name::new("a", name))
        };
        let sight = world.sight_of(&workload);
        let goes = |to: &str| {
            let to = at(to);
            assert_eq!(sight.holds(to), sight.refuses(to) || sight.egress_proxy_to(to).is_some());
            (sight.refuses(to), sight.egress_proxy_to(to).is_some())
        };
        (sight.holds_unknown(), ["192.0.2.1:80", "10.96.0.1:80", "10.96.0.2:80", "10.0.0.9:1"].map(goes))
    };
    let (direct, through, refused) = ((false, false), (false, true), (true, false));
    // An address of nobody, a service that is seen, one that the Sidecar leaves out, a pod.
    let all = [through, direct, through, direct];
    assert_eq!(of("other", Some("set"), "10.0.0.1"), (true, all));
    assert_eq!(
        of("other", Some("broken"), "10.0.0.1"),
        (true, all),
        "nobody goes past one that is not there"
    );
    assert_eq!(of("other", None, "10.0.0.1"), (true, [refused, direct, direct, direct]));
    assert_eq!(of("own", Some("set"), "10.0.0.1"), (false, [direct; 4]));
    assert_eq!(of("third", Some("set"), "10.0.0.8"), (false, [direct; 4]), "by its address");
    assert_eq!(of("own", Some("broken"), "10.0.0.1"), (true, all));
}

#[test]
fn a_tls_servers_name_means_the_service_that_the_client_sees_at_the_port() {
    let world = world(OutboundPolicy::RegistryOnly, Vec::new());
    let of = |namespace: &str, name: &str, port| {
        Some(world.sight_from(namespace).service_of_server(name, port)?.name.name.to_string())
    };
    assert_eq!(of("a", "x.net.example", 80).as_deref(), Some("*.net.example"));
    assert_eq!(of("a", "x.net.example", 82), None);
    assert_eq!(of("a", "x.own.example", 80), None);
    assert_eq!(of("b", "x.own.example", 80).as_deref(), Some("*.own.example"));
    assert_eq!(of("a", "elsewhere.example", 80), None);
}

#[test]
fn kinds_of_sight_depend_on_namespace_and_sidecar_alone() {
    let of = |namespace: &str, sidecar: Option<&str>| sight_kind(&client(namespace, sidecar));
    assert_eq!(of("a", None), of("a", None));
    let kinds: BTreeSet<u32> = (0..200).map(|n| of(&format!("n{n}"), None)).collect();
    assert_eq!(kinds.len(), SIGHTS as usize, "all are used, and no others");
    assert!((0..200).any(|n| of(&format!("n{n}"), Some("x")) != of(&format!("n{n}"), None)));
}

#[test]
fn an_address_in_a_network_is_the_smallest_networks_unless_it_is_a_pods() {
    let host = |host: &str, networks: &[&str]| declared("a", host, Audience::Everyone, networks);
    let own = declared("b", "own", only(&["b"]), &["198.51.100.8/32"]);
    let services = vec![
        host("wide", &["198.51.100.0/24", "10.0.0.0/8"]),
        host("narrow", &["198.51.100.0/28"]),
        own,
        service("a", "web", "198.51.100.9", Audience::Everyone),
    ];
    let pod = Workload { addrs: vec!["10.0.0.9".parse().unwrap()], ..Workload::named(Name::new("b", "pod")) };
    let workloads = vec![Arc::new(pod)];
    let world = Snapshot::new(1, Parts { workloads, services, ..Parts::default() });
    let found = |namespace: &str, addr: &str| {
        let client = client(namespace, None);
        let found = world.sight_of(&client).service_at(at(addr), Protocol::Tcp);
        found.map(|(service, _)| service.name.name.to_string())
    };
    for (addr, expected) in [
        ("198.51.100.8:80", Some("narrow")),
        ("198.51.100.99:80", Some("wide")),
        ("198.51.100.9:80", Some("web")),
        ("198.51.100.8:90", None),
        ("10.0.0.8:80", Some("wide")),
        ("10.0.0.9:80", None),
        ("192.0.2.1:80", None),
    ] {
        assert_eq!(found("a", addr).as_deref(), expected, "{addr}");
    }
    assert_eq!(found("b", "198.51.100.8:80").as_deref(), Some("own"));
}

#[test]
fn s52_ports_of_hosts_that_only_their_names_tell_are_known_where_something_is_said_about_them() {
    let rules = |hosts: &[&str]| {
        let table = HttpTable::new(Vec::new(), Action::Passthrough);
        let table = Arc::new(table);
        let entry = |host: &&str| {
            (HostPort { host: (*host).into(), port: 80 }, Scoped::everywhere(Arc::clone(&table)))
        };
        Routes { http: hosts.iter().map(entry).collect(), ..Routes::default() }
    };
    let ports = |routes: Routes, service: Arc<Service>| {
        let world =
            Snapshot::new(1, Parts { services: vec![service], routes: Arc::new(routes), ..Parts::default() });
        let of = |namespace| {
            let client = client(namespace, None);
            world.sight_of(&client).unlisted_ports().collect::<Vec<_>>()
        };
        (of("a"), of("b"))
    };
    let named = || declared("a", "api.x", Audience::Everyone, &[]);
    assert_eq!(ports(Routes::default(), named()), (vec![], vec![]), "it goes where it was dialled anyway");
    assert_eq!(ports(rules(&["api.x"]), named()), (vec![80], vec![80]));
    assert_eq!(ports(rules(&["*.x"]), declared("a", "*.x", only(&["b"]), &[])), (vec![], vec![80]));
    let listed = Service { resolution: Resolution::Listed, ..(*named()).clone() };
    assert_eq!(ports(Routes::default(), Arc::new(listed)).0, [80, 81], "it has endpoints of its own");
    let mut bytes = (*named()).clone();
    bytes.ports[0].name = "tcp".into();
    assert!(ports(rules(&["api.x"]), Arc::new(bytes.clone())).0.is_empty(), "bytes say no name");
    bytes.networks = vec!["192.0.2.0/24".parse().unwrap()];
    assert_eq!(ports(rules(&["api.x"]), Arc::new(bytes)).0, [80]);
    let addressed = service("a", "web", "10.96.0.1", Audience::Everyone);
    assert!(ports(rules(&["web.a.svc.cluster.local"]), addressed).0.is_empty());
}

fn audience() -> impl Strategy<Value = Audience> {
    let names = prop::collection::btree_set(prop::sample::select(vec!["a", "b", "c"]), 0..3);
    prop_oneof![
        Just(Audience::Everyone),
        names.prop_map(|names| only(&names.into_iter().collect::<Vec<_>>()))
    ]
}

fn egress_host() -> impl Strategy<Value = EgressHost> {
    let namespace = prop::option::of(prop::sample::select(vec!["a", "b", "c"]));
    let text = prop::sample::select(vec!["*", "*.svc.cluster.local", "web.b.svc.cluster.local", "api.x"]);
    (namespace, text, any::<bool>())
        .prop_map(|(namespace, text, excluded)| EgressHost { excluded, ..host(namespace, text) })
}

fn egress() -> impl Strategy<Value = Vec<EgressListener>> {
    let listener =
        (prop::option::of(prop::sample::select(vec![80, 81])), prop::collection::vec(egress_host(), 0..4))
            .prop_map(|(port, hosts)| EgressListener { port, hosts });
    prop::collection::vec(listener, 0..3)
}

proptest! {
    #[test]
    fn no_sidecar_shows_what_is_not_exported_and_what_it_takes_away_shows_nothing_more(
        audience in audience(), egress in egress(), taken in egress_host(), from in prop::sample::select(vec!["a", "b", "c"]),
    ) {
        let seen_with = |egress: Option<Vec<EgressListener>>| {
            let sidecars = egress
                .into_iter()
                .map(|egress| (Name::new(from, "own"), Arc::new(SidecarScope { egress, outbound: None, egress_proxy: None, inbound: InboundPools::default() })));
            let routes = Arc::new(Routes { sidecars: sidecars.collect(), ..Routes::default() });
            let services = vec![
                service("b", "web", "10.96.0.1", audience.clone()),
                declared("b", "api.x", audience.clone(), &["198.51.100.0/24"]),
            ];
            let world = Snapshot::new(1, Parts { services, routes, ..Parts::default() });
            let client = client(from, Some("own"));
            let sight = world.sight_of(&client);
            let mut seen = BTreeSet::new();
            for service in world.services() {
                let ports: BTreeSet<u16> = [80, 81].into_iter().filter(|port| sight.sees(service, *port)).collect();
                // A name is seen where any of its ports is.
                assert_eq!(sight.sees_name(service), !ports.is_empty());
                seen.extend(ports.into_iter().map(|port| (service.name.clone(), port)));
            }
            for addr in ["10.96.0.1:80", "10.96.0.1:81", "198.51.100.1:80"] {
                if let Some((service, port)) = sight.service_at(at(addr), Protocol::Tcp) {
                    assert!(seen.contains(&(service.name.clone(), port.port)), "{addr}");
                }
            }
            seen
        };
        let exported = seen_with(None);
        prop_assert_eq!(exported.is_empty(), !audience.includes(from));
        let all = seen_with(Some(egress.clone()));
        prop_assert!(all.is_subset(&exported), "{:?} {:?}", all, exported);
        let mut fewer = egress;
        for listener in &mut fewer {
            listener.hosts.push(EgressHost { excluded: true, ..taken.clone() });
        }
        let left = seen_with(Some(fewer));
        prop_assert!(left.is_subset(&all), "{:?} {:?}", left, all);
    }
}

/// A host of a ServiceEntry with an address, or networks, and HTTP at port 80.
fn hosted(
    namespace: &str,
    host: &str,
    vip: Option<&str>,
    networks: &[&str],
    audience: Audience,
) -> Arc<Service> {
    let mut service = (*declared(namespace, host, audience, networks)).clone();
    service.vips = vip.map(|vip| vip.parse().unwrap()).into_iter().collect();
    service.ports.truncate(1);
    service.ports[0].name = "http".into();
    Arc::new(service)
}

#[test]
fn of_hosts_behind_one_address_the_one_that_is_asked_for_is_meant() {
    let vip = Some("192.0.2.1");
    let mut bytes = (*hosted("a", "bytes.x", vip, &[], Audience::Everyone)).clone();
    bytes.ports[0].name = "tcp".into();
    let services = vec![
        hosted("a", "b.x", vip, &[], only(&["a"])),
        hosted("a", "c.x", vip, &[], Audience::Everyone),
        hosted("a", "a.x", vip, &[], Audience::Everyone),
        hosted("a", "*.w.x", vip, &[], Audience::Everyone),
        hosted("else", "d.x", vip, &[], Audience::Everyone),
        Arc::new(bytes),
        service("a", "kube", "192.0.2.1", Audience::Everyone),
        hosted("a", "alone.x", Some("192.0.2.2"), &[], Audience::Everyone),
        service("a", "first", "192.0.2.3", Audience::Everyone),
        hosted("a", "later.x", Some("192.0.2.3"), &[], Audience::Everyone),
        hosted("a", "n.x", None, &["198.51.100.0/24"], Audience::Everyone),
        hosted("a", "m.x", None, &["198.51.100.0/24"], Audience::Everyone),
        hosted("a", "wide.x", None, &["198.51.0.0/16"], Audience::Everyone),
    ];
    let world = Snapshot::new(1, Parts { services, ..Parts::default() });
    let sharing: Vec<&str> =
        world.sharing("192.0.2.1".parse().unwrap(), 80).map(|(service, _)| &*service.name.name).collect();
    assert_eq!(
        sharing,
        ["b.x", "*.w.x", "a.x", "c.x"],
        "the owner, then by name; what has no name is not told"
    );
    let of = |client: &str, dialled: &str, name: Option<&str>| {
        let sight = world.sight_from(client);
        let found =
            sight.service_at_named(at(dialled), name).map(|(service, _)| service.name.name.to_string());
        (found.unwrap_or_default(), sight.is_shared(at(dialled)))
    };
    for (client, dialled, name, wanted, shared) in [
        ("a", "192.0.2.1:80", Some("c.x"), "c.x", true),
        ("a", "192.0.2.1:80", Some("A.X."), "a.x", true),
        ("a", "192.0.2.1:80", Some("q.w.x"), "*.w.x", true),
        ("a", "192.0.2.1:80", Some("d.x"), "b.x", true),
        ("a", "192.0.2.1:80", Some("bytes.x"), "b.x", true),
        ("a", "192.0.2.1:80", None, "b.x", true),
        // Who does not see the first one has the first that is seen.
        ("z", "192.0.2.1:80", None, "*.w.x", true),
        ("z", "192.0.2.1:80", Some("b.x"), "*.w.x", true),
        ("a", "192.0.2.2:80", Some("c.x"), "alone.x", false),
        ("a", "192.0.2.3:80", Some("later.x"), "first", false),
        ("a", "198.51.100.7:80", Some("m.x"), "m.x", true),
        ("a", "198.51.100.7:80", Some("wide.x"), "n.x", true),
        ("a", "198.51.100.7:80", None, "n.x", true),
        ("a", "198.51.1.7:80", None, "wide.x", false),
        ("a", "192.0.2.9:80", Some("c.x"), "", false),
    ] {
        assert_eq!(of(client, dialled, name), (wanted.to_owned(), shared), "{client} {dialled} {name:?}");
    }
}
