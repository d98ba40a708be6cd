//! The same manifests by file and by object give the same snapshot, of every kind and with all that is in it: tables of rules too, of which
//! controllers publish a version only, and that is another one for each source, since rules say where they were written
//! (`Origin::place`: lines of a file, or the generation of an object).

use std::{path::Path, sync::Arc};

use mesh_core::snapshot::Snapshot;
use serde_json::{Value, json};

use super::put;
use crate::{
    compile::{Compiler, MeshSettings},
    index::Index,
    problem::{Level, SourceError},
    resource::Kind,
    source::{
        document::{Known, Rules, parse},
        kubernetes::world::World,
    },
};

/// Something of every kind, each of which counts; and of rules, something of every part that they have.
const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: data}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: till, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: till-0, namespace: shop, uid: uid-till-0, labels: {app: till, version: v1}}
spec:
  nodeName: n1
  serviceAccountName: till
  containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]
status:
  phase: Running
  podIP: 10.1.0.1
  podIPs: [{ip: 10.1.0.1}]
  conditions: [{type: Ready, status: "True"}]
---
apiVersion: v1
kind: Service
metadata: {name: till, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: till}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: desk, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: calls, namespace: shop}
spec: {clusterIP: 10.96.0.3, ports: [{name: grpc, port: 90}]}
---
apiVersion: v1
kind: Service
metadata: {name: sealed, namespace: shop}
spec: {clusterIP: 10.96.0.4, ports: [{name: tls, port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: bytes, namespace: shop}
spec: {clusterIP: 10.96.0.5, ports: [{name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: borrowed, namespace: shop}
spec: {clusterIP: 10.96.0.6, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: data}
spec: {clusterIP: 10.96.0.7, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: sliced, namespace: shop}
spec: {clusterIP: 10.96.0.8, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: streams, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{name: tls, port: 443}, {name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: sliced, namespace: shop, labels: {kubernetes.io/service-name: sliced}}
addressType: IPv4
endpoints: [{addresses: [192.0.2.7], conditions: {ready: true}}]
ports: [{name: http, port: 8080, protocol: TCP}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"}
---
apiVersion: v1
kind: Secret
metadata: {name: bank, namespace: shop}
data: {ca.crt: cm9vdHM=}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: till, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: till, namespace: shop}
spec:
  action: ALLOW
  rules:
  - from: [{source: {namespaces: [shop], notPrincipals: [cluster.local/ns/shop/sa/thief]}}]
    to: [{operation: {methods: [GET], paths: [/a, /b*], ports: ["8080"]}}]
    when: [{key: source.namespace, values: [shop]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: desk, namespace: shop}
spec:
  hosts: [desk]
  http:
  - name: both
    match:
    - uri: {prefix: /a}
      method: {exact: GET}
      headers: {x-user: {regex: "a.*"}}
      withoutHeaders: {x-robot: {exact: "yes"}}
      queryParams: {page: {exact: "1"}}
      sourceLabels: {app: till}
    rewrite: {uri: /b}
    timeout: 3s
    retries: {attempts: 2, perTryTimeout: 1s, retryOn: "5xx,connect-failure"}
    fault: {delay: {fixedDelay: 2s, percentage: {value: 5}}, abort: {httpStatus: 503, percentage: {value: 1}}}
    mirror: {host: sliced}
    mirrorPercentage: {value: 10}
    corsPolicy: {allowOrigins: [{exact: "https://a.example"}], allowMethods: [GET], maxAge: 60s}
    headers: {request: {set: {x-a: "1"}, remove: [x-b]}, response: {add: {x-c: "2"}}}
    route:
    - {destination: {host: till, port: {number: 80}}, weight: 90}
    - {destination: {host: desk, subset: old}, weight: 10, headers: {request: {set: {x-old: "1"}}}}
  - match: [{uri: {exact: /gone}}]
    redirect: {uri: /here, redirectCode: 302}
  - match: [{uri: {prefix: /closed}}]
    directResponse: {status: 503, body: {string: closed}}
  - route: [{destination: {host: till}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: streams, namespace: shop}
spec:
  hosts: [streams]
  tls:
  - match: [{port: 443, sniHosts: [streams]}]
    route: [{destination: {host: sealed, port: {number: 443}}}]
  tcp:
  - match: [{port: 9000, sourceLabels: {app: till}}]
    route: [{destination: {host: bytes, port: {number: 9000}}, weight: 1}, {destination: {host: streams, port: {number: 9000}}, weight: 3}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: desk, namespace: shop}
spec:
  host: desk
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 7, connectTimeout: 2s}, http: {http1MaxPendingRequests: 3, idleTimeout: 9s}}
    loadBalancer: {consistentHash: {httpHeaderName: x-user}}
    outlierDetection: {consecutive5xxErrors: 3, interval: 5s, baseEjectionTime: 30s, maxEjectionPercent: 50}
    portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}]
  subsets: [{name: old, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: outside, namespace: shop}
spec:
  host: sliced
  workloadSelector: {matchLabels: {app: till}}
  trafficPolicy: {tls: {mode: SIMPLE, credentialName: bank, sni: bank.example}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: shop, namespace: shop}
spec: {egress: [{hosts: ["./*", "data/*"]}], outboundTrafficPolicy: {mode: ALLOW_ANY}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: shop}
spec:
  hosts: [api.example.com]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 192.0.2.1, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: old, namespace: shop}
spec: {address: 192.0.2.9, labels: {app: till}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front}]
  rules:
  - matches:
    - path: {type: PathPrefix, value: /shop}
      headers: [{name: x-user, value: a}]
      queryParams: [{type: RegularExpression, name: q, value: "[0-9]+"}]
      method: GET
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-a, value: "1"}], remove: [x-b]}}
    - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}
    - {type: RequestMirror, requestMirror: {backendRef: {name: sliced, port: 80}, percent: 20}}
    timeouts: {request: 5s, backendRequest: 2s}
    backendRefs: [{name: till, port: 80, weight: 3}, {name: front, port: 80, weight: 1}]
  - matches: [{path: {type: Exact, value: /moved}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: borrowed, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: borrowed}]
  rules: [{backendRefs: [{name: ledger, namespace: data, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: shop, namespace: data}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: calls}]
  rules:
  - matches: [{method: {service: shop.Till, method: Ring}, headers: [{name: x-user, value: a}]}]
    backendRefs: [{name: calls, port: 90}]
---
apiVersion: gateway.networking.k8s.io/v1alpha3
kind: TLSRoute
metadata: {name: sealed, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: sealed}]
  hostnames: [a.example.com]
  rules: [{backendRefs: [{name: sealed, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: bytes, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: bytes}]
  rules: [{backendRefs: [{name: bytes, port: 9000, weight: 1}, {name: streams, port: 9000, weight: 4}]}]
"#;

/// Each manifest by itself.
fn manifests() -> Vec<&'static str> {
    MANIFESTS.split("---\n").collect()
}

/// What a directory makes of these manifests, and what is wrong with them.
fn by_file(manifests: &[&str]) -> (Arc<Snapshot>, Vec<SourceError>) {
    let file = Path::new("world.yaml");
    let parsed = parse(file, &manifests.join("---\n"), &Rules::default(), &Known::new());
    let mut index = Index::default();
    index.replace_placed(file, parsed.resources, &parsed.lines);
    let compiled = Compiler::new(MeshSettings::default()).compile(&mut index);
    (compiled.snapshot, parsed.problems.into_iter().chain(compiled.problems).collect())
}

/// A manifest as an API server hands it out.
fn object(manifest: &str, generation: usize) -> Value {
    let mut object: Value = serde_saphyr::from_str(manifest).unwrap();
    let metadata = object["metadata"].as_object_mut().unwrap();
    // A pod is called by it, from wherever it is read: one that has one keeps it.
    metadata.entry("uid").or_insert_with(|| json!(format!("uid-{generation}")));
    metadata.insert("generation".to_owned(), json!(generation));
    metadata.insert("resourceVersion".to_owned(), json!("17"));
    metadata.insert("managedFields".to_owned(), json!([{"manager": "kubectl", "operation": "Apply"}]));
    object
}

/// Everything in a snapshot but the places of rules.
fn contents(snapshot: &Snapshot) -> String {
    let mut workloads: Vec<_> = snapshot.workloads().collect();
    workloads.sort_by_key(|workload| &workload.name);
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_by_key(|service| &service.name);
    let mut policies: Vec<_> = snapshot.policies().collect();
    policies.sort_by_key(|policy| &policy.name);
    let credentials: Vec<_> = snapshot.credentials().collect();
    let (routes, mesh) = (snapshot.routes(), snapshot.mesh());
    let text = format!("{workloads:?}{services:?}{policies:?}{credentials:?}{routes:?}{mesh:?}");
    let mut parts = text.split("place: Some(\"");
    let mut out = parts.next().unwrap().to_owned();
    for part in parts {
        out.push_str(part.split_once("\")").unwrap().1);
    }
    out
}

#[test]
fn the_same_manifests_by_file_and_by_object_give_the_same_snapshot() {
    let (files, problems) = by_file(&manifests());
    assert!(problems.iter().all(|problem| problem.level != Level::Error), "{problems:#?}");
    let mut world = World::new(MeshSettings::default());
    for (manifest, generation) in manifests().into_iter().zip(100..) {
        world.apply(put(&object(manifest, generation)));
    }
    let objects = world.compile();
    assert!(
        objects.status.errors.iter().all(|error| error.level != Level::Error),
        "{:#?}",
        objects.status.errors
    );

    // Both say where their rules are from, each in its own way.
    let (of_files, of_objects) =
        (format!("{:?}", files.routes()), format!("{:?}", objects.snapshot.routes()));
    assert!(of_files.contains("place: Some(\"world.yaml:"), "{of_files}");
    assert!(of_objects.contains("generation 1") && !of_objects.contains("world.yaml"), "{of_objects}");
    assert_eq!(contents(&objects.snapshot), contents(&files));

    // And there is something to compare: rules of each kind, in tables of each kind.
    for kind in ["VirtualService", "DestinationRule", "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute"] {
        assert!(of_files.contains(&format!("kind: \"{kind}\"")), "{kind}: {of_files}");
    }
    let routes = files.routes();
    let tables = [routes.http.len(), routes.streams.len(), routes.clusters.len(), routes.sidecars.len()];
    assert!(tables.iter().zip([4, 4, 2, 1]).all(|(found, least)| *found >= least), "{tables:?}");
    assert_eq!(files.credentials().count(), 1);
}

#[test]
fn no_kind_is_in_that_world_in_vain() {
    let all = contents(&by_file(&manifests()).0);
    // Of service accounts only the names are needed, and pods have those.
    for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::ServiceAccount) {
        let line = format!("\nkind: {kind}\n");
        let without: Vec<&str> =
            manifests().into_iter().filter(|text| !format!("\n{text}").contains(&line)).collect();
        assert_ne!(without.len(), manifests().len(), "there is no {kind}");
        assert_ne!(contents(&by_file(&without).0), all, "{kind} has no effect");
    }
}
