//! Owns the report of a test run: one line for each tier, failed tests by name, and the totals.

use std::time::Duration;

use super::tier::Tier;
use crate::libtest::Tally;

/// What became of a tier.
pub(super) enum Outcome {
    Ran(Tally),
    /// It cannot run on this machine; the reason.
    Skipped(String),
    /// It was not asked for, or something before it failed and is counted already; the reason.
    NotRun(String),
}

/// One line for each tier, collected while they run.
#[derive(Default)]
pub(super) struct Report {
    lines: Vec<String>,
    pub(super) total: Tally,
}

impl Report {
    /// The build that the tiers share. It counts only if it fails.
    pub(super) fn add_build(&mut self, holds: bool, took: Duration) {
        let verdict = if holds { "ok" } else { "FAILED" };
        self.lines.push(format!("{:8} {verdict:6} {:.0} s", "build", took.as_secs_f64()));
        if !holds {
            self.total.count("build", false);
        }
    }

    pub(super) fn add(&mut self, tier: Tier, outcome: Outcome, took: Duration, required: bool) {
        let name = tier.name();
        let seconds = took.as_secs_f64();
        match outcome {
            Outcome::Ran(tally) => {
                let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
                let mut line =
                    format!("{name:8} {verdict:6} {} passed, {} failed", tally.passed, tally.failed);
                for (count, what) in [(tally.ignored, "ignored"), (tally.skipped, "skipped themselves")] {
                    if count > 0 {
                        line += &format!(", {count} {what}");
                    }
                }
                self.lines.push(format!("{line}, {seconds:.0} s"));
                self.lines.extend(tally.failures.iter().map(|failure| format!("         failed: {failure}")));
                self.total.add(tally);
            }
            Outcome::Skipped(why) if required => {
                self.lines.push(format!("{name:8} FAILED could not run (MESH_TESTS_REQUIRE=1): {why}"));
                self.total.count(&name, false);
            }
            Outcome::Skipped(why) | Outcome::NotRun(why) => {
                self.lines.push(format!("{name:8} skipped: {why}"))
            }
        }
    }

    pub(super) fn print(&self) {
        println!("\n=== summary ===");
        self.lines.iter().for_each(|line| println!("{line}"));
        println!("{} passed, {} failed", self.total.passed, self.total.failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(passed: u64, failed: u64) -> Outcome {
        let mut tally = Tally::default();
        (tally.passed, tally.failed) = (passed, failed);
        Outcome::Ran(tally)
    }

    #[test]
    fn a_tier_that_cannot_run_fails_only_when_required() {
        let mut report = Report::default();
        report.add(Tier::Netns, Outcome::Skipped("no root".into()), Duration::ZERO, false);
        assert_eq!(report.total.failed, 0);
        report.add(Tier::Bpf, Outcome::Skipped("no root".into()), Duration::ZERO, true);
        assert_eq!(report.total.failed, 1);
        assert!(report.lines.iter().all(|line| line.contains("no root")));
    }

    #[test]
    fn the_total_is_the_sum_of_the_tiers() {
        let mut report = Report::default();
        report.add(Tier::Unit, ran(3, 1), Duration::ZERO, false);
        report.add(Tier::Netns, ran(4, 0), Duration::ZERO, false);
        assert_eq!((report.total.passed, report.total.failed), (7, 1));
    }

    #[test]
    fn a_failed_build_is_one_failure_however_many_tiers_wait_for_it() {
        let mut report = Report::default();
        report.add_build(false, Duration::ZERO);
        for tier in [Tier::Unit, Tier::Bpf] {
            report.add(tier, Outcome::NotRun("the workspace does not build".into()), Duration::ZERO, true);
        }
        assert_eq!(report.total.failed, 1);
    }
}
