//! Connections that rules for TLS and TCP, or a policy alone, are about.

mod first_bytes;
mod limits;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    route::{
        HostPort, Origin, Routes,
        cluster::{Algorithm, Cluster, ClusterKey, HashKey, HashTable, TrafficPolicy},
        http::{Backend, HeaderOps, WeightedBackend},
        scope::{
            EgressHost, EgressListener, EgressProxy, InboundPools, OutboundPolicy, Scoped, SidecarScope,
        },
        stream::{StreamMatch, StreamRule, StreamTable},
    },
    snapshot::{Name, Parts, Resolution, Service, Snapshot, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::fixture::{World, endpoint, in_world, service, soon, workload};
use crate::close::{CloseReason, Direction};

const VIP: &str = "10.96.0.1";

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    let shape = |settings: &mut crate::Settings| {
        settings.http.sniff_timeout = Duration::from_millis(300);
        settings.hello_timeout = Duration::from_millis(600);
    };
    in_world(false, shape, body);
}

/// A server that says its name and then what it reads, until the client's end.
struct Server {
    addr: SocketAddr,
}

impl Server {
    async fn named(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    socket.write_all(name.as_bytes()).await.ok();
                    let (mut read, mut write) = socket.split();
                    tokio::io::copy(&mut read, &mut write).await.ok();
                });
            }
        });
        Self { addr }
    }
}

/// A service `name` at port 80 of a virtual address, its port named so.
fn plain(name: &str, vip: &str, port_name: &str, at: &[SocketAddr]) -> Service {
    let endpoints = at.iter().map(|addr| endpoint(*addr, None)).collect();
    let mut service = service(name, vip.parse().unwrap(), endpoints);
    service.ports[0].name = port_name.into();
    service
}

fn key(name: &str) -> ClusterKey {
    ClusterKey { service: Name::new("default", name), port: 80, subset: None }
}

fn to(name: &str, weight: u32) -> WeightedBackend {
    WeightedBackend {
        weight,
        backend: Backend::Cluster(key(name)),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
    }
}

fn rule(matches: Vec<StreamMatch>, backends: Vec<WeightedBackend>) -> StreamRule {
    let origin = Origin { kind: "Test".into(), name: Name::new("a", "b"), field: "".into(), place: None };
    StreamRule { origin: Arc::new(origin), matches, backends }
}

fn sni(names: &[&str]) -> StreamMatch {
    StreamMatch { sni: names.iter().map(|name| (*name).into()).collect(), ..StreamMatch::default() }
}

/// What clients of `web` are routed by.
fn table(tls: Vec<StreamRule>, tcp: Vec<StreamRule>) -> Routes {
    let at = HostPort { host: "web.default.svc.cluster.local".into(), port: 80 };
    let table = Scoped::everywhere(Arc::new(StreamTable { tls, tcp }));
    Routes { streams: BTreeMap::from([(at, table)]), ..Routes::default() }
}

/// What is said about `web` alone.
fn policy(shape: impl FnOnce(&mut TrafficPolicy)) -> Routes {
    let mut policy = TrafficPolicy::default();
    shape(&mut policy);
    let cluster = Cluster { origin: None, labels: BTreeMap::new(), policy };
    let clusters = BTreeMap::from([(key("web"), Scoped::everywhere(Arc::new(cluster)))]);
    Routes { clusters, ..Routes::default() }
}

/// Publishes services and routes; connections are meant for `web`.
fn publish(world: &World, services: Vec<Service>, routes: Routes) {
    let own = workload("client", "a", "127.0.0.1".parse().unwrap());
    let version = world.snapshots.borrow().version() + 1;
    let parts = Parts {
        workloads: vec![Arc::new(own)],
        services: services.into_iter().map(Arc::new).collect(),
        routes: Arc::new(routes),
        ..Parts::default()
    };
    world.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
    world.dial(SocketAddr::new(VIP.parse().unwrap(), 80));
}

async fn connect(world: &World) -> TcpStream {
    TcpStream::connect(world.outbound).await.unwrap()
}

