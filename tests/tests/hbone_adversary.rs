//! Whoever comes to the HBONE port without being entitled to: refused, and counted with a reason of its own.

use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use mesh_tests::authority::{Authority, Leaf, spiffe_of};
use mesh_tests::hbone::{Connect, End, PORT, Session, client_hello_of_tls12, half_open, knock};
use mesh_tests::manifests::MtlsMode;
use mesh_tests::{
    Agent, Credentials, Failure, Place, Pod, Server, Shop, TestResult, eventually, require_agent, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// A server on node a with an agent; node b has none, so that its pod's namespace is the attacker's own.
struct Scene {
    shop: Shop,
    web: Pod,
    other: Pod,
    far: Pod,
    agent: Agent,
    authority: Authority,
    server: Server,
    _other_server: Server,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        shop.mode(MtlsMode::Strict)?;
        let (web, other, far) = (shop.pod("a", "web")?, shop.pod("a", "other")?, shop.pod("b", "far")?);
        let server = shop.serve(&web)?;
        let _other_server = shop.serve(&other)?;
        let agent = shop.world().node("a")?.agent().start()?;
        let authority = Authority::of_agents(&shop.world().ca_dir())?;
        Ok(Self { shop, web, other, far, agent, authority, server, _other_server })
    }

    fn refusals(&self, reason: &str) -> Result<f64, Failure> {
        Ok(self.agent.metric(&["_total", &format!("reason=\"{reason}\"")])?)
    }

    /// `attempt` is refused, counted under `reason`, and the app hears nothing of it.
    fn expect(
        &self,
        what: &str,
        reason: &str,
        attempt: impl FnOnce() -> Result<bool, Failure>,
    ) -> TestResult {
        let before = self.refusals(reason)?;
        let accepted = self.server.accepted()?.len();
        assert!(attempt()?, "{what} is let in");
        let counted = || self.refusals(reason).map_err(|error| format!("{error:?}"));
        eventually(SOON, counted, |now| now.as_ref().is_ok_and(|now| *now > before))
            .map_err(|error| anyhow::anyhow!("{what} is not counted as {reason}: {error}"))?
            .map_err(anyhow::Error::msg)?;
        assert_eq!(self.server.accepted()?.len(), accepted, "{what} reached the app");
        Ok(())
    }

    fn expect_bad_certificate(&self, what: &str, reason: &str, credentials: &Credentials) -> TestResult {
        self.expect(what, reason, || {
            let session = Session::open(&self.far, self.web.at4(PORT), credentials);
            Ok(session.is_err_and(|error| error.is_tls()))
        })
    }

    /// The scene is sound: with a good certificate one gets through.
    fn expect_good(&self) -> TestResult {
        let credentials = self.authority.issue(&Leaf::of(spiffe_of(&self.far)))?;
        let session = Session::open(&self.far, self.web.at4(PORT), &credentials)?;
        assert_eq!(session.connect(&Connect::to(self.web.at4(8080)))?.who()?.server, "web");
        Ok(())
    }
}

#[test]
fn certificates_that_prove_nothing_are_refused_each_for_its_reason() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let authority = &scene.authority;
    let good = || Leaf::of(spiffe_of(&scene.far));
    scene.expect_good()?;
    let rows = [
        ("expired", "tls_expired", authority.issue(&good().expired())?),
        ("not yet valid", "tls_not_yet_valid", authority.issue(&good().not_yet_valid())?),
        (
            "of another trust domain",
            "tls_trust_domain",
            authority.issue(&Leaf::of("spiffe://evil.example/ns/shop/sa/default"))?,
        ),
        ("self-signed", "tls_unknown_issuer", authority.self_signed(&good())?),
        (
            "of another root",
            "tls_unknown_issuer",
            Authority::root("other")?.issue(&good())?.trusting(authority),
        ),
        (
            "of two identities",
            "tls_many_identities",
            authority.issue(&good().and_of("spiffe://cluster.local/ns/shop/sa/admin"))?,
        ),
        ("without an identity", "tls_no_identity", authority.issue(&good().nameless())?),
        ("for servers", "tls_usage", authority.issue(&good().for_servers_only())?),
        ("of a node", "tls_wrong_kind", authority.issue(&Leaf::of("spiffe://cluster.local/node/b"))?),
        ("of something else", "tls_not_spiffe", authority.issue(&Leaf::of("https://example.org/shop"))?),
    ];
    for (what, reason, credentials) in &rows {
        scene.expect_bad_certificate(what, reason, credentials)?;
    }
    scene.expect("nobody", "tls_no_certificate", || {
        let credentials = authority.issue(&good())?;
        let session = Session::open_anonymously(&scene.far, scene.web.at4(PORT), &credentials);
        Ok(session.is_err_and(|error| error.is_tls()))
    })?;
    scene.expect_good()
}

