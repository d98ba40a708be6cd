//! Owns the text of `meshctl profile`.

use std::fmt::Write as _;

use super::{
    figures,
    table::{Align, Table},
};
use crate::view::{HistogramView, ProfileView};

/// Characters of the longest bar.
const BAR: usize = 40;

/// The whole answer as text.
pub(super) fn render(view: &ProfileView) -> String {
    let mut out = format!("window {:.1} s\n\n", view.window_s);
    let mut table = Table::new(&[
        ("PROGRAM", Align::Left),
        ("INSTANCES", Align::Right),
        ("CALLS", Align::Right),
        ("CALLS/S", Align::Right),
        ("NS/CALL", Align::Right),
        ("CPU", Align::Right),
    ]);
    let window_s = view.window_s.max(1e-3);
    for program in &view.programs {
        table.row([
            program.program.clone(),
            program.instances.to_string(),
            program.calls.to_string(),
            figures::count(program.calls as f64 / window_s),
            program.ns_per_call.map(|ns| format!("{ns:.0}")).unwrap_or_default(),
            format!("{:.3}%", program.ns as f64 / (window_s * 1e7)),
        ]);
    }
    out.push_str(&table.render());

    let mut table = Table::new(&[
        ("HOOK", Align::Left),
        ("OUTCOME", Align::Left),
        ("REASON", Align::Left),
        ("COUNT", Align::Right),
        ("PER S", Align::Right),
    ]);
    for counter in &view.counters {
        table.row([
            counter.hook.clone(),
            counter.outcome.clone(),
            counter.reason.clone(),
            counter.count.to_string(),
            figures::count(counter.count as f64 / window_s),
        ]);
    }
    if table.is_empty() {
        out.push_str("\nno hook counted anything in the window\n");
    } else {
        out.push('\n');
        out.push_str(&table.render());
    }
    for histogram in &view.histograms {
        out.push('\n');
        if histogram.count > 0 {
            draw(&mut out, histogram, "in the window");
        } else if let Some(total) =
            view.histograms_total.iter().find(|h| h.name == histogram.name && h.count > 0)
        {
            draw(&mut out, total, "since the start; nothing in the window");
        } else {
            let _ignored = writeln!(out, "{}: nothing yet", histogram.name);
        }
    }
    out
}

fn draw(out: &mut String, histogram: &HistogramView, when: &str) {
    let value = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| figures::by_unit(&histogram.name, v));
    let _ignored = writeln!(
        out,
        "{} {when}: {} values, p50 {}, p90 {}, p99 {}",
        histogram.name,
        histogram.count,
        value(histogram.p50),
        value(histogram.p90),
        value(histogram.p99),
    );
    let largest = histogram.buckets.iter().map(|b| b.count).max().unwrap_or(1).max(1);
    for bucket in &histogram.buckets {
        // At least one mark for what is not zero.
        let marks = (bucket.count as f64 / largest as f64 * BAR as f64).ceil() as usize;
        let _ignored = writeln!(
            out,
            "  {:>8} .. {:>8} {:>9} {}",
            figures::by_unit(&histogram.name, bucket.from as f64),
            figures::by_unit(&histogram.name, bucket.to as f64),
            bucket.count,
            "#".repeat(marks.clamp(1, BAR)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{CounterView, ProgramCostView};

    fn view() -> ProfileView {
        let mut counts = [0; 64];
        counts[15] = 100;
        counts[16] = 1;
        let total = HistogramView::from_log2("srtt_us", &[0, 0, 0, 0, 0, 0, 4]);
        ProfileView {
            window_s: 2.0,
            programs: vec![ProgramCostView {
                program: "connect4".into(),
                instances: 1,
                calls: 1000,
                ns: 200_000,
                ns_per_call: Some(200.0),
            }],
            counters: vec![CounterView {
                hook: "connect4".into(),
                outcome: "direct".into(),
                reason: "verdict_allow".into(),
                count: 900,
            }],
            histograms: vec![
                HistogramView::from_log2("connect_ns", &counts),
                HistogramView::from_log2("srtt_us", &[]),
            ],
            histograms_total: vec![total],
        }
    }

    #[test]
    fn the_cost_of_a_call_and_the_counters_are_shown() {
        let text = render(&view());
        assert!(text.contains("connect4          1   1000      500      200  0.010%"), "{text}");
        assert!(text.contains("connect4  direct   verdict_allow    900    450"), "{text}");
    }

    #[test]
    fn bars_are_in_proportion_and_never_empty() {
        let text = render(&view());
        let bars: Vec<usize> = text
            .lines()
            .filter(|l| l.ends_with('#'))
            .map(|l| l.chars().filter(|c| *c == '#').count())
            .collect();
        assert_eq!(bars, [BAR, 1, BAR]);
    }

    #[test]
    fn an_empty_window_falls_back_to_the_total_and_says_so() {
        let text = render(&view());
        assert!(text.contains("srtt_us since the start; nothing in the window: 4 values"), "{text}");
    }
}
