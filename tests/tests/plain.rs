//! The harness itself, without any agent: what later tests take for granted.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_tests::protocol::{DnsBy, Exchange, How, Load, Open, Serve};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Link, TestResult, ToolError, World, limit, require_root, test_name};
use nix::errno::Errno;

/// The errno that a refused or broken request ended with.
fn errno<T>(result: Result<T, ToolError>) -> Option<Errno> {
    result.err().and_then(|error| error.errno())
}

fn pods_reach_each_other(link: Link) -> TestResult {
    let world = World::named(test_name!()).nodes(&["a", "b"]).linked_by(link).start()?;
    let client = world.node("a")?.pod("client")?;
    let near = world.node("a")?.pod("near")?;
    let far = world.node("b")?.pod("far")?;
    for server in [&near, &far] {
        let _server = server.tool()?.serve("[::]:8080".parse()?, ServerOptions::named(server.name()))?;
        for (to, client_ip) in
            [(server.at4(8080), IpAddr::V4(client.ip4())), (server.at6(8080), IpAddr::V6(client.ip6()))]
        {
            let identity = client.tool()?.who(to)?;
            assert_eq!(identity.server, server.name());
            assert_eq!(identity.accepted_from.ip().to_canonical(), client_ip);
            assert_eq!(identity.peer, Some(identity.accepted_from));
        }
    }
    Ok(())
}

#[test]
fn routed_pods_reach_each_other_on_one_node_and_across_nodes() -> TestResult {
    require_root!();
    pods_reach_each_other(Link::Routed)
}

#[test]
fn bridged_pods_reach_each_other_on_one_node_and_across_nodes() -> TestResult {
    require_root!();
    pods_reach_each_other(Link::Bridged)
}

