//! What every test here needs: requests and what is wanted of their answers, manifests of routes, and the servers.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::web::messages::{Ask, Call, Called, Script, Told};
use mesh_tests::web::{self, GRPC_PORT, HTTP_PORT, WebScene};
use mesh_tests::{Failure, Pod, TestResult, eventually};

pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Requests for a share, and how many of them a tenth may be: thirty are expected, the bounds are more than four standard
/// deviations away.
pub(crate) const DRAWS: usize = 300;
pub(crate) const A_TENTH: std::ops::RangeInclusive<usize> = 8..=53;

pub(crate) fn get(path: &str) -> Ask {
    Ask::get("web", path)
}

pub(crate) fn by(server: &'static str) -> impl Fn(&Told) -> bool {
    move |told| told.status == 200 && told.header("x-server") == Some(server)
}

pub(crate) fn is(status: u16) -> impl Fn(&Told) -> bool {
    move |told| told.status == status && told.header("x-server").is_none()
}

/// A route whose parent is the service `parent`, a name with whatever else limits it, such as `web, port: 80`.
pub(crate) fn route(kind: &str, name: &str, parent: &str, rules: &str) -> String {
    let version = match kind {
        "HTTPRoute" | "GRPCRoute" => "v1",
        _ => "v1alpha2",
    };
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    format!(
        "
apiVersion: gateway.networking.k8s.io/{version}
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  parentRefs: [{{group: '', kind: Service, namespace: shop, name: {parent}}}]
{rules}"
    )
}

/// The scene of web servers, with a service for each of the two versions: `web-v1` and `web-v2`.
pub(crate) fn set(test: &str) -> Result<WebScene, Failure> {
    let scene = WebScene::set(test)?;
    for version in ["v1", "v2"] {
        scene.shop.service_with(&format!("web-{version}"), 80, |service| {
            let service = service.selector("app", "web").selector("version", version);
            service.port("http", 80, HTTP_PORT).port("grpc", 90, GRPC_PORT)
        })?;
    }
    Ok(scene)
}

/// Waits until eight requests in a row from a pod are answered so.
pub(crate) fn settles(from: &Pod, to: SocketAddr, request: &Ask, ok: impl Fn(&Told) -> bool) -> TestResult {
    let script = Script { to, http2: false, requests: vec![request.clone(); 8] };
    let told = || web::ask(from, &script).map_err(|error| format!("{error:?}"));
    drop(eventually(SOON, told, |told| told.as_ref().is_ok_and(|told| told.iter().all(&ok)))?);
    Ok(())
}

/// A call of the scene's client to `web` with one message.
pub(crate) fn call(
    scene: &WebScene,
    method: &str,
    message: &str,
    headers: &[(&str, &str)],
) -> Result<Called, Failure> {
    call_with(scene, method, vec![message.to_owned()], headers)
}

/// The same with any number of messages.
pub(crate) fn call_with(
    scene: &WebScene,
    method: &str,
    messages: Vec<String>,
    headers: &[(&str, &str)],
) -> Result<Called, Failure> {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let (authority, method) = ("web:90".to_owned(), method.to_owned());
    web::call(
        &scene.client,
        &Call { to: scene.at(90), authority, method, messages, headers, deadline_ms: None },
    )
}
