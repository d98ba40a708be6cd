//! Owns the paths that are compared and the world they run in.
//!
//! `none` runs on nodes without any agent, so that its pods carry no program at all; every meshed path dials a
//! service address, `none` dials the pod. A path over two nodes has a baseline over two nodes.

use std::net::{IpAddr, SocketAddr};
use std::path::Path as FilePath;

use anyhow::Context as _;
use clap::ValueEnum;
use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::{Link, Pod, World};

use crate::agents::MeshNode;
use crate::envoy::EnvoyPair;
use crate::session::PORT;

/// The namespace of all meshed pods.
pub(crate) const NAMESPACE: &str = "bench";

/// A way from a client to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Path {
    /// Two pods of one node, no mesh.
    None,
    /// Two meshed pods of one node; the kernel picks the backend.
    Direct,
    /// Two meshed pods of one node, through the agent.
    ProxyLocal,
    /// Pods of two nodes, no mesh: the baseline of `ProxyRemote`.
    NoneRemote,
    /// Meshed pods of two nodes, through both agents, plain TCP between them.
    ProxyRemote,
    /// Meshed pods of two nodes, through both agents and a tunnel of mutual TLS.
    MtlsRemote,
    /// The peer: unmeshed pods of two nodes with an Envoy each, TCP over mutual TLS.
    EnvoyTcpMtls,
}

impl Path {
    /// All, in the order of the table.
    pub(crate) const ALL: [Self; 7] = [
        Self::None,
        Self::Direct,
        Self::ProxyLocal,
        Self::NoneRemote,
        Self::ProxyRemote,
        Self::MtlsRemote,
        Self::EnvoyTcpMtls,
    ];

    /// Name in rows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Direct => "direct",
            Self::ProxyLocal => "proxy-local",
            Self::NoneRemote => "none-remote",
            Self::ProxyRemote => "proxy-remote",
            Self::MtlsRemote => "mtls-remote",
            Self::EnvoyTcpMtls => "envoy-tcp-mtls",
        }
    }

    /// What it is compared with: the same way without a mesh.
    pub(crate) fn baseline(self) -> Option<Self> {
        match self {
            Self::None | Self::NoneRemote => None,
            Self::Direct | Self::ProxyLocal => Some(Self::None),
            Self::ProxyRemote | Self::MtlsRemote | Self::EnvoyTcpMtls => Some(Self::NoneRemote),
        }
    }

    /// Another mesh that it is compared with, when that one can be run.
    pub(crate) fn peer(self) -> Option<Self> {
        (self == Self::MtlsRemote).then_some(Self::EnvoyTcpMtls)
    }

    /// What the connect hook of the client's node must have decided for each connection.
    pub(crate) fn expected(self) -> Option<Expected> {
        match self {
            Self::None | Self::NoneRemote | Self::EnvoyTcpMtls => None,
            Self::Direct => Some(Expected::Direct),
            Self::ProxyLocal | Self::ProxyRemote | Self::MtlsRemote => Some(Expected::Proxy),
        }
    }

    /// Nodes of client and server.
    fn nodes(self) -> (&'static str, &'static str) {
        match self {
            Self::None => (PLAIN, PLAIN),
            Self::NoneRemote | Self::EnvoyTcpMtls => (PLAIN, PLAIN_FAR),
            Self::Direct => (MESH, MESH),
            Self::ProxyRemote | Self::MtlsRemote => (MESH, MESH_FAR),
            Self::ProxyLocal => (PROXIED, PROXIED),
        }
    }
}

/// A decision of the connect hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Direct,
    Proxy,
}

const PLAIN: &str = "plain";
const PLAIN_FAR: &str = "plain-far";
const MESH: &str = "mesh";
const MESH_FAR: &str = "mesh-far";
/// Its agent admits no pair to the Direct path.
const PROXIED: &str = "proxied";

/// Everything a path needs.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) path: Path,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    /// What the client dials.
    pub(crate) to: SocketAddr,
    /// Short names of the nodes it touches: one or two.
    nodes: Vec<&'static str>,
    /// The proxies that the pods bring along, when it is a peer's path.
    envoys: Option<EnvoyPair>,
}

