//! Which rule of several Gateway API routes is tried first (fact 16).
//!
//! Exact paths, then prefixes by their length, then the number of other conditions; of equals the oldest route's, then by namespace
//! and name, then by their place in it. Regular expressions come after every prefix except the one of all paths: there they would
//! never be reached.

use std::cmp::Reverse;

use mesh_core::route::matching::{HttpMatch, PathMatch, StringMatch};

/// Orders matches; the smallest is tried first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    path: PathRank,
    without_method: bool,
    headers: Reverse<usize>,
    query: Reverse<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathRank {
    /// Longer ones first only to be deterministic: of two exact paths at most one matches.
    Exact(Reverse<usize>),
    Prefix(Reverse<usize>),
    Regex(Reverse<usize>),
    Any,
}

impl Rank {
    /// The rank of a match.
    pub(super) fn of(one: &HttpMatch) -> Self {
        let path = match &one.path {
            None => PathRank::Any,
            Some(PathMatch::Segments(prefix)) if prefix.is_empty() => PathRank::Any,
            Some(PathMatch::Exact { path, .. }) => PathRank::Exact(Reverse(path.chars().count())),
            Some(PathMatch::Segments(prefix) | PathMatch::Prefix { prefix, .. }) => {
                PathRank::Prefix(Reverse(prefix.chars().count()))
            }
            Some(PathMatch::Regex(regex)) => PathRank::Regex(Reverse(regex.pattern().chars().count())),
        };
        Self {
            path,
            without_method: matches!(one.method, None | Some(StringMatch::Present)),
            headers: Reverse(one.headers.len()),
            query: Reverse(one.query.len()),
        }
    }
}
