//! DestinationRules: which of them count for whom, and what they make of a service's ports (S37–S49).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{
    route::{
        cluster::{self, Balancing, ClientTls, ClientTlsMode, Cluster, ClusterKey, ConnectionPool, Locality},
        defaults::Distribution,
        matching::StringMatch,
        scope::{InNamespace, Scoped},
    },
    snapshot::{Name, Service},
};

use super::{Context, Defaults, virtual_service::full};
/// Limits as a resource gives them.
pub(super) use crate::resource::destination_rule::ConnectionPool as SpecPool;
use crate::resource::{
    DestinationRule, ExportTo, Key, Kind, Labels, Resource, by_specificity,
    destination_rule::{self as spec, Settings, Subset},
    is_within,
};

/// Where servers show a certificate and no rule says of which name, those of the service's ServiceEntry (S47).
fn expect_names(scoped: &mut Scoped<Cluster>, names: &[Arc<str>]) {
    if names.is_empty() {
        return;
    }
    let of_namespaces = scoped
        .by_namespace
        .values_mut()
        .flat_map(|own| own.selected.iter_mut().map(|(_, cluster)| cluster).chain(own.all.as_mut()));
    for cluster in scoped.default.as_mut().into_iter().chain(of_namespaces) {
        let wants = |tls: &ClientTls| {
            matches!(tls.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual)
                && tls.subject_alt_names.is_empty()
        };
        if cluster.policy.tls.as_ref().is_some_and(wants)
            && let Some(tls) = &mut Arc::make_mut(cluster).policy.tls
        {
            tls.subject_alt_names = names.iter().cloned().map(StringMatch::Exact).collect();
        }
    }
}

/// All DestinationRules.
pub(super) struct DestinationRules<'a> {
    /// By the host they name.
    exact: BTreeMap<Arc<str>, Vec<Rule<'a>>>,
    /// Those of patterns.
    wild: Vec<Rule<'a>>,
}

/// Those that are about one host: by namespace, the oldest first (S6).
struct OfHost<'r, 'a> {
    by_namespace: BTreeMap<&'a str, Vec<&'r Rule<'a>>>,
}

/// One of them.
struct Rule<'a> {
    source: &'a DestinationRule,
    export_to: &'a ExportTo,
    /// What it is about, as tables have it.
    host: Arc<str>,
}

/// Several of one namespace and host that count as one (S38).
struct Merged<'r, 'a> {
    rules: Vec<&'r Rule<'a>>,
}

impl<'a> DestinationRules<'a> {
    pub(super) fn of(cx: &Context<'a>) -> Self {
        let (mut exact, mut wild): (BTreeMap<Arc<str>, Vec<Rule<'a>>>, _) = (BTreeMap::new(), Vec::new());
        for (_, resource) in cx.index.each(Kind::DestinationRule) {
            let Resource::DestinationRule(source) = resource else { continue };
            let export_to = source.export_to.as_ref().unwrap_or(&cx.defaults.destination_rules);
            let host = full(source.host.full(&cx.mesh.cluster_domain));
            let of = if source.host.is_wildcard() {
                &mut wild
            } else {
                exact.entry(Arc::clone(&host)).or_default()
            };
            of.push(Rule { source, export_to, host });
        }
        Self { exact, wild }
    }

    fn of_host(&self, host: &str) -> OfHost<'_, 'a> {
        let mut by_namespace: BTreeMap<&'a str, Vec<&Rule<'a>>> = BTreeMap::new();
        let wild = self.wild.iter().filter(|rule| is_within(host, &rule.host));
        for rule in self.exact.get(host).into_iter().flatten().chain(wild) {
            by_namespace.entry(&rule.source.name.namespace).or_default().push(rule);
        }
        for rules in by_namespace.values_mut() {
            rules.sort_by_key(|rule| (rule.source.created, &rule.source.name.name));
        }
        OfHost { by_namespace }
    }

    /// Adds the clusters of a service's port.
    pub(super) fn clusters(
        &self,
        cx: &Context<'_>,
        service: &Service,
        host: &str,
        port: u16,
        clusters: &mut BTreeMap<ClusterKey, Scoped<Cluster>>,
    ) {
        let rules = self.of_host(host);
        if rules.by_namespace.is_empty() {
            return;
        }
        let mut namespaces: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut subsets: BTreeSet<&Arc<str>> = BTreeSet::new();
        for rule in rules.by_namespace.values().flatten() {
            namespaces.insert(Arc::clone(&rule.source.name.namespace));
            namespaces.extend(rule.export_to.namespaces.iter().cloned());
            subsets.extend(rule.source.subsets.iter().map(|subset| &subset.name));
        }
        let seen = |client: Option<&str>| rules.seen(cx, service, client);
        let of = (port, service.distribution);
        let default = seen(None);
        let own: Vec<_> = namespaces
            .iter()
            .map(|namespace| (namespace, seen(Some(namespace)), rules.selected(namespace)))
            .collect();
        for subset in [None].into_iter().chain(subsets.into_iter().map(Some)) {
            let cluster = |merged: &Option<Merged<'_, 'a>>| merged.as_ref()?.cluster(cx, subset, of);
            let default = cluster(&default);
            let mut by_namespace = BTreeMap::new();
            for (namespace, merged, selected) in &own {
                let all = cluster(merged);
                let selected: Vec<(Labels, Arc<Cluster>)> = selected
                    .iter()
                    .filter_map(|rule| {
                        let merged = Merged { rules: vec![*rule] };
                        // Without a policy of its own it still takes the place of the others'.
                        let cluster = merged.cluster(cx, subset, of);
                        let bare = || merged.bare(cx, of);
                        let cluster = cluster.or_else(|| subset.is_none().then(bare))?;
                        Some((rule.source.selector.clone(), cluster))
                    })
                    .collect();
                if all != default || !selected.is_empty() {
                    by_namespace.insert(Arc::clone(namespace), InNamespace { selected, all });
                }
            }
            if default.is_some() || !by_namespace.is_empty() {
                let key = ClusterKey { service: service.name.clone(), port, subset: subset.cloned() };
                let mut scoped = Scoped { default, by_namespace };
                expect_names(&mut scoped, &service.subject_alt_names);
                clusters.insert(key, scoped);
            }
        }
    }
}

impl<'r, 'a> OfHost<'r, 'a> {
    /// The rules that count for clients of a namespace: the client's own, else the service's, else the root's (S37).
    fn seen(&self, cx: &Context<'_>, service: &Service, client: Option<&str>) -> Option<Merged<'r, 'a>> {
        let root = &*cx.mesh.root_namespace;
        let own = client.filter(|client| *client != root);
        let places = own.into_iter().chain([&*service.name.namespace, root]);
        places.into_iter().find_map(|namespace| self.in_namespace(namespace, client))
    }

