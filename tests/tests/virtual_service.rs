//! Matches and actions of VirtualServices that need more than one namespace, destination or letter, end to end.

use std::time::Duration;

use mesh_tests::manifests::NamespaceManifest;
use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::web::{self, HTTP_PORT, WebScene, WebServer};
use mesh_tests::{Failure, Pod, TestResult, eventually, require_agent, test_name};

const SOON: Duration = Duration::from_secs(10);

fn get(path: &str) -> Ask {
    Ask::get("web", path)
}

fn by(server: &'static str) -> impl Fn(&Told) -> bool {
    move |told| told.status == 200 && told.header("x-server") == Some(server)
}

/// Several conditions, each of which sends requests to version 2; all others go to version 1.
const MATCHES: &str = "
  - match:
    - {uri: {prefix: /query}, queryParams: {kind: {exact: a}, flag: {}}}
    - {uri: {prefix: /without}, withoutHeaders: {x-skip: {exact: 'yes'}}}
    - {uri: {prefix: /absent}, withoutHeaders: {x-skip: {}}}
    - {uri: {exact: /LeTTers}, ignoreUriCase: true}
    - {uri: {prefix: /Begin}, ignoreUriCase: true}
    - {uri: {prefix: /label}, sourceLabels: {app: client}}
    - {uri: {prefix: /wrong-label}, sourceLabels: {app: visitor, version: none}}
    - {uri: {prefix: /namespace}, sourceNamespace: team}
    - {uri: {prefix: /port}, port: 82}
    - {uri: {prefix: /method}, method: {regex: 'P.*'}, authority: {prefix: web}, scheme: {exact: http}}
    route: [{destination: {host: web, subset: v2}}]
  - match: [{uri: {prefix: /part}}]
    delegate: {name: part, namespace: team}
    headers: {request: {set: {x-said: root}}}
  - route: [{destination: {host: web, subset: v1}}]
";

/// What another namespace says about a part of the paths. The second rule would reach beyond that part, and is left out.
const DELEGATE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: part, namespace: team}
spec:
  http:
  - match: [{uri: {prefix: /part/two}}]
    headers: {request: {set: {x-said: delegate}}}
    route: [{destination: {host: web.shop.svc.cluster.local, subset: v2}}]
  - match: [{uri: {prefix: /beyond}}]
    route: [{destination: {host: web.shop.svc.cluster.local, subset: v2}}]
  - match: [{headers: {x-part: {exact: two}}}]
    route: [{destination: {host: web.shop.svc.cluster.local, subset: v2}}]
";

#[test]
fn rules_look_at_queries_letters_absent_headers_and_clients_and_leave_parts_to_delegates() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let manifests = scene.shop.world().manifests();
    manifests.apply(NamespaceManifest::meshed("team"))?;
    let visitor = scene.shop.world().node("b")?.pod("team/visitor")?;
    manifests.apply(visitor.manifest())?;
    scene.apply("delegate.yaml", DELEGATE)?;
    scene.route(MATCHES)?;
    scene.settles(get("/part/two"), by("v2"))?;
    scene.settles(get("/"), by("v1"))?;
    let asked = |from: &Pod, port: u16, request: &Ask| -> Result<Vec<Told>, Failure> {
        web::ask(from, &Script { to: scene.at(port), http2: false, requests: vec![request.clone(); 3] })
    };
    let is = |from: &Pod, port: u16, request: Ask, server: &'static str| -> TestResult {
        let told = asked(from, port, &request)?;
        assert!(told.iter().all(by(server)), "{request:?} of {}, wanted {server}: {told:?}", from.name());
        Ok(())
    };
    // Enrolled as soon as it is answered by the rule's word.
    let there = || asked(&visitor, 80, &get("/namespace")).map_err(|error| format!("{error:?}"));
    drop(eventually(SOON, there, |told| told.as_ref().is_ok_and(|told| told.iter().all(by("v2"))))?);
    let client = &scene.client;
    for (request, server) in [
        (get("/query?flag=0&kind=a"), "v2"),
        (get("/query?kind=a&flag"), "v2"),
        (get("/query?kind=a"), "v1"),
        (get("/query?kind=ab&flag=1"), "v1"),
        (get("/query?kind=b&kind=a&flag=1"), "v1"),
        (get("/without"), "v2"),
        (get("/without").header("x-skip", "no"), "v2"),
        (get("/without").header("x-skip", "yes"), "v1"),
        (get("/absent"), "v2"),
        (get("/absent").header("x-skip", "no"), "v1"),
        (get("/letters"), "v2"),
        (get("/LETTERS"), "v2"),
        (get("/letters/"), "v1"),
        (get("/bEGINning"), "v2"),
        // Elsewhere letters count.
        (get("/QUERY?flag=0&kind=a"), "v1"),
        (get("/label"), "v2"),
        (get("/wrong-label"), "v1"),
        (get("/namespace"), "v1"),
        (get("/port"), "v1"),
        (get("/method").posting(3), "v2"),
        (get("/method"), "v1"),
        (get("/beyond"), "v1"),
    ] {
        is(client, 80, request, server)?;
    }
    is(client, 82, get("/port"), "v2")?;
    is(&visitor, 80, get("/label"), "v1")?;
    is(&visitor, 80, get("/wrong-label"), "v1")?;

    // The root's headers hold where the delegate says nothing about headers.
    for (request, server, said) in [
        (get("/part/two"), "v2", Some("delegate")),
        (get("/part").header("x-part", "two"), "v2", Some("root")),
        (get("/part/one"), "v1", None),
        (get("/").header("x-part", "two"), "v1", None),
    ] {
        let told = scene.ask(request)?;
        let seen = told.seen()?;
        assert_eq!((seen.server.as_str(), seen.header("x-said")), (server, said), "{}", seen.path);
    }
    Ok(())
}

#[test]
fn a_request_is_copied_to_several_mirrors_each_by_its_own_share() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let copies = scene.shop.pod("b", "copies")?;
    let _copies = WebServer::start(&copies, "copies")?;
    scene.shop.service_with("copies", 80, |service| service.port("http", 80, HTTP_PORT))?;
    scene.route(
        "
  - route: [{destination: {host: web, subset: v1}}]
    mirrors:
    - {destination: {host: web, subset: v2}, percentage: {value: 50}}
    - {destination: {host: copies}}
    - {destination: {host: gone}}
",
    )?;
    scene.settles(get("/"), by("v1"))?;
    const SENT: u64 = 100;
    let requests = vec![get("/copied").posting(200); usize::try_from(SENT)?];
    let told = web::ask(&scene.client, &Script { to: scene.vip.v4, http2: false, requests })?;
    assert!(told.iter().all(by("v1")), "{told:?}");
    let had = |pod: &Pod| -> u64 {
        let told = web::ask_once(&scene.client, pod.at4(HTTP_PORT), false, Ask::get("anybody", "/count"));
        let seen = told.and_then(|told| Ok(told.seen()?));
        seen.ok().and_then(|seen| seen.so_far.get("/copied").copied()).unwrap_or(0)
    };
    eventually(SOON, || had(&copies), |had| *had == SENT)?;
    // Fifty are expected, the bounds are more than four standard deviations away.
    eventually(SOON, || had(&scene.v2), |had| (28..=72).contains(had))?;
    assert_eq!(had(&scene.v1), SENT);
    Ok(())
}
