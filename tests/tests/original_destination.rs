//! Whatever an application dials, it reaches that, by every family and on every path.

use std::net::SocketAddr;

use mesh_tests::{Shop, TestResult, require_agent, shop, test_name};

#[test]
fn a_service_is_reached_by_ipv4_ipv6_and_mapped_addresses() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = [(shop.service("near", 80)?, &near), (shop.service("far", 80)?, &far)];
    shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    for (vip, server) in vips {
        for to in vip.all() {
            // More than once: on one node the first goes through the agent, later ones need not.
            for _ in 0..3 {
                let connection = client.tool()?.connect(to)?;
                let seen = connection.who()?;
                assert_eq!(seen.server, server.name(), "{to}");
                let family_of_pod = if to.ip().to_canonical().is_ipv4() {
                    server.at_mapped(shop::TARGET_PORT)
                } else {
                    server.at6(shop::TARGET_PORT)
                };
                assert_eq!(seen.local, family_of_pod, "{to}");
                assert_eq!(connection.names()?.peer, Some(to));
            }
        }
    }
    Ok(())
}

#[test]
fn a_pod_is_reached_by_its_own_addresses() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    for server in [&near, &far] {
        let port = shop::TARGET_PORT;
        for to in [server.at4(port), server.at6(port), server.at_mapped(port)] {
            let connection = client.tool()?.connect(to)?;
            assert_eq!(connection.who()?.server, server.name(), "{to}");
            assert_eq!(connection.names()?.peer, Some(to));
        }
    }
    // The mesh had its hands in all of that.
    assert_eq!(shop::opened(&agents[0], &client, &far, "proxy")?, 3);
    assert!(shop::opened(&agents[0], &client, &near, "proxy")? >= 1);
    Ok(())
}

#[test]
fn connections_in_flight_at_once_are_not_mixed_up() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let names: Vec<String> = (0..8).map(|number| format!("web-{number}")).collect();
    let mut servers = Vec::new();
    let mut targets: Vec<(SocketAddr, String)> = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let pod = shop.pod(if number % 2 == 0 { "a" } else { "b" }, name)?;
        let vip = shop.service(name, 80)?;
        servers.push(shop.serve(&pod)?);
        targets.extend(vip.all().map(|to| (to, name.clone())));
    }
    shop.start_agents()?;
    let tool = client.tool()?;
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let dialling: Vec<_> = targets
            .iter()
            .cycle()
            .take(targets.len() * 4)
            .map(|(to, name)| {
                let tool = &tool;
                scope.spawn(move || match tool.who(*to) {
                    Ok(seen) if seen.server == *name => None,
                    Ok(seen) => Some(format!("{to} reached {} instead of {name}", seen.server)),
                    Err(error) => Some(format!("{to}: {error}")),
                })
            })
            .collect();
        dialling.into_iter().filter_map(|dial| dial.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[test]
fn each_port_of_a_service_leads_to_its_own_target() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let web = shop.pod("b", "web")?;
    let vip = shop.service_with("web", 80, |service| {
        // By number, by the name of the container's port, and with a port equal to another's target.
        service.port("one", 80, 9001).port("two", 81, "http").port("three", 8080, 9003)
    })?;
    shop.start_agents()?;
    let tool = web.tool()?;
    let serve = |port: u16, name: &str| {
        tool.serve(SocketAddr::from(([0u16; 8], port)), mesh_tests::tool::ServerOptions::named(name))
    };
    let _servers = [serve(9001, "one")?, serve(8080, "two")?, serve(9003, "three")?];
    for (port, name) in [(80, "one"), (81, "two"), (8080, "three")] {
        for to in vip.at_port(port).all() {
            assert_eq!(client.tool()?.who(to)?.server, name, "{to}");
        }
    }
    Ok(())
}
