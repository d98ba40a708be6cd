//! AuthorizationPolicy at layer 4: every field, for peers that the kernel vouches for, peers with a certificate and
//! peers without any identity; as ALLOW and as DENY.

use std::net::IpAddr;
use std::time::Duration;

use mesh_tests::hbone;
use mesh_tests::manifests::{
    AuthorizationPolicyManifest, NamespaceManifest, PolicyAction, Rule, ServiceAccountManifest,
};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Failure, Place, Pod, Server, Shop, TestResult, eventually, require_agent, shop, test_name};

const SOON: Duration = Duration::from_secs(5);

const PORTS: [u16; 2] = [8080, 9090];

/// The other meshed namespace.
const BANK: &str = "bank";

/// Somebody who asks, and who that is.
struct Client {
    place: Place,
    /// Namespace and service account, if anything proves them.
    account: Option<(&'static str, &'static str)>,
}

impl Client {
    fn is(&self, account: (&str, &str)) -> bool {
        self.account == Some(account)
    }

    fn has_ip(&self, pod: &Place) -> bool {
        self.place.ip4() == pod.ip4()
    }
}

const ALICE: (&str, &str) = (shop::NAMESPACE, "alice");
const BOB: (&str, &str) = (BANK, "bob");

/// A server on node a; Alice of `shop` and Bob of `bank`, each on both nodes; and a pod outside the mesh.
struct Scene {
    shop: Shop,
    web: Pod,
    clients: Vec<Client>,
    _servers: Vec<Server>,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let manifests = shop.world().manifests();
        manifests.apply(NamespaceManifest::meshed(BANK))?;
        let web = shop.pod("a", "web")?;
        let mut clients = Vec::new();
        for (namespace, account) in [ALICE, BOB] {
            manifests.apply(ServiceAccountManifest::new(namespace, account))?;
            for node in ["a", "b"] {
                let pod = shop.world().node(node)?.pod(&format!("{namespace}/{account}-{node}"))?;
                manifests.apply(pod.manifest().service_account(account))?;
                clients.push(Client { place: Place::clone(&pod), account: Some((namespace, account)) });
            }
        }
        let plain = shop.unmeshed_pod("a", "plain")?;
        clients.push(Client { place: Place::clone(&plain), account: None });
        let serve = |port: u16| web.tool()?.serve(hbone::everywhere(port), ServerOptions::named("web"));
        let _servers = PORTS.into_iter().map(serve).collect::<Result<_, _>>()?;
        shop.start_agents()?;
        Ok(Self { shop, web, clients, _servers })
    }

    fn policy(&self, action: PolicyAction) -> AuthorizationPolicyManifest {
        AuthorizationPolicyManifest::new(shop::NAMESPACE, "web", action).selector("app", "web")
    }

    fn client(&self, name: &str) -> Result<&Place, Failure> {
        let found = self.clients.iter().find(|client| client.place.name() == name);
        Ok(&found.ok_or_else(|| anyhow::anyhow!("no client {name}"))?.place)
    }

    /// Exactly those are served for whom `served` holds, as soon as the policy is in force.
    fn expect(&self, what: &str, served: impl Fn(&Client, u16, IpAddr) -> bool) -> TestResult {
        let attempts: Vec<(&Client, u16, IpAddr)> = self
            .clients
            .iter()
            .flat_map(|client| PORTS.map(|port| (client, port)))
            .flat_map(|(client, port)| {
                [self.web.at4(0).ip(), self.web.at6(0).ip()].map(|ip| (client, port, ip))
            })
            .collect();
        let wrong = || -> Result<Vec<String>, Failure> {
            let mut wrong = Vec::new();
            for (client, port, ip) in &attempts {
                let answer = client.place.tool()?.who((*ip, *port).into());
                let wanted = served(client, *port, *ip);
                if answer.is_ok() != wanted {
                    wrong
                        .push(format!("{} to {ip} {port}: wanted {wanted}, {answer:?}", client.place.name()));
                }
            }
            Ok(wrong)
        };
        let settled = eventually(
            SOON,
            || wrong().map_err(|error| format!("{error:?}")),
            |wrong| wrong.as_ref().is_ok_and(Vec::is_empty),
        );
        settled.map_err(|error| anyhow::anyhow!("{what}: {error}"))?.map_err(anyhow::Error::msg)?;
        Ok(())
    }

    /// As the rule of an ALLOW policy and of a DENY policy.
    fn expect_rule(
        &self,
        what: &str,
        rule: &Rule,
        matches: impl Fn(&Client, u16, IpAddr) -> bool,
    ) -> TestResult {
        let manifests = self.shop.world().manifests();
        manifests.apply(self.policy(PolicyAction::Allow).rule(rule.clone()))?;
        self.expect(&format!("ALLOW {what}"), &matches)?;
        manifests.apply(self.policy(PolicyAction::Deny).rule(rule.clone()))?;
        self.expect(&format!("DENY {what}"), |client, port, ip| !matches(client, port, ip))
    }
}

