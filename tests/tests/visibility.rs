//! What clients see of the mesh, what happens to what they do not see, and which of several endpoints are near.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::protocol::Serve;
use mesh_tests::shop::TARGET_PORT;
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Place, Pod, Server, Shop, TestResult, eventually, hbone::everywhere, require_agent,
    test_name,
};

const SOON: Duration = Duration::from_secs(8);

const REGISTRY_ONLY: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: 'outboundTrafficPolicy: {mode: REGISTRY_ONLY}'
";

/// Waits until the server's name or, for a refusal, nothing comes of a connection from `client`.
fn settles(client: &Place, to: SocketAddr, wanted: Option<&str>) -> TestResult {
    let who = || client.tool().and_then(|tool| tool.who(to)).map(|seen| seen.server).ok();
    eventually(SOON, who, |seen| seen.as_deref() == wanted)?;
    Ok(())
}

/// The status of a request to an address by a host's name; 0 when there is no response.
fn status(client: &Place, to: SocketAddr, host: &str) -> u16 {
    client.tool().and_then(|tool| tool.http_get(to, host, "/")).map_or(0, |answer| answer.status)
}

#[test]
fn f10_registry_only_refuses_what_nothing_describes_until_a_sidecar_opens_it() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let web = shop.pod("a", "web")?;
    let vip = shop.service("web", 80)?;
    let outsider = shop.world().outsider("outsider")?;
    let tool = outsider.tool()?;
    let _lines = tool.serve(outsider.at4(9000), ServerOptions::named("lines"))?;
    let _http = tool.serve(outsider.at4(8000), ServerOptions::named("http").serving(Serve::Http))?;
    let _web = shop.serve(&web)?;
    let agents = shop.start_agents()?;
    let (lines, http) = (outsider.at4(9000), outsider.at4(8000));
    settles(&client, lines, Some("lines"))?;
    assert_eq!(status(&client, http, "outside.example"), 200);

    shop.world().manifests().apply_text("mesh.yaml", REGISTRY_ONLY)?;
    settles(&client, lines, None)?;
    eventually(SOON, || status(&client, http, "outside.example"), |status| *status == 502)?;
    let counted =
        || agents[0].metric(&["mesh_proxy_connections_closed", "reason=\"black_hole\""]).unwrap_or(0.0);
    eventually(SOON, counted, |count| *count >= 1.0)?;
    // What the registry has is reached as before, and so is whoever dials a pod.
    settles(&client, vip.v4, Some("web"))?;
    settles(&client, web.at4(TARGET_PORT), Some("web"))?;

    shop.world().manifests().apply_text(
        "sidecar.yaml",
        "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: client, namespace: shop}
spec:
  workloadSelector: {labels: {app: client}}
  outboundTrafficPolicy: {mode: ALLOW_ANY}
",
    )?;
    settles(&client, lines, Some("lines"))?;
    assert_eq!(status(&client, http, "outside.example"), 200);
    settles(&web, lines, None)?;
    Ok(())
}

#[test]
fn f10_registry_only_lets_through_what_a_service_entry_declares() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let outsider = shop.world().outsider("outsider")?;
    let tool = outsider.tool()?;
    let (lines, http) = (outsider.at4(9000), outsider.at4(8000));
    let _lines = tool.serve(lines, ServerOptions::named("lines"))?;
    let _http = tool.serve(http, ServerOptions::named("http").serving(Serve::Http))?;
    let manifests = shop.world().manifests();
    manifests.apply_text("mesh.yaml", REGISTRY_ONLY)?;
    let _agents = shop.start_agents()?;
    let host = "outside.example";
    let answers = |wanted: u16| -> TestResult {
        eventually(SOON, || status(&client, http, host), |status| *status == wanted)?;
        Ok(())
    };
    answers(502)?;
    settles(&client, lines, None)?;

    let entry = |host: &str, address: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside, namespace: shop}}
spec:
  hosts: [{host}]
  addresses: [{address}]
  resolution: NONE
  ports: [{{name: http, number: 8000, protocol: HTTP}}, {{name: tcp, number: 9000, protocol: TCP}}]
"
        );
        manifests.apply_text("entry.yaml", &text)
    };
    // Its address, then a network that it is in.
    for address in [outsider.ip4().to_string(), format!("{}/28", outsider.ip4())] {
        entry(host, &address)?;
        answers(200)?;
        settles(&client, lines, Some("lines"))?;
        entry("gone.example", "192.0.2.1")?;
        answers(502)?;
        settles(&client, lines, None)?;
    }
    Ok(())
}

