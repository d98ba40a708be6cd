//! What clients see of the mesh, what happens to what they do not see, and which of several endpoints are near.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::protocol::{DnsBy, Serve};
use mesh_tests::runtime::Runtime;
use mesh_tests::shop::{TARGET_PORT, security};
use mesh_tests::tool::ServerOptions;
use mesh_tests::web::{
    self, HTTP_PORT, WebServer,
    messages::{Ask, Told},
};
use mesh_tests::world::NAMESERVER4;
use mesh_tests::{
    Agent, Controller, ControllerSeat, Failure, Place, Pod, Server, Shop, TestResult, eventually,
    hbone::everywhere, require_agent, test_name,
};
use serde_json::{Value, json};

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
fn s68_what_nothing_describes_goes_through_the_egress_proxy_of_a_sidecar() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let gateway = shop.pod("b", "gateway")?;
    let lines_port = TARGET_PORT + 1000;
    let vip = shop.service_with("gateway", 80, |service| {
        service.port("http", 80, HTTP_PORT).port("tcp", 90, lines_port)
    })?;
    let outsider = shop.world().outsider("outsider")?;
    let (lines, http) = (outsider.at4(9000), outsider.at4(HTTP_PORT));
    let _lines = outsider.tool()?.serve(lines, ServerOptions::named("outside"))?;
    let _http = WebServer::start(&outsider, "outside")?;
    let _gateway_lines = gateway.tool()?.serve(everywhere(lines_port), ServerOptions::named("gateway"))?;
    let _gateway_http = WebServer::start(&gateway, "gateway")?;
    let agents = shop.start_agents()?;
    let host = "unknown.example";
    let asked = || web::ask_once(&client, http, false, Ask::get(host, "/x"));
    let direct = || -> TestResult {
        settles(&client, lines, Some("outside"))?;
        let seen = asked()?.seen()?;
        assert_eq!((seen.server.as_str(), seen.host.as_str()), ("outside", host));
        Ok(())
    };
    direct()?;

    let sidecar = |selector: &str, proxy: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: through, namespace: shop}}
spec:
{selector}
  outboundTrafficPolicy: {{mode: ALLOW_ANY, egressProxy: {{{proxy}}}}}
"
        );
        shop.world().manifests().apply_text("sidecar.yaml", &text)
    };
    let of_client = "  workloadSelector: {labels: {app: client}}";
    sidecar(of_client, "host: gateway, port: {number: 90}")?;
    settles(&client, lines, Some("gateway"))?;
    settles(&gateway, lines, Some("outside"))?;
    // By the mesh's own means, and what is known goes where it went.
    let held = client.tool()?.connect(lines)?;
    assert_eq!(held.who()?.server, "gateway");
    let rows = || security(&agents[1], client.at4(0).ip(), &gateway);
    eventually(SOON, rows, |rows| matches!(rows, Ok(rows) if *rows == ["mutual_tls"]))??;
    drop(held);
    settles(&client, gateway.at4(lines_port), Some("gateway"))?;
    assert_eq!(web::ask_once(&client, vip.v4, false, Ask::get("gateway", "/"))?.seen()?.server, "gateway");
    let explained = agents[0].meshctl(&["explain", "--from", "shop/client", "--to", &lines.to_string()])?;
    let text = explained["addresses"][0]["undescribed"].as_str().unwrap_or_default().to_owned();
    assert!(text.contains("sent to outbound|90||gateway.shop") && text.contains("shop/through"), "{text}");

    // One for all pods of the namespace: the proxy's own traffic does not come back to it.
    sidecar("", "host: gateway, port: {number: 80}")?;
    let by_gateway = |answer: &Result<Told, Failure>| {
        let seen = answer.as_ref().ok().and_then(|told| told.seen().ok());
        seen.is_some_and(|seen| seen.server == "gateway")
    };
    let seen = eventually(SOON, asked, by_gateway)??.seen()?;
    assert_eq!((seen.host.as_str(), seen.path.as_str()), (host, "/x"));
    settles(&gateway, lines, Some("outside"))?;
    assert_eq!(web::ask_once(&gateway, http, false, Ask::get(host, "/"))?.seen()?.server, "outside");

    // One that is not there is no reason to go past it.
    sidecar(of_client, "host: nobody")?;
    eventually(SOON, || status(&client, http, host), |status| *status == 503)?;
    settles(&client, lines, None)?;
    let counted =
        || agents[0].metric(&["mesh_proxy_connections_closed", "reason=\"no_cluster\""]).unwrap_or(0.0);
    eventually(SOON, counted, |count| *count >= 1.0)?;

    shop.world().manifests().delete_file("sidecar.yaml")?;
    settles(&client, lines, Some("outside"))?;
    direct()
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

