//! From manifests to the rows of `meshctl proxy-config` and the answers of `meshctl explain` about requests.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use mesh_control::{compile::MeshSettings, offline};
use mesh_core::snapshot::Name;
use mesh_proxy::{EndpointUse, preview::AskedRequest};

use super::*;
use crate::{
    node::explain::{Asked, RequestQuestion, explain_request},
    view::{RequestOutcome, RequestView, ResolutionKind, ResolutionView},
};

const MESH: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: cart, labels: {app: cart}}, status: {podIP: 10.0.0.2},
 spec: {nodeName: n1}}
---
{apiVersion: v1, kind: Service, metadata: {namespace: shop, name: reviews}, spec: {clusterIP: 10.96.0.1,
 selector: {app: reviews}, ports: [{name: http, port: 9080}, {name: tcp-raw, port: 9000}]}}
---
{apiVersion: v1, kind: Service, metadata: {namespace: shop, name: db}, spec: {clusterIP: 10.96.0.3,
 selector: {app: reviews}, ports: [{name: tls, port: 9443}]}}
---
{apiVersion: v1, kind: Service, metadata: {namespace: shop, name: plain}, spec: {clusterIP: 10.96.0.2,
 selector: {app: reviews}, ports: [{name: http, port: 80}]}}
";

fn pod(name: &str, version: &str, addr: &str, ready: bool) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: {name}, labels: {{app: reviews, version: {version}}}}},
 spec: {{nodeName: n1}}, status: {{podIP: {addr}, phase: Running, conditions: [{{type: Ready, status: '{}'}}]}}}}
",
        if ready { "True" } else { "False" }
    )
}

const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - name: jason
    match:
    - headers: {end-user: {exact: jason}}
      uri: {prefix: /v2/}
    rewrite: {uri: /}
    timeout: 500ms
    route: [{destination: {host: reviews, subset: v2}}]
  - match: [{uri: {exact: /moved}}]
    redirect: {uri: /there, redirectCode: 302}
  - match: [{uri: {prefix: /lost}}]
    route: [{destination: {host: reviews, subset: v9}}]
  - match: [{uri: {prefix: /faulty}}]
    fault: {delay: {percentage: {value: 50}, fixedDelay: 7s}, abort: {percentage: {value: 100}, httpStatus: 500}}
    route: [{destination: {host: reviews}}]
  - match: [{uri: {prefix: /split}}]
    route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v2}, weight: 10}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec:
  host: reviews
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}
    outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 1m}
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: db, namespace: shop}
spec:
  hosts: [db, a.example, lost.example]
  tls:
  - match: [{port: 9443, sniHosts: [a.example]}]
    route: [{destination: {host: db}}]
  - match: [{port: 9443, sniHosts: [lost.example]}]
    route: [{destination: {host: db, subset: v9}}]
";

