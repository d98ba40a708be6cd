//! GRPCRoutes: calls by service, method and header.

use mesh_tests::web::messages::Called;
use mesh_tests::{TestResult, eventually, require_agent, test_name};

use crate::scene::{SOON, call, get, route, set};

#[test]
fn calls_of_grpc_are_routed_by_service_method_and_header() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    let rules = "
  rules:
  - matches: [{method: {service: echo.Echo, method: Unary}}]
    backendRefs: [{name: web-v1, port: 90}]
  - matches: [{method: {service: echo.Echo, method: Unary}, headers: [{name: x-version, value: two}]}, {method: {method: Talk}}]
    backendRefs: [{name: web-v2, port: 90}]
  - matches: [{method: {type: RegularExpression, service: 'echo\\..*', method: 'Fai.'}}]
    backendRefs: [{name: gone, port: 90}]
  - matches: [{method: {service: other.Echo}}]
    backendRefs: [{name: web-v1, port: 90}]
";
    scene.apply("calls.yaml", &route("GRPCRoute", "calls", "web, port: 90", rules))?;
    // No rule is about it; the server would answer.
    let code =
        || call(&scene, "Slow", "1", &[]).map(|called| called.code).map_err(|error| format!("{error:?}"));
    eventually(SOON, code, |code| *code == Ok(12))?.ok();
    let good = |text: &str| Called { code: 0, message: String::new(), messages: vec![text.to_owned()] };
    for _ in 0..6 {
        assert_eq!(call(&scene, "Unary", "hi", &[])?, good("v1: hi"));
        assert_eq!(call(&scene, "Unary", "hi", &[("x-version", "two")])?, good("v2: hi"));
        assert_eq!(call(&scene, "Unary", "hi", &[("x-version", "three")])?, good("v1: hi"));
        assert_eq!(call(&scene, "Talk", "hi", &[])?, good("v2: hi"));
    }
    let gone = call(&scene, "Fail", "9", &[])?;
    assert_eq!((gone.code, gone.messages.len()), (14, 0), "{gone:?}");
    assert_eq!(scene.ask(get("/"))?.status, 200, "another port has no route");
    Ok(())
}
