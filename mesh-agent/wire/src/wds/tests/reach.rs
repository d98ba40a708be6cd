//! A node that is told only what its pods need answers each of them as if it were told everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    dns::{self, QType},
    reach::Reach,
    route::{
        HostPort, Origin, Routes,
        cluster::{Cluster, ClusterKey, ConnectionPool, TrafficPolicy},
        host::resolve,
        http::{Action, Backend, HeaderOps, HttpRule, HttpTable, WeightedBackend},
        scope::{
            Audience, EgressHost, EgressListener, EgressProxy, InNamespace, InboundPools, OutboundPolicy,
            Scoped, SidecarScope,
        },
    },
    snapshot::{Endpoint, Name, Parts, Protocol, Resolution, Service, ServicePort, Snapshot, Workload},
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::super::{
    Kind,
    assembler::{Assembler, decode},
    encoder::{Edits, Encoder},
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const NAMES: [&str; 2] = ["web", "api"];
/// Of ServiceEntries: one is also a service of Kubernetes, one covers some of those.
const HOSTS: [&str; 5] =
    ["x.example", "*.example", "web.a.svc.cluster.local", "*.b.svc.cluster.local", "*.c"];
const VIPS: [&str; 4] = ["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1"];
const NETS: [&str; 2] = ["198.51.100.0/24", "198.51.0.0/16"];
const PORTS: [u16; 3] = [80, 81, 53];

fn names(list: &'static [&'static str]) -> impl Strategy<Value = Arc<str>> {
    select(list).prop_map(Into::into)
}

fn addr(list: &'static [&'static str]) -> impl Strategy<Value = IpAddr> {
    select(list).prop_map(|text| text.parse().unwrap())
}

/// Each pod has its place of birth in its name, so that it has one address wherever it is.
fn pod() -> impl Strategy<Value = Arc<Workload>> {
    let place = (names(&NAMESPACES), 1..4_u8, names(&NODES));
    (place, option::weighted(0.5, names(&NAMES)), prop::bool::weighted(0.1), any::<bool>()).prop_map(
        |((namespace, number, node), sidecar, terminated, meshed)| {
            let third = namespace.as_bytes()[0];
            Arc::new(Workload {
                node,
                addrs: vec![IpAddr::from([10, 0, third, number])],
                sidecar: sidecar.map(|name| Name::new(Arc::clone(&namespace), name)),
                terminated,
                meshed,
                ready: true,
                ..Workload::named(Name::new(namespace, format!("p{number}")))
            })
        },
    )
}

fn audience() -> impl Strategy<Value = Audience> {
    let only = vec(names(&NAMESPACES), 0..3).prop_map(|names| Audience::Only(names.into_iter().collect()));
    prop_oneof![1 => Just(Audience::Everyone), 2 => only]
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let of_pod = (select(&NAMESPACES[..]), 1..4_u8).prop_map(|(namespace, number)| {
        let pod = Workload::named(Name::new(namespace, format!("p{number}")));
        (IpAddr::from([10, 0, namespace.as_bytes()[0], number]), Some(pod.id))
    });
    let elsewhere = addr(&["192.0.2.1", "192.0.2.2"]).prop_map(|addr| (addr, None));
    (prop_oneof![of_pod, elsewhere], any::<bool>(), any::<bool>()).prop_map(|((addr, id), named, ready)| {
        let workload = id.filter(|_| named);
        Endpoint { addr, port: 8080, workload, ready, hostname: None, traits: None }
    })
}

