//! Live Direct connections: listed from the sockets themselves, and closed at both ends.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use mesh_common::stats::Reason;
use mesh_redirect::{EnrolledPod, Node, TableWriter, VerdictEntry, Verdicts, can_close_connections};

use crate::bed::{Alive, Bed, Pod, local_backend, services};

const VIP4: &str = "10.96.0.1:80";
const VIP6: &str = "[fd96::1]:80";
const LIMIT: Duration = Duration::from_secs(2);

/// Two enrolled pods; the first may dial the second's port 8080 Direct, by a service in both families.
struct Pair {
    client: Pod,
    server: Pod,
    node: Node,
    _alive: Alive,
    _enrolled: [EnrolledPod; 2],
    _bed: Bed,
}

impl Pair {
    fn new(bed: Bed) -> Self {
        let node = bed.node();
        let (client, server) = (bed.pod(), bed.pod());
        let enrolled = [client.enrol(&node), server.enrol(&node)];
        let (v4, v6) = (local_backend(&server, true, 8080), local_backend(&server, false, 8080));
        let tables = services(&[(VIP4.parse().unwrap(), &[v4]), (VIP6.parse().unwrap(), &[v6])]);
        TableWriter::new(node.maps()).unwrap().apply(&tables);
        let verdicts = Verdicts::new(node.maps());
        let policy_gen = verdicts.policy_gen(server.workload()).unwrap().unwrap();
        for v4 in [true, false] {
            verdicts
                .put(&VerdictEntry {
                    client: client.netns().cookie(),
                    workload: server.workload(),
                    incarnation: server.netns().cookie(),
                    port: 8080,
                    v4,
                    policy_gen,
                    allow: true,
                })
                .unwrap();
        }
        Self { _alive: Alive::new(&node), client, server, node, _enrolled: enrolled, _bed: bed }
    }

    /// A connection and its accepted end.
    fn connect(&self, app: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
        let to = to.parse().unwrap();
        let mut client = self.client.run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap();
        let (mut served, _) = app.accept().unwrap();
        for stream in [&client, &served] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
        }
        client.write_all(b"x").unwrap();
        served.read_exact(&mut [0]).unwrap();
        (client, served)
    }

    fn listen(&self, addr: impl Into<std::net::IpAddr>) -> TcpListener {
        let addr = SocketAddr::new(addr.into(), 8080);
        self.server.run(|| TcpListener::bind(addr).unwrap())
    }
}

/// One connection of several is closed: both its ends fail at once, the other and the listener live on.
fn closes_one(app_at: std::net::IpAddr, dial: &str, v4: bool) {
    let pair = Pair::new(bed!());
    can_close_connections().unwrap();
    let app = pair.listen(app_at);
    let (mut doomed, mut doomed_end) = pair.connect(&app, dial);
    let (mut spared, mut spared_end) = pair.connect(&app, dial);

    let (live, errors) = pair.node.direct_connections(false);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(live.len(), 2, "{live:?}");
    let port = doomed.local_addr().unwrap().port();
    let found = live.iter().find(|connection| connection.flow.client.port() == port).unwrap();
    let flow = &found.flow;
    assert_eq!(flow.client, (pair.client.addr(v4), port).into());
    assert_eq!(flow.server, (pair.server.addr(v4), 8080).into());
    assert_eq!((flow.source, flow.destination), (pair.client.workload(), Some(pair.server.workload())));
    assert_eq!((flow.reason, flow.ticket, flow.bytes), (Some(Reason::VerdictAllow), true, None));

    assert!(pair.node.close_direct(found).unwrap());
    let kind = |result: io::Result<usize>| result.map_err(|error| error.kind());
    let ends = [kind(doomed.read(&mut [0])), kind(doomed_end.read(&mut [0]))];
    for end in ends {
        assert!(
            matches!(end, Err(io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)),
            "{ends:?}"
        );
    }
    assert!(!pair.node.close_direct(found).unwrap(), "closed twice");
    spared_end.write_all(b"y").unwrap();
    spared.read_exact(&mut [0]).unwrap();
    assert_eq!(pair.node.direct_connections(false).0.len(), 1);
    pair.connect(&app, dial);
}

#[test]
fn an_ipv4_connection_is_closed_at_both_ends() {
    closes_one(Ipv4Addr::UNSPECIFIED.into(), VIP4, true);
}

#[test]
fn an_ipv6_connection_is_closed_at_both_ends() {
    closes_one(Ipv6Addr::UNSPECIFIED.into(), VIP6, false);
}

#[test]
fn a_mapped_connection_is_closed_at_both_ends() {
    closes_one(Ipv6Addr::UNSPECIFIED.into(), "[::ffff:10.96.0.1]:80", true);
}

#[test]
fn connections_that_did_not_go_direct_are_not_listed() {
    let pair = Pair::new(bed!());
    let app = pair.listen(Ipv4Addr::UNSPECIFIED);
    let own = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8080);
    let _loopback = pair.server.run(|| TcpStream::connect_timeout(&own, LIMIT).unwrap());
    drop(app.accept().unwrap());
    // By its own address there is no entry for the server: it is outside the mesh as far as the tables know.
    let to = SocketAddr::new(pair.server.v4, 8080);
    let _proxied = pair.client.run(|| TcpStream::connect_timeout(&to, LIMIT));
    assert!(pair.node.direct_connections(false).0.is_empty());
}

#[test]
fn a_connection_that_ended_by_itself_is_gone_and_its_port_is_not_confused_with_the_listener() {
    let pair = Pair::new(bed!());
    let app = pair.listen(Ipv4Addr::UNSPECIFIED);
    let (client, served) = pair.connect(&app, VIP4);
    let (live, _) = pair.node.direct_connections(false);
    drop((served, client));
    assert_eq!(live.len(), 1);
    // Whether something was still lingering or not: a lookup by addresses that finds nothing else finds the listener,
    // which must not be taken for the connection.
    pair.node.close_direct(&live[0]).unwrap();
    assert!(!pair.node.close_direct(&live[0]).unwrap());
    pair.connect(&app, VIP4);
}
