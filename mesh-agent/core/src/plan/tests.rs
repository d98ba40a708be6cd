//! Tests of the plan: tables, and properties over a model of the reconciler.

use proptest::prelude::*;

use super::*;
use crate::{
    mode::{Mode, PortModes},
    route::{
        Origin, Routes,
        cluster::{Cluster, ClusterKey, ConnectionPool, TrafficPolicy},
        http::Backend,
        scope::{Audience, EgressProxy, InboundPools, Scoped, SidecarScope},
    },
    snapshot::{Endpoint, Parts, PodSettings, Protocol, Service, ServicePort},
};

fn meshed(name: &str) -> Workload {
    Workload {
        node: "n1".into(),
        addrs: vec![[10, 0, 0, 1].into()],
        meshed: true,
        netns: Some("/run/netns/a".into()),
        ..Workload::named(Name::new("default", name))
    }
}

fn pods_of(workloads: Vec<Workload>) -> LocalPods {
    let workloads = workloads.into_iter().map(Arc::new).collect();
    local_pods(&Snapshot::new(1, Parts { workloads, ..Parts::default() }), "n1")
}

fn spec(name: &str, netns_cookie: u64) -> PodSpec {
    PodSpec { config: PodConfig::of(&Snapshot::default(), &meshed(name)).unwrap(), netns_cookie }
}

fn desired(specs: &[PodSpec]) -> BTreeMap<PodKey, PodSpec> {
    specs.iter().map(|s| (s.config.workload, s.clone())).collect()
}

fn running(spec: &PodSpec) -> ActualPod {
    ActualPod {
        workload: spec.config.workload,
        netns_cookie: spec.netns_cookie,
        listening: true,
        applied: Some(spec.config.clone()),
    }
}

/// Carries steps out the way the reconciler does, on the model.
fn apply(actual: &mut BTreeMap<u32, ActualPod>, steps: Vec<Step>) {
    let mut next = actual.keys().next_back().map_or(1, |last| last + 1);
    for step in steps {
        match step {
            Step::Remove { pod, .. } => assert!(actual.remove(&pod).is_some()),
            Step::Adopt { pod, spec } | Step::Update { pod, spec } => {
                let is = actual.get_mut(&pod).expect("the pod is there");
                assert_eq!((is.workload, is.netns_cookie), (spec.config.workload, spec.netns_cookie));
                *is = running(&spec);
            }
            Step::Enrol { spec } => {
                assert!(
                    actual.values().all(|is| is.netns_cookie != spec.netns_cookie),
                    "namespace still taken"
                );
                actual.insert(next, running(&spec));
                next += 1;
            }
        }
    }
}

#[test]
fn only_live_meshed_pods_of_this_node_are_wanted() {
    let pods = pods_of(vec![
        meshed("good"),
        Workload { node: "n2".into(), ..meshed("elsewhere") },
        Workload { meshed: false, ..meshed("plain") },
        Workload { terminated: true, ..meshed("done") },
        Workload { netns: None, ..meshed("no-netns") },
        Workload { addrs: Vec::new(), ..meshed("no-address") },
        Workload { meshed: false, skipped: Some("host network".into()), ..meshed("host") },
    ]);
    let names: Vec<_> = pods.wanted.values().map(|c| &*c.name.name).collect();
    assert_eq!(names, ["good"]);
    let blocked: Vec<_> = pods.blocked.iter().map(|(n, o)| (&*n.name, o.clone())).collect();
    assert_eq!(
        blocked,
        [
            ("host", Obstacle::Skipped("host network".into())),
            ("no-address", Obstacle::NoAddress),
            ("no-netns", Obstacle::NoNetns),
        ]
    );
}

#[test]
fn port_rules_hold_only_what_differs_from_the_default() {
    let modes = PortModes {
        default: Mode::Strict,
        ports: [(80, Mode::Permissive), (81, Mode::Strict), (82, Mode::Disable)].into(),
    };
    let settings = PodSettings { exclude_inbound_ports: [80, 90].into(), ..PodSettings::default() };
    let web = Workload { modes, settings, ..meshed("web") };
    let config = PodConfig::of(&Snapshot::default(), &web).unwrap();
    assert!(config.inbound_fail_closed);
    let rules: Vec<_> = config.inbound_ports.iter().map(|(p, r)| (*p, r.excluded, r.fail_closed)).collect();
    assert_eq!(rules, [(80, true, Some(false)), (82, false, Some(false)), (90, true, None)]);
}

