//! DNS as pods see it: services answered by the mesh, everything else by the pod's own resolver.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_tests::manifests::ServiceManifest;
use mesh_tests::nameserver::NameServer;
use mesh_tests::protocol::{DnsAnswer, DnsBy};
use mesh_tests::world::{NAMESERVER4, NAMESERVER6};
use mesh_tests::{Failure, Pod, Shop, TestResult, World, eventually, require_agent, test_name};

const WAYS: [DnsBy; 3] = [DnsBy::ConnectedUdp, DnsBy::UnconnectedUdp, DnsBy::Tcp];

/// A meshed client, a resolver outside the mesh, and an agent.
struct Scene {
    client: Pod,
    resolver: NameServer,
    agent: mesh_tests::Agent,
    shop: Shop,
}

impl Scene {
    fn set(test: &str, prepare: impl FnOnce(&Shop) -> TestResult) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a"])?;
        let client = shop.pod("a", "client")?;
        let outside = shop.world().outsider("resolver")?;
        let many = (1..=100).map(|last| IpAddr::from([203, 0, 113, last])).collect();
        let resolver = NameServer::start(
            &outside,
            &[
                ("example.test.", vec!["203.0.113.7".parse()?, "2001:db8::7".parse()?]),
                ("many.test.", many),
                ("web.shop.svc.cluster.local.", vec!["203.0.113.99".parse()?]),
            ],
        )?;
        prepare(&shop)?;
        let agent = shop.world().node("a")?.agent().start()?;
        Ok(Self { client, resolver, agent, shop })
    }

    fn ask(&self, name: &str, kind: &str, by: DnsBy) -> Result<DnsAnswer, Failure> {
        Ok(self.client.tool()?.dns(self.resolver.address(), name, kind, by)?)
    }
}

fn set(addresses: &[IpAddr]) -> BTreeSet<IpAddr> {
    addresses.iter().copied().collect()
}

#[test]
fn services_are_found_by_short_and_full_names_in_both_families() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let stranger = shop.world().node("a")?.pod("other/stranger")?;
    shop.world().manifests().apply(mesh_tests::manifests::NamespaceManifest::meshed("other"))?;
    shop.world().manifests().apply(stranger.manifest())?;
    let vip = shop.service("web", 80)?;
    let _cluster = NameServer::of_cluster(shop.world().node("a")?)?;
    shop.start_agents()?;
    let both = set(&[vip.v4.ip(), vip.v6.ip()]);
    for name in
        ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "web.shop.svc.cluster.local."]
    {
        assert_eq!(set(&client.tool()?.getaddrinfo(name)?), both, "{name}");
    }
    assert_eq!(set(&stranger.tool()?.getaddrinfo("web.shop")?), both);
    assert!(stranger.tool()?.getaddrinfo("web").is_err(), "a short name means the pod's own namespace");
    Ok(())
}

#[test]
fn answers_are_the_same_by_every_transport_and_to_every_resolver_address() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let vip = shop.service("web", 80)?;
    shop.start_agents()?;
    let servers: [SocketAddr; 3] =
        [(NAMESERVER4, 53).into(), (NAMESERVER6, 53).into(), (NAMESERVER4.to_ipv6_mapped(), 53).into()];
    for server in servers {
        for by in WAYS {
            for (kind, expected) in [("A", vip.v4.ip()), ("AAAA", vip.v6.ip())] {
                let answer = client.tool()?.dns(server, "WEB.shop.svc.cluster.local.", kind, by)?;
                assert_eq!(answer.addresses, [expected], "{kind} from {server} by {by:?}: {answer:?}");
                assert_eq!(answer.code, "No Error");
            }
        }
    }
    Ok(())
}

