//! What the mesh leaves alone: loopback, the host, unmeshed processes, a pod's own addresses, chosen pods.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_tests::protocol::DnsBy;
use mesh_tests::tool::ServerOptions;
use mesh_tests::world::NAMESERVER4;
use mesh_tests::{Place, Shop, TestResult, eventually, require_agent, shop, test_name};

#[test]
fn loopback_stays_within_the_pod() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (pod, other) = (shop.pod("a", "pod")?, shop.pod("a", "other")?);
    // A service with the same port must not attract loopback traffic.
    shop.service("other", 8080)?;
    shop.start_agents()?;
    let _servers = [shop.serve(&pod)?, shop.serve(&other)?];
    for to in ["127.0.0.1:8080", "127.9.9.9:8080", "[::1]:8080", "[::ffff:127.0.0.1]:8080"] {
        let to: SocketAddr = to.parse()?;
        let connection = pod.tool()?.connect(to)?;
        let seen = connection.who()?;
        assert_eq!(seen.server, "pod", "{to}");
        assert_eq!(connection.names()?.peer, Some(to));
        assert!(seen.accepted_from.ip().to_canonical().is_loopback(), "{seen:?}");
    }
    Ok(())
}

#[test]
fn a_pods_own_addresses_lead_to_itself() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let pod = shop.pod("a", "pod")?;
    shop.start_agents()?;
    let _server = shop.serve(&pod)?;
    for to in [pod.at4(8080), pod.at6(8080), pod.at_mapped(8080)] {
        let seen = pod.tool()?.who(to)?;
        assert_eq!(seen.server, "pod", "{to}");
        assert_eq!(seen.accepted_from.ip().to_canonical(), to.ip().to_canonical());
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_by_its_own_service() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let pod = shop.pod("a", "pod")?;
    let vip = shop.service("pod", 80)?;
    shop.start_agents()?;
    let _server = shop.serve(&pod)?;
    for to in vip.all().into_iter().flat_map(|to| [to; 3]) {
        let connection = pod.tool()?.connect(to)?;
        let seen = connection.who()?;
        assert_eq!(seen.server, "pod", "{to}");
        assert_eq!(connection.names()?.peer, Some(to));
    }
    Ok(())
}

#[test]
fn host_and_unmeshed_processes_are_not_redirected() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let target = shop.unmeshed_pod("a", "target")?;
    let web = shop.pod("a", "web")?;
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&target)?, shop.serve(&web)?];
    let host = shop.world().node("a")?.host().clone();
    for place in [Place::clone(&plain), host.clone()] {
        for to in [target.at4(8080), target.at6(8080)] {
            let connection = place.tool()?.connect(to)?;
            let seen = connection.who()?;
            let names = connection.names()?;
            assert_eq!(names.peer, Some(to));
            let local = names.local.map(|local| local.port());
            assert_eq!(Some(seen.accepted_from.port()), local, "{}: untouched end to end", place.name());
        }
        // Services exist for meshed pods only; nobody else answers for their addresses here.
        assert!(place.tool()?.connect(vip.v4).is_err(), "{}", place.name());
    }
    let edges = agents[0].admin("/edges")?.to_string();
    assert!(!edges.contains("plain"), "{edges}");
    Ok(())
}

#[test]
fn a_meshed_pod_reaches_unmeshed_pods_and_the_host() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let near = shop.unmeshed_pod("a", "near")?;
    let far = shop.unmeshed_pod("b", "far")?;
    shop.start_agents()?;
    let host = shop.world().node("a")?.host().clone();
    let outsider = shop.world().outsider("outsider")?;
    for place in [Place::clone(&near), Place::clone(&far), host, outsider] {
        let options = ServerOptions::named(place.name());
        let _server = place.tool()?.serve(SocketAddr::from(([0u16; 8], 8080)), options)?;
        for (to, from) in
            [(place.at4(8080), IpAddr::V4(client.ip4())), (place.at6(8080), IpAddr::V6(client.ip6()))]
        {
            let connection = client.tool()?.connect(to)?;
            let seen = connection.who()?;
            assert_eq!(seen.server, place.name());
            assert_eq!(seen.accepted_from.ip().to_canonical(), from);
            assert_eq!(connection.names()?.peer, Some(to));
        }
    }
    Ok(())
}

#[test]
fn a_headless_service_gives_pods_and_a_dialled_pod_is_kept() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let backends = [
        shop.backend("a", "db-0", "db")?,
        shop.backend("a", "db-1", "db")?,
        shop.backend("b", "db-2", "db")?,
    ];
    shop.service_with("db", 8080, |service| service.headless().port("db", 8080, 8080))?;
    // A balanced service over the same pods must not take over what was dialled by pod address.
    shop.service_with("db-balanced", 8080, |service| {
        service.with("/spec/selector", serde_json::json!({"app": "db"})).port("db", 8080, 8080)
    })?;
    shop.start_agents()?;
    let mut servers = Vec::new();
    for pod in &backends {
        servers.push(shop.serve(pod)?);
    }
    let nameserver = SocketAddr::from((NAMESERVER4, 53));
    let name = format!("db.{}.svc.cluster.local.", shop::NAMESPACE);
    for (kind, expected) in [
        ("A", backends.iter().map(|pod| IpAddr::V4(pod.ip4())).collect::<BTreeSet<_>>()),
        ("AAAA", backends.iter().map(|pod| IpAddr::V6(pod.ip6())).collect()),
    ] {
        let found = eventually(
            Duration::from_secs(5),
            || client.tool()?.dns(nameserver, &name, kind, DnsBy::ConnectedUdp),
            |answer| answer.as_ref().is_ok_and(|answer| answer.addresses.len() == expected.len()),
        )??;
        assert_eq!(found.addresses.iter().copied().collect::<BTreeSet<_>>(), expected, "{kind}");
    }
    for pod in &backends {
        for to in [pod.at4(8080), pod.at6(8080), pod.at_mapped(8080)].into_iter().flat_map(|to| [to; 5]) {
            assert_eq!(client.tool()?.who(to)?.server, pod.name(), "{to}");
        }
    }
    Ok(())
}

#[test]
fn an_application_may_listen_on_one_address_or_on_all() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let servers = [shop.pod("a", "near")?, shop.pod("b", "far")?];
    let vips = [shop.service("near", 80)?, shop.service("far", 80)?];
    shop.start_agents()?;
    for (pod, vip) in servers.iter().zip(vips) {
        let everything: SocketAddr = "[::]:8080".parse()?;
        let all4: SocketAddr = "0.0.0.0:8080".parse()?;
        for (listen, only_v6, reachable) in [
            (everything, false, vec![vip.v4, vip.v6, vip.mapped()]),
            (everything, true, vec![vip.v6]),
            (all4, false, vec![vip.v4, vip.mapped()]),
            (pod.at4(8080), false, vec![vip.v4, vip.mapped()]),
            (pod.at6(8080), false, vec![vip.v6]),
        ] {
            let options = ServerOptions::named(pod.name());
            let options = if only_v6 { options.only_v6() } else { options };
            let _server = pod.tool()?.serve(listen, options)?;
            for to in reachable {
                assert_eq!(client.tool()?.who(to)?.server, pod.name(), "{listen} by {to}");
            }
        }
        // On loopback alone it is the pod's own affair.
        let _server = pod.tool()?.serve("127.0.0.1:8080".parse()?, ServerOptions::named("private"))?;
        assert!(client.tool()?.who(vip.v4).is_err(), "loopback must not be reachable through the mesh");
        assert_eq!(pod.tool()?.who("127.0.0.1:8080".parse()?)?.server, "private");
    }
    Ok(())
}
