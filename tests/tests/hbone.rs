//! HBONE between nodes, and with others who speak it: what is on the wire, what each side is told, how it ends.

use std::time::Duration;

use http::StatusCode;
use mesh_tests::authority::{Authority, Leaf, spiffe_of};
use mesh_tests::hbone::{Connect, HboneServer, PORT, Session, everywhere};
use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{Identity, Serve};
use mesh_tests::shop::Vip;
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Pod, Shop, TestResult, eventually, require_agent, require_root, shop, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// What nobody on the wire may read.
const SECRET: &str = "a secret long enough to be told from noise";

#[test]
fn the_harness_understands_itself() -> TestResult {
    require_root!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (client, server) = (shop.pod("a", "client")?, shop.pod("b", "server")?);
    let authority = Authority::root("test")?.intermediate("issuing")?;
    let tap = shop.world().tap_wire()?;
    let of_server = authority.issue(&Leaf::of(spiffe_of(&server)))?;
    let hbone = HboneServer::start(&server, everywhere(PORT), &of_server, "server")?;
    let of_client = authority.issue(&Leaf::of(spiffe_of(&client)))?;
    for to in [server.at4(PORT), server.at6(PORT)] {
        let session = Session::open(&client, to, &of_client)?;
        assert_eq!(session.identity(), spiffe_of(&server));
        let mut tunnel = session.connect(&Connect::to("10.0.0.1:80").header("baggage", "k8s.x=y"))?;
        assert_eq!(tunnel.who()?.server, "server");
        tunnel.send(format!("{SECRET}\n").as_bytes())?;
        assert_eq!(tunnel.receive_line()?, SECRET);
        tunnel.finish()?;
        assert!(tunnel.receive_to_end()?.is_empty());
    }
    let seen = hbone.seen();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert_eq!(seen[0].peer, spiffe_of(&client));
    assert_eq!((seen[0].authority.as_str(), seen[0].headers["baggage"].as_str()), ("10.0.0.1:80", "k8s.x=y"));
    assert!(tap.bytes() > 0 && !tap.heard(SECRET.as_bytes()));
    let stranger = Authority::root("other")?.issue(&Leaf::of(spiffe_of(&client)))?.trusting(&authority);
    assert!(Session::open(&client, server.at4(PORT), &stranger).is_err_and(|error| error.is_tls()));
    Ok(())
}

/// A pod on each of two nodes, an agent on both.
struct Pair {
    shop: Shop,
    client: Pod,
    web: Pod,
    vip: Vip,
    agents: Vec<Agent>,
}

impl Pair {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let (web, client) = (shop.pod("a", "web")?, shop.pod("b", "client")?);
        let vip = shop.service("web", 80)?;
        let agents = shop.start_agents()?;
        Ok(Self { shop, client, web, vip, agents })
    }
}

#[test]
fn between_nodes_nothing_can_be_read_and_apps_see_each_other() -> TestResult {
    require_agent!();
    let pair = Pair::set(test_name!())?;
    let vip = pair.vip;
    let _server = pair.shop.serve(&pair.web)?;
    let tap = pair.shop.world().tap_wire()?;
    let targets = [pair.web.at4(8080), pair.web.at6(8080), pair.web.at_mapped(8080), vip.v4, vip.v6];
    let exchange = || -> TestResult {
        for to in targets {
            let connection = pair.client.tool()?.connect(to)?;
            let seen = connection.who()?;
            assert_eq!(seen.server, "web");
            let own = [pair.client.at4(0).ip(), pair.client.at6(0).ip()];
            assert!(own.contains(&seen.accepted_from.ip().to_canonical()), "{to}: {seen:?}");
            assert_eq!(connection.names()?.peer, Some(to));
            connection.send(&format!("{SECRET}\n"))?;
            assert_eq!(connection.recv_line()?.trim_end(), SECRET);
        }
        Ok(())
    };
    exchange()?;
    assert!(tap.bytes() > 0, "the wire was not listened to");
    assert!(!tap.heard(SECRET.as_bytes()), "the secret can be read on the wire");
    assert!(!tap.heard(b"accepted_from"), "the answer can be read on the wire");
    // The ear is good: where TLS is switched off, it hears.
    pair.shop.mode(MtlsMode::Disable)?;
    eventually(SOON, || exchange().is_ok() && tap.heard(SECRET.as_bytes()), |heard| *heard)?;
    Ok(())
}

