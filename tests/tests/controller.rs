//! The two-process form: a controller that has the manifests and issues certificates, agents that have neither.

use std::time::Duration;

use mesh_tests::authority::{Authority, Leaf, request_for, spiffe, spiffe_of};
use mesh_tests::hbone::request_certificate;
use mesh_tests::manifests::{
    AuthorizationPolicyManifest, MtlsMode, PolicyAction, Rule, ServiceAccountManifest,
};
use mesh_tests::shop::Vip;
use mesh_tests::{
    Agent, Controller, Failure, Pod, Server, Shop, TestResult, eventually, require_agent, shop, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// Long enough for pauses between attempts to reach a controller.
const PATIENTLY: Duration = Duration::from_secs(20);

struct Scene {
    shop: Shop,
    web: Pod,
    near: Pod,
    far: Pod,
    vip: Vip,
    controller: Controller,
    agents: Vec<Agent>,
    _server: Server,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        shop.mode(MtlsMode::Strict)?;
        let (web, near, far) = (shop.pod("a", "web")?, shop.pod("a", "near")?, shop.pod("b", "far")?);
        let vip = shop.service("web", 80)?;
        let _server = shop.serve(&web)?;
        let controller = Controller::start(shop.world())?;
        let launch = |node: &mesh_tests::Node| node.agent().by_controller(&controller).launch();
        let agents = shop.world().nodes().map(launch).collect::<Result<Vec<_>, _>>()?;
        for agent in &agents {
            agent.wait_ready()?;
        }
        Ok(Self { shop, web, near, far, vip, controller, agents, _server })
    }

    fn assert_served(&self, clients: &[&Pod]) -> TestResult {
        for client in clients {
            for to in [self.web.at4(8080), self.web.at6(8080), self.vip.v4, self.vip.v6] {
                let seen = client.tool()?.who(to);
                let seen = seen.map_err(|error| anyhow::anyhow!("{} to {to}: {error}", client.name()))?;
                assert_eq!(seen.server, "web");
            }
        }
        Ok(())
    }

    fn connected(agent: &Agent) -> Result<bool, Failure> {
        Ok(agent.meshctl(&["status"])?["controller"]["connected"] == true)
    }

    fn wait_connected(&self, wanted: bool) -> TestResult {
        for agent in &self.agents {
            eventually(
                PATIENTLY,
                || Self::connected(agent).map_err(|error| format!("{error:?}")),
                |connected| *connected == Ok(wanted),
            )?
            .map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }
}

#[test]
fn a_controller_feeds_the_agents_of_two_nodes() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    scene.assert_served(&[&scene.near, &scene.far])?;
    let connection = scene.far.tool()?.connect(scene.web.at4(8080))?;
    connection.who()?;
    for agent in &scene.agents {
        assert_eq!(shop::security(agent, scene.far.at4(0).ip(), &scene.web)?, ["mutual_tls"]);
        assert!(agent.http("/readyz")?.0 == 200);
        let view = agent.meshctl(&["certificates"])?;
        assert_eq!(view["issuer"], scene.controller.url(), "{view:#}");
    }
    scene.wait_connected(true)?;
    // Changes arrive: a policy, a pod.
    let policy = AuthorizationPolicyManifest::new(shop::NAMESPACE, "web", PolicyAction::Deny);
    let policy =
        policy.selector("app", "web").rule(Rule::any().from("ipBlocks", &[&scene.far.ip4().to_string()]));
    scene.shop.world().manifests().apply(policy)?;
    eventually(SOON, || connection.who().is_err(), |ended| *ended)?;
    assert!(scene.far.tool()?.who(scene.web.at4(8080)).is_err());
    scene.assert_served(&[&scene.near])?;
    scene.shop.world().manifests().delete("AuthorizationPolicy", shop::NAMESPACE, "web")?;
    let late = scene.shop.pod("b", "late")?;
    scene.agents[1].wait_enrolled([&late])?;
    eventually(SOON, || scene.assert_served(&[&late, &scene.far]).is_ok(), |served| *served)?;
    Ok(())
}

