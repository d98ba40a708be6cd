//! Running pods join the mesh: what their node remembers of connections of before is in nobody's way, and what is open stays so.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{How, Identity, Open};
use mesh_tests::shop::{TARGET_PORT, Vip};
use mesh_tests::tool::Connection;
use mesh_tests::translation::Translation;
use mesh_tests::{Agent, Failure, Pod, Shop, TestResult, eventually, require_agent, require_nft, test_name};

const SOON: Duration = Duration::from_secs(15);

/// The ends of a connection from a chosen port, by both families.
fn both(client: &Pod, port: u16, vip: Vip) -> [(SocketAddr, SocketAddr); 2] {
    [(client.at4(port), vip.v4), (client.at6(port), vip.v6)]
}

fn connect(client: &Pod, (from, to): (SocketAddr, SocketAddr)) -> Result<Connection, Failure> {
    // Ports of connections that were closed a moment ago too.
    let open = Open::tcp_to(to).bound_to(from).sharing_its_address();
    Ok(client.tool()?.connect_as(open, How::Blocking, to)?)
}

/// Asks by a connection of its own and closes it first.
fn ask(client: &Pod, ends: (SocketAddr, SocketAddr)) -> Result<Identity, Failure> {
    Ok(connect(client, ends)?.who()?)
}

/// A pod that is closed for whoever is outside of the mesh, and one that calls it, both of them outside of it.
struct Scene {
    shop: Shop,
    rules: Translation,
    client: Pod,
    web: Pod,
    vip: Vip,
    agent: Agent,
}

impl Scene {
    fn open(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a"])?;
        let node = shop.world().node("a")?;
        let rules = Translation::start(node.host())?;
        let (client, web) = (shop.unmeshed_pod("a", "client")?, shop.unmeshed_pod("a", "web")?);
        let vip = shop.service("web", 80)?;
        rules.lead(vip, &web, TARGET_PORT)?;
        shop.mode(MtlsMode::Strict)?;
        let agent = node.agent().start()?;
        Ok(Self { shop, rules, client, web, vip, agent })
    }

    fn join(&self, pod: &Pod, app: &str) -> TestResult {
        let manifest = pod.manifest().label("app", app).port("http", TARGET_PORT);
        Ok(self.shop.world().manifests().apply(manifest)?)
    }

    /// Both join, and the client's kernel knows that it may.
    fn join_both(&self) -> TestResult {
        self.join(&self.client, "client")?;
        self.join(&self.web, "web")?;
        self.agent.wait_enrolled([&self.client, &self.web])?;
        self.let_in(&self.client)
    }

    fn let_in(&self, client: &Pod) -> TestResult {
        for to in [self.vip.v4, self.vip.v6] {
            self.shop.world().node("a")?.kernel().dial_directly(client, to)?;
        }
        Ok(())
    }

    /// Waits until so many of the node's entries were forgotten since the agent started.
    fn forgotten(&self, entries: u32) -> TestResult {
        let forgotten = || self.agent.metric(&["mesh_tracked_connections_forgotten_total"]);
        Ok(eventually(SOON, forgotten, |seen| seen.as_ref().is_ok_and(|seen| *seen >= entries.into()))
            .map(drop)?)
    }

    /// The server sees the port that the client has.
    fn is_served_from(&self, client: &Pod, port: u16) -> TestResult {
        for ends in both(client, port, self.vip) {
            let seen = ask(client, ends)?;
            assert_eq!((&*seen.server, unmapped(seen.accepted_from)), ("web", ends.0));
        }
        Ok(())
    }
}

fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[test]
fn a_port_whose_connection_of_before_is_closed_or_closes_later_serves_the_next_one() -> TestResult {
    require_agent!();
    require_nft!();
    let scene = Scene::open(test_name!())?;
    let Scene { client, web, vip, .. } = &scene;
    let _server = scene.shop.serve(web)?;
    for ends in both(client, 40001, *vip) {
        assert_eq!(ask(client, ends)?.server, "web");
        let lines = || scene.rules.tracked(ends.0);
        eventually(SOON, lines, |lines| {
            lines.as_ref().is_ok_and(|lines| lines.len() == 1 && lines[0].contains("TIME_WAIT"))
        })??;
    }
    let connect_both = |port| -> Result<Vec<Connection>, Failure> {
        both(client, port, *vip).into_iter().map(|ends| connect(client, ends)).collect()
    };
    let (closed_later, kept) = (connect_both(40002)?, connect_both(40003)?);

    scene.join_both()?;
    scene.forgotten(2)?;
    scene.is_served_from(client, 40001)?;

    // Nothing but the node's own memory leads these to the server.
    scene.rules.forget_rules()?;
    for connection in closed_later.iter().chain(&kept) {
        assert_eq!(connection.who()?.server, "web");
    }
    assert_eq!(scene.agent.metric(&["mesh_tracked_connections_watched"])?, 4.0);
    drop(closed_later);
    scene.forgotten(4)?;
    scene.is_served_from(client, 40002)?;
    for connection in &kept {
        assert_eq!(connection.who()?.server, "web");
    }
    assert!(!scene.agent.log_text().contains("strict_plaintext"));
    Ok(())
}

#[test]
fn a_new_pod_is_not_in_the_way_of_who_had_its_address_before() -> TestResult {
    require_agent!();
    require_nft!();
    let scene = Scene::open(test_name!())?;
    let node = scene.shop.world().node("a")?;
    let _server = scene.shop.serve(&scene.web)?;
    for ends in both(&scene.client, 40001, scene.vip) {
        assert_eq!(ask(&scene.client, ends)?.server, "web");
    }
    node.remove_pod(&scene.client)?;
    scene.shop.world().manifests().delete("Pod", "shop", "client")?;
    scene.join(&scene.web, "web")?;
    scene.agent.wait_enrolled([&scene.web])?;
    let heir = node.pod_builder("shop/heir").slot(scene.client.slot()).start()?;
    scene.join(&heir, "heir")?;
    scene.agent.wait_enrolled([&heir])?;
    scene.let_in(&heir)?;
    scene.forgotten(2)?;
    scene.is_served_from(&heir, 40001)
}
