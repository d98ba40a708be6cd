//! What the variables in headers of rules stand for in one exchange.
//!
//! Invariant: a rule without variables costs a look at its headers, and no allocation.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, Request, Version, request::Parts};
use mesh_core::route::{
    request::Headers,
    rewrite::HeaderEdit,
    variables::{Facts, Template},
};

use super::{
    exchange::Route,
    fields::{self, Fields},
    pipeline::view,
    record::Record,
    session::Session,
};

/// The values of the headers that have variables, in the order of the changes; `None`: that header is not sent.
pub(super) type Filled = Vec<Option<HeaderValue>>;

/// The texts with variables among changes.
pub(super) fn templates<'a>(edits: impl Iterator<Item = HeaderEdit<'a>>) -> Vec<&'a Template> {
    edits.filter_map(HeaderEdit::template).collect()
}

/// What stays of a request until its response is here.
pub(super) fn keep(parts: &Parts) -> Parts {
    let (mut kept, ()) = Request::new(()).into_parts();
    kept.method = parts.method.clone();
    kept.uri = parts.uri.clone();
    kept.version = parts.version;
    kept.headers = parts.headers.clone();
    kept
}

/// What templates stand for, of the request or of its response.
pub(super) fn fill(
    templates: &[&Template],
    session: &Session,
    record: &Record,
    route: &Route,
    request: &Parts,
    response: Option<(u16, &HeaderMap)>,
) -> Filled {
    if templates.is_empty() {
        return Vec::new();
    }
    let headers = Fields(&request.headers);
    let authority = fields::host(&request.headers);
    let answered = response.map(|(status, headers)| (status, Fields(headers)));
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let flags = record.flags().to_string();
    let route = route.name();
    let facts = Facts {
        request: view(request, authority, &headers),
        response: answered.as_ref().map(|(status, headers)| (*status, headers as &dyn Headers)),
        client: session.live.client,
        dialled: session.dialled,
        upstream: record.upstream.borrow().as_ref().map(|end| end.addr),
        protocol: protocol(session, request.version),
        started: since_epoch.saturating_sub(record.started().elapsed()),
        flags: &flags,
        details: record.details.get(),
        route: &route,
        host_name: &session.live.pod.name.name,
    };
    let value = |template: &&Template| HeaderValue::from_bytes(&template.value(&facts)?).ok();
    templates.iter().map(value).collect()
}

/// The texts themselves, where nothing is known that they could stand for.
pub(super) fn unfilled(templates: &[&Template]) -> Filled {
    templates.iter().map(|template| HeaderValue::try_from(template.source()).ok()).collect()
}

fn protocol(session: &Session, version: Version) -> &'static str {
    match version {
        _ if session.http2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}
