//! Which host a request means: the text of its authority, and the names that a client may use for a service.
//!
//! Invariants:
//! - A name that is a service's own full name never means another service by an alias (S7).
//! - The address that was dialled has no say here (S9); the caller falls back to it for names that mean nothing.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use crate::{
    route::sight::Sight,
    snapshot::{Protocol, Service},
};

/// An authority in its parts. Total: what is no host and port is a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Authority<'a> {
    /// Host as it was written; an IPv6 address with its brackets.
    pub host: &'a str,
    /// Port, if there is one.
    pub port: Option<u16>,
}

impl<'a> Authority<'a> {
    /// Reads an authority.
    pub fn parse(text: &'a str) -> Self {
        let split = match text.strip_prefix('[').and_then(|rest| rest.find(']')) {
            // Two bytes for the brackets.
            Some(end) => text.split_at_checked(end + 2).map(|(host, rest)| (host, rest.strip_prefix(':'))),
            None => match text.split_once(':') {
                Some((host, port)) if !port.contains(':') => Some((host, Some(port))),
                _ => None,
            },
        };
        match split {
            Some((host, None)) if host.len() == text.len() => Self { host, port: None },
            // An empty port is allowed by RFC 3986 and means the scheme's own.
            Some((host, Some(""))) => Self { host, port: None },
            Some((host, Some(port))) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                match port.parse() {
                    Ok(port) => Self { host, port: Some(port) },
                    Err(_) => Self { host: text, port: None },
                }
            }
            _ => Self { host: text, port: None },
        }
    }

    /// The host as tables have it: lower case, without trailing dot. Allocates only if there are capitals.
    pub fn name(&self) -> Cow<'a, str> {
        let host = self.host.strip_suffix('.').unwrap_or(self.host);
        if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(host.to_ascii_lowercase())
        } else {
            Cow::Borrowed(host)
        }
    }

    /// The address, if the host is one.
    pub fn ip(&self) -> Option<IpAddr> {
        let host = self.host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(self.host);
        host.parse().ok()
    }
}

/// What an authority means to a client.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedHost<'a, 's> {
    /// The host as [`super::Routes::http`] wants it: the full name of a service, else what was asked for.
    pub host: Cow<'a, str>,
    /// The service, if the name is one's.
    pub service: Option<&'s Arc<Service>>,
}

/// What the authority of a request means to a client that dialled `port`.
///
/// A service without an entry in `Routes` is found too. Neither a service nor an entry: the caller decides by what was dialled.
pub fn resolve<'a, 's>(sight: &Sight<'s>, authority: &'a str, port: u16) -> ResolvedHost<'a, 's> {
    let authority = Authority::parse(authority);
    let name = authority.name();
    let snapshot = sight.snapshot();
    if let Some(service) = sight.service_by_host(&name) {
        return full_name(sight, service, Some(name));
    }
    if snapshot.routes().has_http(&name, port) {
        let service = sight.service_covering(&name);
        return ResolvedHost { host: name, service };
    }
    let service =
        alias(sight, &name).or_else(|| Some(snapshot.service_at(authority.ip()?, port, Protocol::Tcp)?.0));
    match service {
        Some(service) => full_name(sight, service, None),
        // A wildcard's tables are found by what was asked for.
        None => {
            let service = sight.service_covering(&name);
            ResolvedHost { host: name, service }
        }
    }
}

/// A service by its full name; one that is only another name (ExternalName) is what it stands for (B2).
fn full_name<'a, 's>(
    sight: &Sight<'s>,
    service: &'s Arc<Service>,
    known: Option<Cow<'a, str>>,
) -> ResolvedHost<'a, 's> {
    if let Some(target) = &service.external_name {
        let target = Authority::parse(target).name().into_owned();
        let service = sight.service_by_host(&target);
        return ResolvedHost { host: Cow::Owned(target), service };
    }
    let host = known.unwrap_or_else(|| Cow::Owned(sight.snapshot().host_of(service).into_owned()));
    ResolvedHost { host, service: Some(service) }
}

/// The service that `foo`, `foo.ns` and `foo.ns.svc` mean.
fn alias<'s>(sight: &Sight<'s>, name: &str) -> Option<&'s Arc<Service>> {
    let mut labels = name.split('.');
    let (service, namespace) = (labels.next()?, labels.next().unwrap_or(sight.namespace()));
    if labels.next().is_some_and(|label| label != "svc") || labels.next().is_some() {
        return None;
    }
    sight.snapshot().service_named(namespace, service).filter(|service| service.hostname.is_none())
}

#[cfg(test)]
mod tests;