fn service() -> impl Strategy<Value = Service> {
    let protocol = prop_oneof![9 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)];
    let number = prop_oneof![9 => select(&PORTS[..2]), 1 => Just(53)];
    let app = option::of(select(vec!["http", "tls", "tcp"]));
    let ports = prop::collection::btree_map((number, protocol), (vec(endpoint(), 0..3), app), 0..3);
    let declared =
        (names(&HOSTS), vec(select(&NETS[..]), 0..2), select(vec![Resolution::Listed, Resolution::ByName]));
    (
        (names(&NAMESPACES), names(&NAMES)),
        vec(addr(&VIPS), 0..2),
        ports,
        audience(),
        option::weighted(0.4, declared),
        option::weighted(0.2, Just("api.b.svc.cluster.local".into())),
    )
        .prop_map(|((namespace, name), vips, ports, audience, declared, external_name)| {
            let ports = ports.into_iter().map(|((port, protocol), (mut endpoints, app))| {
                endpoints.sort_unstable();
                endpoints.dedup_by(|a, b| (a.addr, a.port) == (b.addr, b.port));
                let app_protocol = app.map(Into::into);
                ServicePort { name: "".into(), port, protocol, app_protocol, endpoints }
            });
            let ports = ports.collect();
            match declared {
                Some((host, networks, resolution)) => Service {
                    vips,
                    ports,
                    audience,
                    networks: networks.into_iter().map(|net| net.parse().unwrap()).collect(),
                    resolution,
                    hostname: Some(Arc::clone(&host)),
                    ..Service::named(Name::new(namespace, host))
                },
                None => Service {
                    vips,
                    ports,
                    audience,
                    external_name,
                    ..Service::named(Name::new(namespace, name))
                },
            }
        })
}

fn table() -> impl Strategy<Value = Arc<HttpTable>> {
    let kind = select(vec!["VirtualService", "HTTPRoute"]);
    let rule = (kind, names(&NAMESPACES), select(&NAMESPACES[..]), select(&NAMES[..])).prop_map(
        |(kind, owner, namespace, name)| {
            let service = Name::new(namespace, name);
            let backend = WeightedBackend {
                weight: 1,
                backend: Backend::Cluster(ClusterKey { service, port: 80, subset: None }),
                request_headers: HeaderOps::default(),
                response_headers: HeaderOps::default(),
            };
            let name = Name::new(owner, "rule");
            let origin = Origin { kind: kind.into(), name, field: "spec".into(), place: None };
            HttpRule::new(origin, Action::Forward(vec![backend]))
        },
    );
    vec(rule, 1..3).prop_map(|rules| Arc::new(HttpTable::new(rules, Action::Passthrough)))
}

fn routes() -> impl Strategy<Value = Routes> {
    let hosts = [&HOSTS[..], &["api.b.svc.cluster.local", "*.local", "web", "*.svc", "*.b"]].concat();
    let at = (select(hosts), select(&PORTS[..2]));
    let own = (names(&NAMESPACES), option::of(table()));
    let tables = (option::weighted(0.3, table()), vec(own, 0..2)).prop_map(|(default, own)| {
        let own =
            own.into_iter().map(|(namespace, all)| (namespace, InNamespace { selected: Vec::new(), all }));
        Scoped { default, by_namespace: own.collect() }
    });
    let http = (at, tables).prop_map(|((host, port), tables)| (HostPort { host: host.into(), port }, tables));
    let hosts = vec!["*", "*.example", "x.example", "web.a.svc.cluster.local", "*.b.svc.cluster.local"];
    let egress = (any::<bool>(), option::of(names(&NAMESPACES)), select(hosts)).prop_map(
        |(excluded, namespace, host)| EgressHost {
            excluded: excluded && host != "*",
            namespace,
            host: host.into(),
        },
    );
    let listener = (option::of(select(&PORTS[..2])), vec(egress, 0..3))
        .prop_map(|(port, hosts)| EgressListener { port, hosts });
    let outbound = option::of(select(vec![OutboundPolicy::AllowAny, OutboundPolicy::RegistryOnly]));
    let proxy = (names(&NAMESPACES), names(&NAMES)).prop_map(|(namespace, name)| {
        let service = Name::new(namespace, name);
        let origin = Origin { kind: "Sidecar".into(), name: service.clone(), field: "".into(), place: None };
        let backend = Backend::Cluster(ClusterKey { service, port: 80, subset: None });
        EgressProxy { origin: Arc::new(origin), backend }
    });
    let scope = (vec(listener, 0..3), outbound, option::weighted(0.4, proxy)).prop_map(
        |(egress, outbound, egress_proxy)| {
            Arc::new(SidecarScope { egress, outbound, egress_proxy, inbound: InboundPools::default() })
        },
    );
    let sidecar = ((names(&NAMESPACES), names(&NAMES)), scope)
        .prop_map(|((namespace, name), scope)| (Name::new(namespace, name), scope));
    let limit =
        ((names(&NAMESPACES), names(&NAMES)), option::of(1..9_u32)).prop_map(|((namespace, name), max)| {
            let key = ClusterKey { service: Name::new(namespace, name), port: 80, subset: None };
            let pool = ConnectionPool { max_requests: max, ..ConnectionPool::default() };
            let policy = TrafficPolicy { pool, ..TrafficPolicy::default() };
            (key, Scoped::everywhere(Arc::new(Cluster { origin: None, labels: BTreeMap::new(), policy })))
        });
    (vec(http, 0..3), vec(sidecar, 0..4), vec(limit, 0..2)).prop_map(|(http, sidecars, clusters)| Routes {
        http: http.into_iter().collect(),
        streams: BTreeMap::new(),
        clusters: clusters.into_iter().collect(),
        sidecars: sidecars.into_iter().collect(),
    })
}

