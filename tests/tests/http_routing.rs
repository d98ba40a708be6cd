//! Requests routed by a VirtualService, on one node and across nodes: real apps, the real agent.

use std::time::{Duration, Instant};

use mesh_tests::protocol::Serve;
use mesh_tests::shop::{TARGET_PORT, Vip};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Pod, Server, Shop, TestResult, eventually, hbone::everywhere, require_agent, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// A client on node a, version 1 of `web` beside it and version 2 on node b.
struct Scene {
    shop: Shop,
    client: Pod,
    vip: Vip,
    agents: Vec<Agent>,
    _servers: Vec<Server>,
}

/// Version 1 and version 2 of `web`.
const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
";

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let client = shop.pod("a", "client")?;
        let mut servers = Vec::new();
        for (node, version) in [("a", "v1"), ("b", "v2")] {
            let pod = shop.world().node(node)?.pod(&format!("shop/web-{version}"))?;
            let manifest = pod.manifest().label("app", "web").label("version", version);
            shop.world().manifests().apply(manifest.port("http", TARGET_PORT))?;
            let options = ServerOptions::named(version).serving(Serve::Http);
            servers.push(pod.tool()?.serve(everywhere(TARGET_PORT), options)?);
        }
        let vip = shop.service("web", 80)?;
        let agents = shop.start_agents()?;
        let scene = Self { shop, client, vip, agents, _servers: servers };
        for _ in 0..4 {
            assert_eq!(scene.get("")?.0, 200);
        }
        Ok(scene)
    }

    fn apply(&self, name: &str, text: &str) -> TestResult {
        self.shop.world().manifests().apply_text(name, text)?;
        Ok(())
    }

    /// A VirtualService for `web` with these rules.
    fn route(&self, rules: &str) -> TestResult {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http:
{rules}"
        );
        self.apply("route.yaml", &text)
    }

    /// Status of a request with further header lines, and which version answered it.
    fn get(&self, headers: &str) -> Result<(u16, String), Failure> {
        let connection = self.client.tool()?.connect(self.vip.v4)?;
        connection.send(&format!("GET / HTTP/1.1\r\nhost: web\r\n{headers}connection: close\r\n\r\n"))?;
        let mut answer = String::new();
        loop {
            let piece = connection.recv_within(65_536, Duration::from_secs(10))?;
            if piece.is_empty() {
                break;
            }
            answer += &piece;
        }
        let status = answer.get(9..12).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| anyhow::anyhow!("no response: {answer:?}"))?;
        let version = ["v1", "v2"].into_iter().find(|v| answer.contains(&format!("\"{v}\"")));
        Ok((status, version.unwrap_or_default().to_owned()))
    }

    /// Waits until every one of ten requests gets this: one alone may get it by chance before a rule holds.
    fn settles(&self, headers: &str, wanted: (u16, &str)) -> TestResult {
        let all =
            || (0..10).map(|_| self.get(headers).map_err(|error| format!("{error:?}"))).collect::<Vec<_>>();
        eventually(SOON, all, |all| {
            all.iter().all(|got| got.as_ref().is_ok_and(|(status, by)| (*status, by.as_str()) == wanted))
        })?;
        Ok(())
    }

    /// Waits until a request takes at least this long.
    fn slows(&self, headers: &str, least: Duration) -> TestResult {
        let taken = || {
            let begun = Instant::now();
            self.get(headers).map(|_| begun.elapsed()).ok()
        };
        eventually(SOON, taken, |taken| taken.is_some_and(|taken| taken >= least))?;
        Ok(())
    }
}

#[test]
fn subsets_get_the_share_of_their_weight_and_a_change_holds_for_the_next_requests() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    scene.apply("subsets.yaml", SUBSETS)?;
    let to = |v1: u32, v2: u32| {
        format!(
            "  - route:
    - {{destination: {{host: web, subset: v1}}, weight: {v1}}}
    - {{destination: {{host: web, subset: v2}}, weight: {v2}}}
"
        )
    };
    scene.route(&to(100, 0))?;
    scene.settles("", (200, "v1"))?;
    scene.route(&to(0, 100))?;
    // Across nodes.
    scene.settles("", (200, "v2"))?;
    scene.route(&to(90, 10))?;
    eventually(SOON, || scene.get("").map(|got| got.1).ok(), |version| version.as_deref() == Some("v1"))?;
    let mut second = 0;
    for _ in 0..300 {
        let (status, version) = scene.get("")?;
        assert_eq!(status, 200);
        second += u32::from(version == "v2");
    }
    // Thirty are expected; the bounds are more than four standard deviations away.
    assert!((8..=53).contains(&second), "{second} of 300");
    scene.route(&to(50, 50))?;
    let second = |times: usize| -> Result<usize, Failure> {
        let versions = (0..times).map(|_| scene.get("")).collect::<Result<Vec<_>, _>>()?;
        assert!(versions.iter().all(|(status, _)| *status == 200), "{versions:?}");
        Ok(versions.iter().filter(|(_, version)| version == "v2").count())
    };
    // Six and more of twenty are no accident at a tenth.
    let seen = || second(20).map_err(|error| format!("{error:?}"));
    eventually(SOON, seen, |second| second.as_ref().is_ok_and(|second| *second >= 6))?.ok();
    let second = second(300)?;
    // A hundred and fifty are expected; again more than four standard deviations.
    assert!((112..=188).contains(&second), "{second} of 300");
    Ok(())
}

