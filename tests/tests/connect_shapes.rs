//! Every way in which an application may connect works in the mesh as it does without.

use std::net::SocketAddr;

use mesh_tests::protocol::{How, Open};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Pod, Shop, TestResult, ToolError, require_agent, test_name};
use nix::errno::Errno;

/// A client, and the addresses of a service on its node and of one on another.
struct Scene {
    client: Pod,
    targets: Vec<SocketAddr>,
    _servers: Vec<mesh_tests::Server>,
    shop: Shop,
}

impl Scene {
    fn set(test: &str) -> Result<Self, mesh_tests::Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let client = shop.pod("a", "client")?;
        let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
        let (near_vip, far_vip) = (shop.service("near", 80)?, shop.service("far", 80)?);
        shop.start_agents()?;
        let serve = |pod: &Pod| -> Result<mesh_tests::Server, ToolError> {
            let options = ServerOptions::named(pod.name()).fast_open();
            pod.tool()?.serve(SocketAddr::from(([0u16; 8], 8080)), options)
        };
        let servers = vec![serve(&near)?, serve(&far)?];
        let targets = [near_vip.all(), far_vip.all()].concat();
        Ok(Self { client, targets, _servers: servers, shop })
    }

    /// Dial each target three times in one way: first through the agent, later perhaps Direct.
    fn dial_all(&self, how: &How, open: impl Fn(SocketAddr) -> Open) -> TestResult {
        for to in self.targets.iter().flat_map(|to| [*to; 3]) {
            let connection = self.client.tool()?.connect_as(open(to), how.clone(), to)?;
            let seen = match how {
                How::FastOpenMessage(_) | How::FastOpenConnect(_) => connection.greeting()?,
                _ => connection.who()?,
            };
            assert!(["near", "far"].contains(&seen.server.as_str()), "{to}");
            assert_eq!(connection.names()?.peer, Some(to), "{how:?}");
        }
        Ok(())
    }

    fn own(&self, to: SocketAddr) -> SocketAddr {
        match to {
            SocketAddr::V4(_) => self.client.at4(0),
            SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => self.client.at_mapped(0),
            SocketAddr::V6(_) => self.client.at6(0),
        }
    }
}

#[test]
fn blocking_non_blocking_and_io_uring_connects() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    for how in [How::Blocking, How::NonBlocking, How::IoUring] {
        scene.dial_all(&how, Open::tcp_to)?;
    }
    Ok(())
}

#[test]
fn both_forms_of_fast_open() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    for how in [How::FastOpenMessage("who\n".into()), How::FastOpenConnect("who\n".into())] {
        scene.dial_all(&how, Open::tcp_to)?;
    }
    // With a server side that grants cookies, the second connection to it carries data in its SYN.
    for pod in scene.shop.world().node("a")?.pods() {
        pod.sysctl("ipv4/tcp_fastopen", "3")?;
    }
    for how in [How::FastOpenMessage("who\n".into()), How::FastOpenConnect("who\n".into())] {
        scene.dial_all(&how, Open::tcp_to)?;
    }
    Ok(())
}

#[test]
fn a_source_bound_before_connect_is_kept() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    scene.dial_all(&How::Blocking, |to| Open::tcp_to(to).bound_to(scene.own(to)))?;
    scene.dial_all(&How::Blocking, |to| Open::tcp_to(to).bound_to(scene.own(to)).with_late_port())?;
    scene.dial_all(&How::Blocking, |to| {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        Open::tcp_to(to).bound_to(any)
    })?;
    scene.dial_all(&How::Blocking, |to| Open::tcp_to(to).on_device("eth0"))?;
    for (number, to) in (0u16..).zip(&scene.targets) {
        let port = 20_000 + number;
        let open = Open::tcp_to(*to).bound_to(SocketAddr::new(scene.own(*to).ip(), port));
        let connection = scene.client.tool()?.connect_as(open, How::Blocking, *to)?;
        assert_eq!(connection.names()?.local.map(|local| local.port()), Some(port), "{to}");
        connection.who()?;
    }
    Ok(())
}

#[test]
fn one_bound_source_port_reaches_several_destinations_at_once() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let tool = scene.client.tool()?;
    // The two services by IPv4, then by IPv6: pairs that differ in their destination only.
    for (port, pair) in [(21_000, [0, 3]), (21_001, [1, 4])] {
        let mut connections = Vec::new();
        for to in pair.map(|index| scene.targets[index]) {
            let own = SocketAddr::new(scene.own(to).ip(), port);
            let open = Open::tcp_to(to).sharing_its_address().bound_to(own);
            connections.push((to, tool.connect_as(open, How::Blocking, to)?));
        }
        for (to, connection) in &connections {
            assert_eq!(connection.names()?.local.map(|local| local.port()), Some(port));
            assert_eq!(connection.names()?.peer, Some(*to));
        }
        let mut seen = Vec::new();
        for (_, connection) in &connections {
            seen.push(connection.who()?.server);
        }
        assert_eq!(seen, ["near", "far"]);
    }
    Ok(())
}

#[test]
fn a_socket_that_was_refused_dials_something_else_next() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let nobody = scene.shop.service("nobody", 80)?;
    let tool = scene.client.tool()?;
    // The service exists from now on for the agents too: it refuses instead of being unknown.
    mesh_tests::eventually(
        std::time::Duration::from_secs(5),
        || tool.connect(nobody.v4).err().and_then(|error| error.errno()),
        |errno| *errno == Some(Errno::ECONNREFUSED) || *errno == Some(Errno::EPERM),
    )?;
    for (index, refusing) in [(0, nobody.v4), (1, nobody.v6), (2, nobody.mapped())] {
        for to in [scene.targets[index], scene.targets[index + 3]] {
            let connection = tool.open(Open::tcp_to(to))?;
            assert!(connection.dial(refusing, How::Blocking).is_err(), "{refusing}");
            connection.dial(to, How::Blocking)?;
            assert_eq!(connection.names()?.peer, Some(to));
            connection.who()?;
        }
    }
    Ok(())
}

#[test]
fn closed_ports_refuse_and_do_not_hang() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let pods = [scene.shop.world().node("a")?.pods(), scene.shop.world().node("b")?.pods()].concat();
    for pod in pods.iter().filter(|pod| pod.name() != "client") {
        for to in [pod.at4(7), pod.at6(7)] {
            // A proxied connect succeeds before the far end is known, then ends; both are refusals.
            let refused = scene.client.tool()?.connect(to).and_then(|connection| connection.who());
            let errno = refused.err().and_then(|error| error.errno());
            assert!(
                matches!(errno, Some(Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE)),
                "{to}: {errno:?}"
            );
        }
    }
    Ok(())
}
