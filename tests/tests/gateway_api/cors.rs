//! The CORS filter of HTTPRoutes: who answers a preflight, and what a response may show to whom.

use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::web::{self, WebScene};
use mesh_tests::{Failure, TestResult, require_agent, test_name};

use crate::scene::{by, get, is, route, set};

const APP: &str = "https://app.example";

const RULES: &str = "
  rules:
  - matches: [{path: {type: PathPrefix, value: /api}}]
    filters:
    - type: CORS
      cors:
        allowOrigins: ['https://app.example', 'https://*.shop.example', 'http://local.example:8080', 'https://well-known.example:443']
        allowMethods: [GET, PUT]
        allowHeaders: [x-token, content-type]
        exposeHeaders: [x-server, x-connection]
        allowCredentials: true
        maxAge: 600
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /open}}]
    filters: [{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], exposeHeaders: ['*']}}]
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /private}}]
    filters:
    - type: CORS
      cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], exposeHeaders: ['*'], allowCredentials: true}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /secure}}]
    filters: [{type: CORS, cors: {allowOrigins: ['https://*'], allowCredentials: false}}]
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /own}}]
    filters:
    - {type: CORS, cors: {allowOrigins: ['https://app.example']}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: access-control-allow-origin, value: 'https://own.example'}]}}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /gone}}]
    filters: [{type: CORS, cors: {allowOrigins: ['https://app.example']}}]
    backendRefs: [{name: gone, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /moved}}]
    filters:
    - {type: CORS, cors: {allowOrigins: ['https://app.example']}}
    - {type: RequestRedirect, requestRedirect: {hostname: new.example}}
  - matches: [{path: {type: PathPrefix, value: /plain}}]
    backendRefs: [{name: web-v1, port: 80}]
";

fn preflight(path: &str, origin: &str, method: &str) -> Ask {
    get(path).method("OPTIONS").header("origin", origin).header("access-control-request-method", method)
}

/// What an answer says to browsers, without the names' common beginning.
fn said(told: &Told) -> Vec<String> {
    let said = told.headers.iter().filter_map(|(name, value)| {
        name.strip_prefix("access-control-").map(|name| format!("{name}: {value}"))
    });
    let mut said: Vec<String> = said.collect();
    said.sort_unstable();
    said
}

/// Preflights are answered by the mesh, whatever it says in them.
fn asked_before(scene: &WebScene, request: Ask) -> Result<Vec<String>, Failure> {
    let told = scene.ask(request)?;
    assert!(is(200)(&told) && told.bytes == 0, "{told:?}");
    Ok(said(&told))
}

#[test]
fn preflights_are_answered_by_the_mesh_and_responses_are_shared_with_allowed_origins_alone() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    scene.apply("cors.yaml", &route("HTTPRoute", "cors", "web", RULES))?;
    scene.settles(get("/neither"), is(404))?;

    let nothing: [&str; 0] = [];
    for (origin, is_allowed) in [
        (APP, true),
        ("https://well-known.example", true),
        ("https://a.shop.example", true),
        ("https://a.b.shop.example", true),
        ("http://local.example:8080", true),
        ("http://app.example", false),
        ("https://app.example:8443", false),
        ("https://app.example.evil.example", false),
        ("https://shop.example", false),
        ("https://another-shop.example", false),
        ("https://a.shop.example:8443", false),
        ("http://local.example", false),
        ("null", false),
    ] {
        let before = asked_before(&scene, preflight("/api/x", origin, "PUT"))?;
        let shared = scene.ask(get("/api/x").method("PUT").header("origin", origin))?;
        assert!(by("v1")(&shared), "{origin}: {shared:?}");
        if is_allowed {
            let both = ["allow-credentials: true", &format!("allow-origin: {origin}")];
            let lists = ["allow-headers: x-token,content-type", "allow-methods: GET,PUT"];
            assert_eq!(before, [both[0], lists[0], lists[1], both[1], "max-age: 600"], "{origin}");
            assert_eq!(
                said(&shared),
                [both[0], both[1], "expose-headers: x-server,x-connection"],
                "{origin}"
            );
        } else {
            assert_eq!((before, said(&shared)), (Vec::new(), Vec::new()), "{origin}");
        }
    }
    // Without an origin nobody asks for anything, and without a method it is no preflight: the server has it.
    assert_eq!(said(&scene.ask(get("/api/x"))?), nothing);
    let options = scene.ask(get("/api/options").method("OPTIONS").header("origin", APP))?;
    assert_eq!((options.seen()?.method.as_str(), said(&options).len()), ("OPTIONS", 3));
    let plain = scene.ask(preflight("/plain", APP, "PUT"))?;
    assert_eq!((plain.seen()?.method.as_str(), said(&plain)), ("OPTIONS", Vec::new()), "a rule without it");

    // The version of HTTP is no matter.
    let requests = vec![preflight("/api/x", APP, "PUT"), get("/api/x").header("origin", APP)];
    let told = web::ask(&scene.client, &Script { to: scene.at(82), http2: true, requests })?;
    assert_eq!(told.iter().map(|told| said(told).len()).collect::<Vec<_>>(), [5, 3], "{told:?}");
    assert!(is(200)(&told[0]) && by("v1")(&told[1]), "{told:?}");

    // The server has had what is no preflight: 13 origins, one request without an origin, and one by HTTP/2.
    let had = scene.ask(get("/plain"))?.seen()?.so_far;
    let count = |path: &str| had.get(path).copied().unwrap_or_default();
    assert_eq!((count("/api/x"), count("/api/options"), count("/plain")), (15, 1, 2), "{had:?}");
    Ok(())
}

