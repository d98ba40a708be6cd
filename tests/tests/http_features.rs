//! What rules and policies do to requests, end to end: manifests, the real agent, real servers on two nodes.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_tests::web::messages::{Ask, Mix, MixReport, Script, Serving, Told};
use mesh_tests::web::{self, WebLoad, WebScene, WebServer};
use mesh_tests::{Failure, TestResult, eventually, limit, require_agent, test_name};

const SOON: Duration = Duration::from_secs(10);
/// What a change of rules may take to hold for every new request of every node.
const AT_ONCE: Duration = Duration::from_secs(1);
const TO_V1: &str = "    route: [{destination: {host: web, subset: v1}}]\n";
const TO_V2: &str = "    route: [{destination: {host: web, subset: v2}}]\n";

fn by(server: &'static str) -> impl Fn(&Told) -> bool {
    move |told| told.header("x-server") == Some(server)
}

fn get(path: &str) -> Ask {
    Ask::get("web", path)
}

/// Who answered each of so many requests, on one connection.
fn servers(scene: &WebScene, request: &Ask, times: usize) -> Result<Vec<String>, Failure> {
    let script = Script { to: scene.vip.v4, http2: false, requests: vec![request.clone(); times] };
    let told = web::ask(&scene.client, &script)?;
    Ok(told.iter().map(|told| told.header("x-server").unwrap_or("nobody").to_owned()).collect())
}

#[test]
fn rules_rewrite_redirect_answer_and_change_headers() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let rules = [
        "  - match: [{uri: {prefix: /api/}}]\n    rewrite: {uri: /v2/, authority: inner.example}\n",
        "    headers: {request: {set: {x-a: '1'}, add: {x-b: two}, remove: [x-c]}, response: {set: {x-d: d}, remove: [x-connection]}}\n",
        TO_V2,
        "  - match: [{uri: {regex: '/item/[0-9]+'}}]\n    rewrite: {uriRegexRewrite: {match: '/item/([0-9]+)', rewrite: '/items?id=\\1'}}\n",
        TO_V1,
        "  - match: [{uri: {exact: /old}}]\n    redirect: {uri: /new, authority: other.example, redirectCode: 308}\n",
        "  - match: [{uri: {exact: /teapot}}]\n    directResponse: {status: 418, body: {string: short and stout}}\n",
        "    headers: {response: {set: {content-type: application/json, x-asked: '%REQ(:path)%'}}}\n",
        "  - match: [{uri: {exact: /here}}]\n    redirect: {uri: /there}\n    headers: {response: {add: {x-moved: 'yes'}}}\n",
        "  - match: [{uri: {exact: /kept}}]\n    headers: {request: {remove: [x-a], set: {x-a: mesh}}}\n",
        TO_V1,
        "  - match: [{uri: {exact: /slow}}]\n    timeout: 300ms\n",
        TO_V2,
        "  - match: [{uri: {prefix: /shared}}]\n    corsPolicy: {allowOrigins: [{exact: 'https://app.example'}], allowMethods: [GET, PUT], maxAge: 60s}\n",
        TO_V1,
        "  - match: [{uri: {exact: /broken}}]\n    fault: {abort: {percentage: {value: 100}, httpStatus: 555}}\n",
        "    corsPolicy: {allowOrigins: [{exact: 'https://app.example'}]}\n",
        TO_V1,
        "  -\n",
        TO_V1,
    ];
    scene.route(&rules.concat())?;
    scene.settles(get("/teapot"), |told| told.status == 418 && told.text == "short and stout")?;

    let told = scene.ask(get("/api/x?q=1").header("x-c", "gone").header("x-b", "one"))?;
    let seen = told.seen()?;
    assert_eq!(
        (seen.server.as_str(), seen.path.as_str(), seen.host.as_str()),
        ("v2", "/v2/x?q=1", "inner.example")
    );
    assert_eq!((seen.header("x-a"), seen.header("x-c")), (Some("1"), None));
    let b: Vec<&str> =
        seen.headers.iter().filter(|(name, _)| name == "x-b").map(|(_, value)| value.as_str()).collect();
    assert_eq!(b, ["one", "two"]);
    assert_eq!((told.header("x-d"), told.header("x-connection")), (Some("d"), None));
    assert_eq!(seen.header("x-envoy-original-path"), Some("/api/x?q=1"));

    assert_eq!(scene.ask(get("/item/42"))?.seen()?.path, "/items?id=42");
    let moved = scene.ask(get("/old"))?;
    assert_eq!((moved.status, moved.header("location")), (308, Some("http://other.example/new")));
    let teapot = scene.ask(get("/teapot"))?;
    assert_eq!(
        (teapot.header("content-type"), teapot.header("x-asked")),
        (Some("application/json"), Some("/teapot"))
    );
    let moved = scene.ask(Ask::get("web:80", "/here"))?;
    assert_eq!(
        (moved.header("location"), moved.header("x-moved")),
        (Some("http://web:80/there"), Some("yes"))
    );
    assert_eq!(scene.ask(get("/kept").header("x-a", "client"))?.seen()?.header("x-a"), Some("mesh"));
    let late = scene.ask(get("/slow?delay=5000"))?;
    assert_eq!((late.status, late.text.as_str()), (504, "upstream request timeout"));
    let broken = scene.ask(get("/broken").header("origin", "https://app.example"))?;
    assert_eq!(
        (broken.status, broken.header("access-control-allow-origin")),
        (555, Some("https://app.example"))
    );
    let preflight = get("/shared").method("OPTIONS").header("origin", "https://app.example");
    let preflight = scene.ask(preflight.header("access-control-request-method", "PUT"))?;
    assert_eq!(
        (preflight.status, preflight.header("access-control-allow-origin")),
        (200, Some("https://app.example"))
    );
    assert_eq!(
        (preflight.header("access-control-max-age"), preflight.header("x-server")),
        (Some("60"), None)
    );
    let shared = scene.ask(get("/shared").header("origin", "https://app.example"))?;
    assert_eq!(shared.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(
        scene
            .ask(get("/shared").header("origin", "https://evil.example"))?
            .header("access-control-allow-origin"),
        None
    );
    Ok(())
}

