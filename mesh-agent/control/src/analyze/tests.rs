//! Small worlds with one thing wrong in each.

use super::*;
use crate::source::document::{Known, Rules, parse};

const WORLD: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: db, namespace: data}, spec: {clusterIP: 10.96.0.2, ports: [{port: 5432}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop, labels: {app: web, version: v1}}, spec: {nodeName: n1}, status: {podIP: 10.0.0.1}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: ext, namespace: shop}, spec: {hosts: ['*.example.com', api.other.com],
 ports: [{number: 443, name: tls, protocol: TLS}]}}
";

/// What is found in the world with these documents, as `level kind name field: message`.
fn found(documents: &str) -> Vec<String> {
    let mut index = Index::default();
    let text = format!("{WORLD}---\n{documents}");
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    let bad: Vec<_> = parsed.problems.iter().filter(|p| p.level == Level::Error).collect();
    assert!(bad.is_empty(), "{bad:?}");
    index.replace("a.yaml".as_ref(), parsed.resources);
    let unread = parsed.unread;
    let has_unread = |kind: &str, name: &Name| unread.contains(&(kind.to_owned(), name.clone()));
    let line = |p: &SourceError| {
        let level = if p.level == Level::Error { "E" } else { "W" };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{level} {} {} {}: {}", text(&p.kind), text(&p.name), p.field, p.message)
    };
    analyze(&index, &MeshSettings::default(), &has_unread).iter().map(line).collect()
}

/// What is found begins so, one by one.
fn finds(documents: &str, wanted: &[&str]) {
    let found = found(documents);
    let fits = found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| f.starts_with(w));
    assert!(fits, "{documents}:\n{found:#?}\nwanted\n{wanted:#?}");
}

fn istio(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: shop}}, spec: {{{spec}}}}}\n---\n"
    )
}

fn route(kind: &str, name: &str, spec: &str) -> String {
    istio(kind, name, spec).replacen("networking.istio.io", "gateway.networking.k8s.io", 1)
}

fn virtual_service(name: &str, host: &str, destination: &str) -> String {
    istio(
        "VirtualService",
        name,
        &format!("hosts: [{host}], http: [{{route: [{{destination: {{{destination}}}}}]}}]"),
    )
}

const SUBSETS: &str =
    "host: web, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]";

#[test]
fn a_world_that_fits_together_has_nothing_wrong() {
    let rule = istio("DestinationRule", "web", "host: web, subsets: [{name: v1, labels: {version: v1}}]");
    finds(&(rule + &virtual_service("a", "web", "host: web, subset: v1, port: {number: 80}")), &[]);
    finds(&virtual_service("a", "web.shop.svc.cluster.local", "host: www.example.com"), &[]);
    finds(&virtual_service("a", "'*.example.com'", "host: api.other.com, port: {number: 443}"), &[]);
    let parent = "parentRefs: [{group: '', kind: Service, name: web, port: 80, sectionName: http}]";
    finds(
        &route("HTTPRoute", "r", &format!("{parent}, rules: [{{backendRefs: [{{name: web, port: 80}}]}}]")),
        &[],
    );
}

#[test]
fn destinations_exist_with_their_port_and_subset() {
    let field = "spec.http[0].route[0].destination";
    finds(
        &virtual_service("a", "web", "host: wbe"),
        &[&format!("E VirtualService a {field}.host: is wbe.shop.svc.cluster.local")],
    );
    finds(
        &virtual_service("a", "web", "host: web, port: {number: 81}"),
        &[&format!(
            "E VirtualService a {field}.port.number: is 81, which is no port of web.shop.svc.cluster.local; its ports: 80"
        )],
    );
    finds(
        &virtual_service("a", "web", "host: web, subset: v1"),
        &[&format!("E VirtualService a {field}.subset: is v1")],
    );
    let found = found(&virtual_service("a", "web", "host: db.data"));
    assert!(found[0].contains("there is a Service db.data.svc.cluster.local"), "{found:?}");
}

#[test]
fn hosts_of_rules_exist() {
    finds(&virtual_service("a", "wbe", "host: web"), &["W VirtualService a spec.hosts[0]: is wbe.shop"]);
    finds(&istio("DestinationRule", "d", "host: wbe"), &["W DestinationRule d spec.host: is wbe.shop"]);
    finds(
        &istio("DestinationRule", "d", "host: '*.nowhere.com'"),
        &["W DestinationRule d spec.host: is *.nowhere.com"],
    );
    finds(&istio("DestinationRule", "d", "host: '*.shop.svc.cluster.local'"), &[]);
}