/// Node `a` with a server of the namespace `shop`, node `b` with a client of another, a controller and their agents.
struct Scoped {
    shop: Shop,
    controller: Controller,
    agents: Vec<Agent>,
    web: Pod,
    stranger: Pod,
    _server: Server,
}

/// xDS name of the server's service.
const WEB: &str = "shop/web.shop.svc.cluster.local";

impl Scoped {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        shop.world().manifests().apply(NamespaceManifest::meshed("other"))?;
        let web = shop.pod("a", "web")?;
        let stranger = shop.world().node("b")?.pod("other/client")?;
        shop.world().manifests().apply(stranger.manifest().label("app", "client"))?;
        let _server = shop.serve(&web)?;
        let seat = ControllerSeat::new(shop.world())?;
        let controller = seat.start(&[])?;
        let agents = shop.start_agents_of(&seat)?;
        Ok(Self { shop, controller, agents, web, stranger, _server })
    }

    /// Waits until the controller tells these nodes of the service, `None` is all, and the nodes know what they are told.
    fn wait_told(&self, nodes: Option<&[&str]>) -> TestResult {
        let full = |name: &&str| self.shop.world().node(name).map(|node| node.full_name().to_owned());
        let wanted = match nodes {
            Some(nodes) => json!(nodes.iter().map(full).collect::<Result<Vec<_>, _>>()?),
            None => Value::Null,
        };
        let told = || -> Result<Option<Value>, Failure> {
            let resources: Value = serde_json::from_str(&self.controller.get("/resources")?.1)?;
            let mut rows = resources.as_array().into_iter().flatten();
            Ok(rows.find(|row| row["name"] == WEB).map(|row| row["nodes"].clone()))
        };
        let wanted = Some(wanted);
        eventually(SOON, told, |told| told.as_ref().is_ok_and(|told| *told == wanted))??;
        for (agent, node) in self.agents.iter().zip(["a", "b"]) {
            let is_told = nodes.is_none_or(|nodes| nodes.contains(&node));
            let known = || agent.admin("/status").map(|status| status["snapshot"]["services"].as_u64());
            let wanted = u64::from(is_told);
            eventually(SOON, known, |known| matches!(known, Ok(Some(known)) if *known == wanted))??;
        }
        Ok(())
    }

    /// What a pod's resolver says of the service.
    fn resolved(&self, client: &Pod) -> Vec<IpAddr> {
        let resolver = SocketAddr::from((NAMESERVER4, 53));
        let name = "web.shop.svc.cluster.local.";
        let answer = client.tool().and_then(|tool| tool.dns(resolver, name, "A", DnsBy::ConnectedUdp));
        answer.map(|answer| answer.addresses).unwrap_or_default()
    }
}