#[test]
fn a_header_decides_and_faults_are_for_whom_they_are_meant() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    scene.apply("subsets.yaml", SUBSETS)?;
    let jason = "end-user: jason\r\n";
    let of_jason = "  - match:
    - headers: {end-user: {exact: jason}}
";
    let others = "  - route: [{destination: {host: web, subset: v1}}]
";
    let v2 = "    route: [{destination: {host: web, subset: v2}}]
";
    scene.route(&format!("{of_jason}{v2}{others}"))?;
    scene.settles(jason, (200, "v2"))?;
    scene.settles("", (200, "v1"))?;

    scene.route(&format!(
        "{of_jason}    fault: {{abort: {{percentage: {{value: 100}}, httpStatus: 500}}}}\n{v2}{others}"
    ))?;
    scene.settles(jason, (500, ""))?;
    scene.settles("", (200, "v1"))?;

    scene.route(&format!(
        "{of_jason}    fault: {{delay: {{percentage: {{value: 100}}, fixedDelay: 600ms}}}}\n{v2}{others}"
    ))?;
    scene.slows(jason, Duration::from_millis(600))?;
    assert_eq!(scene.get(jason)?, (200, "v2".to_owned()));
    Ok(())
}

#[test]
fn a_slow_response_is_given_up_and_a_dead_endpoint_is_tried_around() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let slow = scene.shop.pod("b", "slow")?;
    let stall = ServerOptions::named("slow").serving(Serve::Stall);
    let _stalled = slow.tool()?.serve(everywhere(TARGET_PORT), stall)?;
    scene.shop.service("slow", 80)?;
    scene.route("  - timeout: 400ms\n    route: [{destination: {host: slow}}]\n")?;
    scene.settles("", (504, ""))?;

    // A third endpoint, where nobody listens.
    scene.shop.backend("b", "dead", "web")?;
    scene.route(
        "  - retries: {attempts: 3, perTryTimeout: 2s, retryOn: 'connect-failure,refused-stream'}
    route: [{destination: {host: web}}]
",
    )?;
    let good = || scene.get("").map(|got| got.0).ok();
    eventually(SOON, good, |status| *status == Some(200))?;
    for _ in 0..30 {
        assert_eq!(scene.get("")?.0, 200);
    }
    Ok(())
}

#[test]
fn a_routed_service_without_endpoints_answers_and_others_refuse() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    // No pod is `empty`.
    let empty = scene.shop.service_with("empty", 80, |service| {
        service.port("http", 80, TARGET_PORT).port("tcp", 81, TARGET_PORT).port("http-two", 82, TARGET_PORT)
    })?;
    let status = |to: std::net::SocketAddr| {
        let answer = scene.client.tool().and_then(|tool| tool.http_get(to, "empty", "/"));
        answer.map_err(|error| error.to_string()).map(|answer| answer.status)
    };
    let refused = |got: &Result<u16, String>| got.as_ref().is_err_and(|error| error.contains("refused"));
    eventually(SOON, || status(empty.v4), refused)?.ok();

    scene.apply(
        "empty.yaml",
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: empty, namespace: shop}
spec:
  host: empty
  trafficPolicy:
    portLevelSettings:
    - {port: {number: 80}, loadBalancer: {simple: ROUND_ROBIN}}
    - {port: {number: 81}, loadBalancer: {simple: ROUND_ROBIN}}
",
    )?;
    eventually(SOON, || status(empty.v4), |got| *got == Ok(503))?.ok();
    assert!(refused(&status(empty.at_port(81).v4)), "bytes have no answer to be given");
    let unhealthy = &["istio_requests_total", "response_flags=\"UH\"", "response_code=\"503\""];
    let counted = || scene.agents[0].metric(unhealthy).unwrap_or(0.0);
    eventually(SOON, counted, |count| *count >= 1.0)?;

    // A rule may send its requests to somebody else.
    scene.apply(
        "elsewhere.yaml",
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: empty, namespace: shop}
spec:
  hosts: [empty]
  http: [{route: [{destination: {host: web}}]}]
",
    )?;
    eventually(SOON, || status(empty.at_port(80).v4), |got| *got == Ok(200))?.ok();
    Ok(())
}
