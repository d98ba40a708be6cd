//! The same manifests by file and by API server are published alike, of every kind that there is.

use std::fs;

use mesh_tests::{TestResult, eventually, require_agent, require_api_server, test_name};

use crate::scene::{ControllerProcess, Published, Scene};
use crate::{SOON, objects};

/// Every kind that the compiler knows, by plural. Of service accounts it needs only the names, and pods have those.
const KINDS: [&str; 19] = [
    "namespaces",
    "nodes",
    "pods",
    "services",
    "endpointslices",
    "configmaps",
    "secrets",
    "peerauthentications",
    "authorizationpolicies",
    "virtualservices",
    "destinationrules",
    "sidecars",
    "serviceentries",
    "workloadentries",
    "httproutes",
    "grpcroutes",
    "tlsroutes",
    "tcproutes",
    "referencegrants",
];

/// Without what two controllers never have in common: their roots, and where each reads.
fn world(of: &ControllerProcess) -> Published {
    let mut found = of.resources().unwrap_or_default();
    found.retain(|(kind, ..)| kind != "source" && kind != "trust");
    found
}

/// Places of rules are a file's line in one and an object's generation in the other, and routes name them: of routes it is compared here
/// which there are. What is in them is compared where both can be looked into, by a unit test
/// (`mesh-agent/control/src/source/kubernetes/tests/alike.rs`).
fn without_places(mut world: Published) -> Published {
    for (_, _, version) in world.iter_mut().filter(|(kind, ..)| kind == "route") {
        version.clear();
    }
    world
}

#[test]
fn the_same_manifests_by_file_and_by_api_server_are_published_alike() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::crds())?;
    scene.kubectl().apply(&objects::every_kind())?;
    scene.set_running("shop", "till-0", "10.1.0.1")?;
    let by_api = scene.controller("a", &["--read-secrets"])?;
    // The same objects as the API server has them, in a directory.
    let folder = scene.dump(&KINDS)?;
    let by_file = scene.controller_of(&folder, "b")?;
    let has = |found: &Published, kind: &str| found.iter().any(|(of, ..)| of == kind);
    let files = eventually(
        SOON,
        || world(&by_file),
        |found| ["address", "authorization", "route", "credential"].iter().all(|kind| has(found, kind)),
    )?;
    let wanted = without_places(files.clone());
    eventually(SOON, || without_places(world(&by_api)), |found| *found == wanted)?;

    // Without the objects of any one kind it would be another world: none is here in vain.
    for kind in KINDS {
        let (file, aside) = (folder.join(format!("{kind}.json")), folder.join(format!("{kind}.aside")));
        fs::rename(&file, &aside)?;
        let changed = eventually(SOON, || world(&by_file), |found| *found != files);
        assert!(changed.is_ok(), "{kind} have no effect");
        fs::rename(&aside, &file)?;
        eventually(SOON, || world(&by_file), |found| *found == files)?;
    }
    Ok(())
}