#[test]
fn sources_match_by_identity() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let from = |field: &str, value: &str| Rule::any().from(field, &[value]);
    let alice = |client: &Client, _: u16, _: IpAddr| client.is(ALICE);
    let bob = |client: &Client, _: u16, _: IpAddr| client.is(BOB);
    let known = |client: &Client, _: u16, _: IpAddr| client.account.is_some();
    let not_alice = |client: &Client, _: u16, _: IpAddr| !client.is(ALICE);
    let not_bob = |client: &Client, _: u16, _: IpAddr| !client.is(BOB);
    let unknown = |client: &Client, _: u16, _: IpAddr| client.account.is_none();
    type Matches<'m> = &'m dyn Fn(&Client, u16, IpAddr) -> bool;
    let rows: [(&str, &str, Matches<'_>); 13] = [
        ("principals", "cluster.local/ns/shop/sa/alice", &alice),
        ("principals", "*/sa/bob", &bob),
        ("principals", "cluster.local/ns/shop/*", &alice),
        ("principals", "*", &known),
        ("notPrincipals", "cluster.local/ns/shop/sa/alice", &not_alice),
        ("notPrincipals", "*", &unknown),
        ("namespaces", "bank", &bob),
        ("notNamespaces", "bank", &not_bob),
        ("serviceAccounts", "shop/alice", &alice),
        // Of the policy's own namespace, where there is no Bob.
        ("serviceAccounts", "alice", &alice),
        ("notServiceAccounts", "bank/bob", &not_bob),
        ("trustDomains", "cluster.local", &known),
        ("notTrustDomains", "cluster.local", &unknown),
    ];
    for (field, value, matches) in rows {
        scene.expect_rule(&format!("{field}: {value}"), &from(field, value), matches)?;
    }
    Ok(())
}

#[test]
fn sources_match_by_address_and_operations_by_port() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let (near, far) = (scene.client("alice-a")?, scene.client("bob-b")?);
    let plain = scene.client("plain")?;
    for pod in [near, far, plain] {
        let blocks = [pod.ip4().to_string(), format!("{}/128", pod.ip6())];
        let blocks = [blocks[0].as_str(), blocks[1].as_str()];
        let of_it = |client: &Client, _: u16, _: IpAddr| client.has_ip(pod);
        let of_others = |client: &Client, _: u16, _: IpAddr| !client.has_ip(pod);
        let name = pod.name();
        scene.expect_rule(&format!("ipBlocks of {name}"), &Rule::any().from("ipBlocks", &blocks), of_it)?;
        let not = Rule::any().from("notIpBlocks", &blocks);
        scene.expect_rule(&format!("notIpBlocks of {name}"), &not, of_others)?;
    }
    let to = |field: &str| Rule::any().to(field, &["8080"]);
    scene.expect_rule("ports", &to("ports"), |_, port, _| port == 8080)?;
    scene.expect_rule("notPorts", &to("notPorts"), |_, port, _| port != 8080)?;
    let all = Rule::any()
        .from_all(&[("namespaces", &["shop"]), ("notIpBlocks", &[&near.ip4().to_string()])])
        .from("namespaces", &["bank"])
        .to("ports", &["9090"]);
    let near4 = near.ip4();
    scene.expect_rule("sources or sources, and an operation", &all, |client, port, ip| {
        let at_near4 = client.place.ip4() == near4 && ip.is_ipv4();
        port == 9090 && (client.is(BOB) || client.is(ALICE) && !at_near4)
    })
}