#[test]
fn b6_b7_services_are_hidden_by_export_to_and_by_sidecars() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let manifests = shop.world().manifests();
    manifests.apply(NamespaceManifest::meshed("other"))?;
    let near = shop.pod("a", "client")?;
    let far = shop.world().node("a")?.pod("other/client")?;
    manifests.apply(far.manifest().label("app", "client"))?;
    let web = shop.pod("a", "web")?;
    let vip = shop.service("web", 80)?;
    let _web = shop.serve(&web)?;
    let agents = shop.start_agents()?;
    let resolves = |from: &str| -> Result<bool, Failure> {
        let to = "web.shop.svc.cluster.local:80";
        let explained = agents[0].meshctl(&["explain", "--from", from, "--to", to])?;
        Ok(explained["resolution"]["kind"] == "mesh")
    };
    settles(&near, vip.v4, Some("web"))?;
    settles(&far, vip.v4, Some("web"))?;
    assert!(resolves("other/client")?);

    let key = "networking.istio.io/exportTo";
    let hidden = |to: &str| {
        let (v4, v6) = (vip.v4.ip(), vip.v6.ip());
        let service = ServiceManifest::new("shop", "web").cluster_ip(v4).cluster_ip(v6);
        manifests.apply(service.port("http", 80, TARGET_PORT).selector("app", "web").annotation(key, to))
    };
    hidden(".")?;
    // Nobody else leads to the address here, as kube-proxy would.
    settles(&far, vip.v4, None)?;
    assert!(!resolves("other/client")? && resolves("shop/client")?);
    settles(&near, vip.v4, Some("web"))?;
    settles(&far, web.at4(TARGET_PORT), Some("web"))?;
    hidden("other,shop")?;
    settles(&far, vip.v4, Some("web"))?;

    let sidecar = |hosts: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: default, namespace: other}}
spec: {{egress: [{{hosts: [{hosts}]}}]}}
"
        );
        manifests.apply_text("sidecar.yaml", &text)
    };
    sidecar("./*")?;
    settles(&far, vip.v4, None)?;
    settles(&near, vip.v4, Some("web"))?;
    sidecar("'./*', shop/web.shop.svc.cluster.local")?;
    settles(&far, vip.v4, Some("web"))?;
    Ok(())
}

/// A client and a server in one zone, and a server in another.
struct Zones {
    shop: Shop,
    client: Pod,
    near: Pod,
    _servers: Vec<Server>,
    _agents: Vec<Agent>,
}

impl Zones {
    fn set(test: &str, serve: Serve) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let mut zones = String::new();
        for (node, zone) in [("a", "z1"), ("b", "z2")] {
            let name = shop.world().node(node)?.full_name();
            zones += &format!(
                "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}, labels: {{topology.kubernetes.io/region: r, topology.kubernetes.io/zone: {zone}}}}}}}\n"
            );
        }
        shop.world().manifests().apply_text("nodes.yaml", &zones)?;
        let client = shop.pod("a", "client")?;
        let near = shop.backend("a", "near", "web")?;
        let far = shop.backend("b", "far", "web")?;
        let mut servers = Vec::new();
        for (name, pod) in [("near", &near), ("far", &far)] {
            let options = ServerOptions::named(name).serving(serve);
            servers.push(pod.tool()?.serve(everywhere(TARGET_PORT), options)?);
        }
        let agents = shop.start_agents()?;
        Ok(Self { shop, client, near, _servers: servers, _agents: agents })
    }

    /// Waits until all of twenty tries come out as `wanted`.
    fn settles(&self, one: impl Fn() -> String, wanted: &str) -> TestResult {
        let all = || (0..20).map(|_| one()).collect::<Vec<_>>();
        eventually(SOON, all, |all| all.iter().all(|got| got == wanted))?;
        Ok(())
    }
}

#[test]
fn c7_requests_stay_in_the_clients_zone_until_its_endpoints_fail() -> TestResult {
    require_agent!();
    let zones = Zones::set(test_name!(), Serve::Http)?;
    let vip = zones.shop.service("web", 80)?;
    zones.shop.world().manifests().apply_text(
        "rule.yaml",
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}
",
    )?;
    let client = zones.client.place();
    let by = || {
        let answer = client.tool().and_then(|tool| tool.http_get(vip.v4, "web", "/"));
        let body = answer.map(|answer| answer.body).unwrap_or_default();
        ["near", "far"]
            .into_iter()
            .find(|name| body.contains(&format!("\"{name}\"")))
            .unwrap_or("none")
            .to_owned()
    };
    zones.settles(by, "near")?;
    // Kept connections end with it.
    zones.near.kill_all()?;
    zones.settles(by, "far")?;
    Ok(())
}

#[test]
fn b9_connections_prefer_the_clients_zone_without_any_rule() -> TestResult {
    require_agent!();
    let zones = Zones::set(test_name!(), Serve::Lines)?;
    let near_first = |service: ServiceManifest| {
        service.port("tcp", 80, TARGET_PORT).with("/spec/trafficDistribution", "PreferSameZone")
    };
    let vip = zones.shop.service_with("web", 80, near_first)?;
    let client = zones.client.place();
    let by = || {
        let seen = client.tool().and_then(|tool| tool.who(vip.v4));
        seen.map_or_else(|error| error.to_string(), |seen| seen.server)
    };
    zones.settles(by, "near")?;
    let manifest = zones.near.manifest().label("app", "web").port("http", TARGET_PORT);
    zones.shop.world().manifests().apply(manifest.clone().not_ready())?;
    zones.settles(by, "far")?;
    zones.shop.world().manifests().apply(manifest)?;
    zones.settles(by, "near")?;
    Ok(())
}
