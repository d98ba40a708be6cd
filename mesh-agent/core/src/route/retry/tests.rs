//! Tests of retry conditions, back-offs and budgets.

use proptest::prelude::*;

use super::*;
use crate::route::http::Millionths;

fn policy(attempts: u32) -> RetryPolicy {
    RetryPolicy {
        attempts,
        per_try_timeout: None,
        on: RetryOn::default(),
        backoff: Duration::from_millis(25),
        backoff_min: Duration::ZERO,
        ignore_previous_hosts: None,
        remote_localities: false,
    }
}

fn on(set: impl Fn(&mut RetryOn)) -> RetryOn {
    let mut on = RetryOn::default();
    set(&mut on);
    on
}

#[test]
fn s34_conditions_mean_what_envoy_means_by_them() {
    let none: Vec<(&str, &str)> = Vec::new();
    let with = vec![("x-retry", "1")];
    let status = |status| Outcome::Response { status, headers: &none };
    let outcomes = [
        ("connect", Outcome::ConnectFailure),
        ("refused", Outcome::RefusedStream),
        ("reset before", Outcome::Reset { request_sent: false }),
        ("reset after", Outcome::Reset { request_sent: true }),
        ("timeout", Outcome::PerTryTimeout),
        ("overflow", Outcome::Overflow),
        ("200", status(200)),
        ("409", status(409)),
        ("429", status(429)),
        ("500", status(500)),
        ("502", status(502)),
        ("503", status(503)),
        ("504", status(504)),
        ("header", Outcome::Response { status: 200, headers: &with }),
    ];
    let cases: [(&str, RetryOn, &[&str]); 10] = [
        ("nothing", RetryOn::default(), &[]),
        ("connect-failure", on(|on| on.connect_failure = true), &["connect"]),
        ("refused-stream", on(|on| on.refused_stream = true), &["refused"]),
        (
            "reset",
            on(|on| on.reset = true),
            &["connect", "refused", "reset before", "reset after", "timeout"],
        ),
        ("the limit of a try", on(|on| on.try_timeout = true), &["timeout"]),
        ("reset-before-request", on(|on| on.reset_before_request = true), &["connect", "reset before"]),
        (
            "5xx",
            on(|on| on.server_error = true),
            &["connect", "refused", "reset before", "reset after", "timeout", "500", "502", "503", "504"],
        ),
        (
            "gateway-error",
            on(|on| on.gateway_error = true),
            &["connect", "refused", "reset before", "reset after", "timeout", "502", "503", "504"],
        ),
        ("retriable-4xx", on(|on| on.retriable_4xx = true), &["409"]),
        (
            "statuses and headers",
            on(|on| {
                on.statuses = vec![429, 503];
                on.headers = vec!["x-retry".into()];
            }),
            &["429", "503", "header"],
        ),
    ];
    for (name, on, expected) in cases {
        let decided: Vec<_> =
            outcomes.iter().filter(|(_, outcome)| on.decides(outcome)).map(|(name, _)| *name).collect();
        assert_eq!(decided, expected, "{name}");
    }
}

#[test]
fn s34_grpc_codes_count_in_the_responses_headers_only() {
    let unavailable = on(|on| on.grpc = vec![1, 14]);
    let decides = |headers: Vec<(&str, &str)>| {
        unavailable.decides(&Outcome::Response { status: 200, headers: &headers })
    };
    assert!(decides(vec![("grpc-status", "14")]));
    assert!(decides(vec![("grpc-status", "1")]));
    assert!(!decides(vec![("grpc-status", "0")]));
    assert!(!decides(vec![("grpc-status", "nonsense")]));
    assert!(!decides(vec![]));
}

#[test]
fn a_rate_limited_response_is_not_repeated_unless_that_is_asked_for() {
    let limited = vec![("x-envoy-ratelimited", "true")];
    let response = Outcome::Response { status: 503, headers: &limited };
    let server_error = on(|on| on.server_error = true);
    assert!(!server_error.decides(&response));
    let asked = RetryOn { headers: vec!["x-envoy-ratelimited".into()], ..server_error };
    assert!(asked.decides(&response));
}

#[test]
fn a_request_names_headers_that_make_a_response_worth_another_try_if_that_is_asked_for() {
    let request = vec![("x-envoy-retriable-header-names", "X-Busy, ,x-later")];
    let response = |name| vec![(name, "yes")];
    let asked = on(|on| on.headers_of_request = true);
    for (on, name, wanted) in [
        (&asked, "x-busy", true),
        (&asked, "x-later", true),
        (&asked, "x-other", false),
        (&RetryOn::default(), "x-busy", false),
    ] {
        let headers = response(name);
        let outcome = Outcome::Response { status: 200, headers: &headers };
        assert_eq!(on.of_request(&request).decides(&outcome), wanted, "{name}");
        assert!(!on.of_request(&vec![("host", "a")]).decides(&outcome));
    }
}