#[test]
fn a_subset_without_endpoints_is_warned_about() {
    finds(
        &istio("DestinationRule", "d", SUBSETS),
        &["W DestinationRule d spec.subsets[1].labels: is version=v2"],
    );
    // Nothing is known of the endpoints of a service without pods.
    finds(
        &istio("DestinationRule", "d", &SUBSETS.replace("host: web", "host: db.data.svc.cluster.local")),
        &[],
    );
}

#[test]
fn s24_of_two_virtual_services_for_a_host_the_older_counts() {
    let both = virtual_service("a", "web", "host: web")
        + &virtual_service("b", "web.shop.svc.cluster.local", "host: web");
    finds(
        &both,
        &["E VirtualService b spec.hosts[0]: is web.shop.svc.cluster.local, which VirtualService shop/a"],
    );
    let dated = both
        .replace("{name: b,", "{name: b, creationTimestamp: '2020-01-01T00:00:00Z',")
        .replace("{name: a,", "{name: a, creationTimestamp: '2021-01-01T00:00:00Z',");
    finds(
        &dated,
        &["E VirtualService a spec.hosts[0]: is web.shop.svc.cluster.local, which VirtualService shop/b"],
    );
    let limited = both
        .replace("http: [", "exportTo: ['.'], http: [")
        .replacen("namespace: shop", "namespace: bank", 1)
        .replace("hosts: [web]", "hosts: [web.shop.svc.cluster.local]")
        .replace("{host: web}", "{host: web.shop.svc.cluster.local}");
    finds(&limited, &[]);
    // Where nothing is said the mesh says who sees them.
    let config = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: '{defaultVirtualServiceExportTo: [\".\"]}'}}\n";
    let silent = limited.replace("exportTo: ['.'], ", "");
    finds(
        &silent,
        &["E VirtualService b spec.hosts[0]: is web.shop.svc.cluster.local, which VirtualService bank/a"],
    );
    finds(&(silent + config), &[]);
}

#[test]
fn delegates_and_gateways_exist() {
    let root = istio("VirtualService", "root", "hosts: [web], http: [{delegate: {name: part}}]");
    finds(
        &root,
        &["E VirtualService root spec.http[0].delegate: is VirtualService shop/part, which does not exist"],
    );
    let part = istio("VirtualService", "part", "http: [{route: [{destination: {host: web}}]}]");
    finds(&(root.clone() + &part), &[]);
    finds(
        &(root + &virtual_service("part", "'*.example.com'", "host: web")),
        &["E VirtualService root spec.http[0].delegate: is VirtualService shop/part, which has hosts"],
    );
    let at_gateway = virtual_service("a", "x.com", "host: web").replace("hosts:", "gateways: [gw], hosts:");
    finds(&at_gateway, &["E VirtualService a spec.gateways: has shop/gw"]);
    finds(&(at_gateway + &istio("Gateway", "gw", "")), &[]);
}

#[test]
fn s116_routes_refer_to_what_exists() {
    let field = "spec.rules[0].backendRefs[0]";
    for kind in ["HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute"] {
        let parent = match kind {
            "HTTPRoute" | "GRPCRoute" => "group: '', kind: Service, name: web",
            _ => "group: networking.istio.io, kind: ServiceEntry, name: ext",
        };
        let rules =
            |backend: &str| format!("parentRefs: [{{{parent}}}], rules: [{{backendRefs: [{{{backend}}}]}}]");
        finds(
            &route(kind, "r", &rules("name: v2, port: 80")),
            &[&format!("E {kind} r {field}: is Service shop/v2, which does not exist (BackendNotFound)")],
        );
        finds(
            &route(kind, "r", &rules("name: web, port: 81")),
            &[&format!("E {kind} r {field}.port: is 81")],
        );
    }
    let with =
        |parent: &str| format!("parentRefs: [{parent}], rules: [{{backendRefs: [{{name: web, port: 80}}]}}]");
    for (parent, wanted) in [
        ("{group: '', kind: Service, name: x}", "E HTTPRoute r spec.parentRefs[0]: is Service shop/x"),
        ("{group: '', kind: Service, name: web, port: 81}", "E HTTPRoute r spec.parentRefs[0].port: is 81"),
        (
            "{group: '', kind: Service, name: web, sectionName: x}",
            "E HTTPRoute r spec.parentRefs[0].sectionName",
        ),
        (
            "{group: networking.istio.io, kind: ServiceEntry, name: x}",
            "E HTTPRoute r spec.parentRefs[0]: is ServiceEntry shop/x",
        ),
        ("{name: gw}", "E HTTPRoute r spec.parentRefs[0]: is Gateway shop/gw"),
    ] {
        finds(&route("HTTPRoute", "r", &with(parent)), &[wanted]);
    }
    finds(&(route("HTTPRoute", "r", &with("{name: gw}")) + &route("Gateway", "gw", "")), &[]);
}