#[test]
fn a_revoked_certificate_is_refused_from_the_moment_it_is_listed() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let stolen = scene.authority.issue(&Leaf::of(spiffe_of(&scene.far)))?;
    let open = || Session::open(&scene.far, scene.web.at4(PORT), &stolen);
    assert_eq!(open()?.identity(), spiffe_of(&scene.web));
    scene.authority.revoke(&scene.shop.world().ca_dir(), &[&stolen])?;
    eventually(SOON, || open().is_err(), |refused| *refused)?;
    scene.expect_bad_certificate("revoked", "tls_revoked", &stolen)?;
    scene.expect_good()
}

#[test]
fn requests_for_what_is_not_the_pods_own_are_refused() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let credentials = scene.authority.issue(&Leaf::of(spiffe_of(&scene.far)))?;
    let session = Session::open(&scene.far, scene.web.at4(PORT), &credentials)?;
    let refused = |connect: Connect| {
        let answer = session.connect(&connect);
        Ok(answer.is_err_and(|error| error.status().is_none_or(|status| (400..600).contains(&status))))
    };
    let target = |text: &str| -> Result<SocketAddr, Failure> { Ok(text.parse()?) };
    let elsewhere = [
        scene.other.at4(8080),
        scene.other.at6(8080),
        scene.far.at4(8080),
        target("127.0.0.1:8080")?,
        target("[::1]:8080")?,
        target("[::ffff:127.0.0.1]:8080")?,
        target("0.0.0.0:8080")?,
        target("[::]:8080")?,
        SocketAddr::from((scene.other.node_ip4(), 22)),
    ];
    for to in elsewhere {
        scene.expect(&format!("CONNECT {to}"), "hbone_target", || refused(Connect::to(to)))?;
    }
    for port in (15000..=15021).chain([15053]) {
        let to = scene.web.at4(port);
        scene.expect(&format!("CONNECT {to}"), "hbone_port", || refused(Connect::to(to)))?;
    }
    // A refused stream harms neither the connection nor its neighbours.
    assert_eq!(session.connect(&Connect::to(scene.web.at4(8080)))?.who()?.server, "web");
    for (what, reason, connect) in [
        ("GET", "hbone_headers", Connect::to(scene.web.at4(8080)).method(Method::GET)),
        ("a name", "hbone_target", Connect::to("web.shop.svc.cluster.local:8080")),
        ("no port", "hbone_target", Connect::to(scene.web.ip4())),
    ] {
        scene.expect(what, reason, || refused(connect))?;
    }
    assert_eq!(session.connect(&Connect::to(scene.web.at4(8080)))?.who()?.server, "web");
    Ok(())
}

#[test]
fn oversized_headers_end_the_stream_or_the_connection_and_nothing_else() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let credentials = scene.authority.issue(&Leaf::of(spiffe_of(&scene.far)))?;
    for (number, length, reason) in [
        (1, 20_000, "hbone_headers"),
        // Too much even to be decoded and set aside.
        (40, 2_000, "h2_header_block_too_large"),
        (100, 60_000, "h2_header_block_too_large"),
    ] {
        scene.expect(&format!("{number} headers of {length} bytes"), reason, || {
            let session = Session::open(&scene.far, scene.web.at4(PORT), &credentials)?;
            let value = "x".repeat(length);
            let connect = (0..number).fold(Connect::to(scene.web.at4(8080)), |connect, index| {
                connect.header(&format!("x-filler-{index}"), &value)
            });
            Ok(session.connect(&connect).is_err())
        })?;
        scene.expect_good()?;
    }
    Ok(())
}

