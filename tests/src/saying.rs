//! Messages from clean-up code, which must go on when nobody can read them.

use std::panic::catch_unwind;

/// Print a line to standard error (captured with a test's output), and carry on if that is impossible: a
/// terminal may have gone, and a panic while dropping would leave everything behind.
pub(crate) fn say(line: &str) {
    drop(catch_unwind(|| eprintln!("{line}")));
}
