//! The usual scene of a test: a meshed namespace `shop` with pods, services and an agent on every node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use serde_json::Value;

use crate::agent::{Agent, AgentError};
use crate::controller::ControllerSeat;
use crate::manifests::{
    ManifestError, MtlsMode, NamespaceManifest, PeerAuthenticationManifest, ServiceManifest,
};
use crate::pod::Pod;
use crate::tool::{Server, ServerOptions, ToolError};
use crate::verdict::Failure;
use crate::world::World;

/// The meshed namespace of the scene.
pub const NAMESPACE: &str = "shop";

/// The port on which backends of the scene listen.
pub const TARGET_PORT: u16 = 8080;

/// A world with the namespace `shop`.
#[derive(Debug)]
pub struct Shop {
    world: World,
    next_service: AtomicU16,
}

/// The addresses of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vip {
    /// By IPv4.
    pub v4: SocketAddr,
    /// By IPv6.
    pub v6: SocketAddr,
}

impl Vip {
    fn new(v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> Self {
        Self { v4: (v4, port).into(), v6: (v6, port).into() }
    }

    /// The IPv4 address as an IPv4-mapped IPv6 one.
    #[must_use]
    pub fn mapped(&self) -> SocketAddr {
        mapped(self.v4)
    }

    /// All three ways to dial it.
    #[must_use]
    pub fn all(&self) -> [SocketAddr; 3] {
        [self.v4, self.v6, self.mapped()]
    }

    /// The same addresses with another port.
    #[must_use]
    pub fn at_port(&self, port: u16) -> Self {
        Self { v4: SocketAddr::new(self.v4.ip(), port), v6: SocketAddr::new(self.v6.ip(), port) }
    }
}

/// An IPv4 address and port as an IPv4-mapped IPv6 one.
#[must_use]
pub fn mapped(v4: SocketAddr) -> SocketAddr {
    match v4.ip() {
        IpAddr::V4(ip) => SocketAddr::new(IpAddr::V6(ip.to_ipv6_mapped()), v4.port()),
        IpAddr::V6(_) => v4,
    }
}

impl Shop {
    /// Nodes of these names; no pods and no agents yet.
    ///
    /// # Errors
    /// When the world cannot be made.
    pub fn open(test: &str, nodes: &[&str]) -> Result<Self, Failure> {
        Self::within(World::with_nodes(test, nodes)?)
    }

    /// The scene in a world of one's own.
    ///
    /// # Errors
    /// When the manifest of the namespace cannot be written.
    pub fn within(world: World) -> Result<Self, Failure> {
        world.manifests().apply(NamespaceManifest::meshed(NAMESPACE))?;
        Ok(Self { world, next_service: AtomicU16::new(101) })
    }

    /// The world.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// A meshed pod with label `app: NAME`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn pod(&self, node: &str, name: &str) -> Result<Pod, Failure> {
        self.backend(node, name, name)
    }