#[test]
fn copies_reach_the_mirror_and_its_answers_nobody() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    scene.route(&format!(
        "  -\n{TO_V1}    mirror: {{host: web, subset: v2}}\n    mirrorPercentage: {{value: 100}}\n"
    ))?;
    scene.settles(get("/"), by("v1"))?;
    let posts = vec![get("/copied?status=500").posting(5000); 10];
    let told = web::ask(&scene.client, &Script { to: scene.vip.v4, http2: false, requests: posts })?;
    assert!(told.iter().all(|told| told.header("x-server") == Some("v1")), "{told:?}");
    // Asked by itself, version 2 tells what it has had: copies with the host that the client wrote.
    scene.route(&format!("  -\n{TO_V2}"))?;
    let had = || {
        let told = scene.ask(get("/count")).ok()?;
        Some(*told.seen().ok().filter(|seen| seen.server == "v2")?.so_far.get("/copied")?)
    };
    eventually(SOON, had, |had| *had == Some(10))?;
    Ok(())
}

#[test]
fn requests_are_tried_again_elsewhere_and_endpoints_that_fail_are_left_out_for_a_while() -> TestResult {
    require_agent!();
    let mut scene = WebScene::set(test_name!())?;
    drop(scene.servers.pop());
    let failing = Serving { name: "v2".to_owned(), failing: true };
    scene.servers.push(WebServer::serving(&scene.v2, &failing)?);
    let all = "    route: [{destination: {host: web}}]\n";
    // Statuses are not repeated by default: some requests see the failing version.
    scene.route(&format!("  -\n{all}"))?;
    let statuses = |scene: &WebScene| -> Result<BTreeSet<u16>, Failure> {
        let script = Script { to: scene.vip.v4, http2: false, requests: vec![get("/"); 40] };
        Ok(web::ask(&scene.client, &script)?.iter().map(|told| told.status).collect())
    };
    let seen = || statuses(&scene).map_err(|error| format!("{error:?}"));
    eventually(SOON, seen, |seen| seen.as_ref().is_ok_and(|seen| seen.contains(&503)))?.ok();

    scene.route(&format!("  - retries: {{attempts: 2, retryOn: '5xx'}}\n{all}"))?;
    scene.settles(get("/"), |told| told.status == 200)?;
    assert_eq!(statuses(&scene)?, BTreeSet::from([200]), "the second try goes to the other one");
    // A body is sent again, too.
    let posts = vec![get("/").posting(20_000); 10];
    let told = web::ask(&scene.client, &Script { to: scene.vip.v4, http2: false, requests: posts })?;
    for told in &told {
        assert_eq!((told.status, told.seen()?.bytes), (200, 20_000));
    }

    // Without retries, but with ejection.
    scene.route(&format!("  - retries: {{attempts: 0}}\n{all}"))?;
    scene.destination(
        "  trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3, interval: 200ms, baseEjectionTime: 1s, maxEjectionPercent: 100}}\n",
    )?;
    let only_v1 = || servers(&scene, &get("/"), 20).unwrap_or_default();
    eventually(SOON, only_v1, |by| by.len() == 20 && by.iter().all(|server| server == "v1"))?;
    // It comes back, and is left out again.
    eventually(SOON, only_v1, |by| by.iter().any(|server| server == "v2"))?;
    eventually(SOON, only_v1, |by| by.len() == 20 && by.iter().all(|server| server == "v1"))?;
    Ok(())
}