#[test]
fn both_ends_of_a_tunnel_show_whom_they_talk_to() -> TestResult {
    require_agent!();
    let pair = Pair::set(test_name!())?;
    let _server = pair.shop.serve(&pair.web)?;
    let connection = pair.client.tool()?.connect(pair.web.at4(8080))?;
    connection.who()?;
    let client = pair.client.at4(0).ip();
    for (agent, peer) in [(&pair.agents[0], &pair.client), (&pair.agents[1], &pair.web)] {
        let rows = shop::live(agent, client, &pair.web)?;
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!(rows[0]["security"], "mutual_tls", "{rows:?}");
        assert_eq!(rows[0]["peer"], spiffe_of(peer), "{rows:?}");
        let mutual = ["istio_tcp_connections_opened", "connection_security_policy=\"mutual_tls\""];
        assert!(agent.metric(&mutual)? >= 1.0, "{}", agent.http("/metrics")?.1);
    }
    for agent in &pair.agents {
        let view = agent.meshctl(&["certificates"])?;
        let certificates = view["certificates"].as_array().cloned().unwrap_or_default();
        assert_eq!(certificates.len(), 1, "{view:#}");
        assert_eq!(certificates[0]["state"], "valid", "{view:#}");
        assert_eq!(certificates[0]["identity"], spiffe_of(&pair.web), "{view:#}");
    }
    Ok(())
}

#[test]
fn bytes_ends_and_resets_cross_a_tunnel() -> TestResult {
    require_agent!();
    const BYTES: u64 = 8 << 20;
    let pair = Pair::set(test_name!())?;
    let serve = |port: u16, serve: Serve| {
        pair.web.tool()?.serve(everywhere(port), ServerOptions::named("web").serving(serve))
    };
    let _servers = [
        serve(8001, Serve::Sink)?,
        serve(8002, Serve::Source { bytes: BYTES })?,
        serve(8003, Serve::Reset)?,
        serve(8004, Serve::GreetAndClose)?,
    ];
    let tool = pair.client.tool()?;
    let upload = tool.connect(pair.web.at4(8001))?;
    upload.send_bulk(BYTES, 7)?;
    upload.shutdown_write()?;
    assert_eq!(upload.recv_line()?.trim(), BYTES.to_string(), "a half-closed connection is answered");
    assert_eq!(upload.recv(16)?, "");
    let download = tool.connect(pair.web.at6(8002))?;
    assert_eq!(download.recv_bulk(BYTES + 1, 1)?, BYTES);
    let reset = tool.connect(pair.web.at4(8003)).and_then(|connection| connection.recv(16));
    let errno = reset.as_ref().err().and_then(mesh_tests::ToolError::errno);
    assert_eq!(errno, Some(nix::errno::Errno::ECONNRESET), "{reset:?}");
    let greeted = tool.connect(pair.web.at4(8004))?;
    assert_eq!(greeted.greeting()?.server, "web");
    assert_eq!(greeted.recv(16)?, "");
    let nobody = tool.connect(pair.web.at4(8005)).and_then(|connection| connection.who());
    assert!(nobody.is_err(), "{nobody:?}");
    Ok(())
}

#[test]
fn a_client_of_another_make_reaches_a_pod() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, far) = (shop.pod("a", "web")?, shop.pod("b", "far")?);
    shop.mode(MtlsMode::Strict)?;
    let agent = shop.world().node("a")?.agent().start()?;
    let server = shop.serve(&web)?;
    let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&far)))?;
    for (to, authority, own) in
        [(web.at4(PORT), web.at4(8080), far.at4(0).ip()), (web.at6(PORT), web.at6(8080), far.at6(0).ip())]
    {
        let session = Session::open(&far, to, &credentials)?;
        assert_eq!(session.identity(), spiffe_of(&web));
        let connect = Connect::to(authority)
            .header("baggage", "k8s.namespace.name=shop,k8s.pod.name=far")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        // Many streams of one connection live side by side.
        let mut tunnels = (0..10).map(|_| session.connect(&connect)).collect::<Result<Vec<_>, _>>()?;
        for tunnel in &mut tunnels {
            let seen = tunnel.who()?;
            assert_eq!((seen.server.as_str(), seen.accepted_from.ip().to_canonical()), ("web", own));
        }
        let rows = shop::live(&agent, own, &web)?;
        assert_eq!(rows.len(), tunnels.len(), "{rows:?}");
        assert!(rows.iter().all(|row| row["peer"] == spiffe_of(&far)), "{rows:?}");
        tunnels[0].finish()?;
        assert!(tunnels[0].receive_to_end()?.is_empty(), "the app's end follows the client's");
        tunnels.remove(1).reset();
        let left = || shop::live(&agent, own, &web).map(|rows| rows.len());
        eventually(SOON, left, |left| left.as_ref().is_ok_and(|left| *left == 8))??;
        assert_eq!(tunnels[5].who()?.server, "web", "the others live on");
        session.ping()?;
    }
    assert_eq!(server.accepted()?.len(), 20);
    Ok(())
}