    /// A meshed pod with label `app: APP`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn backend(&self, node: &str, name: &str, app: &str) -> Result<Pod, Failure> {
        let pod = self.world.node(node)?.pod(&format!("{NAMESPACE}/{name}"))?;
        self.world.manifests().apply(pod.manifest().label("app", app).port("http", TARGET_PORT))?;
        Ok(pod)
    }

    /// A pod of the namespace that has opted out of the mesh.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn unmeshed_pod(&self, node: &str, name: &str) -> Result<Pod, Failure> {
        let pod = self.world.node(node)?.pod(&format!("{NAMESPACE}/{name}"))?;
        self.world.manifests().apply(pod.manifest().label("nodemesh.dev/mesh", "none"))?;
        Ok(pod)
    }

    /// A dual-stack service: `port` leads to [`TARGET_PORT`] of the pods with `app: NAME`.
    ///
    /// # Errors
    /// When its manifest cannot be written.
    pub fn service(&self, name: &str, port: u16) -> Result<Vip, ManifestError> {
        self.service_with(name, port, |service| service.port("http", port, TARGET_PORT))
    }

    /// A dual-stack service with ports of one's own; `port` is only that of the returned addresses.
    ///
    /// # Errors
    /// When its manifest cannot be written.
    pub fn service_with(
        &self,
        name: &str,
        port: u16,
        edit: impl FnOnce(ServiceManifest) -> ServiceManifest,
    ) -> Result<Vip, ManifestError> {
        let (v4, v6) = World::service_ips(self.next_service.fetch_add(1, Ordering::Relaxed));
        let service = ServiceManifest::new(NAMESPACE, name).cluster_ip(v4).cluster_ip(v6);
        self.world.manifests().apply(edit(service.selector("app", name)))?;
        Ok(Vip::new(v4, v6, port))
    }

    /// The mode of the whole namespace.
    ///
    /// # Errors
    /// When its manifest cannot be written.
    pub fn mode(&self, mode: MtlsMode) -> Result<(), ManifestError> {
        self.world.manifests().apply(PeerAuthenticationManifest::new(NAMESPACE, "default", mode))
    }

    /// Start an agent on every node, in the order of their names.
    ///
    /// # Errors
    /// When one is not ready in time.
    pub fn start_agents(&self) -> Result<Vec<Agent>, AgentError> {
        let agents: Vec<Agent> =
            self.world.nodes().map(|node| node.agent().launch()).collect::<Result<_, _>>()?;
        for agent in &agents {
            agent.wait_ready()?;
        }
        Ok(agents)
    }

    /// An agent of this controller on every node, with all of its pods enrolled.
    ///
    /// # Errors
    /// When one does not become ready, or a pod is not enrolled.
    pub fn start_agents_of(&self, seat: &ControllerSeat) -> Result<Vec<Agent>, AgentError> {
        let mut agents = Vec::new();
        for node in self.world.nodes() {
            let agent = node.agent().controller(seat).start()?;
            agent.wait_enrolled(&node.pods())?;
            agents.push(agent);
        }
        Ok(agents)
    }

    /// A [`crate::protocol::Serve::Lines`] server named after its pod, on all addresses at [`TARGET_PORT`].
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn serve(&self, pod: &Pod) -> Result<Server, ToolError> {
        let all = SocketAddr::from(([0u16; 8], TARGET_PORT));
        pod.tool()?.serve(all, ServerOptions::named(pod.name()))
    }
}

/// Connections ever opened from `source` to `destination` (pod names) by `path` (`direct`, `proxy`), as the
/// client's agent counts them.
///
/// # Errors
/// When the admin socket does not answer.
pub fn opened(agent: &Agent, source: &Pod, destination: &Pod, path: &str) -> Result<u64, AgentError> {
    let (source, destination) = (full_name(source), full_name(destination));
    total_opened(agent, |edge| {
        edge["source"] == source
            && edge["destination"] == destination
            && edge["path"] == path
            && edge["direction"] == "outbound"
    })
}

/// Connections ever captured on arrival at `destination`, as its own agent counts them: those that came in
/// without a ticket and went through the agent.
///
/// # Errors
/// When the admin socket does not answer.
pub fn captured(agent: &Agent, destination: &Pod) -> Result<u64, AgentError> {
    let destination = full_name(destination);
    total_opened(agent, |edge| edge["destination"] == destination && edge["direction"] == "inbound")
}

/// How the live connections from the address `source` to `destination` are secured, as the agent of one of them
/// shows it: `mutual_tls`, `kernel` or `none` for each.
///
/// # Errors
/// When the admin socket does not answer.
pub fn security(agent: &Agent, source: IpAddr, destination: &Pod) -> Result<Vec<String>, AgentError> {
    let rows = live(agent, source, destination)?;
    Ok(rows.iter().map(|row| row["security"].as_str().unwrap_or_default().to_owned()).collect())
}

/// The live connections from the address `source` to `destination` that an agent shows.
///
/// # Errors
/// When the admin socket does not answer.
pub fn live(agent: &Agent, source: IpAddr, destination: &Pod) -> Result<Vec<Value>, AgentError> {
    let destination = full_name(destination);
    let view = agent.admin("/connections")?;
    let rows = view["connections"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_from_source = |row: &&Value| {
        let address = row["source_addr"].as_str().and_then(|text| text.parse::<SocketAddr>().ok());
        address.is_some_and(|address| address.ip().to_canonical() == source)
    };
    Ok(rows.iter().filter(|row| row["destination"] == destination).filter(is_from_source).cloned().collect())
}

fn total_opened(agent: &Agent, matches: impl Fn(&Value) -> bool) -> Result<u64, AgentError> {
    let edges = agent.admin("/edges")?;
    let rows = edges["edges"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(rows.iter().filter(|edge| matches(edge)).filter_map(|edge| edge["opened"].as_u64()).sum())
}

fn full_name(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace(), pod.name())
}