fn parts() -> impl Strategy<Value = Parts> {
    (vec(pod(), 0..6), vec(service(), 0..6), routes(), any::<bool>()).prop_map(
        |(pods, services, routes, back)| {
            let workloads: BTreeMap<Name, _> = pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect();
            let services: BTreeMap<Name, _> =
                services.into_iter().map(|s| (s.name.clone(), Arc::new(s))).collect();
            // A host that Kubernetes knows is nobody else's in its namespace (S53): resources are called by both.
            let is_known = |service: &Service| {
                let of_kubernetes = services.values().filter(|other| other.hostname.is_none());
                let mut own = of_kubernetes.filter(|other| other.name.namespace == service.name.namespace);
                own.any(|other| service.hostname.as_deref() == Some(&*other.host("cluster.local")))
            };
            let mut services: Vec<_> = services.values().filter(|s| !is_known(s)).cloned().collect();
            if back {
                services.reverse();
            }
            Parts {
                workloads: workloads.into_values().collect(),
                services,
                routes: Arc::new(routes),
                ..Parts::default()
            }
        },
    )
}

/// Worlds of which some parts are those of the one before.
fn sequence() -> impl Strategy<Value = Vec<Parts>> {
    vec((parts(), 0..8_u8), 1..4).prop_map(|list| {
        let mut worlds: Vec<Parts> = Vec::new();
        for (mut parts, keep) in list {
            if let Some(before) = worlds.last() {
                if keep & 1 != 0 {
                    parts.workloads.clone_from(&before.workloads);
                }
                if keep & 2 != 0 {
                    parts.services.clone_from(&before.services);
                }
                if keep & 4 != 0 {
                    parts.routes = Arc::clone(&before.routes);
                }
            }
            worlds.push(parts);
        }
        worlds
    })
}

/// What a client of a node has: as in a session, without the wire between.
#[derive(Default)]
struct Client {
    assembler: Assembler,
    has: BTreeSet<(Kind, String)>,
}

impl Client {
    fn take(&mut self, node: Option<&str>, edits: &Edits) {
        for ((kind, name), edit) in edits {
            let told = edit.as_ref().filter(|edit| node.is_none() || edit.reach.includes(node));
            match told {
                Some(encoded) => {
                    self.has.insert((*kind, name.clone()));
                    self.assembler.set(name, decode(*kind, name, &encoded.body).unwrap());
                }
                None => {
                    self.has.remove(&(*kind, name.clone()));
                    self.assembler.remove(*kind, name);
                }
            }
        }
    }

    fn world(&mut self) -> Snapshot {
        Snapshot::new(1, self.assembler.parts())
    }
}

