//! Bodies of fuzz targets, and the inputs they start from. Each runs as a property test too.
//!
//! A body panics if a decoder breaks its promises: it is total, and what it accepts it can say again.

use mesh_core::snapshot::Snapshot;
use prost::Message as _;

use crate::{
    hbone::{authority::Authority, baggage::Baggage, forwarded::Forwarded, traceparent::Traceparent},
    proto::{
        discovery::{DeltaDiscoveryResponse, Resource},
        nodemesh, security, workload,
    },
    wds::{
        Kind,
        assembler::{Assembler, decode},
        encoder::Encoder,
    },
};

/// A delta response as an agent takes it: decode all, apply all, build the world, publish it again.
pub fn xds(input: &[u8]) {
    let Some((&choice, body)) = input.split_first() else { return };
    let mut assembler = Assembler::default();
    // One resource of a chosen kind reaches deep at once; a whole response is the real thing.
    if let Some(kind) = Kind::ALL.get(usize::from(choice)) {
        apply(&mut assembler, *kind, seed_name(*kind), body);
    } else if let Ok(response) = DeltaDiscoveryResponse::decode(body) {
        for Resource { name, resource, .. } in &response.resources {
            let Some(any) = resource else { continue };
            if let Some(kind) = Kind::of(&any.type_url) {
                apply(&mut assembler, kind, name, &any.value);
            }
        }
        if let Some(kind) = Kind::of(&response.type_url) {
            response.removed_resources.iter().for_each(|name| assembler.remove(kind, name));
        }
    }
    let world = std::sync::Arc::new(Snapshot::new(1, assembler.parts()));
    let mut copy = Assembler::default();
    for ((kind, name), edit) in Encoder::new().update(&world) {
        // A resource may have grown beyond what is decoded; that is an error as any other.
        let encoded = edit.and_then(|encoded| decode(kind, &name, &encoded.body).ok());
        if let Some(resource) = encoded {
            copy.set(&name, resource);
        }
    }
    drop(Snapshot::new(1, copy.parts()));
}

fn apply(assembler: &mut Assembler, kind: Kind, name: &str, body: &[u8]) {
    match decode(kind, name, body) {
        Ok(resource) => {
            assembler.set(name, resource.clone());
            // The same again changes nothing.
            let before = Snapshot::new(1, assembler.parts());
            assembler.set(name, resource);
            assert!(before == Snapshot::new(1, assembler.parts()), "a resource set twice changes the world");
        }
        Err(error) => assert!(!error.field.is_empty(), "an error names no field: {error}"),
    }
}

/// Lines of `:authority`, `forwarded` and `traceparent`: what is accepted reads back as it is written.
pub fn hbone_headers(input: &[u8]) {
    for line in input.split(|byte| *byte == b'\n') {
        if let Ok(authority) = Authority::parse(line) {
            let text = authority.to_string();
            assert_eq!(Authority::parse(text.as_bytes()), Ok(authority), "{text}");
        }
        if let Ok(forwarded) = Forwarded::parse(line) {
            let text = forwarded.to_string();
            assert_eq!(Forwarded::parse(text.as_bytes()), Ok(forwarded), "{text}");
        }
        if let Ok(parent) = Traceparent::parse(line) {
            let text = parent.to_string();
            assert_eq!(Traceparent::parse(text.as_bytes()), Ok(parent), "{text}");
        }
    }
}

/// Lines of `baggage`: what is accepted reads back as it is written.
pub fn baggage(input: &[u8]) {
    if let Ok(baggage) = Baggage::parse(input.split(|byte| *byte == b'\n')) {
        let text = baggage.to_string();
        assert_eq!(Baggage::parse([text.as_bytes()]), Ok(baggage), "{text}");
    }
}

