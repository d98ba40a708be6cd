//! What requests must look like to be matched by a rule: paths, methods, headers, query parameters.

use std::sync::Arc;

use mesh_core::route::matching::{FullRegex, HeaderMatch, HttpMatch, PathMatch, QueryMatch, StringMatch};

use super::{references::at_most, wire};
use crate::problem::Problems;

/// Most matches of a rule, and of a route.
pub(super) const MATCHES_MAX: usize = 64;
const ROUTE_MATCHES_MAX: usize = 128;
/// More matches than a route may have in all of its rules.
pub(super) fn at_most_together(counts: impl Iterator<Item = usize>, problems: &mut Problems) {
    let matches: usize = counts.sum();
    if matches > ROUTE_MATCHES_MAX {
        let message = format!("have {matches} matches, wanted at most {ROUTE_MATCHES_MAX} together");
        problems.error("spec.rules", message);
    }
}

/// Most conditions on headers, and on query parameters.
const CONDITIONS_MAX: usize = 16;
/// Longest path, longest value of a header and of a query parameter.
const PATH_BYTES_MAX: usize = 1024;
const HEADER_BYTES_MAX: usize = 4096;
const QUERY_BYTES_MAX: usize = 1024;
/// Longest name of a header.
const NAME_BYTES_MAX: usize = 256;
/// Methods that a match can name.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Each of `matches` of an HTTPRoute; never none: a rule without is one for every path.
pub(super) fn http(
    matches: Option<&Vec<wire::HttpMatch>>,
    field: &str,
    problems: &mut Problems,
) -> Vec<HttpMatch> {
    let matches = matches.map(Vec::as_slice).unwrap_or_default();
    let field = format!("{field}.matches");
    at_most(matches.len(), MATCHES_MAX, &field, problems);
    let mut read: Vec<HttpMatch> = Vec::with_capacity(matches.len().max(1));
    for (at, one) in matches.iter().enumerate() {
        let field = format!("{field}[{at}]");
        read.push(HttpMatch {
            path: path(one.path.as_ref(), &format!("{field}.path"), problems),
            method: method(one.method.as_deref(), &format!("{field}.method"), problems),
            headers: headers(one.headers.as_ref(), &format!("{field}.headers"), problems),
            query: query(one.query_params.as_ref(), &format!("{field}.queryParams"), problems),
            ..HttpMatch::default()
        });
    }
    if read.is_empty() {
        read.push(HttpMatch { path: Some(any_path()), ..HttpMatch::default() });
    }
    read
}

fn any_path() -> PathMatch {
    PathMatch::Segments("".into())
}

fn path(path: Option<&wire::PathMatch>, field: &str, problems: &mut Problems) -> Option<PathMatch> {
    let Some(path) = path else { return Some(any_path()) };
    let value = path.value.as_deref().unwrap_or("/");
    let at_value = format!("{field}.value");
    if value.len() > PATH_BYTES_MAX {
        problems.error(at_value, format!("has {} bytes, wanted at most {PATH_BYTES_MAX}", value.len()));
        return None;
    }
    match path.r#type.as_deref() {
        Some("Exact") => {
            let fit = is_path(value, &at_value, problems);
            fit.then(|| PathMatch::Exact { path: value.into(), ignore_case: false })
        }
        None | Some("PathPrefix") => {
            let fit = is_path(value, &at_value, problems);
            fit.then(|| PathMatch::Segments(value.strip_suffix('/').unwrap_or(value).into()))
        }
        Some("RegularExpression") => regex(value, &at_value, problems).map(PathMatch::Regex),
        Some(other) => {
            let wanted = "wanted Exact, PathPrefix or RegularExpression";
            problems.error(format!("{field}.type"), format!("is {other:?}, {wanted}"));
            None
        }
    }
}

/// Whether a path is absolute and normalised: another would never be asked for.
fn is_path(path: &str, field: &str, problems: &mut Problems) -> bool {
    if !path.starts_with('/') {
        problems.error(field, format!("is {path:?}, wanted a path that begins with '/'"));
        return false;
    }
    for part in ["//", "/./", "/../", "%2f", "%2F", "#"] {
        if path.contains(part) {
            problems.error(field, format!("is {path:?}, wanted a path without {part:?}"));
            return false;
        }
    }
    for end in ["/..", "/."] {
        if path.ends_with(end) {
            problems.error(field, format!("is {path:?}, wanted a path that does not end with {end:?}"));
            return false;
        }
    }
    if !is_path_text(path) {
        let wanted = "wanted letters, digits, -._~!$&'()*+,;=:@/ and %XX with two hexadecimal digits";
        problems.error(field, format!("is {path:?}, {wanted}"));
        return false;
    }
    true
}

