//! VirtualServices: which of them has a host for whom, and what its rules become.

use std::{
    borrow::Cow,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{
    route::{
        cluster::ClusterKey,
        http::{Action, Backend, HeaderOps, HttpRule, HttpTable, Millionths, Mirror, WeightedBackend},
        matching::{HeaderMatch, HttpMatch, PathMatch, QueryMatch, StringMatch},
        stream::{StreamMatch, StreamRule, StreamTable},
        variables::HeaderText,
    },
    snapshot::Name,
};

use super::{Context, registry};
use crate::{
    index::located,
    problem::SourceError,
    resource::{
        ExportTo, Key, Kind, Resource, by_specificity, is_within,
        virtual_service::{
            self as spec, Destination, HttpAction, HttpDestination, MESH_GATEWAY, Retries, StreamRoute,
            VirtualService,
        },
    },
};

/// Which rules of a VirtualService are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// `http`.
    Http,
    /// `tls` and `tcp`.
    Stream,
}

/// A VirtualService for the mesh, with the rules of its delegates.
pub(super) struct Prepared<'a> {
    source: &'a VirtualService,
    export_to: &'a ExportTo,
    http: Cow<'a, [spec::HttpRoute]>,
}

impl Prepared<'_> {
    /// Its key.
    pub(super) fn key(&self) -> Key {
        Key { kind: Kind::VirtualService, name: self.source.name.clone() }
    }

    /// What tells it from others while one compilation lasts.
    pub(super) fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    fn has(&self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Http => !self.http.is_empty(),
            Protocol::Stream => !self.source.tls.is_empty() || !self.source.tcp.is_empty(),
        }
    }

    /// How near it is to clients of a namespace, the nearest first (S26); `None`: they do not see it.
    fn nearness(&self, client: Option<&str>) -> Option<u8> {
        let own = &*self.source.name.namespace;
        match client {
            _ if self.export_to.everyone => Some(2),
            Some(client) if !self.export_to.includes(client, own) => None,
            Some(client) => Some(u8::from(client != own)),
            None => None,
        }
    }

    /// Order of precedence: the oldest first, then by name, then by namespace (S6).
    fn by_age(&self, other: &Self) -> Ordering {
        let key = |p: &Self| {
            (p.source.created, Arc::clone(&p.source.name.name), Arc::clone(&p.source.name.namespace))
        };
        key(self).cmp(&key(other))
    }
}

/// All VirtualServices for the mesh.
pub(super) struct VirtualServices<'a> {
    /// By precedence.
    all: Vec<Prepared<'a>>,
    /// Places in `all` by host.
    exact: BTreeMap<Arc<str>, Vec<usize>>,
    /// Wildcards with places in `all`, the most specific first.
    wildcards: Vec<(Arc<str>, Vec<usize>)>,
    /// Hosts that no service of the mesh has, and wildcards that cover none.
    unknown: BTreeSet<Arc<str>>,
}

