//! What DestinationRules do to the choice of an endpoint and to the way it is spoken to, end to end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_tests::manifests::ServiceManifest;
use mesh_tests::shop::NAMESPACE;
use mesh_tests::web::messages::{Ask, Script, Serving, Told};
use mesh_tests::web::{self, HTTP_PORT, WebScene, WebServer};
use mesh_tests::{Failure, TestResult, eventually, require_agent, test_name};

const SOON: Duration = Duration::from_secs(10);

fn get(path: &str) -> Ask {
    Ask::get("web", path)
}

/// What is answered to so many requests on one connection.
fn asked(scene: &WebScene, request: &Ask, times: usize) -> Result<Vec<Told>, Failure> {
    let script = Script { to: scene.vip.v4, http2: false, requests: vec![request.clone(); times] };
    web::ask(&scene.client, &script)
}

/// How many of so many requests each server has answered.
fn shares(scene: &WebScene, times: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for told in asked(scene, &get("/"), times).unwrap_or_default() {
        let server = told.header("x-server").filter(|_| told.status == 200).unwrap_or("nobody");
        *shares.entry(server.to_owned()).or_default() += 1;
    }
    shares
}

fn of(shares: &BTreeMap<String, usize>, server: &str) -> usize {
    shares.get(server).copied().unwrap_or(0)
}

const KEYS: usize = 40;

/// The server of each key; `None` while one of them has several.
fn servers_of_keys(scene: &WebScene) -> Option<Vec<String>> {
    let requests = (0..KEYS * 2).map(|at| get(&format!("/?other={at}&key=k{}", at % KEYS))).collect();
    let script = Script { to: scene.vip.v4, http2: false, requests };
    let told = web::ask(&scene.client, &script).ok()?;
    let servers: Option<Vec<String>> =
        told.iter().map(|told| told.header("x-server").map(str::to_owned)).collect();
    let servers = servers?;
    (servers[..KEYS] == servers[KEYS..]).then(|| servers[..KEYS].to_vec())
}

#[test]
fn keys_of_a_query_keep_their_servers_while_another_pod_comes_and_goes() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let third = scene.shop.world().node("b")?.pod("shop/web-v3")?;
    let _third = WebServer::start(&third, "v3")?;
    let manifest = || third.manifest().label("app", "web").label("version", "v3").port("http", HTTP_PORT);
    for table in ["maglev: {tableSize: 1021}", "ringHash: {minimumRingSize: 1024}"] {
        scene.destination(&format!(
            "  trafficPolicy: {{loadBalancer: {{consistentHash: {{httpQueryParameterName: key, {table}}}}}}}\n"
        ))?;
        let all = |servers: &Option<Vec<String>>| -> usize {
            servers.as_ref().map_or(0, |servers| servers.iter().collect::<BTreeSet<_>>().len())
        };
        let before = eventually(SOON, || servers_of_keys(&scene), |servers| all(servers) == 2)?;
        let before = before.unwrap_or_default();
        scene.shop.world().manifests().apply(manifest())?;
        let with_third = eventually(SOON, || servers_of_keys(&scene), |servers| all(servers) == 3)?;
        let with_third = with_third.unwrap_or_default();
        let pairs = || before.iter().zip(&with_third);
        let moved = pairs().filter(|(was, is)| was != is && *is != "v3").count();
        // A ring moves none between those that stay, a table of this size hardly any.
        let most = if table.starts_with("ring") { 0 } else { KEYS / 8 };
        assert!(moved <= most, "{table}: {moved} of {KEYS}: {before:?} {with_third:?}");
        assert!(pairs().filter(|(_, is)| *is == "v3").count() <= KEYS * 2 / 3, "{table}: {with_third:?}");
        // Without it everything is as it was.
        scene.shop.world().manifests().apply(manifest().not_ready())?;
        let after = eventually(SOON, || servers_of_keys(&scene), |servers| all(servers) == 2)?;
        assert_eq!(after.unwrap_or_default(), before, "{table}");
    }
    // A request without the key goes to anybody.
    eventually(SOON, || shares(&scene, 40), |shares| of(shares, "v1") > 0 && of(shares, "v2") > 0)?;
    Ok(())
}

