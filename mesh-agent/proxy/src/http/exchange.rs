//! What the two halves of the HTTP path hand to each other: a request with its [`Plan`], and an [`Answer`].
//!
//! The upstream half offers `Upstreams::send(&self, request: Request<Body>, plan: Plan) -> Answer` (an async function; dropping
//! its future cancels the exchange). The request is as it shall leave: headers and path rewritten, hop-by-hop headers
//! gone, `host`/authority set, its URI in origin form for HTTP/1.1 (the upstream half puts scheme and authority back for
//! HTTP/2). The answer's headers are as they came from the server, without hop-by-hop ones.

use std::{borrow::Cow, fmt, net::SocketAddr, pin::Pin, rc::Rc, sync::Arc, time::Duration};

use hyper::Response;
use mesh_core::{
    route::{
        evaluate::RouteHit,
        http::{HttpRule, HttpTable, RetryPolicy},
    },
    snapshot::{Snapshot, Workload},
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{body::Body, interim::Interim};
pub(crate) use crate::destination::Destination;
use crate::{connections::Live, metrics::edges::Security};

/// How one request is sent.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The client's connection: its pod and address. Never its socket.
    pub(crate) live: Rc<Live>,
    /// The world that the request was routed by.
    pub(crate) snapshot: Arc<Snapshot>,
    /// Where to.
    pub(crate) destination: Destination,
    /// What it was routed by; `None` for what no table knows.
    pub(crate) route: Option<Route>,
    /// Over all tries and back-offs; `None`: no limit.
    pub(crate) timeout: Option<Duration>,
    /// Retries are allowed (never with an injected fault, S21); how is in the route's rule.
    pub(crate) retry: bool,
    /// What consistent hashing goes by.
    pub(crate) hash: Option<u64>,
    /// The client speaks HTTP/2.
    pub(crate) client_http2: bool,
    /// The request is gRPC.
    pub(crate) grpc: bool,
    /// The client asks for a protocol switch (HTTP/1.1 `upgrade`, or CONNECT): to be sent by HTTP/1.1, and answered with
    /// [`Answer::upgraded`] if the server agrees.
    pub(crate) upgrade: bool,
    /// Where copies go, already drawn.
    pub(crate) mirrors: Vec<Destination>,
    /// Who hears what is said before the response, and whether a body waits for it.
    pub(crate) interim: Option<Interim>,
}

impl Plan {
    /// How tries are repeated.
    pub(crate) fn retries(&self) -> Option<&RetryPolicy> {
        self.route.as_ref().filter(|_| self.retry)?.rule().retries.as_ref()
    }
}

/// A rule of a table.
#[derive(Clone)]
pub(crate) struct Route {
    table: Arc<HttpTable>,
    rule: usize,
    matched: Option<usize>,
}

impl Route {
    /// The rule at an index, and which of its matches held; `None` when the table has no such rule.
    pub(crate) fn new(table: Arc<HttpTable>, rule: usize, matched: Option<usize>) -> Option<Self> {
        (rule < table.rules.len()).then_some(Self { table, rule, matched })
    }

    /// The rule.
    pub(crate) fn rule(&self) -> &HttpRule {
        &self.table.rules[self.rule]
    }

    /// What it is called in logs: by its names (S15), else by where it is from.
    pub(crate) fn name(&self) -> String {
        let rule = self.rule();
        let matched = self.matched.and_then(|at| rule.matches.get(at));
        let hit = RouteHit { rule_index: self.rule, rule, match_index: self.matched, matched };
        let name = hit.name().to_string();
        if name.is_empty() { rule.origin.to_string() } else { name }
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Route({})", self.rule().origin)
    }
}

/// What came of a request.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The server's response, or why there is none.
    pub(crate) outcome: Result<Response<Body>, Failure>,
    /// The endpoint of the last try.
    pub(crate) upstream: Option<UpstreamEnd>,
    /// Tries after the first.
    pub(crate) retries: u32,
    /// What else is to be said in logs and metrics, e.g. [`Flag::RetryLimit`].
    pub(crate) flags: Flags,
    /// The server's side of a switched protocol, bytes that came with the response included.
    pub(crate) upgraded: Option<Upgraded>,
}

/// The endpoint that was asked.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamEnd {
    /// Its address.
    pub(crate) addr: SocketAddr,
    /// Its pod.
    pub(crate) workload: Option<Arc<Workload>>,
    /// What protects the way to it.
    pub(crate) security: Security,
}

/// A byte stream of a switched protocol.
pub(crate) trait Duplex: AsyncRead + AsyncWrite {}

impl<T: AsyncRead + AsyncWrite> Duplex for T {}

/// A byte stream of a switched protocol, of whatever transport.
pub(crate) struct Upgraded(pub(crate) Pin<Box<dyn Duplex>>);