/// Inputs that [`xds`] accepts.
pub fn xds_seeds() -> Vec<Vec<u8>> {
    let bodies = [
        (Kind::Authorization, authorization().encode_to_vec()),
        (Kind::Address, address(workload::address::Type::Workload(web(true)))),
        (Kind::Address, address(workload::address::Type::Workload(web(false)))),
        (Kind::Address, address(workload::address::Type::Service(service()))),
        (Kind::Mesh, mesh().encode_to_vec()),
        (Kind::Route, route().encode_to_vec()),
        (Kind::NodePod, node_pod().encode_to_vec()),
    ];
    let chosen = |kind: Kind| u8::try_from(kind as usize).unwrap_or(u8::MAX);
    let mut seeds: Vec<Vec<u8>> =
        bodies.iter().map(|(kind, body)| [&[chosen(*kind)], body.as_slice()].concat()).collect();
    let resources = bodies.iter().enumerate().map(|(index, (kind, body))| Resource {
        name: if *kind == Kind::Route { seed_name(*kind).into() } else { format!("shop/web{index}") },
        version: "1".into(),
        resource: Some(prost_types::Any { type_url: kind.type_url().into(), value: body.clone() }),
        ..Default::default()
    });
    let response = DeltaDiscoveryResponse {
        resources: resources.collect(),
        type_url: Kind::Address.type_url().into(),
        removed_resources: vec!["shop/web1".into()],
        nonce: "1".into(),
        ..Default::default()
    };
    seeds.push([vec![0xff], response.encode_to_vec()].concat());
    seeds
}

/// Inputs that [`hbone_headers`] accepts.
pub fn hbone_header_seeds() -> Vec<Vec<u8>> {
    let lines: [&[u8]; 6] = [
        b"10.0.0.1:8080",
        b"[fd00::1]:80",
        b"web.shop.svc.cluster.local:80",
        b"for=\"[fd00::1]:80\";host=web.shop.svc;proto=http, for=unknown",
        b"for=10.0.0.1;by=\"a\\\"b\"",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ];
    let mut seeds: Vec<Vec<u8>> = lines.iter().map(|line| line.to_vec()).collect();
    seeds.push(lines.join(&b'\n'));
    seeds
}

/// Inputs that [`baggage`] accepts.
pub fn baggage_seeds() -> Vec<Vec<u8>> {
    let texts: [&[u8]; 3] = [
        b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web",
        b"service.version=v1\ncloud.region=r, cloud.availability_zone = z ;secret",
        b"k8s.pod.name=a%2Cb%C3%A9,k8s.job.name=x,k8s.cronjob.name=",
    ];
    texts.iter().map(|text| text.to_vec()).collect()
}

fn address(kind: workload::address::Type) -> Vec<u8> {
    workload::Address { r#type: Some(kind) }.encode_to_vec()
}

fn authorization() -> security::Authorization {
    let text = |form| security::StringMatch { match_type: Some(form) };
    let net = || security::Address { address: vec![10, 0, 0, 0], length: 8 };
    let m = security::Match {
        principals: vec![text(security::string_match::MatchType::Suffix("/sa/web".into()))],
        not_namespaces: vec![text(security::string_match::MatchType::Exact("a*b".into()))],
        not_principals: vec![text(security::string_match::MatchType::Presence(()))],
        source_ips: vec![net()],
        not_destination_ips: vec![net()],
        destination_ports: vec![80, 443],
        ..Default::default()
    };
    let exact = nodemesh::Match {
        trust_domains: vec![nodemesh::Text { form: Some(nodemesh::text::Form::Prefix("td".into())) }],
        source_addresses: vec![nodemesh::Cidr { address: vec![0; 16], length: 64 }],
        l7: true,
        ..Default::default()
    };
    let exact = nodemesh::Rule { clauses: vec![nodemesh::Clause { matches: vec![exact] }] };
    security::Authorization {
        name: "web".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![m] }] }],
        dry_run: false,
        nodemesh: Some(nodemesh::PolicyFacts {
            foreign_only: false,
            exact: Some(nodemesh::Rules { rules: vec![exact] }),
        }),
    }
}

fn extension(message: &str, facts: &impl prost::Message) -> workload::Extension {
    let type_url = format!("type.googleapis.com/nodemesh.v1.{message}");
    let config = prost_types::Any { type_url, value: facts.encode_to_vec() };
    workload::Extension { name: "nodemesh.dev/facts".into(), config: Some(config) }
}

fn web(is_ours: bool) -> workload::Workload {
    let endpoint = nodemesh::Endpoint { port: 80, target_port: 8080, ..Default::default() };
    let service = nodemesh::Name { namespace: "shop".into(), name: "web".into() };
    let facts = nodemesh::WorkloadFacts {
        id: 7,
        addresses: vec![vec![10, 0, 0, 1], vec![0xfd; 16]],
        meshed: true,
        ready: true,
        hbone: true,
        labels: [("app".to_owned(), "web".to_owned())].into(),
        modes: Some(nodemesh::Modes { ports: [(80, 1)].into(), ..Default::default() }),
        endpoints: vec![nodemesh::ServiceEndpoints { service: Some(service), endpoints: vec![endpoint] }],
        ..Default::default()
    };
    let ports = vec![workload::Port { service_port: 80, target_port: 8080 }];
    workload::Workload {
        uid: "Kubernetes//Pod/shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        services: [("shop/web.shop.svc.cluster.local".to_owned(), workload::PortList { ports })].into(),
        authorization_policies: vec!["shop/web".into()],
        extensions: is_ours.then(|| extension("WorkloadFacts", &facts)).into_iter().collect(),
        ..Default::default()
    }
}

