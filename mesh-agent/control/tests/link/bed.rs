//! A controller whose world the test sets, and agents of it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_control::{
    link::token::JoinSecret,
    publish::{
        ads::Publication,
        auth::NodeProof,
        metrics::PublishMetrics,
        server::{Controller, OWN_TTL, ServerParts, controller_identity},
    },
    status::SourceStatus,
    subscribe::{self, SubscribeOptions, Subscription, channel::ControllerUrl},
};
use mesh_core::{
    balance::locality::Place,
    id::WorkloadId,
    snapshot::{Endpoint, Name, Parts, Protocol, Service, ServicePort, Snapshot, Workload},
};
use mesh_identity::{Ca, TrustMaterial, ca::CaOptions, clock::Clock};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use zeroize::Zeroizing;

/// Longest wait for anything; on a busy machine everything is slow.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A folder that goes with the test.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nodemesh-link-{}-{name}", std::process::id()));
        fs::remove_dir_all(&path).ok();
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The machine's clock, moved.
#[derive(Debug, Default)]
pub(crate) struct MovedClock(AtomicU64);

impl MovedClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_secs(), Ordering::Relaxed);
    }
}

impl Clock for MovedClock {
    fn now(&self) -> SystemTime {
        SystemTime::now() + Duration::from_secs(self.0.load(Ordering::Relaxed))
    }
}

/// What outlives a controller: its authority, its secret, its address, its world.
pub(crate) struct Bed {
    pub(crate) folder: Folder,
    pub(crate) ca: Arc<Ca>,
    pub(crate) clock: Arc<MovedClock>,
    pub(crate) snapshots: watch::Sender<Arc<Snapshot>>,
    pub(crate) sources: watch::Sender<Arc<SourceStatus>>,
    /// How long streams live, if not as long as usual.
    pub(crate) session_age: Option<Duration>,
    secret: String,
    addr: Option<SocketAddr>,
}

/// A running controller.
pub(crate) struct Running {
    pub(crate) metrics: PublishMetrics,
    pub(crate) publication: Publication,
    stop: tokio::sync::oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    pub(crate) async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(LIMIT, self.task).await.expect("the controller stops").unwrap();
    }
}

impl Bed {
    pub(crate) fn new(name: &str, parts: Parts) -> Self {
        let folder = Folder::new(name);
        let clock = Arc::new(MovedClock::default());
        let mut options = CaOptions::new(folder.path().join("ca"), "cluster.local");
        options.clock = Arc::clone(&clock) as _;
        let ca = Arc::new(Ca::open(options).unwrap());
        Self {
            folder,
            ca,
            clock,
            snapshots: watch::Sender::new(Arc::new(Snapshot::new(1, parts))),
            sources: watch::Sender::new(Arc::new(SourceStatus {
                source: "/etc/mesh".into(),
                ..SourceStatus::default()
            })),
            session_age: None,
            secret: JoinSecret::generate().unwrap().to_text().to_owned(),
            addr: None,
        }
    }

    /// Starts a controller, at the same address as the one before.
    pub(crate) async fn controller(&mut self) -> Running {
        let addr = self.addr.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
        let metrics = PublishMetrics::default();
        let parts = ServerParts {
            listener: TcpListener::bind(addr).await.unwrap(),
            ca: Arc::clone(&self.ca),
            proof: NodeProof::JoinSecret(Box::new(self.secret())),
            namespace: "istio-system".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            own_ttl: OWN_TTL,
            session_age: self.session_age,
            snapshots: self.snapshots.subscribe(),
            sources: self.sources.subscribe(),
            clock: Arc::clone(&self.clock) as _,
            metrics: metrics.clone(),
        };
        let controller = Controller::new(parts).unwrap();
        self.addr = Some(controller.addr());
        let publication = controller.publication();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            controller.run(async { stopped.await.unwrap_or_default() }).await.unwrap();
        });
        Running { metrics, publication, stop, task }
    }

    pub(crate) fn secret(&self) -> JoinSecret {
        JoinSecret::parse(&self.secret).unwrap()
    }

    pub(crate) fn token(&self, node: &str) -> String {
        self.secret().token(node)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr.expect("a controller was started")
    }

    pub(crate) fn roots(&self) -> TrustMaterial {
        self.ca.trust().borrow().as_ref().clone()
    }

    pub(crate) fn options(&self, node: &str) -> SubscribeOptions {
        SubscribeOptions {
            controller: ControllerUrl::parse(&format!("https://{}", self.addr())).unwrap(),
            identity: controller_identity("cluster.local", "istio-system"),
            roots: self.roots(),
            node: node.to_owned(),
            token: Some(Zeroizing::new(self.token(node))),
            state_dir: self.folder.path().to_owned(),
        }
    }

    pub(crate) fn agent(&self, node: &str) -> Subscription {
        self.agent_with(self.options(node))
    }

    pub(crate) fn agent_with(&self, options: SubscribeOptions) -> Subscription {
        subscribe::start_with(options, Arc::clone(&self.clock) as _, false).unwrap()
    }

    /// Where the agent of a node saves its state.
    pub(crate) fn saved(&self, node: &str) -> PathBuf {
        self.folder.path().join(node).join("snapshot")
    }

    /// Sets the world.
    pub(crate) fn publish(&self, parts: Parts) {
        let version = self.snapshots.borrow().version() + 1;
        self.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
    }
}

/// Waits until a value is as wanted, and returns it.
pub(crate) async fn until<T: Clone>(
    what: &str,
    receiver: &mut watch::Receiver<T>,
    wanted: impl FnMut(&T) -> bool,
) -> T {
    let found = timeout(LIMIT, receiver.wait_for(wanted)).await;
    found.unwrap_or_else(|_| panic!("{what} takes too long")).unwrap().clone()
}

/// Waits until something is true.
pub(crate) async fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let waited = timeout(LIMIT, async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} takes too long"));
}

/// Waits for the agent's whole first state from the controller.
pub(crate) async fn synced(agent: &mut Subscription) -> Arc<Snapshot> {
    until("the first state", &mut agent.link, |link| link.generation.is_some()).await;
    Arc::clone(&agent.snapshots.borrow_and_update())
}

/// A meshed pod.
pub(crate) fn pod(name: &str, node: &str, addr: &str) -> Workload {
    Workload {
        id: WorkloadId::of_pod("shop", name, ""),
        service_account: name.into(),
        node: node.into(),
        // As the compiler has it.
        place: Place { node: node.into(), ..Place::default() },
        addrs: vec![addr.parse().unwrap()],
        meshed: true,
        ready: true,
        netns: Some(format!("/run/netns/{name}").into()),
        ..Workload::named(Name::new("shop", name))
    }
}

/// A service with these pods behind it.
pub(crate) fn service(name: &str, vip: &str, pods: &[&Workload]) -> Service {
    let endpoints = pods.iter().map(|pod| Endpoint {
        addr: pod.addrs[0],
        port: 8080,
        workload: Some(pod.id),
        ready: true,
        hostname: None,
        traits: None,
    });
    Service {
        vips: vec![vip.parse().unwrap()],
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: endpoints.collect(),
        }],
        ..Service::named(Name::new("shop", name))
    }
}

/// Two pods on two nodes, and a service of both.
pub(crate) fn shop() -> Parts {
    let (cart, web) = (pod("cart", "n1", "10.1.0.1"), pod("web", "n2", "10.2.0.1"));
    let service = service("front", "10.96.0.1", &[&cart, &web]);
    Parts {
        workloads: vec![Arc::new(cart), Arc::new(web)],
        services: vec![Arc::new(service)],
        ..Parts::default()
    }
}
