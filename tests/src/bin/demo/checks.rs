//! What must hold for the demo's traffic.

use std::fmt;

use anyhow::Context as _;
use mesh_tests::bookinfo::{App, TrafficReport};
use serde_json::Value;

/// The versions of the reviews that visitors must have seen.
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];

/// The outcome of the demo.
#[derive(Debug)]
pub(crate) struct Checks {
    traffic: TrafficReport,
    direct: u64,
    proxied: u64,
}

impl Checks {
    /// Judge what has happened so far.
    pub(crate) fn of(app: &App<'_>) -> anyhow::Result<Self> {
        let (mut direct, mut proxied) = (0, 0);
        for (node, agent) in app.agents() {
            let edges = agent.admin("/edges").with_context(|| format!("node {node}"))?;
            direct += opened(&edges["edges"], "direct");
            proxied += opened(&edges["edges"], "proxy");
        }
        Ok(Self { traffic: app.traffic(), direct, proxied })
    }

    /// Whether all of them hold.
    pub(crate) fn hold(&self) -> bool {
        self.rows().iter().all(|(holds, _)| *holds)
    }

    fn rows(&self) -> Vec<(bool, String)> {
        let TrafficReport { ok, failed, .. } = &self.traffic;
        let mut rows = vec![
            (*ok > 0, format!("{ok} product pages, each with details and reviews")),
            (failed.is_empty(), format!("{} failed requests", self.traffic.failures())),
            (self.direct > 0, format!("{} connections Direct", self.direct)),
            (self.proxied > 0, format!("{} connections by the proxy", self.proxied)),
        ];
        rows.extend(versions_seen(&self.traffic));
        rows
    }
}

impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(f, &self.rows(), &self.traffic)
    }
}

/// That visitors have seen every version of the reviews, a row each.
pub(crate) fn versions_seen(traffic: &TrafficReport) -> impl Iterator<Item = (bool, String)> {
    VERSIONS.into_iter().map(|version| {
        let pages = traffic.versions.get(version).copied().unwrap_or(0);
        (pages > 0, format!("{pages} pages with reviews {version}"))
    })
}

/// What was judged, a row each with whether it holds, and how requests failed.
pub(crate) fn show(
    f: &mut fmt::Formatter<'_>,
    rows: &[(bool, String)],
    traffic: &TrafficReport,
) -> fmt::Result {
    writeln!(f, "traffic checks:")?;
    for (holds, text) in rows {
        writeln!(f, "  {} {text}", if *holds { "ok  " } else { "FAIL" })?;
    }
    for (reason, count) in &traffic.failed {
        writeln!(f, "       {count} × {reason}")?;
    }
    Ok(())
}

/// Connections ever opened by a path, over the outbound ones of some edges.
pub(crate) fn opened(edges: &Value, path: &str) -> u64 {
    let rows = edges.as_array().map(Vec::as_slice).unwrap_or_default();
    rows.iter()
        .filter(|row| row["path"] == path && row["direction"] == "outbound")
        .filter_map(|row| row["opened"].as_u64())
        .sum()
}
