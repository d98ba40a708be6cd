//! What `meshctl` says is what happens: every view against real traffic.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::{MtlsMode, PeerAuthenticationManifest};
use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::tool::RunningLoad;
use mesh_tests::{
    Agent, Counters, Failure, Pod, Shop, TestResult, ToolError, eventually, limit, require_agent, test_name,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn steady(client: &Pod, targets: Vec<SocketAddr>) -> Result<RunningLoad, ToolError> {
    let timeout_ms = u64::try_from(limit(Duration::from_secs(2)).as_millis()).unwrap_or(u64::MAX);
    let exchange = Exchange::ConnectAndAsk;
    client.tool()?.start_load(Load {
        targets,
        per_second: 100,
        workers: 2,
        duration_ms: 0,
        exchange,
        timeout_ms,
    })
}

#[test]
fn status_tells_of_the_agent_its_pods_its_programs_and_its_maps() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let client = shop.pod("a", "client")?;
    shop.pod("b", "far")?;
    shop.unmeshed_pod("a", "plain")?;
    shop.service("far", 80)?;
    let agent = node.agent().start()?;
    let status = agent.meshctl(&["status"])?;
    assert_eq!(status["agent"]["phase"], "ready", "{status:#}");
    assert_eq!(status["agent"]["node"], node.full_name());
    assert_eq!(status["agent"]["pid"], agent.pid());
    assert!(rows(&status["agent"]["waiting_for"]).is_empty());
    assert!(
        status["agent"]["heartbeat_age_ns"].as_u64().is_some_and(|age| age < 3_000_000_000),
        "{status:#}"
    );
    assert_eq!((&status["snapshot"]["workloads"], &status["snapshot"]["services"]), (&3.into(), &1.into()));
    // Local pods that shall be in the mesh, and no others.
    let pods = rows(&status["pods"]);
    assert_eq!(pods.len(), 1, "{pods:#?}");
    assert_eq!((&pods[0]["namespace"], &pods[0]["name"]), (&"shop".into(), &client.name().into()));
    assert_eq!(pods[0]["state"], "enrolled");
    assert!(rows(&pods[0]["addrs"]).contains(&client.ip6().to_string().into()), "{pods:#?}");
    // The kernel has what the agent says it has.
    let programs = node.kernel().program_ids()?;
    for program in rows(&status["kernel"]["programs"]) {
        assert_eq!(program["attached"], true, "{program}");
    }
    let shown = |name: &str| {
        rows(&status["kernel"]["programs"])
            .iter()
            .find(|row| row["name"] == name)
            .map(|row| row["id"].clone())
    };
    for name in ["connect4", "connect6"] {
        assert_eq!(shown(name), programs.get(name).map(|id| (*id).into()), "{status:#}");
    }
    let maps = rows(&status["maps"]);
    for name in ["PODS", "SERVICES", "BACKENDS", "WORKLOADS"] {
        let map = maps.iter().find(|map| map["name"] == name);
        let used = map.and_then(|map| map["entries"].as_u64()).unwrap_or(0);
        assert!(used > 0, "{name} in {maps:#?}");
    }
    Ok(())
}

#[test]
fn connections_lists_live_ones_on_both_paths_and_forgets_closed_ones() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let (near_vip, far_vip) = (shop.service("near", 80)?, shop.service("far", 80)?);
    let outsider = shop.world().outsider("outsider")?;
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    let direct = node.kernel().dial_directly(&client, near_vip.v4)?;
    let proxied = client.tool()?.connect(far_vip.v6)?;
    proxied.who()?;
    let captured = outsider.tool()?.connect(near.at4(8080))?;
    captured.who()?;
    let find = |path: &str, direction: &str, dialled: SocketAddr| -> Result<Option<Value>, Failure> {
        let view = agents[0].meshctl(&["connections"])?;
        let wanted = |row: &&Value| {
            row["path"] == path && row["direction"] == direction && row["dialled"] == dialled.to_string()
        };
        Ok(rows(&view["connections"]).iter().find(wanted).cloned())
    };
    let row = find("direct", "outbound", near_vip.v4)?.ok_or_else(|| anyhow::anyhow!("no Direct one"))?;
    assert_eq!(
        (&row["source"], &row["destination"]),
        (&"shop/client".into(), &"shop/near".into()),
        "{row:#}"
    );
    assert_eq!(
        (&row["service"], &row["destination_addr"]),
        (&"shop/near".into(), &near.at4(8080).to_string().into())
    );
    let row = find("proxy", "outbound", far_vip.v6)?.ok_or_else(|| anyhow::anyhow!("no proxied one"))?;
    assert_eq!((&row["source"], &row["destination"]), (&"shop/client".into(), &"shop/far".into()), "{row:#}");
    assert!(row["bytes_tx"].as_u64().is_some_and(|bytes| bytes >= 4), "{row:#}");
    assert!(row["bytes_rx"].as_u64().is_some_and(|bytes| bytes > 4), "{row:#}");
    let row = find("proxy", "inbound", near.at4(8080))?.ok_or_else(|| anyhow::anyhow!("no captured one"))?;
    assert!(
        row["source_addr"].as_str().is_some_and(|a| a.starts_with(&outsider.ip4().to_string())),
        "{row:#}"
    );
    drop((direct, proxied, captured));
    let left = || agents[0].meshctl(&["connections"]).map(|view| rows(&view["connections"]).len());
    eventually(SOON, left, |left| matches!(left, Ok(0)))??;
    Ok(())
}

