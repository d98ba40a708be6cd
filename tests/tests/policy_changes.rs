//! A policy that changes while connections run: new ones are judged by it at once, established ones that it denies
//! end within a second, whichever way they travel, and nothing else does.

use std::time::{Duration, Instant};

use mesh_tests::hbone;
use mesh_tests::manifests::{
    AuthorizationPolicyManifest, MtlsMode, PolicyAction, Rule, ServiceAccountManifest,
};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Connection, Failure, Pod, Server, Shop, TestResult, eventually, limit, require_agent, shop,
    test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// What a policy change may take to end what it denies.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A server on node a, with clients that have a connection to it by every path.
struct Scene {
    shop: Shop,
    web: Pod,
    /// Meshed, on the server's node; service account `alice`.
    near: Pod,
    /// Meshed, on the server's node; service account `bob`.
    bystander: Pod,
    /// Meshed, on another node; service account `alice`.
    far: Pod,
    /// Not meshed.
    plain: Pod,
    agents: Vec<Agent>,
    _server: Server,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let manifests = shop.world().manifests();
        let web = shop.pod("a", "web")?;
        let as_account = |node: &str, name: &str, account: &str| -> Result<Pod, Failure> {
            manifests.apply(ServiceAccountManifest::new(shop::NAMESPACE, account))?;
            let pod = shop.world().node(node)?.pod(&format!("{}/{name}", shop::NAMESPACE))?;
            manifests.apply(pod.manifest().service_account(account))?;
            Ok(pod)
        };
        let near = as_account("a", "near", "alice")?;
        let bystander = as_account("a", "bystander", "bob")?;
        let far = as_account("b", "far", "alice")?;
        let plain = shop.unmeshed_pod("a", "plain")?;
        let _server = shop.serve(&web)?;
        let agents = shop.start_agents()?;
        Ok(Self { shop, web, near, bystander, far, plain, agents, _server })
    }

    /// A connection of each client by each path: what it is, and itself.
    fn connect_all(&self) -> Result<Vec<(&'static str, Connection)>, Failure> {
        let node = self.shop.world().node("a")?;
        let mut held = Vec::new();
        for to in [self.web.at4(8080), self.web.at6(8080)] {
            // The first goes through the agent, which then lets the kernel do it.
            held.push(("near, by the agent", self.near.tool()?.connect(to)?));
            held.push(("near, directly", node.kernel().dial_directly(&self.near, to)?));
            held.push(("bystander, by the agent", self.bystander.tool()?.connect(to)?));
            held.push(("bystander, directly", node.kernel().dial_directly(&self.bystander, to)?));
            held.push(("far", self.far.tool()?.connect(to)?));
            held.push(("plain", self.plain.tool()?.connect(to)?));
        }
        for (what, connection) in &held {
            connection.who().map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
        }
        Ok(held)
    }

    fn deny(&self, rule: Rule) -> AuthorizationPolicyManifest {
        AuthorizationPolicyManifest::new(shop::NAMESPACE, "changed", PolicyAction::Deny).rule(rule)
    }

    /// Apply a policy and check that of `held` exactly those end in time whose description `ends`.
    fn change(
        &self,
        policy: AuthorizationPolicyManifest,
        held: &[(&'static str, Connection)],
        ends: impl Fn(&str) -> bool,
    ) -> TestResult {
        self.shop.world().manifests().apply(policy)?;
        let changed = Instant::now();
        for (what, connection) in held.iter().filter(|(what, _)| ends(what)) {
            eventually(SOON, || connection.who().is_err(), |ended| *ended)
                .map_err(|error| anyhow::anyhow!("{what} lives on: {error}"))?;
        }
        assert!(changed.elapsed() < limit(AT_ONCE), "it took {:?}", changed.elapsed());
        // Whatever else the change might end would have ended by now.
        std::thread::sleep(limit(AT_ONCE).saturating_sub(changed.elapsed()));
        for (what, connection) in held.iter().filter(|(what, _)| !ends(what)) {
            connection.who().map_err(|error| anyhow::anyhow!("{what} should live on: {error}"))?;
        }
        Ok(())
    }
}

#[test]
fn a_denied_identity_loses_its_connections_by_every_path() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let held = scene.connect_all()?;
    let policy = scene.deny(Rule::any().from("principals", &["cluster.local/ns/shop/sa/alice"]));
    scene.change(policy, &held, |what| what.starts_with("near") || what.starts_with("far"))?;
    for client in [&scene.near, &scene.far] {
        assert!(client.tool()?.who(scene.web.at4(8080)).is_err(), "{} is let in again", client.name());
    }
    assert_eq!(scene.bystander.tool()?.who(scene.web.at4(8080))?.server, "web");
    let counted = scene.agents[0].metric(&["reason=\"policy_denied\""])?;
    assert!(counted >= 2.0, "refusals are counted by reason: {counted}");
    Ok(())
}

