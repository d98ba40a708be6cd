//! What a rule for HTTP does with requests: each field that is not about matching.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    route::{
        http::{
            Abort, Cors, Fault, HeaderOps, Millionths, PathRewrite, Redirect, RedirectPort, RetryOn,
            RetryPolicy, Rewrite, SearchRegex,
        },
        matching::StringMatch,
        variables::HeaderText,
    },
    snapshot::Name,
};

use super::{DirectResponse, Headers, Mirror, Retries, RuleScope, retry};
use crate::{
    problem::Problems,
    resource::{
        fields::Object,
        host, metadata,
        parts::{self, Place},
    },
};

/// Shortest duration that Istio takes; what is shorter is a mistake.
pub(in crate::resource) const LEAST: Duration = Duration::from_millis(1);
/// Largest body of an answer of the mesh's own (S23).
const BODY_BYTES_MAX: usize = 1 << 20;
/// Statuses of redirects (S19).
const REDIRECTS: [i64; 5] = [301, 302, 303, 307, 308];
/// Names of gRPC's statuses, in the order of their codes.
const GRPC_STATUSES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Reads `timeout`; zero is no limit.
pub(super) fn timeout(rule: &mut Object<'_>, problems: &mut Problems) -> Option<Duration> {
    let node = rule.get("timeout")?;
    let read = node.duration(problems)?;
    if !read.is_zero() && read < LEAST {
        let found = node.value.as_str().unwrap_or_default();
        problems.error(node.path, format!("is {found:?}, wanted at least 1ms, or 0s for no limit"));
    }
    Some(read)
}

/// Reads `rewrite`. One that says nothing is a mistake.
pub(super) fn rewrite(
    rule: &mut Object<'_>,
    headers: Option<&Headers>,
    problems: &mut Problems,
) -> Option<Rewrite> {
    let mut object = rule.object("rewrite", problems)?;
    object.one_of(&["uri", "uriRegexRewrite"], problems);
    let uri = object.shared("uri", problems).map(PathRewrite::MatchedPrefix);
    let regex = object.object("uriRegexRewrite", problems).and_then(|mut regex| {
        let read = regex_rewrite(&mut regex, problems);
        regex.finish(problems);
        read
    });
    let authority = object.shared("authority", problems);
    if let Some(authority) = &authority {
        check_authority(authority, &object.at("authority"), problems);
        if headers.is_some_and(|headers| headers.request.authority.is_some()) {
            let message = "is there beside an authority in headers.request: this one counts";
            problems.warning(object.at("authority"), message);
        }
    }
    let read = Rewrite { authority, path: uri.or(regex) };
    if read == Rewrite::default() && !object.has("uriRegexRewrite") {
        let wanted = "wanted at least one of uri, authority and uriRegexRewrite";
        problems.error(object.path.as_str(), format!("says nothing, {wanted}"));
    }
    object.finish(problems);
    Some(read)
}

fn regex_rewrite(object: &mut Object<'_>, problems: &mut Problems) -> Option<PathRewrite> {
    let pattern = object.text("match", problems);
    let substitution = object.text("rewrite", problems);
    for (name, found) in [("match", pattern), ("rewrite", substitution)] {
        if found.is_none() {
            problems.error(object.at(name), "is missing or empty, wanted both match and rewrite");
        }
    }
    let (pattern, substitution) = (pattern?, substitution?);
    parts::regex(pattern, &object.at("match"), problems)?;
    let pattern = SearchRegex::new(pattern).ok()?;
    if let Err(wanted) = check_substitution(substitution, pattern.regex().captures_len()) {
        problems.error(object.at("rewrite"), format!("is {substitution:?}, wanted {wanted}"));
        return None;
    }
    Some(PathRewrite::Regex { pattern, substitution: substitution.into() })
}

/// `\1` is a group, `\\` a backslash; nothing else follows a backslash. `groups` counts the whole match too.
fn check_substitution(text: &str, groups: usize) -> Result<(), String> {
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            continue;
        }
        match chars.next().map(|next| (next, next.to_digit(10))) {
            Some(('\\', _)) => {}
            Some((_, Some(group))) if usize::try_from(group).is_ok_and(|group| group < groups) => {}
            Some((_, Some(_))) => return Err(format!("groups from \\0 to \\{}", groups - 1)),
            _ => return Err("a digit or a backslash after each backslash".to_owned()),
        }
    }
    Ok(())
}