impl<'a> VirtualServices<'a> {
    pub(super) fn of(cx: &Context<'a>, problems: &mut Vec<SourceError>) -> Self {
        let read = |(_, resource): (_, &'a Resource)| match resource {
            Resource::VirtualService(service) => Some(&**service),
            _ => None,
        };
        let by_name: BTreeMap<&Name, &VirtualService> = cx
            .index
            .each(Kind::VirtualService)
            .filter_map(read)
            .map(|service| (&service.name, service))
            .collect();
        let default = &cx.defaults.virtual_services;
        let mut all: Vec<Prepared<'a>> = Vec::new();
        for source in
            by_name.values().copied().filter(|service| service.is_for_mesh() && !service.is_delegate())
        {
            let delegates = source.http.iter().any(|rule| matches!(rule.action, HttpAction::Delegate(_)));
            let http = if delegates {
                let find = |name: &Name| by_name.get(name).copied();
                let (rules, found) = spec::delegate::merged(source, find, default);
                let key = Key { kind: Kind::VirtualService, name: source.name.clone() };
                if let Some(origin) = cx.index.origin(&key) {
                    let found = found.into_iter();
                    problems.extend(found.map(|p| located(&key, origin, p.level, &p.field, p.message)));
                }
                Cow::Owned(rules)
            } else {
                Cow::Borrowed(&*source.http)
            };
            all.push(Prepared { source, export_to: source.export_to.as_ref().unwrap_or(default), http });
        }
        all.sort_by(Prepared::by_age);
        let mut exact: BTreeMap<Arc<str>, Vec<usize>> = BTreeMap::new();
        let mut wild: BTreeMap<Arc<str>, Vec<usize>> = BTreeMap::new();
        for (at, prepared) in all.iter().enumerate() {
            for host in &prepared.source.hosts {
                let full = full(host.full(&cx.mesh.cluster_domain));
                let hosts = if host.is_wildcard() { &mut wild } else { &mut exact };
                hosts.entry(full).or_default().push(at);
            }
        }
        let mut wildcards: Vec<_> = wild.into_iter().collect();
        wildcards.sort_by(|(a, _), (b, _)| by_specificity(a, b));
        let nobodys = exact.keys().filter(|host| cx.registry.at(host, "").is_none());
        let covers_none = |pattern: &&Arc<str>| !cx.registry.hosts().any(|host| is_within(host, pattern));
        let unknown = wildcards.iter().map(|(pattern, _)| pattern).filter(covers_none).chain(nobodys);
        let unknown = unknown.cloned().collect();
        Self { all, exact, wildcards, unknown }
    }

    /// Those that have a host, by precedence: the most specific pattern first (S25). A wildcard that covers services is
    /// about them, and not about hosts that no service has.
    pub(super) fn for_host(&self, host: &str, protocol: Protocol) -> Candidates<'_, 'a> {
        let exact = self.exact.get(host).into_iter();
        let is_unknown = self.unknown.contains(host);
        let fits =
            |pattern: &str| is_within(host, pattern) && (!is_unknown || self.unknown.contains(pattern));
        let wild = self.wildcards.iter().filter(|(pattern, _)| fits(pattern)).map(|(_, at)| at);
        let mut groups = Vec::new();
        for group in exact.chain(wild) {
            let group: Vec<_> = group.iter().map(|at| &self.all[*at]).filter(|p| p.has(protocol)).collect();
            if !group.is_empty() {
                groups.push(group);
            }
        }
        Candidates { groups }
    }

    /// Hosts with rules that no service of the mesh has, and wildcards that cover none.
    pub(super) fn unknown_hosts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.unknown.iter()
    }
}

/// A host as tables have it.
pub(super) fn full(host: Arc<str>) -> Arc<str> {
    host.strip_suffix('.').map_or_else(|| Arc::clone(&host), Arc::from)
}

/// The VirtualServices that have one host.
pub(super) struct Candidates<'c, 'a> {
    /// By the pattern that covers the host, the most specific first; each by age, never empty.
    groups: Vec<Vec<&'c Prepared<'a>>>,
}

impl<'c, 'a> Candidates<'c, 'a> {
    /// Namespaces whose clients see one that not everybody sees.
    pub(super) fn namespaces(&self) -> BTreeSet<Arc<str>> {
        let mut namespaces = BTreeSet::new();
        for prepared in self.groups.iter().flatten().filter(|prepared| !prepared.export_to.everyone) {
            namespaces.extend(prepared.export_to.namespaces.iter().cloned());
            if prepared.export_to.own {
                namespaces.insert(Arc::clone(&prepared.source.name.namespace));
            }
        }
        namespaces
    }

    /// Those of a group that clients of a namespace see, by precedence: the nearest, then the oldest.
    fn visible(group: &[&'c Prepared<'a>], client: Option<&str>) -> Vec<&'c Prepared<'a>> {
        let mut seen: Vec<_> =
            group.iter().filter_map(|prepared| Some((prepared.nearness(client)?, *prepared))).collect();
        // Stable: within one nearness they stay by age.
        seen.sort_by_key(|(nearness, _)| *nearness);
        seen.into_iter().map(|(_, prepared)| prepared).collect()
    }

