//! What consistent hashing goes by, taken from a request.
//!
//! Invariant: the same request hashes alike on every node and after every restart.

use std::{net::IpAddr, sync::Arc, time::Duration};

use http::HeaderValue;
use mesh_core::route::{
    cluster::{Algorithm, HashKey},
    request::RequestView,
};

use crate::destination::{digest, source_hash};

/// A cookie that is made because the client has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cookie {
    name: Arc<str>,
    value: u64,
    path: Option<Arc<str>>,
    ttl: Duration,
    attributes: Vec<(Arc<str>, Arc<str>)>,
}

impl Cookie {
    /// `set-cookie`.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        let mut text = format!("{}=\"{:016x}\"", self.name, self.value);
        if !self.ttl.is_zero() {
            text.push_str(&format!("; Max-Age={}", self.ttl.as_secs()));
        }
        if let Some(path) = &self.path {
            text.push_str(&format!("; Path={path}"));
        }
        for (name, value) in &self.attributes {
            text.push_str(&format!("; {name}"));
            if !value.is_empty() {
                text.push_str(&format!("={value}"));
            }
        }
        text.push_str("; HttpOnly");
        HeaderValue::try_from(text).ok()
    }
}

/// The hash that an endpoint is chosen by, and the cookie that makes it last; none where the request has nothing of it.
pub(super) fn of(
    algorithm: &Algorithm,
    request: &RequestView<'_>,
    client: IpAddr,
    random: impl FnOnce() -> u64,
) -> (Option<u64>, Option<Cookie>) {
    let Algorithm::ConsistentHash { key, .. } = algorithm else { return (None, None) };
    match key {
        HashKey::Header(name) => (request.header(name).map(|value| digest(&value)), None),
        HashKey::SourceIp => (Some(source_hash(client)), None),
        HashKey::Query(name) => (request.query_parameter(name).map(|value| digest(value.as_bytes())), None),
        HashKey::Cookie { name, path, ttl, attributes } => match (request.cookie(name), ttl) {
            (Some(value), _) => (Some(digest(value)), None),
            (None, None) => (None, None),
            (None, Some(ttl)) => {
                let cookie = Cookie {
                    name: Arc::clone(name),
                    value: random(),
                    path: path.clone(),
                    ttl: *ttl,
                    attributes: attributes.clone(),
                };
                (Some(digest(format!("{:016x}", cookie.value).as_bytes())), Some(cookie))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::route::cluster::HashTable;

    use super::*;

    fn hash(key: HashKey, headers: &Vec<(&str, &str)>, query: Option<&str>) -> (Option<u64>, Option<Cookie>) {
        let view = RequestView { method: "GET", scheme: "http", authority: "web", path: "/", query, headers };
        let algorithm = Algorithm::ConsistentHash { key, table: HashTable::Ring(1024) };
        of(&algorithm, &view, [10, 0, 0, 1].into(), || 7)
    }

    #[test]
    fn the_same_value_hashes_alike_wherever_it_stands() {
        let headers = vec![("x-user", "ann"), ("cookie", "user=ann")];
        let by_header = hash(HashKey::Header("x-user".into()), &headers, None).0;
        let cookie = HashKey::Cookie { name: "user".into(), path: None, ttl: None, attributes: Vec::new() };
        assert_eq!(by_header, hash(cookie, &headers, None).0);
        assert_eq!(by_header, hash(HashKey::Query("u".into()), &headers, Some("u=ann")).0);
        assert_ne!(by_header, hash(HashKey::Query("u".into()), &headers, Some("u=bob")).0);
        assert_eq!(hash(HashKey::Header("none".into()), &headers, None), (None, None));
        assert!(hash(HashKey::SourceIp, &headers, None).0.is_some());
    }

    #[test]
    fn a_cookie_that_is_made_hashes_as_it_will_when_it_comes_back() {
        let key = |ttl| HashKey::Cookie {
            name: "user".into(),
            path: Some("/x".into()),
            ttl,
            attributes: vec![("SameSite".into(), "Strict".into())],
        };
        let (made, cookie) = hash(key(Some(Duration::from_secs(60))), &Vec::new(), None);
        let header = cookie.unwrap().header().unwrap();
        assert_eq!(header, "user=\"0000000000000007\"; Max-Age=60; Path=/x; SameSite=Strict; HttpOnly");
        let back = vec![("cookie", "user=\"0000000000000007\"")];
        assert_eq!(hash(key(None), &back, None).0, made);
        assert_eq!(hash(key(None), &Vec::new(), None), (None, None));
    }
}
