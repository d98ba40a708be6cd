//! Tables by host and port, without allocating.

use std::{
    borrow::Borrow,
    cmp::Ordering,
    collections::BTreeMap,
    ops::Bound::{Excluded, Included},
};

use crate::route::{HostPort, Routes, http::HttpTable, scope::Scoped, stream::StreamTable};

/// A host and port, owned or borrowed; ordered as [`HostPort`] is.
trait HostKey {
    /// Whether `*` stands before the host, the host, and the port.
    fn parts(&self) -> (bool, &str, u16);
}

impl HostKey for HostPort {
    fn parts(&self) -> (bool, &str, u16) {
        (false, &self.host, self.port)
    }
}

struct Asked<'a> {
    is_wildcard: bool,
    host: &'a str,
    port: u16,
}

impl HostKey for Asked<'_> {
    fn parts(&self) -> (bool, &str, u16) {
        (self.is_wildcard, self.host, self.port)
    }
}

impl<'a> Borrow<dyn HostKey + 'a> for HostPort {
    fn borrow(&self) -> &(dyn HostKey + 'a) {
        self
    }
}

impl PartialEq for dyn HostKey + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for dyn HostKey + '_ {}

impl PartialOrd for dyn HostKey + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn HostKey + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        let ((a_wild, a, a_port), (b_wild, b, b_port)) = (self.parts(), other.parts());
        let text = |is_wildcard: bool| if is_wildcard { "*" } else { "" }.bytes();
        let by_host = if a_wild || b_wild {
            text(a_wild).chain(a.bytes()).cmp(text(b_wild).chain(b.bytes()))
        } else {
            a.cmp(b)
        };
        by_host.then(a_port.cmp(&b_port))
    }
}

/// Whether some wildcard begins within a label, as `*-a.b` and `*oo.com` do.
fn has_partial<T>(tables: &BTreeMap<HostPort, Scoped<T>>) -> bool {
    // `*` itself and all that begin with `*.` are neighbours: what else begins with `*` stands before or behind them.
    let between = |low: Asked<'_>, high: Asked<'_>| {
        let low: &(dyn HostKey + '_) = &low;
        let high: &(dyn HostKey + '_) = &high;
        let low = if low.parts().1 == "*" { Excluded(low) } else { Included(low) };
        tables.range::<dyn HostKey + '_, _>((low, Excluded(high))).next().is_some()
    };
    let at = |host, port| Asked { is_wildcard: false, host, port };
    // `/` and `+` come after `.` and `*`.
    between(at("*", u16::MAX), at("*.", 0)) || between(at("*/", 0), at("+", 0))
}

/// The entry whose host is exactly `host`, else the one with the longest wildcard that covers it (S3, S4).
fn most_specific<'a, T>(
    tables: &'a BTreeMap<HostPort, Scoped<T>>,
    host: &str,
    port: u16,
) -> Option<&'a Scoped<T>> {
    let find = |is_wildcard, host: &str| {
        tables.get::<dyn HostKey + '_>(&Asked { is_wildcard, host, port } as &dyn HostKey)
    };
    if let Some(found) = find(false, host) {
        return Some(found);
    }
    suffixes(host, has_partial(tables)).find_map(|suffix| find(true, suffix)).or_else(|| find(false, "*"))
}

/// What may follow the `*` of a wildcard that covers a host, the longest first: what begins with a dot (`*.b.c` covers `a.b.c` and
/// not `b.c`), and where there are such wildcards any end of the host (`*oo.com` covers `foo.com` and `oo.com`).
pub(crate) fn suffixes(host: &str, partial: bool) -> impl Iterator<Item = &str> {
    let starts = host.char_indices().filter(move |(_, char)| partial || *char == '.');
    starts.filter_map(move |(at, _)| host.get(at..))
}

impl Routes {
    /// The HTTP tables of a host (lower case, without port and trailing dot) at a port.
    pub fn http(&self, host: &str, port: u16) -> Option<&Scoped<HttpTable>> {
        most_specific(&self.http, host, port)
    }

    /// Whether there is an HTTP table of this very host at a port.
    pub fn has_http(&self, host: &str, port: u16) -> bool {
        self.http.contains_key::<dyn HostKey + '_>(&Asked { is_wildcard: false, host, port } as &dyn HostKey)
    }