/// The nodes, pods and agents of a run.
#[derive(Debug)]
pub(crate) struct Lab {
    routes: Vec<Route>,
    agents: Vec<(&'static str, MeshNode)>,
    // Dropped last: it takes everything with it.
    world: World,
}

impl Lab {
    /// Make the world and the pods for these paths; agents are not started yet.
    pub(crate) fn build(paths: &[Path], link: Link, envoy: Option<&FilePath>) -> anyhow::Result<Self> {
        let mut nodes: Vec<&'static str> =
            paths.iter().flat_map(|path| [path.nodes().0, path.nodes().1]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let world = World::named("bench").nodes(&nodes).linked_by(link).start()?;
        world.manifests().apply(NamespaceManifest::meshed(NAMESPACE))?;
        let routes = paths
            .iter()
            .zip(1..)
            .map(|(path, number)| Route::build(&world, *path, number, envoy))
            .collect::<anyhow::Result<_>>()?;
        let agents = nodes
            .into_iter()
            .filter(|node| ![PLAIN, PLAIN_FAR].contains(node))
            .map(|node| {
                let arguments: &[&str] = if node == PROXIED { &["--direct=false"] } else { &[] };
                (node, MeshNode::new(arguments))
            })
            .collect();
        Ok(Self { routes, agents, world })
    }

    /// The paths, in the order they were asked for.
    pub(crate) fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Start every agent and every peer's proxy, after ending the one before: each start of a run has its own
    /// processes.
    pub(crate) fn restart_proxies(&mut self) -> anyhow::Result<()> {
        for route in &mut self.routes {
            if let Some(envoys) = &mut route.envoys {
                envoys.restart(&route.client, &route.server)?;
            }
        }
        for (name, agent) in &mut self.agents {
            agent.restart(self.world.node(name)?)?;
        }
        Ok(())
    }

    /// The agents of a route, the client's first.
    pub(crate) fn agents_of(&self, route: &Route) -> Vec<&MeshNode> {
        route
            .nodes
            .iter()
            .filter_map(|name| self.agents.iter().find(|(other, _)| other == name))
            .map(|(_, agent)| agent)
            .collect()
    }

    /// The cgroups of a route's nodes: clients, servers and agents, and nothing else.
    pub(crate) fn cgroups_of(&self, route: &Route) -> anyhow::Result<Vec<&FilePath>> {
        route.nodes.iter().map(|name| Ok(self.world.node(name)?.cgroup().path())).collect()
    }
}

impl Route {
    fn build(world: &World, path: Path, number: u16, envoy: Option<&FilePath>) -> anyhow::Result<Self> {
        let (near, far) = path.nodes();
        let pod = |node: &str, part: &str| -> anyhow::Result<Pod> {
            let name = format!("{NAMESPACE}/{}-{part}", path.name());
            world.node(node)?.pod(&name).with_context(|| format!("cannot make pod {name}"))
        };
        let (client, server) = (pod(near, "client")?, pod(far, "server")?);
        let mut envoys = None;
        let to = match (path, path.expected()) {
            (Path::EnvoyTcpMtls, _) => {
                let program = envoy.context("no Envoy was given")?;
                let pair = EnvoyPair::new(program, &world.directory().join("envoy"), &server)?;
                envoys.insert(pair).front()
            }
            (_, None) => server.at4(PORT),
            (_, Some(_)) => publish(world, path, &client, &server, number)?,
        };
        let mut nodes = vec![near, far];
        nodes.dedup();
        Ok(Self { path, client, server, to, nodes, envoys })
    }

    /// The proxies of a peer's path.
    pub(crate) fn envoys(&self) -> Option<&EnvoyPair> {
        self.envoys.as_ref()
    }
}

/// Write the manifests of a meshed pair and return the service's address.
fn publish(world: &World, path: Path, client: &Pod, server: &Pod, number: u16) -> anyhow::Result<SocketAddr> {
    // 10.96.0.10 is the name server's.
    let (vip, _) = World::service_ips(100 + number);
    let manifests = world.manifests();
    manifests.apply(client.manifest())?;
    let server_manifest = server.manifest();
    manifests.apply(match path {
        Path::ProxyRemote => server_manifest.annotation("nodemesh.dev/tunnel", "none"),
        _ => server_manifest,
    })?;
    manifests.apply(
        ServiceManifest::new(NAMESPACE, server.name())
            .cluster_ip(vip)
            .port("load", PORT, PORT)
            .selector("app", server.name()),
    )?;
    Ok(SocketAddr::new(IpAddr::V4(vip), PORT))
}
