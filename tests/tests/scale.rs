//! Many of everything: services, pods at once, connections from one pod, entries of a map.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Shop, TestResult, World, eventually, limit, require_agent, shop, test_name, waiting,
};
use serde_json::{Value, json};

/// The row of a map in `meshctl status`.
fn map_row(agent: &Agent, name: &str) -> Value {
    let status = agent.meshctl(&["status"]).unwrap_or_default();
    let rows = status["maps"].as_array().cloned().unwrap_or_default();
    rows.into_iter().find(|row| row["name"] == name).unwrap_or_default()
}

#[test]
fn ten_thousand_services_are_loaded_and_each_works() -> TestResult {
    require_agent!();
    const SERVICES: u16 = 10_000;
    const READY: Duration = Duration::from_secs(40);
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let services: Vec<Value> = (1000..1000 + SERVICES)
        .map(|number| {
            let (v4, v6) = World::service_ips(number);
            let service = ServiceManifest::new(shop::NAMESPACE, &format!("web-{number}"));
            let service = service.cluster_ip(v4).cluster_ip(v6).port("http", 80, shop::TARGET_PORT);
            service.selector("app", "web").into()
        })
        .collect();
    for (number, part) in services.chunks(500).enumerate() {
        shop.world().manifests().apply_all(&format!("services-{number}.yaml"), part)?;
    }
    let began = Instant::now();
    let agent = node.agent().launch()?;
    eventually(READY, || agent.wait_ready(), |ready| ready.is_ok() || !agent.is_running())??;
    eprintln!("ready with {SERVICES} services in {:?}", began.elapsed());
    assert_eq!(agent.meshctl(&["status"])?["snapshot"]["services"], SERVICES);
    let map = map_row(&agent, "SERVICES");
    assert_eq!((&map["entries"], &map["refused"]), (&(2 * u64::from(SERVICES)).into(), &0.into()), "{map}");
    let _server = shop.serve(&web)?;
    let picked = [1000, 1000 + SERVICES / 2, 1000 + SERVICES - 1].map(World::service_ips);
    for (v4, v6) in picked {
        for to in [SocketAddr::from((v4, 80)), SocketAddr::from((v6, 80))] {
            assert_eq!(client.tool()?.who(to)?.server, "web", "{to}");
        }
    }
    // One more endpoint changes all of them; one more service changes one.
    let began = Instant::now();
    let second = shop.backend("a", "web-again", "web")?;
    let _second = shop.serve(&second)?;
    let (v4, _) = picked[1];
    let answering = || -> Result<BTreeSet<String>, mesh_tests::ToolError> {
        (0..8).map(|_| client.tool()?.who((v4, 80).into()).map(|seen| seen.server)).collect()
    };
    eventually(READY, answering, |seen| seen.as_ref().is_ok_and(|seen| seen.len() == 2))??;
    eprintln!("an endpoint of {SERVICES} services was taken up in {:?}", began.elapsed());
    let began = Instant::now();
    let late = shop.service_with("late", 80, |service| {
        service.with("/spec/selector", json!({"app": "web"})).port("http", 80, 8080)
    })?;
    eventually(Duration::from_secs(10), || client.tool()?.who(late.v6), |answer| answer.is_ok())??;
    eprintln!("a service beside {SERVICES} others was taken up in {:?}", began.elapsed());
    Ok(())
}

#[test]
fn a_hundred_pods_are_enrolled_at_once_and_leave_again() -> TestResult {
    require_agent!();
    const PODS: usize = 100;
    let world = World::with_nodes(test_name!(), &["a"])?;
    world.manifests().apply(NamespaceManifest::meshed("default"))?;
    let node = world.node("a")?;
    let pods = node.pods_in_bulk("pod", PODS)?;
    let documents: Vec<Value> = pods.iter().map(|pod| pod.manifest().into()).collect();
    let agent = node.agent().start()?;
    let began = Instant::now();
    world.manifests().apply_all("pods.yaml", &documents)?;
    agent.wait_enrolled(&pods)?;
    eprintln!("{PODS} pods enrolled in {:?}", began.elapsed());
    assert_eq!(map_row(&agent, "INBOUND")["entries"], PODS);
    let server = &pods[PODS - 1];
    let _server = server.tool()?.serve("[::]:8080".parse()?, ServerOptions::named("last"))?;
    let before = node.kernel().counters()?;
    for client in pods.iter().step_by(20) {
        assert_eq!(client.tool()?.who(server.at4(8080))?.server, "last");
        assert_eq!(client.tool()?.who(server.at6(8080))?.server, "last");
    }
    let counted = node.kernel().counters()?.since(&before);
    assert_eq!(counted.count("proxy", "no_verdict"), 10, "{counted:?}");
    world.manifests().delete_file("pods.yaml")?;
    let left = || map_row(&agent, "INBOUND")["entries"].as_u64();
    eventually(Duration::from_secs(10), left, |left| *left == Some(0))?;
    let arrivals = node.kernel().link_ids()?.keys().filter(|name| name.starts_with("arrival")).count();
    assert_eq!(arrivals, 0, "links of pods that have left");
    assert_eq!(pods[0].tool()?.who(server.at4(8080))?.server, "last");
    Ok(())
}