impl fmt::Debug for Upgraded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Upgraded")
    }
}

/// Why there is no response of a server; becomes one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Status for plain HTTP; gRPC clients get the `grpc-status` that belongs to it.
    pub(crate) status: u16,
    /// Why, for logs and metrics.
    pub(crate) flag: Flag,
    /// Details for logs, snake case: `via_upstream`, `overflow` ….
    pub(crate) details: &'static str,
    /// What the client reads.
    pub(crate) text: Cow<'static, str>,
    /// `x-envoy-overloaded: true` is said.
    pub(crate) overloaded: bool,
}

/// Why a response is not just a server's own, in Envoy's letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Flag {
    /// `DC`: the client went away.
    DownstreamClosed,
    /// `DF`: the host that the request is for has no address.
    DnsFailure,
    /// `DI`: delayed on purpose.
    DelayInjected,
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `FI`: aborted on purpose.
    FaultInjected,
    /// `LR`: reset here.
    LocalReset,
    /// `NC`: the route's destination does not exist.
    NoCluster,
    /// `NR`: no route.
    NoRoute,
    /// `SI`: idle for too long.
    StreamIdle,
    /// `UAEX`: refused by policy.
    Unauthorized,
    /// `UC`: the server's connection broke.
    UpstreamClosed,
    /// `UF`: no connection to the server.
    UpstreamFailure,
    /// `UH`: no healthy endpoint.
    NoHealthyUpstream,
    /// `UMSDR`: the server's connection lived as long as it may.
    UpstreamMaxDuration,
    /// `UO`: a limit of the destination.
    Overflow,
    /// `UPE`: the server broke the protocol.
    UpstreamProtocolError,
    /// `UR`: the server reset the stream.
    UpstreamReset,
    /// `URX`: as many tries as there may be.
    RetryLimit,
    /// `UT`: the server took too long.
    UpstreamTimeout,
}

impl Flag {
    /// Every flag.
    pub(crate) const ALL: [Self; 19] = [
        Self::DownstreamClosed,
        Self::DnsFailure,
        Self::DelayInjected,
        Self::DownstreamProtocolError,
        Self::FaultInjected,
        Self::LocalReset,
        Self::NoCluster,
        Self::NoRoute,
        Self::StreamIdle,
        Self::Unauthorized,
        Self::UpstreamClosed,
        Self::UpstreamFailure,
        Self::NoHealthyUpstream,
        Self::UpstreamMaxDuration,
        Self::Overflow,
        Self::UpstreamProtocolError,
        Self::UpstreamReset,
        Self::RetryLimit,
        Self::UpstreamTimeout,
    ];

    /// Envoy's letters.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::DownstreamClosed => "DC",
            Self::DnsFailure => "DF",
            Self::DelayInjected => "DI",
            Self::DownstreamProtocolError => "DPE",
            Self::FaultInjected => "FI",
            Self::LocalReset => "LR",
            Self::NoCluster => "NC",
            Self::NoRoute => "NR",
            Self::StreamIdle => "SI",
            Self::Unauthorized => "UAEX",
            Self::UpstreamClosed => "UC",
            Self::UpstreamFailure => "UF",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamMaxDuration => "UMSDR",
            Self::Overflow => "UO",
            Self::UpstreamProtocolError => "UPE",
            Self::UpstreamReset => "UR",
            Self::RetryLimit => "URX",
            Self::UpstreamTimeout => "UT",
        }
    }
}

/// A set of flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Flags(u32);

impl Flags {
    /// Adds one.
    pub(crate) fn insert(&mut self, flag: Flag) {
        self.0 |= 1 << flag as u8;
    }

    /// With those of the other, too.
    pub(crate) fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there is none.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// As a number, for keys of tables.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// Whether it is in there.
    pub(crate) fn contains(self, flag: Flag) -> bool {
        self.0 & 1 << flag as u8 != 0
    }
}

impl From<Flag> for Flags {
    fn from(flag: Flag) -> Self {
        Self(1 << flag as u8)
    }
}

/// Letters joined by commas, `-` for none.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for flag in Flag::ALL.into_iter().filter(|flag| self.contains(*flag)) {
            write!(f, "{separator}{}", flag.as_str())?;
            separator = ",";
        }
        if separator.is_empty() { f.write_str("-") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_as_envoy_prints_them() {
        let mut flags = Flags::default();
        assert_eq!(flags.to_string(), "-");
        flags.insert(Flag::UpstreamFailure);
        flags.insert(Flag::RetryLimit);
        assert_eq!(flags.to_string(), "UF,URX");
        assert!(flags.contains(Flag::RetryLimit) && !flags.contains(Flag::NoRoute));
        for (index, flag) in Flag::ALL.into_iter().enumerate() {
            assert_eq!(flag as usize, index);
        }
    }
}
