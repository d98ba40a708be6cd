//! Whether a try is repeated, and when.

mod window;

use std::{borrow::Cow, time::Duration};

pub use window::Window;

use crate::route::{
    cluster::RetryBudget,
    http::{RetryOn, RetryPolicy},
    request::Headers,
};

/// How a try ended.
#[derive(Clone, Copy)]
pub enum Outcome<'a> {
    /// The connection could not be made, or not in time.
    ConnectFailure,
    /// The peer said that it has not processed the request (`REFUSED_STREAM`, or a `GOAWAY` below it).
    RefusedStream,
    /// No response: the connection ended or the stream was reset.
    Reset {
        /// Some of the request had left.
        request_sent: bool,
    },
    /// No response within the limit of one try.
    PerTryTimeout,
    /// A limit of ours was reached; this is never repeated.
    Overflow,
    /// The endpoint's own response; one that was made here is none (S34).
    Response {
        /// Status.
        status: u16,
        /// Headers.
        headers: &'a dyn Headers,
    },
}

impl std::fmt::Debug for Outcome<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ConnectFailure => f.write_str("ConnectFailure"),
            Self::RefusedStream => f.write_str("RefusedStream"),
            Self::Reset { request_sent } => write!(f, "Reset(request sent: {request_sent})"),
            Self::PerTryTimeout => f.write_str("PerTryTimeout"),
            Self::Overflow => f.write_str("Overflow"),
            Self::Response { status, .. } => write!(f, "Response({status})"),
        }
    }
}

impl RetryOn {
    /// Whether a try that ended so is worth repeating (S34).
    pub fn decides(&self, outcome: &Outcome<'_>) -> bool {
        // Like Envoy, a missing response counts as 5xx and as a gateway's error.
        let any_reset = self.reset || self.server_error || self.gateway_error;
        match *outcome {
            Outcome::Overflow => false,
            Outcome::ConnectFailure => any_reset || self.connect_failure || self.reset_before_request,
            Outcome::RefusedStream => any_reset || self.refused_stream,
            Outcome::Reset { request_sent } => any_reset || (self.reset_before_request && !request_sent),
            Outcome::PerTryTimeout => any_reset || self.try_timeout,
            Outcome::Response { status, headers } => self.decides_response(status, headers),
        }
    }

    /// The conditions for one request, which may name headers that make its responses worth another try.
    pub fn of_request(&self, request: &dyn Headers) -> Cow<'_, Self> {
        let names = request.first("x-envoy-retriable-header-names").filter(|_| self.headers_of_request);
        let Some(names) = names.and_then(|names| std::str::from_utf8(names).ok()) else {
            return Cow::Borrowed(self);
        };
        let mut all = self.clone();
        let names = names.split(',').map(|name| name.trim().to_ascii_lowercase());
        all.headers.extend(names.filter(|name| !name.is_empty()).map(Into::into));
        Cow::Owned(all)
    }

    fn decides_response(&self, status: u16, headers: &dyn Headers) -> bool {
        // Who is told to slow down does not try again at once.
        if headers.first("x-envoy-ratelimited").is_some() {
            return self.headers.iter().any(|name| **name == *"x-envoy-ratelimited");
        }
        (self.server_error && (500..600).contains(&status))
            || (self.gateway_error && (502..=504).contains(&status))
            || (self.retriable_4xx && status == 409)
            || self.statuses.contains(&status)
            || self.headers.iter().any(|name| headers.first(name).is_some())
            || (!self.grpc.is_empty() && grpc_status(headers).is_some_and(|code| self.grpc.contains(&code)))
    }
}

/// `grpc-status` among headers.
pub fn grpc_status(headers: &dyn Headers) -> Option<u8> {
    std::str::from_utf8(headers.first("grpc-status")?).ok()?.parse().ok()
}

/// The same, where something that is no code of gRPC's is UNKNOWN.
pub fn grpc_status_or_unknown(headers: &dyn Headers) -> Option<u8> {
    const UNKNOWN: u8 = 2;
    headers.first("grpc-status")?;
    Some(grpc_status(headers).filter(|code| *code <= 16).unwrap_or(UNKNOWN))
}

/// The status of HTTP that means about the same as a code of gRPC; 500 for what is none.
pub fn http_status_of_grpc(code: u8) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

/// The value of a `grpc-timeout` header: up to eight digits and a unit.
pub fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let amount: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// Back-offs grow up to this many times the first.
const BACKOFF_MAX_TIMES: u32 = 10;

impl RetryPolicy {
    /// How long to wait before retry number `retry` (the first is 1): `backoff_min`, and with full jitter anything from nothing to
    /// `backoff` × (2^`retry` − 1), at most ten times `backoff` (S32). `draw` is one random word.
    pub fn backoff_before(&self, retry: u32, draw: u64) -> Duration {
        let times = 1_u32.checked_shl(retry).map_or(BACKOFF_MAX_TIMES, |power| power - 1);
        let most = self.backoff.saturating_mul(times.clamp(1, BACKOFF_MAX_TIMES));
        let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        self.backoff_min.saturating_add(Duration::from_nanos(crate::balance::below(draw, nanos)))
    }

    /// Whether endpoints that were tried are avoided (S33). `by_hash`: the destination is chosen by hash.
    pub fn avoids_previous(&self, by_hash: bool) -> bool {
        self.ignore_previous_hosts.unwrap_or(!by_hash)
    }

    /// How many of the nearest priorities retry number `retry` (the first is 1) leaves out: every second retry goes one
    /// farther (S33).
    pub fn skipped_priorities(&self, retry: u32) -> u32 {
        if self.remote_localities { retry / 2 } else { 0 }
    }
}

impl RetryOn {
    /// Conditions where none are given (S31): `connect-failure,refused-stream,unavailable,cancelled`.
    pub fn built_in() -> Self {
        const CANCELLED: u8 = 1;
        const UNAVAILABLE: u8 = 14;
        Self {
            connect_failure: true,
            refused_stream: true,
            grpc: vec![CANCELLED, UNAVAILABLE],
            ..Self::default()
        }
    }
}

impl RetryPolicy {
    /// How tries are repeated when nobody says anything (fact 1).
    pub fn built_in() -> Self {
        Self {
            attempts: 2,
            per_try_timeout: None,
            on: RetryOn::built_in(),
            backoff: Duration::from_millis(25),
            backoff_min: Duration::ZERO,
            ignore_previous_hosts: None,
            remote_localities: false,
        }
    }
}

impl RetryBudget {
    /// How many retries may run at once while so many requests are active or wait for a connection (E2).
    pub fn retries_max(&self, active: u32) -> u32 {
        self.share_of(active).max(self.min_concurrency)
    }

    /// Whether there may be one more retry while so many are active, when so many retries began within the interval, or are active, of so
    /// many requests.
    pub fn allows(&self, active_retries: u32, retries: u32, requests: u32) -> bool {
        active_retries < self.min_concurrency || retries < self.share_of(requests)
    }

    fn share_of(&self, requests: u32) -> u32 {
        let share = u64::from(requests) * u64::from(self.share.0) / 1_000_000;
        u32::try_from(share).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests;