#[test]
fn b6_a_node_is_told_of_a_hidden_service_when_a_pod_comes_that_sees_it() -> TestResult {
    require_agent!();
    let scene = Scoped::set(test_name!())?;
    let (shop, agents) = (&scene.shop, &scene.agents);
    let own = |service: ServiceManifest| {
        service.port("http", 80, TARGET_PORT).annotation("networking.istio.io/exportTo", ".")
    };
    let vip = shop.service_with("web", 80, own)?;
    scene.wait_told(Some(&["a"]))?;
    // As what is outside of the mesh: nobody else leads to the address here, as kube-proxy would.
    settles(&scene.stranger, vip.v4, None)?;
    assert!(scene.resolved(&scene.stranger).is_empty());
    let explained = |to: &str| agents[1].meshctl(&["explain", "--from", "other/client", "--to", to]);
    assert_ne!(explained("web.shop.svc.cluster.local:80")?["resolution"]["kind"], "mesh");
    explained(&vip.v4.to_string())?;

    let late = shop.pod("b", "late")?;
    agents[1].wait_enrolled([&late])?;
    scene.wait_told(Some(&["a", "b"]))?;
    for addr in [vip.v4, vip.v6] {
        settles(&late, addr, Some("web"))?;
    }
    assert_eq!(scene.resolved(&late), [vip.v4.ip()]);
    let connection = late.tool()?.connect(vip.v4)?;
    connection.who()?;
    let rows = || security(&agents[1], late.at4(0).ip(), &scene.web);
    eventually(SOON, rows, |rows| matches!(rows, Ok(rows) if *rows == ["mutual_tls"]))??;
    drop(connection);
    settles(&scene.stranger, vip.v4, None)?;

    shop.world().manifests().delete("Pod", "shop", "late")?;
    scene.wait_told(Some(&["a"]))?;
    settles(&scene.stranger, vip.v4, None)?;
    let open = ServiceManifest::new("shop", "web").cluster_ip(vip.v4.ip()).cluster_ip(vip.v6.ip());
    shop.world().manifests().apply(open.port("http", 80, TARGET_PORT).selector("app", "web"))?;
    scene.wait_told(None)?;
    settles(&scene.stranger, vip.v4, Some("web"))?;
    Ok(())
}

#[test]
fn b7_a_node_is_not_told_of_what_the_sidecars_of_all_its_pods_leave_out() -> TestResult {
    require_agent!();
    let scene = Scoped::set(test_name!())?;
    let shop = &scene.shop;
    let vip = shop.service("web", 80)?;
    scene.wait_told(None)?;
    settles(&scene.stranger, vip.v4, Some("web"))?;
    let sidecar = |hosts: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: default, namespace: other}}
spec: {{egress: [{{hosts: [{hosts}]}}]}}
"
        );
        shop.world().manifests().apply_text("sidecar.yaml", &text)
    };
    sidecar("./*")?;
    scene.wait_told(Some(&["a"]))?;
    settles(&scene.stranger, vip.v4, None)?;
    let late = shop.pod("b", "late")?;
    scene.wait_told(Some(&["a", "b"]))?;
    settles(&late, vip.v4, Some("web"))?;
    settles(&scene.stranger, vip.v4, None)?;
    sidecar("'./*', shop/*")?;
    scene.wait_told(None)?;
    settles(&scene.stranger, vip.v4, Some("web"))?;
    Ok(())
}

#[test]
fn b6_a_pods_first_connect_finds_what_only_its_namespace_sees() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let web = shop.pod("a", "web")?;
    let own = |service: ServiceManifest| {
        service.port("http", 80, TARGET_PORT).annotation("networking.istio.io/exportTo", ".")
    };
    let vip = shop.service_with("web", 80, own)?;
    let _server = shop.serve(&web)?;
    let seat = ControllerSeat::new(shop.world())?;
    let _controller = seat.start(&[])?;
    let node = shop.world().node("b")?;
    let runtime = Runtime::of(shop.world().directory(), node)?;
    assert!(runtime.manage("install")?.starts_with("installed"));
    let args = runtime.agent_args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let _near = shop.world().node("a")?.agent().controller(&seat).start()?;
    let agent = node.agent().controller(&seat).args(&args).start()?;
    // The first of its namespace on this node.
    let client = node.pod("shop/client")?;
    let scheduled = client.manifest().with("/metadata/annotations", json!({})).port("http", TARGET_PORT);
    shop.world().manifests().apply(scheduled.with("/status", json!({"phase": "Pending"})))?;
    runtime.add(&client)?;
    assert_eq!(client.tool()?.connect(vip.v4)?.who()?.server, "web");
    let starts = agent.metric(&["mesh_pod_starts_total", "heard=\"at_once\""])?;
    assert_eq!(starts, 1.0);
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