    /// The TLS and TCP tables of a host at a port.
    pub fn stream(&self, host: &str, port: u16) -> Option<&Scoped<StreamTable>> {
        most_specific(&self.streams, host, port)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::route::http::Action;

    fn routes(hosts: &[(&str, u16)]) -> Routes {
        let entry = |(host, port): &(&str, u16)| {
            let unmatched =
                Action::Respond { status: 404, body: Arc::from([]), reason: format!("{host}:{port}").into() };
            let table = Arc::new(HttpTable::new(Vec::new(), unmatched));
            (HostPort { host: (*host).into(), port: *port }, Scoped::everywhere(table))
        };
        Routes { http: hosts.iter().map(entry).collect(), ..Routes::default() }
    }

    fn found(routes: &Routes, host: &str, port: u16) -> Option<String> {
        match &routes.http(host, port)?.default.as_ref()?.unmatched {
            Action::Respond { reason, .. } => Some(reason.to_string()),
            _ => None,
        }
    }

    #[test]
    fn s4_an_exact_host_beats_wildcards_and_the_longer_wildcard_the_shorter() {
        let routes = routes(&[
            ("a.b.c", 80),
            ("*.b.c", 80),
            ("*.c", 80),
            ("*", 80),
            ("*.c", 81),
            ("*.x.c", 80),
            ("+.b.c", 80),
        ]);
        for (host, port, expected) in [
            ("a.b.c", 80, Some("a.b.c:80")),
            ("z.b.c", 80, Some("*.b.c:80")),
            ("y.z.b.c", 80, Some("*.b.c:80")),
            ("b.c", 80, Some("*.c:80")),
            ("c", 80, Some("*:80")),
            ("d", 80, Some("*:80")),
            ("", 80, Some("*:80")),
            ("a.b.c", 81, Some("*.c:81")),
            ("d", 81, None),
            ("a.b.c", 82, None),
        ] {
            assert_eq!(found(&routes, host, port).as_deref(), expected, "{host}:{port}");
        }
        assert!(
            routes.has_http("a.b.c", 80) && !routes.has_http("z.b.c", 80) && !routes.has_http("a.b.c", 81)
        );
    }

    #[test]
    fn s3_what_follows_the_asterisk_is_compared_as_it_stands() {
        let routes = routes(&[
            ("*oo.com", 80),
            ("*.com", 80),
            ("*-a.b.c", 80),
            ("*.b.c", 80),
            ("*", 80),
            ("*", 81),
            ("*z.d", 82),
        ]);
        for (host, port, expected) in [
            ("foo.com", 80, Some("*oo.com:80")),
            ("oo.com", 80, Some("*oo.com:80")),
            ("a.foo.com", 80, Some("*oo.com:80")),
            ("o.com", 80, Some("*.com:80")),
            ("bar.com", 80, Some("*.com:80")),
            ("x-a.b.c", 80, Some("*-a.b.c:80")),
            ("xa.b.c", 80, Some("*.b.c:80")),
            ("b.c", 80, Some("*:80")),
            ("foo.com", 81, Some("*:81")),
            ("z.d", 82, Some("*z.d:82")),
            ("é.z.d", 82, Some("*z.d:82")),
            ("d", 82, None),
        ] {
            assert_eq!(found(&routes, host, port).as_deref(), expected, "{host}:{port}");
        }
        for (hosts, expected) in
            [(&["*", "*.a", "+", "a"][..], false), (&["*-a"], true), (&["*a"], true), (&["*", "*0.a"], true)]
        {
            let hosts: Vec<(&str, u16)> = hosts.iter().map(|host| (*host, u16::MAX)).collect();
            assert_eq!(has_partial(&tests::routes(&hosts).http), expected, "{hosts:?}");
        }
    }

    proptest! {
        #[test]
        fn borrowed_keys_find_what_owned_keys_find(
            hosts in prop::collection::btree_set("(\\*[.-]?)?[a-c+]{1,2}(\\.[a-c]){0,2}", 0..12),
            asked in "[a-c+]{1,2}(\\.[a-c]){0,3}",
        ) {
            let entries: Vec<(&str, u16)> = hosts.iter().map(|host| (host.as_str(), 80)).collect();
            let routes = routes(&entries);
            let mut names = vec![asked.clone()];
            names.extend((0..asked.len()).map(|at| format!("*{}", &asked[at..])));
            let expected = names.iter().find(|name| hosts.contains(*name)).map(|name| format!("{name}:80"));
            prop_assert_eq!(found(&routes, &asked, 80), expected);
        }
    }
}