#[test]
fn top_shows_the_rates_of_each_edge() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let targets = vec![shop.service("near", 80)?.v4, shop.service("far", 80)?.v4];
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    let load = steady(&client, targets)?;
    eventually(SOON, || load.report().map_or(0, |report| report.ok), |ok| *ok > 50)?;
    let top = agents[0].meshctl(&["top", "--once"])?;
    let edge = |destination: &str, path: &str| {
        rows(&top["rows"]).iter().find(|row| {
            row["source"] == "shop/client" && row["destination"] == destination && row["path"] == path
        })
    };
    for (destination, path) in [("shop/near", "direct"), ("shop/far", "proxy")] {
        let row = edge(destination, path).ok_or_else(|| anyhow::anyhow!("no {path} edge in {top:#}"))?;
        let rate = row["conns_per_s"].as_f64().unwrap_or(0.0);
        // Half of 100 a second each; the machine may be slow.
        assert!((5.0..=100.0).contains(&rate), "{row:#}");
        assert_eq!(row["service"], destination, "{row:#}");
        assert!(row["connect_us"].as_f64().is_some_and(|us| us > 0.0), "{row:#}");
        assert_eq!(row["failed"], 0, "{row:#}");
    }
    let report = load.stop()?;
    assert_eq!(report.failures(), 0, "{report:?}");
    Ok(())
}

#[test]
fn profile_shows_what_each_hook_cost_and_did() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let agent = node.agent().start()?;
    let _server = shop.serve(&web)?;
    node.kernel().dial_directly(&client, vip.v4)?;
    let load = steady(&client, vec![vip.v4])?;
    let profile = agent.meshctl(&["profile", "--seconds", "1"])?;
    drop(load.stop()?);
    for name in ["connect4", "sock_ops", "arrival"] {
        let program = rows(&profile["programs"]).iter().find(|row| {
            row["program"].as_str().is_some_and(|program| program.replace("tcp_events", "sock_ops") == name)
        });
        let program = program.ok_or_else(|| anyhow::anyhow!("{name} is not in {profile:#}"))?;
        assert!(program["calls"].as_u64().is_some_and(|calls| calls > 5), "{program}");
        let cost = program["ns_per_call"].as_f64().unwrap_or(0.0);
        assert!(cost > 10.0 && cost < 10_000_000.0, "{program}");
    }
    let counted = |hook: &str, outcome: &str, reason: &str| {
        rows(&profile["counters"])
            .iter()
            .find(|row| row["hook"] == hook && row["outcome"] == outcome && row["reason"] == reason)
            .and_then(|row| row["count"].as_u64())
    };
    assert!(counted("connect4", "direct", "verdict_allow") > Some(5), "{profile:#}");
    assert!(counted("sk_lookup", "pass", "ticket") > Some(5), "{profile:#}");
    for name in ["connect_ns", "duration_ns"] {
        let histogram = rows(&profile["histograms"]).iter().find(|row| row["name"] == name);
        let histogram = histogram.ok_or_else(|| anyhow::anyhow!("{name} is not in {profile:#}"))?;
        assert!(histogram["count"].as_u64() > Some(5), "{histogram:#}");
        assert!(histogram["p99"].as_f64() >= histogram["p50"].as_f64(), "{histogram:#}");
    }
    Ok(())
}

/// A client with everything it could dial.
struct Sights {
    shop: Shop,
    agents: Vec<Agent>,
    client: Pod,
    _servers: Vec<mesh_tests::Server>,
}

