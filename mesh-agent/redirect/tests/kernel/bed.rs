//! A node and pods of its own for one test: cgroup subtree, private BPF file system, namespaces on a bridge.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_common::service::{
    Backend, BackendKey, PEER_LOCAL, PEER_MESHED, PROTO_TCP, ServiceKey, ServiceVal, WorkloadVal,
};
use mesh_core::{id::WorkloadId, plan::PodConfig, snapshot::Name};
use mesh_redirect::{
    DesiredTables, EnrolRequest, EnrolledPod, Heartbeat, Netns, Node, NodeOptions, monotonic_ns,
};
use nix::sched::{CloneFlags, setns, unshare};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Leaves the test when the machine cannot run it.
macro_rules! bed {
    () => {
        match $crate::bed::Bed::new() {
            Ok(bed) => bed,
            Err(reason) => {
                let mandatory = std::env::var_os("MESH_TESTS_REQUIRE").is_some_and(|value| value == "1");
                assert!(!mandatory, "MESH_TESTS_REQUIRE=1, but: {reason}");
                eprintln!("SKIP: {reason}");
                return;
            }
        }
    };
}

/// Everything of one test; gone when dropped.
pub(crate) struct Bed {
    pub(crate) cgroup: PathBuf,
    pub(crate) bpffs: PathBuf,
    home_cgroup: PathBuf,
    mount: PathBuf,
    hub: File,
    pods: AtomicU32,
    _alone: MutexGuard<'static, ()>,
}

impl Bed {
    pub(crate) fn new() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root for namespaces and eBPF".into());
        }
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
        });
        let mount = mount.ok_or("no cgroup2 mount")?;
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("nm-redirect-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let cgroup = mount.join(&name);
        fs::create_dir(&cgroup).unwrap();
        let bpffs = Path::new("/run").join(&name);
        let hub = new_netns();
        ip(&hub, "link set lo up\nlink add br0 type bridge mcast_snooping 0\nlink set br0 up\n");
        Ok(Self {
            home_cgroup: mount.join(own),
            cgroup,
            bpffs,
            mount,
            hub,
            pods: AtomicU32::new(0),
            _alone: alone,
        })
    }

    pub(crate) fn options(&self) -> NodeOptions {
        NodeOptions {
            cgroup_root: Some(self.cgroup.clone()),
            bpffs: self.bpffs.clone(),
            ..NodeOptions::new("test.node")
        }
    }

    pub(crate) fn node(&self) -> Node {
        Node::open(self.options()).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    /// The cgroup the process came from, where no program of the bed's node runs.
    pub(crate) fn home(&self) -> String {
        self.home_cgroup.to_string_lossy().into_owned()
    }

    /// The cgroup of the whole tree.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// A pod with one address of each family on the bed's bridge. Virtual addresses have no route: a connect
    /// that no hook rewrites fails at once.
    pub(crate) fn pod(&self) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let netns = new_netns();
        let (v4, v6): (IpAddr, IpAddr) = (
            format!("10.77.{}.{}", number / 250, number % 250 + 1).parse().unwrap(),
            format!("fd77::{number:x}").parse().unwrap(),
        );
        let hub = format!("/proc/{}/fd/{}", std::process::id(), self.hub.as_raw_fd());
        ip(
            &netns,
            &format!(
                "link set lo up\nlink add eth0 type veth peer name v{number} netns {hub}\n\
                 addr add {v4}/16 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
                 route add 0.0.0.0/0 dev eth0\nroute add ::/0 dev eth0\n\
                 route add unreachable 10.96.0.0/12\nroute add unreachable fd96::/16\n",
            ),
        );
        ip(&self.hub, &format!("link set v{number} master br0\nlink set v{number} up\n"));
        Pod { netns, v4, v6, number }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Out of the tree first, else it cannot be removed.
        let _ = fs::write(self.home_cgroup.join("cgroup.procs"), "0");
        if self.bpffs.exists() {
            let _ = nix::mount::umount2(&self.bpffs, nix::mount::MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&self.bpffs);
        }
        remove_group(&self.cgroup);
    }
}