#[test]
fn consistent_hashing_keeps_clients_and_limits_refuse_the_rest() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let hashed = |by: &str| format!("  trafficPolicy: {{loadBalancer: {{consistentHash: {by}}}}}\n");
    scene.destination(&hashed("{httpHeaderName: x-user}"))?;
    let one_each = || -> Option<bool> {
        let mut all = BTreeSet::new();
        for user in 0..12 {
            let by: BTreeSet<String> =
                servers(&scene, &get("/").header("x-user", &user.to_string()), 5).ok()?.into_iter().collect();
            if by.len() != 1 {
                return Some(false);
            }
            all.extend(by);
        }
        Some(all.len() == 2)
    };
    eventually(SOON, one_each, |kept| *kept == Some(true))?;

    scene.destination(&hashed("{httpCookie: {name: who, ttl: 60s}}"))?;
    let cookie = || scene.ask(get("/")).ok()?.header("set-cookie").map(str::to_owned);
    let cookie = eventually(SOON, cookie, Option::is_some)?.unwrap_or_default();
    let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
    assert!(cookie.starts_with("who="), "{cookie}");
    let by: BTreeSet<String> =
        servers(&scene, &get("/").header("cookie", &cookie), 10)?.into_iter().collect();
    assert_eq!(by.len(), 1, "{by:?}");

    scene.destination(&hashed("{useSourceIp: true}"))?;
    let by = || {
        servers(&scene, &get("/"), 20).map(|by| by.into_iter().collect::<BTreeSet<_>>()).unwrap_or_default()
    };
    eventually(SOON, by, |by| by.len() == 1)?;

    scene.destination(
        "  trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}\n",
    )?;
    // One is served, one waits, the others are refused.
    let refused = |told: &Result<Vec<u16>, String>| {
        told.as_ref().is_ok_and(|told| {
            told.contains(&200) && told.iter().filter(|status| **status == 1503).count() >= 3
        })
    };
    eventually(4 * SOON, || at_once(&scene, 6), refused)?.ok();
    Ok(())
}

/// Statuses of so many requests at once, each by a process of its own, so slow that they meet on a busy machine too; one more thousand
/// where the mesh says that it is overloaded.
fn at_once(scene: &WebScene, times: usize) -> Result<Vec<u16>, String> {
    let slow = Script { to: scene.vip.v4, http2: false, requests: vec![get("/?delay=4000")] };
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..times).map(|_| scope.spawn(|| web::ask(&scene.client, &slow))).collect();
        let told = asking.into_iter().map(|one| one.join().map_err(|_| "panicked".to_owned()));
        told.map(|told| {
            let told = told?.map_err(|error| format!("{error:?}"))?;
            let overflow = told[0].header("x-envoy-overloaded") == Some("true");
            Ok(if overflow { told[0].status + 1000 } else { told[0].status })
        })
        .collect()
    })
}

#[test]
fn s45_servers_limit_requests_themselves_on_their_own_node_and_on_others() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let limits = "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: limits, namespace: shop}
spec:
  workloadSelector: {labels: {app: web}}
  inboundConnectionPool: {http: {http2MaxRequests: 1}}
";
    scene.apply("limits.yaml", limits)?;
    // One at each of the two servers, one of which is on the client's node.
    let limited = |told: &Result<Vec<u16>, String>| {
        told.as_ref().is_ok_and(|told| {
            let count = |status| told.iter().filter(|of| **of == status).count();
            count(200) == 2 && count(1503) == told.len() - 2
        })
    };
    eventually(4 * SOON, || at_once(&scene, 6), limited)?.ok();
    // One after the other nobody is refused.
    scene.settles(get("/"), |told| told.status == 200)?;
    Ok(())
}

fn mix(scene: &WebScene) -> Mix {
    Mix {
        http: scene.vip.v4,
        host: "web".to_owned(),
        keep_alive: 6,
        short: 2,
        http2: 2,
        tcp: None,
        pause_ms: 3,
    }
}

