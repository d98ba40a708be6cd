//! A controller of a cluster, against a real API server without nodes: what it reads, writes, refuses and issues.

mod alike;
mod events;
mod live;
mod objects;
mod partition;
mod relay;
mod routes;
mod scene;
mod unready;
mod webhook;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use mesh_tests::authority::{Authority, Leaf, request_for, spiffe};
use mesh_tests::hbone::request_certificate_here;
use mesh_tests::{TestResult, eventually, require_agent, require_api_server, test_name};
use scene::{ControllerProcess, NAMESPACE, Scene, ServiceAddress};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

/// A status condition as `STATUS REASON`.
fn condition(conditions: &Value, kind: &str) -> Option<String> {
    let found = conditions.as_array()?.iter().find(|condition| condition["type"] == kind)?;
    Some(format!("{} {}", found["status"].as_str()?, found["reason"].as_str()?))
}

#[test]
fn users_are_told_what_became_of_their_resources_of_kinds_that_came_later_too() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let controller = scene.controller("a", &[])?;
    // The controller began without any of these kinds.
    scene.kubectl().apply(&objects::crds())?;
    scene.kubectl().apply(&objects::shop())?;
    let kubectl = scene.kubectl();
    let status = |kind: &str, name: &str| {
        let found = kubectl.json(&["get", kind, "-n", "shop", name]);
        found.map(|object| object["status"].clone()).unwrap_or_default()
    };
    let route = |name: &'static str| {
        move |kind: &str| condition(&status("httproutes", name)["parents"][0]["conditions"], kind)
    };
    let good = route("till");
    eventually(SOON, || good("Accepted"), |c| c.as_deref() == Some("True Accepted"))?;
    assert_eq!(good("ResolvedRefs").as_deref(), Some("True ResolvedRefs"));
    let parent = &status("httproutes", "till")["parents"][0];
    assert_eq!(parent["controllerName"], "nodemesh.dev/gateway-controller");

    scene.kubectl().apply(&objects::route("lost", json!([{"name": "nowhere", "port": 80}])))?;
    let lost = route("lost");
    eventually(SOON, || lost("ResolvedRefs"), |c| c.as_deref() == Some("False BackendNotFound"))?;
    // What it misses appears.
    scene.kubectl().apply(&objects::service("nowhere"))?;
    eventually(SOON, || lost("ResolvedRefs"), |c| c.as_deref() == Some("True ResolvedRefs"))?;

    // A resource that cannot be used keeps its last good state, and says so for its new generation.
    let reconciled = || condition(&status("virtualservices", "till")["conditions"], "Reconciled");
    eventually(SOON, reconciled, |c| c.as_deref() == Some("True Accepted"))?;
    scene.kubectl().apply(&objects::split(json!("ten")))?;
    eventually(SOON, reconciled, |c| c.as_deref() == Some("False Invalid"))?;
    let bad = status("virtualservices", "till");
    let conditions = bad["conditions"].to_string();
    assert!(conditions.contains("spec.http[0].route[1].weight: is"), "{conditions}");
    let events = || kubectl.json(&["get", "events", "-n", "shop"]).unwrap_or_default()["items"].to_string();
    eventually(SOON, events, |events| events.contains("spec.http[0].route[1].weight"))?;

    // Addresses of a host that nobody wrote any down for.
    let addresses = || status("serviceentries", "api")["addresses"][0]["value"].clone();
    eventually(SOON, addresses, |found| found.as_str().is_some_and(|addr| addr.starts_with("240.240.")))?;

    // Writing has come to an end.
    let versions = || {
        let list = kubectl.json(&["get", "virtualservices,httproutes,serviceentries", "-n", "shop"]);
        list.map(|list| {
            let of = |item: &Value| item["metadata"]["resourceVersion"].to_string();
            list["items"].as_array().into_iter().flatten().map(of).collect::<Vec<_>>()
        })
    };
    let settled = || {
        let before = versions().ok();
        std::thread::sleep(Duration::from_secs(2));
        before.is_some() && before == versions().ok()
    };
    eventually(SOON, settled, |settled| *settled)?;
    drop(controller);
    Ok(())
}

