//! Tests of the source: from objects of an API server to the index.

mod alike;
mod routes;

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep},
};

use super::{
    Change, Publisher,
    object::{is_judged, read},
    world::World,
};
use crate::{
    compile::MeshSettings,
    problem::Level,
    resource::{Key, Kind},
    source::{
        document::Rules,
        pulse::{self, Pulse},
    },
};

/// A small shop, as an API server hands it out.
fn shop() -> Vec<Value> {
    let meta = |name: &str, generation: i64| {
        json!({"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "generation": generation, "resourceVersion": "17",
            "creationTimestamp": "2026-11-01T00:00:00Z", "labels": {"app": "web"},
            "managedFields": [{"manager": "kubectl", "operation": "Apply"}]})
    };
    vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}),
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}}}),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta("web", 0)}),
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta("web-1", 0),
            "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": [{"name": "web", "ports": [{"containerPort": 8080, "name": "http"}]}]},
            "status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": meta("web", 0),
            "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}),
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": meta("web", 1),
            "spec": {"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]}}),
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta("web", 3), "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
            "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}}),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": meta("api", 1),
            "spec": {"hosts": ["api.example.com"], "resolution": "STATIC", "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
                "endpoints": [{"address": "192.0.2.1"}]}}),
    ]
}

fn kind_of(object: &Value) -> Kind {
    let kind = object["kind"].as_str().unwrap();
    *Kind::ALL.iter().find(|known| known.as_str() == kind).unwrap()
}

fn put(object: &Value) -> Change {
    let kind = kind_of(object);
    let read = read(kind, object["apiVersion"].as_str().unwrap(), object.clone(), &Rules::default());
    Change::Put(Box::new(read.unwrap()))
}

fn world_of(objects: &[Value]) -> World {
    let mut world = World::new(MeshSettings::default());
    for object in objects {
        world.apply(put(object));
    }
    world
}

#[test]
fn an_object_that_cannot_be_used_leaves_its_last_good_state_in_force() {
    let mut objects = shop();
    let mut world = world_of(&objects);
    let before = world.compile().snapshot;
    objects[6]["spec"]["rules"][0]["backendRefs"][0]["port"] = json!(70_000);
    objects[6]["metadata"]["generation"] = json!(4);
    world.apply(put(&objects[6]));
    let state = world.compile();
    assert!(Arc::ptr_eq(&before, &state.snapshot), "the route of generation 3 stays");
    assert_eq!(state.status.files_kept_back.len(), 1);
    let [error] = &*state.status.errors else { panic!("{:?}", state.status.errors) };
    assert_eq!((error.name.as_deref(), error.level, error.document), (Some("web"), Level::Error, None));
    assert!(error.field.contains("backendRefs"), "{error}");
    // Mended, and then gone.
    objects[6]["spec"]["rules"][0]["backendRefs"][0]["port"] = json!(80);
    world.apply(put(&objects[6]));
    assert_eq!(world.compile().status.errors, []);
    let key = Key { kind: Kind::HttpRoute, name: mesh_core::snapshot::Name::new("shop", "web") };
    world.apply(Change::Gone(key));
    assert!(!world.compile().status.by_kind.contains_key(&Kind::HttpRoute));
}

#[test]
fn a_status_that_somebody_writes_changes_nothing_that_is_published() {
    let mut objects = shop();
    let mut world = world_of(&objects);
    let before = world.compile();
    objects[6]["status"] = json!({"parents": [{"controllerName": "a.b/c"}]});
    objects[6]["metadata"]["resourceVersion"] = json!("18");
    world.apply(put(&objects[6]));
    let after = world.compile();
    assert!(Arc::ptr_eq(&before.snapshot, &after.snapshot));
    assert!(after.judged.is_some(), "but whoever writes statuses has to know");
    world.apply(put(&objects[6]));
    assert!(world.compile().judged.is_none(), "the same again is no change");
}

#[test]
fn a_node_that_is_no_longer_ready_takes_nothing_from_its_pods() {
    let mut objects = shop();
    let mut world = world_of(&objects);
    let before = world.compile().snapshot;
    for (ready, heartbeat) in [("True", "10:00:00"), ("True", "10:05:00"), ("Unknown", "10:06:00")] {
        let at = format!("2026-11-22T{heartbeat}Z");
        objects[1]["status"] =
            json!({"conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": at}]});
        objects[1]["metadata"]["resourceVersion"] = json!(at);
        world.apply(put(&objects[1]));
        let after = world.compile();
        assert!(Arc::ptr_eq(&before, &after.snapshot) && after.judged.is_none(), "{ready} {heartbeat}");
    }
    let pod = before.workloads().next().unwrap();
    assert!(pod.meshed && pod.skipped.is_none());
}