/// Waits until so many more requests have been answered.
fn go_on(load: &WebLoad, more: u64) -> Result<MixReport, Failure> {
    let wanted = load.report().ok() + more;
    Ok(eventually(SOON, || load.report(), |report| report.ok() >= wanted || report.failures() > 0)?)
}

#[test]
fn a_change_of_rules_under_load_holds_at_once_and_loses_no_request() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let load = WebLoad::start(&scene.client, &mix(&scene))?;
    for round in 0..6 {
        let (version, rule) = if round % 2 == 0 { ("v2", TO_V2) } else { ("v1", TO_V1) };
        scene.route(&format!("  -\n{rule}"))?;
        scene.settles(get("/"), by(version))?;
        // From here on nobody else answers, whatever the connection.
        let before = load.report();
        let after = go_on(&load, 200)?;
        let other = if version == "v1" { "v2" } else { "v1" };
        let late = after.by_server.get(other).unwrap_or(&0) - before.by_server.get(other).unwrap_or(&0);
        // What was under way when it settled, and what the report before was late with.
        assert!(late < 150, "{late} of {other} after the change to {version}");
    }
    let report = load.stop();
    assert_eq!(report.failures(), 0, "{report:?}");
    Ok(())
}

fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// The figures are printed; what they must be depends on the machine.
#[test]
fn a_change_of_rules_takes_effect_on_every_node_without_a_failure() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let there = scene.shop.pod("b", "client-b")?;
    // Enrolled as soon as it is answered.
    let script = || Script { to: scene.vip.v4, http2: false, requests: vec![get("/")] };
    let answered =
        || web::ask(&there, &script()).is_ok_and(|told| told.iter().all(|told| told.status == 200));
    eventually(SOON, answered, |answered| *answered)?;
    scene.route(&format!("  -\n{TO_V1}"))?;
    scene.settles(get("/"), by("v1"))?;
    let loads = [("a", &scene.client), ("b", &there)]
        .map(|(node, pod)| WebLoad::start(pod, &mix(&scene)).map(|load| (node, load)));
    let loads = loads.into_iter().collect::<Result<Vec<_>, _>>()?;
    for (_, load) in &loads {
        go_on(load, 200)?;
    }
    for (old, new, rule) in [("v1", "v2", TO_V2), ("v2", "v1", TO_V1), ("v1", "v2", TO_V2)] {
        let changed = now_us();
        scene.route(&format!("  -\n{rule}"))?;
        for (node, load) in &loads {
            let first = |report: &MixReport| {
                let turned = report.turns.iter().find(|(at, to)| *at >= changed && to == new);
                turned.map(|(at, _)| *at)
            };
            let report = eventually(SOON, || load.report(), |report| first(report).is_some())?;
            let first = first(&report).unwrap_or(changed);
            // Requests that were sent before are over by then, and only the new one answers.
            let quiet = || {
                let before = load.report();
                let after = go_on(load, 300).unwrap_or_default();
                (before.by_server.get(old) == after.by_server.get(old)).then_some(after)
            };
            let report = eventually(SOON, quiet, Option::is_some)?.unwrap_or_default();
            let last = report.last_sent_us.get(old).map_or(0, |sent| sent.saturating_sub(changed));
            println!(
                "clients on node {node}, {old} to {new}: first new answer after {:.1} ms, last request that the old one answered sent after {:.1} ms",
                (first - changed) as f64 / 1000.0,
                last as f64 / 1000.0
            );
            assert!(Duration::from_micros(last) < limit(AT_ONCE), "clients on node {node}: {last} µs");
        }
    }
    for (node, load) in loads {
        let report = load.stop();
        assert_eq!(report.failures(), 0, "clients on node {node}: {report:?}");
    }
    Ok(())
}

#[test]
fn an_agent_that_is_restarted_under_load_loses_no_request() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let load = WebLoad::start(&scene.client, &mix(&scene))?;
    go_on(&load, 200)?;
    // That of the server's node, then that of the clients' node.
    for name in ["b", "a"] {
        let node = scene.shop.world().node(name)?;
        let old = node.agents().pop().ok_or_else(|| anyhow::anyhow!("no agent"))?;
        old.begin_drain()?;
        let new = node.agent().start()?;
        go_on(&load, 200)?;
        eventually(Duration::from_secs(60), || old.is_running(), |running| !running)?;
        assert!(new.is_running());
        go_on(&load, 200)?;
    }
    let report = load.stop();
    assert_eq!(report.failures(), 0, "{report:?}");
    Ok(())
}
