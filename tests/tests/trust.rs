//! What cannot be forged, and that each attempt is counted: sources, private ports, probes, HBONE, old verdicts.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{Open, Packet};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Counters, Failure, Place, Shop, TestResult, ToolError, eventually, require_agent, shop, test_name,
};
use nix::errno::Errno;

const SOON: Duration = Duration::from_secs(5);

/// The bit of a reset among the TCP flags.
const RST: u8 = 4;

fn refused<T: std::fmt::Debug>(outcome: Result<T, ToolError>, what: &str) {
    let errno = outcome.as_ref().err().and_then(ToolError::errno);
    let ends = [Errno::ECONNREFUSED, Errno::ECONNRESET, Errno::EPIPE, Errno::EPERM];
    assert!(errno.is_some_and(|errno| ends.contains(&errno)), "{what}: {outcome:?}");
}

#[test]
fn a_forged_source_is_judged_as_a_stranger_and_opens_nothing() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    shop.mode(MtlsMode::Strict)?;
    let node = shop.world().node("a")?;
    let (web, victim) = (shop.pod("a", "web")?, shop.pod("a", "victim")?);
    let liar = shop.unmeshed_pod("a", "liar")?;
    let agent = node.agent().start()?;
    let server = shop.serve(&web)?;
    let _held = [
        node.kernel().dial_directly(&victim, web.at4(8080))?,
        node.kernel().dial_directly(&victim, web.at6(8080))?,
    ];
    let admitted = server.accepted()?.len();
    // What the hooks count of an attempt, once they have counted anything.
    let count = |attempt: &dyn Fn() -> TestResult| -> Result<Counters, Failure> {
        let before = node.kernel().counters()?;
        attempt()?;
        let counted = || node.kernel().counters().map(|now| now.since(&before));
        let any = |counted: &Result<Counters, _>| counted.as_ref().is_ok_and(|c| *c != Counters::default());
        Ok(eventually(SOON, counted, any)??)
    };
    for alive in [true, false] {
        if !alive {
            agent.kill9();
        }
        for (claimed, to) in [(victim.at4(41_000), web.at4(8080)), (victim.at6(41_001), web.at6(8080))] {
            let counted = count(&|| Ok(liar.tool()?.forge_syn(claimed, to)?))?;
            assert_eq!(counted.outcome("pass"), 0, "{claimed}, agent alive: {alive}: {counted:?}");
            let fate = if alive { ("capture", "captured") } else { ("drop", "fail_closed") };
            assert!(counted.count_at("sk_lookup", fate.0, fate.1) > 0, "agent alive: {alive}: {counted:?}");
        }
        // The server's very own address: IPv6 lets such a packet in, and nothing tells it from the pod's own
        // traffic. But the answer goes to the pod itself, which resets what it has not asked for.
        let capture = web.tool()?.capture()?;
        let counted = count(&|| Ok(liar.tool()?.forge_syn(web.at6(41_002), web.at6(8080))?))?;
        assert_eq!(counted.count("pass", "ticket"), 0, "{counted:?}");
        let reset = |packets: &Result<Vec<Packet>, ToolError>| {
            let own = |packet: &&Packet| packet.from == web.at6(41_002) && packet.to == web.at6(8080);
            packets
                .as_ref()
                .is_ok_and(|packets| packets.iter().filter(own).any(|packet| packet.flags & RST != 0))
        };
        eventually(SOON, || capture.packets(), reset)??;
    }
    let accepted = server.accepted()?;
    assert_eq!(accepted.len(), admitted, "{accepted:?}");
    Ok(())
}

#[test]
fn knocking_at_the_agents_ports_is_dropped_and_counted_whoever_knocks() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let web = shop.pod("a", "web")?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let outsider = shop.world().outsider("outsider")?;
    let agent = node.agent().start()?;
    let ports = [15001, 15002, 15003, 15004, 15006, 15053];
    let places = [Place::clone(&plain), outsider, node.host().clone(), node.kubelet().clone()];
    for alive in [true, false] {
        if !alive {
            agent.kill9();
        }
        for place in &places {
            let before = node.kernel().counters()?;
            for port in ports {
                for to in [web.at4(port), web.at6(port)] {
                    let errno = place.tool()?.connect(to).err().and_then(|error| error.errno());
                    assert_eq!(errno, Some(Errno::ECONNREFUSED), "{} to {to}", place.name());
                }
            }
            for to in [web.at4(15053), web.at6(15053)] {
                let socket = place.tool()?.open_udp(Open::udp_to(to))?;
                socket.connect(to)?;
                socket.send("hello")?;
                refused(socket.recv_from(), "a datagram");
            }
            let counted = node.kernel().counters()?.since(&before);
            assert!(
                counted.count_at("sk_lookup", "drop", "private_port") >= 14,
                "{}: {counted:?}",
                place.name()
            );
        }
    }
    Ok(())
}

