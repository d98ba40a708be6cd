//! Which rule a request or connection gets.
//!
//! Invariants:
//! - The first rule that matches is the one, in a rule the first match; their order was settled by the compiler.
//! - Nothing here allocates, except for a header that is matched and stands in the request several times.

use std::{fmt, net::IpAddr};

use crate::route::{
    http::{Action, HttpRule, HttpTable, WeightedBackend},
    matching::{HeaderMatch, HttpMatch, PathMatch, QueryMatch, StringMatch},
    request::{ClientView, RequestView},
    stream::{StreamMatch, StreamRule, StreamTable},
};

/// The rule that a request gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteHit<'t> {
    /// Place of the rule in its table.
    pub rule_index: usize,
    /// The rule.
    pub rule: &'t HttpRule,
    /// Place of the match in its rule; `None` for a rule without any.
    pub match_index: Option<usize>,
    /// The match.
    pub matched: Option<&'t HttpMatch>,
}

impl<'t> RouteHit<'t> {
    /// What the path was matched by; `None` is any path.
    pub fn path_match(&self) -> Option<&'t PathMatch> {
        self.matched.and_then(|matched| matched.path.as_ref())
    }

    /// The route's name in logs: that of the rule, then that of the match (S15); empty when neither has one.
    pub fn name(&self) -> RouteName<'t> {
        RouteName {
            rule: self.rule.name.as_deref(),
            matched: self.matched.and_then(|matched| matched.name.as_deref()),
        }
    }
}

/// Name of a route in logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteName<'t> {
    rule: Option<&'t str>,
    matched: Option<&'t str>,
}

impl fmt::Display for RouteName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rule, self.matched) {
            (Some(rule), Some(matched)) => write!(f, "{rule}.{matched}"),
            (Some(name), None) | (None, Some(name)) => f.write_str(name),
            (None, None) => Ok(()),
        }
    }
}

impl HttpTable {
    /// The first rule that matches; `None`: [`HttpTable::unmatched`] is what is done.
    pub fn route(&self, request: &RequestView<'_>, client: &ClientView<'_>) -> Option<RouteHit<'_>> {
        self.rules.iter().enumerate().find_map(|(rule_index, rule)| {
            if rule.matches.is_empty() {
                return Some(RouteHit { rule_index, rule, match_index: None, matched: None });
            }
            let found = rule.matches.iter().enumerate().find(|(_, m)| m.holds(request, client));
            found.map(|(index, matched)| RouteHit {
                rule_index,
                rule,
                match_index: Some(index),
                matched: Some(matched),
            })
        })
    }

    /// Whether some rule may be for requests of a client. Who is asked for is no matter of the request: what has no rule for a client is
    /// to that one as if it were not there.
    pub fn concerns(&self, client: &ClientView<'_>) -> bool {
        let is_meant = |one: &HttpMatch| client.is_meant(one.source_namespace.as_ref(), &one.source_labels);
        self.rules.is_empty()
            || self.rules.iter().any(|rule| rule.matches.is_empty() || rule.matches.iter().any(is_meant))
    }

    /// What is done with a request: by its rule, or by none.
    pub fn action<'t>(&'t self, hit: Option<&RouteHit<'t>>) -> &'t Action {
        hit.map_or(&self.unmatched, |hit| &hit.rule.action)
    }
}

impl HttpMatch {
    /// Whether all conditions hold.
    pub fn holds(&self, request: &RequestView<'_>, client: &ClientView<'_>) -> bool {
        let text = |pattern: &Option<StringMatch>, text: &str| {
            pattern.as_ref().is_none_or(|pattern| pattern.matches(text.as_bytes()))
        };
        self.path.as_ref().is_none_or(|path| path.matches(request.path))
            && text(&self.method, request.method)
            && text(&self.scheme, request.scheme)
            && text(&self.authority, request.authority)
            && self.headers.iter().all(|header| header.holds(request))
            && self.query.iter().all(|parameter| parameter.holds(request))
            && client.is_meant(self.source_namespace.as_ref(), &self.source_labels)
    }
}