#[test]
fn a_zone_keeps_what_its_endpoints_can_take_and_the_rest_goes_to_the_others() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    zones(&scene)?;
    const TIMES: usize = 300;
    // Of a client without a service nobody knows where its like are: everybody of the region is as good.
    scene.destination("  trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {minClusterSize: 2}}}\n")?;
    let is_half = |shares: &BTreeMap<String, usize>| {
        (110..=190).contains(&of(shares, "v1")) && of(shares, "v1") + of(shares, "v2") == TIMES
    };
    eventually(SOON, || shares(&scene, TIMES), is_half)?;
    // All clients are here, and half of the servers.
    scene.shop.service("client", 8000)?;
    eventually(SOON, || shares(&scene, TIMES), is_half)?;
    // As many clients there as here: nobody has to leave.
    let fellow = scene.shop.backend("b", "client-2", "client")?;
    eventually(SOON, || shares(&scene, TIMES), |shares| of(shares, "v1") == TIMES)?;
    // One that is not ready counts for nothing.
    scene.shop.world().manifests().apply(fellow.manifest().label("app", "client").not_ready())?;
    eventually(SOON, || shares(&scene, TIMES), is_half)?;
    scene.shop.world().manifests().apply(fellow.manifest().label("app", "client"))?;
    eventually(SOON, || shares(&scene, TIMES), |shares| of(shares, "v1") == TIMES)?;
    // Two endpoints are too few for zones.
    scene.destination("  trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {minClusterSize: 3}}}\n")?;
    eventually(SOON, || shares(&scene, TIMES), is_half)?;
    Ok(())
}

/// Node a is in one zone of a region, node b in another.
fn zones(scene: &WebScene) -> Result<(), Failure> {
    let mut nodes = String::new();
    for (node, zone) in [("a", "z1"), ("b", "z2")] {
        let name = scene.shop.world().node(node)?.full_name();
        nodes += &format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}, labels: {{topology.kubernetes.io/region: r, topology.kubernetes.io/zone: {zone}}}}}}}\n"
        );
    }
    scene.apply("nodes.yaml", &nodes)
}

#[test]
fn places_get_their_shares_labels_say_who_is_first_and_who_is_new_gets_less() -> TestResult {
    require_agent!();
    let mut scene = WebScene::set(test_name!())?;
    zones(&scene)?;
    let policy = |balancer: &str, more: &str| {
        scene.destination(&format!("  trafficPolicy: {{loadBalancer: {{{balancer}}}{more}}}\n"))
    };
    const TIMES: usize = 300;

    // Far more to the other zone than to the client's own; 240 are expected.
    policy("localityLbSetting: {distribute: [{from: r/z1/*, to: {'r/z1/*': 20, 'r/z2/*': 80}}]}", "")?;
    let is_far = |shares: &BTreeMap<String, usize>| (205..=270).contains(&of(shares, "v2"));
    let seen = eventually(SOON, || shares(&scene, TIMES), is_far)?;
    assert_eq!(of(&seen, "v1") + of(&seen, "v2"), TIMES, "{seen:?}");
    // Places that are not listed get nothing.
    policy("localityLbSetting: {distribute: [{from: r/z1/*, to: {'r/z2/*': 100}}]}", "")?;
    eventually(SOON, || shares(&scene, 40), |shares| of(shares, "v2") == 40)?;

    // Who has the label is first, wherever it is; who has not is there for when that one fails.
    let outlier = ", outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}";
    policy("localityLbSetting: {failoverPriority: ['version=v1']}", outlier)?;
    eventually(SOON, || shares(&scene, 40), |shares| of(shares, "v1") == 40)?;
    policy("localityLbSetting: {failoverPriority: ['version=v2']}", outlier)?;
    eventually(SOON, || shares(&scene, 40), |shares| of(shares, "v2") == 40)?;
    drop(scene.servers.pop());
    eventually(SOON, || shares(&scene, 40), |shares| of(shares, "v1") == 40)?;

    // Somebody new among those that are warm by now gets a share that grows: not a third at once.
    scene.servers.push(WebServer::start(&scene.v2, "v2")?);
    let warmup = Duration::from_secs(6);
    scene.destination(
        "  trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 6s, minimumPercent: 5}}}\n",
    )?;
    let is_even = |shares: &BTreeMap<String, usize>| of(shares, "v1") > 10 && of(shares, "v2") > 10;
    eventually(SOON, || shares(&scene, 40), is_even)?;
    let since = Instant::now();
    let both = || (shares(&scene, 40), since.elapsed());
    eventually(SOON, both, |(shares, age)| is_even(shares) && *age > warmup)?;
    let third = WebScene::version(&scene.shop, "a", "v3")?;
    let _third = WebServer::start(&third, "v3")?;
    let first = eventually(SOON, || shares(&scene, 100), |shares| of(shares, "v3") > 0)?;
    let share = of(&first, "v3");
    assert!(share <= 20, "{share} of 100");
    scene.destination("  trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}\n")?;
    eventually(SOON, || shares(&scene, 100), |shares| of(shares, "v3") >= 28)?;
    Ok(())
}

