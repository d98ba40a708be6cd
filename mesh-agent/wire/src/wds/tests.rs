//! What goes over the wire comes back; what does not come from us is read safely.

mod reach;
mod routes;
mod worlds;

use std::{net::IpAddr, sync::Arc};

use mesh_core::{
    mode::{Mode, PortModes},
    policy::{Action, AuthorizationPolicy, Match, Rule, Scope, StringMatch},
    route::{HostPort, Routes, http::HttpTable, scope::Scoped},
    snapshot::{Mesh, Name, Parts, Snapshot, Tunnel, Workload},
};
use proptest::prelude::*;
use prost::Message as _;

use super::{
    Kind, Problem,
    assembler::{Assembler, decode},
    encoder::{Edits, Encoder},
};
use crate::proto::{
    nodemesh,
    security::{self, Authorization, string_match::MatchType},
    workload as wds,
};

/// Applies edits as a client does.
fn apply(assembler: &mut Assembler, edits: Edits) {
    for ((kind, name), edit) in edits {
        match edit {
            Some(encoded) => assembler.set(&name, decode(kind, &name, &encoded.body).unwrap()),
            None => assembler.remove(kind, &name),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

    #[test]
    fn a_world_and_all_that_follow_it_arrive_as_they_were_sent(worlds in worlds::sequence(1..5)) {
        let mut encoder = Encoder::new();
        let mut assembler = Assembler::default();
        for (version, parts) in worlds.into_iter().enumerate() {
            let sent = Arc::new(Snapshot::new(version as u64, parts));
            apply(&mut assembler, encoder.update(&sent));
            let received = Snapshot::new(version as u64, assembler.parts());
            prop_assert!(received.same_world(&sent), "sent {sent:#?}\nreceived {received:#?}");
            // One who comes now gets the same.
            let mut late = Assembler::default();
            apply(&mut late, Encoder::new().update(&sent));
            prop_assert!(Snapshot::new(0, late.parts()).same_world(&sent));
        }
    }

    #[test]
    fn edits_leave_exactly_what_a_new_client_would_get(worlds in worlds::sequence(2..5)) {
        let mut encoder = Encoder::new();
        let mut held = Edits::new();
        for parts in worlds {
            let sent = Arc::new(Snapshot::new(1, parts));
            for (key, edit) in encoder.update(&sent) {
                if edit.is_some() { held.insert(key, edit) } else { held.remove(&key) };
            }
            let fresh = Encoder::new().update(&sent);
            prop_assert_eq!(&held, &fresh);
        }
    }

    #[test]
    fn foreign_clients_are_never_told_something_more_open(
        policy in worlds::policy(),
        attempts in prop::collection::vec(worlds::attempt(), 20),
    ) {
        let mesh = Mesh { trust_domain: "td1".into(), trust_domain_aliases: vec!["old".into()], ..Mesh::default() };
        let message = super::policy::encode(&policy, &mesh);
        let told = Authorization { nodemesh: None, ..message }.encode_to_vec();
        let Ok(super::policy::Policy::Own(told)) = super::policy::decode("a/b", &told) else {
            panic!("istio's form of our policy does not decode");
        };
        for attempt in attempts {
            let ours = worlds::admits(&policy, &attempt, &mesh);
            let theirs = worlds::admits_literally(&told, &attempt);
            prop_assert!(ours || !theirs, "{attempt:?}: told {told:#?}");
        }
    }

    #[test]
    fn any_bytes_decode_to_a_value_or_an_error(kind in 0usize..5, body in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(resource) = decode(Kind::ALL[kind], "a/b", &body) {
            let mut assembler = Assembler::default();
            assembler.set("a/b", resource);
            drop(Snapshot::new(1, assembler.parts()));
        }
    }
}

fn world(parts: Parts) -> Arc<Snapshot> {
    Arc::new(Snapshot::new(1, parts))
}

fn pod(name: &str, addr: &str) -> Workload {
    let addr: IpAddr = addr.parse().unwrap();
    Workload {
        addrs: vec![addr],
        meshed: true,
        tunnel: Tunnel::Hbone,
        ready: true,
        ..Workload::named(Name::new("shop", name))
    }
}

fn address(edits: &Edits, name: &str) -> wds::Address {
    let encoded = edits[&(Kind::Address, name.to_owned())].as_ref().unwrap();
    wds::Address::decode(encoded.body.as_slice()).unwrap()
}

fn workload_message(edits: &Edits, name: &str) -> wds::Workload {
    match address(edits, name).r#type {
        Some(wds::address::Type::Workload(message)) => message,
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn a_ztunnel_reads_what_it_needs_of_a_pod() {
    let web = pod("web", "10.0.0.1");
    let edits = Encoder::new().update(&world(Parts { workloads: vec![Arc::new(web)], ..Parts::default() }));
    let message = workload_message(&edits, "Kubernetes//Pod/shop/web");
    assert_eq!(message.addresses, [vec![10, 0, 0, 1]]);
    assert_eq!(message.tunnel_protocol(), wds::TunnelProtocol::Hbone);
    assert_eq!(message.status(), wds::WorkloadStatus::Healthy);
    assert_eq!((message.trust_domain.as_str(), message.service_account.as_str()), ("", ""));
    assert_eq!((message.canonical_name.as_str(), message.canonical_revision.as_str()), ("web", "latest"));
    let encoded = edits[&(Kind::Address, "Kubernetes//Pod/shop/web".to_owned())].as_ref().unwrap();
    assert_eq!(encoded.aliases, ["/10.0.0.1"]);
}

#[test]
fn strict_is_a_policy_to_foreign_clients_and_a_mode_to_ours() {
    let ports = [(8080, Mode::Permissive)].into();
    let modes = PortModes { default: Mode::Strict, ports };
    let web = Workload { modes: modes.clone(), ..pod("web", "10.0.0.1") };
    let sent = world(Parts { workloads: vec![Arc::new(web)], ..Parts::default() });
    let edits = Encoder::new().update(&sent);
    let message = workload_message(&edits, "Kubernetes//Pod/shop/web");
    let policy = "istio-system/nodemesh_modes_strict_8080";
    assert_eq!(message.authorization_policies, [policy]);
    let encoded = edits[&(Kind::Authorization, policy.to_owned())].as_ref().unwrap();
    let message = Authorization::decode(encoded.body.as_slice()).unwrap();
    assert_eq!(message.action(), security::Action::Deny);
    let m = &message.rules[0].clauses[0].matches[0];
    assert_eq!(m.not_principals[0].match_type, Some(MatchType::Presence(())));
    assert_eq!(m.not_destination_ports, [8080]);
    let mut assembler = Assembler::default();
    apply(&mut assembler, edits);
    let parts = assembler.parts();
    assert!(parts.policies.is_empty() && parts.workloads[0].policies.is_empty());
    assert_eq!(parts.workloads[0].modes, modes);
}

#[test]
fn istiods_resources_make_a_world_without_our_facts() {
    let mut assembler = Assembler::default();
    let workload = wds::Workload {
        uid: "Kubernetes//Pod/shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
        services: [(
            "shop/web.shop.svc.cluster.local".to_owned(),
            wds::PortList { ports: vec![wds::Port { service_port: 80, target_port: 8080 }] },
        )]
        .into(),
        authorization_policies: vec!["shop/only-cart".into()],
        ..Default::default()
    };
    let service = wds::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![wds::NetworkAddress { network: String::new(), address: vec![10, 96, 0, 1] }],
        ports: vec![wds::Port { service_port: 80, target_port: 0 }],
        ..Default::default()
    };
    let policy = |name: &str, scope: security::Scope| Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: scope.into(),
        ..Default::default()
    };
    let mut set = |kind, name: &str, body: Vec<u8>| {
        assembler.set(name, decode(kind, name, &body).unwrap());
    };
    let address = |kind| wds::Address { r#type: Some(kind) }.encode_to_vec();
    set(Kind::Address, "Kubernetes//Pod/shop/web", address(wds::address::Type::Workload(workload)));
    set(Kind::Address, "shop/web.shop.svc.cluster.local", address(wds::address::Type::Service(service)));
    for (name, scope) in
        [("only-cart", security::Scope::WorkloadSelector), ("all", security::Scope::Namespace)]
    {
        set(Kind::Authorization, &format!("shop/{name}"), policy(name, scope).encode_to_vec());
    }
    let parts = assembler.parts();
    let web = &parts.workloads[0];
    assert!(web.meshed && web.ready && web.tunnel == Tunnel::Hbone);
    assert_eq!(web.identity().to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!(web.policies, [Name::new("shop", "all"), Name::new("shop", "only-cart")]);
    let endpoint = &parts.services[0].ports[0].endpoints[0];
    assert_eq!((endpoint.port, endpoint.workload, endpoint.ready), (8080, Some(web.id), true));
}

#[test]
fn a_route_that_cannot_be_used_is_refused_by_name_and_reason() {
    let name = "http/web:80";
    let refusal = |name: &str, form: u32, entry: &str| {
        let body = nodemesh::Route { form, entry: entry.as_bytes().to_vec() }.encode_to_vec();
        decode(Kind::Route, name, &body).unwrap_err().to_string()
    };
    let table = |rules: &str, default: usize| {
        let unmatched = r#""passthrough""#;
        format!(
            r#"{{"http":{{"at":{{"host":"web","port":80}},"tables":{{"values":[{{"rules":[{rules}],"unmatched":{unmatched}}}],"default":{default},"by_namespace":{{}}}}}}}}"#
        )
    };
    assert_eq!(refusal(name, 2, ""), "Route \"http/web:80\", form: is form 2, which is not known here");
    assert!(refusal(name, 1, "{").contains("entry: is no such entry: EOF"));
    assert!(refusal(name, 1, r#"{"other":{}}"#).contains("unknown variant"));
    assert!(refusal(name, 1, &table("", 1)).ends_with("entry.values[1]: is missing"));
    assert!(
        refusal("http/web:81", 1, &table("", 0)).ends_with("name: is \"http/web:81\", which is not its own")
    );
    let good = nodemesh::Route { form: 1, entry: table("", 0).into_bytes() };
    decode(Kind::Route, name, &good.encode_to_vec()).unwrap();
    let large = nodemesh::Route { form: 1, entry: vec![b' '; super::ROUTE_BYTES_MAX] }.encode_to_vec();
    assert_eq!(decode(Kind::Route, name, &large).unwrap_err().problem, Problem::TooLarge(large.len()));
    // A rule that forwards to nothing would have to be guarded against at every request.
    let nowhere = HttpTable::new(Vec::new(), mesh_core::route::http::Action::Forward(Vec::new()));
    let at = HostPort { host: "web".into(), port: 80 };
    let routes = Routes { http: [(at, Scoped::everywhere(Arc::new(nowhere)))].into(), ..Routes::default() };
    let sent = world(Parts { routes: Arc::new(routes), ..Parts::default() });
    let edits = Encoder::new().update(&sent);
    let encoded = edits[&(Kind::Route, name.to_owned())].as_ref().unwrap();
    assert!(
        decode(Kind::Route, name, &encoded.body).unwrap_err().to_string().contains("backends: is missing")
    );
}

#[test]
fn a_changed_table_is_the_only_one_that_is_sent_again() {
    let entry = |host: &str, status: u16| {
        let unmatched = mesh_core::route::http::Action::Respond {
            status,
            body: Arc::from(*b"no"),
            reason: "no_route".into(),
        };
        let table = HttpTable::new(Vec::new(), unmatched);
        (HostPort { host: host.into(), port: 80 }, Scoped::everywhere(Arc::new(table)))
    };
    let routes = |status| Routes { http: [entry("a", 404), entry("b", status)].into(), ..Routes::default() };
    let parts = |status| Parts { routes: Arc::new(routes(status)), ..Parts::default() };
    let mut encoder = Encoder::new();
    encoder.update(&world(parts(404)));
    let edits = encoder.update(&world(parts(503)));
    assert_eq!(edits.keys().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), ["http/b:80"]);
    let edits = encoder.update(&world(Parts::default()));
    assert_eq!(edits.values().flatten().count(), 0);
    assert_eq!(edits.len(), 2, "both are removed: {edits:?}");
}

#[test]
fn a_condition_that_is_not_known_here_closes_the_policy() {
    let m = security::Match { destination_ports: vec![80], ..Default::default() };
    let clauses = vec![security::Clause { matches: vec![m] }];
    let message = Authorization {
        name: "p".into(),
        namespace: "a".into(),
        rules: vec![security::Rule { clauses }],
        ..Default::default()
    };
    let mut body = message.encode_to_vec();
    let known = decode(Kind::Authorization, "a/p", &body).unwrap();
    // A field 99 of the policy, which nobody has defined yet.
    body.extend([0x98, 0x06, 0x01]);
    let unknown = decode(Kind::Authorization, "a/p", &body).unwrap();
    let rule = |resource| {
        let mut assembler = Assembler::default();
        assembler.set("a/p", resource);
        assembler.parts().policies[0].rules[0].clone()
    };
    assert!(!rule(known).needs_requests());
    assert!(rule(unknown).needs_requests());
}

#[test]
fn errors_name_the_resource_and_the_field() {
    let workload = |message: wds::Workload| {
        let body = wds::Address { r#type: Some(wds::address::Type::Workload(message)) }.encode_to_vec();
        decode(Kind::Address, "uid", &body).unwrap_err().to_string()
    };
    let short = wds::Workload { addresses: vec![vec![10, 0, 0, 1], vec![1, 2, 3]], ..Default::default() };
    assert_eq!(
        workload(short),
        "Address \"uid\", workload.addresses[1]: is an address of 3 bytes; 4 or 16 are wanted"
    );
    let tunnel = wds::Workload { tunnel_protocol: 7, ..Default::default() };
    assert_eq!(workload(tunnel), "Address \"uid\", workload.tunnel_protocol: is 7, which is not known here");
    let facts = nodemesh::WorkloadFacts {
        addresses: vec![vec![]],
        modes: Some(Default::default()),
        ..Default::default()
    };
    let extensions = vec![super::value::facts_value("WorkloadFacts", &facts)];
    let ours = wds::Workload { extensions, ..Default::default() };
    assert_eq!(
        workload(ours),
        "Address \"uid\", facts.addresses[0]: is an address of 0 bytes; 4 or 16 are wanted"
    );
    let scope = Authorization { scope: 9, ..Default::default() }.encode_to_vec();
    let error = decode(Kind::Authorization, "a/p", &scope).unwrap_err();
    assert_eq!((error.field.as_str(), error.problem), ("scope", Problem::Unknown(9)));
    let large = vec![0; super::RESOURCE_BYTES_MAX + 1];
    let error = decode(Kind::Mesh, "mesh", &large).unwrap_err();
    assert_eq!(error.problem, Problem::TooLarge(large.len()));
}

#[test]
fn l7_rules_reach_foreign_clients_only_as_far_as_they_are_stricter() {
    let l7 = Match { l7: true, destination_ports: vec![80], ..Match::default() };
    let rule = Rule { clauses: vec![vec![l7]] };
    let only_l7 = Rule { clauses: vec![vec![Match { l7: true, ..Match::default() }]] };
    let plain = Rule {
        clauses: vec![vec![Match { namespaces: vec![StringMatch::Exact("a".into())], ..Match::default() }]],
    };
    let policy = |action| AuthorizationPolicy {
        scope: Scope::Namespace,
        action,
        rules: vec![rule.clone(), only_l7.clone(), plain.clone()],
        ..AuthorizationPolicy::named(Name::new("a", "p"))
    };
    let told = |action| super::policy::encode(&policy(action), &Mesh::default()).rules;
    assert_eq!(told(Action::Allow).len(), 1);
    let deny = told(Action::Deny);
    assert_eq!(deny[0].clauses[0].matches[0].destination_ports, [80]);
    assert!(deny[1].clauses[0].matches.is_empty(), "a clause without matches always holds");
    assert_eq!(deny.len(), 3);
}