#[test]
fn a_denied_address_loses_its_connections() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let held = scene.connect_all()?;
    let blocks = [scene.plain.ip4().to_string(), scene.plain.ip6().to_string()];
    let policy = scene.deny(Rule::any().from("ipBlocks", &[&blocks[0], &blocks[1]]));
    scene.change(policy, &held, |what| what == "plain")
}

#[test]
fn an_allow_policy_ends_what_it_does_not_allow() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let held = scene.connect_all()?;
    let policy = AuthorizationPolicyManifest::new(shop::NAMESPACE, "changed", PolicyAction::Allow)
        .rule(Rule::any().from("serviceAccounts", &["shop/bob"]));
    scene.change(policy, &held, |what| !what.starts_with("bystander"))?;
    let counted = scene.agents[0].metric(&["reason=\"policy_denied\""])?;
    // What ended is not a refusal; this is.
    assert!(scene.far.tool()?.who(scene.web.at4(8080)).is_err());
    let refused = || scene.agents[0].metric(&["reason=\"policy_denied\""]);
    eventually(SOON, refused, |now| now.as_ref().is_ok_and(|now| *now > counted))??;
    Ok(())
}

#[test]
fn strict_ends_plaintext_and_nothing_else() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let held = scene.connect_all()?;
    scene.shop.mode(MtlsMode::Strict)?;
    let changed = Instant::now();
    for (what, connection) in held.iter().filter(|(what, _)| *what == "plain") {
        eventually(SOON, || connection.who().is_err(), |ended| *ended)
            .map_err(|error| anyhow::anyhow!("{what} lives on: {error}"))?;
    }
    assert!(changed.elapsed() < limit(AT_ONCE), "it took {:?}", changed.elapsed());
    for (what, connection) in held.iter().filter(|(what, _)| *what != "plain") {
        connection.who().map_err(|error| anyhow::anyhow!("{what} should live on: {error}"))?;
    }
    Ok(())
}

#[test]
fn a_dry_run_ends_nothing_and_is_logged() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let held = scene.connect_all()?;
    scene.change(scene.deny(Rule::any()).dry_run(), &held, |_| false)?;
    for client in [&scene.near, &scene.far, &scene.plain] {
        assert_eq!(client.tool()?.who(scene.web.at4(8080))?.server, "web", "{}", client.name());
    }
    let logged = || scene.agents[0].log_text();
    eventually(SOON, logged, |log| log.contains("shop/changed") && log.contains("dry"))?;
    Ok(())
}

#[test]
fn a_new_policy_meets_a_server_that_listens_on_one_address_too() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let own = scene.web.at4(9090);
    let _narrow = scene.web.tool()?.serve(own, ServerOptions::named("narrow"))?;
    let _wide = scene.web.tool()?.serve(hbone::everywhere(9091), ServerOptions::named("wide"))?;
    let clients = [&scene.near, &scene.far, &scene.plain];
    for client in clients {
        assert_eq!(client.tool()?.who(own)?.server, "narrow", "{}", client.name());
    }
    scene.shop.world().manifests().apply(scene.deny(Rule::any().to("ports", &["9090"])))?;
    for client in clients {
        let refused = || client.tool().and_then(|tool| tool.who(own)).is_err();
        eventually(SOON, refused, |refused| *refused)?;
        assert_eq!(client.tool()?.who(scene.web.at4(9091))?.server, "wide", "{}", client.name());
    }
    Ok(())
}
