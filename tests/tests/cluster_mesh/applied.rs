//! What operators apply: a split, a policy, a broken resource, and what the controller says of them.

use std::net::SocketAddr;

use anyhow::ensure;
use mesh_tests::cluster::{Cluster, Mesh};
use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::{TestResult, eventually};

use crate::scene::LIMIT;

/// A split, a policy and a broken resource.
pub(crate) fn what_is_applied_holds(cluster: &Cluster, mesh: &Mesh<'_>, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let split = |v1: u8, v2: u8| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: web, namespace: shop}}, spec: {{hosts: [web], \
             http: [{{route: [{{destination: {{host: web-v1}}, weight: {v1}}}, {{destination: {{host: web-v2}}, weight: {v2}}}]}}]}}}}"
        )
    };
    let client = cluster.pod("shop", "client");
    let versions = || -> anyhow::Result<(usize, usize)> {
        let script = Script { to: web, http2: false, requests: vec![Ask::get("web", "/"); 60] };
        let told = client.ask(&script)?;
        ensure!(told.iter().all(|told| told.status == 200), "{told:?}");
        let v2 = told.iter().filter(|told| told.seen().is_ok_and(|seen| seen.server == "v2")).count();
        Ok((told.len() - v2, v2))
    };
    kubectl.apply(&split(0, 100))?;
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|seen| *seen == (0, 60)))??;
    kubectl.apply(&split(90, 10))?;
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|(v1, v2)| v1 > v2 && *v2 > 0))??;
    is_judged(cluster, "web")?;

    // The other namespace joins too, and is let in until a policy says otherwise.
    mesh.enrol("outside")?;
    let neighbour = || cluster.pod("outside", "client").get(web, "web", "/");
    let let_in = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status == 200);
    eventually(LIMIT, neighbour, let_in)??;
    kubectl.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: not-you, namespace: shop}, spec: {action: DENY, \
         rules: [{from: [{source: {namespaces: [outside]}}]}]}}",
    )?;
    eventually(LIMIT, neighbour, |told| !let_in(told))??;
    kubectl.run(&["delete", "authorizationpolicy", "-n", "shop", "not-you"])?;
    eventually(LIMIT, neighbour, let_in)??;

    let broken = split(90, 10).replace("weight: 90", "weight: 90, weigth: 1");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("weigth"), "{refused}");
    let broken = split(90, 10).replace("host: web-v1", "host: ''");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("spec.http[0].route[0].destination.host"), "{refused}");
    Ok(())
}

/// Waits until the leading controller has said of a VirtualService that it is used.
pub(crate) fn is_judged(cluster: &Cluster, name: &str) -> TestResult {
    let path = r#"jsonpath={.status.conditions[?(@.type=="Reconciled")].status}"#;
    let status = || cluster.kubectl().run(&["get", "virtualservice", "-n", "shop", name, "-o", path]);
    eventually(LIMIT, status, |status| status.as_ref().is_ok_and(|status| status == "True"))??;
    Ok(())
}