#[test]
fn verdicts_are_void_when_a_policy_an_identity_or_an_address_is_another_one() {
    let hashes = |workload: Workload| {
        let config = PodConfig::of(&Snapshot::default(), &workload).unwrap();
        (config.policy_hash, config.identity_hash)
    };
    let (policy, identity) = hashes(meshed("web"));
    assert_eq!(hashes(Workload { ready: true, ..meshed("web") }), (policy, identity));
    let policed = hashes(Workload { policy_hash: 1, ..meshed("web") });
    assert!(policed.0 != policy && policed.1 == identity);
    let renamed = hashes(Workload { service_account: "x".into(), ..meshed("web") });
    assert!(renamed.0 == policy && renamed.1 != identity);
    let moved = hashes(Workload { addrs: vec![[10, 0, 0, 2].into()], ..meshed("web") });
    assert!(moved.0 != policy && moved.1 != identity, "rules may name addresses of both sides");
}

#[test]
fn s45_verdicts_are_void_when_the_connections_to_a_pod_come_to_be_counted() {
    let hash = |max: Option<u32>, more: u16| {
        let pool = ConnectionPool { max_connections: max, ..ConnectionPool::default() };
        let inbound = InboundPools { all: Some(pool), ports: [(more, ConnectionPool::default())].into() };
        let scope = SidecarScope { egress: Vec::new(), outbound: None, egress_proxy: None, inbound };
        let name = Name::new("default", "limits");
        let routes = Routes { sidecars: [(name.clone(), Arc::new(scope))].into(), ..Routes::default() };
        let world = Snapshot::new(1, Parts { routes: Arc::new(routes), ..Parts::default() });
        PodConfig::of(&world, &Workload { sidecar: Some(name), ..meshed("a") }).unwrap().policy_hash
    };
    let plain = PodConfig::of(&Snapshot::default(), &meshed("a")).unwrap().policy_hash;
    assert_eq!(hash(None, 80), plain, "nothing is counted");
    assert_ne!(hash(Some(1), 80), plain);
    assert_ne!(hash(Some(1), 80), hash(Some(2), 80));
}

#[test]
fn verdicts_are_void_when_a_service_without_an_address_comes_to_be_routed_to_a_pod() {
    let hash = |vips: &[IpAddr], ruled: bool| {
        let web = meshed("web");
        let mut service = Service::named(Name::new(web.name.namespace.clone(), "pods"));
        service.vips = vips.to_vec();
        let endpoint = Endpoint {
            addr: web.addrs[0],
            port: 8080,
            workload: Some(web.id),
            ready: true,
            hostname: None,
            traits: None,
        };
        service.ports = vec![ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: vec![endpoint],
        }];
        let key = ClusterKey { service: service.name.clone(), port: 80, subset: None };
        let cluster = Cluster { origin: None, labels: BTreeMap::new(), policy: TrafficPolicy::default() };
        let clusters = ruled.then(|| (key, Scoped::everywhere(Arc::new(cluster)))).into_iter().collect();
        let routes = Arc::new(Routes { clusters, ..Routes::default() });
        let world = Snapshot::new(1, Parts { services: vec![Arc::new(service)], routes, ..Parts::default() });
        PodConfig::of(&world, &web).unwrap().policy_hash
    };
    let plain = hash(&[], false);
    assert_ne!(hash(&[], true), plain);
    // The kernel knows what is meant by an address of a service.
    assert_eq!(hash(&[[10, 96, 0, 1].into()], true), plain);
}

#[test]
fn removal_comes_before_enrolment() {
    let (old, new) = (spec("old", 1), spec("new", 2));
    let steps = plan(&desired(std::slice::from_ref(&new)), &[(5, running(&old))].into());
    assert_eq!(steps, [Step::Remove { pod: 5, reason: RemoveReason::Gone }, Step::Enrol { spec: new }]);
}

