//! How a test ends: the error type of test functions, and whether the running test has failed.

use std::cell::Cell;
use std::fmt;

/// What every test function returns; `?` works on any error.
pub type TestResult = Result<(), Failure>;

thread_local! {
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// The error a test ends with.
///
/// Making one marks the thread's test as failed *before* its locals are dropped, so that a dropping
/// [`crate::World`] knows that it has to save artefacts, for an early `?` just as for a panic.
pub struct Failure(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        FAILED.set(true);
        Self(error.into())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // libtest prints a failed test's error with Debug; the chain is what a reader wants.
        write!(f, "{:#}", self.0)
    }
}

/// Forget an earlier test's outcome: with `--test-threads=1` all tests share a thread.
pub(crate) fn reset() {
    FAILED.set(false);
}

/// Whether the test on this thread is failing: it panics right now or returned an error.
pub(crate) fn failed() -> bool {
    std::thread::panicking() || FAILED.get()
}
