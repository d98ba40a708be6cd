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
use crate::session::{HTTP_PORT, PORT};

/// The namespace of all meshed pods.
pub(crate) const NAMESPACE: &str = "bench";

/// What goes over the paths of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// Bytes.
    Tcp,
    /// HTTP/1.1 requests, in a mesh by rules.
    Http,
}

impl Traffic {
    /// The load servers' port for it.
    fn port(self) -> u16 {
        match self {
            Self::Tcp => PORT,
            Self::Http => HTTP_PORT,
        }
    }
}

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
    /// Two meshed pods of one node, requests routed by a VirtualService.
    HttpLocal,
    /// The peer of that: unmeshed pods with an Envoy each, HTTP over mutual TLS.
    EnvoyHttpMtlsLocal,
    /// Meshed pods of two nodes, requests routed by a VirtualService and sent through a tunnel of mutual TLS.
    HttpRemote,
    /// The peer of that: unmeshed pods of two nodes with an Envoy each, HTTP over mutual TLS.
    EnvoyHttpMtls,
}

impl Path {
    /// All of a bench, in the order of the table.
    pub(crate) fn all(traffic: Traffic) -> &'static [Self] {
        match traffic {
            Traffic::Tcp => &[
                Self::None,
                Self::Direct,
                Self::ProxyLocal,
                Self::NoneRemote,
                Self::ProxyRemote,
                Self::MtlsRemote,
                Self::EnvoyTcpMtls,
            ],
            Traffic::Http => &[
                Self::None,
                Self::HttpLocal,
                Self::EnvoyHttpMtlsLocal,
                Self::NoneRemote,
                Self::HttpRemote,
                Self::EnvoyHttpMtls,
            ],
        }
    }

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
            Self::HttpLocal => "http-local",
            Self::EnvoyHttpMtlsLocal => "envoy-http-mtls-local",
            Self::HttpRemote => "http-remote",
            Self::EnvoyHttpMtls => "envoy-http-mtls",
        }
    }

    /// What it is compared with: the same way without a mesh.
    pub(crate) fn baseline(self) -> Option<Self> {
        match self {
            Self::None | Self::NoneRemote => None,
            Self::Direct | Self::ProxyLocal | Self::HttpLocal | Self::EnvoyHttpMtlsLocal => Some(Self::None),
            Self::ProxyRemote
            | Self::MtlsRemote
            | Self::EnvoyTcpMtls
            | Self::HttpRemote
            | Self::EnvoyHttpMtls => Some(Self::NoneRemote),
        }
    }

    /// Another mesh that it is compared with, when that one can be run.
    pub(crate) fn peer(self) -> Option<Self> {
        match self {
            Self::MtlsRemote => Some(Self::EnvoyTcpMtls),
            Self::HttpLocal => Some(Self::EnvoyHttpMtlsLocal),
            Self::HttpRemote => Some(Self::EnvoyHttpMtls),
            _ => None,
        }
    }

    /// Whether it is another mesh's.
    pub(crate) fn is_peer(self) -> bool {
        matches!(self, Self::EnvoyTcpMtls | Self::EnvoyHttpMtlsLocal | Self::EnvoyHttpMtls)
    }

    /// What the connect hook of the client's node must have decided for each connection.
    pub(crate) fn expected(self) -> Option<Expected> {
        match self {
            Self::None | Self::NoneRemote => None,
            Self::EnvoyTcpMtls | Self::EnvoyHttpMtlsLocal | Self::EnvoyHttpMtls => None,
            Self::Direct => Some(Expected::Direct),
            Self::ProxyLocal | Self::ProxyRemote | Self::MtlsRemote => Some(Expected::Proxy),
            Self::HttpLocal | Self::HttpRemote => Some(Expected::Proxy),
        }
    }

    /// Nodes of client and server.
    fn nodes(self) -> (&'static str, &'static str) {
        match self {
            Self::None | Self::EnvoyHttpMtlsLocal => (PLAIN, PLAIN),
            Self::NoneRemote | Self::EnvoyTcpMtls | Self::EnvoyHttpMtls => (PLAIN, PLAIN_FAR),
            Self::Direct | Self::HttpLocal => (MESH, MESH),
            Self::ProxyRemote | Self::MtlsRemote | Self::HttpRemote => (MESH, MESH_FAR),
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
    traffic: Traffic,
    routes: Vec<Route>,
    agents: Vec<(&'static str, MeshNode)>,
    // Dropped last: it takes everything with it.
    world: World,
}

impl Lab {
    /// Make the world and the pods for these paths; agents are not started yet.
    pub(crate) fn build(
        traffic: Traffic,
        paths: &[Path],
        link: Link,
        envoy: Option<&FilePath>,
    ) -> anyhow::Result<Self> {
        let mut nodes: Vec<&'static str> =
            paths.iter().flat_map(|path| [path.nodes().0, path.nodes().1]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let world = World::named("bench").nodes(&nodes).linked_by(link).start()?;
        world.manifests().apply(NamespaceManifest::meshed(NAMESPACE))?;
        let routes = paths
            .iter()
            .zip(1..)
            .map(|(path, number)| Route::build(&world, traffic, *path, number, envoy))
            .collect::<anyhow::Result<_>>()?;
        let agents = nodes
            .into_iter()
            .filter(|node| ![PLAIN, PLAIN_FAR].contains(node))
            .map(|node| {
                let arguments: &[&str] = if node == PROXIED { &["--direct=false"] } else { &[] };
                (node, MeshNode::new(arguments))
            })
            .collect();
        Ok(Self { traffic, routes, agents, world })
    }

    /// What goes over the paths.
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic
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
    fn build(
        world: &World,
        traffic: Traffic,
        path: Path,
        number: u16,
        envoy: Option<&FilePath>,
    ) -> anyhow::Result<Self> {
        let (near, far) = path.nodes();
        let pod = |node: &str, part: &str| -> anyhow::Result<Pod> {
            let name = format!("{NAMESPACE}/{}-{part}", path.name());
            world.node(node)?.pod(&name).with_context(|| format!("cannot make pod {name}"))
        };
        let (client, server) = (pod(near, "client")?, pod(far, "server")?);
        let mut envoys = None;
        let to = match path.expected() {
            None if path.is_peer() => {
                let program = envoy.context("no Envoy was given")?;
                let folder = world.directory().join(path.name());
                let pair = EnvoyPair::new(program, &folder, &server, traffic, traffic.port())?;
                envoys.insert(pair).front()
            }
            None => server.at4(traffic.port()),
            Some(_) => publish(world, traffic, path, &client, &server, number)?,
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
fn publish(
    world: &World,
    traffic: Traffic,
    path: Path,
    client: &Pod,
    server: &Pod,
    number: u16,
) -> anyhow::Result<SocketAddr> {
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
            .port(
                match traffic {
                    Traffic::Tcp => "load",
                    Traffic::Http => "http-load",
                },
                traffic.port(),
                traffic.port(),
            )
            .selector("app", server.name()),
    )?;
    if traffic == Traffic::Http {
        manifests.apply_text(&format!("{}-route.yaml", server.name()), &rules(server.name()))?;
    }
    Ok(SocketAddr::new(IpAddr::V4(vip), traffic.port()))
}

/// Rules as people have them: one for some users that a request has to be compared with, and one for all others with a time-out
/// and retries.
fn rules(service: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {service}, namespace: {NAMESPACE}}}
spec:
  hosts: [{service}]
  http:
  - name: testers
    match:
    - headers: {{end-user: {{exact: tester}}}}
      uri: {{prefix: /load}}
    route:
    - destination: {{host: {service}}}
  - name: everyone
    timeout: 15s
    retries: {{attempts: 2, perTryTimeout: 5s, retryOn: 'connect-failure,refused-stream,503'}}
    route:
    - destination: {{host: {service}}}
"
    )
}
