//! What a connect of an enrolled pod gets: Direct, Proxy, Deny, and what is left when the agent is down.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    time::Duration,
};

use mesh_common::stats::{Hook, Outcome, Reason};
use mesh_redirect::{EnrolledPod, Listeners, Node, Origins, Stats, TableWriter, VerdictEntry, Verdicts};

use crate::bed::{Alive, Bed, Pod, accept, accept_outbound, local_backend, local_workload, services};

const VIP4: &str = "10.96.0.1:80";
const VIP6: &str = "[fd96::1]:80";
const LIMIT: Duration = Duration::from_secs(1);

/// Two enrolled pods and a service of the second one's port 8080, in both families.
struct Pair {
    client: Pod,
    server: Pod,
    client_pod: EnrolledPod,
    server_pod: u32,
    server_listeners: Option<Listeners>,
    node: Node,
    _bed: Bed,
}

impl Pair {
    fn new(bed: Bed) -> Self {
        let node = bed.node();
        let (client, server) = (bed.pod(), bed.pod());
        let (client_pod, server_pod) = (client.enrol(&node), server.enrol(&node));
        let (v4, v6) = (local_backend(&server, true, 8080), local_backend(&server, false, 8080));
        let mut tables = services(&[(VIP4.parse().unwrap(), &[v4]), (VIP6.parse().unwrap(), &[v6])]);
        for pod in [&client, &server] {
            for addr in [pod.v4, pod.v6] {
                tables.workloads.insert(addr.into(), local_workload(pod));
            }
        }
        let applied = TableWriter::new(node.maps()).unwrap().apply(&tables);
        assert!(applied.full.is_empty() && applied.errors.is_empty(), "{applied:?}");
        let (server_pod, server_listeners) = (server_pod.pod, Some(server_pod.listeners));
        Self { client, server, client_pod, server_pod, server_listeners, node, _bed: bed }
    }

    fn allow(&self, v4: bool, allow: bool) {
        let verdicts = Verdicts::new(self.node.maps());
        let policy_gen = verdicts.policy_gen(self.server.workload()).unwrap().unwrap();
        verdicts
            .put(&VerdictEntry {
                client: self.client.netns().cookie(),
                workload: self.server.workload(),
                incarnation: self.server.netns().cookie(),
                port: 8080,
                v4,
                policy_gen,
                allow,
            })
            .unwrap();
    }

    fn count(&self, hook: Hook, outcome: Outcome, reason: Reason) -> u64 {
        Stats::new(self.node.maps()).counter(hook, outcome, reason).unwrap()
    }

    fn dial(&self, to: &str) -> io::Result<TcpStream> {
        let to = to.parse().unwrap();
        self.client.run(|| TcpStream::connect_timeout(&to, LIMIT))
    }

    fn app(&self) -> TcpListener {
        self.server.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8080)).unwrap())
    }
}

#[test]
fn an_allowed_connect_goes_direct_and_everybody_sees_true_addresses() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    let app = pair.app();
    for (v4, vip, hook) in [(true, VIP4, Hook::Connect4), (false, VIP6, Hook::Connect6)] {
        pair.allow(v4, true);
        let mut client = pair.dial(vip).unwrap();
        let (mut served, peer) = app.accept().unwrap();
        client.write_all(b"ping").unwrap();
        let mut got = [0; 4];
        served.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ping");
        assert_eq!(client.peer_addr().unwrap().to_string(), vip, "the app sees what it dialled");
        assert_eq!(peer.ip().to_canonical(), pair.client.addr(v4), "the server sees who dialled");
        assert_eq!(client.local_addr().unwrap().port(), peer.port());
        assert_eq!(pair.count(hook, Outcome::Direct, Reason::VerdictAllow), 1);
    }
    assert!(pair.count(Hook::SkLookup, Outcome::Pass, Reason::Ticket) >= 2);
    assert_eq!(pair.count(Hook::SkLookup, Outcome::Capture, Reason::Captured), 0);
}

#[test]
fn a_connect_without_a_verdict_reaches_the_agent_with_its_original_destination() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    let origins = Origins::new(pair.node.maps());
    let IpAddr::V4(vip4) = VIP4.parse::<SocketAddr>().unwrap().ip() else { unreachable!() };
    let mapped = format!("[{}]:80", vip4.to_ipv6_mapped());
    for (v4, vip, dial) in [(true, VIP4, VIP4), (false, VIP6, VIP6), (true, VIP4, &*mapped)] {
        let client = pair.dial(dial).unwrap();
        let (accepted, peer) = accept_outbound(&pair.client_pod);
        let dialled = origins.dialled(accepted.as_fd()).unwrap().unwrap();
        assert_eq!(dialled.dst.to_string(), vip);
        assert_eq!(dialled.backend, Some(SocketAddr::new(pair.server.addr(v4), 8080)));
        assert_eq!(dialled.dst_workload, Some(pair.server.workload()));
        assert_eq!(dialled.reason, Some(Reason::NoVerdict));
        assert!(dialled.service.is_some() && dialled.started_ns > 0);
        assert_eq!(peer.ip().to_canonical(), pair.client.addr(v4), "the agent sees the pod");
        assert_eq!(client.peer_addr().unwrap().to_string(), dial, "the app sees what it dialled");
        assert_eq!(client.local_addr().unwrap().ip().to_canonical(), pair.client.addr(v4));
    }
}