#[test]
fn a_broken_resource_is_refused_by_the_api_server_in_words_that_help() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::crds())?;
    scene.kubectl().apply(&objects::namespace("shop"))?;
    let controller = scene.controller("a", &[])?;
    let addr = ServiceAddress::take("10.96.255.77")?;
    scene.kubectl().apply(&objects::webhook(addr.as_str(), controller.webhook_port()))?;
    let refused =
        || scene.kubectl().apply(&objects::split(json!("ten"))).err().map(|error| error.to_string());
    // Until the roots are in its configuration the API server cannot ask.
    let error = eventually(SOON, refused, |error| {
        error.as_ref().is_some_and(|text| text.contains("spec.http[0].route[1].weight"))
    })?;
    let error = error.unwrap_or_default();
    assert!(error.contains("is \"ten\"") || error.contains("wanted"), "{error}");
    assert!(scene.kubectl().run(&["get", "virtualservices", "-n", "shop", "till"]).is_err(), "it was stored");
    scene.kubectl().apply(&objects::split(json!(10)))?;
    Ok(())
}

#[test]
fn whom_it_serves_and_what_is_told_at_the_loopback_address_alone() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let controller = scene.controller("a", &[])?;
    let addr = ServiceAddress::take("10.96.255.78")?;
    let elsewhere: Ipv4Addr = addr.as_str().parse()?;
    for path in ["/resources", "/sessions"] {
        controller.get_at(Ipv4Addr::LOCALHOST, path)?;
        let refused = controller.get_at(elsewhere, path).map_err(|error| format!("{error:?}"));
        assert!(refused.as_ref().is_err_and(|answer| answer.contains(" 403 ")), "{path}: {refused:?}");
    }
    for path in ["/metrics", "/readyz", "/healthz"] {
        controller.get_at(elsewhere, path)?;
    }
    Ok(())
}

#[test]
fn a_node_gets_certificates_for_its_own_pods_by_its_agents_token_and_by_no_other() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::till_only())?;
    scene.kubectl().apply(&objects::agents(&["n1", "n2"]))?;
    let controller = scene.controller("a", &[])?;
    let trust = scene.trust()?;
    let own = request_for(&["spiffe://cluster.local/ns/shop/sa/till"])?;
    let ask = |token: &str, csr: &str| request_certificate_here(controller.xds(), &trust, token, csr);

    let of_n1 = scene.agent_token("n1", "nodemesh.dev")?;
    let granted = ask(&of_n1, &own)?;
    assert_eq!(granted.status, 0, "{granted:?}");
    assert!(!granted.chain.is_empty());
    let of_n2 = scene.agent_token("n2", "nodemesh.dev")?;
    let elsewhere = scene.agent_token("n1", "https://kubernetes.default.svc.cluster.local")?;
    let unbound = scene.token(NAMESPACE, "nodemesh-agent", "nodemesh.dev")?;
    let other = scene.token("shop", "till", "nodemesh.dev")?;
    let made_up = of_n1.replace('.', "x");
    for (what, token, reason) in [
        ("another node", &of_n2, "not_hosted"),
        ("another audience", &elsewhere, "bad_token"),
        ("a token of no pod", &unbound, "token_without_node"),
        ("another service account", &other, "other_service_account"),
        ("no token at all", &made_up, "bad_token"),
    ] {
        let before = controller.counted(reason)?;
        let outcome = ask(token, &request_for(&["spiffe://cluster.local/ns/shop/sa/till"])?)?;
        assert!(outcome.status != 0 && outcome.chain.is_empty(), "{what}: {outcome:?}");
        assert!(controller.counted(reason)? > before, "{what} is not counted as {reason}");
    }
    // A node's own certificate would outlive the token.
    let node = ask(&of_n1, &request_for(&["spiffe://cluster.local/node/n1"])?)?;
    assert!(node.status != 0, "{node:?}");
    Ok(())
}

