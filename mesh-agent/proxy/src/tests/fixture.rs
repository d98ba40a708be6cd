//! A worker with one pod on loopback, run on the test's own thread, with a clock the test may own.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener, UdpSocket as StdUdp},
    os::fd::{BorrowedFd, OwnedFd},
    rc::Rc,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use mesh_core::{
    id::WorkloadId,
    identity::Identity,
    snapshot::{Endpoint, Name, Parts, Protocol, Service, ServicePort, Snapshot, Workload},
};
use mesh_identity::{Ca, Certificates, LocalIssuer, TrustDomains, ca::CaOptions, workloads::Options};
use prometheus_client::registry::Registry;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, LocalOptions},
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};

use crate::{
    close::{CloseReason, Direction},
    connections::Admission,
    kernel::{Dialled, Kernel, LocalPeer, PodHandle, Sockets, TcpFigures, UpstreamTags, VerdictEntry},
    listener::{self, Listener, Purpose},
    metrics::{DnsOutcome, Metrics},
    settings::Settings,
    worker::{self, Command, Link, Pod, Shared, Worker},
};

/// Dialling this port makes the fake kernel panic.
pub(super) const PANIC_PORT: u16 = 666;

/// The kernel as tables. Every accepted socket was meant for `dialled`.
#[derive(Debug, Default)]
pub(super) struct FakeKernel {
    pub(super) dialled: Mutex<Option<Dialled>>,
    pub(super) local: Mutex<HashMap<WorkloadId, LocalPeer>>,
    pub(super) verdicts: Mutex<Vec<VerdictEntry>>,
    pub(super) resolver: Mutex<Option<SocketAddr>>,
    pub(super) figures: Mutex<Option<TcpFigures>>,
}

impl Kernel for FakeKernel {
    fn dialled(&self, accepted: BorrowedFd<'_>) -> Option<Dialled> {
        assert!(SockRef::from(&accepted).peer_addr().is_ok());
        let dialled = *self.dialled.lock().unwrap();
        assert_ne!(dialled.map(|d| d.dst.port()), Some(PANIC_PORT), "a panic on purpose");
        dialled
    }

    fn local_peer(&self, workload: WorkloadId) -> Option<LocalPeer> {
        self.local.lock().unwrap().get(&workload).copied()
    }

    fn put_verdict(&self, _: &PodHandle, verdict: VerdictEntry) {
        self.verdicts.lock().unwrap().push(verdict);
    }

    fn resolver(&self, _: &PodHandle, _: u16, _: bool) -> Option<SocketAddr> {
        *self.resolver.lock().unwrap()
    }

    fn tcp_figures(&self, _: BorrowedFd<'_>) -> Option<TcpFigures> {
        *self.figures.lock().unwrap()
    }
}

/// Plain sockets, and what they were asked for.
#[derive(Debug, Default)]
pub(super) struct FakeSockets {
    pub(super) asked: Mutex<Vec<(SocketAddr, UpstreamTags)>>,
}

