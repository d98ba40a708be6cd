//! Owns reading what Rust test programs print.

/// What one or many test programs reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
    /// Names of failed tests, in the order seen.
    pub(crate) failures: Vec<String>,
    /// Tests that said `SKIP` where we could see it.
    pub(crate) skipped: u64,
    /// Result lines seen: a program that dies early has none.
    results: u64,
}

impl Tally {
    /// Takes one line of output. Lines that are not libtest's change nothing.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim();
        if line.starts_with("SKIP ") {
            self.skipped += 1;
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.read_result(counts);
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }

    fn read_result(&mut self, counts: &str) {
        self.results += 1;
        // `ok. 3 passed; 0 failed; 1 ignored; …`
        for part in counts.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }

    /// One check that is not a libtest test.
    pub(crate) fn count(&mut self, name: &str, holds: bool) {
        if holds {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.push(name.to_owned());
        }
    }

    /// A program that ended badly without having reported a failure itself still failed.
    pub(crate) fn settle(&mut self, program: &str, ended_well: bool, why: &str) {
        if (!ended_well && self.failed == 0) || self.results == 0 {
            self.failed += 1;
            self.failures.push(format!("{program}: {why}"));
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.skipped += other.skipped;
        self.results += other.results;
        self.failures.extend(other.failures);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.read(line));
        tally
    }

    #[test]
    fn counts_and_names_are_read() {
        let seen = tally(
            "running 3 tests\ntest a::b ... ok\ntest c ... FAILED\ntest d ... ignored\n\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s\n",
        );
        assert_eq!((seen.passed, seen.failed, seen.ignored), (1, 1, 1));
        assert_eq!(seen.failures, ["c"]);
    }

    #[test]
    fn a_program_that_dies_without_a_result_counts_as_a_failure() {
        let mut seen = tally("running 3 tests\ntest a ... ok\n");
        seen.settle("crasher", false, "killed by signal 11");
        assert_eq!(seen.failed, 1);
        assert_eq!(seen.failures, ["crasher: killed by signal 11"]);
    }

    #[test]
    fn a_bad_exit_after_a_clean_result_is_a_failure_too() {
        let mut seen = tally("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        seen.settle("leaky", false, "exit status 1");
        assert_eq!((seen.passed, seen.failed), (2, 1));
    }

    #[test]
    fn reported_failures_are_not_counted_twice() {
        let mut seen = tally("test x ... FAILED\ntest result: FAILED. 0 passed; 1 failed; 0 ignored");
        seen.settle("program", false, "exit status 101");
        assert_eq!((seen.failed, seen.failures.len()), (1, 1));
    }
}
