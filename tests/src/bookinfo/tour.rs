//! The tasks of Istio's documentation that are done with Bookinfo, step by step: what is applied, what is expected, what was measured.
//!
//! `cargo xtask demo --tour` prints them, `tests/bookinfo.rs` asserts them. Every step brings all of its manifests, so that each can be
//! run alone.

mod steps;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{Answer, App, PORT, Visitor, WAIT_HEADER};
use crate::limit;

pub use steps::STEPS;

/// How long what was applied may take to show in every answer of a batch.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// Headers of a request by the user whom half of the tasks are about.
const JASON: (&str, &str) = ("end-user", "jason");

/// How long things take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// The delay in the ratings: `7s` in Istio's task.
    pub delay: &'static str,
    /// How long the product page waits for the reviews, each of two times, if not three seconds.
    pub wait: Option<Duration>,
}

impl Pace {
    /// As in the documentation.
    pub const DOCUMENTED: Self = Self { delay: "7s", wait: None };
    /// The same proportions in less time.
    pub const QUICK: Self = Self { delay: "700ms", wait: Some(Duration::from_millis(300)) };

    /// How long the product page waits in all.
    fn patience(self) -> Duration {
        2 * self.wait.unwrap_or(Duration::from_secs(3))
    }
}

/// A task.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// The manifests that are applied, and no others.
    pub manifests: &'static [&'static str],
    measure: fn(&Tour<'_>) -> anyhow::Result<Vec<Finding>>,
}

/// One thing that was expected, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What the documentation says.
    pub expected: String,
    /// What happened.
    pub measured: String,
    /// Whether they agree.
    pub holds: bool,
}

/// Somebody who goes through the tasks.
#[derive(Debug)]
pub struct Tour<'a> {
    app: &'a App<'a>,
    visitor: Visitor,
    pace: Pace,
    /// Files that are applied now, with what they hold.
    applied: RefCell<BTreeMap<&'static str, String>>,
}

impl<'a> Tour<'a> {
    /// A tour of a running application with httpbin.
    ///
    /// # Errors
    /// When the visitor's pod has no tool.
    pub fn new(app: &'a App<'a>, pace: Pace) -> anyhow::Result<Self> {
        let visitor = Visitor::new(app.pod("visitors-a")?)?;
        Ok(Self { app, visitor, pace, applied: RefCell::default() })
    }

    /// Takes one step.
    ///
    /// # Errors
    /// When something cannot be asked; what was answered wrongly is in the findings.
    pub fn take(&self, step: &Step) -> anyhow::Result<Vec<Finding>> {
        self.apply(step.manifests)?;
        let findings = (step.measure)(self).with_context(|| format!("step {}", step.name));
        self.app.check_processes()?;
        findings
    }

    /// Applies these manifests, and takes away what an earlier step applied.
    fn apply(&self, files: &'static [&'static str]) -> anyhow::Result<()> {
        let manifests = self.app.world().manifests();
        let mut applied = self.applied.borrow_mut();
        // Destinations first: a rule must not name a subset that is not there yet.
        for file in files {
            let text =
                steps::text(file)?.replace("fixedDelay: 7s", &format!("fixedDelay: {}", self.pace.delay));
            if applied.get(file) != Some(&text) {
                manifests.apply_text(&path(file), &text)?;
                applied.insert(file, text);
            }
        }
        let gone: Vec<&'static str> = applied.keys().copied().filter(|file| !files.contains(file)).collect();
        for file in gone {
            manifests.delete_file(path(file))?;
            applied.remove(file);
        }
        Ok(())
    }

    /// A product page for a user.
    fn page(&self, user: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let wait = self.pace.wait.map(|wait| wait.as_millis().to_string());
        let mut headers = user.to_vec();
        headers.extend(wait.as_deref().map(|wait| (WAIT_HEADER, wait)));
        self.patient_page(&headers)
    }

    /// The same, waited for as long as the documented page does.
    fn patient_page(&self, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let host = format!("productpage:{PORT}");
        self.visitor.get(self.app.service("productpage")?, &host, "/productpage", headers)
    }

    /// What the reviews of pages are, by how many show them.
    fn reviews(&self, count: usize, user: &[(&str, &str)]) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut seen = BTreeMap::new();
        for _ in 0..count {
            *seen.entry(self.patient_page(user)?.reviews()).or_default() += 1;
        }
        Ok(seen)
    }

    /// Looks until all of a batch is as expected, or it has taken too long: then the last batch is the finding.
    fn settled<T>(
        &self,
        expected: &str,
        mut batch: impl FnMut() -> anyhow::Result<T>,
        holds: impl Fn(&T) -> bool,
        words: impl Fn(&T) -> String,
    ) -> anyhow::Result<Finding> {
        let deadline = Instant::now() + limit(SETTLE_LIMIT);
        loop {
            let seen = batch()?;
            let holds = holds(&seen);
            if holds || Instant::now() > deadline {
                return Ok(Finding { expected: expected.to_owned(), measured: words(&seen), holds });
            }
            // Ejections, if any, end by themselves; what was applied comes within a second.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// All of so many pages show this.
    fn all_show(&self, whose: &str, user: &[(&str, &str)], shown: &str) -> anyhow::Result<Finding> {
        const COUNT: usize = 20;
        self.settled(
            &format!("{whose}: {shown}"),
            || self.reviews(COUNT, user),
            |seen| seen.len() == 1 && seen.contains_key(shown),
            |seen| shares(whose, seen, COUNT),
        )
    }
}

fn path(file: &str) -> String {
    format!("tour/{file}")
}

/// `jason: v2 18/20, v1 2/20`.
fn shares(whose: &str, seen: &BTreeMap<String, usize>, count: usize) -> String {
    let parts: Vec<String> = seen.iter().map(|(what, times)| format!("{what} {times}/{count}")).collect();
    format!("{whose}: {}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_its_manifests_and_a_name_of_its_own() {
        let mut names: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STEPS.len());
        for step in STEPS {
            for file in step.manifests {
                assert!(steps::text(file).is_ok_and(|text| text.contains("kind: ")), "{}: {file}", step.name);
            }
        }
    }
}