#[test]
fn a_name_without_such_records_differs_from_a_name_that_does_not_exist() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        let (only4, _) = World::service_ips(50);
        let service = ServiceManifest::new("shop", "old").cluster_ip(only4).port("http", 80, 8080);
        shop.world().manifests().apply(service.selector("app", "old"))?;
        Ok(())
    })?;
    for by in WAYS {
        let answer = scene.ask("old.shop.svc.cluster.local.", "A", by)?;
        assert_eq!(answer.addresses.len(), 1, "{answer:?}");
        for kind in ["AAAA", "MX", "TXT"] {
            let answer = scene.ask("old.shop.svc.cluster.local.", kind, by)?;
            assert_eq!((answer.code.as_str(), answer.answers.len()), ("No Error", 0), "{kind}: {answer:?}");
        }
        let answer = scene.ask("nobody.old.shop.svc.cluster.local.", "A", by)?;
        assert_eq!(answer.code, "Non-Existent Domain", "{answer:?}");
    }
    assert!(scene.resolver.asked().is_empty(), "{:?}", scene.resolver.asked());
    Ok(())
}

#[test]
fn a_headless_service_has_its_pods_their_names_and_their_ports() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let manifests = shop.world().manifests();
    let mut pods = Vec::new();
    for (node, name) in [("a", "db-0"), ("b", "db-1")] {
        let pod = shop.world().node(node)?.pod(&format!("shop/{name}"))?;
        let manifest = pod.manifest().label("app", "db");
        manifests.apply(manifest.with("/spec/hostname", name).with("/spec/subdomain", "db"))?;
        pods.push(pod);
    }
    let sleeping = shop.world().node("b")?.pod("shop/db-2")?;
    manifests.apply(sleeping.manifest().label("app", "db").not_ready())?;
    shop.service_with("db", 5432, |service| service.headless().port("sql", 5432, 5432))?;
    shop.start_agents()?;
    let server = SocketAddr::from((NAMESERVER4, 53));
    let ask = |name: &str, kind: &str| -> Result<DnsAnswer, Failure> {
        let name = format!("{name}.db.shop.svc.cluster.local.");
        Ok(client.tool()?.dns(server, name.trim_start_matches('.'), kind, DnsBy::ConnectedUdp)?)
    };
    let ips4: Vec<IpAddr> = pods.iter().map(|pod| pod.ip4().into()).collect();
    assert_eq!(set(&ask("", "A")?.addresses), set(&ips4), "those that are not ready are left out");
    for pod in &pods {
        assert_eq!(ask(pod.name(), "A")?.addresses, [IpAddr::V4(pod.ip4())]);
        assert_eq!(ask(pod.name(), "AAAA")?.addresses, [IpAddr::V6(pod.ip6())]);
    }
    let ports = ask("_sql._tcp", "SRV")?;
    for pod in &pods {
        let target = format!("{}.db.shop.svc.cluster.local", pod.name());
        let found = ports.answers.iter().any(|row| row.contains("5432") && row.contains(&target));
        assert!(found, "{target} is not among {ports:?}");
    }
    assert_eq!(ask("_none._tcp", "SRV")?.code, "Non-Existent Domain");
    Ok(())
}

#[test]
fn a_service_with_an_address_has_its_ports_too() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        shop.service_with("web", 80, |service| service.port("http", 80, 8080).port("admin", 81, 8081))?;
        Ok(())
    })?;
    let answer = scene.ask("_admin._tcp.web.shop.svc.cluster.local.", "SRV", DnsBy::ConnectedUdp)?;
    let expected = |row: &String| row.contains(" 81 ") && row.contains("web.shop.svc.cluster.local");
    assert!(!answer.answers.is_empty() && answer.answers.iter().all(expected), "{answer:?}");
    Ok(())
}

#[test]
fn an_external_name_leads_to_what_the_resolver_says_of_it() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        let alias = ServiceManifest::new("shop", "partner").external_name("example.test");
        shop.world().manifests().apply(alias)?;
        Ok(())
    })?;
    for by in WAYS {
        for (kind, address) in [("A", "203.0.113.7"), ("AAAA", "2001:db8::7")] {
            let answer = scene.ask("partner.shop.svc.cluster.local.", kind, by)?;
            assert!(answer.answers.iter().any(|row| row.starts_with("CNAME example.test")), "{answer:?}");
            assert_eq!(answer.addresses, [address.parse::<IpAddr>()?], "{kind} by {by:?}");
        }
    }
    Ok(())
}

