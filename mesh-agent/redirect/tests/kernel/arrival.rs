//! What an arrival at an enrolled pod gets.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::Duration,
};

use aya_obj::generated::{bpf_attr, bpf_cmd};
use mesh_common::{
    ports,
    stats::{Hook, Outcome, Reason},
};
use mesh_core::plan::PortRule;
use mesh_redirect::Stats;

use crate::bed::{Alive, Pod, accept};

const LIMIT: Duration = Duration::from_secs(3);

fn dial(from: &Pod, to: SocketAddr) -> io::Result<TcpStream> {
    from.run(|| TcpStream::connect_timeout(&to, LIMIT))
}

#[test]
fn plaintext_from_outside_is_captured_with_its_original_destination() {
    let bed = bed!();
    let node = bed.node();
    let (outsider, server) = (bed.pod(), bed.pod());
    let enrolled = server.enrol(&node);
    let _alive = Alive::new(&node);
    for (v4, port) in [(true, 8080), (false, 8080), (true, 9999)] {
        let to = SocketAddr::new(server.addr(v4), port);
        let client = dial(&outsider, to).unwrap();
        let (accepted, peer) = accept(&enrolled.listeners.inbound).unwrap();
        let local = accepted.local_addr().unwrap().as_socket().unwrap();
        assert_eq!((local.ip().to_canonical(), local.port()), (to.ip(), port));
        assert_eq!(peer.ip().to_canonical(), outsider.addr(v4));
        assert_eq!(peer.port(), client.local_addr().unwrap().port());
    }
    let stats = Stats::new(node.maps());
    assert_eq!(stats.counter(Hook::SkLookup, Outcome::Capture, Reason::Captured).unwrap(), 3);
}

#[test]
fn loopback_inside_the_pod_is_untouched() {
    let bed = bed!();
    let node = bed.node();
    let server = bed.pod();
    let _enrolled = server.enrol(&node);
    let _alive = Alive::new(&node);
    let stats = Stats::new(node.maps());
    let own = [(server.v4, 8081).into(), (server.v6, 8081).into()];
    for to in ["127.0.0.1:8080".parse().unwrap(), "[::1]:8080".parse().unwrap()].into_iter().chain(own) {
        let app: OwnedFd = server.run(|| TcpListener::bind(to).unwrap()).into();
        socket2::Socket::from(app.try_clone().unwrap()).set_nonblocking(true).unwrap();
        let _client = dial(&server, to).unwrap();
        accept(&app).unwrap_or_else(|error| panic!("{to}: {error}; {:?}", stats.counters().unwrap()));
    }
}

#[test]
fn the_agents_private_ports_are_closed_to_others() {
    let bed = bed!();
    let node = bed.node();
    let (outsider, server) = (bed.pod(), bed.pod());
    let _enrolled = server.enrol(&node);
    let _alive = Alive::new(&node);
    let private = ports::OUTBOUND.into_iter().chain([ports::INBOUND, ports::DNS]);
    for port in private {
        for v4 in [true, false] {
            let error = dial(&outsider, SocketAddr::new(server.addr(v4), port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "port {port}: {error}");
        }
    }
    let stats = Stats::new(node.maps());
    let tcp = stats.counter(Hook::SkLookup, Outcome::Drop, Reason::PrivatePort).unwrap();
    assert_eq!(tcp, 12);
    outsider.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"query", (server.v4, ports::DNS)).unwrap();
    });
    assert_eq!(stats.counter(Hook::SkLookup, Outcome::Drop, Reason::PrivatePort).unwrap(), tcp + 1);
}

#[test]
fn an_excluded_port_goes_to_the_app_and_the_tunnel_port_to_the_agent() {
    let bed = bed!();
    let node = bed.node();
    let (outsider, server) = (bed.pod(), bed.pod());
    let enrolled = server.enrol(&node);
    let mut config = server.config();
    config.inbound_ports.insert(9000, PortRule { excluded: true, ..PortRule::default() });
    node.update(enrolled.pod, &config).unwrap();
    let _alive = Alive::new(&node);
    let app = server.run(|| TcpListener::bind((server.v4, 9000)).unwrap());
    let _client = dial(&outsider, (server.v4, 9000).into()).unwrap();
    app.accept().unwrap();
    let _client = dial(&outsider, (server.v4, ports::HBONE).into()).unwrap();
    accept(&enrolled.listeners.hbone).unwrap();
}