impl StringMatch {
    /// Whether a text that is there is meant. A pattern is never found in bytes that are no UTF-8.
    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Present => true,
            Self::Exact(exact) => exact.as_bytes() == text,
            Self::Prefix(prefix) => text.starts_with(prefix.as_bytes()),
            Self::Regex(regex) => std::str::from_utf8(text).is_ok_and(|text| regex.is_match(text)),
        }
    }
}

impl PathMatch {
    /// Whether a path without query is meant.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact { path: exact, ignore_case: false } => **exact == *path,
            Self::Exact { path: exact, ignore_case: true } => exact.eq_ignore_ascii_case(path),
            Self::Prefix { prefix, ignore_case: false } => path.starts_with(&**prefix),
            Self::Prefix { prefix, ignore_case: true } => path
                .as_bytes()
                .get(..prefix.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes())),
            Self::Segments(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

impl HeaderMatch {
    fn holds(&self, request: &RequestView<'_>) -> bool {
        let value = request.header(&self.name);
        match (&self.value, self.inverted) {
            (StringMatch::Present, inverted) => value.is_some() != inverted,
            (pattern, false) => value.is_some_and(|value| pattern.matches(&value)),
            (pattern, true) => !pattern.matches(value.as_deref().unwrap_or_default()),
        }
    }
}

impl QueryMatch {
    fn holds(&self, request: &RequestView<'_>) -> bool {
        request.query_parameter(&self.name).is_some_and(|value| self.value.matches(value.as_bytes()))
    }
}

/// A connection as TLS and TCP rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamView<'a> {
    /// It begins with a TLS handshake.
    pub tls: bool,
    /// Its server name, if it says one.
    pub sni: Option<&'a str>,
    /// The address that was dialled.
    pub dialled: IpAddr,
}

impl StreamTable {
    /// The first rule that matches; for TLS those of `tls` come before those of `tcp`.
    pub fn route(&self, stream: &StreamView<'_>, client: &ClientView<'_>) -> Option<&StreamRule> {
        let tls = if stream.tls { self.tls.as_slice() } else { &[] };
        tls.iter()
            .chain(&self.tcp)
            .find(|rule| rule.matches.is_empty() || rule.matches.iter().any(|m| m.holds(stream, client)))
    }

    /// Whether the first bytes of a connection must be seen before it can be routed.
    pub fn needs_sni(&self) -> bool {
        !self.tls.is_empty()
    }
}

impl StreamMatch {
    /// Whether all conditions hold.
    pub fn holds(&self, stream: &StreamView<'_>, client: &ClientView<'_>) -> bool {
        let dialled = stream.dialled.to_canonical();
        (self.sni.is_empty() || stream.sni.is_some_and(|sni| self.sni.iter().any(|own| sni_is(own, sni))))
            && (self.subnets.is_empty() || self.subnets.iter().any(|subnet| subnet.contains(&dialled)))
            && client.is_meant(self.source_namespace.as_ref(), &self.source_labels)
    }
}

/// Whether a server name is meant; a wildcard covers every name that ends like it (fact 15).
fn sni_is(pattern: &str, sni: &str) -> bool {
    let sni = sni.strip_suffix('.').unwrap_or(sni);
    match pattern.strip_prefix('*') {
        None => pattern.eq_ignore_ascii_case(sni),
        Some(suffix) => sni
            .len()
            .checked_sub(suffix.len())
            .and_then(|start| sni.as_bytes().get(start..))
            .is_some_and(|end| end.eq_ignore_ascii_case(suffix.as_bytes())),
    }
}

/// One of several backends by weight; `None` only if there is none. `draw` is one random word.
pub fn split(backends: &[WeightedBackend], draw: u64) -> Option<&WeightedBackend> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    // One destination gets everything, whatever its weight is (S17).
    if total == 0 {
        return backends.first();
    }
    let mut left = crate::balance::below(draw, total);
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let is_hit = left < weight;
        left = left.saturating_sub(weight);
        is_hit
    })
}

#[cfg(test)]
mod tests;
