//! Filters of rules and of backends: what is done to requests and responses beside routing.

use std::{sync::Arc, time::Duration};

use mesh_core::route::{
    http::{Cors, HeaderOps, Millionths, PathRewrite, Redirect, RedirectPort, Rewrite},
    matching::{FullRegex, HttpMatch, PathMatch, StringMatch},
    variables::HeaderText,
};
use serde_json::Value;

use super::{
    RouteMirror, UnsupportedFilter,
    matches::header_name,
    references::{self, at_most, is_hostname},
    wire,
};
use crate::problem::Problems;

/// Most filters of a rule or backend; most headers of each list of a modifier.
const FILTERS_MAX: usize = 16;
const HEADERS_MAX: usize = 16;
/// Longest value of a header, and longest replacement of a path.
const VALUE_BYTES_MAX: usize = 4096;
const PATH_BYTES_MAX: usize = 1024;
/// Most items of each list of CORS, and of its methods.
const CORS_MAX: usize = 64;
const CORS_METHODS_MAX: usize = 9;
/// `maxAge` of CORS unless given, in seconds.
const CORS_AGE_S: i64 = 5;

/// Where filters stand: not every one is allowed, or implemented, everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a rule of an HTTPRoute.
    HttpRule,
    /// In a backend of an HTTPRoute.
    HttpBackend,
    /// In a rule of a GRPCRoute.
    GrpcRule,
    /// In a backend of a GRPCRoute.
    GrpcBackend,
}

/// What a list of filters comes to.
#[derive(Clone, Debug, Default)]
pub(super) struct Filters {
    pub(super) request_headers: HeaderOps,
    pub(super) response_headers: HeaderOps,
    pub(super) redirect: Option<Redirect>,
    pub(super) rewrite: Rewrite,
    pub(super) mirrors: Vec<RouteMirror>,
    pub(super) cors: Option<Cors>,
    /// A filter the mesh does not have here: what it applies to is answered with 500.
    pub(super) unsupported: Option<UnsupportedFilter>,
}

/// Types of filters, with the field that each has for itself.
pub(crate) const TYPES: [(&str, &str); 8] = [
    ("RequestHeaderModifier", "requestHeaderModifier"),
    ("ResponseHeaderModifier", "responseHeaderModifier"),
    ("RequestMirror", "requestMirror"),
    ("RequestRedirect", "requestRedirect"),
    ("URLRewrite", "urlRewrite"),
    ("CORS", "cors"),
    ("ExternalAuth", "externalAuth"),
    ("ExtensionRef", "extensionRef"),
];

impl Place {
    /// The types that may stand there.
    fn types(self) -> Vec<&'static str> {
        let is_allowed = |kind: &&str| match self {
            Self::HttpRule | Self::HttpBackend => true,
            Self::GrpcRule | Self::GrpcBackend => matches!(
                *kind,
                "RequestHeaderModifier" | "ResponseHeaderModifier" | "RequestMirror" | "ExtensionRef"
            ),
        };
        TYPES.iter().map(|(kind, _)| *kind).filter(is_allowed).collect()
    }

    /// Whether the mesh does it.
    fn has(self, kind: &str) -> bool {
        match kind {
            "RequestHeaderModifier" | "ResponseHeaderModifier" => true,
            "RequestMirror" | "RequestRedirect" | "URLRewrite" | "CORS" => {
                matches!(self, Self::HttpRule | Self::GrpcRule)
            }
            _ => false,
        }
    }
}

