//! Tests of reach. That nodes get all they need is a property test of `mesh-wire`.

use super::*;
use crate::{
    route::{
        HostPort, Origin, Routes,
        cluster::ClusterKey,
        http::{Action, Backend, HeaderOps, HttpRule, HttpTable, WeightedBackend},
        scope::{EgressHost, EgressListener, InboundPools, Scoped, SidecarScope},
    },
    snapshot::{Endpoint, Parts, ServicePort},
};

/// A world and the reach of its services.
#[derive(Default)]
struct Mesh {
    now: Snapshot,
    reaches: Reaches,
}

impl Mesh {
    /// Goes on to these parts. Returns the services whose reach changed.
    fn go(&mut self, parts: Parts) -> Vec<String> {
        let new = Snapshot::new(1, parts);
        let ids: BTreeSet<_> = self.now.workloads().chain(new.workloads()).map(|pod| pod.id).collect();
        let pods = ids.into_iter().map(|id| (self.now.workload(id), new.workload(id)));
        let pods: Vec<_> =
            pods.filter(|(a, b)| a != b).map(|(a, b)| (a.map(|p| &**p), b.map(|p| &**p))).collect();
        let names: BTreeSet<_> = self.now.services().chain(new.services()).map(|s| s.name.clone()).collect();
        let services = names.into_iter().filter(|name| self.now.service(name) != new.service(name)).collect();
        let contested = BTreeSet::new();
        let touched = Touched { pods: &pods, services: &services, contested: &contested };
        let changed = self.reaches.update(&self.now, &new, &touched);
        self.now = new;
        changed.iter().map(ToString::to_string).collect()
    }

    fn nodes(&self, namespace: &str, name: &str) -> Option<Vec<String>> {
        let reach = self.reaches.of(&Name::new(namespace, name));
        Some(reach.names()?.iter().map(ToString::to_string).collect())
    }
}

fn pod(namespace: &str, name: &str, node: &str, sidecar: Option<&str>) -> Arc<Workload> {
    let sidecar = sidecar.map(|name| Name::new(namespace, name));
    Arc::new(Workload { node: node.into(), sidecar, ..Workload::named(Name::new(namespace, name)) })
}

fn service(namespace: &str, name: &str, exported: Option<&[&str]>) -> Service {
    let port = ServicePort {
        name: "".into(),
        port: 80,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: Vec::new(),
    };
    let only = |names: &[&str]| Audience::Only(names.iter().map(|name| Arc::from(*name)).collect());
    Service {
        ports: vec![port],
        audience: exported.map_or(Audience::Everyone, only),
        ..Service::named(Name::new(namespace, name))
    }
}

fn parts(pods: &[Arc<Workload>], services: &[Service]) -> Parts {
    let services = services.iter().map(|service| Arc::new(service.clone())).collect();
    Parts { workloads: pods.to_vec(), services, ..Parts::default() }
}

fn sidecar(namespace: &str, name: &str, host: &str) -> Routes {
    let host = EgressHost { excluded: false, namespace: None, host: host.into() };
    let egress = vec![EgressListener { port: None, hosts: vec![host] }];
    let scope = Arc::new(SidecarScope {
        egress,
        outbound: None,
        egress_proxy: None,
        inbound: InboundPools::default(),
    });
    Routes { sidecars: [(Name::new(namespace, name), scope)].into(), ..Routes::default() }
}

fn table(host: &str, to: &str) -> (HostPort, HttpTable) {
    let backend = WeightedBackend {
        weight: 1,
        backend: Backend::Cluster(ClusterKey { service: Name::new("b", to), port: 80, subset: None }),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
    };
    let origin = Origin {
        kind: "VirtualService".into(),
        name: Name::new("b", "rule"),
        field: "spec".into(),
        place: None,
    };
    let rule = HttpRule::new(origin, Action::Forward(vec![backend]));
    let at = HostPort { host: host.into(), port: 80 };
    (at, HttpTable::new(vec![rule], Action::Passthrough))
}

