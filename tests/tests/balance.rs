//! Which endpoint of a service a connection gets, and when the kernel does it alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::EndpointSliceManifest;
use mesh_tests::protocol::{Exchange, Load, LoadReport};
use mesh_tests::{Pod, Shop, TestResult, ToolError, eventually, limit, require_agent, shop, test_name};

fn ask(client: &Pod, to: SocketAddr, times: u64) -> Result<LoadReport, ToolError> {
    ask_by(4, client, to, times)
}

fn ask_by(workers: u32, client: &Pod, to: SocketAddr, times: u64) -> Result<LoadReport, ToolError> {
    let load = client.tool()?.start_load(Load {
        targets: vec![to],
        per_second: 0,
        workers,
        duration_ms: u64::try_from(limit(Duration::from_secs(20)).as_millis()).unwrap_or(u64::MAX),
        exchange: Exchange::ConnectAndAsk,
        timeout_ms: u64::try_from(limit(Duration::from_secs(2)).as_millis()).unwrap_or(u64::MAX),
    })?;
    // A tool that went away shows as an error of the report below.
    drop(eventually(
        Duration::from_secs(20),
        || load.report().map(|report| report.ok + report.failures()).unwrap_or(u64::MAX),
        |done| *done >= times,
    ));
    load.stop()
}

#[test]
fn on_one_node_the_first_connection_is_judged_and_the_next_go_direct() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = (shop.service("near", 80)?, shop.service("far", 80)?);
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    let count = |server: &Pod, path: &str| shop::opened(&agents[0], &client, server, path);
    client.tool()?.who(vips.0.v4)?;
    assert_eq!((count(&near, "proxy")?, count(&near, "direct")?), (1, 0));
    let direct = || count(&near, "direct").unwrap_or(0);
    let more = || client.tool().and_then(|tool| tool.who(vips.0.v4)).map(|_| direct());
    eventually(Duration::from_secs(5), more, |direct| direct.as_ref().is_ok_and(|count| *count > 0))??;
    let proxied = count(&near, "proxy")?;
    ask(&client, vips.0.v4, 50)?;
    assert_eq!(count(&near, "proxy")?, proxied, "none goes through the agent any more");
    // Another family is another verdict; another node is never Direct.
    ask(&client, vips.1.v4, 20)?;
    assert_eq!(count(&far, "direct")?, 0);
    assert!(count(&far, "proxy")? >= 20);
    let explained =
        agents[0].meshctl(&["explain", "--from", "shop/client", "--to", &vips.0.v4.to_string()])?;
    assert!(explained.to_string().contains("verdict_allow"), "{explained:#}");
    let explained = agents[0].meshctl(&["explain", "--from", "shop/client", "--to", "far:80"])?;
    assert!(explained.to_string().contains("remote_peer"), "{explained:#}");
    Ok(())
}

#[test]
fn connections_spread_over_local_and_remote_endpoints() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let mut servers = Vec::new();
    for (node, name) in [("a", "web-0"), ("a", "web-1"), ("b", "web-2"), ("b", "web-3")] {
        let pod = shop.backend(node, name, "web")?;
        servers.push(shop.serve(&pod)?);
    }
    let vip = shop.service("web", 80)?;
    shop.start_agents()?;
    for to in [vip.v4, vip.v6] {
        let report = ask(&client, to, 400)?;
        assert_eq!(report.failures(), 0, "{report:?}");
        let fewest = report.answered_by.values().min().copied().unwrap_or(0);
        assert_eq!(report.answered_by.len(), 4, "{report:?}");
        // An even share is a quarter; far below that is a defect of the balance, not of chance.
        assert!(fewest * 10 >= report.ok, "{report:?}");
    }
    Ok(())
}