/// Reads `redirect`, which is there.
pub(super) fn redirect(rule: &mut Object<'_>, problems: &mut Problems) -> Option<Redirect> {
    let mut object = rule.object("redirect", problems)?;
    object.one_of(&["uri", "prefixRewrite"], problems);
    object.one_of(&["port", "derivePort"], problems);
    let uri = object.shared("uri", problems);
    let prefix = match object.get("prefixRewrite") {
        Some(node) => node.text(problems).map(Arc::from),
        None => None,
    };
    let authority = object.shared("authority", problems);
    if let Some(authority) = &authority {
        check_authority(authority, &object.at("authority"), problems);
    }
    let scheme = object.text("scheme", problems);
    if let Some(scheme) = scheme.filter(|scheme| !matches!(*scheme, "http" | "https")) {
        problems.error(object.at("scheme"), format!("is {scheme:?}, wanted http or https"));
    }
    let derived =
        [("FROM_PROTOCOL_DEFAULT", RedirectPort::OfScheme), ("FROM_REQUEST_PORT", RedirectPort::OfRequest)];
    let derived = object.word("derivePort", &derived, problems);
    let port = object.port("port", problems).map(RedirectPort::Number).or(derived);
    let status = object.get("redirectCode").and_then(|node| {
        let code = node.number(0..=i64::from(u32::MAX), problems)?;
        if code != 0 && !REDIRECTS.contains(&code) {
            problems.error(node.path, format!("is {code}, wanted 301, 302, 303, 307 or 308"));
        }
        u16::try_from(code).ok()
    });
    let says = uri.is_some() || prefix.is_some() || authority.is_some() || scheme.is_some() || port.is_some();
    if !says {
        let wanted = "wanted at least one of uri, prefixRewrite, authority, port and scheme";
        problems.error(object.path.as_str(), format!("says nothing, {wanted}"));
    }
    object.finish(problems);
    Some(Redirect {
        status: status.filter(|status| *status != 0).unwrap_or(301),
        scheme: scheme.map(Arc::from),
        authority,
        port: port.unwrap_or(RedirectPort::OfHost),
        path: uri.map(PathRewrite::Full).or(prefix.map(PathRewrite::MatchedPrefix)),
    })
}

/// Reads `directResponse`, which is there.
pub(super) fn direct_response(rule: &mut Object<'_>, problems: &mut Problems) -> Option<DirectResponse> {
    use base64::Engine as _;

    let mut object = rule.object("directResponse", problems)?;
    let status = object.number("status", 200..=599, problems).and_then(|status| u16::try_from(status).ok());
    if !object.has("status") {
        problems.error(object.at("status"), "is missing, wanted a status from 200 to 599");
    }
    let mut body: Arc<[u8]> = Arc::default();
    if let Some(mut inner) = object.object("body", problems) {
        inner.one_of(&["string", "bytes"], problems);
        if let Some(text) = inner.text("string", problems) {
            body = text.as_bytes().into();
        }
        if let Some(text) = inner.text("bytes", problems) {
            match base64::engine::general_purpose::STANDARD.decode(text) {
                Ok(bytes) => body = bytes.into(),
                Err(error) => problems.error(inner.at("bytes"), format!("is no base64: {error}")),
            }
        }
        if body.len() > BODY_BYTES_MAX {
            let message = format!("has {} bytes, wanted at most {BODY_BYTES_MAX}", body.len());
            problems.error(inner.path.as_str(), message);
        }
        inner.finish(problems);
    }
    object.finish(problems);
    Some(DirectResponse { status: status?, body })
}

/// Reads `delegate`, which is there.
pub(super) fn delegate(rule: &mut Object<'_>, namespace: &Arc<str>, problems: &mut Problems) -> Option<Name> {
    let mut object = rule.object("delegate", problems)?;
    let name = object.shared("name", problems);
    if name.is_none() {
        problems.error(object.at("name"), "is missing, wanted the name of a VirtualService");
    }
    let of = object.shared("namespace", problems).unwrap_or_else(|| Arc::clone(namespace));
    if !metadata::is_label(&of) {
        problems.error(object.at("namespace"), format!("is {of:?}, wanted the name of a namespace"));
    }
    object.finish(problems);
    Some(Name { namespace: of, name: name? })
}

