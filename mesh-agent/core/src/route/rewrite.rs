//! What a request looks like when it leaves: new paths and authorities, and the `Location` of redirects.
//!
//! Invariant: a path that was changed begins with `/`, and is never longer than [`PATH_MAX`].

use std::{borrow::Cow, sync::Arc};

use crate::route::{
    host::Authority,
    http::{HeaderOps, HttpRule, PathRewrite, Redirect, RedirectPort, Rewrite, WeightedBackend},
    matching::PathMatch,
    request::RequestView,
    variables::{HeaderText, Template},
};

/// Longest path that a rewrite makes, in bytes; what is longer stays as it was. A pattern can blow up what it replaces.
pub const PATH_MAX: usize = 64 << 10;

impl PathRewrite {
    /// The new path. `matched` is what the path was matched by; without any it was the prefix `/`.
    pub fn apply<'p>(&self, path: &'p str, matched: Option<&PathMatch>) -> Cow<'p, str> {
        let new = match self {
            Self::Full(new) => rooted(new.to_string()),
            Self::MatchedPrefix(new) => match matched {
                Some(PathMatch::Exact { .. } | PathMatch::Regex(_)) => rooted(new.to_string()),
                Some(PathMatch::Segments(prefix)) => segments(path, prefix, new),
                Some(PathMatch::Prefix { prefix, .. }) => characters(path, prefix.len(), new),
                None => characters(path, 1, new),
            },
            Self::Regex { pattern, substitution } => {
                let Some(new) = substitute(path, pattern.regex(), substitution) else {
                    return Cow::Borrowed(path);
                };
                rooted(new)
            }
        };
        if new.len() > PATH_MAX { Cow::Borrowed(path) } else { Cow::Owned(new) }
    }
}

/// A path begins with `/`, whatever a resource says.
fn rooted(path: String) -> String {
    if path.starts_with('/') { path } else { format!("/{path}") }
}

/// The first `len` bytes become `new`.
fn characters(path: &str, len: usize, new: &str) -> String {
    rooted(format!("{new}{}", path.get(len..).unwrap_or_default()))
}

/// The first segments become `new`, without doubling or losing a slash (S118).
fn segments(path: &str, prefix: &str, new: &str) -> String {
    let rest = path.get(prefix.len()..).unwrap_or_default();
    let new = new.strip_suffix('/').unwrap_or(new);
    rooted(format!("{new}{rest}"))
}

/// Every place that the pattern is found at becomes `substitution`, where `\1` is a group and `\\` a backslash. `None` when there is none.
fn substitute(path: &str, pattern: &regex::Regex, substitution: &str) -> Option<String> {
    let mut new = String::with_capacity(path.len() + substitution.len());
    let mut end = 0;
    for found in pattern.captures_iter(path) {
        let whole = found.get_match();
        new.push_str(path.get(end..whole.start()).unwrap_or_default());
        end = whole.end();
        let mut pieces = substitution.chars();
        while let Some(piece) = pieces.next() {
            match piece {
                '\\' => match pieces.next() {
                    Some(digit) if digit.is_ascii_digit() => {
                        let group = digit.to_digit(10).unwrap_or_default() as usize;
                        new.push_str(found.get(group).map_or("", |group| group.as_str()));
                    }
                    Some(escaped) => new.push(escaped),
                    None => new.push('\\'),
                },
                literal => new.push(literal),
            }
        }
        if new.len() > PATH_MAX {
            return None;
        }
    }
    if end == 0 && new.is_empty() && !pattern.is_match(path) {
        return None;
    }
    new.push_str(path.get(end..).unwrap_or_default());
    Some(new)
}

impl Rewrite {
    /// The new path with the request's query; `None`: it stays as it is.
    pub fn path_and_query(&self, request: &RequestView<'_>, matched: Option<&PathMatch>) -> Option<String> {
        let path = match self.path.as_ref()?.apply(request.path, matched) {
            Cow::Borrowed(_) => return None,
            Cow::Owned(path) => path,
        };
        Some(with_query(path, request.query))
    }
}