#[test]
fn s16_what_rules_refer_to_and_is_not_there_is_told_to_their_users_and_to_nobody_else() {
    let mut objects = shop();
    let rule = |kind: &str, spec: Value| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": kind, "spec": spec,
            "metadata": {"name": "web", "namespace": "shop", "uid": format!("uid-{kind}"), "generation": 1, "resourceVersion": "1"}})
    };
    let to = |host: &str| json!({"hosts": ["api.example.com"], "http": [{"route": [{"destination": {"host": host}}]}]});
    objects.push(rule("VirtualService", to("gone")));
    objects.push(rule("DestinationRule", json!({"host": "lost.example.com"})));
    let through = json!({"mode": "ALLOW_ANY", "egressProxy": {"host": "lost"}});
    objects.push(rule("Sidecar", json!({"outboundTrafficPolicy": through})));
    let mut world = world_of(&objects);
    let state = world.compile();
    let missing = |state: &super::world::State, kind: Kind| {
        let key = Key { kind, name: mesh_core::snapshot::Name::new("shop", "web") };
        let (_, verdict) = &state.judged.as_ref().unwrap().objects[&key];
        assert!(!verdict.is_refused() && verdict.in_force);
        verdict.missing.iter().map(|problem| problem.field.clone()).collect::<Vec<_>>()
    };
    assert_eq!(missing(&state, Kind::VirtualService), ["spec.http[0].route[0].destination.host"]);
    assert_eq!(missing(&state, Kind::DestinationRule), ["spec.host"]);
    assert_eq!(missing(&state, Kind::Sidecar), ["spec.outboundTrafficPolicy.egressProxy.host"]);
    assert_eq!(missing(&state, Kind::HttpRoute), Vec::<String>::new());
    assert_eq!(state.status.errors, [], "agents are not told");
    // It appears; pods that come and go are no news.
    let mut gone = objects[4].clone();
    gone["metadata"]["name"] = json!("gone");
    gone["spec"]["clusterIP"] = json!("10.96.0.9");
    world.apply(put(&gone));
    assert_eq!(missing(&world.compile(), Kind::VirtualService), Vec::<String>::new());
    world.apply(Change::Gone(Key { kind: Kind::Pod, name: mesh_core::snapshot::Name::new("shop", "web-1") }));
    assert!(world.compile().judged.is_none());
}

#[test]
fn nothing_is_published_before_every_kind_was_listed() {
    let mut world = World::new(MeshSettings::default());
    // Secrets are followed one by one, and waited for by nobody.
    for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::Secret) {
        assert!(!world.is_listed(), "{kind}");
        world.apply(Change::Listed(*kind));
    }
    assert!(world.is_listed());
}

#[test]
fn a_kind_that_cannot_be_read_is_said_until_it_can() {
    let mut world = world_of(&shop());
    let before = world.compile().snapshot;
    world.apply(Change::Trouble(Kind::Pod, Some("forbidden".into())));
    let state = world.compile();
    assert!(Arc::ptr_eq(&before, &state.snapshot), "nothing is taken away");
    assert!(
        state.status.errors[0].to_string().contains("Pods cannot be read: forbidden"),
        "{:?}",
        state.status.errors
    );
    world.apply(Change::Trouble(Kind::Pod, None));
    assert_eq!(world.compile().status.errors, []);
}

#[test]
fn fields_that_are_newer_than_we_know_are_no_mistake_of_anybody() {
    let mut pod = shop().swap_remove(3);
    pod["spec"]["fieldOfNextYear"] = json!(1);
    let read = read(Kind::Pod, "v1", pod, &Rules::default()).unwrap();
    assert_eq!(read.problems, []);
}

#[test]
fn other_config_maps_are_not_read() {
    let of = |name: &str| {
        let object = json!({"metadata": {"name": name, "namespace": "nodemesh-system"}, "data": {"mesh": "trustDomain: a"}});
        let rules = Rules {
            mesh_config: mesh_core::snapshot::Name::new("nodemesh-system", "nodemesh"),
            ..Rules::default()
        };
        read(Kind::ConfigMap, "v1", object, &rules)
    };
    assert!(of("nodemesh").unwrap().resource.is_some());
    assert!(of("istio").is_none());
}

#[test]
fn users_are_told_about_their_own_kinds_alone() {
    let judged: Vec<_> =
        Kind::ALL.iter().filter(|kind| is_judged(**kind)).map(|kind| kind.as_str()).collect();
    let wanted = [
        "PeerAuthentication",
        "AuthorizationPolicy",
        "VirtualService",
        "DestinationRule",
        "Sidecar",
        "ServiceEntry",
        "WorkloadEntry",
        "HTTPRoute",
        "GRPCRoute",
        "TLSRoute",
        "TCPRoute",
    ];
    assert_eq!(judged, wanted);
}

#[test]
fn kinds_are_found_under_their_plural() {
    for (kind, plural) in [
        (Kind::ConfigMap, "configmaps"),
        (Kind::EndpointSlice, "endpointslices"),
        (Kind::ServiceEntry, "serviceentries"),
        (Kind::AuthorizationPolicy, "authorizationpolicies"),
        (Kind::HttpRoute, "httproutes"),
        (Kind::Sidecar, "sidecars"),
        (Kind::PeerAuthentication, "peerauthentications"),
    ] {
        assert_eq!(super::api_resource(kind, "v1").plural, plural);
    }
}

#[tokio::test(start_paused = true)]
async fn a_thread_that_waits_for_the_cluster_gives_signs_of_life() {
    let pulse = Pulse::default();
    let (_changes, received) = mpsc::channel(1);
    let publisher = Publisher {
        world: World::new(MeshSettings::default()),
        received,
        snapshots: watch::Sender::new(Arc::default()),
        sources: watch::Sender::new(Arc::default()),
        judged: watch::Sender::new(Arc::default()),
        wanted: watch::Sender::new(BTreeSet::new()),
        // Somebody waits for the first state.
        first: Some(oneshot::channel().0),
        next: Instant::now(),
        pulse: pulse.clone(),
    };
    let long_ago = std::time::Instant::now().checked_sub(pulse::STALE * 2).unwrap();
    let observed = async {
        // Twice: the first may be the one that the thread begins with.
        for _ in 0..2 {
            pulse.beat(long_ago);
            sleep(pulse::EACH * 2).await;
            assert!(pulse.silence().is_some_and(|silence| silence < pulse::STALE), "{pulse:?}");
        }
    };
    tokio::select! {
        () = publisher.run() => panic!("it ended"),
        () = observed => {}
    }
}