/// Reads filters. `matches` are the rule's: replacing a matched prefix wants exactly one.
pub(super) fn read(
    filters: Option<&Vec<wire::Filter>>,
    place: Place,
    matches: &[HttpMatch],
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Filters {
    let filters = filters.map(Vec::as_slice).unwrap_or_default();
    let list = format!("{field}.filters");
    at_most(filters.len(), FILTERS_MAX, &list, problems);
    let types = place.types();
    let mut read = Filters::default();
    let mut seen: Vec<&str> = Vec::new();
    for (at, filter) in filters.iter().enumerate() {
        let field = format!("{list}[{at}]");
        let kind = filter.r#type.as_deref().unwrap_or_default();
        if !types.contains(&kind) {
            let wanted = types.join(", ");
            problems.error(format!("{field}.type"), format!("is {kind:?}, wanted one of {wanted}"));
            continue;
        }
        if !has_its_own_field(filter, kind, &field, problems) {
            continue;
        }
        let repeatable = matches!(kind, "RequestMirror" | "ExtensionRef" | "ExternalAuth");
        if seen.contains(&kind) && !repeatable {
            problems.error(format!("{field}.type"), format!("is {kind} once more, wanted at most one"));
        }
        seen.push(kind);
        if !place.has(kind) {
            let message = format!(
                "is {kind}, which the mesh does not have here; what it applies to is answered with 500"
            );
            problems.warning(format!("{field}.type"), message);
            let unsupported = read
                .unsupported
                .get_or_insert_with(|| UnsupportedFilter { kind: kind.into(), extension: None });
            if let Some(extension) = filter.extension_ref.as_ref().filter(|_| unsupported.extension.is_none())
            {
                let text = |field: &str| extension.get(field).and_then(Value::as_str).unwrap_or_default();
                unsupported.extension = Some(format!("{}/{}", text("group"), text("kind")).into());
            }
        }
        read.add(filter, place, matches, namespace, &field, problems);
    }
    if seen.contains(&"RequestRedirect") && seen.contains(&"URLRewrite") {
        problems.error(list, "has both RequestRedirect and URLRewrite, wanted at most one of them");
    }
    read
}

impl Filters {
    /// Reads one filter whose type is known; what is not done where it stands is checked and dropped.
    fn add(
        &mut self,
        filter: &wire::Filter,
        place: Place,
        matches: &[HttpMatch],
        namespace: &str,
        field: &str,
        problems: &mut Problems,
    ) {
        if let Some(modifier) = &filter.request_header_modifier {
            self.request_headers = header_ops(modifier, &format!("{field}.requestHeaderModifier"), problems);
        }
        if let Some(modifier) = &filter.response_header_modifier {
            self.response_headers =
                header_ops(modifier, &format!("{field}.responseHeaderModifier"), problems);
        }
        if let Some(mirror) = &filter.request_mirror {
            let mirror = self::mirror(mirror, namespace, &format!("{field}.requestMirror"), problems);
            self.mirrors.extend(mirror.filter(|_| place.has("RequestMirror")));
        }
        if let Some(redirect) = &filter.request_redirect {
            let field = format!("{field}.requestRedirect");
            let redirect = self::redirect(redirect, matches, &field, problems);
            self.redirect = redirect.filter(|_| place.has("RequestRedirect"));
        }
        if let Some(rewrite) = &filter.url_rewrite {
            let field = format!("{field}.urlRewrite");
            let rewrite = Rewrite {
                authority: hostname(rewrite.hostname.as_deref(), &format!("{field}.hostname"), problems),
                path: rewrite
                    .path
                    .as_ref()
                    .and_then(|path| path_rewrite(path, matches, &format!("{field}.path"), problems)),
            };
            if place.has("URLRewrite") {
                self.rewrite = rewrite;
            }
        }
        if let Some(cors) = &filter.cors {
            let cors = self::cors(cors, &format!("{field}.cors"), problems);
            self.cors = place.has("CORS").then_some(cors);
        }
    }
}

/// Whether the field that belongs to the type is there, and no other.
fn has_its_own_field(filter: &wire::Filter, kind: &str, field: &str, problems: &mut Problems) -> bool {
    let given = [
        filter.request_header_modifier.is_some(),
        filter.response_header_modifier.is_some(),
        filter.request_mirror.is_some(),
        filter.request_redirect.is_some(),
        filter.url_rewrite.is_some(),
        filter.cors.is_some(),
        filter.external_auth.is_some(),
        filter.extension_ref.is_some(),
    ];
    let mut good = true;
    for ((of_type, name), given) in TYPES.iter().zip(given) {
        let at = || format!("{field}.{name}");
        if *of_type == kind && !given {
            problems.error(at(), format!("is missing, wanted with type {kind}"));
            good = false;
        } else if *of_type != kind && given {
            problems.error(at(), format!("is there with type {kind}, wanted only with type {of_type}"));
            good = false;
        }
    }
    good
}

fn header_ops(modifier: &wire::HeaderModifier, field: &str, problems: &mut Problems) -> HeaderOps {
    let mut ops = HeaderOps::default();
    for (list, values) in [("set", &modifier.set), ("add", &modifier.add)] {
        let values = values.as_deref().unwrap_or_default();
        let field = format!("{field}.{list}");
        at_most(values.len(), HEADERS_MAX, &field, problems);
        let mut read: Vec<(Arc<str>, HeaderText)> = Vec::with_capacity(values.len());
        for (at, header) in values.iter().enumerate() {
            let field = format!("{field}[{at}]");
            let at_value = format!("{field}.value");
            let value = match header.value.as_deref() {
                None | Some("") => {
                    problems.error(at_value, "is missing or empty, wanted a value");
                    continue;
                }
                Some(value) if value.len() > VALUE_BYTES_MAX => {
                    let message = format!("has {} bytes, wanted at most {VALUE_BYTES_MAX}", value.len());
                    problems.error(at_value, message);
                    continue;
                }
                Some(value) if value.bytes().any(|b| b.is_ascii_control() && b != b'\t') => {
                    problems.error(at_value, format!("is {value:?}, wanted text without control characters"));
                    continue;
                }
                Some(value) => value,
            };
            let at_name = format!("{field}.name");
            let Some(name) = header_name(header.name.as_deref(), &at_name, problems) else { continue };
            let key: Arc<str> = name.to_ascii_lowercase().into();
            if read.iter().any(|(known, _)| *known == key) {
                let exact = values[..at].iter().any(|other| other.name.as_deref() == Some(name));
                let message = format!("is {name:?}, which is in the list already; only the first counts");
                if exact { problems.error(at_name, message) } else { problems.warning(at_name, message) }
            } else if &*key == "host" {
                // As in VirtualServices (S18): `host` is no header among others, it is where the request goes.
                ops.authority.get_or_insert_with(|| value.into());
            } else {
                // The Gateway API has no variables: a value is what it says.
                read.push((key, value.into()));
            }
        }
        read.sort_by(|(one, _), (other, _)| one.cmp(other));
        if list == "set" { ops.set = read } else { ops.add = read }
    }
    let remove = modifier.remove.as_deref().unwrap_or_default();
    let field = format!("{field}.remove");
    at_most(remove.len(), HEADERS_MAX, &field, problems);
    for (at, name) in remove.iter().enumerate() {
        let field = format!("{field}[{at}]");
        let Some(name) = header_name(Some(name), &field, problems) else { continue };
        let key: Arc<str> = name.to_ascii_lowercase().into();
        if &*key == "host" {
            problems.warning(field, "is \"host\", which every request has; it has no effect");
        } else if !ops.remove.contains(&key) {
            ops.remove.push(key);
        }
    }
    ops
}

fn mirror(
    mirror: &wire::RequestMirror,
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Option<RouteMirror> {
    if mirror.percent.is_some() && mirror.fraction.is_some() {
        problems.error(format!("{field}.fraction"), "is there beside percent, wanted at most one of them");
    }
    let mut share = Millionths::ALL;
    if let Some(percent) = mirror.percent {
        match u32::try_from(percent) {
            Ok(percent @ 0..=100) => share = Millionths(percent * 10_000),
            _ => problems
                .error(format!("{field}.percent"), format!("is {percent}, wanted a number from 0 to 100")),
        }
    }
    if let Some(fraction) = &mirror.fraction {
        let denominator = fraction.denominator.unwrap_or(100);
        match (fraction.numerator, u64::try_from(denominator)) {
            (None, _) => problems.error(format!("{field}.fraction.numerator"), "is missing"),
            (_, Err(_) | Ok(0)) => {
                let message = format!("is {denominator}, wanted a number of at least 1");
                problems.error(format!("{field}.fraction.denominator"), message);
            }
            (Some(numerator), Ok(denominator)) => match u64::try_from(numerator) {
                Ok(part) if part <= denominator => {
                    let millionths = u128::from(part) * 1_000_000 / u128::from(denominator);
                    share = Millionths(u32::try_from(millionths).unwrap_or(1_000_000));
                }
                _ => {
                    let message =
                        format!("is {numerator}, wanted a number from 0 to the denominator, {denominator}");
                    problems.error(format!("{field}.fraction.numerator"), message);
                }
            },
        }
    }
    let field = format!("{field}.backendRef");
    let Some(reference) = &mirror.backend_ref else {
        problems.error(field, "is missing");
        return None;
    };
    Some(RouteMirror { backend: references::object_ref(reference, namespace, &field, problems)?, share })
}

fn redirect(
    redirect: &wire::RequestRedirect,
    matches: &[HttpMatch],
    field: &str,
    problems: &mut Problems,
) -> Option<Redirect> {
    let scheme = match redirect.scheme.as_deref() {
        None => None,
        Some(scheme @ ("http" | "https")) => Some(scheme),
        Some(other) => {
            problems.error(format!("{field}.scheme"), format!("is {other:?}, wanted http or https"));
            None
        }
    };
    let status = match redirect.status_code {
        None => 302,
        Some(status @ (301 | 302 | 303 | 307 | 308)) => u16::try_from(status).unwrap_or(302),
        Some(other) => {
            let message = format!("is {other}, wanted 301, 302, 303, 307 or 308");
            problems.error(format!("{field}.statusCode"), message);
            return None;
        }
    };
    let port = match redirect.port {
        Some(port) => RedirectPort::Number(references::port(port, &format!("{field}.port"), problems)?),
        None if scheme.is_some() => RedirectPort::OfScheme,
        None => RedirectPort::OfRequest,
    };
    Some(Redirect {
        status,
        scheme: scheme.map(Into::into),
        authority: hostname(redirect.hostname.as_deref(), &format!("{field}.hostname"), problems),
        port,
        path: redirect
            .path
            .as_ref()
            .and_then(|path| path_rewrite(path, matches, &format!("{field}.path"), problems)),
    })
}

fn hostname(name: Option<&str>, field: &str, problems: &mut Problems) -> Option<Arc<str>> {
    let name = name?;
    if !is_hostname(name) {
        let wanted = "wanted a host name in lower case, no wildcard and no address";
        problems.error(field, format!("is {name:?}, {wanted}"));
        return None;
    }
    Some(name.into())
}

fn path_rewrite(
    path: &wire::PathModifier,
    matches: &[HttpMatch],
    field: &str,
    problems: &mut Problems,
) -> Option<PathRewrite> {
    let (name, value, other, foreign) = match path.r#type.as_deref() {
        Some("ReplaceFullPath") => (
            "replaceFullPath",
            &path.replace_full_path,
            "replacePrefixMatch",
            path.replace_prefix_match.is_some(),
        ),
        Some("ReplacePrefixMatch") => (
            "replacePrefixMatch",
            &path.replace_prefix_match,
            "replaceFullPath",
            path.replace_full_path.is_some(),
        ),
        found => {
            let found = found.unwrap_or_default();
            let wanted = "wanted ReplaceFullPath or ReplacePrefixMatch";
            problems.error(format!("{field}.type"), format!("is {found:?}, {wanted}"));
            return None;
        }
    };
    if foreign {
        problems.error(
            format!("{field}.{other}"),
            format!("is there beside type {:?}", path.r#type.as_deref().unwrap_or_default()),
        );
    }
    let at = format!("{field}.{name}");
    let Some(value) = value.as_deref() else {
        problems.error(at, "is missing");
        return None;
    };
    if value.len() > PATH_BYTES_MAX {
        problems.error(at, format!("has {} bytes, wanted at most {PATH_BYTES_MAX}", value.len()));
        return None;
    }
    if value.bytes().any(|b| b.is_ascii_control() || matches!(b, b' ' | b'?' | b'#')) {
        problems.error(at, format!("is {value:?}, wanted a path without query, fragment and spaces"));
        return None;
    }
    if name == "replaceFullPath" {
        // A path on the wire begins with a slash whatever was written.
        let path = if value.starts_with('/') { value.into() } else { format!("/{value}").into() };
        return Some(PathRewrite::Full(path));
    }
    let by_prefix = matches!(matches, [HttpMatch { path: Some(PathMatch::Segments(_)), .. }]);
    if !by_prefix {
        problems.error(at, "is there, wanted only in a rule with exactly one match, by PathPrefix");
        return None;
    }
    Some(PathRewrite::MatchedPrefix(value.into()))
}

fn cors(cors: &wire::Cors, field: &str, problems: &mut Problems) -> Cors {
    let mut tokens = |name: &str, list: &Option<Vec<String>>, max: usize| -> Vec<Arc<str>> {
        let list = list.as_deref().unwrap_or_default();
        let field = format!("{field}.{name}");
        at_most(list.len(), max, &field, problems);
        if list.len() > 1 && list.iter().any(|item| item == "*") {
            problems.error(field.as_str(), "has \"*\" beside others, wanted it alone");
        }
        let mut read: Vec<Arc<str>> = Vec::with_capacity(list.len());
        for (at, item) in list.iter().enumerate() {
            if let Some(item) = header_name(Some(item), &format!("{field}[{at}]"), problems) {
                read.push(item.into());
            }
        }
        read
    };
    let methods = tokens("allowMethods", &cors.allow_methods, CORS_METHODS_MAX);
    let headers = tokens("allowHeaders", &cors.allow_headers, CORS_MAX);
    let expose = tokens("exposeHeaders", &cors.expose_headers, CORS_MAX);
    let age = match cors.max_age {
        None => CORS_AGE_S,
        Some(age @ 1..) => age,
        Some(age) => {
            problems.error(format!("{field}.maxAge"), format!("is {age}, wanted a number of at least 1"));
            CORS_AGE_S
        }
    };
    Cors {
        origins: origins(cors.allow_origins.as_deref().unwrap_or_default(), field, problems),
        methods,
        headers,
        expose,
        max_age: Some(Duration::from_secs(age.unsigned_abs())),
        credentials: cors.allow_credentials,
        answer_unmatched_preflights: true,
    }
}

/// Origins: `*`, `scheme://host[:port]`, or with a wildcard for the host's first labels. Without a port the scheme's is meant, which
/// browsers leave out.
fn origins(list: &[String], field: &str, problems: &mut Problems) -> Vec<StringMatch> {
    let field = format!("{field}.allowOrigins");
    at_most(list.len(), CORS_MAX, &field, problems);
    if list.len() > 1 && list.iter().any(|item| item == "*") {
        problems.error(field.as_str(), "has \"*\" beside others, wanted it alone");
    }
    let mut read = Vec::with_capacity(list.len());
    for (at, origin) in list.iter().enumerate() {
        let found = origin_match(origin);
        if found.is_none() {
            let wanted =
                "wanted \"*\", or SCHEME://HOST[:PORT] where the host may begin with \"*.\" or be \"*\"";
            problems.error(format!("{field}[{at}]"), format!("is {origin:?}, {wanted}"));
        }
        read.extend(found);
    }
    read
}

fn origin_match(origin: &str) -> Option<StringMatch> {
    if origin == "*" {
        return Some(StringMatch::Present);
    }
    let (scheme, rest) = origin.split_once("://")?;
    let is_scheme = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
    if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.bytes().all(is_scheme) {
        return None;
    }
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (rest, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return None;
    }
    let port = port.filter(|port| !matches!((scheme, *port), ("http", "80") | ("https", "443")));
    let is_host = |host: &str| {
        let is_fit = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
        !host.is_empty() && host.bytes().all(is_fit)
    };
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    match host.strip_prefix('*') {
        None => is_host(host).then(|| StringMatch::Exact(format!("{scheme}://{host}{port}").into())),
        Some(suffix) => {
            let good = suffix.is_empty() || suffix.strip_prefix('.').is_some_and(is_host);
            // Both parts hold letters, digits, '+', '-' and '.' alone; those with a meaning are escaped.
            let escape = |text: &str| text.replace('.', "\\.").replace('+', "\\+");
            // A colon is a port's, but for addresses of IPv6.
            let any = if suffix.is_empty() { r"(?:\[[^\]/]+\]|[^/:\[\]]+)" } else { "[^/:]+" };
            let pattern = format!("{}://{any}{}{port}", escape(scheme), escape(suffix));
            good.then(|| FullRegex::new(&pattern).ok()).flatten().map(StringMatch::Regex)
        }
    }
}
