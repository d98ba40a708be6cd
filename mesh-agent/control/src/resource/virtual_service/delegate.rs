//! Delegation: the rules of other VirtualServices in the place of a rule that names them (S27–S29).
//!
//! Pure. A delegate may only narrow what its root lets through: where it would not, its rule is left out and reported.
//!
//! Decided here, where Istio's code and documents leave room: a pattern for mere presence covers every other one; a delegate
//! without source namespace has its root's; labels of one name must have one value; conditions on the absence of one header
//! must be equal.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{route::matching::StringMatch, snapshot::Name};

use super::{HttpAction, HttpMatch, HttpRoute, VirtualService};
use crate::{
    problem::{Problem, Problems},
    resource::ExportTo,
};

/// The rules for HTTP of `root` with those of its delegates in their places, and what was left out and why, as problems of
/// `root`.
///
/// `find` gives a VirtualService by name; `default_export_to` is who sees one that does not say.
pub fn merged<'v>(
    root: &VirtualService,
    find: impl Fn(&Name) -> Option<&'v VirtualService>,
    default_export_to: &ExportTo,
) -> (Vec<HttpRoute>, Vec<Problem>) {
    let mut problems = Problems::default();
    let mut rules = Vec::with_capacity(root.http.len());
    for rule in &root.http {
        let HttpAction::Delegate(name) = &rule.action else {
            rules.push(rule.clone());
            continue;
        };
        let at = format!("{}.delegate", rule.field);
        let Some(delegate) = find(name) else {
            problems.warning(at, format!("is {name}, which is not there; the rule is left out"));
            continue;
        };
        if !delegate.is_delegate() {
            let why = "which has hosts of its own and so is no delegate; the rule is left out";
            problems.warning(at, format!("is {name}, {why}"));
            continue;
        }
        let export_to = delegate.export_to.as_ref().unwrap_or(default_export_to);
        if !export_to.includes(&root.name.namespace, &name.namespace) {
            let namespace = &root.name.namespace;
            let message =
                format!("is {name}, which is not exported to namespace {namespace}; the rule is left out");
            problems.warning(at, message);
            continue;
        }
        for part in &delegate.http {
            match merge(rule, part) {
                Some(rule) => rules.push(rule),
                None => {
                    let why = "asks for more than this rule lets through; it is left out";
                    problems.warning(at.as_str(), format!("is {name}, whose {} {why}", part.field));
                }
            }
        }
    }
    (rules, problems.into_vec())
}

/// One rule of a delegate in the place of its root's; `None` when the two exclude each other, or it delegates again.
fn merge(root: &HttpRoute, part: &HttpRoute) -> Option<HttpRoute> {
    if matches!(part.action, HttpAction::Delegate(_)) {
        return None;
    }
    let matches = merge_matches(&root.matches, &part.matches)?;
    // Only what is forwarded can be changed or copied on its way.
    let forwards = matches!(part.action, HttpAction::Route(_));
    let inherited = |mine: bool| forwards && !mine;
    Some(HttpRoute {
        source: part.source.clone(),
        field: Arc::clone(&part.field),
        name: joined(root.name.as_ref(), part.name.as_ref()),
        matches,
        action: part.action.clone(),
        rewrite: if inherited(part.rewrite.is_some()) { root.rewrite.clone() } else { part.rewrite.clone() },
        timeout: part.timeout.or(root.timeout),
        retries: part.retries.as_ref().or(root.retries.as_ref()).cloned(),
        fault: if inherited(part.fault.is_some()) { root.fault.clone() } else { part.fault.clone() },
        mirrors: if inherited(!part.mirrors.is_empty()) {
            root.mirrors.clone()
        } else {
            part.mirrors.clone()
        },
        cors: part.cors.as_ref().or(root.cors.as_ref()).cloned(),
        headers: part.headers.as_ref().or(root.headers.as_ref()).cloned(),
    })
}

/// Every match of the delegate with every match of the root that it narrows; `None` when one narrows none.
fn merge_matches(root: &[HttpMatch], part: &[HttpMatch]) -> Option<Vec<HttpMatch>> {
    if root.is_empty() {
        return Some(part.to_vec());
    }
    if part.is_empty() {
        return Some(root.to_vec());
    }
    let mut merged = Vec::new();
    for inner in part {
        let before = merged.len();
        merged.extend(root.iter().filter(|outer| narrows(inner, outer)).map(|outer| both(outer, inner)));
        if merged.len() == before {
            return None;
        }
    }
    Some(merged)
}