#[test]
fn grpc_timeouts_have_digits_and_a_unit() {
    let cases = [
        (&b"1H"[..], Some(Duration::from_secs(3600))),
        (b"2M", Some(Duration::from_secs(120))),
        (b"3S", Some(Duration::from_secs(3))),
        (b"4m", Some(Duration::from_millis(4))),
        (b"5u", Some(Duration::from_micros(5))),
        (b"6n", Some(Duration::from_nanos(6))),
        (b"99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
        (b"0S", Some(Duration::ZERO)),
        (b"999999999S", None),
        (b"S", None),
        (b"", None),
        (b"1", None),
        (b"-1S", None),
        (b"1s", None),
        (b"1 S", None),
    ];
    for (text, expected) in cases {
        assert_eq!(grpc_timeout(text), expected, "{}", text.escape_ascii());
    }
}

#[test]
fn s33_previous_hosts_are_avoided_unless_the_choice_is_by_hash_or_somebody_says_so() {
    assert!(policy(2).avoids_previous(false));
    assert!(!policy(2).avoids_previous(true));
    let asked = RetryPolicy { ignore_previous_hosts: Some(true), ..policy(2) };
    assert!(asked.avoids_previous(true));
    let refused = RetryPolicy { ignore_previous_hosts: Some(false), ..policy(2) };
    assert!(!refused.avoids_previous(false));
}

#[test]
fn s33_every_second_retry_goes_one_priority_farther_if_it_may() {
    let remote = RetryPolicy { remote_localities: true, ..policy(5) };
    let skipped: Vec<_> = (1..=5).map(|retry| remote.skipped_priorities(retry)).collect();
    assert_eq!(skipped, [0, 1, 1, 2, 2]);
    assert_eq!(policy(5).skipped_priorities(5), 0);
}

proptest! {
    #[test]
    fn e2_retries_never_exceed_their_share_of_what_is_active_nor_fall_below_the_minimum(
        active in any::<u32>(), share in 0_u32..=1_000_000, min_concurrency in 0_u32..10,
    ) {
        let budget = RetryBudget { share: Millionths(share), min_concurrency, interval: Duration::ZERO };
        let most = budget.retries_max(active);
        prop_assert!(most >= min_concurrency);
        let exact = f64::from(active) * f64::from(share) / 1e6;
        prop_assert!(most == min_concurrency || f64::from(most) <= exact + 1e-6);
        prop_assert!(f64::from(most) > exact - 1.0 - 1e-6);
        prop_assert!(budget.retries_max(active.saturating_add(1)) >= most);
        // Without an interval both ways say the same.
        for retries in [0, 1, most.saturating_sub(1), most] {
            prop_assert_eq!(budget.allows(retries, retries, active), retries < most);
        }
    }

    #[test]
    fn s32_back_offs_double_up_to_ten_times_the_first(retry in 1_u32..40, draw in any::<u64>()) {
        let policy = policy(40);
        let most = policy.backoff * match retry { 1 => 1, 2 => 3, 3 => 7, _ => 10 };
        prop_assert!(policy.backoff_before(retry, draw) < most);
        let longest = policy.backoff_before(retry, u64::MAX);
        prop_assert!(longest + Duration::from_nanos(1) == most, "{:?}", longest);
        prop_assert_eq!(policy.backoff_before(retry, 0), Duration::ZERO);
    }

    #[test]
    fn s35_no_back_off_is_shorter_than_the_least(
        retry in 1_u32..40, draw in any::<u64>(), least in 0_u64..u64::MAX,
    ) {
        let least = Duration::from_nanos(least);
        let without = policy(40).backoff_before(retry, draw);
        let with = RetryPolicy { backoff_min: least, ..policy(40) }.backoff_before(retry, draw);
        prop_assert_eq!(with, least + without);
    }

    #[test]
    fn grpc_timeouts_of_any_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
        let _timeout = grpc_timeout(&bytes);
    }
}

#[test]
fn codes_of_grpc_have_statuses_of_http() {
    struct One(&'static str);
    impl Headers for One {
        fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8])) {
            if name == "grpc-status" {
                each(self.0.as_bytes());
            }
        }
    }
    let statuses = [200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401];
    for (code, status) in statuses.into_iter().enumerate() {
        assert_eq!(http_status_of_grpc(u8::try_from(code).unwrap()), status, "{code}");
    }
    for (said, code) in [("0", 0), ("14", 14), ("17", 2), ("999", 2), ("ok", 2), ("", 2)] {
        assert_eq!(grpc_status_or_unknown(&One(said)), Some(code), "{said}");
    }
}
