//! TLSRoute and TCPRoute: connections that are not looked into.

use std::sync::Arc;

use mesh_core::{route::http::HeaderOps, snapshot::Name};

use super::{
    ParentRef, RouteBackend,
    references::{self, BACKENDS_MAX, Head, at_most},
    wire,
};
use crate::problem::Problems;

/// A TLSRoute or TCPRoute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRoute {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known.
    pub created: Option<i64>,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Server names of a TLSRoute, `*.example.com` among them; none: any, and no name at all. A TCPRoute has none.
    pub hostnames: Vec<Arc<str>>,
    /// Of several the first counts: nothing tells their connections apart.
    pub rules: Vec<StreamRouteRule>,
}

/// Where connections go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRouteRule {
    /// Name.
    pub name: Option<Arc<str>>,
    /// By weight.
    pub backends: Vec<RouteBackend>,
}

/// Reads a TLSRoute.
pub(crate) fn read_tls(object: &wire::TlsRoute, problems: &mut Problems) -> StreamRoute {
    let spec = object.spec.clone().unwrap_or_default();
    let head = references::head(&object.metadata, &spec, problems);
    route(head, spec.rules.as_ref(), problems)
}

/// Reads a TCPRoute.
pub(crate) fn read_tcp(object: &wire::TcpRoute, problems: &mut Problems) -> StreamRoute {
    let spec = object.spec.clone().unwrap_or_default();
    let (refs, gateways) = (spec.parent_refs.as_ref(), spec.use_default_gateways.as_ref());
    let head = references::head_without_hosts(&object.metadata, refs, gateways, problems);
    route(head, spec.rules.as_ref(), problems)
}

fn route(head: Head, rules: Option<&Vec<wire::StreamRule>>, problems: &mut Problems) -> StreamRoute {
    let Head { name, created, parents, hostnames } = head;
    StreamRoute { rules: self::rules(rules, &name.namespace, problems), name, created, parents, hostnames }
}

fn rules(
    rules: Option<&Vec<wire::StreamRule>>,
    namespace: &str,
    problems: &mut Problems,
) -> Vec<StreamRouteRule> {
    let rules = rules.map(Vec::as_slice).unwrap_or_default();
    if rules.is_empty() {
        problems.error("spec.rules", "is empty, wanted at least one rule");
    }
    if rules.len() > 1 {
        problems.warning("spec.rules[1]", "is never reached: the first rule takes every connection");
    }
    references::rules(
        rules,
        |rule| rule.name.clone(),
        problems,
        |rule, name, field, problems| {
            let refs = rule.backend_refs.as_deref().unwrap_or_default();
            let at_refs = format!("{field}.backendRefs");
            at_most(refs.len(), BACKENDS_MAX, &at_refs, problems);
            if refs.is_empty() {
                problems.error(at_refs.as_str(), "is empty, wanted at least one backend");
            }
            let mut backends = Vec::with_capacity(refs.len());
            for (at, reference) in refs.iter().enumerate() {
                let field = format!("{at_refs}[{at}]");
                let Some((backend, weight)) = references::backend(reference, namespace, &field, problems)
                else {
                    continue;
                };
                backends.push(RouteBackend {
                    weight,
                    backend,
                    request_headers: HeaderOps::default(),
                    response_headers: HeaderOps::default(),
                    unsupported: None,
                });
            }
            StreamRouteRule { name, backends }
        },
    )
}
