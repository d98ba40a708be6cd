//! GRPCRoute.

use std::sync::Arc;

use mesh_core::{
    route::{
        http::HeaderOps,
        matching::{FullRegex, HeaderMatch, HttpMatch, PathMatch, StringMatch},
    },
    snapshot::Name,
};

use super::{
    ParentRef, RouteBackend, RouteMirror, UnsupportedFilter,
    filters::{self, Place},
    http_route::{backends, mesh_hostnames},
    matches::{self, MATCHES_MAX},
    references::{self, Head, at_most},
    wire,
};
use crate::problem::Problems;

/// Longest name of a service, and of a method.
const NAME_BYTES_MAX: usize = 1024;

/// A GRPCRoute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcRoute {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of equals wins.
    pub created: Option<i64>,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Hosts, `*.example.com` among them; a mesh route's have no effect: its host is the Service's.
    pub hostnames: Vec<Arc<str>>,
    /// Rules, as they are written.
    pub rules: Vec<GrpcRouteRule>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcRouteRule {
    /// Name.
    pub name: Option<Arc<str>>,
    /// Any of these; none is every request.
    pub matches: Vec<GrpcMatch>,
    /// Changes to the request's headers.
    pub request_headers: HeaderOps,
    /// Changes to the response's headers.
    pub response_headers: HeaderOps,
    /// Where copies go.
    pub mirrors: Vec<RouteMirror>,
    /// A filter that the mesh does not have: requests are answered with `UNAVAILABLE`.
    pub unsupported: Option<UnsupportedFilter>,
    /// By weight. None of them, or only such of weight 0, is `UNAVAILABLE`.
    pub backends: Vec<RouteBackend>,
}

/// Conditions on a call. All hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcMatch {
    /// Service, exact or by regular expression; `None` is every one.
    pub service: Option<StringMatch>,
    /// Method, exact or by regular expression; `None` is every one.
    pub method: Option<StringMatch>,
    /// Headers.
    pub headers: Vec<HeaderMatch>,
    /// The same as conditions on an HTTP request: `/SERVICE/METHOD`.
    pub http: HttpMatch,
}

/// Reads a route.
pub(crate) fn read(object: &wire::GrpcRoute, problems: &mut Problems) -> GrpcRoute {
    let spec = object.spec.clone().unwrap_or_default();
    let Head { name, created, parents, hostnames } = references::head(&object.metadata, &spec, problems);
    mesh_hostnames(&parents, &hostnames, problems);
    let written = spec.rules.as_deref().unwrap_or_default();
    let name_of = |rule: &wire::GrpcRule| rule.name.clone();
    let rules = references::rules(written, name_of, problems, |written, name_of_rule, field, problems| {
        GrpcRouteRule { name: name_of_rule, ..rule(written, &name.namespace, field, problems) }
    });
    matches::at_most_together(rules.iter().map(|rule| rule.matches.len()), problems);
    GrpcRoute { name, created, parents, hostnames, rules }
}

fn rule(rule: &wire::GrpcRule, namespace: &str, field: &str, problems: &mut Problems) -> GrpcRouteRule {
    let list = rule.matches.as_deref().unwrap_or_default();
    let at_matches = format!("{field}.matches");
    at_most(list.len(), MATCHES_MAX, &at_matches, problems);
    let mut matches = Vec::with_capacity(list.len());
    for (at, one) in list.iter().enumerate() {
        matches.push(grpc_match(one, &format!("{at_matches}[{at}]"), problems));
    }
    let filters = filters::read(rule.filters.as_ref(), Place::GrpcRule, &[], namespace, field, problems);
    let refs = rule.backend_refs.as_deref().unwrap_or_default();
    let backends = backends(refs, Place::GrpcBackend, &[], namespace, field, problems);
    if refs.is_empty() && filters.unsupported.is_none() {
        let message = "is empty: calls that match are answered with UNAVAILABLE";
        problems.warning(format!("{field}.backendRefs"), message);
    }
    if rule.session_persistence.is_some() {
        problems.warning(
            format!("{field}.sessionPersistence"),
            "is not done by the mesh yet; calls of a session may reach several endpoints",
        );
    }
    GrpcRouteRule {
        name: None,
        matches,
        request_headers: filters.request_headers,
        response_headers: filters.response_headers,
        mirrors: filters.mirrors,
        unsupported: filters.unsupported,
        backends,
    }
}

