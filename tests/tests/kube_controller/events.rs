//! Events: users hear once of each thing that is wrong, also of what a resource refers to and is not there.

use mesh_tests::{TestResult, eventually, require_agent, require_api_server, test_name};
use serde_json::json;

use crate::scene::Scene;
use crate::{SOON, objects};

/// An Event of the mesh about an object of namespace shop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Heard {
    about: String,
    reason: String,
    message: String,
}

/// All of them, repeated ones as often as they were counted.
fn heard(scene: &Scene) -> Vec<Heard> {
    let list = scene.kubectl().json(&["get", "events", "-n", "shop"]).unwrap_or_default();
    let ours = list["items"].as_array().cloned().unwrap_or_default().into_iter().filter(|event| {
        event["type"] == "Warning" && event["reportingComponent"] == "nodemesh.dev/controller"
    });
    let mut all = Vec::new();
    for event in ours {
        let text =
            |pointer: &str| event.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let about = format!("{} {}", text("/involvedObject/kind"), text("/involvedObject/name"));
        let one = Heard { about, reason: text("/reason"), message: text("/message") };
        let times = event["series"]["count"].as_u64().unwrap_or(1);
        all.extend((0..times).map(|_| one.clone()));
    }
    all.sort();
    all
}

fn of(scene: &Scene, about: &str) -> Vec<(String, String)> {
    let all = heard(scene).into_iter().filter(|heard| heard.about == about);
    all.map(|heard| (heard.reason, heard.message)).collect()
}

#[test]
fn what_a_resource_refers_to_and_is_not_there_is_told_once_and_again_only_when_it_is_news() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::crds())?;
    kubectl.apply(&objects::shop())?;
    let lost = |backend: &str| objects::route("lost", json!([{"name": backend, "port": 80}]));
    kubectl.apply(&lost("nowhere"))?;
    let first = scene.controller("a", &[])?;

    let route = eventually(SOON, || of(&scene, "HTTPRoute lost"), |told| !told.is_empty())?;
    let wanted = [("BackendNotFound".to_owned(), "Service shop/nowhere does not exist".to_owned())];
    assert_eq!(route, wanted);
    // 10 % of the split go to a host that nobody has.
    // (That routes are attached to its host too is told as well, and is another matter.)
    let missing_of_split = || {
        let mut told = of(&scene, "VirtualService till");
        told.retain(|(reason, _)| reason == "ReferencedResourceNotFound");
        told
    };
    let split = eventually(SOON, missing_of_split, |told| !told.is_empty())?;
    let [(_, message)] = &*split else { panic!("{split:?}") };
    assert!(
        message.contains("spec.http[0].route[1].destination.host") && message.contains("other.shop.svc"),
        "{message}"
    );
    assert_eq!(of(&scene, "HTTPRoute till"), [], "nothing is wrong with it");
    assert_eq!(of(&scene, "ServiceEntry api"), [], "nothing is wrong with it");

    // Looked at again for other reasons: a label, another service. What is told of a resource made after that shows that
    // all of it was looked at: it comes last in the order of names.
    kubectl.run(&["label", "httproute", "-n", "shop", "lost", "looked=again"])?;
    kubectl.run(&["label", "virtualservice", "-n", "shop", "till", "looked=again"])?;
    kubectl.apply(&objects::service("beside"))?;
    let looked_at = |marker: &str| {
        kubectl.apply(&objects::route(marker, json!([{"name": marker, "port": 80}])))?;
        let about = format!("HTTPRoute {marker}");
        eventually(SOON * 2, || of(&scene, &about), |told| !told.is_empty())?;
        TestResult::Ok(())
    };
    looked_at("zz-1")?;
    assert_eq!(of(&scene, "HTTPRoute lost"), wanted);
    assert_eq!(missing_of_split(), split);

    // Another controller leads, and has nothing new to say.
    first.kill();
    let _second = scene.controller("b", &[])?;
    looked_at("zz-2")?;
    assert_eq!(of(&scene, "HTTPRoute lost"), wanted);
    assert_eq!(missing_of_split(), split);

    // Changed, and still wrong: that is news.
    kubectl.apply(&lost("elsewhere"))?;
    let told = eventually(SOON, || of(&scene, "HTTPRoute lost"), |told| told.len() == 2)?;
    assert!(told.iter().any(|(_, message)| message == "Service shop/elsewhere does not exist"), "{told:?}");
    // So is what was there and goes again.
    kubectl.apply(&objects::service("elsewhere"))?;
    let resolved = || {
        let found = kubectl.json(&["get", "httproute", "-n", "shop", "lost"]).unwrap_or_default();
        crate::condition(&found["status"]["parents"][0]["conditions"], "ResolvedRefs")
    };
    eventually(SOON, resolved, |said| said.as_deref() == Some("True ResolvedRefs"))?;
    kubectl.run(&["delete", "service", "-n", "shop", "elsewhere"])?;
    eventually(SOON, || of(&scene, "HTTPRoute lost"), |told| told.len() == 3)?;
    looked_at("zz-3")?;
    assert_eq!(of(&scene, "HTTPRoute lost").len(), 3);
    Ok(())
}