#[test]
fn s116_a_route_is_attached_to_a_port_that_carries_its_kind_and_leads_to_tcp() {
    let more = "
{apiVersion: v1, kind: Service, metadata: {name: other, namespace: shop}, spec: {type: ExternalName, externalName: web.shop.svc.cluster.local}}
---
{apiVersion: v1, kind: Service, metadata: {name: mixed, namespace: shop}, spec: {clusterIP: 10.96.0.3, ports: [{name: tls, port: 443},
 {name: any, port: 90}, {name: dns, port: 53, protocol: UDP}]}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: again, namespace: shop}, spec: {hosts: [web.shop.svc.cluster.local],
 ports: [{number: 80, name: http, protocol: HTTP}]}}
---
";
    let service = |name: &str| format!("group: '', kind: Service, name: {name}");
    let entry = |name: &str| format!("group: networking.istio.io, kind: ServiceEntry, name: {name}");
    let at = |kind: &str, parent: &str, backend: &str| {
        let refs = format!("parentRefs: [{{{parent}}}], rules: [{{backendRefs: [{{{backend}}}]}}]");
        let mut found = found(&(more.to_owned() + &route(kind, "r", &refs)));
        found.retain(|finding| finding.contains("Route r "));
        found
    };
    let web = "name: web, port: 80";
    for (kind, parent, wanted) in [
        ("HTTPRoute", service("mixed"), None),
        ("TCPRoute", service("mixed"), None),
        (
            "HTTPRoute",
            service("mixed, port: 443"),
            Some("is Service shop/mixed, which speaks TLS at port 443, and"),
        ),
        ("HTTPRoute", entry("ext"), Some("is ServiceEntry shop/ext, which speaks TLS at port 443, and")),
        ("TCPRoute", service("web"), Some("is Service shop/web, which speaks HTTP at port 80, and")),
        (
            "HTTPRoute",
            service("mixed, port: 90, sectionName: tls"),
            Some("is Service shop/mixed, which has no port 90 called"),
        ),
        (
            "HTTPRoute",
            service("other"),
            Some("is Service shop/other, which is another name of Service shop/web"),
        ),
        (
            "HTTPRoute",
            entry("again"),
            Some("is ServiceEntry shop/again, which has no host but those of Services"),
        ),
    ] {
        let found = at(kind, &parent, web);
        let wanted: Vec<String> =
            wanted.iter().map(|text| format!("E {kind} r spec.parentRefs[0]: {text}")).collect();
        let fits = found.len() == wanted.len() && found.iter().zip(&wanted).all(|(f, w)| f.starts_with(w));
        assert!(fits, "{kind} {parent}: {found:#?}, wanted {wanted:#?}");
    }
    let hostname = |host: &str| format!("group: networking.istio.io, kind: Hostname, name: {host}");
    for (backend, wanted) in [
        ("name: other, port: 80".to_owned(), None),
        (
            "name: other, port: 81".to_owned(),
            Some(".port: is 81, which is no port of Service shop/other; its ports: 80"),
        ),
        (
            "name: mixed, port: 53".to_owned(),
            Some(".port: is 53, which is UDP at Service shop/mixed (UnsupportedProtocol)"),
        ),
        (hostname("api.other.com"), None),
        (hostname("web.shop.svc.cluster.local"), None),
        // That an entry has `*.example.com` is no service of that host.
        (
            hostname("www.example.com"),
            Some(": is Hostname shop/www.example.com, which does not exist (BackendNotFound)"),
        ),
    ] {
        let found = at("HTTPRoute", &service("web"), &backend);
        let wanted: Vec<String> =
            wanted.iter().map(|text| format!("E HTTPRoute r spec.rules[0].backendRefs[0]{text}")).collect();
        let fits = found.len() == wanted.len() && found.iter().zip(&wanted).all(|(f, w)| f.starts_with(w));
        assert!(fits, "{backend}: {found:#?}, wanted {wanted:#?}");
    }
}

#[test]
fn s116_another_namespace_wants_a_grant() {
    let to = |kind: &str| {
        route(
            kind,
            "r",
            "parentRefs: [{group: '', kind: Service, name: web}], rules: [{backendRefs: [{name: db, namespace: data, port: 5432}]}]",
        )
    };
    let refused = "is Service data/db of another namespace, and no ReferenceGrant in data";
    finds(&to("HTTPRoute"), &[&format!("E HTTPRoute r spec.rules[0].backendRefs[0]: {refused}")]);
    let grant = route(
        "ReferenceGrant",
        "g",
        "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: '', kind: Service}]",
    );
    let granted = grant.replace("namespace: shop}, spec", "namespace: data}, spec");
    finds(&(to("HTTPRoute") + &granted), &[]);
    finds(&(to("HTTPRoute") + &grant), &[&format!("E HTTPRoute r spec.rules[0].backendRefs[0]: {refused}")]);
    finds(
        &(to("GRPCRoute") + &granted),
        &[&format!("E GRPCRoute r spec.rules[0].backendRefs[0]: {refused}")],
    );
    // Of the namespace of the service that the route is attached to, as the compiler has it.
    let at = |parents: &str| {
        route(
            "HTTPRoute",
            "r",
            &format!(
                "parentRefs: [{parents}], rules: [{{backendRefs: [{{name: db, namespace: data, port: 5432}}]}}]"
            ),
        )
    };
    let (db, web) =
        ("{group: '', kind: Service, name: db, namespace: data}", "{group: '', kind: Service, name: web}");
    finds(&at(db), &[]);
    finds(&at(&format!("{db}, {web}")), &[&format!("E HTTPRoute r spec.rules[0].backendRefs[0]: {refused}")]);
}

