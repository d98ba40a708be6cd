//! Nodes that are not ready: their pods are shown with the reason, and nothing is taken from those that run.

use std::process::Command;

use mesh_tests::{Failure, TestResult, eventually, programs, require_agent, require_api_server, test_name};
use serde_json::{Value, json};

use crate::scene::Scene;
use crate::{SOON, objects};

/// What `meshctl status` prints. That not all agents answer is its exit status, and not looked at.
fn status(scene: &Scene, args: &[&str]) -> Result<String, Failure> {
    let mut meshctl = Command::new(programs::meshctl()?);
    meshctl.arg("status").args(args).arg("--kubeconfig").arg(scene.kubectl().kubeconfig());
    Ok(String::from_utf8(meshctl.output()?.stdout)?)
}

/// Says what the node's own kubelet, or else Kubernetes' node controller, would.
fn set_node(scene: &Scene, node: &str, ready: &str, at: &str) -> TestResult {
    let condition = json!({"type": "Ready", "status": ready, "reason": "NodeStatusUnknown",
        "message": "Kubelet stopped posting node status.", "lastHeartbeatTime": at, "lastTransitionTime": at});
    let patch = json!({"status": {"conditions": [condition]}}).to_string();
    scene.kubectl().run(&["patch", "node", node, "--subresource=status", "--type=merge", "-p", &patch])?;
    Ok(())
}

#[test]
fn pods_of_a_node_that_is_not_ready_are_shown_with_the_reason_and_lose_nothing() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::till_only())?;
    kubectl.apply(&objects::pods_on(&[("waiting", "n1"), ("alone", "n2")]))?;
    // n1 has an agent, as far as anybody knows; n2 has none.
    kubectl.apply(&objects::agents(&["n1"]))?;
    scene.set_running("shop", "till-0", "10.1.0.1")?;
    set_node(&scene, "n1", "True", "2026-11-22T10:00:00Z")?;
    let controller = scene.controller("a", &[])?;
    let published = || controller.resources().unwrap_or_default();
    let has_all = |found: &crate::scene::Published| {
        ["shop/till-0", "shop/waiting", "shop/alone"]
            .iter()
            .all(|pod| found.iter().any(|(_, name, _)| name.contains(pod)))
    };
    let before = eventually(SOON, published, has_all)?;

    // Nobody has heard of the kubelet for a while; and it says a word now and then.
    set_node(&scene, "n1", "Unknown", "2026-11-22T10:01:00Z")?;
    set_node(&scene, "n1", "Unknown", "2026-11-22T10:02:00Z")?;
    // A change after it has arrived, so it has too.
    kubectl.apply(&objects::service("marker"))?;
    let is_marker = |name: &str| name.contains("shop/marker");
    let after = eventually(SOON, published, |found| found.iter().any(|(_, name, _)| is_marker(name)))?;
    let same = |found: &crate::scene::Published| {
        let mut found = found.clone();
        found.retain(|(kind, name, _)| kind != "source" && !is_marker(name));
        found
    };
    assert_eq!(same(&after), same(&before), "a kubelet that is silent ends no mutual TLS");

    let text = status(&scene, &[])?;
    let line = |what: &str| text.lines().find(|line| line.contains(what)).unwrap_or_default().to_owned();
    let unready = "its node n1 is not ready: NodeStatusUnknown: Kubelet stopped posting node status.";
    for (pod, state, reason) in [
        ("shop/waiting", "skipped", unready),
        ("shop/till-0", "unknown", unready),
        ("shop/alone", "skipped", "its node n2 has no agent"),
    ] {
        let line = line(pod);
        assert!(line.contains(state) && line.contains(reason), "{pod}: {line:?} in\n{text}");
    }
    let answers: Value = serde_json::from_str(&status(&scene, &["-o", "json"])?)?;
    let of_n1 = answers.as_array().into_iter().flatten().find(|of| of["node"] == "n1");
    let states = of_n1.map(|of| of["pods"].clone()).unwrap_or_default();
    assert_eq!((&states[0]["name"], &states[0]["state"]), (&json!("till-0"), &json!("unknown")), "{answers}");
    Ok(())
}