#[test]
fn what_the_mesh_does_not_know_is_asked_of_the_resolver_the_pod_dialled() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Ok(()))?;
    for by in WAYS {
        let answer = scene.ask("example.test.", "A", by)?;
        assert_eq!(answer.addresses, ["203.0.113.7".parse::<IpAddr>()?], "{by:?}");
        let answer = scene.ask("nobody.test.", "A", by)?;
        assert_eq!(answer.code, "Non-Existent Domain", "{by:?}");
    }
    let asked = scene.resolver.asked();
    assert!(asked.iter().all(|question| question.from.ip() == IpAddr::V4(scene.client.ip4())), "{asked:?}");
    assert!(asked.iter().any(|question| question.tcp) && asked.iter().any(|question| !question.tcp));
    Ok(())
}

#[test]
fn an_answer_too_long_for_a_datagram_is_cut_short_and_complete_by_tcp() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Ok(()))?;
    for by in [DnsBy::ConnectedUdp, DnsBy::UnconnectedUdp] {
        let cut = scene.ask("many.test.", "A", by)?;
        assert!(cut.truncated && cut.addresses.len() < 100, "{cut:?}");
    }
    let whole = scene.ask("many.test.", "A", DnsBy::Tcp)?;
    assert_eq!((whole.truncated, whole.addresses.len()), (false, 100));
    Ok(())
}

#[test]
fn without_its_agent_a_pod_asks_its_own_resolver() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        shop.service("web", 80)?;
        Ok(())
    })?;
    let web = "web.shop.svc.cluster.local.";
    let others: IpAddr = "203.0.113.99".parse()?;
    for by in WAYS {
        assert_ne!(scene.ask(web, "A", by)?.addresses, [others], "{by:?}");
    }
    assert!(scene.resolver.asked().is_empty());
    scene.agent.kill9();
    for by in WAYS {
        assert_eq!(scene.ask(web, "A", by)?.addresses, [others], "{by:?}");
    }
    scene.shop.world().node("a")?.agent().start()?.wait_enrolled([&scene.client])?;
    for by in WAYS {
        assert_ne!(scene.ask(web, "A", by)?.addresses, [others], "{by:?}");
    }
    Ok(())
}

#[test]
fn a_pod_may_keep_its_own_resolver() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        shop.service("web", 80)?;
        Ok(())
    })?;
    let own = scene.client.manifest().annotation("nodemesh.dev/dns-capture", "false");
    scene.shop.world().manifests().apply(own)?;
    let others: IpAddr = "203.0.113.99".parse()?;
    for by in WAYS {
        let ask = || scene.ask("web.shop.svc.cluster.local.", "A", by).map_err(|error| format!("{error:?}"));
        eventually(Duration::from_secs(5), ask, |answer| {
            answer.as_ref().is_ok_and(|answer| answer.addresses == [others])
        })?
        .map_err(anyhow::Error::msg)?;
    }
    Ok(())
}

#[test]
fn a_resolver_that_is_silent_costs_one_query_not_the_others() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |shop| {
        shop.service("web", 80)?;
        Ok(())
    })?;
    // It takes queries and never answers.
    let silent = scene.shop.world().outsider("silent")?;
    let _sink = silent.run(|| std::net::UdpSocket::bind(silent.at4(53)))??;
    let tool = scene.client.tool()?;
    let waiting = std::thread::spawn({
        let (tool, server) = (tool.clone(), silent.at4(53));
        move || tool.dns(server, "example.test.", "A", DnsBy::ConnectedUdp)
    });
    for by in WAYS {
        assert_eq!(scene.ask("example.test.", "A", by)?.addresses.len(), 1);
        assert_eq!(scene.ask("web.shop.svc.cluster.local.", "A", by)?.addresses.len(), 1);
    }
    // Either told that the server failed, or left without an answer: never a wrong one.
    if let Ok(Ok(answer)) = waiting.join() {
        assert_eq!(answer.code, "Server Failure", "{answer:?}");
    }
    Ok(())
}