#[test]
fn while_nothing_is_hidden_nothing_is_looked_at() {
    let mut mesh = Mesh::default();
    let changed = mesh.go(parts(&[pod("a", "p", "n1", None)], &[service("a", "web", None)]));
    assert!(changed.is_empty() && mesh.nodes("a", "web").is_none());
    assert_eq!(mesh.reaches.looks(), 0);
}

#[test]
fn b6_a_service_goes_to_the_nodes_of_those_it_is_exported_to() {
    let mut mesh = Mesh::default();
    let services =
        [service("a", "own", Some(&["a"])), service("a", "none", Some(&[])), service("b", "all", None)];
    let pods = [pod("a", "p", "n1", None), pod("b", "q", "n2", None), pod("a", "r", "", None)];
    assert_eq!(mesh.go(parts(&pods, &services)), ["a/none", "a/own"]);
    assert_eq!(mesh.nodes("a", "own").unwrap(), ["n1"]);
    assert!(mesh.nodes("a", "none").unwrap().is_empty());
    assert_eq!(mesh.nodes("b", "all"), None);
    // Another pod of the namespace on the same node is no news; on another node it is.
    let more = [&pods[..], &[pod("a", "s", "n1", None)]].concat();
    assert!(mesh.go(parts(&more, &services)).is_empty());
    let more = [&pods[..], &[pod("a", "s", "n3", None)]].concat();
    assert_eq!(mesh.go(parts(&more, &services)), ["a/own"]);
    assert_eq!(mesh.nodes("a", "own").unwrap(), ["n1", "n3"]);
    // The last one goes, or terminates.
    let over = Arc::new(Workload { terminated: true, ..(*more[3]).clone() });
    assert_eq!(mesh.go(parts(&[&pods[1..], &[over]].concat(), &services)), ["a/own"]);
    assert!(mesh.nodes("a", "own").unwrap().is_empty());
    // And nothing is hidden any more.
    assert_eq!(mesh.go(parts(&pods, &[service("a", "own", None)])), ["a/own"]);
    assert_eq!(mesh.nodes("a", "own"), None);
}

#[test]
fn a_service_goes_to_the_nodes_of_the_pods_behind_it() {
    let mut mesh = Mesh::default();
    let server = pod("a", "server", "n7", None);
    let mut own = service("a", "own", Some(&["z"]));
    let endpoint = Endpoint {
        addr: "10.0.0.1".parse().unwrap(),
        port: 80,
        workload: Some(server.id),
        ready: true,
        hostname: None,
        traits: None,
    };
    own.ports[0].endpoints.push(endpoint);
    mesh.go(parts(&[server, pod("z", "client", "n1", None)], &[own]));
    assert_eq!(mesh.nodes("a", "own").unwrap(), ["n1", "n7"]);
}

#[test]
fn b7_what_every_pod_of_a_node_leaves_out_by_sidecar_does_not_go_there() {
    let mut mesh = Mesh::default();
    let services = [service("b", "seen", None), service("b", "unseen", None)];
    let pods = [pod("a", "p", "n1", Some("s")), pod("a", "q", "n2", None)];
    let routes = Arc::new(sidecar("a", "s", "seen.b.svc.cluster.local"));
    let world = |routes: &Arc<Routes>| Parts { routes: Arc::clone(routes), ..parts(&pods, &services) };
    assert_eq!(mesh.go(world(&routes)), ["b/unseen"]);
    assert_eq!((mesh.nodes("b", "seen"), mesh.nodes("b", "unseen")), (None, Some(vec!["n2".to_owned()])));
    // S66: rules bring their destinations with them.
    let (at, rules) = table("other.example", "unseen");
    let http = [(at, Scoped::everywhere(Arc::new(rules)))].into();
    assert_eq!(mesh.go(world(&Arc::new(Routes { http, ..(*routes).clone() }))), ["b/unseen"]);
    assert_eq!(mesh.nodes("b", "unseen"), None);
    assert_eq!(mesh.go(world(&routes)), ["b/unseen"]);
}