#[test]
fn what_is_no_tls_13_is_refused_at_once() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let outsider = scene.shop.world().outsider("outsider")?;
    for place in [scene.far.place(), outsider, scene.shop.world().node("a")?.host().clone()] {
        for to in [scene.web.at4(PORT), scene.web.at6(PORT)] {
            scene.expect("plaintext", "tls_not_tls", || {
                let answer = knock(&place, to, b"GET / HTTP/1.1\r\nHost: web\r\n\r\n", SOON)?;
                Ok(answer.end != End::Open && !answer.bytes.starts_with(b"HTTP"))
            })?;
            scene.expect("TLS 1.2", "tls_version", || {
                let answer = knock(&place, to, &client_hello_of_tls12(), SOON)?;
                // A fatal alert, protocol_version.
                Ok(answer.end != End::Open && answer.bytes.ends_with(&[2, 70]))
            })?;
        }
    }
    scene.expect_good()
}

#[test]
fn a_handshake_that_does_not_come_to_an_end_is_ended() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let half = client_hello_of_tls12();
    for bytes in [&half[..7], &[]] {
        scene.expect("half a handshake", "tls_timeout", || {
            let answer = knock(&scene.far, scene.web.at4(PORT), bytes, Duration::from_secs(20))?;
            Ok(answer.end != End::Open)
        })?;
    }
    Ok(())
}

#[test]
fn ten_thousand_half_open_handshakes_keep_nobody_out() -> TestResult {
    require_agent!();
    const EACH: usize = 2_500;
    let scene = Scene::set(test_name!())?;
    mesh_tests::hbone::raise_descriptor_limit()?;
    let second = scene.shop.pod("b", "second")?;
    let near = scene.shop.pod("a", "near")?;
    scene.agent.wait_enrolled([&near])?;
    let attackers: Vec<Place> = vec![scene.far.place(), scene.shop.world().outsider("outsider")?];
    let hello = client_hello_of_tls12();
    let mut held = Vec::new();
    for place in &attackers {
        for to in [scene.web.at4(PORT), scene.web.at6(PORT)] {
            held.extend(half_open(place, to, EACH, &hello[..7])?);
        }
    }
    let credentials = scene.authority.issue(&Leaf::of(spiffe_of(&second)))?;
    // Other pods' clients are served meanwhile, and so is this pod by every other way in.
    let session = Session::open(&second, scene.other.at4(PORT), &credentials)?;
    assert_eq!(session.connect(&Connect::to(scene.other.at4(8080)))?.who()?.server, "other");
    assert_eq!(near.tool()?.who(scene.web.at4(8080))?.server, "web");
    let refused = || scene.refusals("tls_too_many_handshakes").map_err(|error| format!("{error:?}"));
    eventually(SOON, refused, |refused| refused.as_ref().is_ok_and(|refused| *refused > 0.0))?
        .map_err(anyhow::Error::msg)?;
    drop(held);
    eventually(SOON, || scene.expect_good().is_ok(), |good| *good)?;
    Ok(())
}

#[test]
fn the_plaintext_door_is_closed_to_those_who_come_around() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let outsider = scene.shop.world().outsider("outsider")?;
    // Neither a stranger nor a pod finds the agent's other ports behind the pod's address.
    for place in [scene.far.place(), outsider] {
        for port in [15001, 15002, 15003, 15004, 15006, 15053] {
            for to in [scene.web.at4(port), scene.web.at6(port)] {
                assert!(place.tool()?.connect(to).is_err(), "{} to {to}", place.name());
            }
        }
    }
    Ok(())
}
