//! HTTPRoute.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    route::{
        http::{Cors, HeaderOps, Redirect, Rewrite},
        matching::HttpMatch,
    },
    snapshot::Name,
};

use super::{
    ParentRef, RouteBackend, RouteMirror, UnsupportedFilter,
    filters::{self, Place},
    matches,
    references::{self, BACKENDS_MAX, Head, at_most},
    wire,
};
use crate::problem::Problems;

/// An HTTPRoute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRoute {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of equals wins.
    pub created: Option<i64>,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Hosts, `*.example.com` among them; a mesh route's have no effect: its host is the Service's.
    pub hostnames: Vec<Arc<str>>,
    /// Rules, as they are written.
    pub rules: Vec<HttpRouteRule>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRouteRule {
    /// Name.
    pub name: Option<Arc<str>>,
    /// Any of these, never none. A path is always there; prefixes are [`mesh_core::route::matching::PathMatch::Segments`].
    pub matches: Vec<HttpMatch>,
    /// Changes to the request's headers.
    pub request_headers: HeaderOps,
    /// Changes to the response's headers.
    pub response_headers: HeaderOps,
    /// Requests are answered with a redirect; there are no backends then.
    pub redirect: Option<Redirect>,
    /// Changes to where requests go.
    pub rewrite: Rewrite,
    /// Where copies go.
    pub mirrors: Vec<RouteMirror>,
    /// Cross-origin rules.
    pub cors: Option<Cors>,
    /// A filter that the mesh does not have: requests are answered with 500.
    pub unsupported: Option<UnsupportedFilter>,
    /// By weight. None of them, or only such of weight 0, is 500 (unless there is a redirect).
    pub backends: Vec<RouteBackend>,
    /// Of the whole request; `None` also for `0s`: no limit.
    pub timeout: Option<Duration>,
    /// Of each try; `None` also for `0s`: no limit.
    pub backend_timeout: Option<Duration>,
    /// How tries are repeated; `None`: as the mesh does by itself.
    pub retry: Option<RouteRetry>,
}

/// `retry` of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteRetry {
    /// Tries after the first; 0 is never; `None` is the implementation's choice (2, S35).
    pub attempts: Option<u32>,
    /// Statuses that are worth another try, 400 to 599.
    pub codes: Vec<u16>,
    /// Least wait between tries.
    pub backoff: Option<Duration>,
}

/// Reads a route.
pub(crate) fn read(object: &wire::HttpRoute, problems: &mut Problems) -> HttpRoute {
    let spec = object.spec.clone().unwrap_or_default();
    let Head { name, created, parents, hostnames } = references::head(&object.metadata, &spec, problems);
    mesh_hostnames(&parents, &hostnames, problems);
    // Without rules there is one, for every request, without backends (the CRD's default).
    let default = [wire::HttpRule::default()];
    let written = spec.rules.as_deref();
    if written.is_some_and(<[_]>::is_empty) {
        problems.error("spec.rules", "is empty, wanted at least one rule, or no such field");
    }
    let written = written.unwrap_or(&default);
    let name_of = |rule: &wire::HttpRule| rule.name.clone();
    let rules = references::rules(written, name_of, problems, |written, name_of_rule, field, problems| {
        HttpRouteRule { name: name_of_rule, ..rule(written, &name.namespace, field, problems) }
    });
    matches::at_most_together(rules.iter().map(|rule| rule.matches.len()), problems);
    HttpRoute { name, created, parents, hostnames, rules }
}

/// Warns of host names that no parent looks at.
pub(super) fn mesh_hostnames(parents: &[ParentRef], hostnames: &[Arc<str>], problems: &mut Problems) {
    let mesh = |parent: &ParentRef| {
        matches!(parent.kind, super::ParentKind::Service | super::ParentKind::ServiceEntry)
    };
    if !hostnames.is_empty() && !parents.is_empty() && parents.iter().all(mesh) {
        problems.warning(
            "spec.hostnames",
            "has no effect: requests to a Service are matched by its own names, whatever is said here",
        );
    }
}