    /// What of a namespace's rules clients see, of the most specific host (S37, S38).
    fn in_namespace(&self, namespace: &str, client: Option<&str>) -> Option<Merged<'r, 'a>> {
        let is_visible = |rule: &&'r Rule<'a>| match client {
            None => rule.export_to.everyone,
            Some(client) => rule.export_to.includes(client, namespace),
        };
        let of = self.by_namespace.get(namespace)?.iter().copied();
        let rules: Vec<&'r Rule<'a>> =
            of.filter(|rule| rule.source.selector.is_empty()).filter(is_visible).collect();
        let best = rules.iter().map(|rule| &rule.host).min_by(|a, b| by_specificity(a, b))?;
        let first = rules.iter().find(|rule| rule.host == *best)?;
        let like_first = |rule: &&&Rule<'a>| rule.host == *best && rule.export_to == first.export_to;
        Some(Merged { rules: rules.iter().filter(like_first).copied().collect() })
    }

    /// The rules of a namespace for some of its workloads (S39), by precedence.
    fn selected(&self, namespace: &str) -> Vec<&'r Rule<'a>> {
        let of = self.by_namespace.get(namespace).into_iter().flatten().copied();
        let mut rules: Vec<&'r Rule<'a>> = of.filter(|rule| !rule.source.selector.is_empty()).collect();
        // Stable: of one host they stay by age.
        rules.sort_by(|a, b| by_specificity(&a.host, &b.host));
        rules
    }
}

impl Merged<'_, '_> {
    /// The policy of the whole: that of the first rule that has one.
    fn policy(&self) -> Option<(&spec::TrafficPolicy, &Name)> {
        self.rules.iter().find_map(|rule| Some((rule.source.policy.as_ref()?, &rule.source.name)))
    }

    /// A subset: the first of its name.
    fn subset(&self, name: &str) -> Option<(&Subset, &Name)> {
        self.rules.iter().find_map(|rule| {
            let subset = rule.source.subsets.iter().find(|subset| &*subset.name == name)?;
            Some((subset, &rule.source.name))
        })
    }

    /// What it says of a port, or of a subset there; `None`: nothing.
    fn cluster(
        &self,
        cx: &Context<'_>,
        subset: Option<&Arc<str>>,
        (port, distribution): (u16, Option<Distribution>),
    ) -> Option<Arc<Cluster>> {
        let base = self.policy();
        let (labels, overlay, source) = match subset {
            None => (Labels::new(), None, base?.1),
            Some(name) => {
                let (subset, source) = self.subset(name)?;
                (subset.labels.clone(), subset.policy.as_ref(), source)
            }
        };
        let settings = effective(base.map(|(policy, _)| policy), overlay, port);
        let field = match subset {
            None => "spec.trafficPolicy".to_owned(),
            Some(name) => format!("spec.subsets[{name}]"),
        };
        let key = Key { kind: Kind::DestinationRule, name: source.clone() };
        let origin = Some(cx.origin(&key, &field));
        let mut policy = policy(cx.defaults, settings, distribution);
        // A Secret is of the rule's own namespace; without a selector it stays out of reach.
        if self.rules.iter().any(|rule| !rule.source.selector.is_empty())
            && let Some(name) = policy.tls.as_mut().and_then(|tls| tls.credential_name.as_mut())
        {
            *name = format!("{}/{name}", source.namespace).into();
        }
        Some(Arc::new(Cluster { origin, labels, policy }))
    }