#[test]
fn unready_endpoints_are_left_out_and_come_back() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let pods = [
        shop.backend("a", "web-0", "web")?,
        shop.backend("a", "web-1", "web")?,
        shop.backend("b", "web-2", "web")?,
    ];
    let mut servers = Vec::new();
    for pod in &pods {
        servers.push(shop.serve(pod)?);
    }
    let vip = shop.service("web", 80)?;
    shop.start_agents()?;
    let names = |report: &LoadReport| report.answered_by.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ask(&client, vip.v4, 200)?), ["web-0", "web-1", "web-2"]);
    for leaves in &pods {
        let manifest = leaves.manifest().label("app", "web");
        shop.world().manifests().apply(manifest.clone().not_ready())?;
        let rest: Vec<String> =
            pods.iter().map(|pod| pod.name().to_owned()).filter(|name| name != leaves.name()).collect();
        let without = || ask(&client, vip.v4, 100).map(|report| (names(&report), report.failures()));
        eventually(Duration::from_secs(8), without, |seen| {
            seen.as_ref().is_ok_and(|(names, failures)| *names == rest && *failures == 0)
        })??;
        shop.world().manifests().apply(manifest)?;
        let all = || ask(&client, vip.v4, 100).map(|report| (names(&report).len(), report.failures()));
        eventually(Duration::from_secs(8), all, |seen| matches!(seen, Ok((3, 0))))??;
    }
    Ok(())
}

#[test]
fn a_service_without_endpoints_refuses_at_once() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let vip = shop.service("nobody", 80)?;
    shop.start_agents()?;
    for to in vip.all() {
        let began = std::time::Instant::now();
        let refused = client.tool()?.connect(to).err().and_then(|error| error.errno());
        assert!(refused.is_some(), "{to} was taken");
        assert!(began.elapsed() < limit(Duration::from_millis(500)), "{to}: {:?}", began.elapsed());
    }
    Ok(())
}

#[test]
fn endpoint_slices_win_over_the_selector() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (chosen, other) = (shop.backend("b", "chosen", "web")?, shop.backend("a", "other", "web")?);
    let vip = shop.service("web", 80)?;
    let slice = |name: &str| EndpointSliceManifest::new(shop::NAMESPACE, name, "web").port("http", 8080);
    let manifests = shop.world().manifests();
    manifests.apply(slice("web-4").endpoint(chosen.ip4(), true).endpoint(other.ip4(), false))?;
    manifests.apply(slice("web-6").endpoint(chosen.ip6(), true))?;
    shop.start_agents()?;
    let _servers = [shop.serve(&chosen)?, shop.serve(&other)?];
    for to in vip.all() {
        let report = ask(&client, to, 30)?;
        assert_eq!(report.failures(), 0, "{report:?}");
        assert_eq!(report.answered_by.keys().collect::<Vec<_>>(), ["chosen"], "{to}");
    }
    Ok(())
}

#[test]
fn session_affinity_keeps_a_client_at_its_endpoint() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let clients: Vec<Pod> =
        (0..6).map(|number| shop.pod("a", &format!("client-{number}"))).collect::<Result<_, _>>()?;
    let mut servers = Vec::new();
    for number in 0..3 {
        let pod = shop.backend("a", &format!("web-{number}"), "web")?;
        servers.push(shop.serve(&pod)?);
    }
    // A client chooses by chance for each service: 24 times the same of three is no accident, six times may be one.
    let vips = ["web", "web-b", "web-c", "web-d"]
        .map(|name| {
            shop.service_with(name, 80, |service| {
                service.selector("app", "web").port("http", 80, 8080).session_affinity(600)
            })
        })
        .into_iter()
        .collect::<Result<Vec<shop::Vip>, _>>()?;
    shop.start_agents()?;
    let mut chosen: BTreeMap<String, u64> = BTreeMap::new();
    for client in &clients {
        for vip in &vips {
            // One after the other: two first connections at the same moment may each make a choice.
            let report = ask_by(1, client, vip.v4, 10)?;
            assert_eq!(report.failures(), 0, "{report:?}");
            assert_eq!(report.answered_by.len(), 1, "{}: {report:?}", client.name());
            for server in report.answered_by.into_keys() {
                *chosen.entry(server).or_default() += 1;
            }
        }
    }
    assert!(chosen.len() > 1, "six clients choose the same of three endpoints for four services: {chosen:?}");
    Ok(())
}