fn grpc_match(one: &wire::GrpcMatch, field: &str, problems: &mut Problems) -> GrpcMatch {
    let headers = matches::headers(one.headers.as_ref(), &format!("{field}.headers"), problems);
    let mut read = GrpcMatch { headers: headers.clone(), ..GrpcMatch::default() };
    let mut path = None;
    if let Some(method) = &one.method {
        let field = format!("{field}.method");
        let regex = match method.r#type.as_deref() {
            None | Some("Exact") => false,
            Some("RegularExpression") => true,
            Some(other) => {
                let message = format!("is {other:?}, wanted Exact or RegularExpression");
                problems.error(format!("{field}.type"), message);
                return read;
            }
        };
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (service, name) = (given(&method.service), given(&method.method));
        if service.is_none() && name.is_none() {
            problems.error(field.as_str(), "has neither service nor method, wanted at least one of them");
        }
        let part = |text: Option<&String>, name: &str, problems: &mut Problems| {
            text.and_then(|text| {
                pattern(text, regex, name == "service", &format!("{field}.{name}"), problems)
            })
        };
        read.service = part(service.as_ref(), "service", problems);
        read.method = part(name.as_ref(), "method", problems);
        path = path_of(read.service.as_ref(), read.method.as_ref(), &field, problems);
    }
    read.http = HttpMatch { path, headers, ..HttpMatch::default() };
    read
}

/// A service or method.
fn pattern(
    text: &str,
    regex: bool,
    is_service: bool,
    field: &str,
    problems: &mut Problems,
) -> Option<StringMatch> {
    if text.len() > NAME_BYTES_MAX {
        problems.error(field, format!("has {} bytes, wanted at most {NAME_BYTES_MAX}", text.len()));
        return None;
    }
    if regex {
        return matches::regex(text, field, problems).map(StringMatch::Regex);
    }
    let is_word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let (good, wanted) = if is_service {
        let name = text.strip_prefix('.').unwrap_or(text);
        (name.split('.').all(is_word), "wanted a name such as package.Service")
    } else {
        (is_word(text), "wanted a name of letters, digits and '_', not beginning with a digit")
    };
    if !good {
        problems.error(field, format!("is {text:?}, {wanted}"));
        return None;
    }
    Some(StringMatch::Exact(text.into()))
}

/// The path of calls to a service and method.
fn path_of(
    service: Option<&StringMatch>,
    method: Option<&StringMatch>,
    field: &str,
    problems: &mut Problems,
) -> Option<PathMatch> {
    if let (Some(StringMatch::Exact(service)), Some(StringMatch::Exact(method))) = (service, method) {
        return Some(PathMatch::Exact { path: format!("/{service}/{method}").into(), ignore_case: false });
    }
    if let (Some(StringMatch::Exact(service)), None) = (service, method) {
        return Some(PathMatch::Prefix { prefix: format!("/{service}/").into(), ignore_case: false });
    }
    if service.is_none() && method.is_none() {
        return None;
    }
    let part = |part: Option<&StringMatch>| match part {
        // Letters, digits, '_' and '.'.
        Some(StringMatch::Exact(text)) => text.replace('.', "\\."),
        Some(StringMatch::Regex(regex)) => format!("(?:{})", regex.pattern()),
        _ => "[^/]+".to_owned(),
    };
    match FullRegex::new(&format!("/{}/{}", part(service), part(method))) {
        Ok(regex) => Some(PathMatch::Regex(regex)),
        // Each part is good by itself; together they may be too large.
        Err(_) => {
            problems.error(field, "is too large a regular expression, with service and method together");
            None
        }
    }
}