#[test]
fn every_way_to_connect_works() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let _server = server.tool()?.serve("[::]:80".parse()?, ServerOptions::named("it").fast_open())?;
    let tool = client.tool()?;
    for to in [server.at4(80), server.at6(80), server.at_mapped(80)] {
        for how in [How::Blocking, How::NonBlocking, How::IoUring] {
            let connection = tool.connect_as(Open::tcp_to(to), how.clone(), to)?;
            assert_eq!(connection.names()?.peer, Some(to), "{how:?}");
            assert_eq!(connection.who()?.server, "it", "{how:?}");
        }
        for how in [How::FastOpenMessage("who\n".into()), How::FastOpenConnect("who\n".into())] {
            let connection = tool.connect_as(Open::tcp_to(to), how.clone(), to)?;
            assert_eq!(connection.greeting()?.server, "it", "{how:?}");
        }
        let own_ip = if to.is_ipv4() { client.at4(0) } else { client.at6(0) };
        if to != server.at_mapped(80) {
            for open in [
                Open::tcp_to(to).bound_to(own_ip),
                Open::tcp_to(to).bound_to(own_ip).with_late_port(),
                Open::tcp_to(to).bound_to(SocketAddr::new(own_ip.ip(), 4000)),
                Open::tcp_to(to).on_device("eth0").marked(7),
            ] {
                let connection = tool.connect_as(open.clone(), How::Blocking, to)?;
                let seen = connection.who()?.accepted_from;
                let bound_port = open.bind.map_or(0, |bind| bind.port());
                assert!(bound_port == 0 || seen.port() == bound_port, "{open:?}: {seen}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_socket_that_was_refused_can_dial_again() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let _server = server.tool()?.serve(server.at4(80), ServerOptions::named("it"))?;
    let connection = client.tool()?.open(Open::tcp_to(server.at4(80)))?;
    assert_eq!(errno(connection.dial(server.at4(81), How::Blocking)), Some(Errno::ECONNREFUSED));
    connection.dial(server.at4(80), How::Blocking)?;
    assert_eq!(connection.who()?.server, "it");
    Ok(())
}

#[test]
fn streams_half_close_reset_and_carry_bulk() -> TestResult {
    require_root!();
    const BYTES: u64 = 3_000_001;
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let (client_tool, server_tool) = (client.tool()?, server.tool()?);
    let serve = |port: u16, serve: Serve| {
        server_tool.serve(server.at4(port), ServerOptions::named("it").serving(serve))
    };
    let _servers = [
        serve(1, Serve::Sink)?,
        serve(2, Serve::Source { bytes: BYTES })?,
        serve(3, Serve::Reset)?,
        serve(4, Serve::GreetAndClose)?,
        serve(5, Serve::Http)?,
    ];
    let upload = client_tool.connect(server.at4(1))?;
    upload.send_bulk(BYTES, 9)?;
    upload.shutdown_write()?;
    assert_eq!(upload.recv_line()?, format!("{BYTES}\n"));
    assert_eq!(client_tool.connect(server.at4(2))?.recv_bulk(BYTES + 1, 1)?, BYTES);
    let broken = client_tool.connect(server.at4(3))?;
    assert_eq!(errno(broken.recv(1)), Some(Errno::ECONNRESET));
    let greeted = client_tool.connect(server.at4(4))?;
    assert_eq!(greeted.greeting()?.accepted_from.ip(), IpAddr::V4(client.ip4()));
    assert_eq!(greeted.recv(1)?, "");
    let answer = client_tool.http_get(server.at4(5), "web", "/")?;
    assert_eq!(answer.status, 200);
    Ok(())
}

#[test]
fn datagrams_are_answered_and_seen() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a", "b"])?;
    let client = world.node("a")?.pod("client")?;
    let server = world.node("b")?.pod("server")?;
    let _server = server.tool()?.serve_udp("[::]:53".parse()?, "it")?;
    for to in [server.at4(53), server.at6(53), server.at_mapped(53)] {
        let connected = client.tool()?.open_udp(Open::udp_to(to))?;
        assert_eq!(connected.connect(to)?.peer, Some(to));
        connected.send("hello")?;
        assert_eq!(connected.recv_identity()?.0.server, "it");
        let unconnected = client.tool()?.open_udp(Open::udp_to(to))?;
        unconnected.send_to(to, "hello")?;
        assert_eq!(unconnected.recv_identity()?.1, to);
    }
    // Nobody answers DNS here: where the kernel can tell, the query fails at once.
    for by in [DnsBy::ConnectedUdp, DnsBy::Tcp] {
        assert!(client.tool()?.dns(server.at4(54), "web.default.svc.cluster.local.", "A", by).is_err());
    }
    Ok(())
}

#[test]
fn nothing_reaches_outside_and_is_refused_rather_than_lost() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a", "b"])?;
    let node = world.node("a")?;
    let destinations: [SocketAddr; 7] = [
        "10.96.0.1:80".parse()?, // a service that no mesh answers for
        "[fd00:96::1]:80".parse()?,
        "10.244.1.200:80".parse()?, // a pod that does not exist
        "10.244.77.1:80".parse()?,  // a node that does not exist
        "192.0.2.1:80".parse()?,    // outside
        "1.1.1.1:53".parse()?,
        "[2001:db8::1]:80".parse()?,
    ];
    // A pod for each: the node sends any one peer only a few ICMP errors a second.
    let pods = node.pods_in_bulk("pod", destinations.len())?;
    std::thread::scope(|scope| {
        let dialling = pods.iter().zip(destinations).map(|(pod, to)| {
            let from_pod = scope.spawn(move || errno(pod.tool().and_then(|tool| tool.connect(to))));
            let from_host = errno(node.host().tool().and_then(|tool| tool.connect(to)));
            (to, from_pod, from_host)
        });
        for (to, from_pod, from_host) in dialling.collect::<Vec<_>>() {
            for refused in [from_pod.join().unwrap(), from_host] {
                assert!(
                    matches!(refused, Some(Errno::EHOSTUNREACH | Errno::ENETUNREACH)),
                    "{to}: {refused:?}"
                );
            }
        }
    });
    Ok(())
}

#[test]
fn processes_of_a_pod_are_in_its_cgroup_and_see_its_resolver() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let pod = world.node("a")?.pod("shop/web")?;
    let pid = pod.tool()?.pid();
    assert_eq!(pod.cgroup().processes(), [i32::try_from(pid)?]);
    let resolver = std::fs::read_to_string(format!("/proc/{pid}/root/etc/resolv.conf"))?;
    assert!(resolver.contains("search shop.svc.cluster.local svc.cluster.local cluster.local"), "{resolver}");
    assert_ne!(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(), resolver);
    Ok(())
}

#[test]
fn outsiders_reach_pods_and_a_cut_wire_stops_them() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a", "b"])?;
    let server = world.node("b")?.pod("server")?;
    let outsider = world.outsider("outsider")?;
    let _server = server.tool()?.serve("[::]:80".parse()?, ServerOptions::named("it"))?;
    for (to, from) in [(server.at4(80), outsider.at4(0)), (server.at6(80), outsider.at6(0))] {
        assert_eq!(outsider.tool()?.who(to)?.accepted_from.ip().to_canonical(), from.ip());
    }
    world.set_wire("b", false)?;
    let cut = outsider.tool()?.open(Open::tcp_to(server.at4(80)))?;
    assert!(cut.dial_within(server.at4(80), How::Blocking, Duration::from_millis(300)).is_err());
    world.set_wire("b", true)?;
    assert_eq!(outsider.tool()?.who(server.at6(80))?.server, "it");
    Ok(())
}