#[test]
fn endpoints_that_all_fail_are_used_in_panic_and_retries_keep_to_their_budget() -> TestResult {
    require_agent!();
    let mut scene = WebScene::set(test_name!())?;
    scene.servers.clear();
    for (pod, name) in [(&scene.v1, "v1"), (&scene.v2, "v2")] {
        scene.servers.push(WebServer::serving(pod, &Serving { name: name.to_owned(), failing: true })?);
    }
    let all = |told: &Result<Vec<Told>, String>, ok: &dyn Fn(&Told) -> bool| {
        told.as_ref().is_ok_and(|told| told.iter().all(ok))
    };
    let twenty = || asked(&scene, &get("/"), 20).map_err(|error| format!("{error:?}"));

    // As many tries as are allowed, none beyond the budget: a single request at a time leaves none of a fifth.
    scene.route("  - retries: {attempts: 4, retryOn: '5xx'}\n    route: [{destination: {host: web}}]\n")?;
    let tries = |told: &Told| {
        let seen = told.seen().ok()?;
        seen.header("x-envoy-attempt-count")?.parse::<u32>().ok()
    };
    for (budget, wanted) in [
        ("", 5),
        ("  trafficPolicy: {retryBudget: {percent: 20, minRetryConcurrency: 0}}\n", 1),
        ("  trafficPolicy: {retryBudget: {percent: 20, minRetryConcurrency: 1}}\n", 5),
    ] {
        scene.destination(budget)?;
        drop(eventually(SOON, twenty, |told| {
            all(told, &|told| told.status == 503 && tries(told) == Some(wanted))
        })?);
    }

    // What is over counts too: half of twenty requests, some of them with several tries, however they follow one another.
    scene.destination(
        "  trafficPolicy: {retryBudget: {percent: 50, minRetryConcurrency: 0, budgetInterval: 600s}}\n",
    )?;
    let retries = |told: &Result<Vec<Told>, Failure>| -> u32 {
        told.as_ref().map_or(0, |told| told.iter().filter_map(|told| Some(tries(told)? - 1)).sum())
    };
    drop(eventually(SOON, || asked(&scene, &get("/"), 20), |told| (9..=11).contains(&retries(told)))?);

    scene.route("  - retries: {attempts: 0}\n    route: [{destination: {host: web}}]\n")?;
    let policy = |healthy: u32| {
        scene.destination(&format!(
            "  trafficPolicy: {{outlierDetection: {{consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100, minHealthPercent: {healthy}}}}}\n"
        ))
    };
    let by_nobody = |told: &Told| told.status == 503 && told.header("x-server").is_none();
    let by_servers = |told: &Told| told.status == 503 && told.header("x-server").is_some();
    policy(0)?;
    drop(eventually(SOON, twenty, |told| all(told, &by_nobody))?);
    policy(50)?;
    drop(eventually(SOON, twenty, |told| all(told, &by_servers))?);
    policy(0)?;
    drop(eventually(SOON, twenty, |told| all(told, &by_nobody))?);
    Ok(())
}

