//! Routes of the Gateway API: what the mesh says of its own in their status, and how it leaves those of other controllers alone.

use std::process::Command;

use mesh_tests::{Failure, TestResult, eventually, programs, require_agent, require_api_server, test_name};
use serde_json::{Value, json};

use crate::scene::{Scene, ServiceAddress};
use crate::{SOON, condition, objects};

fn route(kind: &str, version: &str, name: &str, spec: Value) -> String {
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": format!("gateway.networking.k8s.io/{version}"), "kind": kind, "metadata": metadata, "spec": spec})
        .to_string()
}

/// A route that only another controller's Gateway has, with what no reader of ours knows.
fn of_others(name: &str) -> String {
    let newer = json!({"matches": [{"path": {"type": "RegularExpression", "value": "^/(?!api).*"}}],
        "filters": [{"type": "OfNextYear"}], "backendRefs": [{"name": "till", "port": 80}]});
    let parent = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"});
    route("HTTPRoute", "v1", name, json!({"parentRefs": [parent], "rules": [newer]}))
}

#[test]
fn a_route_says_where_it_is_in_force_and_of_which_generation() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::crds())?;
    kubectl.apply(&objects::till_only())?;
    let parent = json!({"group": "", "kind": "Service", "name": "till"});
    let rules = json!([{"backendRefs": [{"name": "till", "port": 80}]}]);
    kubectl.apply(&route(
        "TCPRoute",
        "v1alpha2",
        "bytes",
        json!({"parentRefs": [parent], "rules": rules}),
    ))?;
    kubectl.apply(&objects::route("web", json!([{"name": "till", "port": 80}])))?;
    let _controller = scene.controller("a", &[])?;
    let conditions = |kind: &str, name: &str| {
        let found = kubectl.json(&["get", kind, "-n", "shop", name]).unwrap_or_default();
        found["status"]["parents"][0]["conditions"].clone()
    };
    // The till speaks HTTP.
    let accepted = || condition(&conditions("tcproutes", "bytes"), "Accepted");
    eventually(SOON, accepted, |said| said.as_deref() == Some("False NoMatchingParent"))?;
    let words = conditions("tcproutes", "bytes").to_string();
    assert!(words.contains("Service shop/till speaks HTTP at port 80"), "{words}");

    let of = |kind: &str| {
        let all = conditions("httproutes", "web");
        let generation =
            all.as_array()?.iter().find(|one| one["type"] == kind)?["observedGeneration"].as_i64();
        Some((condition(&all, kind)?, generation?))
    };
    eventually(SOON, || of("Accepted"), |said| *said == Some(("True Accepted".to_owned(), 1)))?;
    assert_eq!(of("PartiallyInvalid"), None);
    // What cannot be used leaves the first generation in force.
    kubectl.apply(&objects::route("web", json!([{"name": "till", "port": 70_000}])))?;
    let fallen_back = ("True UnsupportedValue".to_owned(), 2);
    eventually(SOON, || of("PartiallyInvalid"), |said| *said == Some(fallen_back.clone()))?;
    assert_eq!(of("Accepted"), Some(("True Accepted".to_owned(), 1)));
    kubectl.apply(&objects::route("web", json!([{"name": "till", "port": 80}])))?;
    eventually(SOON, || of("Accepted"), |said| *said == Some(("True Accepted".to_owned(), 3)))?;
    assert_eq!(of("PartiallyInvalid"), None);
    Ok(())
}

#[test]
fn what_is_for_others_is_let_in_and_what_was_there_before_the_mesh_can_be_deleted() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::crds())?;
    kubectl.apply(&objects::till_only())?;
    // From before the mesh: of no use to it, and with something to be done before it goes.
    let old = |hosts: &[&str]| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "old", "namespace": "shop", "finalizers": ["example.com/tidy"]},
            "spec": {"hosts": hosts, "http": 7}})
        .to_string()
    };
    kubectl.apply(&old(&["till"]))?;
    let controller = scene.controller("a", &[])?;
    let addr = ServiceAddress::take("10.96.255.79")?;
    kubectl.apply(&objects::webhook(addr.as_str(), controller.webhook_port()))?;
    let refused = || kubectl.apply(&objects::split(json!("ten"))).err().map(|error| error.to_string());
    eventually(SOON, refused, |error| {
        error.as_ref().is_some_and(|text| text.contains("spec.http[0].route[1].weight"))
    })?;

    let one = ["virtualservice", "-n", "shop", "old"];
    let with = |verb: &'static str, more: &[&'static str]| -> Result<String, Failure> {
        Ok(kubectl.run(&[&[verb], &one[..], more].concat())?)
    };
    with("label", &["team=till"])?;
    let worse = kubectl.apply(&old(&["till", "other"])).err().map(|error| error.to_string());
    assert!(worse.is_some_and(|text| text.contains("spec.http")), "another spec was not judged");
    with("delete", &["--wait=false"])?;
    assert!(kubectl.run(&[&["get"], &one[..]].concat()).is_ok(), "gone before it was tidied");
    with("patch", &["--type=json", "-p", r#"[{"op": "remove", "path": "/metadata/finalizers"}]"#])?;
    eventually(SOON, || kubectl.run(&[&["get"], &one[..]].concat()).is_err(), |gone| *gone)?;

    // Others' routes are stored, and nothing is said of them.
    kubectl.apply(&of_others("aa-theirs"))?;
    let own = |backend: &str| objects::route("zz-own", json!([{"name": backend, "port": 80}]));
    kubectl.apply(&own("nowhere"))?;
    let events = || kubectl.json(&["get", "events", "-n", "shop"]).unwrap_or_default()["items"].to_string();
    // It comes last in the order of names.
    eventually(SOON, events, |events| events.contains("zz-own"))?;
    assert!(!events().contains("aa-theirs"), "{}", events());
    let theirs = kubectl.json(&["get", "httproute", "-n", "shop", "aa-theirs"])?;
    assert_eq!(theirs["status"], Value::Null);
    // Nor is anything that is asked of the whole cluster about them.
    let mut meshctl = Command::new(programs::meshctl()?);
    meshctl.args(["validate", "--live", "-o", "json", "--kubeconfig"]).arg(kubectl.kubeconfig());
    let found = meshctl.output()?;
    let rows = String::from_utf8_lossy(&found.stdout);
    let words = String::from_utf8_lossy(&found.stderr);
    assert!(found.status.success() && !rows.contains("aa-theirs"), "{rows}{words}");
    Ok(())
}
