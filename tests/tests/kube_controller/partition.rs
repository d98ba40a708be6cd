//! A controller that could not reach the API server for so long that its watches are too old: nothing is lost.

use std::time::Duration;

use mesh_tests::{TestResult, eventually, require_agent, require_api_server, test_name};
use serde_json::json;

use crate::relay::Relay;
use crate::scene::{ControllerProcess, Published, Scene};
use crate::{SOON, objects};

/// What the source logs when the API server refuses to go on where a watch ended.
const EXPIRED: &str = "the watch has expired";

fn names(controller: &ControllerProcess) -> Vec<String> {
    let all = controller.resources().unwrap_or_default();
    all.into_iter().map(|(kind, name, _)| format!("{kind} {name}")).collect()
}

#[test]
fn a_controller_that_was_cut_off_until_its_watches_expired_has_what_a_fresh_one_has() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::crds())?;
    kubectl.apply(&objects::every_kind())?;
    scene.set_running("shop", "till-0", "10.1.0.1")?;
    let relay = Relay::to(scene.api_server()?)?;
    let old = scene.controller_by(&relay, "old", &["--log", "info,mesh_control=debug"])?;
    let has = |names: &[String], part: &str| names.iter().any(|name| name.contains(part));
    let before =
        eventually(SOON, || names(&old), |names| has(names, "shop/till-0") && has(names, "api.example.com"))?;
    let published = old.resources()?;
    assert!(!old.log().contains(EXPIRED), "it has not even begun");

    relay.cut();
    // Something of everything: new, other, gone, and another of the same name.
    kubectl.apply(&objects::service("late"))?;
    kubectl.apply(&objects::route("late", json!([{"name": "late", "port": 80}])))?;
    kubectl.apply(&objects::namespace("later"))?;
    kubectl.apply(&objects::split(json!(55)))?;
    for gone in [
        "serviceentry/api",
        "peerauthentication/till",
        "grpcroute/calls",
        "destinationrule/till",
        "service/desk",
    ] {
        kubectl.run(&["delete", "-n", "shop", gone])?;
    }
    kubectl.run(&["delete", "pod", "-n", "shop", "till-0", "--force", "--grace-period=0"])?;
    kubectl.apply(&objects::till_only())?;
    scene.set_running("shop", "till-0", "10.1.0.2")?;
    kubectl.run(&["label", "namespace", "shop", "istio.io/dataplane-mode=none", "--overwrite"])?;
    kubectl.run(&["delete", "node", "n1"])?;
    // The definition of a kind goes, and all of the kind with it.
    kubectl.run(&["delete", "crd", "tlsroutes.gateway.networking.k8s.io"])?;
    // What was is forgotten: by etcd, and by the API server, which remembers the last changes by itself.
    scene.forget_history()?;
    let world = |mut found: Published| {
        // That the API server cannot be read is told with the state of the source.
        found.retain(|(kind, ..)| kind != "source");
        found
    };
    assert_eq!(
        world(old.resources()?),
        world(published.clone()),
        "what was known stays while nothing can be"
    );
    assert!(old.is_ready(), "and is served");

    relay.mend();
    let fresh = scene.controller("fresh", &[])?;
    // What is wrong with reading is told too, until all can be read again.
    let both = || (old.resources().unwrap_or_default(), fresh.resources().unwrap_or_default());
    let settled = eventually(Duration::from_secs(120), both, |(old, fresh)| old == fresh && !old.is_empty())?;
    assert_ne!(world(settled.0), world(published));
    let after = names(&old);
    assert!(has(&after, "shop/late") && !has(&after, "api.example.com"), "{after:#?}\nbefore: {before:#?}");
    let log = old.log();
    assert!(log.contains(EXPIRED), "no watch was too old, so this proves nothing:\n{log}");

    // It follows what happens from now on.
    kubectl.apply(&objects::service("after"))?;
    kubectl.run(&["delete", "service", "-n", "shop", "late"])?;
    let now = || names(&old);
    eventually(SOON, now, |names| has(names, "shop/after") && !has(names, "shop/late."))?;
    eventually(SOON, both, |(old, fresh)| old == fresh)?;
    Ok(())
}
