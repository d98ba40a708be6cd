//! Owns the two outputs: rows as JSON (`design.md` §12) and a table for people.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use crate::figures::{Figures, Metric, Target, peer_target, target};

/// One figure with its baseline. Fields beyond `ratio` are additions to the fixed six.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Which way the connection went.
    pub(crate) path: String,
    /// What was measured.
    pub(crate) metric: String,
    /// Median over starts.
    pub(crate) value: f64,
    /// Unit of `value`, `min`, `max` and `baseline`.
    pub(crate) unit: String,
    /// Median of the baseline path in the same run.
    pub(crate) baseline: Option<f64>,
    /// `value / baseline`, whichever way is better.
    pub(crate) ratio: Option<f64>,
    /// Which path the baseline is.
    pub(crate) baseline_path: Option<String>,
    /// Smallest value of a start.
    pub(crate) min: f64,
    /// Largest value of a start.
    pub(crate) max: f64,
    /// Number of process starts.
    pub(crate) starts: usize,
    /// The promise, as a limit on the ratio or the value.
    pub(crate) target: Option<String>,
    /// Whether it is kept.
    pub(crate) met: Option<bool>,
    /// The same figure of another mesh in the same run.
    pub(crate) peer: Option<Peer>,
}

/// What another mesh did.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Peer {
    /// Its path.
    pub(crate) path: String,
    /// Its median.
    pub(crate) value: f64,
    /// Our value divided by it.
    pub(crate) ratio: f64,
    /// The promise, as a limit on that ratio.
    pub(crate) target: Option<String>,
    /// Whether it is kept.
    pub(crate) met: Option<bool>,
}

/// A path of the table and what it is compared with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub(crate) path: &'static str,
    /// The same way without a mesh.
    pub(crate) baseline: Option<&'static str>,
    /// The same way through another mesh.
    pub(crate) peer: Option<&'static str>,
}

/// The rows of `columns`.
pub(crate) fn rows(figures: &Figures, columns: &[Column]) -> Vec<Row> {
    columns
        .iter()
        .flat_map(|column| {
            figures.metrics(column.path).filter_map(move |(metric, _)| row(figures, *column, metric))
        })
        .collect()
}

fn row(figures: &Figures, column: Column, metric: Metric) -> Option<Row> {
    let Column { path, baseline: baseline_path, peer } = column;
    let series = figures.series(path, metric)?;
    let value = series.median()?;
    let (min, max) = series.range()?;
    let baseline = baseline_path.and_then(|path| figures.series(path, metric)?.median());
    let promise = target(path, metric);
    Some(Row {
        path: path.to_owned(),
        metric: metric.name().to_owned(),
        value,
        unit: metric.unit().to_owned(),
        baseline,
        ratio: baseline.filter(|baseline| *baseline != 0.0).map(|baseline| value / baseline),
        baseline_path: baseline.and(baseline_path).map(str::to_owned),
        min,
        max,
        starts: series.len(),
        target: promise.map(|promise| promise.text(metric)),
        met: promise.map(|promise| promise.is_met(metric, value, baseline)),
        peer: peer.and_then(|peer| beside(figures, path, peer, metric, value)),
    })
}

fn beside(figures: &Figures, ours: &str, peer: &'static str, metric: Metric, value: f64) -> Option<Peer> {
    let theirs = figures.series(peer, metric)?.median().filter(|theirs| *theirs != 0.0)?;
    let promise: Option<Target> = peer_target(ours, metric);
    Some(Peer {
        path: peer.to_owned(),
        value: theirs,
        ratio: value / theirs,
        target: promise.map(|promise| promise.text(metric)),
        met: promise.map(|promise| promise.is_met(metric, value, Some(theirs))),
    })
}

/// Write rows as one JSON array.
pub(crate) fn write_json(rows: &[Row], path: &Path) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(rows)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Print rows as a table.
pub(crate) fn print(rows: &[Row]) {
    let head = ["path", "metric", "value", "unit", "range", "baseline", "ratio", "target", "met"];
    let lines: Vec<[String; 9]> = rows
        .iter()
        .map(|row| {
            let baseline = row.baseline.map(number).unwrap_or_default();
            let of = row.baseline_path.as_deref().filter(|path| *path != "none");
            [
                row.path.clone(),
                row.metric.clone(),
                number(row.value),
                row.unit.clone(),
                format!("{}-{}", number(row.min), number(row.max)),
                of.map_or_else(|| baseline.clone(), |path| format!("{baseline} ({path})")),
                row.ratio.map(|ratio| format!("{ratio:.2}x")).unwrap_or_default(),
                row.target.clone().unwrap_or_default(),
                row.met.map(|met| if met { "yes" } else { "NO" }.to_owned()).unwrap_or_default(),
            ]
        })
        .collect();
    let mut widths = head.map(str::len);
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.len());
        }
    }
    let show = |cells: [&str; 9]| {
        let line: Vec<String> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", line.join("  ").trim_end());
    };
    show(head);
    let mut last = "";
    for (line, row) in lines.iter().zip(rows) {
        if !last.is_empty() && last != row.path {
            println!();
        }
        last = &row.path;
        show(line.each_ref().map(String::as_str));
    }
}

/// Print how we compare with other meshes, if one was measured.
pub(crate) fn print_peers(rows: &[Row]) {
    for row in rows {
        let Some(peer) = &row.peer else { continue };
        println!(
            "{} {}: {:.2}x of {} ({} {}){}",
            row.path,
            row.metric,
            peer.ratio,
            peer.path,
            number(peer.value),
            row.unit,
            match (&peer.target, peer.met) {
                (Some(target), Some(met)) => format!(", wanted {target}: {}", if met { "yes" } else { "NO" }),
                _ => String::new(),
            }
        );
    }
}

/// Three significant digits, or all digits of a large number.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures::default();
        for (value, baseline) in [(57.0, 50.0), (99.0, 52.0), (55.0, 54.0)] {
            figures.push("direct", Metric::RttP50, value);
            figures.push("none", Metric::RttP50, baseline);
        }
        figures
    }

    fn column(path: &'static str, baseline: Option<&'static str>) -> Column {
        Column { path, baseline, peer: None }
    }

    #[test]
    fn a_peer_stands_beside_and_not_in_place_of_the_baseline() {
        let mut figures = figures();
        figures.push("mtls-remote", Metric::ConnectRequestRate, 900.0);
        figures.push("envoy-tcp-mtls", Metric::ConnectRequestRate, 300.0);
        let peer = Some("envoy-tcp-mtls");
        let rows = rows(&figures, &[Column { path: "mtls-remote", baseline: None, peer }]);
        let peer = rows[0].peer.as_ref().unwrap();
        assert_eq!((rows[0].ratio, peer.ratio, peer.met), (None, 3.0, Some(true)));
    }

    #[test]
    fn a_row_compares_medians_of_the_same_run() {
        let rows = rows(&figures(), &[column("none", None), column("direct", Some("none"))]);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].value, rows[0].baseline, rows[0].met), (52.0, None, None));
        assert_eq!((rows[1].value, rows[1].baseline), (57.0, Some(52.0)));
        assert_eq!((rows[1].min, rows[1].max, rows[1].starts), (55.0, 99.0, 3));
        assert_eq!(rows[1].met, Some(false));
    }

    #[test]
    fn a_row_has_the_fixed_fields() {
        let rows = rows(&figures(), &[column("direct", Some("none"))]);
        let json = serde_json::to_value(&rows).unwrap();
        for field in ["path", "metric", "value", "unit", "baseline", "ratio"] {
            assert!(json[0].get(field).is_some(), "{field}");
        }
    }
}