#[test]
fn a_connection_nobody_dialled_for_has_no_original_destination() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    let own = pair.client.v4;
    // The pod may talk to its own agent's port; the agent then knows no destination and must close.
    let _client = pair.client.run(|| TcpStream::connect_timeout(&(own, 15001).into(), LIMIT)).unwrap();
    let (accepted, _) = accept(&pair.client_pod.listeners.outbound[0]).unwrap();
    assert_eq!(Origins::new(pair.node.maps()).dialled(accepted.as_fd()).unwrap(), None);
}

#[test]
fn a_cached_deny_is_an_errno_at_connect() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    pair.allow(true, false);
    let error = pair.dial(VIP4).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM), "{error}");
    assert_eq!(pair.count(Hook::Connect4, Outcome::Deny, Reason::VerdictDeny), 1);
}

#[test]
fn a_verdict_is_void_once_the_policy_moved() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    let app = pair.app();
    pair.allow(true, true);
    let _first = pair.dial(VIP4).unwrap();
    drop(app.accept().unwrap());

    let mut config = pair.server.config();
    config.policy_hash = 2;
    pair.node.update(pair.server_pod, &config).unwrap();
    let _second = pair.dial(VIP4).unwrap();
    accept_outbound(&pair.client_pod);
    assert_eq!(pair.count(Hook::Connect4, Outcome::Proxy, Reason::StaleVerdict), 1);
    assert_eq!(Verdicts::new(pair.node.maps()).sweep().unwrap(), 1);
}

#[test]
fn a_pod_of_a_later_incarnation_inherits_no_verdict() {
    let mut pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    pair.allow(true, true);
    pair.node.remove(&[pair.server_pod]);
    let before = Verdicts::new(pair.node.maps());
    assert_eq!(before.policy_gen(pair.server.workload()).unwrap(), None);
    let again = pair.server.request(&pair.node);
    // The listeners of the first enrolment are still open, as they would be in a slow worker.
    drop(pair.server_listeners.take());
    let again = pair.node.enrol(again).unwrap();
    let _client = pair.dial(VIP4).unwrap();
    accept_outbound(&pair.client_pod);
    assert!(again.pod > pair.server_pod);
}

#[test]
fn without_the_agent_an_open_pod_goes_on_and_a_closed_one_is_refused() {
    let pair = Pair::new(bed!());
    let app = pair.app();
    let client = pair.dial(VIP4).unwrap();
    drop(app.accept().unwrap());
    drop(client);
    assert_eq!(pair.count(Hook::Connect4, Outcome::Direct, Reason::AgentDown), 1);

    let mut config = pair.client.config();
    config.outbound_fail_closed = true;
    pair.node.update(pair.client_pod.pod, &config).unwrap();
    let error = pair.dial(VIP4).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    assert_eq!(pair.count(Hook::Connect4, Outcome::Deny, Reason::FailClosed), 1);
}

#[test]
fn excluded_ports_and_prefixes_are_left_alone() {
    let pair = Pair::new(bed!());
    let _alive = Alive::new(&pair.node);
    let app = pair.app();
    let direct = format!("{}:8080", pair.server.v4);
    let mut config = pair.client.config();
    config.excluded = vec!["10.77.0.0/16".parse().unwrap()];
    pair.node.update(pair.client_pod.pod, &config).unwrap();
    drop(pair.dial(&direct));
    assert_eq!(pair.count(Hook::Connect4, Outcome::Bypass, Reason::ExcludedPrefix), 1);

    config.excluded = vec!["::/0".parse().unwrap()];
    config.outbound_ports.insert(8080, mesh_core::plan::PortRule { excluded: true, ..Default::default() });
    pair.node.update(pair.client_pod.pod, &config).unwrap();
    drop(pair.dial(&direct));
    assert_eq!(
        pair.count(Hook::Connect4, Outcome::Bypass, Reason::ExcludedPrefix),
        1,
        "gone with the update"
    );
    assert_eq!(pair.count(Hook::Connect4, Outcome::Bypass, Reason::ExcludedPort), 1);
    drop(app);

    config.outbound_ports.clear();
    pair.node.update(pair.client_pod.pod, &config).unwrap();
    let _client = pair.dial(VIP4).unwrap();
    accept_outbound(&pair.client_pod);
    let error = pair.dial(VIP6).map(drop);
    assert_eq!(pair.count(Hook::Connect6, Outcome::Bypass, Reason::ExcludedPrefix), 1, "{error:?}");
}
