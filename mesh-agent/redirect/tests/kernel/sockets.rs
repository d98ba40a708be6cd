//! The agent's own sockets inside pods.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use mesh_common::stats::{Hook, Outcome, Reason};
use mesh_redirect::{LocalPeers, SocketTags, Stats, TableWriter, TicketTag};

use crate::bed::{Alive, accept, local_workload, services};

/// Connects a socket the agent made; blocking, as the tests have no reactor.
fn connect(socket: OwnedFd, to: SocketAddr) -> socket2::Socket {
    let socket = socket2::Socket::from(socket);
    socket.set_nonblocking(false).unwrap();
    socket.connect(&to.into()).unwrap();
    socket
}

#[test]
fn a_ticketed_dial_crosses_to_the_app_and_an_unticketed_one_is_captured() {
    let bed = bed!();
    let node = bed.node();
    let (client, server) = (bed.pod(), bed.pod());
    let (client_pod, server_pod) = (client.enrol(&node), server.enrol(&node));
    let mut tables = services(&[]);
    tables.workloads.insert(server.v4.into(), local_workload(&server));
    TableWriter::new(node.maps()).unwrap().apply(&tables);
    let _alive = Alive::new(&node);
    let app: OwnedFd = server.run(|| TcpListener::bind((server.v4, 8080)).unwrap()).into();
    socket2::Socket::from(app.try_clone().unwrap()).set_nonblocking(true).unwrap();
    let to = SocketAddr::new(server.v4, 8080);

    let (workload, peer) = LocalPeers::new(node.maps()).at(server.v4).unwrap();
    assert_eq!((workload, peer.incarnation), (server.workload(), server.netns().cookie()));
    let ticket = TicketTag { incarnation: peer.incarnation, policy_gen: peer.policy_gen };
    let tags = SocketTags { dst_workload: Some(workload), ticket: Some(ticket), ..SocketTags::default() };
    let with = connect(client_pod.sockets.tcp(to, &tags).unwrap(), to);
    let (_served, from) = accept(&app).unwrap();
    assert_eq!(Some(from), with.local_addr().unwrap().as_socket());
    assert_eq!(from.ip(), client.v4);

    let tags = SocketTags { ticket: None, ..tags };
    let _without = connect(client_pod.sockets.tcp(to, &tags).unwrap(), to);
    accept(&server_pod.listeners.inbound).unwrap();

    let stats = Stats::new(node.maps());
    assert_eq!(stats.counter(Hook::Connect4, Outcome::Bypass, Reason::OwnSocket).unwrap(), 2);
    assert!(stats.counter(Hook::SkLookup, Outcome::Pass, Reason::Ticket).unwrap() >= 1);
}

#[test]
fn an_app_behind_the_agent_sees_the_real_client() {
    let bed = bed!();
    let node = bed.node();
    let server = bed.pod();
    let enrolled = server.enrol(&node);
    let _alive = Alive::new(&node);
    let app: OwnedFd = server.run(|| TcpListener::bind((server.v4, 8080)).unwrap()).into();
    socket2::Socket::from(app.try_clone().unwrap()).set_nonblocking(true).unwrap();
    let to = SocketAddr::new(server.v4, 8080);
    let real: SocketAddr = "203.0.113.9:4711".parse().unwrap();
    let tags = SocketTags { inbound: true, client_addr: Some(real), ..SocketTags::default() };
    let _dialled = connect(enrolled.sockets.tcp(to, &tags).unwrap(), to);
    let (served, from) = accept(&app).unwrap();
    assert_eq!(from, real, "accept");
    assert_eq!(served.peer_addr().unwrap().as_socket(), Some(real), "getpeername");
}

#[test]
fn sockets_are_made_in_the_pod_and_the_thread_comes_back() {
    let bed = bed!();
    let node = bed.node();
    let (pod, peer) = (bed.pod(), bed.pod());
    let enrolled = pod.enrol(&node);
    let home = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let app: OwnedFd = peer.run(|| TcpListener::bind((peer.v4, 80)).unwrap()).into();
    let to = SocketAddr::new(peer.v4, 80);
    let mut socket = connect(enrolled.sockets.tcp(to, &SocketTags::default()).unwrap(), to);
    socket.write_all(b"x").unwrap();
    let (_, from) = accept(&app).unwrap();
    assert_eq!(from.ip(), pod.v4);
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), home);
    drop(enrolled.sockets.udp(to).unwrap());
}

/// The choice documented in `netns.rs`: `setns` there and back on the calling thread against a helper thread.
#[test]
fn entering_on_the_calling_thread_is_cheaper_than_asking_a_helper() {
    const ROUNDS: u32 = 2000;
    let bed = bed!();
    let node = bed.node();
    let pod = bed.pod();
    let enrolled = pod.enrol(&node);
    let to = "10.0.0.1:80".parse().unwrap();
    let make =
        move |sockets: &mesh_redirect::PodSockets| drop(sockets.tcp(to, &SocketTags::default()).unwrap());
    let time = |mut work: Box<dyn FnMut() + '_>| {
        let mut rounds: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let started = Instant::now();
                work();
                started.elapsed()
            })
            .collect();
        rounds.sort_unstable();
        rounds[rounds.len() / 2]
    };

    let here = time(Box::new(|| make(&enrolled.sockets)));
    let (ask, asked) = mpsc::channel::<()>();
    let (answer, answered) = mpsc::channel::<()>();
    let sockets = enrolled.sockets.clone();
    let helper = thread::spawn(move || {
        while asked.recv().is_ok() {
            make(&sockets);
            answer.send(()).unwrap();
        }
    });
    let there = time(Box::new(|| {
        ask.send(()).unwrap();
        answered.recv().unwrap();
    }));
    drop(ask);
    helper.join().unwrap();
    let plain = time(Box::new(|| drop(std::net::UdpSocket::bind("127.0.0.1:0").unwrap())));
    eprintln!(
        "one tagged socket: {here:?} on this thread, {there:?} through a helper; a plain socket {plain:?}"
    );
    assert!(here < there, "{here:?} against {there:?}");
}
