//! Tables of HTTP rules.

use std::{sync::Arc, time::Duration};

use crate::route::{
    Origin,
    cluster::ClusterKey,
    matching::{FullRegex, HttpMatch, StringMatch},
    variables::HeaderText,
};

/// What is done with requests to one host and port.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HttpTable {
    /// Namespace of the VirtualService that it is made of, whose delegates may be of others; none: of the Gateway API's routes. Controllers of
    /// before did not say it.
    #[serde(default)]
    pub owner: Option<Arc<str>>,
    /// In the order in which they are tried.
    pub rules: Vec<HttpRule>,
    /// For requests that no rule matches.
    pub unmatched: Action,
}

impl HttpTable {
    /// A table that is made of no VirtualService.
    pub fn new(rules: Vec<HttpRule>, unmatched: Action) -> Self {
        Self { owner: None, rules, unmatched }
    }

    /// Namespace of the VirtualService that it is made of, if it is made of one.
    pub fn virtual_service_namespace(&self) -> Option<&Arc<str>> {
        let mut own = self.rules.iter().filter(|rule| &*rule.origin.kind == "VirtualService");
        self.owner.as_ref().or_else(|| own.next().map(|rule| &rule.origin.name.namespace))
    }
}

/// Requests that match are handled so.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HttpRule {
    /// Name in logs (S15).
    pub name: Option<Arc<str>>,
    /// Where it is from.
    pub origin: Arc<Origin>,
    /// Any of these; none is every request.
    pub matches: Vec<HttpMatch>,
    /// What is done.
    pub action: Action,
    /// Over all tries and back-offs; `None` is no limit (then `grpc-timeout` counts).
    pub timeout: Option<Duration>,
    /// How tries are repeated; `None`: never.
    pub retries: Option<RetryPolicy>,
    /// Faults to inject.
    pub fault: Option<Fault>,
    /// Where copies go.
    pub mirrors: Vec<Mirror>,
    /// Cross-origin rules.
    pub cors: Option<Cors>,
    /// Changes to the request's headers, before those of the destination.
    pub request_headers: HeaderOps,
    /// Changes to the response's headers, after those of the destination.
    pub response_headers: HeaderOps,
    /// Changes to where it goes.
    pub rewrite: Rewrite,
}

impl HttpRule {
    /// A rule for every request that does this and nothing else.
    pub fn new(origin: impl Into<Arc<Origin>>, action: Action) -> Self {
        Self {
            name: None,
            origin: origin.into(),
            matches: Vec::new(),
            action,
            timeout: None,
            retries: None,
            fault: None,
            mirrors: Vec::new(),
            cors: None,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            rewrite: Rewrite::default(),
        }
    }
}

/// What is done with a request.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// To one of these, by weight. Weights are positive; there is at least one entry.
    Forward(Vec<WeightedBackend>),
    /// Answered with a redirect.
    Redirect(Redirect),
    /// Answered with this.
    Respond {
        /// Status.
        status: u16,
        /// Body.
        body: Arc<[u8]>,
        /// Why, for logs: `no_route`, `no_backend`, `direct_response` ….
        reason: Arc<str>,
    },
    /// To where it was dialled, as if there were no mesh.
    Passthrough,
}

impl Action {
    /// Where a request may be forwarded to, if it is.
    pub fn backends(&self) -> Option<&[WeightedBackend]> {
        match self {
            Self::Forward(backends) => Some(backends),
            Self::Redirect(_) | Self::Respond { .. } | Self::Passthrough => None,
        }
    }
}

/// One of several backends.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WeightedBackend {
    /// Share among its siblings, at least 1.
    pub weight: u32,
    /// Where to.
    pub backend: Backend,
    /// Changes to the request's headers.
    pub request_headers: HeaderOps,
    /// Changes to the response's headers.
    pub response_headers: HeaderOps,
}

impl WeightedBackend {
    /// The only one of its rule, which changes nothing.
    pub fn alone(backend: Backend) -> Self {
        Self {
            weight: 1,
            backend,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
        }
    }
}

/// A destination, as far as it is one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// A port of a service, or of one of its subsets.
    Cluster(ClusterKey),
    /// It does not exist or may not be referred to: its share of the requests is answered so.
    Broken {
        /// 500 by the Gateway API, 503 by Istio (S16, S115).
        status: u16,
        /// Why, for logs.
        reason: Arc<str>,
    },
}

/// Changes to headers; processed in the order remove, set, add. Names are lower case; none is `host` or begins with `:` (S18).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HeaderOps {
    /// Overwrites, sorted by name.
    pub set: Vec<(Arc<str>, HeaderText)>,
    /// Appends, sorted by name.
    pub add: Vec<(Arc<str>, HeaderText)>,
    /// Takes away.
    pub remove: Vec<Arc<str>>,
    /// `set` or `add` of `host` or `:authority`: a new authority.
    pub authority: Option<Arc<str>>,
}

