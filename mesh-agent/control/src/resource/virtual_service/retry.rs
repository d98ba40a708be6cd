//! Conditions of a retry: the words of `retryOn`.

use std::time::Duration;

use mesh_core::route::http::RetryOn;

use crate::{problem::Problems, resource::fields::Object};

/// First back-off where nothing is said (S32).
pub(super) const BACKOFF: Duration = Duration::from_millis(25);

/// Codes of gRPC's statuses.
const CANCELLED: u8 = 1;
const DEADLINE_EXCEEDED: u8 = 4;
const RESOURCE_EXHAUSTED: u8 = 8;
const INTERNAL: u8 = 13;
const UNAVAILABLE: u8 = 14;

/// Reads `retryOn`; `None` when no word is in it.
pub(super) fn on(object: &mut Object<'_>, problems: &mut Problems) -> Option<RetryOn> {
    let text = object.text("retryOn", problems)?;
    let mut on = RetryOn::default();
    let mut any = false;
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        any = true;
        if !add(&mut on, word) {
            let (level, message) = judge(word);
            let at = object.at("retryOn");
            if level { problems.error(at, message) } else { problems.warning(at, message) }
        }
    }
    on.statuses.sort_unstable();
    on.statuses.dedup();
    on.grpc.sort_unstable();
    on.grpc.dedup();
    on.headers.dedup();
    any.then_some(on)
}

fn add(on: &mut RetryOn, word: &str) -> bool {
    match word {
        "connect-failure" => on.connect_failure = true,
        "refused-stream" => on.refused_stream = true,
        "reset" => on.reset = true,
        "reset-before-request" => on.reset_before_request = true,
        "5xx" => on.server_error = true,
        "gateway-error" => on.gateway_error = true,
        "retriable-4xx" => on.retriable_4xx = true,
        // Says that the statuses beside it count, which they do anyway.
        "retriable-status-codes" => {}
        "retriable-headers" => on.headers_of_request = true,
        "envoy-ratelimited" => on.headers.push("x-envoy-ratelimited".into()),
        "cancelled" => on.grpc.push(CANCELLED),
        "deadline-exceeded" => on.grpc.push(DEADLINE_EXCEEDED),
        "internal" => on.grpc.push(INTERNAL),
        "resource-exhausted" => on.grpc.push(RESOURCE_EXHAUSTED),
        "unavailable" => on.grpc.push(UNAVAILABLE),
        other => match other.parse::<u16>() {
            Ok(status @ 100..=599) => on.statuses.push(status),
            _ => return false,
        },
    }
    true
}

/// Whether a word that is no condition here is an error, and what to say.
fn judge(word: &str) -> (bool, String) {
    if word == "http3-post-connect-failure" {
        return (false, format!("holds {word:?}; nothing is sent by HTTP/3, it has no effect"));
    }
    let wanted =
        "wanted conditions such as connect-failure, 5xx or unavailable, or statuses, with commas between";
    (true, format!("holds {word:?}, {wanted}"))
}
