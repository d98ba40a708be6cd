//! Small worlds that differ in everything the model has, and a literal reading of Istio's policies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Range,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    balance::locality::Place,
    id::{ServiceId, WorkloadId},
    identity::Identity,
    mode::{Mode, ModeSources, PortModes},
    policy::{
        self, Action, Attempt, AuthorizationPolicy, Match, Peer, Rule, Scope, ServiceAccountMatch,
        StringMatch,
    },
    route::{
        defaults::{Distribution, MeshDefaults},
        scope::{Audience, OutboundPolicy},
    },
    snapshot::{
        DnsEndpoint, DnsResolution, Endpoint, Mesh, Name, Parts, PodSettings, Protocol, Resolution, Service,
        ServicePort, Snapshot, Traits, Tunnel, Workload,
    },
};
use proptest::{collection::vec, option, prelude::*, sample::select};

/// Names from few, so that they meet.
fn word() -> impl Strategy<Value = Arc<str>> {
    select(vec!["a", "b", "web", "cart"]).prop_map(Into::into)
}

fn name() -> impl Strategy<Value = Name> {
    (select(vec!["a", "b"]), word()).prop_map(|(namespace, name)| Name::new(namespace, name))
}

fn addr() -> impl Strategy<Value = IpAddr> {
    select(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"]).prop_map(|a| a.parse().unwrap())
}

fn port() -> impl Strategy<Value = u16> {
    select(vec![80, 443, 8080])
}

fn mode() -> impl Strategy<Value = Mode> {
    select(vec![Mode::Permissive, Mode::Strict, Mode::Disable])
}

fn set<T: Ord + std::fmt::Debug>(
    strategy: impl Strategy<Value = T>,
    size: Range<usize>,
) -> impl Strategy<Value = BTreeSet<T>> {
    vec(strategy, size).prop_map(|list| list.into_iter().collect())
}

fn text() -> impl Strategy<Value = StringMatch> {
    let texts = vec![
        "*",
        "a",
        "b",
        "w*",
        "*b",
        "a*b",
        "*a*",
        "td1/ns/a/sa/web",
        "old/ns/a/sa/web",
        "cluster.local/ns/a/sa/web",
        "td1/ns/a/*",
        "*/sa/web",
        "cluster.local/ns/b/sa/c*",
        "td1",
        "old",
        "other",
        "t*1",
        "",
    ];
    select(texts).prop_map(StringMatch::parse)
}

fn net() -> impl Strategy<Value = ipnet::IpNet> {
    select(vec!["10.0.0.0/30", "10.0.0.1/32", "10.0.0.7/8", "fd00::/64", "0.0.0.0/0"])
        .prop_map(|net| net.parse().unwrap())
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (select(vec!["a", "b"]), word())
        .prop_map(|(namespace, name)| ServiceAccountMatch { namespace: namespace.into(), name })
}

fn match_strategy() -> impl Strategy<Value = Match> {
    let texts = || vec(text(), 0..2);
    let nets = || vec(net(), 0..2);
    let ports = || vec(port(), 0..2);
    let accounts = || vec(account(), 0..2);
    (
        (texts(), texts(), texts(), texts(), texts(), texts()),
        (nets(), nets(), nets(), nets(), ports(), ports(), accounts(), accounts()),
        prop::bool::weighted(0.2),
        // Which fields are kept: most matches have few.
        any::<u16>(),
        any::<u16>(),
    )
        .prop_map(|(t, n, l7, keep, keep_too)| {
            let kept = |bit: u16| keep & keep_too & 1 << bit != 0;
            let texts = |bit, list: Vec<_>| if kept(bit) { list } else { Vec::new() };
            let nets = |bit, list: Vec<_>| if kept(bit) { list } else { Vec::new() };
            let ports = |bit, list: Vec<_>| if kept(bit) { list } else { Vec::new() };
            let accounts = |bit, list: Vec<_>| if kept(bit) { list } else { Vec::new() };
            Match {
                principals: texts(0, t.0),
                not_principals: texts(1, t.1),
                namespaces: texts(2, t.2),
                not_namespaces: texts(3, t.3),
                trust_domains: texts(4, t.4),
                not_trust_domains: texts(5, t.5),
                source_ips: nets(6, n.0),
                not_source_ips: nets(7, n.1),
                destination_ips: nets(8, n.2),
                not_destination_ips: nets(9, n.3),
                destination_ports: ports(10, n.4),
                not_destination_ports: ports(11, n.5),
                service_accounts: accounts(12, n.6),
                not_service_accounts: accounts(13, n.7),
                l7,
            }
        })
}

/// A policy.
pub(super) fn policy() -> impl Strategy<Value = AuthorizationPolicy> {
    let rule = vec(vec(match_strategy(), 0..3), 0..3).prop_map(|clauses| Rule { clauses });
    (
        name(),
        select(vec![Scope::Mesh, Scope::Namespace, Scope::Selector]),
        select(vec![Action::Allow, Action::Deny]),
        prop::bool::weighted(0.2),
        vec(rule, 0..3),
    )
        .prop_map(|(name, scope, action, dry_run, rules)| AuthorizationPolicy {
            name,
            scope,
            action,
            dry_run,
            rules,
        })
}

fn settings() -> impl Strategy<Value = PodSettings> {
    (any::<bool>(), set(port(), 0..2), set(port(), 0..2), vec(net(), 0..2), any::<bool>()).prop_map(
        |(outbound_fail_closed, exclude_inbound_ports, exclude_outbound_ports, cidrs, dns_capture_off)| {
            PodSettings {
                outbound_fail_closed,
                exclude_inbound_ports,
                exclude_outbound_ports,
                exclude_outbound_cidrs: cidrs,
                dns_capture_off,
            }
        },
    )
}

fn pod() -> impl Strategy<Value = Workload> {
    let modes =
        (mode(), prop::collection::btree_map(port(), mode(), 0..3), option::of(name()), option::of(name()));
    let texts = prop::collection::btree_map(word(), word(), 0..3);
    let about = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.2));
    let node = (
        option::of(word()),
        option::of(word()),
        prop_oneof![Just(PodSettings::default()), settings()],
        set(port(), 0..2),
        prop::collection::btree_map(word(), port(), 0..2),
    );
    (
        name(),
        vec(addr(), 0..3),
        modes,
        texts,
        about,
        node,
        word(),
        word(),
        select(vec!["cluster.local", "td1"]),
    )
        .prop_map(|(name, addrs, modes, labels, about, node, account, node_name, trust_domain)| {
            Workload {
                id: WorkloadId::of_pod(&name.namespace, &name.name, if about.0 { "1" } else { "" }),
                trust_domain: trust_domain.into(),
                service_account: if about.1 { account } else { "default".into() },
                place: Place {
                    region: if about.1 { "r".into() } else { "".into() },
                    zone: if about.2 { "z".into() } else { "".into() },
                    network: if about.3 { "net".into() } else { "".into() },
                    node: Arc::clone(&node_name),
                    ..Place::default()
                },
                sidecar: modes.2.clone().filter(|_| about.0),
                node: node_name,
                addrs,
                meshed: about.2,
                ready: about.3,
                terminated: about.4,
                netns: node.0,
                skipped: node.1,
                settings: node.2,
                probe_ports: node.3,
                named_ports: node.4,
                labels,
                modes: PortModes { default: modes.0, ports: modes.1 },
                mode_sources: ModeSources { default: modes.2, ports: modes.3 },
                tunnel: if about.2 || about.1 { Tunnel::Hbone } else { Tunnel::None },
                ..Workload::named(name)
            }
        })
}