#[test]
fn another_controller_leads_when_one_dies_and_nothing_is_lost_while_the_api_server_restarts() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::till_only())?;
    let first = scene.controller("a", &[])?;
    let kubectl = scene.kubectl();
    let roots = |namespace: &str| {
        let found = kubectl.json(&["get", "configmap", "-n", namespace, "nodemesh-ca-root-cert"]);
        found.ok().and_then(|map| Some(map["data"]["root-cert.pem"].as_str()?.to_owned()))
    };
    let published = eventually(SOON, || roots("shop"), Option::is_some)?;
    let second = scene.controller("b", &[])?;
    // Both say the same, by one root.
    let both = || (second.resources().ok(), first.resources().ok());
    eventually(SOON, both, |(of_second, of_first)| of_first.is_some() && of_second == of_first)?;
    first.kill();
    // Somebody breaks what the leader keeps right, and a namespace appears.
    kubectl.run(&["delete", "configmap", "-n", "shop", "nodemesh-ca-root-cert"])?;
    kubectl.apply(&objects::namespace("later"))?;
    for namespace in ["shop", "later"] {
        eventually(Duration::from_secs(60), || roots(namespace), |found| *found == published)?;
    }

    scene.restart_api_server()?;
    kubectl.apply(&objects::service("after"))?;
    kubectl.run(&["delete", "service", "-n", "shop", "till"])?;
    let services = || {
        let found = second.resources().unwrap_or_default();
        let has = |name: &str| found.iter().any(|(kind, of, _)| kind == "address" && of.contains(name));
        (has("shop/after"), has("shop/till."))
    };
    eventually(Duration::from_secs(60), services, |found| *found == (true, false))?;
    assert!(second.is_ready(), "it went on");
    Ok(())
}

#[test]
fn a_secret_that_a_rule_names_is_followed_and_the_rule_says_when_there_is_none() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::crds())?;
    scene.kubectl().apply(&objects::shop())?;
    scene.set_running("shop", "till-0", "10.1.0.1")?;
    scene.kubectl().apply(&objects::outside("bank"))?;
    // Those of others are nobody's business.
    scene.kubectl().apply(&objects::secret("default", "bank", "of another namespace"))?;
    let said = || {
        let rule = scene.kubectl().json(&["get", "destinationrules", "-n", "shop", "outside"]);
        rule.unwrap_or_default()["status"].to_string()
    };
    {
        let _blind = scene.controller("blind", &[])?;
        eventually(SOON, said, |said| said.contains("controller.readSecrets=true"))?;
    }
    let controller = scene.controller("a", &["--read-secrets"])?;
    eventually(SOON, said, |said| said.contains("there is no Secret shop/bank"))?;
    let credentials = || {
        let mut found = controller.resources().unwrap_or_default();
        found.retain(|(kind, ..)| kind == "credential");
        found.into_iter().map(|(_, name, version)| (name, version)).collect::<Vec<_>>()
    };
    // That there is nothing is said to the node as well.
    let without = eventually(SOON, credentials, |found| found.len() == 1)?;
    assert!(without[0].0.ends_with("/shop/bank"), "{without:?}");

    scene.kubectl().apply(&objects::secret("shop", "bank", "first"))?;
    let first = eventually(SOON, credentials, |found| found.len() == 1 && *found != without)?;
    eventually(SOON, said, |said| !said.contains("no Secret"))?;
    scene.kubectl().apply(&objects::secret("shop", "bank", "second"))?;
    let second = eventually(SOON, credentials, |found| found.len() == 1 && *found != first)?;
    scene.kubectl().run(&["delete", "secret", "-n", "shop", "bank"])?;
    eventually(SOON, credentials, |found| found.len() == 1 && *found != second)?;
    eventually(SOON, said, |said| said.contains("there is no Secret shop/bank"))?;
    scene.kubectl().run(&["delete", "destinationrule", "-n", "shop", "outside"])?;
    eventually(SOON, credentials, Vec::is_empty)?;
    Ok(())
}