impl Sockets for FakeSockets {
    fn tcp(&self, _: &PodHandle, dst: SocketAddr, tags: &UpstreamTags) -> io::Result<OwnedFd> {
        self.asked.lock().unwrap().push((dst, tags.clone()));
        let socket = Socket::new(Domain::for_address(dst), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    fn udp(&self, _: &PodHandle, dst: SocketAddr) -> io::Result<OwnedFd> {
        let socket = Socket::new(Domain::for_address(dst), Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }
}

/// A running worker and its pod.
pub(super) struct World {
    pub(super) worker: Rc<Worker>,
    pub(super) kernel: Arc<FakeKernel>,
    pub(super) sockets: Arc<FakeSockets>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) registry: Registry,
    pub(super) pod: Arc<Pod>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) snapshots: watch::Sender<Arc<Snapshot>>,
    /// The outbound listener.
    pub(super) outbound: SocketAddr,
    /// The listener for tunnels.
    pub(super) hbone: SocketAddr,
    /// The DNS listeners, on every address.
    pub(super) dns_udp: u16,
    pub(super) dns_tcp: SocketAddr,
    _stop: watch::Sender<()>,
}

/// Runs a test against a world. With `paused`, time stands still until everybody waits for it.
pub(super) fn in_world<F>(paused: bool, shape: impl FnOnce(&mut Settings), test: impl FnOnce(World) -> F)
where
    F: Future<Output = ()>,
{
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(paused)
        .build_local(LocalOptions::default())
        .unwrap();
    let mut settings = settings("a");
    shape(&mut settings);
    runtime.block_on(async move { test(World::new(settings)).await });
}

/// Settings as tests need them.
pub(super) fn settings(node: &str) -> Settings {
    let mut settings = Settings::new(node);
    settings.connections_max = 1000;
    settings.pod_connections_max = 1000;
    settings
}

/// A CA that lives as long as the tests.
fn ca() -> Arc<Ca> {
    static CA: OnceLock<Arc<Ca>> = OnceLock::new();
    let open = || {
        let folder = std::env::temp_dir().join(format!("mesh-proxy-ca-{}", std::process::id()));
        let ca = Ca::open(CaOptions::new(&folder, "cluster.local")).unwrap();
        // Its files were needed for opening only.
        std::fs::remove_dir_all(&folder).unwrap();
        Arc::new(ca)
    };
    Arc::clone(CA.get_or_init(open))
}

/// Certificates of nobody.
pub(super) fn idle_certificates() -> Arc<Certificates> {
    let issuer = LocalIssuer::new(ca(), "a", |_| false);
    Certificates::new(Options::new(TrustDomains::new("cluster.local")), Arc::new(issuer)).0
}

/// Certificates for these identities, fetched on this runtime.
pub(super) fn certificates(identities: &[Identity]) -> Arc<Certificates> {
    let issuer = LocalIssuer::new(ca(), "a", |_| true);
    let options = Options::new(TrustDomains::new("cluster.local"));
    let (certificates, renewer) = Certificates::new(options, Arc::new(issuer));
    certificates.want(identities.to_vec());
    drop(tokio::task::spawn_local(renewer.run()));
    certificates
}

/// The pod's name in every test.
pub(super) fn pod_name() -> Name {
    Name::new("default", "client")
}

/// A meshed workload of that name on that node.
pub(super) fn workload(name: &str, node: &str, addr: IpAddr) -> Workload {
    Workload {
        addrs: vec![addr],
        node: node.into(),
        meshed: true,
        ready: true,
        ..Workload::named(Name::new("default", name))
    }
}

/// A service of that name with one TCP port 80.
pub(super) fn service(name: &str, vip: IpAddr, endpoints: Vec<Endpoint>) -> Service {
    let mut service = Service::named(Name::new("default", name));
    service.vips = vec![vip];
    service.ports = vec![ServicePort {
        name: "http".into(),
        port: 80,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints,
    }];
    service
}

/// A ready endpoint.
pub(super) fn endpoint(addr: SocketAddr, workload: Option<WorkloadId>) -> Endpoint {
    Endpoint { addr: addr.ip(), port: addr.port(), workload, ready: true, hostname: None, traits: None }
}

impl World {
    fn new(settings: Settings) -> Self {
        Self::of(workload("client", "a", IpAddr::V4(Ipv4Addr::LOCALHOST)), settings)
    }

    /// A worker whose pod is this workload.
    pub(super) fn of(client: Workload, settings: Settings) -> Self {
        let localhost = client.addrs[0];
        let handle = Arc::new(PodHandle {
            pod: 1,
            workload: client.id,
            name: client.name.clone(),
            netns_cookie: 77,
            addrs: vec![localhost],
        });
        let pod = Arc::new(Pod {
            handle,
            admission: Arc::new(Admission::new(settings.pod_connections_max)),
            inbound_port: 1,
            private_ports: vec![1],
            handshakes: Admission::new(settings.hbone.pod_handshakes_max),
            dns_in_flight: Admission::new(settings.dns.in_flight_max),
            dns_connections: Admission::new(settings.dns.tcp_connections_max),
        });
        let mut registry = Registry::default();
        let metrics = Arc::new(Metrics::register(&mut registry));
        let (kernel, sockets) = (Arc::new(FakeKernel::default()), Arc::new(FakeSockets::default()));
        let (commands, commands_rx) = mpsc::channel(16);
        let (snapshots, snapshots_rx) = watch::channel(Arc::new(Snapshot::new(
            1,
            Parts { workloads: vec![Arc::new(client.clone())], ..Parts::default() },
        )));
        let shared = Arc::new(Shared {
            admission: Arc::new(Admission::new(settings.connections_max)),
            certificates: certificates(&[client.identity()]),
            handshakes: Admission::new(settings.hbone.handshakes_max),
            limits: crate::destination::limits::Limits::default(),
            inbound: crate::destination::limits::Limits::default(),
            called_names: Default::default(),
            origination: crate::layers::tls::Origination::new(&std::env::temp_dir()),
            settings,
            sockets: Arc::clone(&sockets) as Arc<dyn Sockets>,
            kernel: Arc::clone(&kernel) as Arc<dyn Kernel>,
            metrics: Arc::clone(&metrics),
            links: vec![Link::new(commands.clone())],
            alive: Box::new(|_| {}),
        });
        let worker = Rc::new(Worker::new(0, shared, snapshots_rx));
        let (stop, stop_rx) = watch::channel(());
        drop(tokio::task::spawn_local(worker::run(Rc::clone(&worker), commands_rx, stop_rx)));

        let outbound = StdListener::bind((localhost, 0)).unwrap();
        let dns_tcp = StdListener::bind((localhost, 0)).unwrap();
        let dns_udp = StdUdp::bind("[::]:0").unwrap();
        let (outbound_addr, dns_tcp_addr) = (outbound.local_addr().unwrap(), dns_tcp.local_addr().unwrap());
        let hbone = StdListener::bind((localhost, 0)).unwrap();
        let hbone_addr = hbone.local_addr().unwrap();
        let dns_udp_port = dns_udp.local_addr().unwrap().port();
        for (socket, purpose) in [
            (OwnedFd::from(outbound), Purpose::Tcp(Direction::Outbound)),
            (hbone.into(), Purpose::Hbone),
            (dns_tcp.into(), Purpose::DnsTcp),
            (dns_udp.into(), Purpose::DnsUdp),
        ] {
            listener::serve(&worker, &pod, Listener { socket, purpose }).unwrap();
        }
        Self {
            worker,
            kernel,
            sockets,
            metrics,
            registry,
            pod,
            commands,
            snapshots,
            outbound: outbound_addr,
            hbone: hbone_addr,
            dns_udp: dns_udp_port,
            dns_tcp: dns_tcp_addr,
            _stop: stop,
        }
    }