#[test]
fn a_pod_that_dials_its_own_agents_ports_gets_nowhere() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let pod = shop.pod("a", "pod")?;
    let agent = node.agent().start()?;
    let _server = shop.serve(&pod)?;
    let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    for (to, reason) in [
        (pod.at4(15001), "original_dst_miss"),
        (pod.at6(15002), "original_dst_miss"),
        (loopback(15004), "original_dst_miss"),
        (pod.at4(15006), "misdirected"),
        (loopback(15006), "misdirected"),
    ] {
        let counted = || agent.metric(&["mesh_proxy_connections_closed", &format!("reason=\"{reason}\"")]);
        let before = counted()?;
        refused(pod.tool()?.who(to), "a listener of the agent");
        eventually(SOON, counted, |now| now.as_ref().is_ok_and(|now| *now > before))??;
    }
    // The agent has not been led to dial itself in circles.
    let open = || agent.metric(&["mesh_proxy_connections_open"]);
    eventually(SOON, open, |open| open.as_ref().is_ok_and(|open| open.abs() < f64::EPSILON))??;
    assert_eq!(pod.tool()?.who(pod.at4(8080))?.server, "pod");
    Ok(())
}

#[test]
fn plaintext_at_the_hbone_port_reaches_nobody() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let web = shop.pod("a", "web")?;
    let remote = shop.pod("b", "remote")?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let agents = shop.start_agents()?;
    let server = shop.serve(&web)?;
    for mode in [MtlsMode::Permissive, MtlsMode::Strict] {
        shop.mode(mode)?;
        for place in [Place::clone(&plain), Place::clone(&remote)] {
            for to in [web.at4(15008), web.at6(15008)] {
                let before = node.kernel().counters()?;
                // The listener is there, and hears that this is no TLS.
                let answer = place.tool()?.who(to);
                assert!(answer.is_err(), "{}: {answer:?}", place.name());
                let counted = node.kernel().counters()?.since(&before);
                // What a meshed pod dials goes through a tunnel, which may be there already.
                let arrived = counted.count_at("sk_lookup", "pass", "hbone") > 0;
                assert!(arrived || place.name() == "remote", "{}: {counted:?}", place.name());
                assert_eq!(counted.outcome("capture"), 0, "{counted:?}");
            }
        }
    }
    agents[0].kill9();
    for to in [web.at4(15008), web.at6(15008)] {
        let errno = plain.tool()?.connect(to).err().and_then(|error| error.errno());
        assert_eq!(errno, Some(Errno::ECONNREFUSED));
    }
    assert!(server.accepted()?.is_empty());
    Ok(())
}

#[test]
fn only_the_kubelets_exact_cgroup_makes_a_probe() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    shop.mode(MtlsMode::Strict)?;
    let node = shop.world().node("a")?;
    let web = node.pod("shop/web")?;
    shop.world().manifests().apply(web.manifest().port("http", 8080).tcp_probe(8080))?;
    let below = node.below_the_kubelet("pod")?;
    let agent = node.agent().start()?;
    let _servers = [
        shop.serve(&web)?,
        web.tool()?.serve(SocketAddr::from(([0u16; 8], 8081)), ServerOptions::named("other"))?,
    ];
    for alive in [true, false] {
        if !alive {
            agent.kill9();
        }
        for (probed, other) in [(web.at4(8080), web.at4(8081)), (web.at6(8080), web.at6(8081))] {
            let before = node.kernel().counters()?;
            assert_eq!(node.kubelet().tool()?.who(probed)?.server, "web", "agent alive: {alive}");
            let counted = node.kernel().counters()?.since(&before);
            assert_eq!(counted.count_at("sk_lookup", "pass", "ticket"), 1, "{counted:?}");
            for (place, to) in [(node.kubelet(), other), (node.host(), probed), (&below, probed)] {
                refused(place.tool()?.who(to), &format!("{} to {to}", place.name()));
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_deleted_pod_had_in_the_kernel_is_gone() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service_with("web", 80, |service| service.port("http", 80, 8080).session_affinity(600))?;
    let agent = node.agent().start()?;
    let _server = shop.serve(&web)?;
    let held = node.kernel().dial_directly(&client, vip.v4)?;
    client.tool()?.getaddrinfo("web.shop.svc.cluster.local")?;
    let cookie = agent.pod_status(&client)?["netns_cookie"].as_u64();
    let cookie = cookie.ok_or_else(|| anyhow::anyhow!("no cookie"))?.to_le_bytes();
    let address = client.ip4().octets();
    // Keys hold the pod's cookie or its address; what maps of the agent's are about it?
    let about = || -> Result<Vec<&str>, Failure> {
        let mut about = Vec::new();
        for map in ["PODS", "VERDICTS", "TICKETS", "TICKETS_USED", "ORIG_DST", "AFFINITY", "DNS_ORIG"] {
            let found = node.kernel().entries(map)?.into_iter().any(|(key, _)| {
                let holds = |part: &[u8]| key.windows(part.len()).any(|window| window == part);
                holds(&cookie) || holds(&address)
            });
            about.extend(found.then_some(map));
        }
        Ok(about)
    };
    for map in ["PODS", "VERDICTS", "AFFINITY"] {
        assert!(about()?.contains(&map), "{map} should know the pod: {:?}", about()?);
    }
    drop(held);
    shop.world().manifests().delete("Pod", shop::NAMESPACE, "client")?;
    node.remove_pod(&client)?;
    eventually(
        SOON,
        || about().map_err(|error| format!("{error:?}")),
        |about| about.as_ref().is_ok_and(Vec::is_empty),
    )?
    .map_err(anyhow::Error::msg)?;
    Ok(())
}