#[test]
fn s117_one_host_is_routed_by_one_of_the_two_kinds() {
    let http = route(
        "HTTPRoute",
        "r",
        "parentRefs: [{group: '', kind: Service, name: web}], rules: [{backendRefs: [{name: web, port: 80}]}]",
    );
    finds(
        &(http + &virtual_service("a", "web", "host: web")),
        &[
            "W VirtualService a spec.hosts[0]: is web.shop.svc.cluster.local, which HTTPRoute shop/r is attached to as well",
        ],
    );
}

#[test]
fn entries_with_hosts_of_others_are_warned_about() {
    let entry = |name: &str, host: &str| {
        istio(
            "ServiceEntry",
            name,
            &format!("hosts: [{host}], ports: [{{number: 80, name: h, protocol: HTTP}}]"),
        )
    };
    finds(
        &entry("s", "web.shop.svc.cluster.local"),
        &["W ServiceEntry s spec.hosts[0]: is web.shop.svc.cluster.local, which is Service shop/web"],
    );
    finds(
        &entry("later", "api.other.com"),
        &["W ServiceEntry later spec.hosts[0]: is api.other.com, which ServiceEntry shop/ext has too"],
    );
}

#[test]
fn selectors_select_something() {
    let policy = |selector: &str| {
        istio(
            "AuthorizationPolicy",
            "p",
            &format!("selector: {{matchLabels: {{{selector}}}}}, rules: [{{}}]"),
        )
        .replace("networking", "security")
    };
    finds(&policy("app: web"), &[]);
    finds(
        &policy("app: x"),
        &["W AuthorizationPolicy p spec.selector.matchLabels: is app=x, which no workload of namespace shop"],
    );
    finds(&policy("app: x").replace("namespace: shop", "namespace: data"), &[]);
    let entry = istio("WorkloadEntry", "vm", "address: 10.0.0.9, labels: {app: vm}");
    finds(&entry, &["W WorkloadEntry vm spec.labels: are selected by no"]);
    let selecting = istio(
        "ServiceEntry",
        "s",
        "hosts: [vm.local], location: MESH_INTERNAL, resolution: STATIC, workloadSelector: {labels: {app: vm}}, ports: [{number: 80, name: h}]",
    );
    finds(&(entry + &selecting), &[]);
    finds(&selecting, &["W ServiceEntry s spec.workloadSelector.labels: is app=vm"]);
    let through = |proxy: &str| {
        let policy = format!("outboundTrafficPolicy: {{mode: ALLOW_ANY, egressProxy: {{{proxy}}}}}");
        istio("Sidecar", "out", &policy)
    };
    finds(&through("host: web"), &[]);
    let at = "E Sidecar out spec.outboundTrafficPolicy.egressProxy";
    for (proxy, wanted) in [
        (
            "host: gone",
            format!(
                "{at}.host: is gone.shop.svc.cluster.local, which no Service or ServiceEntry has; nothing"
            ),
        ),
        ("host: web, port: {number: 81}", format!("{at}.port.number: is 81, which is no port of web.shop")),
        ("host: web, subset: v9", format!("{at}.subset: is v9, which no DestinationRule for web.shop")),
    ] {
        finds(&through(proxy), &[&wanted]);
    }
    let two = "{apiVersion: v1, kind: Service, metadata: {name: two, namespace: shop}, spec: {clusterIP: 10.96.0.3, ports: [{name: a, port: 1}, {name: b, port: 2}]}}\n---\n";
    let several =
        format!("{at}.port: is missing, and two.shop.svc.cluster.local has not one port; its ports: 1, 2");
    finds(&(two.to_owned() + &through("host: two")), &[&several]);
    let sidecar = |name: &str| istio("Sidecar", name, "egress: [{hosts: ['./*']}]");
    finds(
        &(sidecar("a") + &sidecar("b")),
        &[
            "E Sidecar b spec.workloadSelector: is for all workloads of namespace shop, as the older Sidecar shop/a",
        ],
    );
}
