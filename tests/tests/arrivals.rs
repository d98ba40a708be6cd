//! What an arrival at a meshed pod gets: the table of the design, row by row, with the agent alive and dead.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tests::manifests::{MtlsMode, PeerAuthenticationManifest};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Place, Pod, Server, Shop, TestResult, eventually, limit, require_agent, shop, test_name,
};
use nix::errno::Errno;

/// A server on node a, and everybody who may come to it.
struct Scene {
    shop: Shop,
    web: Pod,
    near: Pod,
    remote: Pod,
    plain: Pod,
    outsider: Place,
    server: Server,
    agents: Vec<Agent>,
}

impl Scene {
    fn set(test: &str, mode: MtlsMode) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        shop.mode(mode)?;
        let web = shop.world().node("a")?.pod("shop/web")?;
        shop.world().manifests().apply(web.manifest().port("http", 8080).tcp_probe(8080))?;
        let (near, remote) = (shop.pod("a", "near")?, shop.pod("b", "remote")?);
        let plain = shop.unmeshed_pod("a", "plain")?;
        let outsider = shop.world().outsider("outsider")?;
        let server = web.tool()?.serve("[::]:8080".parse()?, ServerOptions::named("web"))?;
        let agents = shop.start_agents()?;
        Ok(Self { shop, web, near, remote, plain, outsider, server, agents })
    }

    fn addresses(&self) -> [SocketAddr; 2] {
        [self.web.at4(8080), self.web.at6(8080)]
    }

    /// Those without an identity the server's agent could know.
    fn strangers(&self) -> [Place; 2] {
        [Place::clone(&self.plain), self.outsider.clone()]
    }

    fn assert_served(&self, place: &Place) -> TestResult {
        for to in self.addresses() {
            let seen = place.tool()?.who(to)?;
            assert_eq!(seen.server, "web", "{} to {to}", place.name());
            let own = [place.at4(0).ip(), place.at6(0).ip()];
            assert!(own.contains(&seen.accepted_from.ip().to_canonical()), "{}: {seen:?}", place.name());
        }
        Ok(())
    }

    /// Refused at once, and the application never heard of it.
    fn assert_refused(&self, place: &Place) -> TestResult {
        for to in self.addresses() {
            let accepted_before = self.server.accepted()?.len();
            let began = Instant::now();
            let refused = place.tool()?.connect(to).and_then(|connection| connection.who());
            let errno = refused.as_ref().err().and_then(mesh_tests::ToolError::errno);
            assert!(
                matches!(errno, Some(Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno::EPERM)),
                "{} to {to}: {refused:?}",
                place.name()
            );
            assert!(
                began.elapsed() < limit(Duration::from_millis(900)),
                "{}: {:?}",
                place.name(),
                began.elapsed()
            );
            assert_eq!(
                self.server.accepted()?.len(),
                accepted_before,
                "the application saw {}",
                place.name()
            );
        }
        Ok(())
    }

    /// Connect until the kernel does it alone.
    fn warm_up(&self) -> TestResult {
        let direct = || shop::opened(&self.agents[0], &self.near, &self.web, "direct");
        for to in self.addresses() {
            let before = direct()?;
            eventually(
                Duration::from_secs(5),
                || {
                    self.near.tool().and_then(|tool| tool.who(to)).is_ok()
                        && direct().is_ok_and(|now| now > before)
                },
                |direct| *direct,
            )?;
        }
        Ok(())
    }
}

#[test]
fn permissive_and_disable_take_everybody() -> TestResult {
    require_agent!();
    for mode in [MtlsMode::Permissive, MtlsMode::Disable] {
        let scene = Scene::set(test_name!(), mode)?;
        scene.assert_served(&scene.near)?;
        scene.assert_served(&scene.near)?;
        scene.assert_served(&scene.remote)?;
        for stranger in scene.strangers() {
            let before = shop::captured(&scene.agents[0], &scene.web)?;
            scene.assert_served(&stranger)?;
            let captured = shop::captured(&scene.agents[0], &scene.web)? - before;
            assert_eq!(captured, 2, "{} went past the agent under {mode:?}", stranger.name());
        }
    }
    Ok(())
}

#[test]
fn strict_takes_those_with_an_identity_and_resets_the_rest() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Strict)?;
    for _ in 0..3 {
        scene.assert_served(&scene.near)?;
        scene.assert_served(&scene.remote)?;
    }
    let denied = || scene.agents[0].metric(&["reason=\"policy_denied\""]);
    for stranger in scene.strangers() {
        let before = denied()?;
        scene.assert_refused(&stranger)?;
        assert!(denied()? >= before + 2.0, "{} was not counted", stranger.name());
    }
    let log = scene.agents[0].log_text();
    assert!(log.contains(&scene.outsider.ip4().to_string()), "the client's address is not logged:\n{log}");
    Ok(())
}