#[test]
fn traffic_goes_on_without_the_controller() -> TestResult {
    require_agent!();
    let mut scene = Scene::set(test_name!())?;
    scene.assert_served(&[&scene.near, &scene.far])?;
    let held =
        [scene.near.tool()?.connect(scene.web.at4(8080))?, scene.far.tool()?.connect(scene.web.at6(8080))?];
    scene.controller.kill9();
    scene.wait_connected(false)?;
    scene.assert_served(&[&scene.near, &scene.far])?;
    for connection in &held {
        connection.who()?;
    }
    // What changes meanwhile takes effect when it is back.
    scene.shop.world().manifests().apply(
        AuthorizationPolicyManifest::new(shop::NAMESPACE, "web", PolicyAction::Allow).selector("app", "web"),
    )?;
    scene.assert_served(&[&scene.near, &scene.far])?;
    scene.controller.resume()?;
    scene.wait_connected(true)?;
    for connection in &held {
        eventually(SOON, || connection.who().is_err(), |ended| *ended)?;
    }
    Ok(())
}

#[test]
fn an_agent_starts_from_disk_while_the_controller_is_away() -> TestResult {
    require_agent!();
    let mut scene = Scene::set(test_name!())?;
    scene.assert_served(&[&scene.near, &scene.far])?;
    scene.controller.kill9();
    scene.agents[0].kill9();
    let again = scene.shop.world().node("a")?.agent().by_controller(&scene.controller).start()?;
    again.wait_enrolled([&scene.near, &scene.web])?;
    let status = again.meshctl(&["status"])?;
    assert_eq!(status["controller"]["connected"], false, "{status:#}");
    assert_eq!(status["controller"]["generation"], serde_json::Value::Null, "{status:#}");
    // The node's own pods need no certificate; keys are never on disk, so other nodes' wait for the controller.
    scene.assert_served(&[&scene.near])?;
    scene.controller.resume()?;
    eventually(PATIENTLY, || scene.assert_served(&[&scene.far]).is_ok(), |served| *served)?;
    Ok(())
}

#[test]
fn a_node_gets_certificates_of_its_own_pods_only() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let manifests = scene.shop.world().manifests();
    manifests.apply(ServiceAccountManifest::new(shop::NAMESPACE, "treasurer"))?;
    let treasurer = scene.shop.world().node("a")?.pod("shop/treasurer")?;
    manifests.apply(treasurer.manifest().service_account("treasurer"))?;
    scene.agents[0].wait_enrolled([&treasurer])?;
    let trust =
        Authority::of_agents(&scene.shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&scene.web)))?;
    let ask = |token: &str, csr: &str| {
        request_certificate(scene.controller.place(), scene.controller.address(), &trust, token, csr)
    };
    let node =
        |name: &str| -> Result<String, Failure> { Ok(scene.shop.world().node(name)?.full_name().to_owned()) };
    let (of_a, of_b) = (scene.controller.token_of(&node("a")?)?, scene.controller.token_of(&node("b")?)?);
    let own = spiffe(shop::NAMESPACE, "treasurer");
    let request = request_for(&[&own])?;
    let granted = ask(&of_a, &request)?;
    assert_eq!((granted.status, granted.chain.is_empty()), (0, false), "{granted:?}");
    assert!(granted.chain[0].starts_with("-----BEGIN CERTIFICATE-----"), "{granted:?}");
    let refusals = [
        ("a foreign identity", of_b.clone(), request_for(&[&own])?),
        ("an identity that nobody has", of_a.clone(), request_for(&[&spiffe("shop", "nobody")])?),
        ("another trust domain", of_a.clone(), request_for(&["spiffe://evil.example/ns/shop/sa/treasurer"])?),
        ("two identities", of_a.clone(), request_for(&[&own, &spiffe("shop", "default")])?),
        ("a replayed request", of_a.clone(), request),
        ("a malformed request", of_a.clone(), "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n".to_owned()),
        ("a forged token", of_b.replace(&node("b")?, &node("a")?), request_for(&[&own])?),
        ("no token", String::new(), request_for(&[&own])?),
    ];
    for (what, token, csr) in &refusals {
        let outcome = ask(token, csr)?;
        assert!(outcome.status != 0 && outcome.chain.is_empty(), "{what}: {outcome:?}");
    }
    Ok(())
}