fn endpoint() -> impl Strategy<Value = (Endpoint, Option<Name>)> {
    (addr(), port(), option::of(name()), any::<bool>(), option::of(word()), traits()).prop_map(
        |(addr, port, owner, ready, hostname, traits)| {
            (Endpoint { addr, port, workload: None, ready, hostname, traits }, owner)
        },
    )
}

fn traits() -> impl Strategy<Value = Option<Arc<Traits>>> {
    let labels = prop::collection::btree_map(word(), word(), 0..2);
    let traits = (labels, option::of(word()), 0u32..3, option::of(word()), option::of(word())).prop_map(
        |(labels, locality, weight, network, account)| {
            Arc::new(Traits { labels, locality, weight, network, account })
        },
    );
    option::weighted(0.3, traits)
}

fn resolution() -> impl Strategy<Value = Resolution> {
    let name = (word(), vec(port(), 0..3), traits()).prop_map(|(host, ports, traits)| DnsEndpoint {
        host,
        ports,
        traits,
    });
    let dns = (any::<bool>(), vec(name, 0..3))
        .prop_map(|(one_at_a_time, names)| Resolution::Dns(DnsResolution { one_at_a_time, names }));
    prop_oneof![3 => Just(Resolution::Listed), 1 => Just(Resolution::Dialled), 1 => dns]
}