#[test]
fn a_forged_syn_is_answered_to_the_address_it_claims() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (liar, victim, server) = (node.pod("liar")?, node.pod("victim")?, node.pod("server")?);
    let _server = server.tool()?.serve("[::]:80".parse()?, ServerOptions::named("it"))?;
    for (claimed, to) in [(victim.at4(5555), server.at4(80)), (victim.at6(5555), server.at6(80))] {
        let capture = victim.tool()?.capture()?;
        liar.tool()?.forge_syn(claimed, to)?;
        let packets = mesh_tests::eventually(
            Duration::from_secs(2),
            || capture.packets().unwrap_or_default(),
            |packets| packets.iter().any(|packet| packet.flags & 4 != 0),
        )?;
        let synack = packets.iter().find(|packet| packet.flags == 18);
        assert_eq!(
            synack.map(|packet| (packet.from, packet.to, packet.outgoing)),
            Some((to, claimed, false))
        );
        // The victim knows of no such connection and resets it.
        assert!(packets.iter().any(|packet| packet.flags & 4 != 0 && packet.outgoing));
    }
    Ok(())
}

#[test]
fn a_load_counts_what_happened() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let _server = server.tool()?.serve(server.at4(80), ServerOptions::named("it"))?;
    let load = |exchange, port| Load {
        targets: vec![server.at4(port)],
        per_second: 500,
        workers: 4,
        duration_ms: 0,
        exchange,
        timeout_ms: u64::try_from(limit(Duration::from_secs(1)).as_millis()).unwrap_or(u64::MAX),
    };
    for exchange in [Exchange::ConnectAndAsk, Exchange::KeepOpen, Exchange::ConnectOnly] {
        let running = client.tool()?.start_load(load(exchange, 80))?;
        mesh_tests::eventually(
            Duration::from_secs(5),
            || running.report().map(|r| r.ok).unwrap_or(0),
            |ok| *ok > 100,
        )?;
        let report = running.stop()?;
        assert_eq!(report.failures(), 0, "{report:?}");
        assert!(report.p50_us > 0 && report.p50_us <= report.p99_us, "{report:?}");
        let expected = if exchange == Exchange::KeepOpen { 4 } else { report.ok };
        assert_eq!(report.connects, expected, "{exchange:?}");
    }
    let refused = client.tool()?.start_load(load(Exchange::ConnectOnly, 81))?;
    mesh_tests::eventually(
        Duration::from_secs(5),
        || refused.report().map(|r| r.failures()).unwrap_or(0),
        |failed| *failed > 0,
    )?;
    assert_eq!(refused.stop()?.failed.keys().collect::<Vec<_>>(), ["connect: ECONNREFUSED"]);
    Ok(())
}

#[test]
fn a_removed_pods_address_can_be_given_to_another() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let node = world.node("a")?;
    let (client, old) = (node.pod("client")?, node.pod("old")?);
    let _server = old.tool()?.serve(old.at4(80), ServerOptions::named("old"))?;
    assert_eq!(client.tool()?.who(old.at4(80))?.server, "old");
    node.remove_pod(&old)?;
    let heir = node.pod_builder("heir").slot(old.slot()).start()?;
    assert_eq!(heir.ip4(), old.ip4());
    assert_ne!(heir.uid(), old.uid());
    let _server = heir.tool()?.serve(heir.at4(80), ServerOptions::named("heir"))?;
    assert_eq!(client.tool()?.who(old.at4(80))?.server, "heir");
    Ok(())
}

#[test]
fn a_hundred_pods_come_up_in_a_few_seconds_and_leave_nothing_behind() -> TestResult {
    require_root!();
    let world = World::with_nodes(test_name!(), &["a"])?;
    let began = Instant::now();
    let pods = world.node("a")?.pods_in_bulk("many", 100)?;
    assert!(began.elapsed() < limit(Duration::from_secs(20)), "{:?}", began.elapsed());
    let first = &pods[0];
    let _server = first.tool()?.serve("[::]:80".parse()?, ServerOptions::named("first"))?;
    assert_eq!(pods[99].tool()?.who(first.at6(80))?.server, "first");
    let paths: Vec<_> = pods
        .iter()
        .flat_map(|pod| [pod.netns().path().to_path_buf(), pod.cgroup().path().to_path_buf()])
        .chain([world.directory().to_path_buf()])
        .collect();
    drop(world);
    let left: Vec<_> = paths.iter().filter(|path| path.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}
