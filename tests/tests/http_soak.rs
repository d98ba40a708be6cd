//! A mixed load while pods come and go every second and rules change: nothing fails, and memory stays flat.
//!
//! Twenty seconds by default; `cargo xtask soak --minutes N` sets `MESH_SOAK_SECONDS`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mesh_tests::protocol::Serve;
use mesh_tests::tool::ServerOptions;
use mesh_tests::web::messages::{Ask, Mix, MixReport};
use mesh_tests::web::{HTTP_PORT, WebLoad, WebScene, WebServer};
use mesh_tests::{Agent, Failure, Pod, TestResult, eventually, hbone::everywhere, require_agent, test_name};

const SECONDS: u64 = 20;
/// Pods that come and go are there for so many seconds.
const LIFE: usize = 4;
/// Slots that they take in turn, on each node: addresses are used again, as in a cluster.
const SLOTS: std::ops::Range<u8> = 100..116;
/// Runs of so many seconds show whether memory is flat.
const LONG: u64 = 300;
/// Lines of the curve.
const LINES: u64 = 20;

/// A pod that came and will go.
struct Guest {
    pod: Pod,
    server: WebServer,
}

fn rss_mb(agent: &Agent) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap_or_default();
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kilobytes.unwrap_or_default() / 1024.0
}

/// As a kubelet does it: the pod runs and is known, then it is ready.
fn come(scene: &WebScene, number: usize) -> Result<Guest, Failure> {
    let (node, agent) = if number.is_multiple_of(2) { ("a", 0) } else { ("b", 1) };
    let slot = SLOTS.start + u8::try_from(number / 2 % SLOTS.len())?;
    let name = format!("shop/guest-{number}");
    let pod = scene.shop.world().node(node)?.pod_builder(&name).slot(slot).start()?;
    let manifest = || pod.manifest().label("app", "web").label("version", "guest").port("http", HTTP_PORT);
    let manifests = scene.shop.world().manifests();
    manifests.apply(manifest().not_ready())?;
    let server = WebServer::start(&pod, &format!("guest-{number}"))?;
    scene.agents[agent].wait_enrolled([&pod])?;
    manifests.apply(manifest())?;
    Ok(Guest { pod, server })
}

/// As a cluster does it: no endpoint any more, then time for everybody to hear of it, then SIGTERM, then its end.
fn go(scene: &WebScene, guest: Guest, number: usize) -> Result<(), Failure> {
    let Guest { pod, mut server } = guest;
    let manifests = scene.shop.world().manifests();
    let manifest = pod.manifest().label("app", "web").label("version", "guest").port("http", HTTP_PORT);
    manifests.apply(manifest.not_ready())?;
    std::thread::sleep(Duration::from_secs(1));
    server.stop_in_order();
    eventually(Duration::from_secs(20), || server.has_ended(), |ended| *ended)?;
    manifests.delete("Pod", pod.namespace(), pod.name())?;
    scene.shop.world().node(if number.is_multiple_of(2) { "a" } else { "b" })?.remove_pod(&pod)?;
    Ok(())
}

/// Rules that are there in turn. All of them forward to somebody who is there.
const RULES: [&str; 5] = [
    "  - route: [{destination: {host: web}}]\n",
    "  - route:\n    - {destination: {host: web, subset: v1}, weight: 50}\n    - {destination: {host: web, subset: v2}, weight: 50}\n",
    "  - match: [{headers: {x-none: {exact: none}}}]\n    fault: {abort: {percentage: {value: 100}, httpStatus: 500}}\n    route: [{destination: {host: web}}]\n  - timeout: 15s\n    route: [{destination: {host: web}}]\n",
    "  - mirror: {host: web, subset: v1}\n    route: [{destination: {host: web}}]\n",
    "  - headers: {response: {set: {x-rule: here}}}\n    retries: {attempts: 3, perTryTimeout: 5s, retryOn: 'connect-failure,refused-stream,reset'}\n    route: [{destination: {host: web}}]\n",
];

