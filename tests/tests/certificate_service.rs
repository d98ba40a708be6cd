//! The controller's certificate service, asked by a client of another make: who gets what, and who does not.

use mesh_tests::authority::{Authority, Leaf, request_for, spiffe};
use mesh_tests::hbone::{CallOutcome, HboneError, request_certificate};
use mesh_tests::manifests::ServiceAccountManifest;
use mesh_tests::{
    Controller, ControllerSeat, Credentials, Failure, Shop, TestResult, require_agent, shop, test_name,
};

/// A controller for two nodes without agents; the treasurer is on node a.
struct Scene {
    shop: Shop,
    seat: ControllerSeat,
    controller: Controller,
    /// To trust the controller by; the certificate itself is not shown.
    trust: Credentials,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let manifests = shop.world().manifests();
        manifests.apply(ServiceAccountManifest::new(shop::NAMESPACE, "treasurer"))?;
        let treasurer = shop.world().node("a")?.pod("shop/treasurer")?;
        manifests.apply(treasurer.manifest().service_account("treasurer"))?;
        shop.pod("b", "clerk")?;
        let seat = ControllerSeat::new(shop.world())?;
        let controller = seat.start(&[])?;
        let authority = Authority::of_agents(&shop.world().ca_dir())?;
        let trust = authority.issue(&Leaf::of(spiffe(shop::NAMESPACE, "default")))?;
        Ok(Self { shop, seat, controller, trust })
    }

    fn token_of(&self, node: &str) -> Result<String, Failure> {
        self.seat.token_of(self.shop.world().node(node)?.full_name())
    }

    fn ask(&self, token: &str, csr: &str) -> Result<CallOutcome, HboneError> {
        request_certificate(self.seat.place(), self.seat.address(), &self.trust, token, csr)
    }

    /// Requests refused so far, by all reasons.
    fn refused(&self) -> Result<f64, Failure> {
        let (_, metrics) = self.controller.get("/metrics")?;
        let samples = metrics.lines().filter(|line| !line.starts_with('#') && line.contains("refused"));
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

#[test]
fn a_node_gets_certificates_of_its_own_pods_and_no_others() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let (of_a, of_b) = (scene.token_of("a")?, scene.token_of("b")?);
    let own = spiffe(shop::NAMESPACE, "treasurer");
    let request = request_for(&[&own])?;
    let granted = scene.ask(&of_a, &request)?;
    assert_eq!(granted.status, 0, "{granted:?}");
    assert!(granted.chain.first().is_some_and(|leaf| leaf.starts_with("-----BEGIN CERTIFICATE-----")));
    let refusals = [
        ("another node's identity", &of_b, request_for(&[&own])?),
        ("an identity that nobody has", &of_a, request_for(&[&spiffe(shop::NAMESPACE, "nobody")])?),
        ("another trust domain", &of_a, request_for(&["spiffe://evil.example/ns/shop/sa/treasurer"])?),
        ("two identities", &of_a, request_for(&[&own, &spiffe(shop::NAMESPACE, "default")])?),
        ("no identity of a workload", &of_a, request_for(&["https://example.org/treasurer"])?),
        ("a replayed request", &of_a, request),
        ("a malformed request", &of_a, "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n".to_owned()),
    ];
    for (what, token, csr) in &refusals {
        let before = scene.refused()?;
        let outcome = scene.ask(token, csr)?;
        assert!(outcome.status != 0 && outcome.chain.is_empty(), "{what}: {outcome:?}");
        assert!(scene.refused()? > before, "{what} is not counted");
    }
    // None of which keeps the rightful one out.
    assert_eq!(scene.ask(&of_a, &request_for(&[&own])?)?.status, 0);
    Ok(())
}

#[test]
fn a_token_proves_one_name_and_cannot_be_made_up() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let (of_a, of_b) = (scene.token_of("a")?, scene.token_of("b")?);
    let own = spiffe(shop::NAMESPACE, "treasurer");
    let (name_a, name_b) =
        (scene.shop.world().node("a")?.full_name(), scene.shop.world().node("b")?.full_name());
    assert_ne!(of_a, of_b);
    for token in [
        of_b.replace(name_b, name_a),
        format!("{name_a}."),
        name_a.to_owned(),
        String::new(),
        format!("{of_a}A"),
        "x".repeat(5_000),
    ] {
        let outcome = scene.ask(&token, &request_for(&[&own])?)?;
        // UNAUTHENTICATED
        assert_eq!((outcome.status, outcome.chain.len()), (16, 0), "{token:.80}: {outcome:?}");
    }
    Ok(())
}