/// Whether the two can hold at once without the inner one taking back what the outer one says.
fn narrows(inner: &HttpMatch, outer: &HttpMatch) -> bool {
    let plain = [
        (&inner.scheme, &outer.scheme),
        (&inner.method, &outer.method),
        (&inner.authority, &outer.authority),
    ];
    let named = [(&inner.headers, &outer.headers), (&inner.query, &outer.query)];
    let gateways = inner.gateways.is_empty()
        || outer.gateways.is_empty()
        || inner.gateways.iter().all(|gateway| outer.gateways.contains(gateway));
    inner.ignore_uri_case == outer.ignore_uri_case
        && within(inner.uri.as_ref(), outer.uri.as_ref(), inner.ignore_uri_case)
        && plain.iter().all(|(inner, outer)| within(inner.as_ref(), outer.as_ref(), false))
        && named.iter().all(|(inner, outer)| {
            inner.iter().all(|(name, value)| within(Some(value), outer.get(name), false))
        })
        && agree(&inner.without_headers, &outer.without_headers)
        && agree(&inner.source_labels, &outer.source_labels)
        && both_or_equal(inner.port.as_ref(), outer.port.as_ref())
        && both_or_equal(inner.source_namespace.as_ref(), outer.source_namespace.as_ref())
        && gateways
}

fn both_or_equal<T: PartialEq>(inner: Option<&T>, outer: Option<&T>) -> bool {
    inner.zip(outer).is_none_or(|(inner, outer)| inner == outer)
}

fn agree<T: PartialEq>(inner: &BTreeMap<Arc<str>, T>, outer: &BTreeMap<Arc<str>, T>) -> bool {
    inner.iter().all(|(name, value)| outer.get(name).is_none_or(|other| other == value))
}

/// Whether all that `inner` matches is matched by `outer`; what is not given restricts nothing. Regular expressions are not
/// compared, so that one on either side is a conflict.
fn within(inner: Option<&StringMatch>, outer: Option<&StringMatch>, ignore_case: bool) -> bool {
    let (Some(inner), Some(outer)) = (inner, outer) else { return true };
    let starts = |text: &str, prefix: &str| match (ignore_case, text.get(..prefix.len())) {
        (true, Some(start)) => start.eq_ignore_ascii_case(prefix),
        (true, None) => false,
        (false, _) => text.starts_with(prefix),
    };
    match (inner, outer) {
        (StringMatch::Regex(_), _) | (_, StringMatch::Regex(_)) => false,
        (_, StringMatch::Present) => true,
        (StringMatch::Present, _) => false,
        (StringMatch::Exact(inner), StringMatch::Exact(outer)) if ignore_case => {
            inner.eq_ignore_ascii_case(outer)
        }
        (StringMatch::Exact(inner), StringMatch::Exact(outer)) => inner == outer,
        (StringMatch::Prefix(_), StringMatch::Exact(_)) => false,
        (StringMatch::Exact(inner) | StringMatch::Prefix(inner), StringMatch::Prefix(outer)) => {
            starts(inner, outer)
        }
    }
}

/// All conditions of both, the inner one's where they say the same thing more narrowly.
fn both(outer: &HttpMatch, inner: &HttpMatch) -> HttpMatch {
    let pick =
        |inner: &Option<StringMatch>, outer: &Option<StringMatch>| inner.clone().or_else(|| outer.clone());
    HttpMatch {
        name: joined(outer.name.as_ref(), inner.name.as_ref()),
        uri: pick(&inner.uri, &outer.uri),
        ignore_uri_case: inner.ignore_uri_case,
        scheme: pick(&inner.scheme, &outer.scheme),
        method: pick(&inner.method, &outer.method),
        authority: pick(&inner.authority, &outer.authority),
        headers: union(&inner.headers, &outer.headers),
        without_headers: union(&inner.without_headers, &outer.without_headers),
        query: union(&inner.query, &outer.query),
        port: inner.port.or(outer.port),
        source_labels: union(&inner.source_labels, &outer.source_labels),
        source_namespace: inner.source_namespace.clone().or_else(|| outer.source_namespace.clone()),
        gateways: if inner.gateways.is_empty() { outer.gateways.clone() } else { inner.gateways.clone() },
    }
}

fn union<T: Clone>(inner: &BTreeMap<Arc<str>, T>, outer: &BTreeMap<Arc<str>, T>) -> BTreeMap<Arc<str>, T> {
    let mut all = outer.clone();
    all.extend(inner.iter().map(|(name, value)| (Arc::clone(name), value.clone())));
    all
}

/// Names of root and delegate, joined as Istio does (S15).
fn joined(root: Option<&Arc<str>>, part: Option<&Arc<str>>) -> Option<Arc<str>> {
    match (root, part) {
        (Some(root), Some(part)) => Some(format!("{root}-{part}").into()),
        (one, other) => other.or(one).cloned(),
    }
}