#[test]
fn a_server_of_another_make_is_told_what_ztunnel_tells() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, client) = (shop.pod("a", "web")?, shop.pod("b", "client")?);
    let second = shop.pod("b", "second")?;
    let vip = shop.service("web", 80)?;
    shop.world().node("b")?.agent().start()?;
    let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&web)))?;
    let hbone = HboneServer::start(&web, everywhere(PORT), &credentials, "web")?;
    for to in [web.at4(8080), web.at6(8080), vip.v4] {
        assert_eq!(client.tool()?.who(to)?.server, "web", "{to}");
    }
    let seen = hbone.seen();
    let authorities: Vec<&str> = seen.iter().map(|seen| seen.authority.as_str()).collect();
    assert_eq!(authorities[..2], [web.at4(8080).to_string(), web.at6(8080).to_string()]);
    for seen in &seen {
        assert_eq!(seen.peer, spiffe_of(&client));
        assert_eq!(
            (seen.method.as_str(), seen.tls.as_str(), seen.alpn.as_str()),
            ("CONNECT", "TLSv1_3", "h2")
        );
        let own = [client.at4(0).ip(), client.at6(0).ip()];
        assert!(own.contains(&seen.from.ip().to_canonical()), "the tunnel comes from the pod: {seen:?}");
        let baggage = &seen.headers["baggage"];
        assert!(
            baggage.contains("k8s.namespace.name=shop") && baggage.contains("k8s.pod.name=client"),
            "{seen:?}"
        );
        assert_eq!(seen.headers["traceparent"].len(), 55, "{seen:?}");
    }
    // Pooled by the client pod and the server pod, never across pods.
    for _ in 0..20 {
        client.tool()?.who(web.at4(8080))?;
        second.tool()?.who(web.at4(8080))?;
    }
    let by_client: std::collections::BTreeSet<(String, usize)> =
        hbone.seen().into_iter().map(|seen| (seen.from.ip().to_string(), seen.connection)).collect();
    assert!(by_client.len() <= 5, "too many connections: {by_client:?}");
    let connections: Vec<usize> = by_client.iter().map(|(_, connection)| *connection).collect();
    let distinct: std::collections::BTreeSet<usize> = connections.iter().copied().collect();
    assert_eq!(distinct.len(), connections.len(), "two pods share a connection: {by_client:?}");
    Ok(())
}

#[test]
fn go_away_moves_new_connections_and_spares_old_ones() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, client) = (shop.pod("a", "web")?, shop.pod("b", "client")?);
    shop.world().node("b")?.agent().start()?;
    let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&web)))?;
    let hbone = HboneServer::start(&web, everywhere(PORT), &credentials, "web")?;
    let old = client.tool()?.connect(web.at4(8080))?;
    old.who()?;
    hbone.go_away();
    let moved = || -> Result<usize, Failure> {
        let new = client.tool()?.connect(web.at4(8080))?;
        new.who()?;
        Ok(hbone.seen().last().map_or(0, |seen| seen.connection))
    };
    eventually(SOON, || moved().map_err(|error| format!("{error:?}")), |seen| *seen == Ok(2))?
        .map_err(anyhow::Error::msg)?;
    assert_eq!(old.who()?.server, "web", "an open stream survives GOAWAY");
    Ok(())
}

#[test]
fn a_server_that_is_not_who_it_should_be_gets_nothing() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, client) = (shop.pod("a", "web")?, shop.pod("b", "client")?);
    let agent = shop.world().node("b")?.agent().start()?;
    let authority = Authority::of_agents(&shop.world().ca_dir())?;
    // Whoever falls back to plaintext would end up here.
    let app = shop.serve(&web)?;
    let impostors = [
        (authority.issue(&Leaf::of("spiffe://cluster.local/ns/shop/sa/other"))?, "tls_wrong_identity"),
        (authority.issue(&Leaf::of("spiffe://evil.example/ns/shop/sa/default"))?, "tls_trust_domain"),
        (authority.issue(&Leaf::of(spiffe_of(&web)).expired())?, "tls_expired"),
        (authority.self_signed(&Leaf::of(spiffe_of(&web)))?, "tls_unknown_issuer"),
        (
            Authority::root("other")?.issue(&Leaf::of(spiffe_of(&web)))?.trusting(&authority),
            "tls_unknown_issuer",
        ),
    ];
    for (credentials, reason) in impostors {
        let hbone = HboneServer::start(&web, everywhere(PORT), &credentials, "impostor")?;
        let refusals = || agent.metric(&["mesh_proxy_connections_closed", &format!("reason=\"{reason}\"")]);
        let before = refusals()?;
        let answer = client.tool()?.who(web.at4(8080));
        assert!(answer.is_err(), "{reason}: {answer:?}");
        assert!(hbone.seen().is_empty(), "{reason}: the impostor was told where to connect");
        eventually(SOON, refusals, |now| now.as_ref().is_ok_and(|now| *now > before))
            .map_err(|error| anyhow::anyhow!("{reason}: {error}"))??;
    }
    assert!(app.accepted()?.is_empty());
    Ok(())
}

