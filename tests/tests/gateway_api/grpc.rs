//! GRPCRoutes: calls by service, method and header, and what filters do to them.

use mesh_tests::web::messages::{Called, Script};
use mesh_tests::web::{self, WebScene};
use mesh_tests::{Failure, TestResult, eventually, require_agent, test_name};

use crate::scene::{SOON, call, call_with, get, is, route, set};

/// Waits until calls that no rule is about are refused; the server would answer them.
fn settles(scene: &WebScene) -> TestResult {
    let code =
        || call(scene, "Slow", "1", &[]).map(|called| called.code).map_err(|error| format!("{error:?}"));
    eventually(SOON, code, |code| *code == Ok(12))?.ok();
    Ok(())
}

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
    settles(&scene)?;
    for _ in 0..6 {
        assert_eq!(call(&scene, "Unary", "hi", &[])?.said(), Ok(vec!["v1: hi"]));
        assert_eq!(call(&scene, "Unary", "hi", &[("x-version", "two")])?.said(), Ok(vec!["v2: hi"]));
        assert_eq!(call(&scene, "Unary", "hi", &[("x-version", "three")])?.said(), Ok(vec!["v1: hi"]));
        assert_eq!(call(&scene, "Talk", "hi", &[])?.said(), Ok(vec!["v2: hi"]));
    }
    let gone = call(&scene, "Fail", "9", &[])?;
    assert_eq!((gone.code, gone.messages.len()), (14, 0), "{gone:?}");
    assert_eq!(scene.ask(get("/"))?.status, 200, "another port has no route");
    // What is no call has no code.
    let page = web::ask(
        &scene.client,
        &Script { to: scene.at(90), http2: true, requests: vec![get("/echo.Echo/Slow").method("POST")] },
    )?;
    assert!(is(404)(&page[0]), "{page:?}");
    Ok(())
}

const FILTERS: &str = "
  rules:
  - matches: [{method: {service: echo.Echo}}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: x-set, value: new}], add: [{name: x-add, value: two}], remove: [x-gone]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: x-answer, value: changed}], add: [{name: x-server, value: mesh}], remove: [x-calls]}
    backendRefs:
    - name: web-v1
      port: 90
      filters:
      - type: RequestHeaderModifier
        requestHeaderModifier: {set: [{name: x-backend, value: one}]}
      - type: ResponseHeaderModifier
        responseHeaderModifier: {set: [{name: x-from, value: one}]}
  - matches: [{method: {service: echo.Echo}, headers: [{name: x-version, value: 'tw.', type: RegularExpression}]}]
    filters:
    - {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [x-server]}}
    backendRefs:
    - {name: web-v2, port: 90, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-backend, value: two}]}}]}
  - matches: [{method: {service: echo.Echo, method: Copied}}]
    filters: [{type: ExtensionRef, extensionRef: {group: nobody.example, kind: Filter, name: none}}]
    backendRefs: [{name: web-v1, port: 90}]
  - matches: [{method: {service: echo.Echo, method: Mirrored}}]
    backendRefs:
    - {name: web-v1, port: 90, filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 90}}}]}
";

/// All values of a header.
fn all<'a>(fields: &'a [(String, String)], name: &str) -> Vec<&'a str> {
    fields.iter().filter(|(own, _)| own == name).map(|(_, value)| value.as_str()).collect()
}

