//! Retries of HTTPRoutes: which answers are asked for once more, how often, and within which time.

use mesh_tests::web::WebScene;
use mesh_tests::web::messages::Ask;
use mesh_tests::{Failure, TestResult, require_agent, test_name};

use crate::scene::{get, is, route, set};

const RULES: &str = "
  rules:
  - matches: [{path: {type: PathPrefix, value: /near}}]
    retry: {codes: [503, 429], attempts: 3, backoff: 10ms}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /far}}]
    retry: {codes: [503, 429], attempts: 3, backoff: 10ms}
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /default}}]
    retry: {codes: [500]}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /unwritten}}]
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /off}}]
    retry: {codes: [503], attempts: 0}
    timeouts: {request: 50s, backendRequest: 1s}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /slow}}]
    retry: {codes: [503], attempts: 2, backoff: 10ms}
    timeouts: {request: 50s, backendRequest: 2s}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /late}}]
    retry: {codes: [503], attempts: 50, backoff: 10ms}
    timeouts: {request: 3s, backendRequest: 1s}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /patient}}]
    retry: {codes: [503], attempts: 1, backoff: 10h}
    timeouts: {request: 2s}
    backendRefs: [{name: web-v1, port: 80}]
";

fn retrying(test: &str) -> Result<WebScene, Failure> {
    let scene = set(test)?;
    scene.apply("retries.yaml", &route("HTTPRoute", "retries", "web", RULES))?;
    scene.settles(get("/neither"), is(404))?;
    Ok(scene)
}

/// Status and tries of a request that a server answers in the end: it counts requests by path.
fn tries(scene: &WebScene, request: Ask) -> Result<(u16, u64), Failure> {
    let path = request.path.split('?').next().unwrap_or_default().to_owned();
    let told = scene.ask(request)?;
    let seen = told.seen()?;
    let tries = seen.so_far.get(&path).copied().unwrap_or_default();
    assert_eq!(seen.header("x-envoy-attempt-count"), Some(&*tries.to_string()), "{seen:?}");
    Ok((told.status, tries))
}

#[test]
fn answers_of_listed_codes_are_asked_for_again_as_often_as_the_route_says() -> TestResult {
    require_agent!();
    let scene = retrying(test_name!())?;
    // The server fails so often, and says what it says in the end.
    for (path, wanted) in [
        ("/near/once?status=503&times=1", (200, 2)),
        ("/near/thrice?status=503&times=3", (200, 4)),
        ("/near/other?status=429&times=2", (200, 3)),
        ("/near/unlisted?status=500&times=1", (500, 1)),
        ("/near/unlisted-4xx?status=404&times=1", (404, 1)),
        ("/near/good", (200, 1)),
        ("/near/always?status=503", (503, 4)),
        ("/near/once-too-often?status=503&times=4", (503, 4)),
        ("/far/twice?status=503&times=2", (200, 3)),
        ("/far/always?status=503", (503, 4)),
        ("/default/twice?status=500&times=2", (200, 3)),
        ("/default/always?status=500", (500, 3)),
        ("/unwritten/once?status=503&times=1", (503, 1)),
        ("/off/once?status=503&times=1", (503, 1)),
        // Whoever writes `retry` has lost connections made good too.
        ("/near/lost?reset=1&times=2", (200, 3)),
        ("/far/lost?reset=1&times=2", (200, 3)),
    ] {
        assert_eq!(tries(&scene, get(path))?, wanted, "{path}");
    }
    for path in
        ["/unwritten/lost?reset=1&times=1", "/off/lost?reset=1&times=1", "/near/never?reset=1&times=4"]
    {
        let told = scene.ask(get(path))?;
        assert!(is(503)(&told), "{path}: {told:?}");
    }
    // With its body.
    for side in ["near", "far"] {
        let path = format!("/{side}/posted?status=503&times=2");
        let told = scene.ask(get(&path).posting(20_000))?;
        let seen = told.seen()?;
        assert_eq!((told.status, seen.bytes, seen.method.as_str()), (200, 20_000, "POST"));
        assert_eq!(seen.so_far.get(&format!("/{side}/posted")), Some(&3));
    }
    Ok(())
}

#[test]
fn tries_have_a_time_each_and_one_for_them_all() -> TestResult {
    require_agent!();
    let scene = retrying(test_name!())?;
    // One try takes too long; the next is well.
    assert_eq!(tries(&scene, get("/slow/once?delay=60000&times=1"))?, (200, 2));
    // Each of them does: the answer is the mesh's.
    let so_far = |path: &str| -> Result<u64, Failure> {
        // This request is counted, too.
        let seen = scene.ask(get(path))?.seen()?;
        Ok(seen.so_far.get(path).copied().unwrap_or_default() - 1)
    };
    let timed_out = |path: &str| -> TestResult {
        let told = scene.ask(get(path))?;
        assert!(is(504)(&told) && told.text == "upstream request timeout", "{path}: {told:?}");
        Ok(())
    };
    timed_out("/slow/always?delay=60000&times=3")?;
    assert_eq!(so_far("/slow/always")?, 3);
    // The time of a try holds where none is repeated.
    timed_out("/off/slow?delay=20000&times=1")?;
    assert_eq!(so_far("/off/slow")?, 1);

    // Fifty tries of a second each do not fit into three.
    timed_out("/late/always?delay=60000&times=51")?;
    let late = scene.ask(get("/near/count"))?.seen()?.so_far.get("/late/always").copied();
    assert!(matches!(late, Some(1..=3)), "{late:?}");
    // Neither does the pause before a second one fit, which is any time up to ten hours.
    timed_out("/patient/once?status=503&times=1")?;
    assert_eq!(so_far("/patient/once")?, 1);
    Ok(())
}