#[test]
fn without_the_agent_open_ports_reach_the_app_and_closed_ones_are_refused() {
    let bed = bed!();
    let node = bed.node();
    let (outsider, server) = (bed.pod(), bed.pod());
    let enrolled = server.enrol(&node);
    // Fresh heartbeat, listener gone: the process was killed a moment ago.
    let alive = Alive::new(&node);
    drop(enrolled.listeners);
    let apps: Vec<_> =
        [8080, 8081].map(|port| server.run(|| TcpListener::bind((server.v4, port)).unwrap())).into();
    let _client = dial(&outsider, (server.v4, 8080).into()).unwrap();
    apps[0].accept().unwrap();
    drop(alive);

    let mut config = server.config();
    config.inbound_fail_closed = true;
    config.inbound_ports.insert(8081, PortRule { fail_closed: Some(false), ..PortRule::default() });
    node.update(enrolled.pod, &config).unwrap();
    let error = dial(&outsider, (server.v4, 8080).into()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    let _client = dial(&outsider, (server.v4, 8081).into()).unwrap();
    apps[1].accept().unwrap();
    let stats = Stats::new(node.maps());
    assert_eq!(stats.counter(Hook::SkLookup, Outcome::Drop, Reason::FailClosed).unwrap(), 1);
}

#[test]
fn each_pods_program_captures_for_that_pod_alone() {
    let bed = bed!();
    let node = bed.node();
    let (outsider, first, second) = (bed.pod(), bed.pod(), bed.pod());
    let enrolled = [first.enrol(&node), second.enrol(&node)];
    let _alive = Alive::new(&node);
    for (pod, enrolled) in [&first, &second].into_iter().zip(&enrolled) {
        let _client = dial(&outsider, (pod.v4, 8080).into()).unwrap();
        let (accepted, _) = accept(&enrolled.listeners.inbound).unwrap();
        assert_eq!(accepted.local_addr().unwrap().as_socket().unwrap().ip().to_canonical(), pod.v4);
    }
}

/// `BPF_PROG_TEST_RUN` refuses an interface for this program type, so the context is that of a lookup by another
/// program, which must never be captured or counted against the pod.
#[test]
fn a_lookup_that_is_no_packet_passes() {
    let bed = bed!();
    let node = bed.node();
    let server = bed.pod();
    let enrolled = server.enrol(&node);
    let _alive = Alive::new(&node);
    let program = program_of(&bed.bpffs, enrolled.pod);
    for port in [8080, 15001, 15008] {
        assert_eq!(test_run(&program, port), (1, 0), "port {port}");
    }
    let stats = Stats::new(node.maps());
    assert_eq!(stats.counter(Hook::SkLookup, Outcome::Pass, Reason::Loopback).unwrap(), 3);
}

/// The loaded program behind a pod's arrival pin.
fn program_of(bpffs: &std::path::Path, pod: u32) -> OwnedFd {
    let version = format!("v{:016x}", mesh_common::abi::VERSION);
    let pin = bpffs.join("nodemesh/test%2enode").join(version).join(format!("links/arrival-{pod}"));
    let link = aya::programs::links::PinnedLink::from_pin(&pin).unwrap();
    let link: aya::programs::links::FdLink = link.into();
    let id = link.info().unwrap().program_id();
    let program =
        aya::programs::loaded_programs().filter_map(Result::ok).find(|info| info.id() == id).unwrap();
    let fd = program.fd().unwrap().as_fd().try_clone_to_owned().unwrap();
    // The link handle must not detach on drop: it is pinned, so dropping only closes it.
    drop(link);
    fd
}

/// `struct bpf_sk_lookup` of the kernel's uapi.
#[repr(C)]
#[derive(Default)]
struct Context {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port: u16,
    pad: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress_ifindex: u32,
    end: u32,
}

/// Runs the program once on a made-up packet; returns its verdict and the cookie of the socket it chose.
#[expect(unsafe_code, reason = "aya cannot run this program type")]
fn test_run(program: &OwnedFd, port: u16) -> (u32, u64) {
    let mut context = Context {
        family: nix::libc::AF_INET as u32,
        protocol: 6,
        remote_ip4: u32::from_ne_bytes([10, 77, 200, 1]),
        remote_port: 40_000_u16.to_be(),
        local_ip4: u32::from_ne_bytes([10, 77, 0, 2]),
        local_port: u32::from(port),
        ..Context::default()
    };
    // SAFETY: integers only.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.ctx_in = (&raw const context) as u64;
    attr.test.ctx_size_in = 72;
    attr.test.ctx_out = (&raw mut context) as u64;
    attr.test.ctx_size_out = 72;
    // SAFETY: the buffers outlive the call and have the stated sizes.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_bpf,
            bpf_cmd::BPF_PROG_TEST_RUN as nix::libc::c_long,
            &raw mut attr,
            size_of::<bpf_attr>(),
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has filled `test`.
    (unsafe { attr.test.retval }, context.cookie)
}