#[test]
fn a_new_sandbox_under_the_same_name_is_removed_and_enrolled_again() {
    let (before, after) = (spec("web", 1), spec("web", 2));
    let steps = plan(&desired(std::slice::from_ref(&after)), &[(5, running(&before))].into());
    assert_eq!(
        steps,
        [Step::Remove { pod: 5, reason: RemoveReason::NewIncarnation }, Step::Enrol { spec: after }]
    );
}

#[test]
fn a_changed_setting_updates_in_place() {
    let before = spec("web", 1);
    let mut after = before.clone();
    after.config.dns_capture = false;
    let steps = plan(&desired(std::slice::from_ref(&after)), &[(5, running(&before))].into());
    assert_eq!(steps, [Step::Update { pod: 5, spec: after }]);
}

#[test]
fn after_a_restart_pinned_pods_are_adopted_and_not_enrolled_again() {
    let web = spec("web", 1);
    let pinned = ActualPod { listening: false, applied: None, ..running(&web) };
    let steps = plan(&desired(std::slice::from_ref(&web)), &[(5, pinned)].into());
    assert_eq!(steps, [Step::Adopt { pod: 5, spec: web }]);
}

#[test]
fn of_two_enrolments_of_one_pod_the_later_stays() {
    let web = spec("web", 1);
    let actual = [(5, running(&web)), (9, running(&web))].into();
    let steps = plan(&desired(std::slice::from_ref(&web)), &actual);
    assert_eq!(steps, [Step::Remove { pod: 5, reason: RemoveReason::Duplicate }]);
}

#[test]
fn two_pods_in_one_namespace_leave_the_enrolled_one_alone_and_name_it() {
    let (a, b) = (spec("a", 1), spec("b", 1));
    let both = desired(&[a.clone(), b.clone()]);
    let actual: BTreeMap<_, _> = [(5, running(&b))].into();
    assert_eq!(plan(&both, &actual), []);
    assert_eq!(
        conflicts(&both, &actual),
        [(a.config.name, Obstacle::NetnsTaken(b.config.name.clone()))].into()
    );
    assert_eq!(plan(&both, &BTreeMap::new()).len(), 1);
}

#[test]
fn a_namespace_that_changes_hands_is_freed_first() {
    let (old, new) = (spec("old", 1), spec("new", 1));
    let mut actual = [(5, running(&old))].into();
    let steps = plan(&desired(std::slice::from_ref(&new)), &actual);
    apply(&mut actual, steps);
    assert_eq!(actual.values().map(|is| is.workload).collect::<Vec<_>>(), [new.config.workload]);
}

fn any_spec() -> impl Strategy<Value = PodSpec> {
    (0_u8..6, 1_u64..6, any::<bool>()).prop_map(|(name, cookie, dns)| {
        let mut spec = spec(&format!("p{name}"), cookie);
        spec.config.dns_capture = dns;
        spec
    })
}

fn any_actual() -> impl Strategy<Value = ActualPod> {
    (any_spec(), any::<bool>(), any::<bool>()).prop_map(|(spec, listening, known)| {
        let is = running(&spec);
        ActualPod { listening, applied: is.applied.filter(|_| known && listening), ..is }
    })
}