pub(crate) fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_group(&entry.path());
        }
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    while let Err(error) = fs::remove_dir(group) {
        if Instant::now() > deadline {
            eprintln!("cannot remove {}: {error}", group.display());
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// A namespace with its addresses. The app's side of a pod is played by threads inside it.
pub(crate) struct Pod {
    netns: File,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    pub(crate) number: u32,
}

impl Pod {
    /// Runs `work` on a thread inside the pod.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.netns, work)
    }

    /// Starts `work` on a thread inside the pod.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let netns = self.netns.try_clone().unwrap();
        thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()))
    }

    pub(crate) fn netns(&self) -> Arc<Netns> {
        Arc::new(Netns::open(&self.path()).unwrap())
    }

    pub(crate) fn workload(&self) -> WorkloadId {
        WorkloadId::of_pod("test", &format!("pod-{}", self.number), "")
    }

    pub(crate) fn config(&self) -> PodConfig {
        PodConfig {
            workload: self.workload(),
            name: Name::new("test", format!("pod-{}", self.number)),
            netns: self.path().to_string_lossy().into(),
            addrs: vec![self.v4, self.v6],
            outbound_fail_closed: false,
            inbound_fail_closed: false,
            dns_capture: true,
            inbound_ports: Default::default(),
            outbound_ports: Default::default(),
            excluded: Vec::new(),
            proxy_unknown: false,
            sight: 0,
            probe_ports: Default::default(),
            policy_hash: 1,
            identity_hash: 1,
        }
    }

    pub(crate) fn request(&self, node: &Node) -> EnrolRequest {
        EnrolRequest { pod: node.next_pod_id(), netns: self.netns(), config: self.config() }
    }

    pub(crate) fn enrol(&self, node: &Node) -> EnrolledPod {
        node.enrol(self.request(node)).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    pub(crate) fn addr(&self, v4: bool) -> IpAddr {
        if v4 { self.v4 } else { self.v6 }
    }
}

pub(crate) fn new_netns() -> File {
    // `unshare` changes the calling thread for good, so it is a thread of its own.
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap()
}

pub(crate) fn inside<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub(crate) fn ip(netns: &File, script: &str) {
    let output = inside(netns, || {
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// Stamps the heartbeat until dropped, as the agent's workers do.
pub(crate) struct Alive {
    heartbeat: Heartbeat,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Alive {
    pub(crate) fn new(node: &Node) -> Self {
        let heartbeat = Heartbeat::new(node.maps());
        heartbeat.stamp(monotonic_ns()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (heartbeat, stop) = (heartbeat.clone(), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    heartbeat.stamp(monotonic_ns()).unwrap();
                    thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Self { heartbeat, stop, thread: Some(thread) }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = self.heartbeat.stop();
    }
}

/// Tables with one TCP service per (address, backends).
pub(crate) fn services(entries: &[(SocketAddr, &[Backend])]) -> DesiredTables {
    let mut tables = DesiredTables::default();
    for (number, (vip, backends)) in entries.iter().enumerate() {
        let slots = 1000 + number as u64;
        tables.services.insert(
            ServiceKey { addr: vip.ip().into(), port: vip.port(), proto: PROTO_TCP },
            ServiceVal {
                service: 500 + number as u64,
                slots,
                count: backends.len() as u32,
                flags: 0,
                affinity_s: 0,
                pad: 0,
            },
        );
        for (slot, backend) in backends.iter().enumerate() {
            tables.backends.insert(BackendKey { slots, slot: slot as u32, pad: 0 }, *backend);
        }
    }
    tables
}

/// A backend outside the mesh: Direct without a ticket.
pub(crate) fn plain_backend(addr: SocketAddr) -> Backend {
    Backend { addr: addr.ip().into(), workload: 0, incarnation: 0, port: addr.port(), flags: 0, pad: 0 }
}

/// A backend that is a pod enrolled on this node.
pub(crate) fn local_backend(pod: &Pod, v4: bool, port: u16) -> Backend {
    Backend {
        addr: pod.addr(v4).into(),
        workload: pod.workload().0,
        incarnation: pod.netns().cookie(),
        port,
        flags: PEER_MESHED | PEER_LOCAL,
        pad: 0,
    }
}

pub(crate) fn local_workload(pod: &Pod) -> WorkloadVal {
    WorkloadVal {
        workload: pod.workload().0,
        incarnation: pod.netns().cookie(),
        flags: PEER_MESHED | PEER_LOCAL,
        pad: [0; 3],
    }
}

/// Accepts one connection from a non-blocking listener within two seconds.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<(socket2::Socket, SocketAddr)> {
    let listener = socket2::Socket::from(listener.try_clone()?);
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match listener.accept() {
            Ok((socket, peer)) => return Ok((socket, peer.as_socket().unwrap())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
}

/// The first accept of any of the outbound listeners.
pub(crate) fn accept_outbound(pod: &EnrolledPod) -> (socket2::Socket, SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        for listener in &pod.listeners.outbound {
            let listener = socket2::Socket::from(listener.try_clone().unwrap());
            if let Ok((socket, peer)) = listener.accept() {
                return (socket, peer.as_socket().unwrap());
            }
        }
        assert!(Instant::now() < deadline, "nothing arrived at the outbound listeners");
        thread::sleep(Duration::from_millis(1));
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