#[test]
fn with_a_dead_agent_an_open_pod_takes_everybody() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Permissive)?;
    scene.warm_up()?;
    scene.agents[0].kill9();
    scene.assert_served(&scene.near)?;
    for stranger in scene.strangers() {
        scene.assert_served(&stranger)?;
    }
    // A client of the mesh is not talked down to plaintext by the death of the server's agent.
    scene.assert_refused(&scene.remote)?;
    scene.agents[1].kill9();
    scene.assert_served(&scene.remote)
}

#[test]
fn with_a_dead_agent_a_strict_pod_takes_tickets_only() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Strict)?;
    scene.warm_up()?;
    scene.agents[0].kill9();
    scene.assert_served(&scene.near)?;
    for stranger in scene.strangers() {
        scene.assert_refused(&stranger)?;
    }
    scene.assert_refused(&scene.remote)?;
    // A client that the agent never admitted has no verdict, so no ticket either.
    let late = scene.shop.world().node("a")?.pod("shop/late")?;
    scene.assert_refused(&late)?;
    let again = scene.shop.world().node("a")?.agent().start()?;
    assert!(again.metric(&["reason=\"fail_closed\""])? >= 6.0, "refusals while it was dead are counted");
    Ok(())
}

#[test]
fn a_hung_agent_counts_as_dead_after_its_heartbeat_is_stale() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Permissive)?;
    scene.assert_served(&scene.outsider)?;
    assert_eq!(shop::captured(&scene.agents[0], &scene.web)?, 2, "the agent takes arrivals while it is well");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(scene.agents[0].pid())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    let outcome = eventually(
        Duration::from_secs(8),
        || {
            let tool = scene.outsider.tool()?;
            let connection = tool.open(mesh_tests::protocol::Open::tcp_to(scene.web.at4(8080)))?;
            let how = mesh_tests::protocol::How::Blocking;
            connection.dial_within(scene.web.at4(8080), how, Duration::from_millis(200))?;
            connection.send("who\n")?;
            connection.recv_within(1000, Duration::from_millis(300))
        },
        |answer| answer.as_ref().is_ok_and(|text| text.contains("web")),
    );
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT)?;
    drop(outcome??);
    Ok(())
}

#[test]
fn kubelet_probes_reach_a_strict_pod_whether_the_agent_lives_or_not() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Strict)?;
    let node = scene.shop.world().node("a")?;
    let _other = scene.web.tool()?.serve("[::]:8081".parse()?, ServerOptions::named("other"))?;
    for alive in [true, false] {
        if !alive {
            scene.agents[0].kill9();
        }
        for to in scene.addresses() {
            assert_eq!(node.kubelet().tool()?.who(to)?.server, "web", "agent alive: {alive}");
        }
        // Neither another port nor another process of the host is a probe.
        for (place, to) in [(node.kubelet(), scene.web.at4(8081)), (node.host(), scene.web.at4(8080))] {
            let refused = place.tool()?.connect(to).and_then(|connection| connection.who());
            assert!(refused.is_err(), "{} to {to}, agent alive: {alive}: {refused:?}", place.name());
        }
    }
    Ok(())
}

#[test]
fn datagrams_are_not_policed() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Strict)?;
    let _server = scene.web.tool()?.serve_udp("[::]:5000".parse()?, "web")?;
    for alive in [true, false] {
        if !alive {
            scene.agents[0].kill9();
        }
        for place in scene.strangers().iter().chain([&scene.near.place(), &scene.remote.place()]) {
            for to in [scene.web.at4(5000), scene.web.at6(5000)] {
                let socket = place.tool()?.open_udp(mesh_tests::protocol::Open::udp_to(to))?;
                socket.send_to(to, "hello")?;
                assert_eq!(socket.recv_identity()?.0.server, "web", "{}", place.name());
            }
        }
    }
    Ok(())
}

