//! Applications on both ends see true addresses: what they dialled, who they are, who came.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_tests::protocol::Serve;
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Pod, Shop, TestResult, eventually, require_agent, shop, test_name};

/// The address of `pod` in the family of `to`, mapped if `to` is mapped.
fn own_ip(pod: &Pod, to: SocketAddr) -> IpAddr {
    match to {
        SocketAddr::V4(_) => pod.at4(0).ip(),
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => pod.at_mapped(0).ip(),
        SocketAddr::V6(_) => pod.at6(0).ip(),
    }
}

#[test]
fn the_client_sees_the_address_it_dialled_and_its_own() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = [shop.service("near", 80)?, shop.service("far", 80)?];
    shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    for vip in vips {
        for to in vip.all() {
            for attempt in 0..3 {
                let connection = client.tool()?.connect(to)?;
                let names = connection.names()?;
                assert_eq!(names.peer, Some(to), "attempt {attempt}");
                assert_eq!(names.local.map(|local| local.ip()), Some(own_ip(&client, to)), "{to}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_server_sees_the_client_pods_address_in_accept_and_getpeername() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = [(shop.service("near", 80)?, &near), (shop.service("far", 80)?, &far)];
    shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    for (vip, server) in vips {
        for to in vip.all() {
            for attempt in 0..3 {
                let seen = client.tool()?.who(to)?;
                let place = format!("{to}, attempt {attempt}: {seen:?}");
                // The listener is [::], so it sees IPv4 clients as mapped ones.
                let expected = own_ip(&client, to).to_canonical();
                assert_eq!(seen.accepted_from.ip().to_canonical(), expected, "{place}");
                assert_eq!(seen.peer, Some(seen.accepted_from), "{place}");
                let own = if expected.is_ipv4() { server.at_mapped(8080) } else { server.at6(8080) };
                assert_eq!(seen.local, own, "{place}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_direct_connection_keeps_the_clients_port() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&web)?;
    for to in vip.all() {
        eventually(
            Duration::from_secs(5),
            || -> anyhow::Result<bool> {
                let before = shop::opened(&agents[0], &client, &web, "direct")?;
                let connection = client.tool()?.connect(to)?;
                let seen = connection.who()?;
                let direct = shop::opened(&agents[0], &client, &web, "direct")? > before;
                let port = connection.names()?.local.map(|local| local.port());
                Ok(direct && port == Some(seen.accepted_from.port()))
            },
            |outcome| matches!(outcome, Ok(true)),
        )??;
    }
    Ok(())
}

#[test]
fn an_ipv4_only_server_sees_plain_ipv4_addresses() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let web = shop.pod("b", "web")?;
    let vip = shop.service("web", 80)?;
    shop.start_agents()?;
    let _server = web.tool()?.serve("0.0.0.0:8080".parse()?, ServerOptions::named("web"))?;
    for to in [vip.v4, vip.mapped()] {
        let seen = client.tool()?.who(to)?;
        assert_eq!(seen.accepted_from.ip(), IpAddr::V4(client.ip4()));
        assert_eq!(seen.peer, Some(seen.accepted_from));
        assert_eq!(seen.local, web.at4(8080));
    }
    Ok(())
}

#[test]
fn an_outside_client_is_shown_as_itself() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let web = shop.pod("a", "web")?;
    let plain = shop.unmeshed_pod("a", "plain")?;
    let agents = shop.start_agents()?;
    let outsider = shop.world().outsider("outsider")?;
    let _server = shop.serve(&web)?;
    for (place, from4, from6) in [
        (outsider.clone(), outsider.at4(0).ip(), outsider.at6(0).ip()),
        (mesh_tests::Place::clone(&plain), plain.at4(0).ip(), plain.at6(0).ip()),
    ] {
        for (to, from) in [(web.at4(8080), from4), (web.at6(8080), from6)] {
            let connection = place.tool()?.connect(to)?;
            let seen = connection.who()?;
            assert_eq!(seen.accepted_from.ip().to_canonical(), from, "{}", place.name());
            // The agent accepted it on the pod's behalf; the address shown is the client's very own.
            let local = connection.names()?.local;
            assert_eq!(Some(seen.accepted_from.port()), local.map(|local| local.port()));
            assert_eq!(seen.local.port(), 8080);
        }
    }
    assert_eq!(shop::captured(&agents[0], &web)?, 4, "all of them came in through the agent");
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = [shop.service("near", 80)?, shop.service("far", 80)?];
    shop.start_agents()?;
    let greet = |pod: &Pod| {
        let options = ServerOptions::named(pod.name()).serving(Serve::Greet);
        pod.tool().and_then(|tool| tool.serve(SocketAddr::from(([0u16; 8], 8080)), options))
    };
    let _servers = [greet(&near)?, greet(&far)?];
    for vip in vips {
        for to in vip.all() {
            let seen = client.tool()?.connect(to)?.greeting()?;
            assert_eq!(seen.accepted_from.ip().to_canonical(), own_ip(&client, to).to_canonical());
        }
    }
    Ok(())
}
