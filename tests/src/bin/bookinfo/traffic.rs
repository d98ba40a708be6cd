//! Visitors: the product page at a steady rate, checked for completeness.

use std::cell::RefCell;
use std::io::{self, Write as _};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hyper::header::HeaderMap;
use mesh_tests::bookinfo::{ERROR_ATTRIBUTE, PAGE_PARTS, TrafficReport, VERSION_ATTRIBUTE};
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::fetch;

/// How often a report is written.
const REPORT_EVERY: Duration = Duration::from_millis(500);

/// Visits under way at once; beyond that a tick is left out, so that a stuck service does not pile them up.
const MOST_AT_ONCE: usize = 256;

/// Reasons of failures that are told apart.
const MOST_REASONS: usize = 32;

#[derive(Debug, Default)]
struct Tally {
    report: TrafficReport,
    recent_us: Vec<u64>,
    under_way: usize,
}

/// Visit until the process is ended (or nobody reads the reports any more).
pub(crate) async fn run(host: &str, per_second: u32) -> io::Result<()> {
    LocalSet::new().run_until(visit_steadily(host, per_second)).await
}

async fn visit_steadily(host: &str, per_second: u32) -> io::Result<()> {
    let tally = Rc::new(RefCell::new(Tally::default()));
    let mut visits = interval(Duration::from_secs(1) / per_second.max(1));
    visits.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reports = interval(REPORT_EVERY);
    loop {
        tokio::select! {
            _ = visits.tick() => {
                if tally.borrow().under_way < MOST_AT_ONCE {
                    tally.borrow_mut().under_way += 1;
                    tokio::task::spawn_local(visit(host.to_owned(), Rc::clone(&tally)));
                }
            }
            _ = reports.tick() => write_report(&mut tally.borrow_mut())?,
        }
    }
}

async fn visit(host: String, tally: Rc<RefCell<Tally>>) {
    let began = Instant::now();
    let fetched = fetch::get(&host, "/productpage", &HeaderMap::new(), fetch::LIMIT).await;
    let outcome = match &fetched {
        Ok(body) => version_of(&String::from_utf8_lossy(body)),
        Err(error) => Err(error.chain().trim().to_owned()),
    };
    let mut tally = tally.borrow_mut();
    tally.under_way -= 1;
    match outcome {
        Ok(version) => {
            tally.report.ok += 1;
            *tally.report.versions.entry(version).or_default() += 1;
            tally.recent_us.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
        }
        Err(reason) => {
            let known = tally.report.failed.contains_key(&reason);
            let room = tally.report.failed.len() < MOST_REASONS;
            let reason = if known || room { reason } else { "other reasons".to_owned() };
            *tally.report.failed.entry(reason).or_default() += 1;
        }
    }
}

/// The version of the reviews on a complete page, or what is missing.
fn version_of(page: &str) -> Result<String, String> {
    let error = page.split_once(ERROR_ATTRIBUTE).and_then(|(_, rest)| rest.split_once('"'));
    if let Some((error, _)) = error {
        return Err(error.to_owned());
    }
    if let Some(missing) = PAGE_PARTS.iter().find(|part| !page.contains(**part)) {
        return Err(format!("page without {missing}"));
    }
    page.split_once(VERSION_ATTRIBUTE)
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(version, _)| version.to_owned())
        .ok_or_else(|| "page without a version of its reviews".to_owned())
}

fn write_report(tally: &mut Tally) -> io::Result<()> {
    let mut recent = std::mem::take(&mut tally.recent_us);
    recent.sort_unstable();
    tally.report.p50_us = recent.get(recent.len() / 2).copied().unwrap_or(0);
    tally.report.max_us = recent.last().copied().unwrap_or(0);
    let line = serde_json::to_string(&tally.report)?;
    writeln!(io::stdout(), "{line}")
}

#[cfg(test)]
mod tests {
    use super::version_of;

    #[test]
    fn a_page_without_reviews_is_a_failure() {
        let error = version_of("<h4>Book Details</h4>").unwrap_err();
        assert!(error.contains("Book Reviews"), "{error}");
    }

    #[test]
    fn a_page_that_says_what_went_wrong_is_that_failure() {
        let page = "<h4>Book Details</h4><p data-error=\"reviews: cannot connect\">Sorry";
        assert_eq!(version_of(page), Err("reviews: cannot connect".to_owned()));
    }

    #[test]
    fn the_version_is_read_from_the_page() {
        let page = "<h4>Book Details</h4><h4>Book Reviews</h4><div data-reviews-version=\"v3\">";
        assert_eq!(version_of(page), Ok("v3".to_owned()));
    }
}