/// Which server took a connection, and that it got every byte.
async fn answered(client: &mut TcpStream, sent: &[u8]) -> char {
    let mut heard = vec![0; 1 + sent.len()];
    soon(client.read_exact(&mut heard)).await.unwrap();
    assert!(&heard[1..] == sent, "the server got what was sent");
    char::from(heard[0])
}

/// The servers that so many connections reached.
async fn spread(world: &World, connections: usize) -> HashMap<char, usize> {
    let mut seen = HashMap::new();
    for _ in 0..connections {
        let mut client = connect(world).await;
        client.write_all(b"x").await.unwrap();
        *seen.entry(answered(&mut client, b"x").await).or_default() += 1;
    }
    seen
}

#[test]
fn connections_are_split_by_weight() {
    test(|world| async move {
        let (a, b) = (Server::named("A").await, Server::named("B").await);
        let services = || {
            vec![
                plain("web", VIP, "tcp", &[]),
                plain("a", "10.96.0.2", "tcp", &[a.addr]),
                plain("b", "10.96.0.3", "tcp", &[b.addr]),
            ]
        };
        let split = |a, b| table(Vec::new(), vec![rule(Vec::new(), vec![to("a", a), to("b", b)])]);
        publish(&world, services(), split(90, 10));
        let seen = spread(&world, 200).await;
        assert!(seen[&'A'] > 150 && seen.get(&'B').is_some_and(|count| *count > 2), "{seen:?}");
        publish(&world, services(), split(0, 1));
        assert_eq!(spread(&world, 5).await, HashMap::from([('B', 5)]));
    });
}

#[test]
fn rules_go_by_the_address_that_was_dialled_and_by_the_clients_labels() {
    test(|world| async move {
        let (a, b) = (Server::named("A").await, Server::named("B").await);
        let services =
            || vec![plain("web", VIP, "tcp", &[a.addr]), plain("b", "10.96.0.3", "tcp", &[b.addr])];
        let subnet =
            |net: &str| StreamMatch { subnets: vec![net.parse().unwrap()], ..StreamMatch::default() };
        let routed = |one| table(Vec::new(), vec![rule(vec![one], vec![to("b", 1)])]);
        publish(&world, services(), routed(subnet("10.96.0.0/24")));
        assert_eq!(spread(&world, 3).await, HashMap::from([('B', 3)]));
        // What no rule is about goes to the service as it is.
        publish(&world, services(), routed(subnet("10.97.0.0/24")));
        assert_eq!(spread(&world, 3).await, HashMap::from([('A', 3)]));
        let labelled = StreamMatch {
            source_labels: BTreeMap::from([("app".into(), "other".into())]),
            ..StreamMatch::default()
        };
        publish(&world, services(), routed(labelled));
        assert_eq!(spread(&world, 3).await, HashMap::from([('A', 3)]));
    });
}

#[test]
fn a_rule_that_leads_nowhere_resets_and_is_counted() {
    test(|world| async move {
        let a = Server::named("A").await;
        let services = || vec![plain("web", VIP, "tcp", &[a.addr])];
        let broken = WeightedBackend {
            backend: Backend::Broken { status: 503, reason: "gone".into() },
            ..to("web", 1)
        };
        let subset = WeightedBackend {
            backend: Backend::Cluster(ClusterKey { subset: Some("v9".into()), ..key("web") }),
            ..to("web", 1)
        };
        for (count, backend) in [broken, to("missing", 1), subset].into_iter().enumerate() {
            publish(&world, services(), table(Vec::new(), vec![rule(Vec::new(), vec![backend])]));
            let mut client = connect(&world).await;
            assert!(soon(client.read(&mut [0])).await.is_err());
            world.ended(CloseReason::NoCluster, count as u64 + 1).await;
        }
        assert_eq!(CloseReason::NoCluster.response_flags(), "NC");
    });
}