#[test]
fn stars_allow_everything_and_are_not_said_where_credentials_are_allowed() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    scene.apply("cors.yaml", &route("HTTPRoute", "cors", "web", RULES))?;
    scene.settles(get("/neither"), is(404))?;
    let shared =
        |path: &str, origin: &str| Ok::<_, Failure>(said(&scene.ask(get(path).header("origin", origin))?));

    let origin = "http://any.example:81";
    let ask = |path: &str| preflight(path, origin, "PATCH");
    let allowed = format!("allow-origin: {origin}");
    assert_eq!(
        asked_before(&scene, ask("/open").header("access-control-request-headers", "x-a,x-b"))?,
        ["allow-headers: *", "allow-methods: *", &allowed, "max-age: 5"]
    );
    assert_eq!(shared("/open", origin)?, [&*allowed, "expose-headers: *"]);
    assert_eq!(shared("/open", "null")?, ["allow-origin: null", "expose-headers: *"]);

    // A browser takes a star literally there.
    let credentials = "allow-credentials: true";
    assert_eq!(
        asked_before(&scene, ask("/private").header("access-control-request-headers", "x-a,x-b"))?,
        [credentials, "allow-headers: x-a,x-b", "allow-methods: PATCH", &allowed, "max-age: 5"]
    );
    assert_eq!(
        asked_before(&scene, ask("/private"))?,
        [credentials, "allow-methods: PATCH", &allowed, "max-age: 5"]
    );
    assert_eq!(shared("/private", origin)?, [credentials, &*allowed]);

    // A host of any name has the port of its scheme.
    for origin in ["https://a", "https://[fd00::1]"] {
        assert_eq!(shared("/secure", origin)?, [format!("allow-origin: {origin}")]);
    }
    for origin in ["https://b.example:8443", "http://b.example", "null"] {
        assert_eq!(shared("/secure", origin)?, Vec::<String>::new(), "{origin}");
    }

    // What the filter says takes the place of what the response says itself, and is in answers of the mesh, too.
    let app = ["allow-origin: https://app.example"];
    assert_eq!(shared("/own", APP)?, app);
    assert_eq!(shared("/own", "https://b.example")?, ["allow-origin: https://own.example"]);
    for (path, status) in [("/gone", 500), ("/moved", 302)] {
        let told = scene.ask(get(path).header("origin", APP))?;
        assert!(is(status)(&told), "{told:?}");
        assert_eq!(said(&told), app, "{path}");
        assert_eq!(asked_before(&scene, preflight(path, APP, "GET"))?, [app[0], "max-age: 5"], "{path}");
    }
    Ok(())
}
