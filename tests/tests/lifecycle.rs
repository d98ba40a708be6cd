//! What changes while traffic runs: enrolment, endpoints, policy, incarnations; and what fails upstream.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::tool::{RunningLoad, ServerOptions};
use mesh_tests::{
    Agent, Failure, Pod, Shop, TestResult, ToolError, eventually, limit, require_agent, shop, test_name,
};
use nix::errno::Errno;

const SOON: Duration = Duration::from_secs(5);

fn load(client: &Pod, targets: Vec<SocketAddr>, exchange: Exchange) -> Result<RunningLoad, ToolError> {
    let timeout_ms = u64::try_from(limit(Duration::from_secs(2)).as_millis()).unwrap_or(u64::MAX);
    let load = Load { targets, per_second: 100, workers: 2, duration_ms: 0, exchange, timeout_ms };
    client.tool()?.start_load(load)
}

/// Let a load do some more good attempts.
fn go_on(load: &RunningLoad) -> TestResult {
    let before = load.report()?.ok;
    eventually(SOON, || load.report().map_or(0, |report| report.ok), |ok| *ok >= before + 50)?;
    Ok(())
}

/// Which servers answer at `to` in `times` connections.
fn answering(client: &Pod, to: SocketAddr, times: usize) -> Result<BTreeSet<String>, ToolError> {
    (0..times).map(|_| client.tool()?.who(to).map(|seen| seen.server)).collect()
}

fn wait_left(agent: &Agent, pod: &Pod) -> TestResult {
    let state = || agent.pod_status(pod).map(|row| row["state"].clone());
    eventually(SOON, state, |state| state.as_ref().is_ok_and(|state| *state != "enrolled"))??;
    Ok(())
}

#[test]
fn pods_join_and_leave_while_their_connections_live_on() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let manifests = shop.world().manifests();
    let client = shop.unmeshed_pod("a", "client")?;
    let web = shop.unmeshed_pod("a", "web")?;
    let far = shop.pod("b", "far")?;
    let (near_vip, far_vip) = (shop.service("web", 80)?, shop.service("far", 80)?);
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&web)?, shop.serve(&far)?];
    let plain = [web.at4(8080), web.at6(8080)];
    let before: Vec<_> = plain.iter().map(|to| client.tool()?.connect(*to)).collect::<Result<_, _>>()?;
    let kept = load(&client, plain.to_vec(), Exchange::KeepOpen)?;
    let new = load(&client, plain.to_vec(), Exchange::ConnectAndAsk)?;
    go_on(&new)?;

    for pod in [&client, &web] {
        manifests.apply(pod.manifest())?;
    }
    agents[0].wait_enrolled([&client, &web])?;
    go_on(&new)?;
    go_on(&kept)?;
    let proxied = client.tool()?.connect(far_vip.v4)?;
    assert_eq!(proxied.who()?.server, "far");
    let goes_direct = || -> anyhow::Result<bool> {
        client.tool()?.who(near_vip.v4)?;
        Ok(shop::opened(&agents[0], &client, &web, "direct")? > 0)
    };
    eventually(SOON, goes_direct, |direct| !matches!(direct, Ok(false)))??;
    let direct = client.tool()?.connect(near_vip.v4)?;
    assert_eq!(direct.who()?.server, "web");

    for pod in [&client, &web] {
        manifests.apply(pod.manifest().label("nodemesh.dev/mesh", "none"))?;
    }
    wait_left(&agents[0], &client)?;
    wait_left(&agents[0], &web)?;
    go_on(&new)?;
    go_on(&kept)?;
    for connection in before.iter().chain([&proxied, &direct]) {
        connection.who()?;
    }
    for report in [kept.stop()?, new.stop()?] {
        assert_eq!(report.failures(), 0, "{report:?}");
    }
    Ok(())
}

#[test]
fn a_listener_port_that_the_application_holds_is_reported_and_taken_once_it_is_free() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (blocked, web) = (shop.pod("a", "blocked")?, shop.pod("a", "web")?);
    let node = shop.world().node("a")?;
    let vip = shop.service("web", 80)?;
    let squatter = blocked.tool()?.serve("0.0.0.0:15006".parse()?, ServerOptions::named("squatter"))?;
    // Ready although one pod cannot be enrolled: it is reported, not waited for.
    let agent = node.agent().start()?;
    agent.wait_enrolled([&web])?;
    let row = agent.pod_status(&blocked)?;
    assert_eq!(row["state"], "failed", "{row}");
    let reason = row["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("15006"), "{reason}");
    // Left out of the mesh altogether, not half in it.
    let _server = shop.serve(&web)?;
    assert_eq!(blocked.tool()?.who(web.at4(8080))?.server, "web");
    assert!(blocked.tool()?.connect(vip.v4).is_err());
    drop(squatter);
    let state = || agent.pod_status(&blocked).map(|row| row["state"].clone());
    eventually(Duration::from_secs(15), state, |s| s.as_ref().is_ok_and(|s| *s == "enrolled"))??;
    assert_eq!(blocked.tool()?.who(vip.v4)?.server, "web");
    Ok(())
}