#[test]
fn a_mixed_load_survives_pods_that_come_and_go_and_rules_that_change() -> TestResult {
    require_agent!();
    let seconds =
        std::env::var("MESH_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let scene = WebScene::set(test_name!())?;
    let echo = scene.shop.pod("b", "echo")?;
    let _echo = echo.tool()?.serve(everywhere(8080), ServerOptions::named("echo").serving(Serve::Echo))?;
    let tcp = scene.shop.service("echo", 7000)?;
    scene.agents[1].wait_enrolled([&echo])?;
    let mix = |port: u16, keep_alive, short, http2, tcp| Mix {
        http: scene.at(port),
        host: "web".to_owned(),
        keep_alive,
        short,
        http2,
        tcp,
        pause_ms: 10,
    };
    let loads = [
        WebLoad::start(&scene.client, &mix(80, 6, 3, 2, Some((tcp.v4, 2))))?,
        WebLoad::start(&scene.client, &mix(82, 2, 0, 4, None))?,
    ];
    let begun = Instant::now();
    let mut curve: Vec<(u64, [f64; 2])> = Vec::new();
    println!("seconds  rss a (MiB)  rss b (MiB)  requests  failed  pods");
    let sum = || {
        let mut all = MixReport::default();
        for load in &loads {
            let report = load.report();
            *all.by_server.entry(String::new()).or_default() += report.ok();
            all.failed.extend(report.failed);
        }
        all
    };
    let rest = std::thread::scope(|scope| -> Result<VecDeque<(usize, Guest)>, Failure> {
        let (mut guests, mut leaving) = (VecDeque::new(), Vec::new());
        let mut number = 0;
        while begun.elapsed().as_secs() < seconds {
            let second = Instant::now();
            scene.route(RULES[number % RULES.len()])?;
            guests.push_back((number, come(&scene, number)?));
            if guests.len() > LIFE
                && let Some((old, guest)) = guests.pop_front()
            {
                let scene = &scene;
                leaving.push(scope.spawn(move || go(scene, guest, old)));
            }
            number += 1;
            let elapsed = begun.elapsed().as_secs();
            if elapsed * LINES / seconds >= curve.len() as u64 {
                let rss = [rss_mb(&scene.agents[0]), rss_mb(&scene.agents[1])];
                let all = sum();
                println!(
                    "{elapsed:>7}  {:>11.1}  {:>11.1}  {:>8}  {:>6}  {number:>4}",
                    rss[0],
                    rss[1],
                    all.ok(),
                    all.failures()
                );
                curve.push((elapsed, rss));
            }
            for done in leaving.extract_if(.., |thread| thread.is_finished()) {
                done.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            }
            std::thread::sleep(Duration::from_secs(1).saturating_sub(second.elapsed()));
        }
        for thread in leaving.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        assert!(number as u64 >= seconds / 2, "{number} pods came in {seconds} s");
        Ok(guests)
    })?;
    let reports = loads.map(WebLoad::stop);
    drop(rest);
    for report in &reports {
        println!("{:?}", report.by_kind);
        assert_eq!(report.failures(), 0, "{:?}", report.failed);
        assert!(report.ok() > 100, "{report:?}");
    }
    assert_eq!(scene.ask(Ask::get("web", "/"))?.status, 200);
    // From a quarter on it is warm: from there to the end it may grow by a little that does not depend on the time. Short runs are not
    // warm for long.
    let warm = &curve[curve.len() / 4..];
    for node in 0..2 {
        let (first, last) = (warm[0].1[node], warm[warm.len() - 1].1[node]);
        let grown_max = if seconds >= LONG { (first * 0.05).max(4.0) } else { first * 0.5 + 16.0 };
        assert!(last < first + grown_max, "memory of node {node} grew from {first} to {last} MiB");
    }
    Ok(())
}