    /// The mesh's own policy, said by this rule.
    fn bare(&self, cx: &Context<'_>, (port, distribution): (u16, Option<Distribution>)) -> Arc<Cluster> {
        let rule = self.rules.first();
        let origin = rule.map(|rule| {
            let key = Key { kind: Kind::DestinationRule, name: rule.source.name.clone() };
            cx.origin(&key, "spec")
        });
        let policy = policy(cx.defaults, effective(None, None, port), distribution);
        Arc::new(Cluster { origin, labels: Labels::new(), policy })
    }
}

/// What holds for a port: of the rule, and of a subset over it (S40).
fn effective(
    base: Option<&spec::TrafficPolicy>,
    overlay: Option<&spec::TrafficPolicy>,
    port: u16,
) -> Settings {
    let mut settings = Settings::default();
    if let Some(base) = base {
        settings = base.settings.clone();
        if let Some(own) = base.ports.get(&port) {
            // As a whole: what the port does not say has its default. What ports cannot say stays.
            settings.balancing.clone_from(&own.balancing);
            settings.pool.clone_from(&own.pool);
            settings.outlier.clone_from(&own.outlier);
            settings.tls.clone_from(&own.tls);
        }
    }
    let Some(overlay) = overlay else { return settings };
    match overlay.ports.get(&port) {
        Some(own) => {
            settings.balancing.clone_from(&own.balancing);
            settings.pool.clone_from(&own.pool);
            settings.outlier.clone_from(&own.outlier);
            settings.tls.clone_from(&own.tls);
        }
        None => {
            put(&mut settings.balancing, &overlay.settings.balancing);
            put(&mut settings.pool, &overlay.settings.pool);
            put(&mut settings.outlier, &overlay.settings.outlier);
            put(&mut settings.tls, &overlay.settings.tls);
        }
    }
    put(&mut settings.tunnel, &overlay.settings.tunnel);
    put(&mut settings.proxy_protocol, &overlay.settings.proxy_protocol);
    put(&mut settings.retry_budget, &overlay.settings.retry_budget);
    settings
}

fn put<T: Clone>(place: &mut Option<T>, value: &Option<T>) {
    if value.is_some() {
        place.clone_from(value);
    }
}

/// What holds for destinations that no rule is about.
pub(super) fn policy_of_mesh(defaults: &Defaults) -> cluster::TrafficPolicy {
    policy(defaults, Settings::default(), None)
}

/// Settings with the mesh's defaults in the place of what they do not say.
///
/// Locality by the first who says something: the rule, the service, the mesh (S48).
fn policy(
    defaults: &Defaults,
    mut settings: Settings,
    distribution: Option<Distribution>,
) -> cluster::TrafficPolicy {
    settings.outlier = settings.outlier.or_else(|| defaults.outlier.clone());
    settings.pool = settings.pool.or_else(|| defaults.own_pool.clone());
    let balancing = settings.balancing.unwrap_or_default();
    let locality = match (&balancing.locality, distribution) {
        (Some(own), _) => own.locality(),
        (None, Some(distribution)) => distribution.locality(),
        // Outlier detection brings failover with it (fact 5), shares need none (S49).
        (None, None) => match &defaults.locality {
            Locality::Failover { forced: false, .. } if settings.outlier.is_none() => Locality::Anywhere,
            wider => wider.clone(),
        },
    };
    cluster::TrafficPolicy {
        balancing: Balancing { algorithm: balancing.algorithm, locality, warmup: balancing.warmup },
        pool: pool(settings.pool.unwrap_or_default(), &defaults.pool),
        outlier: settings.outlier,
        tls: settings.tls,
        tunnel: settings.tunnel,
        proxy_protocol: settings.proxy_protocol,
        retry_budget: settings.retry_budget,
    }
}

/// Limits as they are written, with `mesh` in the place of what they do not say.
pub(in crate::compile) fn pool(own: spec::ConnectionPool, mesh: &ConnectionPool) -> ConnectionPool {
    ConnectionPool {
        max_connections: own.max_connections,
        connect_timeout: own.connect_timeout.unwrap_or(mesh.connect_timeout),
        keepalive: own.keepalive.or(mesh.keepalive),
        // That of HTTP beats that of TCP (S43) where there are requests, and means nothing to bytes that are relayed.
        idle_timeout: own.tcp_idle_timeout.unwrap_or(mesh.idle_timeout),
        http_idle_timeout: own.http_idle_timeout,
        max_connection_duration: own.max_connection_duration,
        max_pending: own.max_pending,
        max_requests: own.max_requests,
        max_requests_per_connection: own.max_requests_per_connection,
        max_retries: own.max_retries,
        max_concurrent_streams: own.max_concurrent_streams,
        http2_keepalive: own.http2_keepalive,
        h2_upgrade: own.h2_upgrade.unwrap_or(mesh.h2_upgrade),
        h2_upgrade_sniffed: own.h2_upgrade == Some(true),
        use_client_protocol: own.use_client_protocol,
    }
}
