//! Routes of the Gateway API that are attached to services, end to end: manifests, the real agent, real servers on two nodes.

mod cors;
mod grpc;
mod retries;
mod scene;
mod streams;

use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::web::messages::Script;
use mesh_tests::web::{self, HTTP_PORT, WebServer};
use mesh_tests::{TestResult, World, eventually, require_agent, test_name};

use scene::{A_TENTH, DRAWS, SOON, by, call, get, is, route, set, settles};

const OLDER: &str = "
  rules:
  - backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /a}}]
    backendRefs: [{name: web-v1, port: 80}]
";

/// The same prefix as the older route's, and what comes before it.
const YOUNGER: &str = "
  rules:
  - matches:
    - path: {type: PathPrefix, value: /a}
    - path: {type: Exact, value: /a/exact}
    - path: {type: PathPrefix, value: /a/longer}
    - {path: {type: PathPrefix, value: /a}, method: PUT}
    - {path: {type: PathPrefix, value: /a}, headers: [{name: X-Version, value: two}]}
    - {path: {type: PathPrefix, value: /a}, queryParams: [{name: version, value: 'tw.', type: RegularExpression}]}
    - path: {type: RegularExpression, value: '/item/[0-9]+'}
    backendRefs: [{name: web-v2, port: 80}]
";

#[test]
fn requests_meet_the_most_specific_match_of_all_routes_of_their_services_port() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    // Of two ages; and a third route for another port alone.
    let aged = |name: &str, year: u32, rules: &str| {
        let text = route("HTTPRoute", name, "web, port: 80", rules);
        text.replace(
            ", namespace: shop}\nspec",
            &format!(", namespace: shop, creationTimestamp: '{year}-01-01T00:00:00Z'}}\nspec"),
        )
    };
    scene.apply("a-younger.yaml", &aged("a-younger", 2025, YOUNGER))?;
    scene.apply("z-older.yaml", &aged("z-older", 2024, OLDER))?;
    let only = "
  rules:
  - matches: [{path: {type: PathPrefix, value: /only}}]
    backendRefs: [{name: web-v2, port: 80}]
";
    scene.apply("other-port.yaml", &route("HTTPRoute", "other-port", "web, port: 82", only))?;
    // The VirtualService of the scene sends requests to both; where a route is attached it has no effect any more.
    scene.settles(get("/"), by("v1"))?;
    scene.settles(get("/a/exact"), by("v2"))?;
    for (request, server) in [
        (get("/a"), "v1"),
        (get("/a/"), "v1"),
        (get("/a/b"), "v1"),
        (get("/a/exact"), "v2"),
        (get("/a/exact/not"), "v1"),
        (get("/a/longer"), "v2"),
        (get("/a/longer/x"), "v2"),
        // A prefix is of whole segments.
        (get("/a/longerx"), "v1"),
        (get("/a/b").method("PUT"), "v2"),
        (get("/a/b").method("POST"), "v1"),
        (get("/a/b").header("x-version", "two"), "v2"),
        (get("/a/b").header("x-version", "Two"), "v1"),
        (get("/a/b?x=1&version=two"), "v2"),
        (get("/a/b?version=twofold"), "v1"),
        (get("/item/42"), "v2"),
        (get("/item/42x"), "v1"),
        (get("/b").header("x-version", "two"), "v1"),
    ] {
        let script = Script { to: scene.vip.v4, http2: false, requests: vec![request.clone(); 3] };
        let told = web::ask(&scene.client, &script)?;
        assert!(told.iter().all(by(server)), "{request:?}, wanted {server}: {told:?}");
    }
    // Port 82 has its own route, and answers what that does not match; 90 has none and its VirtualService.
    settles(&scene.client, scene.at(82), &get("/only/x"), by("v2"))?;
    settles(&scene.client, scene.at(82), &get("/a/exact"), is(404))?;
    assert_eq!(call(&scene, "Unary", "hi", &[])?.code, 0);
    Ok(())
}

