//! The usual scene of an HTTP test: a client on node a, version 1 of a service `web` beside it, version 2 on node b.

use std::net::SocketAddr;
use std::time::Duration;

use super::messages::{Ask, Told};
use super::{GRPC_PORT, HTTP_PORT, WEBSOCKET_PORT, WebServer, ask_once};
use crate::agent::Agent;
use crate::pod::Pod;
use crate::shop::{Shop, Vip};
use crate::verdict::Failure;
use crate::waiting::eventually;

/// Until a change of manifests holds.
const SOON: Duration = Duration::from_secs(10);

/// Ports of `web`: 80 is HTTP, 81 is WebSocket, 82 is HTTP/2, 90 is gRPC.
#[derive(Debug)]
pub struct WebScene {
    /// The world.
    pub shop: Shop,
    /// On node a.
    pub client: Pod,
    /// On node a.
    pub v1: Pod,
    /// On node b.
    pub v2: Pod,
    /// The service, at port 80.
    pub vip: Vip,
    /// The servers of `v1` and `v2`.
    pub servers: Vec<WebServer>,
    /// Of node a and b.
    pub agents: Vec<Agent>,
}

impl WebScene {
    /// Set it, with subsets `v1` and `v2` and a rule that sends everything to the whole service.
    ///
    /// # Errors
    /// When a part of it cannot be made.
    pub fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let client = shop.pod("a", "client")?;
        let mut servers = Vec::new();
        let mut pods = Vec::new();
        for (node, version) in [("a", "v1"), ("b", "v2")] {
            let pod = Self::version(&shop, node, version)?;
            servers.push(WebServer::start(&pod, version)?);
            pods.push(pod);
        }
        let vip = shop.service_with("web", 80, |service| {
            let service = service.port("http", 80, HTTP_PORT).port("http-ws", 81, WEBSOCKET_PORT);
            service.port("http2", 82, HTTP_PORT).port("grpc", 90, GRPC_PORT)
        })?;
        let (Some(v2), Some(v1)) = (pods.pop(), pods.pop()) else {
            return Err(anyhow::anyhow!("no pods").into());
        };
        let agents = shop.start_agents()?;
        let scene = Self { shop, client, v1, v2, vip, servers, agents };
        scene.destination("")?;
        scene.route("  - route: [{destination: {host: web}}]\n")?;
        scene.settles(Ask::get("web", "/settle"), |told| {
            told.header("x-envoy-upstream-service-time").is_some()
        })?;
        Ok(scene)
    }

    /// A pod of `web` with this version, in the manifests.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn version(shop: &Shop, node: &str, version: &str) -> Result<Pod, Failure> {
        let pod = shop.world().node(node)?.pod(&format!("shop/web-{version}"))?;
        let manifest = pod.manifest().label("app", "web").label("version", version);
        shop.world().manifests().apply(manifest.port("http", HTTP_PORT))?;
        Ok(pod)
    }

    /// Write a file of manifests.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn apply(&self, name: &str, text: &str) -> Result<(), Failure> {
        Ok(self.shop.world().manifests().apply_text(name, text)?)
    }

    /// A VirtualService for `web` with these rules.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn route(&self, rules: &str) -> Result<(), Failure> {
        let head = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web, namespace: shop}\n";
        self.apply("route.yaml", &format!("{head}spec:\n  hosts: [web]\n  http:\n{rules}"))
    }

    /// The DestinationRule of `web`, with its subsets and this policy.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn destination(&self, policy: &str) -> Result<(), Failure> {
        let head = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: shop}\n";
        let subsets =
            "  subsets:\n  - {name: v1, labels: {version: v1}}\n  - {name: v2, labels: {version: v2}}\n";
        self.apply("destination.yaml", &format!("{head}spec:\n  host: web\n{policy}{subsets}"))
    }

    /// A port of the service.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        self.vip.at_port(port).v4
    }

    /// One HTTP/1.1 request from the client to port 80.
    ///
    /// # Errors
    /// When the program fails.
    pub fn ask(&self, request: Ask) -> Result<Told, Failure> {
        ask_once(&self.client, self.vip.v4, false, request)
    }

    /// Wait until eight answers in a row are as wanted: one alone may be by chance.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn settles(&self, request: Ask, ok: impl Fn(&Told) -> bool) -> Result<Told, Failure> {
        let script = super::messages::Script { to: self.vip.v4, http2: false, requests: vec![request; 8] };
        let observe = || super::ask(&self.client, &script).map_err(|error| format!("{error:?}"));
        let told = eventually(SOON, observe, |told| told.as_ref().is_ok_and(|told| told.iter().all(&ok)))?;
        let last = told.ok().and_then(|mut told| told.pop());
        last.ok_or_else(|| anyhow::anyhow!("no answer").into())
    }
}