#[test]
fn filters_change_headers_of_calls_and_responses_and_leave_messages_and_trailers_alone() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    scene.apply("calls.yaml", &route("GRPCRoute", "calls", "web, port: 90", FILTERS))?;
    let headers = [("x-set", "old"), ("x-add", "one"), ("x-gone", "1")];
    let tell = |headers: &[(&str, &str)]| call(&scene, "Tell", "", headers);
    let changed = || tell(&headers).map_err(|error| format!("{error:?}"));
    eventually(SOON, changed, |told| told.as_ref().is_ok_and(|told| told.header("x-answer").is_some()))?.ok();

    let told = tell(&headers)?;
    let seen = told.seen()?;
    assert_eq!(
        (seen.server.as_str(), seen.host.as_str(), seen.version.as_str()),
        ("v1", "web:90", "HTTP/2.0")
    );
    assert_eq!((seen.header("x-set"), seen.header("x-gone")), (Some("new"), None));
    assert_eq!(
        (all(&seen.headers, "x-add").join(","), seen.header("x-backend")),
        ("one,two".into(), Some("one"))
    );
    assert_eq!((told.header("x-answer"), told.header("x-from")), (Some("changed"), Some("one")));
    assert_eq!(all(&told.headers, "x-server"), ["v1", "mesh"]);

    // Another rule for some, on the other node.
    let told = tell(&[("x-version", "two"), ("x-backend", "mine"), ("x-gone", "1")])?;
    let seen = told.seen()?;
    assert_eq!((seen.server.as_str(), seen.header("x-gone")), ("v2", Some("1")));
    assert_eq!(all(&seen.headers, "x-backend"), ["mine", "two"]);
    assert_eq!((told.header("x-server"), told.header("x-answer"), told.header("x-from")), (None, None, None));
    assert_eq!(tell(&[("x-version", "twofold")])?.seen()?.server, "v1");

    // All shapes of calls: a modifier is about headers, and what comes behind the messages stays.
    for (version, headers) in [("v1", vec![]), ("v2", vec![("x-version", "two")])] {
        for (method, count) in [("Unary", 1), ("Many", 40), ("Talk", 30)] {
            for calls in ["1", "2"] {
                let messages = match method {
                    "Talk" => (0..count).map(|n| format!("message {n}")).collect(),
                    "Many" => vec![count.to_string()],
                    _ => vec!["hi".to_owned()],
                };
                let called = call_with(&scene, method, messages, &headers)?;
                assert_eq!((called.code, called.messages.len()), (0, count), "{version} {method}");
                assert_eq!(called.trailer("x-calls"), Some(calls), "{version} {method}: {called:?}");
                assert_eq!(called.header("x-answer").is_some(), version == "v1", "{version} {method}");
                assert_eq!(called.trailer("x-answer"), None, "{version} {method}");
            }
        }
        // A response that is nothing but a status has only headers.
        let failed = call_with(&scene, "Fail", vec!["9".to_owned()], &headers)?;
        assert_eq!(failed.said(), Err((9, "as asked")), "{version}");
        let calls = (version == "v2").then_some("1");
        assert_eq!((failed.header("x-calls"), failed.trailers.len()), (calls, 0), "{version}");
        assert_eq!(failed.header("x-answer").is_some(), version == "v1", "{version}");
    }

    // Filters that the mesh does not have are no reason to leave them out.
    for method in ["Copied", "Mirrored"] {
        let refused = call(&scene, method, "hi", &[])?;
        assert_eq!((refused.code, refused.header("x-server")), (14, None), "{method}: {refused:?}");
    }
    Ok(())
}

const MIRRORS: &str = "
  rules:
  - matches: [{method: {service: echo.Echo, method: Unary}}, {method: {service: echo.Echo, method: Talk}}, {method: {service: echo.Echo, method: Fail}}]
    filters:
    - {type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 90}}}
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-copied, value: 'yes'}]}}
    backendRefs: [{name: web-v1, port: 90}]
  - matches: [{method: {service: echo.Echo, method: Many}}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 90}, percent: 0}}]
    backendRefs: [{name: web-v1, port: 90}]
  - matches: [{method: {service: echo.Echo, method: Tell}}]
    backendRefs: [{name: web-v2, port: 90}]
";

#[test]
fn copies_of_calls_reach_the_mirror_and_its_answers_nobody() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    scene.apply("calls.yaml", &route("GRPCRoute", "calls", "web, port: 90", MIRRORS))?;
    settles(&scene)?;
    let good = |called: Called, wanted: &[String]| -> Result<(), Failure> {
        assert_eq!((called.code, &called.messages[..]), (0, wanted));
        assert_eq!(called.header("x-server"), Some("v1"));
        assert!(called.trailer("x-calls").is_some(), "{called:?}");
        Ok(())
    };
    for round in 0..5 {
        good(call(&scene, "Unary", &round.to_string(), &[])?, &[format!("v1: {round}")])?;
        let talk = (0..20).map(|n| n.to_string()).collect();
        let answers: Vec<String> = (0..20).map(|n| format!("v1: {n}")).collect();
        good(call_with(&scene, "Talk", talk, &[])?, &answers)?;
        good(call(&scene, "Many", "2", &[])?, &["0".to_owned(), "1".to_owned()])?;
        assert_eq!(call(&scene, "Fail", "5", &[])?.said(), Err((5, "as asked")));
    }
    // Version 2 tells what it has had.
    let had = || {
        let so_far =
            call(&scene, "Tell", "", &[]).ok()?.seen().ok().filter(|seen| seen.server == "v2")?.so_far;
        let count = |method: &str| so_far.get(&format!("/echo.Echo/{method}")).copied().unwrap_or_default();
        Some([count("Unary"), count("Talk"), count("Fail"), count("Many")])
    };
    eventually(SOON, had, |had| *had == Some([5, 5, 5, 0]))?;
    Ok(())
}