#[test]
fn servers_are_spoken_to_in_the_version_and_at_the_address_that_the_policy_says() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    // What the servers see of clients of both versions at port 80, declared as HTTP, and 82, declared as HTTP/2.
    let versions = || -> Vec<String> {
        [(false, 80), (true, 80), (false, 82), (true, 82)]
            .into_iter()
            .map(|(http2, port)| {
                let told = web::ask_once(&scene.client, scene.at(port), http2, get("/"));
                let seen = told.and_then(|told| Ok(told.seen()?.version));
                seen.unwrap_or_else(|error| format!("{error:?}"))
            })
            .collect()
    };
    let (one, two) = ("HTTP/1.1", "HTTP/2.0");
    for (pool, wanted) in [
        ("", [one, one, two, two]),
        ("{h2UpgradePolicy: UPGRADE}", [two, two, two, two]),
        ("{useClientProtocol: true}", [one, two, one, two]),
        ("{h2UpgradePolicy: DO_NOT_UPGRADE}", [one, one, two, two]),
    ] {
        let policy = format!("  trafficPolicy: {{connectionPool: {{http: {pool}}}}}\n");
        scene.destination(if pool.is_empty() { "" } else { &policy })?;
        eventually(SOON, versions, |seen| *seen == wanted)?;
    }

    // A headless service, dialled by a pod's own address, on the client's node (v1) or on another: that one answers if the policy says so,
    // else anybody does.
    let headless = ServiceManifest::new(NAMESPACE, "pods").headless().selector("app", "web");
    scene.shop.world().manifests().apply(headless.port("http", HTTP_PORT, HTTP_PORT))?;
    let rule = |algorithm: &str| {
        scene.apply(
            "pods.yaml",
            &format!(
                "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: pods, namespace: shop}}
spec: {{host: pods, trafficPolicy: {{loadBalancer: {{simple: {algorithm}}}}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: pods, namespace: shop}}
spec: {{hosts: [pods], http: [{{route: [{{destination: {{host: pods}}}}]}}]}}
"
            ),
        )
    };
    let host = format!("pods:{HTTP_PORT}");
    let by = |pod: &mesh_tests::Pod| -> BTreeSet<String> {
        let requests = vec![Ask::get(&host, "/"); 30];
        let script = Script { to: pod.at4(HTTP_PORT), http2: false, requests };
        let told = web::ask(&scene.client, &script).unwrap_or_default();
        told.iter().map(|told| told.header("x-server").unwrap_or("nobody").to_owned()).collect()
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    // Without rules the second connection to a pod of the client's node goes past the agent.
    for _ in 0..2 {
        assert_eq!(by(&scene.v1), names(&["v1"]));
    }
    let both = names(&["v1", "v2"]);
    for (algorithm, [of_v1, of_v2]) in
        [("RANDOM", [both.clone(), both]), ("PASSTHROUGH", [names(&["v1"]), names(&["v2"])])]
    {
        rule(algorithm)?;
        eventually(SOON, || (by(&scene.v1), by(&scene.v2)), |(v1, v2)| *v1 == of_v1 && *v2 == of_v2)?;
        // Nor does a verdict of the first connection let the next one past the agent.
        assert_eq!(by(&scene.v1), of_v1, "{algorithm}");
    }
    Ok(())
}
