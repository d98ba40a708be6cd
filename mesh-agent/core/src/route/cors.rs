//! Cross-origin requests (S22): who answers a preflight, and what a response may show to whom.

use std::{borrow::Cow, sync::Arc};

use crate::route::{http::Cors, matching::StringMatch, request::RequestView};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorsDecision {
    /// It is forwarded; its response gets nothing.
    Forward,
    /// It is forwarded; its response gets [`Cors::response_headers`].
    Share,
    /// Answered here with status 200 and [`Cors::preflight_headers`].
    Preflight,
    /// Answered here with status 200 and no header of these.
    EmptyPreflight,
}

impl Cors {
    /// What becomes of a request.
    pub fn decide(&self, request: &RequestView<'_>) -> CorsDecision {
        let Some(origin) = request.headers.first("origin").filter(|origin| !origin.is_empty()) else {
            return CorsDecision::Forward;
        };
        let wanted = request.headers.first("access-control-request-method");
        let is_preflight = request.method == "OPTIONS" && wanted.is_some_and(|method| !method.is_empty());
        match (self.allows(origin), is_preflight) {
            (true, true) => CorsDecision::Preflight,
            (true, false) => CorsDecision::Share,
            (false, true) if self.answer_unmatched_preflights => CorsDecision::EmptyPreflight,
            (false, _) => CorsDecision::Forward,
        }
    }

    fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|allowed| match allowed {
            StringMatch::Exact(any) if **any == *"*" => true,
            allowed => allowed.matches(origin),
        })
    }

    /// Headers of the answer to a preflight of an origin that is allowed.
    pub fn preflight_headers<'a>(
        &'a self,
        request: &RequestView<'a>,
    ) -> impl Iterator<Item = (&'static str, Cow<'a, [u8]>)> {
        let list = |values: &[Arc<str>], asked: &str| {
            // A browser takes `*` literally when credentials are allowed.
            if self.credentials == Some(true) && values.iter().any(|value| **value == *"*") {
                return request.headers.joined(asked);
            }
            (!values.is_empty()).then(|| Cow::Owned(values.join(",").into_bytes()))
        };
        let age = self.max_age.map(|age| Cow::Owned(age.as_secs().to_string().into_bytes()));
        let lists = [
            ("access-control-allow-methods", list(&self.methods, "access-control-request-method")),
            ("access-control-allow-headers", list(&self.headers, "access-control-request-headers")),
            ("access-control-max-age", age),
        ];
        self.shared_headers(request)
            .chain(lists.into_iter().filter_map(|(name, value)| value.map(|value| (name, value))))
    }

    /// Headers that the response to another request of an allowed origin gets, in place of its own of these names.
    pub fn response_headers<'a>(
        &'a self,
        request: &RequestView<'a>,
    ) -> impl Iterator<Item = (&'static str, Cow<'a, [u8]>)> {
        // A browser takes `*` literally when credentials are allowed.
        let exposed = self
            .expose
            .iter()
            .filter(|name| self.credentials != Some(true) || ***name != *"*")
            .map(|name| &**name);
        let exposed = exposed.collect::<Vec<_>>().join(",");
        let expose = (!exposed.is_empty())
            .then(|| ("access-control-expose-headers", Cow::Owned(exposed.into_bytes())));
        self.shared_headers(request).chain(expose)
    }

    fn shared_headers<'a>(
        &'a self,
        request: &RequestView<'a>,
    ) -> impl Iterator<Item = (&'static str, Cow<'a, [u8]>)> {
        let origin = request.headers.first("origin").map(Cow::Borrowed);
        let credentials = (self.credentials == Some(true))
            .then_some(("access-control-allow-credentials", Cow::Borrowed(&b"true"[..])));
        origin.map(|origin| ("access-control-allow-origin", origin)).into_iter().chain(credentials)
    }
}

#[cfg(test)]
mod tests;