fn rule(rule: &wire::HttpRule, namespace: &str, field: &str, problems: &mut Problems) -> HttpRouteRule {
    let matches = matches::http(rule.matches.as_ref(), field, problems);
    let filters = filters::read(rule.filters.as_ref(), Place::HttpRule, &matches, namespace, field, problems);
    let refs = rule.backend_refs.as_deref().unwrap_or_default();
    let backends = backends(refs, Place::HttpBackend, &matches, namespace, field, problems);
    let redirects =
        rule.filters.iter().flatten().any(|filter| filter.r#type.as_deref() == Some("RequestRedirect"));
    if redirects && !refs.is_empty() {
        problems.error(
            format!("{field}.backendRefs"),
            "is there beside a RequestRedirect filter, wanted at most one of them",
        );
    }
    if !redirects && refs.is_empty() && filters.unsupported.is_none() {
        let message = "is empty: requests that match are answered with 500";
        problems.warning(format!("{field}.backendRefs"), message);
    }
    if rule.session_persistence.is_some() {
        problems.warning(
            format!("{field}.sessionPersistence"),
            "is not done by the mesh yet; requests of a session may reach several endpoints",
        );
    }
    let (timeout, backend_timeout) = timeouts(rule.timeouts.as_ref(), field, problems);
    HttpRouteRule {
        name: None,
        request_headers: filters.request_headers,
        response_headers: filters.response_headers,
        redirect: filters.redirect,
        rewrite: filters.rewrite,
        mirrors: filters.mirrors,
        cors: filters.cors,
        unsupported: filters.unsupported,
        backends,
        timeout,
        backend_timeout,
        retry: rule.retry.as_ref().map(|retry| self::retry(retry, field, problems)),
        matches,
    }
}

/// `backendRefs` of a rule.
pub(super) fn backends(
    refs: &[wire::BackendRef],
    place: Place,
    matches: &[HttpMatch],
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Vec<RouteBackend> {
    let list = format!("{field}.backendRefs");
    at_most(refs.len(), BACKENDS_MAX, &list, problems);
    let mut read = Vec::with_capacity(refs.len());
    for (at, reference) in refs.iter().enumerate() {
        let field = format!("{list}[{at}]");
        let filters = filters::read(reference.filters.as_ref(), place, matches, namespace, &field, problems);
        let Some((backend, weight)) = references::backend(&reference.plain(), namespace, &field, problems)
        else {
            continue;
        };
        read.push(RouteBackend {
            weight,
            backend,
            request_headers: filters.request_headers,
            response_headers: filters.response_headers,
            unsupported: filters.unsupported,
        });
    }
    if !read.is_empty() && read.iter().all(|backend| backend.weight == 0) {
        problems.warning(list, "all have weight 0: requests that match are answered with 500");
    }
    read
}

/// `timeouts.request` and `.backendRequest`; zero is none.
fn timeouts(
    timeouts: Option<&wire::Timeouts>,
    field: &str,
    problems: &mut Problems,
) -> (Option<Duration>, Option<Duration>) {
    let Some(timeouts) = timeouts else { return (None, None) };
    let mut read = |name: &str, text: &Option<String>| {
        let found = duration(text.as_deref()?, &format!("{field}.timeouts.{name}"), problems)?;
        (!found.is_zero()).then_some(found)
    };
    let request = read("request", &timeouts.request);
    let backend = read("backendRequest", &timeouts.backend_request);
    if let (Some(whole), Some(part)) = (request, backend)
        && part > whole
    {
        let message = format!("is {part:?}, wanted at most timeouts.request, {whole:?}");
        problems.error(format!("{field}.timeouts.backendRequest"), message);
    }
    (request, backend)
}

fn retry(retry: &wire::Retry, field: &str, problems: &mut Problems) -> RouteRetry {
    let field = format!("{field}.retry");
    let mut codes = Vec::new();
    for (at, code) in retry.codes.iter().flatten().enumerate() {
        match u16::try_from(*code) {
            Ok(status @ 400..=599) => {
                if !codes.contains(&status) {
                    codes.push(status);
                }
            }
            _ => {
                let message = format!("is {code}, wanted a status from 400 to 599");
                problems.error(format!("{field}.codes[{at}]"), message);
            }
        }
    }
    let attempts = retry.attempts.and_then(|attempts| match u32::try_from(attempts) {
        Ok(attempts) => Some(attempts),
        Err(_) => {
            let message = format!("is {attempts}, wanted a number of at least 0");
            problems.error(format!("{field}.attempts"), message);
            None
        }
    });
    let backoff =
        retry.backoff.as_deref().and_then(|text| duration(text, &format!("{field}.backoff"), problems));
    RouteRetry { attempts, codes, backoff }
}

/// A duration as the Gateway API has it (GEP-2257): up to four numbers of up to five digits with units.
fn duration(text: &str, field: &str, problems: &mut Problems) -> Option<Duration> {
    let read = parse_duration(text);
    if read.is_none() {
        let wanted = "wanted a duration such as 10s, 1h30m or 500ms";
        problems.error(field, format!("is {text:?}, {wanted}"));
    }
    read
}

fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        if !(1..=5).contains(&digits) || parts == 4 {
            return None;
        }
        let number: u64 = number.parse().ok()?;
        let (part, tail) = if let Some(tail) = tail.strip_prefix("ms") {
            (Duration::from_millis(number), tail)
        } else if let Some(tail) = tail.strip_prefix('h') {
            (Duration::from_secs(number * 3600), tail)
        } else if let Some(tail) = tail.strip_prefix('m') {
            (Duration::from_secs(number * 60), tail)
        } else {
            (Duration::from_secs(number), tail.strip_prefix('s')?)
        };
        sum += part;
        parts += 1;
        rest = tail;
    }
    (parts > 0).then_some(sum)
}