fn service() -> workload::Service {
    let port = |port, protocol| nodemesh::ServicePort { port, protocol, ..Default::default() };
    let facts = nodemesh::ServiceFacts {
        id: 9,
        vips: vec![vec![10, 96, 0, 1]],
        affinity: Some(nodemesh::Affinity { seconds: 3, nanos: 1 }),
        ports: vec![port(80, 0), port(53, 1)],
        yields_to: vec![nodemesh::Name { namespace: "shop".into(), name: "web".into() }],
        ..Default::default()
    };
    workload::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![workload::NetworkAddress { network: String::new(), address: vec![10, 96, 0, 1] }],
        ports: vec![workload::Port { service_port: 80, target_port: 8080 }],
        extensions: vec![extension("ServiceFacts", &facts)],
        ..Default::default()
    }
}

fn mesh() -> nodemesh::Mesh {
    nodemesh::Mesh {
        trust_domain: "td1".into(),
        trust_domain_aliases: vec!["old".into()],
        root_namespace: "istio-system".into(),
        cluster_domain: "cluster.local".into(),
        defaults: Some(nodemesh::Route { form: 1, entry: br#"{"outbound":"REGISTRY_ONLY"}"#.to_vec() }),
    }
}

/// What the resource of a seed is called: a route has its name in it.
fn seed_name(kind: Kind) -> &'static str {
    if kind == Kind::Route { "http/web.shop.svc.cluster.local:80" } else { "shop/web" }
}

fn route() -> nodemesh::Route {
    let entry = br#"{"http":{"at":{"host":"web.shop.svc.cluster.local","port":80},"tables":{
        "values":[{"rules":[],"unmatched":{"respond":{"status":404,"body":[104,105],"reason":"no_route"}}}],
        "default":0,"by_namespace":{"shop":{"selected":[[{"app":"web"},0]],"all":null}}}}}"#;
    nodemesh::Route { form: 1, entry: entry.to_vec() }
}

fn node_pod() -> nodemesh::NodePod {
    nodemesh::NodePod {
        namespace: "shop".into(),
        name: "web".into(),
        netns: Some("/run/netns/web".into()),
        settings: Some(nodemesh::PodSettings { exclude_inbound_ports: vec![22], ..Default::default() }),
        named_ports: [("http".to_owned(), 8080)].into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    /// A valid input, changed in a few places, cut or extended.
    fn mutated(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        let edits = vec((any::<Index>(), any::<u8>(), 0u8..4), 0..6);
        (prop::sample::select(seeds), edits).prop_map(|(mut input, edits)| {
            for (index, byte, kind) in edits {
                if input.is_empty() {
                    break;
                }
                let at = index.index(input.len());
                match kind {
                    0 => input[at] = byte,
                    1 => input.insert(at, byte),
                    2 => drop(input.remove(at)),
                    _ => input.truncate(at),
                }
            }
            input
        })
    }

    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        vec(any::<u8>(), 0..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

        #[test]
        fn xds_of_any_bytes_keeps_its_promises(input in any_bytes()) {
            xds(&input);
        }

        #[test]
        fn xds_almost_as_it_should_be_keeps_its_promises(input in mutated(xds_seeds())) {
            xds(&input);
        }

        #[test]
        fn headers_of_any_bytes_keep_their_promises(input in any_bytes()) {
            hbone_headers(&input);
            baggage(&input);
        }

        #[test]
        fn headers_almost_as_they_should_be_keep_their_promises(
            headers in mutated(hbone_header_seeds()),
            members in mutated(baggage_seeds()),
        ) {
            hbone_headers(&headers);
            baggage(&members);
        }
    }

    #[test]
    fn seeds_are_accepted() {
        for seed in xds_seeds() {
            let (choice, body) = seed.split_first().unwrap();
            match Kind::ALL.get(usize::from(*choice)) {
                Some(kind) => drop(decode(*kind, seed_name(*kind), body).unwrap()),
                None => assert_eq!(DeltaDiscoveryResponse::decode(body).unwrap().resources.len(), 7),
            }
        }
    }
}