impl HeaderOps {
    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes to path and authority before forwarding.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rewrite {
    /// A new authority; beats those of header operations.
    pub authority: Option<Arc<str>>,
    /// A new path; the query stays.
    pub path: Option<PathRewrite>,
}

/// A new path.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathRewrite {
    /// The matched prefix becomes this (characters or segments, as it was matched); after an exact or regex match, the whole path does (D9).
    MatchedPrefix(Arc<str>),
    /// The whole path becomes this.
    Full(Arc<str>),
    /// What the pattern finds (all occurrences) becomes this; `\1` is a group.
    Regex {
        /// Searched for; not anchored.
        pattern: SearchRegex,
        /// Put in its place.
        substitution: Arc<str>,
    },
}

/// A compiled pattern that is searched for.
#[derive(Clone, Debug)]
pub struct SearchRegex(regex::Regex);

impl SearchRegex {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// As [`FullRegex::new`].
    pub fn new(pattern: &str) -> Result<Self, regex::Error> {
        FullRegex::new(pattern)?;
        regex::Regex::new(pattern).map(Self)
    }

    /// The compiled pattern.
    pub fn regex(&self) -> &regex::Regex {
        &self.0
    }
}

impl PartialEq for SearchRegex {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for SearchRegex {}

impl serde::Serialize for SearchRegex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for SearchRegex {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pattern = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::new(&pattern).map_err(serde::de::Error::custom)
    }
}

/// An answer with `Location`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// A new scheme.
    pub scheme: Option<Arc<str>>,
    /// A new host.
    pub authority: Option<Arc<str>>,
    /// The port.
    pub port: RedirectPort,
    /// A new path.
    pub path: Option<PathRewrite>,
}

/// Port of a redirect's `Location`; left out where it is its scheme's own (S19).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RedirectPort {
    /// The default of the scheme that results (Istio's `FROM_PROTOCOL_DEFAULT`; the Gateway API when a scheme is given).
    OfScheme,
    /// What the request's authority says, unless a new scheme makes it the old one's default; none with a new authority (a VirtualService
    /// that says nothing).
    OfHost,
    /// The port that the request came to.
    OfRequest,
    /// This one.
    Number(u16),
}

/// How tries are repeated.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RetryPolicy {
    /// Tries after the first, at least 1.
    pub attempts: u32,
    /// Limit of each try; `None`: only the rule's.
    pub per_try_timeout: Option<Duration>,
    /// What makes a try worth repeating.
    pub on: RetryOn,
    /// First back-off; it doubles, with jitter, up to ten times it.
    pub backoff: Duration,
    /// What every back-off is longer by: no try begins earlier. Controllers of before do not say it.
    #[serde(default)]
    pub backoff_min: Duration,
    /// Endpoints that were tried are avoided; `None`: unless the destination is chosen by hash (S33).
    pub ignore_previous_hosts: Option<bool>,
    /// Later tries may go to farther localities.
    pub remote_localities: bool,
}

/// Conditions of a retry (S34).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RetryOn {
    /// The connection could not be made.
    pub connect_failure: bool,
    /// The stream was refused before it was processed.
    pub refused_stream: bool,
    /// No response, for whatever reason.
    pub reset: bool,
    /// No response within the limit of one try; controllers of before do not say it.
    #[serde(default)]
    pub try_timeout: bool,
    /// No response, and the request's head had not left.
    pub reset_before_request: bool,
    /// Any 5xx response or no response.
    pub server_error: bool,
    /// 502, 503, 504.
    pub gateway_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    /// These statuses.
    pub statuses: Vec<u16>,
    /// These codes of `grpc-status` in the response's headers.
    pub grpc: Vec<u8>,
    /// Responses with one of these headers, lower case.
    pub headers: Vec<Arc<str>>,
    /// Responses with one of the headers that the request names in `x-envoy-retriable-header-names` (`retriable-headers`).
    #[serde(default)]
    pub headers_of_request: bool,
}

/// A share in millionths.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Millionths(pub u32);

impl Millionths {
    /// All.
    pub const ALL: Self = Self(1_000_000);

    /// Whether a random word falls into the share.
    pub fn hits(self, draw: u32) -> bool {
        (u64::from(draw) * 1_000_000) >> 32 < u64::from(self.0)
    }
}

/// Faults, each drawn on its own (S21).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fault {
    /// Waits before anything else.
    pub delay: Option<(Millionths, Duration)>,
    /// Answers instead.
    pub abort: Option<(Millionths, Abort)>,
}

/// What an aborted request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Abort {
    /// An HTTP status.
    Http(u16),
    /// A gRPC status.
    Grpc(u8),
}

/// A destination of copies; their responses are thrown away.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mirror {
    /// Where to.
    pub backend: Backend,
    /// Of how many requests.
    pub share: Millionths,
}

/// Cross-origin rules (S22).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cors {
    /// Origins that are allowed.
    pub origins: Vec<StringMatch>,
    /// `access-control-allow-methods`.
    pub methods: Vec<Arc<str>>,
    /// `access-control-allow-headers`.
    pub headers: Vec<Arc<str>>,
    /// `access-control-expose-headers`.
    pub expose: Vec<Arc<str>>,
    /// `access-control-max-age`, whole seconds.
    pub max_age: Option<Duration>,
    /// `access-control-allow-credentials`.
    pub credentials: Option<bool>,
    /// A preflight of another origin is answered here, without any of these headers, instead of being forwarded.
    pub answer_unmatched_preflights: bool,
}