proptest! {
    #[test]
    fn a_plan_carried_out_gives_what_is_desired_and_the_next_one_is_empty(
        specs in prop::collection::vec(any_spec(), 0..8),
        found in prop::collection::btree_map(1_u32..20, any_actual(), 0..8),
    ) {
        let desired = desired(&specs);
        // One namespace holds one pod in the kernel: PODS is keyed by its cookie.
        let mut cookies = BTreeSet::new();
        let mut actual: BTreeMap<u32, ActualPod> =
            found.into_iter().filter(|(_, is)| cookies.insert(is.netns_cookie)).collect();
        let left_out = conflicts(&desired, &actual);

        let steps = plan(&desired, &actual);
        apply(&mut actual, steps);

        let enrolled: BTreeMap<PodKey, PodSpec> = actual
            .values()
            .map(|is| {
                assert!(is.listening);
                let config = is.applied.clone().expect("written");
                (is.workload, PodSpec { config, netns_cookie: is.netns_cookie })
            })
            .collect();
        let wanted: BTreeMap<PodKey, PodSpec> =
            desired.clone().into_iter().filter(|(_, s)| !left_out.contains_key(&s.config.name)).collect();
        prop_assert_eq!(enrolled.len(), actual.len());
        prop_assert_eq!(enrolled, wanted);
        prop_assert_eq!(plan(&desired, &actual), []);
    }

    #[test]
    fn a_running_pod_that_stays_wanted_is_never_taken_out(
        specs in prop::collection::vec(any_spec(), 1..8),
        others in prop::collection::vec(any_spec(), 0..8),
    ) {
        let mut actual = BTreeMap::new();
        apply(&mut actual, plan(&desired(&specs), &BTreeMap::new()));
        let before = actual.clone();
        let mut next = desired(&others);
        for is in before.values() {
            let config = is.applied.clone().expect("written");
            next.insert(is.workload, PodSpec { config, netns_cookie: is.netns_cookie });
        }
        let steps = plan(&next, &actual);
        let removed = steps.iter().any(|s| matches!(s, Step::Remove { .. }));
        prop_assert!(!removed, "{:?}", steps);
    }
}

#[test]
fn s68_unknown_destinations_of_the_pods_with_an_egress_proxy_come_to_the_agent_but_those_of_its_own() {
    let own = meshed("proxy");
    let mut service = Service::named(Name::new("default", "out"));
    let endpoint = Endpoint {
        addr: own.addrs[0],
        port: 80,
        workload: Some(own.id),
        ready: true,
        hostname: None,
        traits: None,
    };
    service.ports = vec![ServicePort {
        name: "tcp".into(),
        port: 80,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: vec![endpoint],
    }];
    let key = ClusterKey { service: service.name.clone(), port: 80, subset: None };
    let name = Name::new("default", "through");
    let origin = Origin { kind: "Sidecar".into(), name: name.clone(), field: "".into(), place: None };
    let scope = SidecarScope {
        egress: Vec::new(),
        outbound: None,
        egress_proxy: Some(EgressProxy { origin: Arc::new(origin), backend: Backend::Cluster(key) }),
        inbound: InboundPools::default(),
    };
    let routes = Routes { sidecars: [(name.clone(), Arc::new(scope))].into(), ..Routes::default() };
    let parts = Parts { services: vec![Arc::new(service)], routes: Arc::new(routes), ..Parts::default() };
    let world = Snapshot::new(1, parts);
    let asks = |pod: &str, sidecar: Option<&Name>| {
        let addrs = if pod == "proxy" { own.addrs.clone() } else { vec![[10, 0, 0, 2].into()] };
        let pod = Workload { sidecar: sidecar.cloned(), addrs, ..meshed(pod) };
        PodConfig::of(&world, &pod).unwrap().proxy_unknown
    };
    assert!(asks("client", Some(&name)) && !asks("client", None) && !asks("proxy", Some(&name)));
}

#[test]
fn ports_at_which_the_agent_knows_unknown_destinations_by_name_are_the_pods_own() {
    let host = |namespace: &str, port: u16| {
        let name = Name::new(namespace, "api.x");
        Arc::new(Service {
            hostname: Some("api.x".into()),
            audience: Audience::Only([Arc::from(namespace)].into()),
            ports: vec![ServicePort {
                name: "http".into(),
                port,
                protocol: Protocol::Tcp,
                app_protocol: None,
                endpoints: Vec::new(),
            }],
            ..Service::named(name)
        })
    };
    let services = vec![host("default", 8080), host("other", 9090)];
    let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
    let settings = PodSettings { exclude_outbound_ports: [7, 8080].into(), ..PodSettings::default() };
    let config = PodConfig::of(&snapshot, &Workload { settings, ..meshed("a") }).unwrap();
    let rule = |excluded, proxy_unknown| PortRule { excluded, fail_closed: None, proxy_unknown };
    assert_eq!(config.outbound_ports, [(7, rule(true, false)), (8080, rule(true, true))].into());
}