/// The snapshot of manifests.
fn snapshot(test: &str) -> Arc<Snapshot> {
    let dir = std::env::temp_dir().join(format!("nodemesh-proxy-config-{test}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let pods =
        [("r1", "v1", "10.0.0.11", true), ("r2", "v2", "10.0.0.12", true), ("r3", "v2", "10.0.0.13", false)];
    let pods: String =
        pods.iter().map(|(name, version, addr, ready)| pod(name, version, addr, *ready)).collect();
    fs::write(dir.join("mesh.yaml"), format!("{MESH}{pods}")).unwrap();
    fs::write(dir.join("rules.yaml"), RULES).unwrap();
    let loaded = offline::load(&[PathBuf::from(&dir)], MeshSettings::default()).unwrap();
    assert!(loaded.errors.is_empty(), "{:?}", loaded.errors);
    fs::remove_dir_all(&dir).unwrap();
    loaded.snapshot
}

fn cart(snapshot: &Snapshot) -> &Workload {
    snapshot.workload_at("10.0.0.2".parse().unwrap()).unwrap()
}

fn key(subset: Option<&str>) -> ClusterKey {
    ClusterKey { service: Name::new("shop", "reviews"), port: 9080, subset: subset.map(Into::into) }
}

/// `r2` is out, and one request is under way there.
fn in_use() -> Vec<DestinationUse> {
    let used = EndpointUse {
        active: 1,
        ejections: 1,
        out_for: Some(Duration::from_secs(40)),
        ..EndpointUse::default()
    };
    let endpoints = BTreeMap::from([("10.0.0.12:9080".parse().unwrap(), used)]);
    let cluster = Some(key(Some("v2")));
    vec![DestinationUse { pod: 1, cluster, connections: 1, pending: 0, requests: 1, retries: 0, endpoints }]
}

fn ask(
    snapshot: &Arc<Snapshot>,
    target: &str,
    headers: &[(&str, &str)],
    in_use: Vec<DestinationUse>,
) -> RequestView {
    ask_at(snapshot, "10.96.0.1", 9080, target, headers, in_use)
}

fn ask_at(
    snapshot: &Arc<Snapshot>,
    vip: &str,
    port: u16,
    target: &str,
    headers: &[(&str, &str)],
    in_use: Vec<DestinationUse>,
) -> RequestView {
    let asked = AskedRequest {
        method: "GET".into(),
        target: target.into(),
        authority: format!("{vip}:{port}"),
        headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
    };
    explain(snapshot, vip, port, RequestQuestion { asked: Asked::Request(asked), in_use })
}

fn explain(snapshot: &Arc<Snapshot>, vip: &str, port: u16, question: RequestQuestion) -> RequestView {
    let resolution = ResolutionView {
        kind: ResolutionKind::Literal,
        name: None,
        addrs: vec![vip.parse().unwrap()],
        note: None,
    };
    explain_request(snapshot, cart(snapshot), &resolution, port, &question).unwrap()
}

#[test]
fn routes_are_listed_with_what_they_do_and_where_they_are_from() {
    let snapshot = snapshot("routes");
    let filter = Filter { host: Some("reviews".into()), ..Filter::default() };
    let view = routes(&snapshot, Some(cart(&snapshot)), &filter);
    assert_eq!(view.pod.as_deref(), Some("shop/cart"));
    let ports: Vec<(u16, &str)> = view.tables.iter().map(|table| (table.port, &*table.host)).collect();
    assert_eq!(ports, [(9080, "reviews.shop.svc.cluster.local")]);
    let rules = &view.tables[0].rules;
    assert_eq!(rules[0].matches, ["path=/v2/* & header end-user=jason"]);
    assert_eq!(rules[0].action, "outbound|9080|v2|reviews.shop.svc.cluster.local");
    assert_eq!(
        (rules[0].timeout_ms, &*rules[0].changes),
        (Some(500), &["rewrite path prefix→/".to_owned()][..])
    );
    let places: Vec<&str> = rules.iter().map(|rule| rule.origin.place.as_deref().unwrap()).collect();
    // The constant begins with a line break, and so does its document.
    for (place, line) in places.iter().zip([8, 15, 17, 19, 22]) {
        assert!(place.ends_with(&format!("rules.yaml:{line}")), "{places:?}");
    }
    assert_eq!(rules[1].action, "redirect 302 path=/there");
    assert_eq!(rules[2].action, "outbound|9080|v9|reviews.shop.svc.cluster.local");
    assert_eq!(rules[3].fault, ["delay 7s of 50%", "abort with 500 of 100%"]);
    let shares: Vec<f64> = rules[4].backends.iter().map(|share| share.percent).collect();
    assert_eq!(shares, [90.0, 10.0]);
    let everybody = routes(&snapshot, None, &filter);
    assert_eq!(everybody.tables[0].clients.as_deref(), Some("all"));
    let other = Filter { host: Some("plain".into()), ..Filter::default() };
    assert!(routes(&snapshot, None, &other).tables.is_empty());
}

#[test]
fn clusters_say_their_policy_and_what_is_in_use() {
    let snapshot = snapshot("clusters");
    let of = |filter: &Filter| clusters(&snapshot, Some(cart(&snapshot)), (&in_use(), &[]), filter).clusters;
    let all = of(&Filter::default());
    let names: Vec<(&str, u16, Option<&str>)> = all
        .iter()
        .map(|row| (row.host.split('.').next().unwrap(), row.port, row.subset.as_deref()))
        .collect();
    assert_eq!(
        names,
        [
            ("db", 9443, None),
            ("plain", 80, None),
            ("reviews", 9080, None),
            ("reviews", 9080, Some("v1")),
            ("reviews", 9080, Some("v2")),
            ("reviews", 9000, None),
            ("reviews", 9000, Some("v1")),
            ("reviews", 9000, Some("v2")),
        ]
    );
    assert_eq!((all[0].origin.as_ref(), &*all[0].balancing, &*all[0].tls), (None, "LEAST_REQUEST", "mesh"));
    let v2 = of(&Filter {
        host: Some("reviews.shop".into()),
        port: Some(9080),
        subset: Some("v2".into()),
        address: None,
    });
    let [v2] = &v2[..] else { panic!("{v2:?}") };
    assert_eq!(v2.balancing, "ROUND_ROBIN, failover");
    assert_eq!(v2.limits, ["maxConnections=1", "http1MaxPendingRequests=1"]);
    assert_eq!(v2.outlier.as_deref(), Some("3× 5xx → out for 60s × n, at most 10%"));
    assert_eq!(v2.in_use.map(|used| (used.connections, used.requests)), Some((1, 1)));
}

#[test]
fn endpoints_say_how_they_are() {
    let snapshot = snapshot("endpoints");
    let filter =
        Filter { host: Some("reviews".into()), port: Some(9080), subset: Some("v2".into()), address: None };
    let rows = endpoints(&snapshot, Some(cart(&snapshot)), &in_use(), &filter).endpoints;
    let shown: Vec<_> = rows
        .iter()
        .map(|row| {
            (row.addr.to_string(), &*row.status, &*row.outlier_check, row.active_requests, row.ejected_for_ms)
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("10.0.0.12:9080".to_owned(), "EJECTED", "FAILED", 1, Some(40_000)),
            ("10.0.0.13:9080".to_owned(), "UNHEALTHY", "OK", 0, None),
        ]
    );
    assert_eq!((rows[0].workload.as_deref(), rows[0].priority), (Some("shop/r2"), Some(0)));
}

#[test]
fn a_request_is_explained_from_its_rule_to_its_endpoints() {
    let snapshot = snapshot("request");
    let view = ask(&snapshot, "/v2/x?y=1", &[("end-user", "jason")], Vec::new());
    assert_eq!(view.outcome, RequestOutcome::Forward);
    let rule = view.rule.as_ref().unwrap();
    assert_eq!((rule.name.as_deref(), &*rule.origin.field), (Some("jason"), "spec.http[0]"));
    assert_eq!(view.matched.as_deref(), Some("path=/v2/* & header end-user=jason"));
    assert_eq!(view.timeout_ms, Some(500));
    let [to] = &view.backends[..] else { panic!("{view:?}") };
    assert_eq!((to.path.as_deref(), to.status), (Some("/x?y=1"), None));
    let said: Vec<(&str, bool)> = to.endpoints.iter().map(|row| (&*row.reason, row.eligible)).collect();
    assert_eq!(
        said,
        [("its labels are not those of the subset", false), ("ready", true), ("not ready", false)]
    );
    // The only one that is left is out: nobody can serve it.
    let view = ask(&snapshot, "/v2/", &[("end-user", "jason")], in_use());
    assert_eq!((view.status, view.flags), (Some(503), vec!["UH".to_owned()]));
    assert_eq!(view.backends[0].endpoints[1].reason, "ejected for 40.0 s more");
}

#[test]
fn answers_of_the_mesh_and_ports_it_does_not_look_at_are_told_apart() {
    let snapshot = snapshot("answers");
    let view = ask(&snapshot, "/else", &[], Vec::new());
    assert_eq!((view.outcome, view.status), (RequestOutcome::Respond, Some(404)));
    assert_eq!((view.flags, view.rule), (vec!["NR".to_owned()], None));

    let view = ask(&snapshot, "/moved", &[], Vec::new());
    assert_eq!((view.outcome, view.status), (RequestOutcome::Redirect, Some(302)));
    assert_eq!(view.location.as_deref(), Some("http://10.96.0.1:9080/there"));

    let view = ask(&snapshot, "/lost", &[], Vec::new());
    assert_eq!((view.status, view.flags), (Some(503), vec!["NC".to_owned()]));

    let view = ask(&snapshot, "/faulty", &[], Vec::new());
    assert_eq!((view.timeout_ms, view.flags), (None, vec!["DI".to_owned(), "FI".to_owned()]));

    let view = ask_at(&snapshot, "10.96.0.2", 80, "/", &[], Vec::new());
    assert_eq!(view.outcome, RequestOutcome::NotLookedAt);
    assert!(view.text.starts_with("no rule or policy is about this port"), "{}", view.text);
    let view = ask_at(&snapshot, "10.96.0.1", 9000, "/", &[], Vec::new());
    assert!(view.text.contains("the port is tcp"), "{}", view.text);
}

#[test]
fn a_tls_connection_is_explained_by_the_server_it_asks_for() {
    let snapshot = snapshot("tls");
    let ask = |vip: &str, port, sni: &str| {
        let question = RequestQuestion { asked: Asked::Tls(sni.into()), in_use: Vec::new() };
        explain(&snapshot, vip, port, question)
    };
    let view = ask("10.96.0.3", 9443, "a.example");
    assert_eq!((view.outcome, view.matched.as_deref()), (RequestOutcome::Forward, Some("sni=a.example")));
    assert_eq!(view.rule.as_ref().map(|rule| &*rule.origin.field), Some("spec.tls[0]"));
    assert_eq!(view.backends[0].cluster, "outbound|9443||db.shop.svc.cluster.local");
    assert_eq!(view.backends[0].endpoints.iter().filter(|row| row.eligible).count(), 2);
    let view = ask("10.96.0.3", 9443, "lost.example");
    assert_eq!((view.outcome, &*view.backends[0].flags), (RequestOutcome::Close, &["NC".to_owned()][..]));
    let view = ask("10.96.0.3", 9443, "other.example");
    assert_eq!((view.outcome, view.backends.len()), (RequestOutcome::PassThrough, 0));
    // Without a rule the DestinationRule counts.
    let view = ask("10.96.0.1", 9000, "other.example");
    assert_eq!((view.outcome, view.rule, view.backends.len()), (RequestOutcome::Forward, None, 1));
    assert_eq!(ask("10.96.0.1", 9080, "a.example").outcome, RequestOutcome::Refuse);
}

#[test]
fn listeners_say_what_the_kernel_does_with_service_ports() {
    struct Kernel;
    impl Tables for Kernel {
        fn service(&self, key: &ServiceKey) -> Option<mesh_common::service::ServiceVal> {
            let count = if key.port == 80 { 0 } else { 2 };
            Some(mesh_common::service::ServiceVal { count, ..mesh_common::service::ServiceVal::ZERO })
        }
        fn backend(&self, _: &mesh_common::service::BackendKey) -> Option<mesh_common::service::Backend> {
            None
        }
        fn backend_slot(&self, _: &mesh_common::service::BackendIndexKey) -> Option<u32> {
            None
        }
        fn workload(&self, _: &mesh_common::Addr) -> Option<mesh_common::service::WorkloadVal> {
            None
        }
        fn port(&self, _: &mesh_common::pod::PortKey) -> Option<u32> {
            None
        }
        fn excluded(&self, _: u32, _: &mesh_common::Addr) -> bool {
            false
        }
        fn affinity(&self, _: &mesh_common::service::AffinityKey) -> Option<mesh_common::service::Affinity> {
            None
        }
        fn verdict(&self, _: &mesh_common::verdict::VerdictKey) -> Option<mesh_common::verdict::Verdict> {
            None
        }
        fn policy_gen(&self, _: u64) -> Option<u64> {
            None
        }
        fn agent_alive(&self, _: u64) -> bool {
            true
        }
        fn outbound_listener(&self, _: u32, _: u32) -> bool {
            true
        }
    }
    let snapshot = snapshot("listeners");
    let view = listeners(&snapshot, &Kernel, Some(cart(&snapshot)), true, &Filter::default());
    assert_eq!(view.in_pod.len(), 7);
    let shown: Vec<(u16, &str, &str)> =
        view.services.iter().map(|row| (row.port, &*row.protocol, &*row.decision)).collect();
    assert_eq!(
        shown,
        [(9443, "tls", "proxy"), (80, "http", "refuse"), (9080, "http", "http"), (9000, "tcp", "proxy")]
    );
}