fn is_path_text(path: &str) -> bool {
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'%', [high, low, tail @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => tail,
            (byte, tail) if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(byte) => tail,
            _ => return false,
        };
    }
    true
}

/// A regular expression.
pub(super) fn regex(pattern: &str, field: &str, problems: &mut Problems) -> Option<FullRegex> {
    match FullRegex::new(pattern) {
        Ok(regex) => Some(regex),
        Err(error) => {
            // The message ends with the cause, after the pattern drawn over several lines.
            let text = error.to_string();
            let cause = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            problems.error(field, format!("is {pattern:?}, wanted a regular expression: {cause}"));
            None
        }
    }
}

fn method(method: Option<&str>, field: &str, problems: &mut Problems) -> Option<StringMatch> {
    let method = method?;
    if !METHODS.contains(&method) {
        let wanted = METHODS.join(", ");
        problems.error(field, format!("is {method:?}, wanted one of {wanted}"));
        return None;
    }
    Some(StringMatch::Exact(method.into()))
}

/// Conditions on headers. Of several for one header the first counts.
pub(super) fn headers(
    conditions: Option<&Vec<wire::NameMatch>>,
    field: &str,
    problems: &mut Problems,
) -> Vec<HeaderMatch> {
    let named = named(conditions, HEADER_BYTES_MAX, true, field, problems);
    named.into_iter().map(|(name, value)| HeaderMatch { name, value, inverted: false }).collect()
}

fn query(conditions: Option<&Vec<wire::NameMatch>>, field: &str, problems: &mut Problems) -> Vec<QueryMatch> {
    let named = named(conditions, QUERY_BYTES_MAX, false, field, problems);
    named.into_iter().map(|(name, value)| QueryMatch { name, value }).collect()
}

fn named(
    conditions: Option<&Vec<wire::NameMatch>>,
    value_max: usize,
    is_header: bool,
    field: &str,
    problems: &mut Problems,
) -> Vec<(Arc<str>, StringMatch)> {
    let conditions = conditions.map(Vec::as_slice).unwrap_or_default();
    at_most(conditions.len(), CONDITIONS_MAX, field, problems);
    let mut read: Vec<(Arc<str>, StringMatch)> = Vec::with_capacity(conditions.len());
    let mut written: Vec<&str> = Vec::with_capacity(conditions.len());
    for (at, condition) in conditions.iter().enumerate() {
        let field = format!("{field}[{at}]");
        let Some(name) = header_name(condition.name.as_deref(), &format!("{field}.name"), problems) else {
            continue;
        };
        let key: Arc<str> = if is_header { name.to_ascii_lowercase().into() } else { name.into() };
        let at_value = format!("{field}.value");
        let value = match condition.value.as_deref() {
            None | Some("") => {
                problems.error(at_value, "is missing or empty, wanted a value");
                continue;
            }
            Some(value) if value.len() > value_max => {
                problems.error(at_value, format!("has {} bytes, wanted at most {value_max}", value.len()));
                continue;
            }
            Some(value) => value,
        };
        let value = match condition.r#type.as_deref() {
            None | Some("Exact") => StringMatch::Exact(value.into()),
            Some("RegularExpression") => match regex(value, &at_value, problems) {
                Some(regex) => StringMatch::Regex(regex),
                None => continue,
            },
            Some(other) => {
                let message = format!("is {other:?}, wanted Exact or RegularExpression");
                problems.error(format!("{field}.type"), message);
                continue;
            }
        };
        if written.contains(&name) {
            problems.error(format!("{field}.name"), format!("is {name:?}, which has a condition already"));
        } else if read.iter().any(|(known, _)| *known == key) {
            let message = format!("is {name:?}, which has a condition already; only the first counts");
            problems.warning(format!("{field}.name"), message);
        } else {
            read.push((key, value));
        }
        written.push(name);
    }
    read
}

/// A name of a header (a token of RFC 9110) or, by the same rule, of a query parameter.
pub(super) fn header_name<'a>(
    name: Option<&'a str>,
    field: &str,
    problems: &mut Problems,
) -> Option<&'a str> {
    let name = name.unwrap_or_default();
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(is_token) {
        let wanted = "wanted letters, digits and !#$%&'*+-.^_`|~, at most 256";
        problems.error(field, format!("is {name:?}, {wanted}"));
        return None;
    }
    Some(name)
}
