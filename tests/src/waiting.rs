//! Waiting for conditions, never for time.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// How much slower a guest under full emulation is than the machine itself.
const VM_FACTOR: u32 = 10;

/// A time limit in this environment: `base`, ten times as long in the VM tier (`MESH_TESTS_VM=1`).
#[must_use]
pub fn limit(base: Duration) -> Duration {
    if in_vm() { base * VM_FACTOR } else { base }
}

/// Whether the tests run in a guest of the VM tier.
#[must_use]
pub fn in_vm() -> bool {
    std::env::var_os("MESH_TESTS_VM").is_some_and(|value| value == "1")
}

/// The condition did not come true in time.
#[derive(Debug, thiserror::Error)]
#[error("not within {limit:?}; last seen: {last}")]
pub struct NeverHappened {
    limit: Duration,
    last: String,
}

/// Observe until `ok` holds and return that observation; `within` is scaled by [`limit`].
///
/// # Errors
/// [`NeverHappened`] with the last observation when the limit passes first.
pub fn eventually<T: Debug>(
    within: Duration,
    mut observe: impl FnMut() -> T,
    ok: impl Fn(&T) -> bool,
) -> Result<T, NeverHappened> {
    let limit = limit(within);
    let deadline = Instant::now() + limit;
    loop {
        let seen = observe();
        if ok(&seen) {
            return Ok(seen);
        }
        if Instant::now() >= deadline {
            return Err(NeverHappened { limit, last: format!("{seen:?}") });
        }
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eventually_returns_the_observation_that_satisfied_it() {
        let mut n = 0;
        let seen = eventually(
            Duration::from_secs(5),
            || {
                n += 1;
                n
            },
            |&n| n == 3,
        )
        .unwrap();
        assert_eq!(seen, 3);
    }

    #[test]
    fn eventually_reports_what_it_saw_last() {
        let error = eventually(Duration::ZERO, || "cold", |_| false).unwrap_err();
        assert!(error.to_string().contains("cold"), "{error}");
    }
}