    /// Publishes these and the pod's own workload.
    pub(super) fn publish(&self, workloads: Vec<Workload>, services: Vec<Service>) {
        let version = self.snapshots.borrow().version() + 1;
        let own = workload("client", "a", IpAddr::V4(Ipv4Addr::LOCALHOST));
        let workloads = workloads.into_iter().chain([own]).map(Arc::new).collect();
        let services = services.into_iter().map(Arc::new).collect();
        self.snapshots.send_replace(Arc::new(Snapshot::new(
            version,
            Parts { workloads, services, ..Parts::default() },
        )));
    }

    /// From now on connections on the outbound port were meant for `dst`.
    pub(super) fn dial(&self, dst: SocketAddr) {
        self.dial_hinted(dst, None);
    }

    /// The same, with the endpoint the kernel drew.
    pub(super) fn dial_hinted(&self, dst: SocketAddr, backend: Option<SocketAddr>) {
        let dialled = Dialled { dst, backend, service: None, started_ns: 0 };
        *self.kernel.dialled.lock().unwrap() = Some(dialled);
    }

    /// A client's end and a server's end with the worker between them.
    pub(super) async fn pair(&self) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.dial(listener.local_addr().unwrap());
        let client = TcpStream::connect(self.outbound).await.unwrap();
        let (server, _) = soon(listener.accept()).await.unwrap();
        // The worker knows too that the server took it: from here on a reset is a reset, not a refusal.
        let relayed = || self.worker.connections.views(1000, 0, 0).iter().all(|view| view.upstream.is_some());
        eventually(relayed, |all| *all).await;
        (client, server)
    }

    /// Connections that ended so.
    pub(super) fn closed(&self, direction: Direction, reason: CloseReason) -> u64 {
        self.metrics.closed(direction, reason).get()
    }

    /// Waits until `count` outbound connections have ended so.
    pub(super) async fn ended(&self, reason: CloseReason, count: u64) {
        eventually(|| self.closed(Direction::Outbound, reason), |n| *n == count).await;
        eventually(
            || self.worker.connections.accepted() as i64 - self.metrics.open(Direction::Outbound).get(),
            |d| *d == 0,
        )
        .await;
    }

    /// Waits until `count` outbound connections have ended so; others may go on.
    pub(super) async fn ended_so_far(&self, reason: CloseReason, count: u64) {
        eventually(|| self.closed(Direction::Outbound, reason), |n| *n == count).await;
    }

    /// DNS queries dealt with so.
    pub(super) fn dns(&self, outcome: DnsOutcome) -> u64 {
        self.metrics.dns(outcome).get()
    }
}

/// Fails after a minute of the test's clock.
pub(super) async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), work).await.expect("in time")
}

/// Fails with the last value seen instead of hanging.
pub(super) async fn eventually<T: std::fmt::Debug>(
    mut observe: impl FnMut() -> T,
    ok: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let seen = observe();
        if ok(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "not met, last: {seen:?}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Closes with a reset.
pub(super) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}