#[test]
fn an_authority_that_is_plugged_in_signs_from_the_start_and_is_announced_when_it_comes_later() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::till_only())?;
    scene.kubectl().apply(&objects::agents(&["n1"]))?;
    let root = Authority::root("of the company")?;
    scene.plug_in(&root.intermediate("of the mesh")?)?;
    let controller = scene.controller("a", &[])?;
    // Only who trusts the company's root takes the controller for what it is, and the certificate comes below that root.
    let trust = root.issue(&Leaf::of(spiffe("shop", "nobody")))?;
    let csr = request_for(&["spiffe://cluster.local/ns/shop/sa/till"])?;
    let token = scene.agent_token("n1", "nodemesh.dev")?;
    let granted = request_certificate_here(controller.xds(), &trust, &token, &csr)?;
    assert!(granted.status == 0 && granted.chain.len() >= 2, "{granted:?}");
    let own = scene.kubectl().run(&["get", "secret", "-n", NAMESPACE, "nodemesh-ca"]);
    assert!(own.is_err(), "an authority of its own was made beside it: {own:?}");

    // Another one takes its place: it is announced beside the one that signs.
    let published = || {
        let found = scene.kubectl().json(&["get", "configmap", "-n", "shop", "nodemesh-ca-root-cert"]);
        let text = found.ok().and_then(|map| Some(map["data"]["root-cert.pem"].as_str()?.to_owned()));
        text.unwrap_or_default().matches("BEGIN CERTIFICATE").count()
    };
    eventually(SOON, published, |roots| *roots == 1)?;
    scene.plug_in(&Authority::root("of another company")?)?;
    eventually(SOON, published, |roots| *roots == 2)?;
    let another = request_for(&["spiffe://cluster.local/ns/shop/sa/till"])?;
    let granted = request_certificate_here(controller.xds(), &trust, &token, &another)?;
    assert_eq!(granted.status, 0, "until all have heard of the new one the old one signs: {granted:?}");
    the_next_controllers_know_the_old_root(&scene, controller)
}

/// A pod of a controller that is replaced takes its folder along, and what the old root signed is still about.
fn the_next_controllers_know_the_old_root(scene: &Scene, first: ControllerProcess) -> TestResult {
    let kubectl = scene.kubectl();
    let map = |namespace: &str| {
        let found = kubectl.json(&["get", "configmap", "-n", namespace, "nodemesh-ca-root-cert"]);
        found.unwrap_or_default()
    };
    let roots = |map: &Value| -> BTreeSet<String> {
        let text = map["data"]["root-cert.pem"].as_str().unwrap_or_default();
        text.split_inclusive("-----END CERTIFICATE-----\n").map(ToOwned::to_owned).collect()
    };
    let until = |map: &Value| {
        map["metadata"]["annotations"]["nodemesh.dev/retired-roots"].as_str().map(str::to_owned)
    };
    let own = eventually(SOON, || map(NAMESPACE), |own| roots(own).len() == 2 && until(own).is_some())?;
    let mut previous = first;
    for name in ["b", "c"] {
        previous.kill();
        let next = scene.controller(name, &[])?;
        // The next one writes once it leads, what it knows.
        kubectl.run(&["delete", "configmap", "-n", "shop", "nodemesh-ca-root-cert"])?;
        let written = eventually(Duration::from_secs(60), || map("shop"), |found| !roots(found).is_empty())?;
        assert_eq!(roots(&written), roots(&own), "controller {name}");
        assert_eq!(until(&written), None, "it is for controllers");
        assert_eq!(until(&map(NAMESPACE)), until(&own), "controller {name} lets it last longer");
        previous = next;
    }
    Ok(())
}