#[test]
fn s68_what_nothing_describes_is_relayed_to_the_egress_proxy_or_to_nobody() {
    test(|world| async move {
        let (proxy, outside) = (Server::named("P").await, Server::named("O").await);
        let services = || {
            vec![plain("web", VIP, "tcp", &[outside.addr]), plain("out", "10.96.0.2", "tcp", &[proxy.addr])]
        };
        // Not at the servers' address: who is behind it is not sent to it.
        let own = || workload("client", "a", "127.0.0.7".parse().unwrap());
        let publish = |backend: Option<Backend>| {
            let name = Name::new("default", "own");
            let origin = Origin { kind: "Sidecar".into(), name: name.clone(), field: "".into(), place: None };
            let all = EgressHost { excluded: false, namespace: None, host: "*".into() };
            let scope = SidecarScope {
                egress: vec![EgressListener { port: None, hosts: vec![all] }],
                outbound: Some(OutboundPolicy::AllowAny),
                egress_proxy: backend.map(|backend| EgressProxy { origin: Arc::new(origin), backend }),
                inbound: InboundPools::default(),
            };
            let client = Workload { sidecar: Some(name.clone()), ..own() };
            let parts = Parts {
                workloads: vec![Arc::new(client)],
                services: services().into_iter().map(Arc::new).collect(),
                routes: Arc::new(Routes { sidecars: [(name, Arc::new(scope))].into(), ..Routes::default() }),
                ..Parts::default()
            };
            let version = world.snapshots.borrow().version() + 1;
            world.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
        };
        let unknown = SocketAddr::new("127.0.0.9".parse().unwrap(), outside.addr.port());
        let web = SocketAddr::new(VIP.parse().unwrap(), 80);
        publish(Some(Backend::Cluster(key("out"))));
        for (dialled, server) in [(unknown, 'P'), (web, 'O')] {
            world.dial(dialled);
            let mut client = connect(&world).await;
            client.write_all(b"\x00 no HTTP").await.unwrap();
            assert_eq!(answered(&mut client, b"\x00 no HTTP").await, server, "{dialled}");
        }
        let broken = Backend::Broken { status: 503, reason: "gone".into() };
        world.dial(unknown);
        for (count, backend) in [broken, Backend::Cluster(key("gone"))].into_iter().enumerate() {
            publish(Some(backend));
            let mut client = connect(&world).await;
            client.write_all(b"\x00 no HTTP").await.unwrap();
            assert!(soon(client.read(&mut [0])).await.is_err());
            world.ended_so_far(CloseReason::NoCluster, count as u64 + 1).await;
        }
    });
}

#[test]
fn a_policy_alone_chooses_the_endpoint() {
    test(|world| async move {
        let (a, b) = (Server::named("A").await, Server::named("B").await);
        let services = || vec![plain("web", VIP, "tcp", &[a.addr, b.addr])];
        publish(&world, services(), policy(|policy| policy.balancing.algorithm = Algorithm::RoundRobin));
        assert_eq!(spread(&world, 6).await, HashMap::from([('A', 3), ('B', 3)]));
        let hashed = Algorithm::ConsistentHash { key: HashKey::SourceIp, table: HashTable::Ring(1024) };
        publish(&world, services(), policy(|policy| policy.balancing.algorithm = hashed));
        assert_eq!(spread(&world, 12).await.len(), 1, "one source goes to one endpoint");
    });
}

#[test]
fn a_connection_that_is_held_counts_at_its_endpoint() {
    test(|world| async move {
        let (a, b) = (Server::named("A").await, Server::named("B").await);
        let services = vec![plain("web", VIP, "tcp", &[a.addr, b.addr])];
        publish(&world, services, policy(|_| {}));
        let mut held = Vec::new();
        let mut seen: HashMap<char, i32> = HashMap::new();
        for _ in 0..100 {
            let mut client = connect(&world).await;
            *seen.entry(answered(&mut client, b"").await).or_default() += 1;
            held.push(client);
        }
        // The better of two by what is outstanding: nearly even.
        assert!((seen[&'A'] - seen[&'B']).abs() <= 14, "{seen:?}");
        assert_eq!(world.closed(Direction::Outbound, CloseReason::Finished), 0);
    });
}
