//! Hashes that lead a request to always the same endpoint: of what the request has, and of endpoints.
//!
//! Invariant: the same on every node and in every run, so that clients of several agents agree.

use std::net::{IpAddr, SocketAddr};

use super::draws::mix;
use crate::route::{
    cluster::{Algorithm, HashKey},
    request::RequestView,
};

/// FNV-1a with a final mix.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(hash)
}

/// Point number `index` of an endpoint.
pub(super) fn hash_endpoint(addr: SocketAddr, index: u64) -> u64 {
    let ip = match addr.ip().to_canonical() {
        IpAddr::V4(v4) => hash_bytes(&v4.octets()),
        IpAddr::V6(v6) => hash_bytes(&v6.octets()),
    };
    mix(ip ^ mix(u64::from(addr.port()) ^ mix(index)))
}

/// What a request's destination is chosen by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hashed {
    /// The algorithm uses no hash, or the request has nothing to hash.
    No,
    /// This hash.
    By(u64),
    /// This hash, of a cookie that the client is given.
    ByNewCookie {
        /// Hash of its value.
        hash: u64,
        /// The value of `set-cookie`.
        set_cookie: String,
    },
}

impl Hashed {
    /// The hash, if there is one.
    pub fn hash(&self) -> Option<u64> {
        match self {
            Self::No => None,
            Self::By(hash) | Self::ByNewCookie { hash, .. } => Some(*hash),
        }
    }
}

impl Algorithm {
    /// What a request's destination is chosen by. `source` is the client's address, `draw` one random word.
    pub fn hash(&self, request: &RequestView<'_>, source: IpAddr, draw: u64) -> Hashed {
        match self {
            Self::ConsistentHash { key, .. } => key.hash(request, source, draw),
            Self::LeastRequest | Self::RoundRobin | Self::Random | Self::Passthrough => Hashed::No,
        }
    }

    /// What a connection that is not looked into is balanced by: only the client's address works (S42).
    pub fn hash_of_stream(&self, source: IpAddr) -> Option<u64> {
        match self {
            Self::ConsistentHash { key: HashKey::SourceIp, .. } => Some(hash_source(source)),
            _ => None,
        }
    }
}

fn hash_source(source: IpAddr) -> u64 {
    hash_endpoint(SocketAddr::new(source, 0), 0)
}

impl HashKey {
    fn hash(&self, request: &RequestView<'_>, source: IpAddr, draw: u64) -> Hashed {
        let by = |bytes: Option<&[u8]>| bytes.map_or(Hashed::No, |bytes| Hashed::By(hash_bytes(bytes)));
        match self {
            Self::SourceIp => Hashed::By(hash_source(source)),
            Self::Header(name) => by(request.header(name).as_deref()),
            Self::Query(name) => by(request.query_parameter(name).map(str::as_bytes)),
            Self::Cookie { name, path, ttl, attributes } => match (request.cookie(name), ttl) {
                (Some(value), _) => Hashed::By(hash_bytes(value)),
                (None, None) => Hashed::No,
                (None, Some(ttl)) => {
                    let value = format!("{:016x}", mix(draw));
                    let mut set_cookie = format!("{name}=\"{value}\"");
                    if !ttl.is_zero() {
                        set_cookie.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                    }
                    if let Some(path) = path {
                        set_cookie.push_str(&format!("; Path={path}"));
                    }
                    for (key, value) in attributes {
                        let equals = if value.is_empty() { "" } else { "=" };
                        set_cookie.push_str(&format!("; {key}{equals}{value}"));
                    }
                    set_cookie.push_str("; HttpOnly");
                    Hashed::ByNewCookie { hash: hash_bytes(value.as_bytes()), set_cookie }
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::route::cluster::HashTable;

    fn by(key: HashKey) -> Algorithm {
        Algorithm::ConsistentHash { key, table: HashTable::Ring(1024) }
    }

    fn cookie(ttl: Option<Duration>, path: Option<&str>) -> HashKey {
        HashKey::Cookie {
            name: "user".into(),
            path: path.map(Into::into),
            ttl,
            attributes: vec![("SameSite".into(), "Strict".into()), ("Secure".into(), "".into())],
        }
    }

    fn hash(algorithm: &Algorithm, headers: &Vec<(&str, &str)>, query: Option<&str>) -> Hashed {
        let request =
            RequestView { method: "GET", scheme: "http", authority: "web", path: "/", query, headers };
        algorithm.hash(&request, [10, 0, 0, 1].into(), 7)
    }

    #[test]
    fn c3_every_key_hashes_what_it_names_and_nothing_else() {
        let header = by(HashKey::Header("x-user".into()));
        let headers = vec![("x-user", "jason"), ("cookie", "user=jason")];
        let jason = Hashed::By(hash_bytes(b"jason"));
        assert_eq!(hash(&header, &headers, None), jason);
        assert_eq!(hash(&header, &vec![], None), Hashed::No);
        assert_eq!(hash(&by(cookie(None, None)), &headers, None), jason);
        assert_eq!(hash(&by(cookie(None, None)), &vec![], None), Hashed::No);
        let query = by(HashKey::Query("u".into()));
        assert_eq!(hash(&query, &vec![], Some("u=jason")), jason);
        assert_eq!(hash(&query, &vec![], None), Hashed::No);
        let source = by(HashKey::SourceIp);
        assert_eq!(hash(&source, &vec![], None), hash(&source, &headers, Some("u=1")));
        assert_eq!(hash(&Algorithm::LeastRequest, &headers, None), Hashed::No);
    }

    #[test]
    fn c3_a_missing_cookie_with_a_lifetime_is_made_and_leads_to_the_same_endpoint_next_time() {
        let algorithm = by(cookie(Some(Duration::from_secs(60)), Some("/a")));
        let Hashed::ByNewCookie { hash: made, set_cookie } = hash(&algorithm, &vec![], None) else {
            panic!("no cookie");
        };
        let (pair, rest) = set_cookie.split_once("; ").unwrap();
        assert_eq!(rest, "Max-Age=60; Path=/a; SameSite=Strict; Secure; HttpOnly");
        let sent_back = pair.replace('"', "");
        assert_eq!(hash(&algorithm, &vec![("cookie", &sent_back)], None), Hashed::By(made));
        let session = by(cookie(Some(Duration::ZERO), None));
        let Hashed::ByNewCookie { set_cookie, .. } = hash(&session, &vec![], None) else {
            panic!("no cookie");
        };
        assert!(!set_cookie.contains("Max-Age"), "{set_cookie}");
    }

    #[test]
    fn s42_connections_are_hashed_by_their_source_only() {
        let source = [10, 0, 0, 1].into();
        assert!(by(HashKey::SourceIp).hash_of_stream(source).is_some());
        assert_eq!(by(HashKey::Header("x".into())).hash_of_stream(source), None);
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(
            by(HashKey::SourceIp).hash_of_stream(source),
            by(HashKey::SourceIp).hash_of_stream(mapped)
        );
    }
}