#[test]
fn the_most_specific_mode_wins() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let web = shop.pod("a", "web")?;
    let other = shop.pod("a", "other")?;
    let outsider = shop.world().outsider("outsider")?;
    let _servers = [
        web.tool()?.serve("[::]:8080".parse()?, ServerOptions::named("web"))?,
        web.tool()?.serve("[::]:9090".parse()?, ServerOptions::named("web"))?,
        other.tool()?.serve("[::]:8080".parse()?, ServerOptions::named("other"))?,
    ];
    shop.start_agents()?;
    let manifests = shop.world().manifests();
    let expect = |what: &str, expected: [bool; 3]| -> TestResult {
        let served = || -> Result<[bool; 3], Failure> {
            let tool = outsider.tool()?;
            Ok([web.at4(8080), web.at4(9090), other.at4(8080)].map(|to| tool.who(to).is_ok()))
        };
        let seen = eventually(
            Duration::from_secs(5),
            || served().map_err(|error| format!("{error:?}")),
            |seen| *seen == Ok(expected),
        );
        seen.map_err(|error| anyhow::anyhow!("{what}, expected {expected:?}: {error}"))?
            .map_err(anyhow::Error::msg)?;
        Ok(())
    };
    expect("nothing said", [true, true, true])?;
    manifests.apply(PeerAuthenticationManifest::new("istio-system", "default", MtlsMode::Strict))?;
    expect("strict mesh", [false, false, false])?;
    shop.mode(MtlsMode::Permissive)?;
    expect("permissive namespace in it", [true, true, true])?;
    let strict_web =
        PeerAuthenticationManifest::new(shop::NAMESPACE, "web", MtlsMode::Strict).selector("app", "web");
    manifests.apply(strict_web.clone())?;
    expect("strict workload in it", [false, false, true])?;
    manifests.apply(strict_web.port(9090, MtlsMode::Permissive))?;
    expect("permissive port of it", [false, true, true])?;
    manifests.delete("PeerAuthentication", shop::NAMESPACE, "web")?;
    manifests.delete("PeerAuthentication", shop::NAMESPACE, "default")?;
    expect("back to the strict mesh", [false, false, false])?;
    manifests.delete("PeerAuthentication", "istio-system", "default")?;
    expect("nothing said again", [true, true, true])
}

#[test]
fn a_stricter_policy_voids_cached_verdicts_and_admits_anew() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Permissive)?;
    scene.warm_up()?;
    scene.assert_served(&scene.outsider)?;
    let proxied = || shop::opened(&scene.agents[0], &scene.near, &scene.web, "proxy");
    let before = proxied()?;
    scene.shop.mode(MtlsMode::Strict)?;
    eventually(
        Duration::from_secs(5),
        || scene.outsider.tool().and_then(|tool| tool.who(scene.web.at4(8080))).is_err(),
        |refused| *refused,
    )?;
    // The agent judges by the new policy at once; the kernel learns of it a moment later, on a slow machine.
    eventually(
        Duration::from_secs(5),
        || -> Result<u64, Failure> {
            scene.assert_served(&scene.near)?;
            Ok(proxied()?)
        },
        |proxied| proxied.as_ref().is_ok_and(|proxied| *proxied > before),
    )??;
    scene.warm_up()
}

#[test]
fn a_stricter_policy_closes_what_it_denies_and_nothing_else() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), MtlsMode::Permissive)?;
    scene.warm_up()?;
    let by_stranger = scene.outsider.tool()?.connect(scene.web.at4(8080))?;
    let by_neighbour = scene.near.tool()?.connect(scene.web.at4(8080))?;
    by_stranger.who()?;
    by_neighbour.who()?;
    scene.shop.mode(MtlsMode::Strict)?;
    eventually(Duration::from_secs(5), || by_stranger.who().is_err(), |closed| *closed)?;
    by_neighbour.who()?;
    Ok(())
}

#[test]
fn a_client_may_be_told_to_refuse_rather_than_bypass_a_dead_agent() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let careful = shop.world().node("a")?.pod("shop/careful")?;
    shop.world().manifests().apply(careful.manifest().annotation("nodemesh.dev/fail-closed", "outbound"))?;
    let relaxed = shop.pod("a", "relaxed")?;
    let web = shop.pod("b", "web")?;
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&web)?;
    for client in [&careful, &relaxed] {
        assert_eq!(client.tool()?.who(vip.v4)?.server, "web");
    }
    agents[0].kill9();
    for to in vip.all() {
        assert_eq!(relaxed.tool()?.who(to)?.server, "web", "{to}");
        let refused = careful.tool()?.connect(to);
        let errno = refused.err().and_then(|error| error.errno());
        assert!(matches!(errno, Some(Errno::EPERM | Errno::ECONNREFUSED)), "{to}: {errno:?}");
    }
    Ok(())
}
