//! Bookinfo: what its services and their drivers agree on, the application in a world, and the tour through Istio's tasks.

mod app;
pub mod tour;
mod visitor;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use app::{App, AppOptions, NAMESPACE, OUTSIDE_HOST};
pub use visitor::{Answer, Visitor};

/// The port of every Bookinfo service.
pub const PORT: u16 = 9080;

/// The line with which a service says that it listens.
pub const LISTENING: &str = "listening";

/// What a complete product page contains, besides the version of its reviews.
pub const PAGE_PARTS: [&str; 2] = ["<h4>Book Details</h4>", "<h4>Book Reviews</h4>"];

/// The attribute of a product page that names the version of the reviews it shows.
pub const VERSION_ATTRIBUTE: &str = "data-reviews-version=\"";

/// The attribute of a product page that says what is wrong with it.
pub const ERROR_ATTRIBUTE: &str = "data-error=\"";

/// What a reader sees when the reviews do not come.
pub const NO_REVIEWS: &str = "Sorry, product reviews are currently unavailable for this book.";

/// What a reader sees when the ratings do not come.
pub const NO_RATINGS: &str = "Ratings service is currently unavailable";

/// A request header by which the product page waits so many milliseconds for the reviews, each of two times, instead of three seconds.
pub const WAIT_HEADER: &str = "x-wait-ms";

/// What a traffic generator has seen since it started; one line of JSON each half second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// Complete pages.
    pub ok: u64,
    /// Requests that failed, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Complete pages by the version of their reviews.
    pub versions: BTreeMap<String, u64>,
    /// Median latency of the last half second's pages, µs.
    pub p50_us: u64,
    /// Slowest page of the last half second, µs.
    pub max_us: u64,
}

impl TrafficReport {
    /// Add what others have seen; latencies are those of the slower.
    pub fn add(&mut self, other: &Self) {
        self.ok += other.ok;
        for (reason, count) in &other.failed {
            *self.failed.entry(reason.clone()).or_default() += count;
        }
        for (version, count) in &other.versions {
            *self.versions.entry(version.clone()).or_default() += count;
        }
        self.p50_us = self.p50_us.max(other.p50_us);
        self.max_us = self.max_us.max(other.max_us);
    }

    /// Requests that failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}