/// A path that has a query of its own keeps that one.
fn with_query(mut path: String, query: Option<&str>) -> String {
    if let Some(query) = query
        && !path.contains('?')
    {
        path.push('?');
        path.push_str(query);
    }
    path
}

impl Redirect {
    /// `Location` of the answer. `port` is the port that the request came to, `matched` what its path was matched by.
    pub fn location(&self, request: &RequestView<'_>, matched: Option<&PathMatch>, port: u16) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme);
        let asked = Authority::parse(request.authority);
        let host = self.authority.as_deref().unwrap_or(asked.host);
        let (port, even_default) = match self.port {
            RedirectPort::OfScheme => (None, false),
            // Another authority brings its own. That of another scheme's host is kept, unless it is what the old scheme stands for.
            RedirectPort::OfHost if self.authority.is_some() => (None, false),
            RedirectPort::OfHost => {
                let stays =
                    |port: &u16| scheme == request.scheme || default_port(request.scheme) != Some(*port);
                (asked.port.filter(stays), true)
            }
            RedirectPort::OfRequest => (Some(port), false),
            RedirectPort::Number(port) => (Some(port), false),
        };
        let path = match &self.path {
            Some(path) => path.apply(request.path, matched),
            None => Cow::Borrowed(request.path),
        };
        let mut location = format!("{scheme}://{host}");
        if let Some(port) = port.filter(|port| even_default || default_port(scheme) != Some(*port)) {
            location.push_str(&format!(":{port}"));
        }
        location.push_str(&with_query(path.into_owned(), request.query));
        location
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// One change to headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderEdit<'a> {
    /// All headers of this name are replaced by one.
    Set(&'a str, &'a HeaderText),
    /// One more header of this name.
    Add(&'a str, &'a HeaderText),
    /// All headers of this name go.
    Remove(&'a str),
}

impl<'a> HeaderEdit<'a> {
    /// What the header's value is made by, if that takes more than copying it.
    pub fn template(self) -> Option<&'a Template> {
        match self {
            Self::Set(_, text) | Self::Add(_, text) => text.template(),
            Self::Remove(_) => None,
        }
    }
}

impl HeaderOps {
    /// The changes in the order in which they are made: remove, set, add. What is taken away and set is set, as Envoy has it.
    pub fn edits(&self) -> impl Iterator<Item = HeaderEdit<'_>> {
        let remove = self.remove.iter().map(|name| HeaderEdit::Remove(name));
        let set = self.set.iter().map(|(name, value)| HeaderEdit::Set(name, value));
        let add = self.add.iter().map(|(name, value)| HeaderEdit::Add(name, value));
        remove.chain(set).chain(add)
    }
}

impl HttpRule {
    /// Changes to the request's headers: the rule's, then those of the backend.
    pub fn request_edits<'a>(&'a self, backend: &'a WeightedBackend) -> impl Iterator<Item = HeaderEdit<'a>> {
        self.request_headers.edits().chain(backend.request_headers.edits())
    }

    /// Changes to the response's headers: those of the backend, if the rule has any, then the rule's.
    pub fn response_edits<'a>(
        &'a self,
        backend: Option<&'a WeightedBackend>,
    ) -> impl Iterator<Item = HeaderEdit<'a>> {
        let of_backend = backend.into_iter().flat_map(|backend| backend.response_headers.edits());
        of_backend.chain(self.response_headers.edits())
    }

    /// The authority that the request leaves with, if it is another one: of the rewrite, else of the rule's headers, else of the backend's
    /// (S18).
    pub fn new_authority<'a>(&'a self, backend: &'a WeightedBackend) -> Option<&'a Arc<str>> {
        let Rewrite { authority, .. } = &self.rewrite;
        authority
            .as_ref()
            .or(self.request_headers.authority.as_ref())
            .or(backend.request_headers.authority.as_ref())
    }
}

#[cfg(test)]
mod tests;