const ACTIONS: &str = "
  rules:
  - matches: [{path: {type: PathPrefix, value: /edit}}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: x-set, value: new}], add: [{name: x-add, value: two}], remove: [x-gone]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: x-answer, value: changed}], remove: [x-connection]}
    - type: URLRewrite
      urlRewrite: {hostname: inner.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: Exact, value: /whole}}]
    filters:
    - {type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /other}}}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {scheme: https, hostname: new.example, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
  - matches: [{path: {type: PathPrefix, value: /copied}}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 80}}}]
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /slow}}]
    timeouts: {request: 300ms}
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /share}}]
    backendRefs:
    - {name: web-v1, port: 80, weight: 90}
    - name: web-v2
      port: 80
      weight: 10
      filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-tenth, value: 'yes'}]}}]
    - {name: gone, port: 80, weight: 0}
  - matches: [{path: {type: PathPrefix, value: /broken}}]
    backendRefs: [{name: web-v1, port: 80, weight: 90}, {name: gone, port: 80, weight: 10}]
  - matches: [{path: {type: Exact, value: /nobody}}]
  - matches: [{path: {type: Exact, value: /nothing}}]
    backendRefs: [{name: web-v1, port: 80, weight: 0}]
  - matches: [{path: {type: PathPrefix, value: /count}, headers: [{name: version, value: v2}]}]
    backendRefs: [{name: web-v2, port: 80}]
";

#[test]
fn an_http_route_changes_redirects_copies_limits_and_shares_requests() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    scene.apply("actions.yaml", &route("HTTPRoute", "actions", "web", ACTIONS))?;
    scene.settles(get("/neither"), is(404))?;

    for (path, wanted) in [("/edit/x?q=1", "/x?q=1"), ("/edit", "/"), ("/edit/", "/")] {
        let request = get(path).header("x-gone", "1").header("x-add", "one").header("x-set", "old");
        let told = scene.ask(request)?;
        let seen = told.seen()?;
        let about = (seen.server.as_str(), seen.path.as_str(), seen.host.as_str());
        assert_eq!(about, ("v2", wanted, "inner.example"), "{path}");
        assert_eq!((seen.header("x-set"), seen.header("x-gone")), (Some("new"), None));
        let added = seen.headers.iter().filter(|(name, _)| name == "x-add").map(|(_, value)| value.as_str());
        assert_eq!(added.collect::<Vec<_>>().join(","), "one,two");
        assert_eq!((told.header("x-answer"), told.header("x-connection")), (Some("changed"), None));
    }
    assert_eq!(scene.ask(get("/edited"))?.status, 404, "another segment");
    assert_eq!(scene.ask(get("/whole?q=1"))?.seen()?.path, "/other?q=1");
    let moved = scene.ask(get("/old/x?q=1"))?;
    assert_eq!((moved.status, moved.header("location")), (301, Some("https://new.example/new/x?q=1")));
    let late = scene.ask(get("/slow?delay=5000"))?;
    assert_eq!((late.status, late.header("x-server")), (504, None));
    assert!(late.ms < 4000, "{late:?}");
    assert_eq!(scene.ask(get("/slow?delay=0"))?.status, 200);

    // Shares, of those that are good and of those that are not.
    let many = |path: &str| {
        web::ask(&scene.client, &Script { to: scene.vip.v4, http2: false, requests: vec![get(path); DRAWS] })
    };
    let told = many("/share")?;
    assert!(told.iter().all(|told| told.status == 200), "{told:?}");
    let second = told.iter().filter(|told| by("v2")(told)).collect::<Vec<_>>();
    assert!(A_TENTH.contains(&second.len()), "{} of {DRAWS}", second.len());
    for one in second {
        assert_eq!(one.seen()?.header("x-tenth"), Some("yes"), "a change for one backend");
    }
    assert!(told.iter().filter(|told| by("v1")(told)).all(|told| !told.text.contains("x-tenth")));
    let told = many("/broken")?;
    let (good, bad) =
        (told.iter().filter(|told| by("v1")(told)).count(), told.iter().filter(|told| is(500)(told)));
    let bad = bad.count();
    assert!(A_TENTH.contains(&bad) && good + bad == DRAWS, "{bad} of {DRAWS} are 500, {good} are good");
    for path in ["/nobody", "/nothing"] {
        assert!(is(500)(&scene.ask(get(path))?), "{path}");
    }

    // Version 2 had the copies, version 1 gave the answers.
    let posts = vec![get("/copied").posting(2000); 10];
    let told = web::ask(&scene.client, &Script { to: scene.vip.v4, http2: false, requests: posts })?;
    assert!(told.iter().all(by("v1")), "{told:?}");
    let had = || {
        let told = scene.ask(get("/count").header("version", "v2")).ok()?;
        Some(*told.seen().ok().filter(|seen| seen.server == "v2")?.so_far.get("/copied")?)
    };
    eventually(SOON, had, |had| *had == Some(10))?;
    Ok(())
}