/// How the proxy finds a table, in short.
fn routed(snapshot: &Snapshot, client: &Workload, dialled: SocketAddr, authority: &str) -> String {
    let sight = snapshot.sight_of(client);
    let port = dialled.port();
    let named = resolve(&sight, authority, port);
    let of_host = |host: &str, service: Option<&Arc<Service>>| {
        let table = snapshot.routes().http(host, port)?.get(&client.name.namespace, &client.labels)?;
        sight.sees_rules(table, host, service, port).then(|| format!("{host} {table:?}"))
    };
    let serves =
        |service: &&Arc<Service>| service.ports.iter().any(|p| p.port == port) && sight.sees(service, port);
    if let Some(found) = of_host(&named.host, named.service) {
        return found;
    }
    if let Some(service) = named.service.filter(serves) {
        return service.name.to_string();
    }
    match sight.service_at(dialled, Protocol::Tcp) {
        Some((service, _)) => {
            of_host(&snapshot.host_of(service), Some(service)).unwrap_or_else(|| service.name.to_string())
        }
        None => format!("refused: {}", sight.refuses(dialled)),
    }
}

/// Everything that a pod may be told, as text by question.
fn answers(snapshot: &Snapshot, pod: &Workload) -> Vec<(String, String)> {
    let sight = snapshot.sight_of(pod);
    let mut all: Vec<(String, String)> = Vec::new();
    let mut say = |question: String, answer: &dyn Debug| all.push((question, format!("{answer:?}")));
    let addrs = VIPS.iter().chain(&["198.51.100.7", "198.51.7.7", "203.0.113.1", "10.0.97.1"]);
    let mut hosts: Vec<String> = ["x.example", "y.example", "z.c"].map(str::to_owned).into();
    for (namespace, name) in NAMESPACES.iter().flat_map(|ns| NAMES.map(|name| (ns, name))) {
        let full = format!("{name}.{namespace}.svc.cluster.local");
        hosts.extend([format!("{name}.{namespace}"), format!("{name}.{namespace}.svc"), full]);
    }
    hosts.extend(NAMES.map(str::to_owned));
    hosts.extend(VIPS.map(|vip| if vip.contains(':') { format!("[{vip}]") } else { vip.to_owned() }));
    for (addr, port) in addrs.flat_map(|addr| PORTS.map(|port| (addr.parse::<IpAddr>().unwrap(), port))) {
        let at = SocketAddr::new(addr, port);
        say(format!("{at}"), &sight.service_at(at, Protocol::Tcp));
        say(format!("{at} refused"), &sight.refuses(at));
        say(format!("{at} through"), &sight.egress_proxy_to(at));
        // Datagrams and the agent's own questions know no visibility.
        say(format!("{at} udp"), &snapshot.service_at(addr, port, Protocol::Udp));
        if port == 53 {
            say(format!("{at} resolver"), &snapshot.service_at(addr, port, Protocol::Tcp));
        }
        for host in &hosts {
            say(format!("{at} for {host}"), &routed(snapshot, pod, at, host));
        }
    }
    for host in &hosts {
        let seen = sight.service_covering(host).filter(|service| sight.sees_name(service));
        say(format!("{host} means"), &seen);
        say(format!("{host} in DNS"), &dns::answer(snapshot, &sight, host, QType::A));
        for port in PORTS {
            say(format!("{host}:{port} by SNI"), &sight.service_of_server(host, port));
        }
    }
    say("unlisted ports".to_owned(), &sight.unlisted_ports().collect::<BTreeSet<_>>());
    for (namespace, name) in NAMESPACES.iter().flat_map(|ns| NAMES.map(|name| (ns, name))) {
        let service = snapshot.service(&Name::new(*namespace, name));
        let exported = service.filter(|service| service.audience.includes(&pod.name.namespace));
        // Rules lead past a Sidecar.
        let key = ClusterKey { service: Name::new(*namespace, name), port: 80, subset: None };
        let text = format!("{:?}", snapshot.routes().http);
        let is_led_to = text.contains(&format!("{key:?}"));
        if is_led_to {
            say(format!("rules to {namespace}/{name}"), &exported);
        }
    }
    if let Some(Backend::Cluster(key)) = sight.egress_proxy().map(|proxy| &proxy.backend) {
        let service = snapshot.service(&key.service);
        let exported = service.filter(|service| service.audience.includes(&pod.name.namespace));
        say("egress proxy".to_owned(), &exported);
    }
    say("spoken".to_owned(), &snapshot.spoken_at(pod, 8080));
    say("limits".to_owned(), &snapshot.inbound_pool(pod, 8080));
    all
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn a_node_answers_its_pods_as_one_that_is_told_everything(worlds in sequence()) {
        let mut encoder = Encoder::new();
        let mut whole = Client::default();
        let mut clients = NODES.map(|node| (node, Client::default()));
        for parts in worlds {
            let sent = Arc::new(Snapshot::new(1, parts));
            let edits = encoder.update(&sent);
            whole.take(None, &edits);
            let whole = whole.world();
            for (node, client) in &mut clients {
                client.take(Some(node), &edits);
                let here = client.world();
                for pod in sent.workloads().filter(|pod| *pod.node == **node && !pod.terminated) {
                    let (wanted, found) = (answers(&whole, pod), answers(&here, pod));
                    for (wanted, found) in wanted.iter().zip(&found) {
                        prop_assert_eq!(wanted, found, "{} on {}", pod.name, node);
                    }
                }
            }
            // And it is the same for one who comes now.
            for (key, edit) in Encoder::new().update(&sent) {
                let Some(encoded) = edit else { continue };
                for (node, client) in &clients {
                    let is_told = encoded.reach.includes(Some(node));
                    prop_assert_eq!(client.has.contains(&key), is_told, "{:?} on {}", key, node);
                }
            }
        }
    }
}