impl Sights {
    /// What `explain` says of `client` dialling `to`: hook, outcome and reason of each decision.
    fn explained(&self, to: &str) -> Result<Vec<Value>, Failure> {
        let view = self.agents[0].meshctl(&["explain", "--from", "shop/client", "--to", to])?;
        assert_eq!((&view["from"], &view["enrolled"]), (&"shop/client".into(), &true.into()), "{view:#}");
        let addresses = rows(&view["addresses"]);
        let decisions: Vec<Value> =
            addresses.iter().flat_map(|row| rows(&row["decisions"]).to_vec()).collect();
        assert!(!decisions.is_empty(), "{view:#}");
        Ok(decisions)
    }

    /// Explain, dial, and compare with what the hooks then counted.
    fn agrees(&self, to: SocketAddr) -> Result<(String, String), Failure> {
        let decision = self.explained(&to.to_string())?.swap_remove(0);
        let kernel = self.shop.world().node("a")?.kernel();
        let before = kernel.counters()?;
        // How it ends is not the question here.
        drop(self.client.tool()?.who(to));
        let counted = kernel.counters()?.since(&before);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (hook, outcome, reason) =
            (text(&decision["hook"]), text(&decision["outcome"]), text(&decision["reason"]));
        assert_eq!(
            counted.count_at(&hook, &outcome, &reason),
            1,
            "{to}: {decision:#}, but counted {counted:?}"
        );
        assert!(!text(&decision["text"]).is_empty());
        let server = &decision["server"];
        let local = decision["backend"]["local"] == true && outcome != "deny";
        if local && !server.is_null() {
            arrival_agrees(&counted, server, to);
        }
        Ok((outcome, reason))
    }
}

/// The server's side, as explained, was counted too.
fn arrival_agrees(counted: &Counters, server: &Value, to: SocketAddr) {
    let (outcome, reason) = (&server["arrival"]["outcome"], &server["arrival"]["reason"]);
    let (outcome, reason) = (outcome.as_str().unwrap_or_default(), reason.as_str().unwrap_or_default());
    assert!(counted.count_at("sk_lookup", outcome, reason) >= 1, "{to}: {server:#}, but counted {counted:?}");
}

#[test]
fn explain_foretells_what_the_hooks_then_do() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let client = node.pod("shop/client")?;
    let excluded = client
        .manifest()
        .annotation("nodemesh.dev/exclude-outbound-ports", "9999")
        .annotation("nodemesh.dev/exclude-outbound-cidrs", "198.51.100.0/24");
    shop.world().manifests().apply(excluded)?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let open = shop.pod("b", "open")?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let vips = [shop.service("near", 80)?, shop.service("far", 80)?, shop.service("open", 80)?];
    let (own, empty, unmeshed) =
        (shop.service("client", 80)?, shop.service("nobody", 80)?, shop.service("plain", 80)?);
    shop.world()
        .manifests()
        .apply(PeerAuthenticationManifest::new("shop", "open", MtlsMode::Disable).selector("app", "open"))?;
    let agents = shop.start_agents()?;
    let mut servers = Vec::new();
    for pod in [&client, &near, &far, &open, &plain] {
        servers.push(shop.serve(pod)?);
    }
    let sights = Sights { shop, agents, client: client.clone(), _servers: servers };
    let expected = |to: SocketAddr, outcome: &str, reason: &str| -> TestResult {
        let found = sights.agrees(to)?;
        assert_eq!(found, (outcome.to_owned(), reason.to_owned()), "{to}");
        Ok(())
    };
    for to in [vips[0].v4, vips[0].v6] {
        expected(to, "proxy", "no_verdict")?;
        eventually(
            SOON,
            || sights.explained(&to.to_string()).map_err(|error| format!("{error:?}")),
            |decisions| decisions.as_ref().is_ok_and(|d| d[0]["reason"] == "verdict_allow"),
        )?
        .map_err(anyhow::Error::msg)?;
        expected(to, "direct", "verdict_allow")?;
    }
    for (to, outcome, reason) in [
        (vips[1].v4, "proxy", "remote_peer"),
        (far.at6(8080), "proxy", "remote_peer"),
        (vips[2].v4, "direct", "plain_peer"),
        (unmeshed.v4, "direct", "unmeshed"),
        (own.v4, "direct", "hairpin"),
        (empty.v6, "deny", "no_endpoints"),
        (client.at4(8080), "bypass", "own_address"),
        ("127.0.0.1:8080".parse()?, "bypass", "loopback"),
        (near.at4(9999), "bypass", "excluded_port"),
        ("198.51.100.1:80".parse()?, "bypass", "excluded_prefix"),
        ("203.0.113.1:80".parse()?, "bypass", "unknown_destination"),
    ] {
        expected(to, outcome, reason)?;
    }
    Ok(())
}

