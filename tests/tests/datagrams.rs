//! UDP to services: balanced in the kernel, answers shown as coming from the address that was dialled.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use mesh_tests::protocol::Open;
use mesh_tests::{Pod, Server, Shop, TestResult, ToolError, require_agent, test_name};

fn serve(pod: &Pod) -> Result<Server, ToolError> {
    pod.tool()?.serve_udp(SocketAddr::from(([0u16; 8], 5000)), pod.name())
}

#[test]
fn connected_and_unconnected_sockets_reach_services_by_every_family() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let servers = [shop.pod("a", "near")?, shop.pod("b", "far")?];
    let udp = |name: &str| shop.service_with(name, 500, |service| service.udp_port("game", 500, 5000));
    let vips = [udp("near")?, udp("far")?];
    shop.start_agents()?;
    let _servers = [serve(&servers[0])?, serve(&servers[1])?];
    let tool = client.tool()?;
    for (server, vip) in servers.iter().zip(vips) {
        for to in vip.all() {
            let connected = tool.open_udp(Open::udp_to(to))?;
            assert_eq!(connected.connect(to)?.peer, Some(to), "{to}: getpeername");
            for _ in 0..3 {
                connected.send("hello")?;
                let (identity, from) = connected.recv_identity()?;
                assert_eq!((identity.server.as_str(), from), (server.name(), to), "connected");
                let ip = identity.accepted_from.ip().to_canonical();
                assert!([client.at4(0).ip(), client.at6(0).ip()].contains(&ip), "{identity:?}");
            }
            let unconnected = tool.open_udp(Open::udp_to(to))?;
            for _ in 0..3 {
                unconnected.send_to(to, "hello")?;
                let (identity, from) = unconnected.recv_identity()?;
                assert_eq!((identity.server.as_str(), from), (server.name(), to), "unconnected");
            }
        }
    }
    Ok(())
}

#[test]
fn one_unconnected_socket_talks_to_several_services() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let servers = [shop.pod("a", "near")?, shop.pod("b", "far")?];
    let udp = |name: &str| shop.service_with(name, 500, |service| service.udp_port("game", 500, 5000));
    let vips = [udp("near")?, udp("far")?];
    shop.start_agents()?;
    let _servers = [serve(&servers[0])?, serve(&servers[1])?];
    let tool = client.tool()?;
    for targets in [[vips[0].v4, vips[1].v4], [vips[0].v6, vips[1].v6], [vips[0].mapped(), vips[1].mapped()]]
    {
        let socket = tool.open_udp(Open::udp_to(targets[0]))?;
        // Both questions are under way before the first answer is read.
        for to in targets {
            socket.send_to(to, "hello")?;
        }
        let mut answers = BTreeSet::new();
        for _ in targets {
            let (identity, from) = socket.recv_identity()?;
            answers.insert((from, identity.server));
        }
        let expected = targets.into_iter().zip(["near".to_owned(), "far".to_owned()]).collect();
        assert_eq!(answers, expected);
    }
    Ok(())
}

#[test]
fn a_socket_keeps_its_backend_and_sockets_spread() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let backends: Vec<Pod> = (0..3)
        .map(|number| shop.backend("a", &format!("game-{number}"), "game"))
        .collect::<Result<_, _>>()?;
    let vip = shop.service_with("game", 500, |service| service.udp_port("game", 500, 5000))?;
    shop.start_agents()?;
    let _servers: Vec<Server> = backends.iter().map(serve).collect::<Result<_, _>>()?;
    let tool = client.tool()?;
    let mut used = BTreeSet::new();
    for _ in 0..40 {
        let socket = tool.open_udp(Open::udp_to(vip.v4))?;
        let mut of_this_socket = BTreeSet::new();
        for _ in 0..3 {
            socket.send_to(vip.v4, "hello")?;
            of_this_socket.insert(socket.recv_identity()?.0.server);
        }
        assert_eq!(of_this_socket.len(), 1, "{of_this_socket:?}");
        used.extend(of_this_socket);
    }
    assert_eq!(used.len(), 3, "{used:?}");
    Ok(())
}

#[test]
fn other_datagrams_are_left_alone() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let server = shop.pod("b", "server")?;
    shop.start_agents()?;
    let _server = serve(&server)?;
    let outsider = shop.world().outsider("outsider")?;
    for to in [server.at4(5000), server.at6(5000)] {
        for place in [mesh_tests::Place::clone(&client), outsider.clone()] {
            let socket = place.tool()?.open_udp(Open::udp_to(to))?;
            socket.send_to(to, "hello")?;
            let (identity, from) = socket.recv_identity()?;
            assert_eq!((identity.server.as_str(), from), ("server", to));
            let own = [place.at4(0).ip(), place.at6(0).ip()];
            assert!(own.contains(&identity.accepted_from.ip().to_canonical()), "{identity:?}");
        }
    }
    Ok(())
}
