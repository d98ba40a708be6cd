//! PeerAuthentication: every mode at every level, for every kind of client, with the security that operators are shown.

use std::time::Duration;

use mesh_tests::hbone;
use mesh_tests::manifests::{MtlsMode, PeerAuthenticationManifest};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Place, Pod, Server, Shop, TestResult, eventually, require_agent, shop, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// Where the server listens; the first port is the one that exceptions are about.
const PORTS: [u16; 2] = [8080, 9090];

/// A kind of client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A meshed pod of the server's node.
    Near,
    /// A meshed pod of another node.
    Far,
    /// A pod outside the mesh, on the server's node.
    Plain,
    /// A process of the server's node.
    Host,
    /// Another machine.
    Outsider,
}

/// How a connection is secured, or that it is refused.
fn expected(mode: MtlsMode, kind: Kind) -> Option<&'static str> {
    match (mode, kind) {
        // The kernel vouches for the node's own pods; there is no wire to encrypt.
        (_, Kind::Near) => Some("kernel"),
        (MtlsMode::Disable, Kind::Far) => Some("none"),
        (_, Kind::Far) => Some("mutual_tls"),
        (MtlsMode::Strict, Kind::Plain | Kind::Host | Kind::Outsider) => None,
        (_, Kind::Plain | Kind::Host | Kind::Outsider) => Some("none"),
    }
}

struct Scene {
    shop: Shop,
    web: Pod,
    clients: Vec<(Kind, Place)>,
    agents: Vec<Agent>,
    _servers: Vec<Server>,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let web = shop.pod("a", "web")?;
        let clients = vec![
            (Kind::Near, shop.pod("a", "near")?.place()),
            (Kind::Far, shop.pod("b", "far")?.place()),
            (Kind::Plain, shop.unmeshed_pod("a", "plain")?.place()),
            (Kind::Host, shop.world().node("a")?.host().clone()),
            (Kind::Outsider, shop.world().outsider("outsider")?),
        ];
        let serve = |port: u16| web.tool()?.serve(hbone::everywhere(port), ServerOptions::named("web"));
        let _servers = PORTS.into_iter().map(serve).collect::<Result<_, _>>()?;
        let agents = shop.start_agents()?;
        Ok(Self { shop, web, clients, agents, _servers })
    }

    fn apply(&self, policy: PeerAuthenticationManifest) -> TestResult {
        Ok(self.shop.world().manifests().apply(policy)?)
    }

    /// What a client gets: the security of its connection, or nothing if it is refused. A connection that a policy ends
    /// while it is looked at is an error: the next one will tell.
    fn outcome(&self, client: &Place, to: std::net::SocketAddr) -> Result<Option<String>, Failure> {
        let connection = match client.tool()?.connect(to) {
            Ok(connection) => connection,
            Err(_) => return Ok(None),
        };
        let Ok(seen) = connection.who() else { return Ok(None) };
        // A host reaches its pods from the gateway's address.
        let own = [client.at4(0).ip(), client.at6(0).ip()];
        let is_host = client.name() == "a";
        assert!(
            is_host || own.contains(&seen.accepted_from.ip().to_canonical()),
            "{}: {seen:?}",
            client.name()
        );
        let rows = || {
            let rows = shop::security(&self.agents[0], seen.accepted_from.ip().to_canonical(), &self.web);
            (rows, connection.who().is_ok())
        };
        // Once: an earlier one may still be ending.
        let is_shown = |(rows, lives): &(Result<Vec<String>, _>, bool)| {
            !lives || rows.as_ref().is_ok_and(|rows| rows.len() == 1)
        };
        let (rows, lives) = eventually(SOON, rows, is_shown)?;
        if !lives {
            Err(anyhow::anyhow!("it ended while it was looked at"))?;
        }
        Ok(rows?.into_iter().next())
    }

    /// All clients get at `port` what `mode` means, by either family.
    fn expect(&self, what: &str, port: u16, mode: MtlsMode) -> TestResult {
        for (kind, client) in &self.clients {
            for to in [self.web.at4(port), self.web.at6(port)] {
                let seen = eventually(
                    SOON,
                    || self.outcome(client, to).map_err(|error| format!("{error:?}")),
                    |seen| seen.as_ref().is_ok_and(|seen| seen.as_deref() == expected(mode, *kind)),
                );
                seen.map_err(|error| {
                    let expected = expected(mode, *kind);
                    anyhow::anyhow!("{what}: {kind:?} to {to}, expected {expected:?}: {error}")
                })?
                .map_err(anyhow::Error::msg)?;
            }
        }
        Ok(())
    }
}

fn mesh(mode: MtlsMode) -> PeerAuthenticationManifest {
    PeerAuthenticationManifest::new("istio-system", "default", mode)
}

fn namespace(mode: MtlsMode) -> PeerAuthenticationManifest {
    PeerAuthenticationManifest::new(shop::NAMESPACE, "default", mode)
}

fn workload(mode: MtlsMode) -> PeerAuthenticationManifest {
    PeerAuthenticationManifest::new(shop::NAMESPACE, "web", mode).selector("app", "web")
}

#[test]
fn a_mesh_has_every_mode() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    scene.expect("no policy", 8080, MtlsMode::Permissive)?;
    for mode in [MtlsMode::Strict, MtlsMode::Disable, MtlsMode::Permissive, MtlsMode::Strict] {
        scene.apply(mesh(mode))?;
        scene.expect(&format!("{mode:?} mesh"), 8080, mode)?;
    }
    scene.apply(mesh(MtlsMode::Unset))?;
    scene.expect("a mesh that says nothing", 8080, MtlsMode::Permissive)
}

#[test]
fn a_namespace_has_every_mode_whatever_the_mesh_has() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    for around in [MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Disable] {
        scene.apply(mesh(around))?;
        for mode in [MtlsMode::Disable, MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Unset] {
            if mode == around {
                continue;
            }
            scene.apply(namespace(mode))?;
            let effective = if mode == MtlsMode::Unset { around } else { mode };
            scene.expect(&format!("{mode:?} namespace in a {around:?} mesh"), 8080, effective)?;
        }
    }
    Ok(())
}

#[test]
fn a_workload_has_every_mode_whatever_its_namespace_has() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    for around in [MtlsMode::Permissive, MtlsMode::Strict] {
        scene.apply(namespace(around))?;
        for mode in [MtlsMode::Disable, MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Unset] {
            scene.apply(workload(mode))?;
            let effective = if mode == MtlsMode::Unset { around } else { mode };
            scene.expect(&format!("{mode:?} workload in a {around:?} namespace"), 8080, effective)?;
        }
    }
    Ok(())
}

#[test]
fn a_port_has_every_mode_and_leaves_the_others_alone() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let [port, other] = PORTS;
    for around in [MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Disable] {
        for mode in [MtlsMode::Disable, MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Unset] {
            if mode == around {
                continue;
            }
            scene.apply(workload(around).port(port, mode))?;
            let effective = if mode == MtlsMode::Unset { around } else { mode };
            scene.expect(&format!("{mode:?} port of a {around:?} workload"), port, effective)?;
            scene.expect(&format!("the other port beside {mode:?}"), other, around)?;
        }
    }
    Ok(())
}