#[test]
fn a_refused_connect_is_an_error_of_the_app() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, client) = (shop.pod("a", "web")?, shop.pod("b", "client")?);
    shop.world().node("b")?.agent().start()?;
    let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&web)))?;
    let app = shop.serve(&web)?;
    for status in [StatusCode::FORBIDDEN, StatusCode::SERVICE_UNAVAILABLE, StatusCode::BAD_GATEWAY] {
        let hbone = HboneServer::answering(&web, everywhere(PORT), &credentials, "web", status)?;
        let answer = client.tool()?.who(web.at4(8080));
        assert!(answer.is_err(), "{status}: {answer:?}");
        assert!(!hbone.seen().is_empty(), "{status}");
    }
    assert!(app.accepted()?.is_empty());
    Ok(())
}

#[test]
fn hbone_that_fails_never_becomes_plaintext() -> TestResult {
    require_agent!();
    let pair = Pair::set(test_name!())?;
    let server = pair.shop.serve(&pair.web)?;
    let ask = || -> Result<Identity, mesh_tests::ToolError> {
        let connection = pair.client.tool()?.connect(pair.web.at4(8080))?;
        connection.send(&format!("{SECRET}\n"))?;
        connection.recv_line()?;
        connection.who()
    };
    ask()?;
    let accepted = server.accepted()?.len();
    let tap = pair.shop.world().tap_wire()?;
    pair.agents[0].kill9();
    for _ in 0..5 {
        let answer = ask();
        assert!(answer.is_err(), "{answer:?}");
    }
    assert_eq!(server.accepted()?.len(), accepted, "the app was reached past its agent");
    assert!(!tap.heard(SECRET.as_bytes()), "the secret went in the clear");
    // A new agent of the server's node, and all is well again.
    pair.shop.world().node("a")?.agent().start()?;
    eventually(SOON, || ask().map_err(|error| error.to_string()), Result::is_ok)?
        .map_err(anyhow::Error::msg)?;
    assert!(!tap.heard(SECRET.as_bytes()));
    Ok(())
}

#[test]
fn an_agent_that_drains_sends_go_away_and_lets_streams_end() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (web, far) = (shop.pod("a", "web")?, shop.pod("b", "far")?);
    let agent = shop.world().node("a")?.agent().args(&["--drain", "20s"]).start()?;
    let _server = shop.serve(&web)?;
    let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(&far)))?;
    let session = Session::open(&far, web.at4(PORT), &credentials)?;
    let connect = Connect::to(web.at4(8080));
    let mut tunnel = session.connect(&connect)?;
    tunnel.who()?;
    agent.begin_drain()?;
    eventually(SOON, || session.connect(&connect).is_err(), |refused| *refused)?;
    assert_eq!(tunnel.who()?.server, "web", "an open stream lives on");
    tunnel.finish()?;
    assert!(tunnel.receive_to_end()?.is_empty());
    // With its last connection gone there is nothing left to wait for.
    eventually(Duration::from_secs(10), || agent.is_running(), |running| !*running)?;
    Ok(())
}

#[test]
fn the_heir_of_an_address_gets_a_tunnel_of_its_own() -> TestResult {
    require_agent!();
    let pair = Pair::set(test_name!())?;
    let to = pair.web.at4(8080);
    let server = pair.shop.serve(&pair.web)?;
    assert_eq!(pair.client.tool()?.who(to)?.server, "web");
    drop(server);
    // Its namespace is gone at once: nobody says goodbye to the other node. The heir has its address and its identity.
    let node = pair.shop.world().node("a")?;
    pair.shop.world().manifests().delete("Pod", pair.web.namespace(), pair.web.name())?;
    node.remove_pod(&pair.web)?;
    let heir = node.pod_builder("shop/heir").slot(pair.web.slot()).start()?;
    pair.shop.world().manifests().apply(heir.manifest())?;
    pair.agents[0].wait_enrolled([&heir])?;
    let _server = pair.shop.serve(&heir)?;
    let (from, target) = (format!("shop/{}", pair.client.name()), to.to_string());
    let explained = || pair.agents[1].meshctl(&["explain", "--from", &from, "--to", &target]);
    eventually(SOON, explained, |told| told.as_ref().is_ok_and(|told| told.to_string().contains("heir")))??;
    for _ in 0..20 {
        assert_eq!(pair.client.tool()?.who(to)?.server, "heir");
    }
    Ok(())
}