#[test]
fn a_full_table_of_services_is_reported_and_the_rest_works() -> TestResult {
    require_agent!();
    // More than the map's 65 536 frontends: two addresses each, 100 ports a service.
    const SERVICES: u16 = 340;
    const PORTS: u16 = 100;
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let agent = node.agent().start()?;
    let vip = shop.service("web", 80)?;
    let _server = shop.serve(&web)?;
    eventually(Duration::from_secs(5), || client.tool()?.who(vip.v4), |answer| answer.is_ok())??;
    let many: Vec<Value> = (1000..1000 + SERVICES)
        .map(|number| {
            let (v4, v6) = World::service_ips(number);
            let ports: Vec<Value> = (1..=PORTS)
                .map(|port| json!({"name": format!("p{port}"), "port": port, "targetPort": 8080}))
                .collect();
            let service = ServiceManifest::new(shop::NAMESPACE, &format!("many-{number}"));
            service.cluster_ip(v4).cluster_ip(v6).with("/spec/ports", ports).into()
        })
        .collect();
    shop.world().manifests().apply_all("many.yaml", &many)?;
    let full = || map_row(&agent, "SERVICES");
    let row = eventually(Duration::from_secs(20), full, |row| row["refused"].as_u64() > Some(0))?;
    assert_eq!(row["entries"], row["max_entries"], "{row}");
    assert!(agent.log_text().contains("SERVICES"), "{}", agent.log_text());
    for to in vip.all() {
        assert_eq!(client.tool()?.who(to)?.server, "web", "what was there before stays");
    }
    shop.world().manifests().delete_file("many.yaml")?;
    eventually(Duration::from_secs(20), full, |row| row["refused"] == 0)?;
    let late = shop.service_with("late", 80, |service| {
        service.with("/spec/selector", json!({"app": "web"})).port("http", 80, 8080)
    })?;
    eventually(Duration::from_secs(5), || client.tool()?.who(late.v6), |answer| answer.is_ok())??;
    Ok(())
}

#[test]
fn a_pod_whose_settings_do_not_fit_is_reported_and_its_neighbours_are_enrolled() -> TestResult {
    require_agent!();
    // EXCLUDED has room for 16 384 prefixes of all pods.
    const PREFIXES: u32 = 17_000;
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let greedy = node.pod("shop/greedy")?;
    let prefixes: Vec<String> = (0..PREFIXES)
        .map(|number| format!("{}/32", std::net::Ipv4Addr::from(0x6440_0000 + number)))
        .collect();
    let excluded = greedy.manifest().annotation("nodemesh.dev/exclude-outbound-cidrs", &prefixes.join(","));
    shop.world().manifests().apply(excluded)?;
    let agent = node.agent().start()?;
    agent.wait_enrolled([&client, &web])?;
    let row = agent.pod_status(&greedy)?;
    assert_eq!(row["state"], "failed", "{row:#}");
    assert!(row["reason"].as_str().is_some_and(|reason| reason.contains("EXCLUDED")), "{row:#}");
    let _server = shop.serve(&web)?;
    node.kernel().dial_directly(&client, web.at4(8080))?;
    // Nothing of the failed attempt stays; with settings that fit it joins.
    shop.world().manifests().apply(greedy.manifest())?;
    eventually(
        Duration::from_secs(15),
        || agent.pod_status(&greedy).map(|row| row["state"].clone()),
        |state| state.as_ref().is_ok_and(|state| *state == "enrolled"),
    )??;
    let left = map_row(&agent, "EXCLUDED");
    assert_eq!(left["entries"], 0, "{left}");
    Ok(())
}

#[test]
fn one_pod_connects_2000_times_a_second_and_closes_first_and_no_port_runs_out() -> TestResult {
    require_agent!();
    // A minute, as TIME_WAIT lasts. Under emulation no guest makes this rate: fewer, with fewer ports to use up.
    let long = std::env::var_os("MESH_TESTS_LONG").is_some_and(|value| value == "1");
    let (per_second, seconds): (u32, u64) = match (waiting::in_vm(), long) {
        (true, false) => (200, 15),
        (true, true) => (200, 60),
        (false, _) => (2000, 60),
    };
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let mut servers = Vec::new();
    let mut targets = Vec::new();
    for (node, name) in [("a", "one"), ("b", "two"), ("b", "three")] {
        let pod = shop.pod(node, name)?;
        servers.push(shop.serve(&pod)?);
        targets.push(shop.service(name, 80)?.v4);
    }
    shop.start_agents()?;
    // So few that each serves many connections to each destination while earlier ones are in TIME_WAIT.
    let ports = u64::from(per_second) * seconds / 24;
    client.sysctl("ipv4/ip_local_port_range", &format!("20000 {}", 20_000 + ports))?;
    let load = client.tool()?.start_load(Load {
        targets,
        per_second,
        workers: 32,
        duration_ms: seconds * 1000,
        exchange: Exchange::ConnectAndAsk,
        timeout_ms: u64::try_from(limit(Duration::from_secs(5)).as_millis())?,
    })?;
    let elapsed = || load.report().map(|report| report.elapsed_ms);
    let over = |elapsed: &Result<u64, _>| !elapsed.as_ref().is_ok_and(|ms| *ms < seconds * 1000);
    eventually(Duration::from_secs(seconds + 20), elapsed, over)??;
    let report = load.stop()?;
    eprintln!("{report:?}");
    assert!(!report.failed.keys().any(|reason| reason.contains("EADDRNOTAVAIL")), "{report:?}");
    assert_eq!(report.failures(), 0, "{report:?}");
    // The rate is the machine's affair; that every port was used again and again is what counts here.
    let least = report.answered_by.values().min().copied().unwrap_or(0);
    assert!(least >= 3 * ports, "only {least} connections by {ports} ports: {report:?}");
    assert_eq!(report.answered_by.len(), 3, "{report:?}");
    Ok(())
}