#[test]
fn a_policy_change_voids_verdicts_and_a_change_of_endpoints_does_not() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let agent = node.agent().start()?;
    let _server = shop.serve(&web)?;
    for to in [vip.v4, vip.v6] {
        node.kernel().dial_directly(&client, to)?;
    }
    // Endpoints come and go: still no question to the agent about those that stay.
    let second = shop.backend("a", "web-2", "web")?;
    let _second_server = shop.serve(&second)?;
    agent.wait_enrolled([&second])?;
    eventually(SOON, || answering(&client, vip.v4, 10), |seen| seen.as_ref().is_ok_and(|s| s.len() == 2))??;
    shop.world().manifests().delete("Pod", shop::NAMESPACE, "web-2")?;
    eventually(SOON, || answering(&client, vip.v4, 10), |seen| seen.as_ref().is_ok_and(|s| s.len() == 1))??;
    let before = node.kernel().counters()?;
    for to in [vip.v4, vip.v6, vip.mapped()] {
        client.tool()?.who(to)?;
    }
    let counted = node.kernel().counters()?.since(&before);
    assert_eq!(counted.count("direct", "verdict_allow"), 3, "{counted:?}");

    shop.mode(MtlsMode::Strict)?;
    let asked_again = || -> Result<u64, Failure> {
        let before = node.kernel().counters()?;
        client.tool()?.who(vip.v4)?;
        let counted = node.kernel().counters()?.since(&before);
        Ok(counted.count("proxy", "stale_verdict") + counted.count("proxy", "no_verdict"))
    };
    eventually(SOON, asked_again, |asked| matches!(asked, Ok(1)))??;
    // The node's own pods have an identity, so the new verdict allows too.
    node.kernel().dial_directly(&client, vip.v4)?;
    Ok(())
}

#[test]
fn a_pod_that_is_made_anew_under_its_name_and_address_is_judged_anew() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let agent = node.agent().start()?;
    let server = shop.serve(&web)?;
    node.kernel().dial_directly(&client, web.at4(8080))?;
    drop(server);
    let cookie = agent.pod_status(&web)?["netns_cookie"].clone();
    node.remove_pod(&web)?;
    let again = node.pod_builder("shop/web").slot(web.slot()).start()?;
    let _server = shop.serve(&again)?;
    // The same name, uid and address; only the namespace is another.
    shop.world().manifests().apply(again.manifest().with("/metadata/uid", web.uid()))?;
    let renewed = || agent.pod_status(&again).map(|row| (row["state"].clone(), row["netns_cookie"].clone()));
    eventually(SOON, renewed, |row| {
        row.as_ref().is_ok_and(|(state, now)| *state == "enrolled" && *now != cookie)
    })??;
    let before = node.kernel().counters()?;
    client.tool()?.who(again.at4(8080))?;
    let counted = node.kernel().counters()?.since(&before);
    assert_eq!(counted.count("direct", "verdict_allow"), 0, "{counted:?}");
    assert_eq!(counted.count("proxy", "no_verdict"), 1, "{counted:?}");
    node.kernel().dial_directly(&client, again.at4(8080))?;
    Ok(())
}

#[test]
fn a_server_that_does_not_listen_means_a_reset_for_the_client() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let vips = [(shop.service("near", 80)?, &near), (shop.service("far", 80)?, &far)];
    let agents = shop.start_agents()?;
    // The agent that dialled the server counts it: the client's on one node, the server's across nodes.
    for ((vip, server), agent) in vips.into_iter().zip(&agents) {
        let refused = || agent.metric(&["mesh_proxy_connections_closed", "reason=\"upstream_refused\""]);
        let before = refused()?;
        for to in [vip.v4, vip.v6, server.at4(8080)] {
            let began = Instant::now();
            let outcome = client.tool()?.who(to);
            let errno = outcome.as_ref().err().and_then(ToolError::errno);
            let reset = Some(Errno::ECONNRESET);
            assert!(errno == reset || errno == Some(Errno::ECONNREFUSED), "{to}: {outcome:?}");
            assert!(began.elapsed() < limit(Duration::from_secs(2)), "{to}: {:?}", began.elapsed());
        }
        eventually(SOON, refused, |now| now.as_ref().is_ok_and(|now| *now > before))??;
    }
    Ok(())
}

#[test]
fn a_proxied_connect_is_tried_again_on_another_endpoint() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let dead = shop.backend("b", "dead", "web")?;
    let alive = shop.backend("b", "alive", "web")?;
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&alive)?;
    for to in [vip.v4, vip.v6] {
        assert_eq!(answering(&client, to, 15)?, BTreeSet::from(["alive".to_owned()]));
    }
    assert!(agents[0].metric(&["mesh_proxy_connect_retries_total"])? > 0.0, "the dead one was never tried");
    // Asked for by its own address, it is that pod or none.
    assert!(client.tool()?.who(dead.at4(8080)).is_err());
    Ok(())
}

