//! Tables of what users write, right and wrong, by rows of the semantics (S64 …).

use super::*;
use crate::{
    problem::Level,
    resource::Resource,
    source::document::{Known, Rules, parse},
};

fn read_in(namespace: &str, spec: &str) -> (Option<Sidecar>, Vec<String>) {
    let text = format!(
        "{{apiVersion: networking.istio.io/v1alpha3, kind: Sidecar, metadata: {{name: s, namespace: {namespace}}}, spec: {spec}}}"
    );
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    let said = parsed.problems.iter().map(|p| {
        let level = if p.level == Level::Error { "E" } else { "W" };
        format!("{level} {}: {}", p.field, p.message)
    });
    let read = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::Sidecar(sidecar) => (**sidecar).clone(),
        other => panic!("{other:?}"),
    });
    (read, said.collect())
}

fn good(spec: &str) -> Sidecar {
    let (read, said) = read_in("shop", spec);
    assert_eq!(said, [""; 0], "{spec}");
    read.unwrap()
}

fn host(namespace: Option<&str>, host: &str) -> EgressHost {
    EgressHost { excluded: false, namespace: namespace.map(Into::into), host: host.into() }
}

#[test]
fn s65_hosts_have_a_namespace_and_a_name() {
    let read =
        good("{egress: [{hosts: [./*, istio-system/*, '*/*.Example.com', prod/a.b, ~prod/secret.prod]}]}");
    let listeners = read.egress.unwrap();
    assert_eq!(
        listeners[0].hosts,
        [
            host(Some("shop"), "*"),
            host(Some("istio-system"), "*"),
            host(None, "*.example.com"),
            host(Some("prod"), "a.b"),
            EgressHost { excluded: true, ..host(Some("prod"), "secret.prod") },
        ]
    );
    let nothing = good("{egress: [{hosts: ['~/*']}]}").egress.unwrap();
    assert!(nothing.len() == 1 && nothing[0].hosts.is_empty(), "nothing is not everything");
    assert_eq!(good("{outboundTrafficPolicy: {mode: ALLOW_ANY}}").egress, None);
}

#[test]
fn s67_listeners_are_for_a_port_and_the_last_may_be_for_the_rest() {
    let read =
        good("{egress: [{port: {number: 9080, protocol: HTTP, name: web}, hosts: [./*]}, {hosts: ['*/*']}]}");
    let ports: Vec<_> = read.egress.unwrap().iter().map(|listener| listener.port).collect();
    assert_eq!(ports, [Some(9080), None]);
}

#[test]
fn s64_s68_selector_and_outbound_policy_are_read() {
    let read = good("{workloadSelector: {labels: {app: a}}, outboundTrafficPolicy: {mode: REGISTRY_ONLY}}");
    assert_eq!(read.selector.len(), 1);
    assert_eq!((read.outbound, read.egress_proxy), (Some(OutboundPolicy::RegistryOnly), None));
    let through = |proxy: &str| {
        let read = good(&format!("{{outboundTrafficPolicy: {{mode: ALLOW_ANY, egressProxy: {{{proxy}}}}}}}"));
        assert_eq!(read.outbound, Some(OutboundPolicy::AllowAny));
        let proxy = read.egress_proxy.unwrap();
        (proxy.host.full("cluster.local").to_string(), proxy.port, proxy.subset.as_deref().map(str::to_owned))
    };
    assert_eq!(through("host: out"), ("out.shop.svc.cluster.local".to_owned(), None, None));
    assert_eq!(
        through("host: out.example, port: {number: 80}, subset: v1"),
        ("out.example".to_owned(), Some(80), Some("v1".to_owned()))
    );
    assert_eq!(
        good("{inboundConnectionPool: {tcp: {maxConnections: 1}}}").inbound_pool.unwrap().max_connections,
        Some(1)
    );
}

#[test]
fn mistakes_name_the_field() {
    for (spec, start, words) in [
        ("{}", "W spec", "says nothing"),
        ("{egress: [{hosts: []}]}", "E spec.egress[0].hosts", "is missing"),
        ("{egress: [{}]}", "E spec.egress[0].hosts", "is missing"),
        ("{egress: [{hosts: [web]}]}", "E spec.egress[0].hosts[0]", "NAMESPACE/HOST"),
        ("{egress: [{hosts: [a/b/c]}]}", "E spec.egress[0].hosts[0]", "a host name"),
        ("{egress: [{hosts: [A/*]}]}", "E spec.egress[0].hosts[0]", "wanted a namespace"),
        ("{egress: [{hosts: ['~/a']}]}", "W spec.egress[0].hosts[0]", "nothing"),
        ("{egress: [{hosts: [./*]}, {port: {number: 1}, hosts: [./*]}]}", "E spec.egress[0]", "not the last"),
        (
            "{egress: [{port: {number: 1}, hosts: [./*]}, {port: {number: 1}, hosts: [./*]}]}",
            "E spec.egress[1].port",
            "there already",
        ),
        ("{egress: [{port: {}, hosts: [./*]}]}", "E spec.egress[0].port.number", "is missing"),
        ("{egress: [{captureMode: NONE, hosts: [./*]}]}", "W spec.egress[0].captureMode", "no effect"),
        (
            "{outboundTrafficPolicy: {mode: SOME}}",
            "E spec.outboundTrafficPolicy.mode",
            "REGISTRY_ONLY or ALLOW_ANY",
        ),
        ("{outboundTrafficPolicy: {}}", "W spec.outboundTrafficPolicy.mode", "which means REGISTRY_ONLY"),
        (
            "{outboundTrafficPolicy: {mode: REGISTRY_ONLY, egressProxy: {host: a}}}",
            "E spec.outboundTrafficPolicy.egressProxy",
            "wanted ALLOW_ANY",
        ),
        (
            "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {subset: v1}}}",
            "E spec.outboundTrafficPolicy.egressProxy.host",
            "is missing",
        ),
        (
            "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: '*'}}}",
            "E spec.outboundTrafficPolicy.egressProxy.host",
            "wanted the host of one service",
        ),
        (
            "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a, port: {}}}}",
            "E spec.outboundTrafficPolicy.egressProxy.port.number",
            "is missing",
        ),
        (
            "{inboundConnectionPool: {tcp: {maxConnections: 1}, http: {http2MaxRequests: 1, maxRetries: 1, useClientProtocol: true, http2KeepAlive: {interval: 1s}}}}",
            "W spec.inboundConnectionPool.http.http2KeepAlive",
            "no effect on the server's side",
        ),
        (
            "{ingress: [{port: {number: 1}, defaultEndpoint: '127.0.0.1:80'}]}",
            "W spec.ingress",
            "keep their own ports",
        ),
    ] {
        let (used, said) = read_in("shop", spec);
        let [only] = said.as_slice() else { panic!("{spec}: {said:?}") };
        assert!(only.starts_with(&format!("{start}: ")) && only.contains(words), "{spec}: {only}");
        assert_eq!(used.is_some(), start.starts_with('W'), "{spec}");
    }
    // Without a mode it is REGISTRY_ONLY as well.
    let (used, said) = read_in("shop", "{outboundTrafficPolicy: {egressProxy: {host: a}}}");
    assert!(
        used.is_none() && said[1].contains("egressProxy: is there beside mode REGISTRY_ONLY"),
        "{said:?}"
    );
    let (_, said) =
        read_in("istio-system", "{workloadSelector: {labels: {a: b}}, egress: [{hosts: ['*/*']}]}");
    assert!(said[0].starts_with("E spec.workloadSelector: is there in the root namespace"), "{said:?}");
}