    /// The one that has the host for clients of a namespace: the first that makes a table, for one without a rule for the port leaves the
    /// host as if it were not there.
    pub(super) fn chosen<T>(
        &self,
        client: Option<&str>,
        mut table: impl FnMut(&'c Prepared<'a>) -> Option<Arc<T>>,
    ) -> Option<Chosen<'c, 'a, T>> {
        self.groups.iter().find_map(|group| {
            let mut having = Self::visible(group, client)
                .into_iter()
                .filter_map(|prepared| Some((prepared, table(prepared)?)));
            let (winner, table) = having.next()?;
            let losers = having.map(|(loser, _)| loser).collect();
            Some(Chosen { table, winner, losers })
        })
    }
}

/// The VirtualService that has a host and port.
pub(super) struct Chosen<'c, 'a, T> {
    /// What it makes of them.
    pub(super) table: Arc<T>,
    winner: &'c Prepared<'a>,
    /// Others as specific as it, which have rules there too.
    losers: Vec<&'c Prepared<'a>>,
}

impl<T> Chosen<'_, '_, T> {
    /// Its key.
    pub(super) fn key(&self) -> Key {
        self.winner.key()
    }

    /// Says of those that were not chosen that they have no effect: VirtualServices of one host are not merged (fact 8).
    pub(super) fn losers(&self, cx: &Context<'_>, client: Option<&str>, host: &str) -> Vec<SourceError> {
        let whom = client.map_or(String::new(), |namespace| format!(" for clients of namespace {namespace}"));
        self.losers
            .iter()
            .filter_map(|loser| {
                let message = format!(
                    "hold {host}, which VirtualService {} has{whom}: this one has no effect there",
                    self.winner.source.name
                );
                cx.warning(&loser.key(), "spec.hosts", message)
            })
            .collect()
    }
}

/// What requests that no rule matches are answered with.
pub(super) fn no_route() -> Action {
    Action::Respond { status: 404, body: Arc::default(), reason: "no_route".into() }
}

/// The table that a VirtualService makes of a host and port; `None` when no rule is for the port.
pub(super) fn http_table(cx: &Context<'_>, service: &Prepared<'_>, port: u16) -> Option<HttpTable> {
    let mut rules = Vec::new();
    for rule in &*service.http {
        let Some(rule) = http_rule(cx, rule, port) else { continue };
        let last = rule.matches.is_empty() || rule.matches.iter().any(is_everything);
        rules.push(rule);
        if last {
            // Nothing gets past it (S10).
            break;
        }
    }
    let owner = Some(Arc::clone(&service.source.name.namespace));
    (!rules.is_empty()).then(|| HttpTable { owner, rules, unmatched: no_route() })
}

fn http_rule(cx: &Context<'_>, rule: &spec::HttpRoute, port: u16) -> Option<HttpRule> {
    let matches: Vec<HttpMatch> = rule.matches.iter().filter_map(|one| http_match(one, port)).collect();
    if matches.is_empty() && !rule.matches.is_empty() {
        return None;
    }
    let namespace = &*rule.source.namespace;
    let mut action = match &rule.action {
        HttpAction::Route(destinations) => forward(cx, destinations, namespace, port),
        HttpAction::Redirect(redirect) => Action::Redirect(redirect.clone()),
        HttpAction::Respond(answer) => Action::Respond {
            status: answer.status,
            body: Arc::clone(&answer.body),
            reason: "direct_response".into(),
        },
        // Merged before; one that is left leads nowhere.
        HttpAction::Delegate(_) => return None,
    };
    let fault = rule.fault.clone();
    // With faults neither time-out nor retries apply at this hop (S21).
    let faulty = fault.as_ref().is_some_and(|fault| {
        let shares = [fault.delay.map(|(share, _)| share), fault.abort.map(|(share, _)| share)];
        shares.into_iter().flatten().any(|share| share > Millionths(0))
    });
    let mut headers = rule.headers.clone().unwrap_or_default();
    if let Action::Forward(backends) = &mut action
        && let [alone] = &mut **backends
    {
        headers.request = together(headers.request, std::mem::take(&mut alone.request_headers));
        headers.response = together(headers.response, std::mem::take(&mut alone.response_headers));
    }
    let retries = match &rule.retries {
        Some(Retries::Off) => None,
        Some(Retries::On(policy)) => Some(policy.clone()),
        None => cx.defaults.retries.clone(),
    };
    let mirrors = rule.mirrors.iter().filter(|mirror| mirror.share > Millionths(0)).map(|mirror| Mirror {
        backend: backend(cx, &mirror.destination, namespace, port),
        share: mirror.share,
    });
    let key = Key { kind: Kind::VirtualService, name: rule.source.clone() };
    Some(HttpRule {
        name: rule.name.clone(),
        origin: cx.origin(&key, &rule.field),
        matches,
        action,
        timeout: rule.timeout.filter(|timeout| !timeout.is_zero() && !faulty),
        retries: retries.filter(|_| !faulty),
        fault: fault.filter(|_| faulty),
        mirrors: mirrors.collect(),
        cors: rule.cors.clone(),
        request_headers: headers.request,
        response_headers: headers.response,
        rewrite: rule.rewrite.clone().unwrap_or_default(),
    })
}