#[test]
fn explain_resolves_names_as_the_pod_would() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let agent = shop.world().node("a")?.agent().start()?;
    agent.wait_enrolled([&client, &web])?;
    let explain = |from: &str, to: &str| agent.meshctl(&["explain", "--from", from, "--to", to]);
    for host in ["web", "web.shop", "web.shop.svc.cluster.local"] {
        let view = explain("client", &format!("{host}:80"))?;
        assert_eq!(view["resolution"]["kind"], "mesh", "{view:#}");
        let dialled: Vec<&Value> = rows(&view["addresses"]).iter().map(|row| &row["dialled"]).collect();
        for address in [vip.v4, vip.v6] {
            assert!(dialled.contains(&&Value::from(address.to_string())), "{view:#}");
        }
        assert!(rows(&view["addresses"]).iter().all(|row| row["service"] == "shop/web"), "{view:#}");
    }
    assert_eq!(explain("shop/client", "example.org:443")?["resolution"]["kind"], "forward");
    assert!(explain("shop/nobody", "web:80").is_err(), "a pod that is not here cannot be explained");
    Ok(())
}

#[test]
fn explain_shows_what_strict_mode_and_a_dead_agent_would_mean() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    shop.mode(MtlsMode::Strict)?;
    let agent = shop.world().node("a")?.agent().start()?;
    let _server = shop.serve(&web)?;
    agent.wait_enrolled([&client])?;
    client.tool()?.who(web.at4(8080))?;
    let to = web.at4(8080).to_string();
    let view = agent.meshctl(&["explain", "--from", "shop/client", "--to", &to])?;
    let server = &view["addresses"][0]["decisions"][0]["server"];
    assert_eq!((&server["mode"], &server["fail_closed"]), (&"STRICT".into(), &true.into()), "{view:#}");
    // By then it has a verdict, so a ticket, so no need of an agent.
    assert_eq!(server["agent_down"]["outcome"], "pass", "{view:#}");
    let late = shop.pod("a", "late")?;
    agent.wait_enrolled([&late])?;
    let view = agent.meshctl(&["explain", "--from", "shop/late", "--to", &to])?;
    let server = &view["addresses"][0]["decisions"][0]["server"];
    assert_eq!(server["agent_down"]["outcome"], "drop", "{view:#}");
    agent.kill9();
    client.tool()?.who(web.at4(8080))?;
    assert!(late.tool()?.who(web.at4(8080)).is_err());
    Ok(())
}

#[test]
fn metrics_carry_istios_names_and_what_the_hooks_counted() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let (near_vip, far_vip) = (shop.service("near", 80)?, shop.service("far", 80)?);
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    node.kernel().dial_directly(&client, near_vip.v4)?;
    for _ in 0..5 {
        client.tool()?.who(far_vip.v4)?;
        client.tool()?.who(near_vip.v4)?;
    }
    let (status, ready) = agents[0].http("/readyz")?;
    assert_eq!(status, 200, "{ready}");
    // What the agent carries has Istio's names; what it never sees is counted by the kernel, edge by edge.
    let at_least = |parts: &[&str], least: f64| -> TestResult {
        eventually(
            SOON,
            || agents[0].metric(parts),
            |value| value.as_ref().is_ok_and(|value| *value >= least),
        )??;
        Ok(())
    };
    let far = ["reporter=\"source\"", "source_workload=\"client\"", "destination_workload=\"far\""];
    at_least(&[&["istio_tcp_connections_opened_total"], &far[..]].concat(), 5.0)?;
    at_least(&[&["istio_tcp_sent_bytes_total"], &far[..]].concat(), 1.0)?;
    at_least(&["mesh_edge_connections_opened_total", "path=\"direct\"", "shop/near"], 5.0)?;
    let counted = node.kernel().counters()?.count_at("connect4", "direct", "verdict_allow");
    let shown = ["outcome=\"direct\"", "reason=\"verdict_allow\"", "hook=\"connect4\""];
    assert!(agents[0].metric(&shown)? as u64 >= counted.min(5), "{}", agents[0].http("/metrics")?.1);
    Ok(())
}
