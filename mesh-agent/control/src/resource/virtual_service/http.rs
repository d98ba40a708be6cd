//! Rules of a VirtualService for HTTP, and their matches.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::route::matching::StringMatch;

use super::{ClientMatch, HttpAction, HttpDestination, HttpMatch, HttpRoute, RuleScope, action};
use crate::{
    problem::Problems,
    resource::{
        fields::{Node, Object},
        parts::{self, Place},
    },
};

/// Reads the rules.
pub(super) fn read(spec: &mut Object<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Vec<HttpRoute> {
    let nodes = spec.list("http", problems);
    let mut rules = Vec::with_capacity(nodes.len());
    let mut catch_all: Option<String> = None;
    for node in &nodes {
        // After an error nobody knows what the first one was to match.
        if let Some(first) = catch_all.as_ref().filter(|_| !problems.has_errors()) {
            let message = format!("is never reached: {first} matches every request");
            problems.warning(node.path.as_str(), message);
        }
        let Some(rule) = rule(node, scope, problems) else { continue };
        let all = rule.matches.is_empty() || rule.matches.iter().any(HttpMatch::is_everything);
        // What is delegated comes back when no rule of the delegate matches.
        let decides = !matches!(rule.action, HttpAction::Delegate(_));
        if all && decides && catch_all.is_none() {
            catch_all = Some(node.path.clone());
        }
        rules.push(rule);
    }
    rules
}

impl HttpMatch {
    /// Whether it holds for every request of every client of the resource (S10).
    pub fn is_everything(&self) -> bool {
        let any_path = match &self.uri {
            None | Some(StringMatch::Present) => true,
            Some(StringMatch::Prefix(prefix)) => &**prefix == "/",
            Some(StringMatch::Regex(regex)) => matches!(regex.pattern(), ".*" | "/.*"),
            Some(StringMatch::Exact(_)) => false,
        };
        let bare = Self {
            name: self.name.clone(),
            uri: self.uri.clone(),
            ignore_uri_case: self.ignore_uri_case,
            ..Self::default()
        };
        any_path && *self == bare
    }
}

fn rule(node: &Node<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Option<HttpRoute> {
    let mut rule = node.object(problems)?;
    let name = rule.shared("name", problems);
    let matches: Vec<HttpMatch> =
        rule.list("match", problems).iter().filter_map(|node| one_match(node, scope, problems)).collect();
    let action = what(&mut rule, scope, problems);
    let headers = action::headers(&mut rule, problems);
    let rewrite = action::rewrite(&mut rule, headers.as_ref(), problems);
    let read = HttpRoute {
        source: scope.name.clone(),
        field: node.path.as_str().into(),
        name,
        matches,
        rewrite,
        timeout: action::timeout(&mut rule, problems),
        retries: action::retries(&mut rule, "retries", problems),
        fault: action::fault(&mut rule, problems),
        mirrors: action::mirrors(&mut rule, scope, problems),
        cors: action::cors(&mut rule, problems),
        headers,
        action: action.unwrap_or_else(|| HttpAction::Route(Vec::new())),
    };
    if matches!(read.action, HttpAction::Redirect(_)) {
        prefix_rewrite_needs_prefixes(&mut rule, &read, problems);
    }
    rule.finish(problems);
    Some(read)
}

/// Reads the one thing that is done, and checks what may stand beside it (S23, S27).
fn what(rule: &mut Object<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Option<HttpAction> {
    let has_route = !rule.list("route", problems).is_empty();
    let given: Vec<&str> = [("route", has_route)]
        .into_iter()
        .chain(["redirect", "directResponse", "delegate"].map(|name| (name, rule.has(name))))
        .filter_map(|(name, given)| given.then_some(name))
        .collect();
    let [first, others @ ..] = given.as_slice() else {
        let wanted = "wanted one of route, redirect, directResponse and delegate";
        problems.error(rule.path.as_str(), format!("does nothing with requests, {wanted}"));
        return None;
    };
    for other in others {
        problems.error(rule.at(other), format!("is there beside {first}, wanted one of them"));
    }
    // What an answer of our own makes meaningless.
    let excluded: &[&'static str] = match *first {
        "redirect" | "directResponse" => &["rewrite", "fault", "mirror", "mirrors"],
        _ => &[],
    };
    for name in excluded {
        if rule.has(name) {
            let strict = matches!(*name, "rewrite" | "fault");
            let message = format!("is there beside {first}, wanted at most one of them");
            if strict {
                problems.error(rule.at(name), message);
            } else {
                problems.warning(rule.at(name), format!("is there beside {first}; it has no effect"));
            }
        }
    }
    match *first {
        "route" => Some(HttpAction::Route(destinations(rule, scope, problems))),
        "redirect" => action::redirect(rule, problems).map(HttpAction::Redirect),
        "directResponse" => action::direct_response(rule, problems).map(HttpAction::Respond),
        _ => {
            if scope.is_delegate {
                let message =
                    "is there in a VirtualService without hosts, wanted none: delegation has one level";
                problems.error(rule.at("delegate"), message);
            }
            action::delegate(rule, &scope.name.namespace, problems).map(HttpAction::Delegate)
        }
    }
}

fn destinations(
    rule: &mut Object<'_>,
    scope: &RuleScope<'_>,
    problems: &mut Problems,
) -> Vec<HttpDestination> {
    let mut read = Vec::new();
    for mut object in rule.objects("route", problems) {
        let destination = match object.object("destination", problems) {
            Some(mut inner) => {
                let read = super::destination(&mut inner, &scope.name.namespace, problems);
                inner.finish(problems);
                read
            }
            None => {
                if !object.has("destination") {
                    problems.error(object.at("destination"), "is missing");
                }
                None
            }
        };
        let weight = super::weight(&mut object, problems);
        let headers = action::headers(&mut object, problems).unwrap_or_default();
        object.finish(problems);
        read.extend(destination.map(|destination| HttpDestination { destination, weight, headers }));
    }
    let weights: Vec<u32> = read.iter().map(|destination| destination.weight).collect();
    super::check_weights(&rule.at("route"), &weights, problems);
    read
}

fn one_match(node: &Node<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Option<HttpMatch> {
    if node.value.is_null() {
        problems.error(node.path.as_str(), "is empty, wanted a match; one for every request is written {}");
        return None;
    }
    let mut object = node.object(problems)?;
    let mut text = |name: &'static str, problems: &mut Problems| {
        object.get(name).and_then(|node| parts::string_match(&node, Place::Plain, problems))
    };
    let uri = text("uri", problems);
    let scheme = text("scheme", problems);
    let method = text("method", problems);
    let authority = text("authority", problems);
    let headers = headers(&mut object, "headers", problems);
    let without_headers = self::headers(&mut object, "withoutHeaders", problems);
    let mut query = BTreeMap::new();
    for (key, node) in object.entries("queryParams", problems) {
        if let Some(value) = parts::string_match(&node, Place::Named, problems) {
            query.insert(key.into(), value);
        }
    }
    let ignore_uri_case = object.bool("ignoreUriCase", problems).unwrap_or_default();
    if ignore_uri_case && matches!(uri, Some(StringMatch::Regex(_))) {
        let message = "has no effect on a regular expression; (?i) at its beginning has";
        problems.warning(object.at("ignoreUriCase"), message);
    }
    let name = object.shared("name", problems);
    let ClientMatch { port, source_labels, source_namespace, gateways } =
        super::client(&mut object, scope, problems);
    if !gateways.is_empty() && (!source_labels.is_empty() || source_namespace.is_some()) {
        let message = "has sourceLabels or sourceNamespace beside gateways, which then have no effect";
        problems.warning(node.path.as_str(), message);
    }
    object.no_effect(
        &["statPrefix"],
        "is for statistics that the mesh does not keep; it has no effect",
        problems,
    );
    object.finish(problems);
    Some(HttpMatch {
        name,
        uri,
        ignore_uri_case,
        scheme,
        method,
        authority,
        headers,
        without_headers,
        query,
        port,
        source_labels,
        source_namespace,
        gateways,
    })
}

/// Names that stand for parts of a request and are ignored as headers (D3).
const NO_HEADERS: [&str; 4] = ["uri", "scheme", "method", "authority"];

fn headers(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> BTreeMap<Arc<str>, StringMatch> {
    let mut headers = BTreeMap::new();
    for (key, node) in object.entries(name, problems) {
        let lower = key.to_ascii_lowercase();
        if NO_HEADERS.contains(&key) {
            let message = format!("is no header; it has no effect here, only as {key} of the match itself");
            problems.warning(node.path, message);
        } else if key.starts_with("@request.auth.claims") {
            let message = "is a claim of a token, which only gateways look at; wanted the name of a header";
            problems.error(node.path, message);
        } else if !action::is_header_name(key.strip_prefix(':').unwrap_or(key)) {
            problems.error(node.path, format!("is for {key:?}, wanted the name of a header"));
        } else if let Some(value) = parts::string_match(&node, Place::Named, problems)
            && headers.insert(Arc::from(lower), value).is_some()
        {
            problems.error(node.path, "is there already, in other letters: names of headers have no case");
        }
    }
    headers
}

/// `prefixRewrite` replaces what a prefix has matched, so that every match must have one (S19).
fn prefix_rewrite_needs_prefixes(rule: &mut Object<'_>, read: &HttpRoute, problems: &mut Problems) {
    let HttpAction::Redirect(redirect) = &read.action else { return };
    if !matches!(redirect.path, Some(mesh_core::route::http::PathRewrite::MatchedPrefix(_))) {
        return;
    }
    let is_prefix = |one: &HttpMatch| matches!(one.uri, Some(StringMatch::Prefix(_)));
    if read.matches.is_empty() || !read.matches.iter().all(is_prefix) {
        let message = "is there though not every match has uri.prefix, wanted a prefix in each of them";
        problems.error(format!("{}.redirect.prefixRewrite", rule.path), message);
    }
}