/// The changes of a rule with those of its only destination, which are one list to Istio: what one of them takes away and the other sets
/// is set, and of two values for a header the destination's counts.
fn together(rule: HeaderOps, destination: HeaderOps) -> HeaderOps {
    fn both<T>(rule: Vec<T>, destination: Vec<T>) -> Vec<T> {
        rule.into_iter().chain(destination).collect()
    }
    // Stable: of one name the rule's stays before the destination's.
    let by_name = |mut all: Vec<(Arc<str>, HeaderText)>| {
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        all
    };
    HeaderOps {
        set: by_name(both(rule.set, destination.set)),
        add: by_name(both(rule.add, destination.add)),
        remove: both(rule.remove, destination.remove),
        authority: rule.authority.or(destination.authority),
    }
}

/// Whether something that is said about gateways holds for workloads of the mesh.
fn is_for_mesh(gateways: &[Arc<str>]) -> bool {
    gateways.is_empty() || gateways.iter().any(|gateway| &**gateway == MESH_GATEWAY)
}

/// A match as far as it concerns clients of the mesh that dial a port (S11, S12).
fn http_match(one: &spec::HttpMatch, port: u16) -> Option<HttpMatch> {
    if one.port.is_some_and(|wanted| wanted != port) || !is_for_mesh(&one.gateways) {
        return None;
    }
    let ignore_case = one.ignore_uri_case;
    let path = match one.uri.clone() {
        None | Some(StringMatch::Present) => None,
        Some(StringMatch::Exact(path)) => Some(PathMatch::Exact { path, ignore_case }),
        Some(StringMatch::Prefix(prefix)) => Some(PathMatch::Prefix { prefix, ignore_case }),
        Some(StringMatch::Regex(regex)) => Some(PathMatch::Regex(regex)),
    };
    let header = |inverted: bool| {
        move |(name, value): (&Arc<str>, &StringMatch)| HeaderMatch {
            name: Arc::clone(name),
            value: value.clone(),
            inverted,
        }
    };
    let headers = one.headers.iter().map(header(false)).chain(one.without_headers.iter().map(header(true)));
    let query = one.query.iter();
    // Where gateways are named, clients are not asked who they are.
    let asks_client = one.gateways.is_empty();
    Some(HttpMatch {
        name: one.name.clone(),
        path,
        method: one.method.clone(),
        scheme: one.scheme.clone(),
        authority: one.authority.clone(),
        headers: headers.collect(),
        query: query
            .map(|(name, value)| QueryMatch { name: Arc::clone(name), value: value.clone() })
            .collect(),
        source_labels: if asks_client { one.source_labels.clone() } else { BTreeMap::new() },
        source_namespace: one.source_namespace.clone().filter(|_| asks_client),
    })
}

