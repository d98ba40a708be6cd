//! A request and its client as routes see them: borrowed, whatever HTTP library holds them.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

/// Headers of a message.
pub trait Headers {
    /// Calls `each` with the value of every header called `name` (lower case), in the order of the message.
    fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8]));

    /// The first header called `name`.
    fn first(&self, name: &str) -> Option<&[u8]> {
        let mut first = None;
        self.visit(name, &mut |value| {
            first.get_or_insert(value);
        });
        first
    }

    /// All headers called `name` as one value, joined by `,` (S96). Allocates only if there are several.
    fn joined(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let mut joined: Option<Cow<'_, [u8]>> = None;
        self.visit(name, &mut |value| match &mut joined {
            None => joined = Some(Cow::Borrowed(value)),
            Some(so_far) => {
                let so_far = so_far.to_mut();
                so_far.push(b',');
                so_far.extend_from_slice(value);
            }
        });
        joined
    }
}

/// Pairs of lower-case name and value, for tests and `meshctl explain`.
impl<N: AsRef<str>, V: AsRef<[u8]>> Headers for Vec<(N, V)> {
    fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8])) {
        for (_, value) in self.iter().filter(|(own, _)| own.as_ref() == name) {
            each(value.as_ref());
        }
    }
}

/// A request as routes see it. The path is normalised already ([`super::normalize`]).
#[derive(Clone, Copy)]
pub struct RequestView<'a> {
    /// Method, as it was sent.
    pub method: &'a str,
    /// `http` or `https`, as the client used it.
    pub scheme: &'a str,
    /// Authority (`Host`), as it was sent, with its port if it has one.
    pub authority: &'a str,
    /// Path without query.
    pub path: &'a str,
    /// What follows the first `?`.
    pub query: Option<&'a str>,
    /// Headers without pseudo-headers.
    pub headers: &'a dyn Headers,
}

impl std::fmt::Debug for RequestView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values of headers may be secrets.
        f.debug_struct("RequestView")
            .field("method", &self.method)
            .field("authority", &self.authority)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl<'a> RequestView<'a> {
    /// The value of a header, all of its occurrences joined by `,`; `host` and the pseudo-headers too.
    pub fn header(&self, name: &str) -> Option<Cow<'a, [u8]>> {
        let pseudo = match name {
            ":authority" | "host" => self.authority,
            ":method" => self.method,
            ":scheme" => self.scheme,
            ":path" => {
                return Some(match self.query {
                    None => Cow::Borrowed(self.path.as_bytes()),
                    Some(query) => Cow::Owned(format!("{}?{query}", self.path).into_bytes()),
                });
            }
            _ => return self.headers.joined(name),
        };
        Some(Cow::Borrowed(pseudo.as_bytes()))
    }

    /// The first query parameter of this name, as it stands there; one without `=` is empty.
    pub fn query_parameter(&self, name: &str) -> Option<&'a str> {
        let pairs = self.query?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.filter(|(own, _)| *own == name).map(|(_, value)| value).next()
    }

    /// The first cookie of this name, without quotes around its value.
    pub fn cookie(&self, name: &str) -> Option<&'a [u8]> {
        let mut found = None;
        self.headers.visit("cookie", &mut |line| {
            if found.is_none() {
                found = line.split(|byte| *byte == b';').find_map(|pair| {
                    let pair = pair.trim_ascii();
                    let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
                    Some(value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value))
                });
            }
        });
        found
    }
}

/// The client as routes see it.
#[derive(Clone, Copy, Debug)]
pub struct ClientView<'a> {
    /// Namespace of its pod.
    pub namespace: &'a str,
    /// Labels of its pod.
    pub labels: &'a BTreeMap<Arc<str>, Arc<str>>,
}

impl ClientView<'_> {
    /// Whether the client is in this namespace, if one is asked for, and has these labels (S12).
    pub(super) fn is_meant(
        &self,
        namespace: Option<&Arc<str>>,
        labels: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> bool {
        namespace.is_none_or(|namespace| **namespace == *self.namespace)
            && labels.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(headers: &'a Vec<(&str, &str)>, query: Option<&'a str>) -> RequestView<'a> {
        RequestView { method: "GET", scheme: "http", authority: "web", path: "/", query, headers }
    }

    #[test]
    fn several_headers_of_a_name_are_one_value() {
        let headers = vec![("a", "1"), ("b", "x"), ("a", "2")];
        assert_eq!(headers.joined("a").as_deref(), Some(&b"1,2"[..]));
        assert!(matches!(headers.joined("b"), Some(Cow::Borrowed(b"x"))));
        assert_eq!(headers.joined("c"), None);
        assert_eq!(headers.first("a"), Some(&b"1"[..]));
    }

    #[test]
    fn pseudo_headers_can_be_asked_for_like_headers() {
        let none = vec![];
        let view = view(&none, Some("q=1"));
        assert_eq!(view.header(":path").as_deref(), Some(&b"/?q=1"[..]));
        assert_eq!(view.header("host").as_deref(), Some(&b"web"[..]));
        assert_eq!(view.header(":method").as_deref(), Some(&b"GET"[..]));
    }

    #[test]
    fn of_several_parameters_the_first_counts() {
        let none = vec![];
        let view = view(&none, Some("a=1&b&a=2&c=x=y&="));
        assert_eq!(view.query_parameter("a"), Some("1"));
        assert_eq!(view.query_parameter("b"), Some(""));
        assert_eq!(view.query_parameter("c"), Some("x=y"));
        assert_eq!(view.query_parameter("d"), None);
    }

    #[test]
    fn cookies_are_found_in_any_line_and_unquoted() {
        let headers = vec![("cookie", "ab=0; a=1"), ("cookie", "q=\"two\";empty=")];
        let view = view(&headers, None);
        assert_eq!(view.cookie("a"), Some(&b"1"[..]));
        assert_eq!(view.cookie("q"), Some(&b"two"[..]));
        assert_eq!(view.cookie("empty"), Some(&b""[..]));
        assert_eq!(view.cookie("b"), None);
    }
}