fn addressed(name: &str, vip: &str, audience: Audience) -> Service {
    let port = ServicePort {
        name: "".into(),
        port: 80,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: Vec::new(),
    };
    Service {
        vips: vec![vip.parse().unwrap()],
        ports: vec![port],
        audience,
        ..Service::named(Name::new("a", name))
    }
}

#[test]
fn endpoints_that_are_no_pods_go_where_their_services_go() {
    let endpoint = |text: &str| Endpoint {
        addr: text.parse().unwrap(),
        port: 80,
        workload: None,
        ready: true,
        hostname: None,
        traits: None,
    };
    let only = Audience::Only(["a".into()].into());
    let mut own = addressed("own", "10.96.0.1", only);
    own.ports[0].endpoints = vec![endpoint("192.0.2.1"), endpoint("192.0.2.2")];
    let mut all = addressed("all", "10.96.0.2", Audience::Everyone);
    all.ports[0].endpoints = vec![endpoint("192.0.2.2")];
    let pod = Workload { node: "n1".into(), ..Workload::named(Name::new("a", "p")) };
    let parts = Parts {
        workloads: vec![Arc::new(pod)],
        services: vec![Arc::new(own), Arc::new(all)],
        ..Parts::default()
    };
    let edits = Encoder::new().update(&Arc::new(Snapshot::new(1, parts)));
    let reach = |name: &str| edits[&(Kind::Address, name.to_owned())].as_ref().unwrap().reach.clone();
    assert_eq!(reach("a/own.a.svc.cluster.local"), Reach::node("n1".into()));
    assert_eq!(reach("Kubernetes//Endpoint/192.0.2.1"), Reach::node("n1".into()));
    assert_eq!(reach("Kubernetes//Endpoint/192.0.2.2"), Reach::Everyone, "another claims it too");
    assert_eq!(reach("a/all.a.svc.cluster.local"), Reach::Everyone);
    assert_eq!(reach("Kubernetes//Pod/a/p"), Reach::Everyone, "any pod can be dialled");
}