/// Whether every request of every client matches (S10).
fn is_everything(one: &HttpMatch) -> bool {
    let any_path = match &one.path {
        None => true,
        Some(PathMatch::Prefix { prefix, .. }) => &**prefix == "/",
        Some(PathMatch::Segments(prefix)) => prefix.is_empty(),
        Some(PathMatch::Regex(regex)) => regex.pattern() == ".*",
        Some(PathMatch::Exact { .. }) => false,
    };
    any_path && *one == HttpMatch { name: one.name.clone(), path: one.path.clone(), ..HttpMatch::default() }
}

/// To one of several destinations: a single one gets everything, of several those without weight nothing (S17).
fn forward(cx: &Context<'_>, destinations: &[HttpDestination], namespace: &str, port: u16) -> Action {
    let single = destinations.len() == 1;
    let backends: Vec<WeightedBackend> = destinations
        .iter()
        .filter(|destination| single || destination.weight > 0)
        .map(|destination| WeightedBackend {
            weight: destination.weight.max(1),
            backend: backend(cx, &destination.destination, namespace, port),
            request_headers: destination.headers.request.clone(),
            response_headers: destination.headers.response.clone(),
        })
        .collect();
    if backends.is_empty() {
        return Action::Respond { status: 503, body: Arc::default(), reason: "no_destination".into() };
    }
    Action::Forward(backends)
}

/// The cluster of a destination; one that does not exist is 503 (S16). Whether its subset exists depends on the client, and is
/// seen in the table of clusters.
pub(super) fn backend(cx: &Context<'_>, destination: &Destination, namespace: &str, port: u16) -> Backend {
    let broken = |reason: String| Backend::Broken { status: 503, reason: reason.into() };
    let host = destination.host.full(&cx.mesh.cluster_domain);
    let Some(service) = cx.registry.at(&host, namespace) else {
        return broken(format!("cluster_not_found: no service has the host {host}"));
    };
    match registry::port(service, destination.port, port) {
        Some(port) => Backend::Cluster(ClusterKey {
            service: service.name.clone(),
            port,
            subset: destination.subset.clone(),
        }),
        None => match destination.port.unwrap_or(port) {
            // Nobody dialled one.
            0 => {
                broken(format!("cluster_not_found: {host} has several TCP ports or none, and none is named"))
            }
            port => broken(format!("cluster_not_found: {host} has no TCP port {port}")),
        },
    }
}

/// The table that a VirtualService makes of connections to a host and port; `None` when no rule is for the port.
pub(super) fn stream_table(cx: &Context<'_>, service: &Prepared<'_>, port: u16) -> Option<StreamTable> {
    let rules = |rules: &[StreamRoute]| -> Vec<StreamRule> {
        rules.iter().filter_map(|rule| stream_rule(cx, service, rule, port)).collect()
    };
    let table = StreamTable { tls: rules(&service.source.tls), tcp: rules(&service.source.tcp) };
    (!table.tls.is_empty() || !table.tcp.is_empty()).then_some(table)
}

fn stream_rule(
    cx: &Context<'_>,
    service: &Prepared<'_>,
    rule: &StreamRoute,
    port: u16,
) -> Option<StreamRule> {
    let is_meant =
        |one: &&spec::StreamMatch| one.port.is_none_or(|wanted| wanted == port) && is_for_mesh(&one.gateways);
    // Unlike those for HTTP, conditions on the client hold beside gateways (S12).
    let matches: Vec<StreamMatch> = rule
        .matches
        .iter()
        .filter(is_meant)
        .map(|one| StreamMatch {
            sni: one.sni.clone(),
            subnets: one.subnets.clone(),
            source_labels: one.source_labels.clone(),
            source_namespace: one.source_namespace.clone(),
        })
        .collect();
    if matches.is_empty() && !rule.matches.is_empty() {
        return None;
    }
    let namespace = &*service.source.name.namespace;
    let single = rule.destinations.len() == 1;
    let backends: Vec<WeightedBackend> = rule
        .destinations
        .iter()
        .filter(|destination| single || destination.weight > 0)
        .map(|destination| WeightedBackend {
            weight: destination.weight.max(1),
            backend: backend(cx, &destination.destination, namespace, port),
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
        })
        .collect();
    let origin = cx.origin(&service.key(), &rule.field);
    (!backends.is_empty()).then_some(StreamRule { origin, matches, backends })
}