/// What only services of hosts have, if it is one: a host that services of several namespaces may have.
fn declared() -> impl Strategy<Value = Option<Declared>> {
    option::weighted(0.3, (select(vec!["a.x", "b.x", "*.x"]), any::<bool>(), vec(net(), 0..2), resolution()))
}

type Declared = (&'static str, bool, Vec<ipnet::IpNet>, Resolution);

type Owned = Vec<Vec<(Endpoint, Option<Name>)>>;

fn service() -> impl Strategy<Value = (Service, Owned)> {
    let protocol = || select(vec![Protocol::Tcp, Protocol::Udp]);
    let ports = prop::collection::btree_map(
        (port(), protocol()),
        (word(), option::of(word()), vec(endpoint(), 0..4)),
        0..3,
    );
    let affinity = option::of((0u64..99_999, 0u32..1_000_000_000).prop_map(|(s, n)| Duration::new(s, n)));
    (
        name(),
        vec(addr(), 0..2),
        vec(addr(), 0..2),
        ports,
        option::weighted(0.1, word()),
        affinity,
        any::<[bool; 2]>(),
        (declared(), vec(word(), 0..2)),
    )
        .prop_map(|(name, vips, external_ips, ports, external_name, affinity, flags, declared)| {
            let (ports, owned) = ports
                .into_iter()
                .map(|((port, protocol), (name, app_protocol, endpoints))| {
                    (ServicePort { name, port, protocol, app_protocol, endpoints: Vec::new() }, endpoints)
                })
                .unzip();
            let service = Service {
                vips,
                external_ips,
                headless: flags[0],
                external_name,
                affinity,
                publish_not_ready: flags[1],
                audience: match flags {
                    [true, own] => Audience::Only(own.then(|| "a".into()).into_iter().collect()),
                    [false, _] => Audience::Everyone,
                },
                distribution: match flags {
                    [true, true] => Some(Distribution::SameNode),
                    [false, true] => Some(Distribution::SameZone),
                    [_, false] => None,
                },
                ports,
                subject_alt_names: declared.1,
                ..Service::named(name)
            };
            let service = match declared.0 {
                None => service,
                Some((host, external, networks, resolution)) => Service {
                    id: ServiceId::of_service(&service.name.namespace, host),
                    name: Name::new(Arc::clone(&service.name.namespace), host),
                    hostname: Some(host.into()),
                    external,
                    networks,
                    resolution,
                    ..service
                },
            };
            (service, owned)
        })
}

fn mesh() -> impl Strategy<Value = Mesh> {
    prop_oneof![
        4 => Just(Mesh::default()),
        1 => Just(Mesh {
            trust_domain: "td1".into(),
            trust_domain_aliases: vec!["old".into()],
            root_namespace: "a".into(),
            cluster_domain: "example".into(),
            defaults: Arc::new(MeshDefaults {
                outbound: OutboundPolicy::RegistryOnly,
                retries: None,
                detection_timeout: Some(Duration::from_millis(300)),
                ..MeshDefaults::default()
            }),
        }),
    ]
}

/// The parts of one world, consistent as a compiler makes them.
fn parts() -> impl Strategy<Value = Parts> {
    (vec(pod(), 0..5), vec(service(), 0..4), vec(policy(), 0..4), mesh(), any::<u8>())
        .prop_map(|(pods, services, policies, mesh, choice)| {
            let policies: BTreeMap<Name, _> =
                policies.into_iter().map(|policy| (policy.name.clone(), Arc::new(policy))).collect();
            let pods: BTreeMap<Name, Workload> =
                pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect();
            let ids: BTreeMap<Name, WorkloadId> = pods.values().map(|p| (p.name.clone(), p.id)).collect();
            let workloads = pods
                .into_values()
                .enumerate()
                .map(|(index, mut pod)| {
                    let applies = |policy: &AuthorizationPolicy| match policy.scope {
                        Scope::Mesh => true,
                        Scope::Namespace => policy.name.namespace == pod.name.namespace,
                        Scope::Selector => choice >> index & 1 == 1,
                    };
                    // Some are policed otherwise than scopes say: none, or all.
                    let found = policies.values().filter(|policy| match choice & 7 {
                        0 => false,
                        1 => true,
                        _ => applies(policy),
                    });
                    pod.policies = found.map(|policy| policy.name.clone()).collect();
                    let contents =
                        pod.policies.iter().filter_map(|name| policy::content_hash(&policies[name]));
                    pod.policy_hash = policy::policy_hash(&pod.modes, &mesh, &contents.collect::<Vec<_>>());
                    Arc::new(pod)
                })
                .collect();
            let services: BTreeMap<Name, _> = services
                .into_iter()
                .map(|(service, owned)| (service.name.clone(), (service, owned)))
                .collect();
            let mut services: Vec<_> = services.into_values().map(|(s, owned)| own(s, owned, &ids)).collect();
            if choice & 8 != 0 {
                services.reverse();
            }
            let policies = policies.into_values().collect();
            Parts { workloads, services, policies, mesh: Arc::new(mesh), ..Parts::default() }
        })
        .prop_flat_map(|parts| {
            super::routes::routes()
                .prop_map(move |routes| Parts { routes: Arc::new(routes), ..parts.clone() })
        })
}

/// The service with its endpoints; owners that do not exist stay as ids of nobody.
fn own(mut service: Service, owned: Owned, ids: &BTreeMap<Name, WorkloadId>) -> Arc<Service> {
    for (port, endpoints) in service.ports.iter_mut().zip(owned) {
        let mut by_place: BTreeMap<(IpAddr, u16), Endpoint> = BTreeMap::new();
        for (mut endpoint, owner) in endpoints {
            endpoint.workload = owner.map(|name| {
                let nobody = WorkloadId::of_pod(&name.namespace, &name.name, "gone");
                ids.get(&name).copied().unwrap_or(nobody)
            });
            by_place.insert((endpoint.addr, endpoint.port), endpoint);
        }
        port.endpoints = by_place.into_values().collect();
    }
    Arc::new(service)
}

/// Worlds one after the other, each a mix of the one before and a new one.
pub(super) fn sequence(len: Range<usize>) -> impl Strategy<Value = Vec<Parts>> {
    vec((parts(), any::<u8>()), len).prop_map(|list| {
        let mut worlds: Vec<Parts> = Vec::new();
        for (mut parts, keep) in list {
            // Keeping pods, policies and mesh means that only services change, which is the common case.
            if let (Some(before), true) = (worlds.last(), keep & 1 == 1) {
                parts.workloads.clone_from(&before.workloads);
                parts.policies.clone_from(&before.policies);
                parts.mesh = Arc::clone(&before.mesh);
            }
            if let (Some(before), true) = (worlds.last(), keep & 4 == 4) {
                parts.routes = Arc::clone(&before.routes);
            }
            if let (Some(before), true) = (worlds.last(), keep & 2 == 2) {
                parts.services.clone_from(&before.services);
            }
            worlds.push(parts);
        }
        worlds
    })
}

/// A connection to judge.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    identity: Option<Identity>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

/// Any connection of a client that is of the mesh `td1`, formerly `old`, or of nobody.
pub(super) fn attempt() -> impl Strategy<Value = Connection> {
    let identity = (select(vec!["td1", "old"]), select(vec!["a", "b", "axb"]), word())
        .prop_map(|(domain, namespace, account)| Identity::new(domain, namespace, account));
    (option::weighted(0.8, identity), addr(), addr(), port())
        .prop_map(|(identity, source, destination, port)| Connection { identity, source, destination, port })
}

/// What our agents say, of the policy enforced.
pub(super) fn admits(policy: &AuthorizationPolicy, connection: &Connection, mesh: &Mesh) -> bool {
    let policy = AuthorizationPolicy { dry_run: false, ..policy.clone() };
    let pod = Workload { policies: vec![policy.name.clone()], ..Workload::named(Name::new("a", "pod")) };
    let parts = Parts { policies: vec![Arc::new(policy)], mesh: Arc::new(mesh.clone()), ..Parts::default() };
    let snapshot = Snapshot::new(1, parts);
    let peer = match &connection.identity {
        Some(identity) => Peer::Tls(Arc::new(identity.clone())),
        None => Peer::Unauthenticated,
    };
    let Connection { source, destination, port, .. } = *connection;
    policy::admit(&snapshot, &Attempt { peer: &peer, source: Some(source), destination, port }, &pod)
        .is_allow()
}

/// What a client says that takes Istio's form by the letter: no aliases, no `*` within a text.
pub(super) fn admits_literally(policy: &AuthorizationPolicy, connection: &Connection) -> bool {
    let Connection { identity, source, destination, port } = connection;
    let principal =
        identity.as_ref().map(|i| format!("{}/ns/{}/sa/{}", i.trust_domain, i.namespace, i.service_account));
    let texts = |list: &[StringMatch], text: Option<&str>| {
        list.iter().any(|pattern| text.is_some_and(|text| pattern.matches(text)))
    };
    let namespace = identity.as_ref().map(|i| &*i.namespace);
    let account = |list: &[ServiceAccountMatch]| {
        list.iter().any(|a| {
            identity.as_ref().is_some_and(|i| a.namespace == i.namespace && a.name == i.service_account)
        })
    };
    let nets = |list: &[ipnet::IpNet], addr: &IpAddr| list.iter().any(|net| net.contains(addr));
    let holds = |m: &Match| {
        let fields = [
            (m.principals.is_empty(), texts(&m.principals, principal.as_deref())),
            (m.namespaces.is_empty(), texts(&m.namespaces, namespace)),
            (m.service_accounts.is_empty(), account(&m.service_accounts)),
            (m.source_ips.is_empty(), nets(&m.source_ips, source)),
            (m.destination_ips.is_empty(), nets(&m.destination_ips, destination)),
            (m.destination_ports.is_empty(), m.destination_ports.contains(port)),
        ];
        let not = [
            texts(&m.not_principals, principal.as_deref()),
            texts(&m.not_namespaces, namespace),
            account(&m.not_service_accounts),
            nets(&m.not_source_ips, source),
            nets(&m.not_destination_ips, destination),
            m.not_destination_ports.contains(port),
        ];
        !m.is_empty() && fields.iter().all(|(absent, holds)| *absent || *holds) && !not.contains(&true)
    };
    let matches = policy
        .rules
        .iter()
        .any(|rule| rule.clauses.iter().all(|clause| clause.is_empty() || clause.iter().any(holds)));
    match policy.action {
        Action::Allow => matches,
        Action::Deny => !matches,
    }
}