/// Reads `retries` or a field of the same form.
pub(in crate::resource) fn retries(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<Retries> {
    let mut object = object.object(name, problems)?;
    let attempts = object.number("attempts", i64::from(i32::MIN)..=i64::from(i32::MAX), problems);
    if attempts.is_some_and(|attempts| attempts < 0) {
        problems
            .error(object.at("attempts"), "is negative, wanted 0 for none, or how often a try is repeated");
    }
    let attempts = attempts.and_then(|attempts| u32::try_from(attempts).ok()).unwrap_or_default();
    let per_try_timeout = object.duration_of("perTryTimeout", LEAST, problems);
    let backoff = object.duration_of("backoff", LEAST, problems);
    let on = retry::on(&mut object, problems);
    let remote_localities = object.bool("retryRemoteLocalities", problems);
    let ignore_previous_hosts = object.bool("retryIgnorePreviousHosts", problems);
    if attempts == 0 {
        let more = ["perTryTimeout", "retryOn", "retryRemoteLocalities", "backoff"];
        if let Some(given) = more.into_iter().find(|name| object.has(name)) {
            let message = format!("is 0 or missing, which turns retries off, but {given} is there");
            problems.error(object.at("attempts"), message);
        }
        object.finish(problems);
        return Some(Retries::Off);
    }
    object.finish(problems);
    Some(Retries::On(RetryPolicy {
        attempts,
        per_try_timeout,
        on: on.unwrap_or_else(RetryOn::built_in),
        backoff: backoff.unwrap_or(retry::BACKOFF),
        backoff_min: Duration::ZERO,
        ignore_previous_hosts,
        remote_localities: remote_localities.unwrap_or_default(),
    }))
}

/// Reads `fault`.
pub(super) fn fault(rule: &mut Object<'_>, problems: &mut Problems) -> Option<Fault> {
    let mut object = rule.object("fault", problems)?;
    if object.get("delay").is_none() && object.get("abort").is_none() {
        problems.error(object.path.as_str(), "says nothing, wanted delay or abort or both");
    }
    let delay = object.object("delay", problems).and_then(|mut delay| {
        let share = fault_share(&mut delay, problems);
        let fixed = delay.duration_of("fixedDelay", LEAST, problems);
        if delay.has("exponentialDelay") {
            let message = "is not supported, by Istio either; wanted fixedDelay";
            problems.error(delay.at("exponentialDelay"), message);
        } else if !delay.has("fixedDelay") {
            problems.error(delay.at("fixedDelay"), "is missing, wanted a duration such as 5s");
        }
        delay.finish(problems);
        Some((share, fixed?))
    });
    let abort = object.object("abort", problems).and_then(|mut abort| {
        let share = fault_share(&mut abort, problems);
        let http = abort.number("httpStatus", 200..=599, problems).and_then(|code| u16::try_from(code).ok());
        let grpc = abort.get("grpcStatus").and_then(|node| {
            let text = node.text(problems)?;
            let code = GRPC_STATUSES.iter().position(|name| *name == text);
            if code.is_none() {
                let wanted = "wanted the name of a gRPC status such as UNAVAILABLE";
                problems.error(node.path, format!("is {text:?}, {wanted}"));
            }
            code.and_then(|code| u8::try_from(code).ok())
        });
        if abort.has("http2Error") {
            problems.error(abort.at("http2Error"), "is not supported, by Istio either; wanted httpStatus");
        }
        if abort.one_of(&["httpStatus", "grpcStatus", "http2Error"], problems).is_none() {
            problems.error(abort.path.as_str(), "has no status, wanted httpStatus or grpcStatus");
        }
        abort.finish(problems);
        Some((share, http.map(Abort::Http).or(grpc.map(Abort::Grpc))?))
    });
    object.finish(problems);
    Some(Fault { delay, abort })
}

/// Of how many requests: without `percentage` of none (S21).
fn fault_share(object: &mut Object<'_>, problems: &mut Problems) -> Millionths {
    let share = parts::percent(object, "percentage", problems);
    let whole = object.number("percent", 0..=100, problems);
    if object.has("percentage") && object.has("percent") {
        problems.warning(object.at("percent"), "is there beside percentage; it has no effect");
    }
    match (share, whole) {
        (Some(share), _) => share,
        #[expect(clippy::cast_precision_loss, reason = "at most 100")]
        (None, Some(whole)) => parts::share(whole as f64),
        (None, None) => {
            if !object.has("percentage") && !object.has("percent") {
                let message = "is missing, which means 0: no request is concerned";
                problems.warning(object.at("percentage"), message);
            }
            Millionths(0)
        }
    }
}

/// Reads `mirror` with its percentage, or `mirrors`.
pub(super) fn mirrors(rule: &mut Object<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Vec<Mirror> {
    rule.one_of(&["mirror", "mirrors"], problems);
    let mut mirrors = Vec::new();
    let share = parts::percent(rule, "mirrorPercentage", problems);
    let older = rule.number("mirrorPercent", 0..=100, problems);
    if let Some(mut object) = rule.object("mirror", problems) {
        let destination = super::destination(&mut object, &scope.name.namespace, problems);
        object.finish(problems);
        #[expect(clippy::cast_precision_loss, reason = "at most 100")]
        let share = share.or(older.map(|older| parts::share(older as f64))).unwrap_or(Millionths::ALL);
        mirrors.extend(destination.map(|destination| Mirror { destination, share }));
    } else {
        let why = "has no effect without mirror";
        rule.no_effect(&["mirrorPercentage", "mirrorPercent"], why, problems);
    }
    for mut object in rule.objects("mirrors", problems) {
        let destination = object.object("destination", problems).and_then(|mut inner| {
            let read = super::destination(&mut inner, &scope.name.namespace, problems);
            inner.finish(problems);
            read
        });
        if !object.has("destination") {
            problems.error(object.at("destination"), "is missing");
        }
        let share = parts::percent(&mut object, "percentage", problems).unwrap_or(Millionths::ALL);
        object.finish(problems);
        mirrors.extend(destination.map(|destination| Mirror { destination, share }));
    }
    mirrors
}

/// Reads `corsPolicy`.
pub(super) fn cors(rule: &mut Object<'_>, problems: &mut Problems) -> Option<Cors> {
    let mut object = rule.object("corsPolicy", problems)?;
    let mut origins = Vec::new();
    for node in object.list("allowOrigins", problems) {
        match parts::string_match(&node, Place::Plain, problems) {
            // As with Envoy, the very text `*` is every origin.
            Some(StringMatch::Exact(text)) if &*text == "*" => origins.push(StringMatch::Present),
            Some(StringMatch::Present) => {
                problems.error(node.path, "is empty, wanted exact, prefix or regex");
            }
            Some(origin) => origins.push(origin),
            None => {}
        }
    }
    for (_, text) in object.texts("allowOrigin", problems) {
        origins.push(if text == "*" { StringMatch::Present } else { StringMatch::Exact(text.into()) });
    }
    let methods = object.texts("allowMethods", problems);
    for (path, method) in &methods {
        if *method != "*" && !is_header_name(method) {
            problems.error(path.as_str(), format!("is {method:?}, wanted the name of a method such as GET"));
        } else if method.bytes().any(|b| b.is_ascii_lowercase()) {
            problems
                .error(path.as_str(), format!("is {method:?}, wanted capital letters: methods have case"));
        }
    }
    let mut names = |name: &'static str| {
        let texts = object.texts(name, problems);
        for (path, text) in &texts {
            if *text != "*" && !is_header_name(text) {
                problems.error(path.as_str(), format!("is {text:?}, wanted the name of a header"));
            }
        }
        texts.into_iter().map(|(_, text)| Arc::from(text)).collect()
    };
    let headers = names("allowHeaders");
    let expose = names("exposeHeaders");
    let max_age = object.get("maxAge").and_then(|node| {
        let age = node.duration(problems)?;
        if age.subsec_nanos() != 0 {
            let found = node.value.as_str().unwrap_or_default();
            problems.error(node.path, format!("is {found:?}, wanted whole seconds"));
        }
        Some(age)
    });
    let unmatched = [("UNSPECIFIED", false), ("FORWARD", false), ("IGNORE", true)];
    let read = Cors {
        origins,
        methods: methods.into_iter().map(|(_, method)| Arc::from(method)).collect(),
        headers,
        expose,
        max_age,
        credentials: object.bool("allowCredentials", problems),
        answer_unmatched_preflights: object
            .word("unmatchedPreflights", &unmatched, problems)
            .unwrap_or_default(),
    };
    object.finish(problems);
    Some(read)
}

/// Reads `headers`.
pub(super) fn headers(rule: &mut Object<'_>, problems: &mut Problems) -> Option<Headers> {
    let mut object = rule.object("headers", problems)?;
    let read = Headers {
        request: header_ops(&mut object, "request", problems),
        response: header_ops(&mut object, "response", problems),
    };
    object.finish(problems);
    Some(read)
}

fn header_ops(object: &mut Object<'_>, name: &'static str, problems: &mut Problems) -> HeaderOps {
    let Some(mut ops) = object.object(name, problems) else { return HeaderOps::default() };
    let of_requests = name == "request";
    let mut read = HeaderOps::default();
    for (list, field) in [(&mut read.set, "set"), (&mut read.add, "add")] {
        for (key, node) in ops.entries(field, problems) {
            let Some(value) = node.text(problems) else { continue };
            let lower: Arc<str> = key.to_ascii_lowercase().into();
            let text = header_text(value, &node.path, problems);
            if of_requests && matches!(&*lower, "host" | ":authority") {
                check_authority(value, &node.path, problems);
                if read.authority.is_some() {
                    problems.warning(node.path, "sets the authority again: the first one counts");
                } else {
                    read.authority = Some(value.into());
                }
            } else if check_operated(key, &node.path, problems) {
                if list.iter().any(|(known, _)| *known == lower) {
                    problems.error(
                        node.path,
                        "is there already, in other letters: names of headers have no case",
                    );
                }
                list.push((lower, text));
            }
        }
        list.sort_by(|(one, _), (other, _)| one.cmp(other));
    }
    for (path, key) in ops.texts("remove", problems) {
        if check_operated(key, &path, problems) {
            read.remove.push(key.to_ascii_lowercase().into());
        }
    }
    ops.finish(problems);
    read
}

/// Whether a header is set, added or removed: what a request is addressed by is not, whoever asks for it (S18).
fn check_operated(name: &str, path: &str, problems: &mut Problems) -> bool {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        let message = format!(
            "is for {name:?} and has no effect, wanted a header that is not part of the request line"
        );
        problems.warning(path, message);
        false
    } else if !is_header_name(name) {
        problems.error(path, format!("is for {name:?}, wanted the name of a header"));
        false
    } else {
        true
    }
}

/// The value of a header, with its variables.
fn header_text(value: &str, path: &str, problems: &mut Problems) -> HeaderText {
    if value.bytes().any(|b| (b < 0x20 && b != b'\t') || b == 0x7f) {
        problems.error(path, format!("is {value:?}, wanted a value without control characters"));
    }
    match HeaderText::parse(value) {
        Ok(text) => {
            for name in text.without_value() {
                let message = format!(
                    "has %{name}%, which stands for nothing here; a header without any value is not sent"
                );
                problems.warning(path, message);
            }
            text
        }
        Err(error) => {
            problems.error(path, format!("is {value:?}, {error}"));
            value.into()
        }
    }
}

fn check_authority(text: &str, path: &str, problems: &mut Problems) {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let inner = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let is_address = inner.parse::<std::net::IpAddr>().is_ok();
    let port_fits = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0));
    if !(is_address || host::check_name(name).is_ok()) || !port_fits {
        problems
            .error(path, format!("is {text:?}, wanted a host, maybe with a port, such as example.com:8080"));
    }
}

/// A token of HTTP: what names of headers and methods are made of.
pub(super) fn is_header_name(text: &str) -> bool {
    let is_fit = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(is_fit)
}