const GRANT: &str = "
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: to-far, namespace: store}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: '', kind: Service, name: far}]
";

#[test]
fn a_consumers_route_is_for_its_own_namespace_and_backends_elsewhere_want_a_grant() -> TestResult {
    require_agent!();
    let scene = set(test_name!())?;
    let manifests = scene.shop.world().manifests();
    let mut pods = Vec::new();
    for (namespace, name) in [("team", "visitor"), ("store", "far")] {
        manifests.apply(NamespaceManifest::meshed(namespace))?;
        let pod = scene.shop.world().node("b")?.pod(&format!("{namespace}/{name}"))?;
        manifests.apply(pod.manifest().port("http", HTTP_PORT))?;
        pods.push(pod);
    }
    let (visitor, far) = (&pods[0], &pods[1]);
    let _far = WebServer::start(far, "far")?;
    let (v4, v6) = World::service_ips(150);
    let service = ServiceManifest::new("store", "far").cluster_ip(v4).cluster_ip(v6);
    manifests.apply(service.selector("app", "far").port("http", 80, HTTP_PORT))?;

    let producer = "
  rules:
  - backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /far}}]
    backendRefs: [{name: far, namespace: store, port: 80}]
";
    scene.apply("producer.yaml", &route("HTTPRoute", "producer", "web", producer))?;
    let to = scene.vip.v4;
    for pod in [&scene.client, visitor] {
        settles(pod, to, &get("/"), by("v1"))?;
        settles(pod, to, &get("/far"), is(500))?;
    }
    // A grant for another service is none, and neither is one for another kind of route.
    for (from, into) in [
        ("name: far", "name: near"),
        ("kind: HTTPRoute", "kind: GRPCRoute"),
        ("namespace: shop}]", "namespace: team}]"),
    ] {
        scene.apply("grant.yaml", &GRANT.replace(from, into))?;
        settles(&scene.client, to, &get("/far"), is(500))?;
    }
    scene.apply("grant.yaml", GRANT)?;
    for pod in [&scene.client, visitor] {
        settles(pod, to, &get("/far"), by("far"))?;
    }
    manifests.delete_file("grant.yaml")?;
    settles(&scene.client, to, &get("/far"), is(500))?;

    // The visitor's namespace has its own, which takes the place of the producer's as a whole. The service's namespace needs no grant.
    let consumer = "
  rules:
  - matches: [{path: {type: PathPrefix, value: /mine}}]
    backendRefs: [{name: web-v2, namespace: shop, port: 80}]
";
    scene.apply("consumer.yaml", &route("HTTPRoute", "team/consumer", "web", consumer))?;
    settles(visitor, to, &get("/mine"), by("v2"))?;
    settles(visitor, to, &get("/"), is(404))?;
    settles(&scene.client, to, &get("/mine"), by("v1"))?;
    manifests.delete_file("consumer.yaml")?;
    settles(visitor, to, &get("/mine"), by("v1"))?;
    Ok(())
}