#[test]
fn a_server_that_cannot_be_reached_means_a_reset_within_the_connect_timeout() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let far = shop.pod("b", "far")?;
    let vip = shop.service("far", 80)?;
    let patience = format!("{}ms", limit(Duration::from_millis(700)).as_millis());
    let agent = shop.world().node("a")?.agent().args(&["--connect-timeout", &patience]).start()?;
    let _of_server = shop.world().node("b")?.agent().start()?;
    let _server = shop.serve(&far)?;
    assert_eq!(client.tool()?.who(vip.v4)?.server, "far");
    shop.world().set_wire("b", false)?;
    // The first finds the tunnel that is there, a later one none.
    for _ in 0..2 {
        let began = Instant::now();
        let outcome = client.tool()?.who(vip.v4);
        let errno = outcome.as_ref().err().and_then(ToolError::errno);
        assert_eq!(errno, Some(Errno::ECONNRESET), "{outcome:?}");
        assert!(began.elapsed() < limit(Duration::from_secs(5)), "{:?}", began.elapsed());
    }
    let timed_out = agent.metric(&["reason=\"upstream_timeout\""])?;
    let unreachable = agent.metric(&["reason=\"upstream_unreachable\""])?;
    assert!(timed_out + unreachable >= 1.0, "not counted");
    shop.world().set_wire("b", true)?;
    eventually(SOON, || client.tool()?.who(vip.v4), |answer| answer.is_ok())??;
    Ok(())
}

#[test]
fn a_restarted_agent_takes_over_the_very_maps_and_links() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let first = node.agent().start()?;
    let _server = shop.serve(&web)?;
    let held = [
        node.kernel().dial_directly(&client, vip.v4)?,
        node.kernel().dial_directly(&client, vip.v6)?,
        node.kernel().dial_directly(&client, vip.mapped())?,
    ];
    let kernel = node.kernel();
    let (maps, links) = (kernel.map_ids()?, kernel.link_ids()?);
    assert_eq!(links.keys().filter(|name| name.starts_with("arrival-")).count(), 2, "{links:?}");
    first.kill9();
    assert_eq!(
        (kernel.map_ids()?, kernel.link_ids()?),
        (maps.clone(), links.clone()),
        "pins outlive the agent"
    );
    let second = node.agent().start()?;
    second.wait_enrolled([&client, &web])?;
    assert_eq!((kernel.map_ids()?, kernel.link_ids()?), (maps, links));
    for connection in &held {
        assert_eq!(connection.who()?.server, "web");
    }
    // It cannot know what it missed, so it may judge a pair once more; then connections are Direct again.
    for to in vip.all() {
        drop(kernel.dial_directly(&client, to)?);
    }
    // The connections from before are still known, and known to end.
    let direct = || second.meshctl(&["connections"]).map(|view| view["connections"].to_string());
    let held_only =
        |rows: &Result<String, _>| rows.as_ref().is_ok_and(|r: &String| r.matches("\"direct\"").count() == 3);
    eventually(SOON, direct, held_only)??;
    drop(held);
    eventually(SOON, direct, |rows| rows.as_ref().is_ok_and(|rows| rows == "[]"))??;
    Ok(())
}

#[test]
fn what_changed_while_no_agent_ran_is_made_good_at_the_next_start() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let (gone, left) = (shop.pod("a", "gone")?, shop.pod("a", "left")?);
    let vip = shop.service("web", 80)?;
    let first = node.agent().start()?;
    let _server = shop.serve(&web)?;
    node.kernel().dial_directly(&client, vip.v4)?;
    first.kill9();
    // A stricter policy, a pod that died, one that left the mesh, one that is new, a service that moved.
    shop.mode(MtlsMode::Strict)?;
    node.remove_pod(&gone)?;
    let manifests = shop.world().manifests();
    manifests.delete("Pod", shop::NAMESPACE, "gone")?;
    manifests.apply(left.manifest().label("nodemesh.dev/mesh", "none"))?;
    let new = shop.pod("a", "new")?;
    let moved = shop.service("web", 81)?;
    let second = node.agent().start()?;
    second.wait_enrolled([&client, &web, &new])?;
    let arrivals = node.kernel().link_ids()?.keys().filter(|name| name.starts_with("arrival-")).count();
    assert_eq!(arrivals, 3, "{:?}", node.kernel().link_ids()?);
    assert_eq!(node.kernel().entries("INBOUND")?.len(), 3);
    let before = node.kernel().counters()?;
    assert_eq!(client.tool()?.who(moved.v4)?.server, "web");
    let counted = node.kernel().counters()?.since(&before);
    assert_eq!(counted.count("direct", "verdict_allow"), 0, "verdicts of the old policy: {counted:?}");
    assert!(client.tool()?.connect(vip.v4).is_err(), "the service's old address");
    assert_eq!(new.tool()?.who(moved.v6)?.server, "web");
    let refused = left.tool()?.who(web.at4(8080));
    assert!(refused.is_err(), "a pod outside the mesh at a strict one: {refused:?}");
    Ok(())
}
