//! Pods that try to gain something by marks, forged addresses, private ports or inherited addresses.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{How, Open};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Place, Shop, TestResult, eventually, require_agent, shop, test_name};
use nix::errno::Errno;

/// Marks that meshes use for their own traffic.
const MARKS: [u32; 4] = [1, 0x539, 1337, 0x0200];

#[test]
fn a_mark_is_not_a_pass() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    shop.mode(MtlsMode::Strict)?;
    let web = shop.pod("a", "web")?;
    let vip = shop.service("web", 80)?;
    let remote = shop.pod("b", "remote")?;
    let near = shop.pod("a", "near")?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let outsider = shop.world().outsider("outsider")?;
    shop.start_agents()?;
    let _server = shop.serve(&web)?;
    for mark in MARKS {
        for place in [Place::clone(&plain), outsider.clone()] {
            for to in [web.at4(8080), web.at6(8080)] {
                let marked = place.tool()?.connect_as(Open::tcp_to(to).marked(mark), How::Blocking, to);
                let answer = marked.and_then(|connection| connection.who());
                assert!(answer.is_err(), "{} with mark {mark}: {answer:?}", place.name());
            }
        }
        // Nor does it lead past the mesh: the service's address means nothing without it, and a STRICT server takes
        // clients of other nodes through it alone.
        for client in [&near, &remote] {
            for to in vip.all() {
                let connection =
                    client.tool()?.connect_as(Open::tcp_to(to).marked(mark), How::Blocking, to)?;
                assert_eq!(connection.who()?.server, "web", "{}", client.name());
            }
        }
    }
    Ok(())
}

#[test]
fn a_forged_source_address_opens_nothing() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    shop.mode(MtlsMode::Strict)?;
    let (web, victim) = (shop.pod("a", "web")?, shop.pod("a", "victim")?);
    let meshed_liar = shop.pod("a", "liar")?;
    let plain_liar = shop.unmeshed_pod("a", "plain-liar")?;
    let outsider = shop.world().outsider("outsider")?;
    let agents = shop.start_agents()?;
    let server = shop.serve(&web)?;
    // The victim is admitted, so a verdict for it exists and tickets are written when it dials.
    for _ in 0..3 {
        victim.tool()?.who(web.at4(8080))?;
        victim.tool()?.who(web.at6(8080))?;
    }
    let admitted = server.accepted()?.len();
    for alive in [true, false] {
        if !alive {
            agents[0].kill9();
        }
        let capture = victim.tool()?.capture()?;
        for (port, place) in
            (40_000..).zip([Place::clone(&meshed_liar), Place::clone(&plain_liar), outsider.clone()])
        {
            for (claimed, to) in [(victim.at4(port), web.at4(8080)), (victim.at6(port), web.at6(8080))] {
                place.tool()?.forge_syn(claimed, to)?;
            }
        }
        // Each is answered to the victim or dropped; wait for the victim's own next exchange behind them.
        victim.tool()?.who(web.at4(8080))?;
        if !alive {
            let synacks = capture.packets()?.into_iter().filter(|packet| packet.flags & 18 == 18);
            let to_forged: Vec<_> =
                synacks.filter(|packet| packet.to.port() >= 40_000 && packet.to.port() < 40_003).collect();
            assert!(to_forged.is_empty(), "a strict pod without an agent answered {to_forged:?}");
        }
    }
    let accepted = server.accepted()?;
    let forged =
        accepted[admitted..].iter().filter(|seen| (40_000..40_003).contains(&seen.accepted_from.port()));
    assert_eq!(forged.count(), 0, "{accepted:?}");
    Ok(())
}

#[test]
fn the_agents_private_ports_are_closed_to_everybody_else() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let web = shop.pod("a", "web")?;
    let (near, remote) = (shop.pod("a", "near")?, shop.pod("b", "remote")?);
    let plain = shop.unmeshed_pod("a", "plain")?;
    let outsider = shop.world().outsider("outsider")?;
    shop.start_agents()?;
    let listening = web.sockets();
    let places = [Place::clone(&near), Place::clone(&remote), Place::clone(&plain), outsider];
    for place in &places {
        for port in [15001, 15002, 15003, 15004, 15006, 15053] {
            assert!(listening.contains(&format!(":{port} ")), "no port {port} to protect:\n{listening}");
            for to in [web.at4(port), web.at6(port)] {
                let dialled = place.tool()?.connect(to);
                // A meshed client's own agent may take the connection; it must lead nowhere.
                let answer = dialled.and_then(|connection| connection.who());
                let errno = answer.as_ref().err().and_then(mesh_tests::ToolError::errno);
                assert!(
                    matches!(
                        errno,
                        Some(Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno::EPERM)
                    ),
                    "{} to {to}: {answer:?}",
                    place.name()
                );
            }
        }
        for to in [web.at4(15053), web.at6(15053)] {
            let name = "web.shop.svc.cluster.local.";
            let answer = place.tool()?.dns(to, name, "A", mesh_tests::protocol::DnsBy::ConnectedUdp);
            assert!(answer.is_err(), "{} to {to}: {answer:?}", place.name());
        }
    }
    Ok(())
}

#[test]
fn the_heir_of_a_deleted_clients_address_inherits_nothing() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    shop.mode(MtlsMode::Strict)?;
    let web = shop.pod("a", "web")?;
    let old = shop.pod("a", "old")?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&web)?;
    for _ in 0..3 {
        old.tool()?.who(web.at4(8080))?;
        old.tool()?.who(web.at6(8080))?;
    }
    let node = shop.world().node("a")?;
    shop.world().manifests().delete("Pod", shop::NAMESPACE, "old")?;
    node.remove_pod(&old)?;
    let heir = node.pod_builder("heir").slot(old.slot()).start()?;
    // Whatever the agent still has to do, there is no moment at which the heir passes for the old pod.
    for _ in 0..20 {
        for to in [web.at4(8080), web.at6(8080)] {
            let answer = heir.tool()?.who(to);
            assert!(answer.is_err(), "{answer:?}");
        }
    }
    let gone = || agents[0].pod_status(&old).map(|row| row["state"].clone());
    eventually(Duration::from_secs(5), gone, |state| state.as_ref().is_ok_and(|state| state != "enrolled"))??;
    assert!(heir.tool()?.who(web.at4(8080)).is_err());
    Ok(())
}

#[test]
fn the_heir_of_a_deleted_servers_address_gets_none_of_its_verdicts() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let old = shop.pod("a", "old")?;
    let agents = shop.start_agents()?;
    let server = shop.serve(&old)?;
    for _ in 0..3 {
        client.tool()?.who(old.at4(8080))?;
    }
    drop(server);
    let node = shop.world().node("a")?;
    shop.world().manifests().delete("Pod", shop::NAMESPACE, "old")?;
    node.remove_pod(&old)?;
    let heir = node.pod_builder("shop/heir").slot(old.slot()).start()?;
    shop.world().manifests().apply(heir.manifest())?;
    agents[0].wait_enrolled([&heir])?;
    let _server = heir.tool()?.serve(SocketAddr::from(([0u16; 8], 8080)), ServerOptions::named("heir"))?;
    // The first connection to the new pod is judged anew, so it goes through the agent.
    assert_eq!(client.tool()?.who(heir.at4(8080))?.server, "heir");
    assert!(shop::opened(&agents[0], &client, &heir, "proxy")? >= 1);
    Ok(())
}