#[test]
fn who_is_given_rules_for_a_hidden_services_name_knows_it_as_hidden() {
    let mut mesh = Mesh::default();
    let services = [service("b", "own", Some(&["b"]))];
    let pods = [pod("a", "p", "n1", None), pod("b", "q", "n2", None), pod("c", "r", "n3", None)];
    let nodes_with = |mesh: &mut Mesh, tables: Scoped<HttpTable>, host: &str| {
        let routes = Routes { http: [(table(host, "own").0, tables)].into(), ..Routes::default() };
        mesh.go(Parts { routes: Arc::new(routes), ..parts(&pods, &services) });
        mesh.nodes("b", "own")
    };
    let rules = || Arc::new(table("", "own").1);
    let own = crate::route::scope::InNamespace { selected: Vec::new(), all: Some(rules()) };
    let to_a = || Scoped { default: None, by_namespace: [("a".into(), own.clone())].into() };
    assert_eq!(nodes_with(&mut mesh, to_a(), "own.b.svc.cluster.local").unwrap(), ["n1", "n2"]);
    assert_eq!(nodes_with(&mut mesh, to_a(), "*.local").unwrap(), ["n1", "n2"]);
    assert_eq!(nodes_with(&mut mesh, to_a(), "else.b.svc.cluster.local").unwrap(), ["n2"]);
    assert_eq!(nodes_with(&mut mesh, Scoped::everywhere(rules()), "own.b.svc.cluster.local"), None);
}

#[test]
fn what_is_asked_for_without_regard_to_sight_goes_to_everyone() {
    let only: Option<&[&str]> = Some(&["a"]);
    let vips = vec!["10.96.0.1".parse().unwrap()];
    let with = |port: u16, protocol, vips: &Vec<_>| {
        let mut service = service("a", "own", only);
        (service.ports[0].port, service.ports[0].protocol) = (port, protocol);
        Service { vips: vips.clone(), ..service }
    };
    let declared = |host: &str| Service { hostname: Some(host.into()), ..service("a", host, None) };
    let cases = [
        (vec![with(80, Protocol::Tcp, &vips)], false),
        (vec![with(80, Protocol::Udp, &vips)], true),
        (vec![with(80, Protocol::Udp, &Vec::new())], false),
        (vec![with(53, Protocol::Tcp, &vips)], true),
        (vec![Service { external_name: Some("x.example".into()), ..service("a", "own", only) }], true),
        (vec![service("a", "own", only), declared("*.svc.cluster.local")], true),
        (vec![service("a", "own", only), declared("own.a.svc.cluster.local")], true),
        (vec![service("a", "own", only), declared("*.example")], false),
    ];
    for (services, is_for_all) in cases {
        let mut mesh = Mesh::default();
        mesh.go(parts(&[], &services));
        assert_eq!(mesh.nodes("a", "own").is_none(), is_for_all, "{services:?}");
    }
}

#[test]
fn a_pod_that_becomes_ready_costs_a_look_at_its_own_services_alone() {
    let mut mesh = Mesh::default();
    let server = pod("a", "server", "n1", None);
    let hidden: Vec<Service> =
        (0..50).map(|index| service("a", &format!("s{index}"), Some(&["a", "b"]))).collect();
    let world = |ready: bool| {
        let mut services = hidden.clone();
        services[7].ports[0].endpoints.push(Endpoint {
            addr: "10.0.0.1".parse().unwrap(),
            port: 80,
            workload: Some(server.id),
            ready,
            hostname: None,
            traits: None,
        });
        let server = Arc::new(Workload { ready, ..(*server).clone() });
        let routes = Arc::new(sidecar("b", "s", "s1.a.svc.cluster.local"));
        Parts { routes, ..parts(&[server, pod("b", "client", "n2", Some("s"))], &services) }
    };
    mesh.go(world(false));
    assert_eq!(mesh.reaches.looks(), 50);
    assert!(mesh.go(world(true)).is_empty());
    assert_eq!(mesh.reaches.looks(), 51);
}