#[test]
fn conditions_match_by_every_key_of_layer_4() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let near = scene.client("alice-a")?;
    let far = scene.client("alice-b")?;
    let ips = [near.ip4().to_string(), near.ip6().to_string(), far.ip4().to_string(), far.ip6().to_string()];
    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
    let own = scene.web.ip4().to_string();
    let alice = |client: &Client, _: u16, _: IpAddr| client.is(ALICE);
    let bob = |client: &Client, _: u16, _: IpAddr| client.is(BOB);
    let known = |client: &Client, _: u16, _: IpAddr| client.account.is_some();
    let by_ip4 = |_: &Client, _: u16, ip: IpAddr| ip.is_ipv4();
    let to_8080 = |_: &Client, port: u16, _: IpAddr| port == 8080;
    type Matches<'m> = &'m dyn Fn(&Client, u16, IpAddr) -> bool;
    let rows: [(&str, &[&str], Matches<'_>); 7] = [
        ("source.ip", &ips, &alice),
        ("source.namespace", &["bank"], &bob),
        ("source.principal", &["cluster.local/ns/shop/sa/alice"], &alice),
        ("source.serviceAccount", &["bank/bob"], &bob),
        ("source.trustDomain", &["cluster.local"], &known),
        ("destination.ip", &[&own], &by_ip4),
        ("destination.port", &["8080"], &to_8080),
    ];
    for (key, values, matches) in rows {
        scene.expect_rule(key, &Rule::any().when(key, values), matches)?;
        let inverse = |client: &Client, port: u16, ip: IpAddr| !matches(client, port, ip);
        scene.expect_rule(&format!("not {key}"), &Rule::any().when_not(key, values), inverse)?;
    }
    Ok(())
}

#[test]
fn deny_wins_over_allow_and_allowing_nothing_denies_everything() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let manifests = scene.shop.world().manifests();
    manifests.apply(scene.policy(PolicyAction::Deny))?;
    scene.expect("DENY without rules", |_, _, _| true)?;
    manifests.apply(scene.policy(PolicyAction::Allow))?;
    scene.expect("ALLOW without rules", |_, _, _| false)?;
    manifests.apply(scene.policy(PolicyAction::Allow).rule(Rule::any()))?;
    scene.expect("ALLOW everything", |_, _, _| true)?;
    let deny = AuthorizationPolicyManifest::new(shop::NAMESPACE, "deny", PolicyAction::Deny);
    manifests.apply(deny.rule(Rule::any().from("principals", &["*/sa/alice"])))?;
    scene.expect("ALLOW everything, DENY Alice", |client, _, _| !client.is(ALICE))?;
    manifests.delete("AuthorizationPolicy", shop::NAMESPACE, "deny")?;
    scene.expect("ALLOW everything again", |_, _, _| true)?;
    // A second ALLOW adds, it does not replace.
    manifests.apply(scene.policy(PolicyAction::Allow).rule(Rule::any().from("namespaces", &["bank"])))?;
    let more = AuthorizationPolicyManifest::new(shop::NAMESPACE, "more", PolicyAction::Allow);
    manifests.apply(more.rule(Rule::any().from("serviceAccounts", &["alice"]).to("ports", &["9090"])))?;
    scene.expect("two ALLOW", |client, port, _| client.is(BOB) || client.is(ALICE) && port == 9090)
}

#[test]
fn a_policy_reaches_its_scope_and_no_further() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let manifests = scene.shop.world().manifests();
    let deny_alice = |namespace: &str| {
        let rule = Rule::any().from("serviceAccounts", &["shop/alice"]);
        AuthorizationPolicyManifest::new(namespace, "scoped", PolicyAction::Deny).rule(rule)
    };
    let not_alice = |client: &Client, _: u16, _: IpAddr| !client.is(ALICE);
    manifests.apply(deny_alice("istio-system"))?;
    scene.expect("of the root namespace", not_alice)?;
    manifests.apply(deny_alice("istio-system").selector("app", "other"))?;
    scene.expect("of the root namespace, for others", |_, _, _| true)?;
    manifests.apply(deny_alice("istio-system").selector("app", "web"))?;
    scene.expect("of the root namespace, for it", not_alice)?;
    manifests.delete("AuthorizationPolicy", "istio-system", "scoped")?;
    scene.expect("gone", |_, _, _| true)?;
    manifests.apply(deny_alice(BANK))?;
    manifests.apply(deny_alice(shop::NAMESPACE).selector("app", "other"))?;
    scene.expect("of another namespace, and of another workload", |_, _, _| true)?;
    manifests.apply(deny_alice(shop::NAMESPACE))?;
    scene.expect("of its own namespace", not_alice)?;
    manifests.apply(deny_alice(shop::NAMESPACE).selector("app", "web"))?;
    scene.expect("of itself", not_alice)
}
