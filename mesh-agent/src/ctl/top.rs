//! Owns `meshctl top`: the readings, the table, and redrawing it in place.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    CtlError, Output, TopArgs, figures,
    table::{Align, Table},
    write_out, yaml,
};
use crate::view::{EdgesView, TopRow, TopView, busiest, rates};

/// Runs until it is interrupted, or once. `read` takes a reading of each node.
pub(super) fn run(
    read: impl Fn() -> Result<Vec<EdgesView>, CtlError>,
    args: &TopArgs,
    out: Output,
) -> Result<(), CtlError> {
    let interval = Duration::from_secs(args.interval.into());
    let mut before = read()?;
    let mut next = Instant::now() + interval;
    loop {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let now = read()?;
        let view = of_all(&before, &now);
        before = now;
        match (out, args.once) {
            (Output::Json, _) => {
                let json = serde_json::to_string(&view).map_err(|source| CtlError::Encode { source })?;
                write_out(&format!("{json}\n"))?;
            }
            (Output::Yaml, _) => write_out(&format!("---\n{}", yaml(&view)?))?,
            (Output::Text | Output::Wide, once) => {
                let rows_max = if once { usize::MAX } else { args.rows as usize };
                let text = render(&view, rows_max, out.is_wide());
                write_out(&if once { text } else { redraw(&text) })?;
            }
        }
        if args.once {
            return Ok(());
        }
    }
}

/// The rates of all nodes that were read both times, in one view. A connection between two nodes is in it twice: outbound of the one,
/// inbound of the other.
fn of_all(before: &[EdgesView], now: &[EdgesView]) -> TopView {
    let pairs =
        now.iter().filter_map(|now| Some((before.iter().find(|before| before.node == now.node)?, now)));
    let mut views: Vec<TopView> = pairs.map(|(before, now)| rates(before, now)).collect();
    if views.len() == 1
        && let Some(only) = views.pop()
    {
        return only;
    }
    let names: Vec<&str> = views.iter().map(|view| view.node.as_str()).collect();
    let node = names.join(",");
    let interval_s = views.iter().map(|view| view.interval_s).fold(0.0, f64::max);
    let mut rows: Vec<TopRow> = views.into_iter().flat_map(|view| view.rows).collect();
    rows.sort_by(busiest);
    TopView { node, interval_s, rows }
}

/// Moves the cursor home, overwrites line by line, and clears what is below: no flicker, no alternate screen,
/// nothing to restore when the user interrupts.
fn redraw(text: &str) -> String {
    let mut out = String::from("\x1b[H");
    for line in text.lines() {
        out.push_str(line);
        out.push_str("\x1b[K\n");
    }
    out.push_str("\x1b[J");
    out
}

/// The table with a heading line; `wide` also has how many connections there were in all.
fn render(view: &TopView, rows_max: usize, wide: bool) -> String {
    let total = |value: fn(&TopRow) -> f64| view.rows.iter().map(value).sum::<f64>();
    let mut out = format!(
        "node {}   {}   {} conns/s   {} fails/s   {}/s sent   {}/s received   (over {:.1} s)\n\n",
        view.node,
        figures::counted(view.rows.len(), "edge"),
        figures::count(total(|r| r.conns_per_s)),
        figures::count(total(|r| r.fails_per_s)),
        figures::bytes(total(|r| r.tx_bytes_per_s)),
        figures::bytes(total(|r| r.rx_bytes_per_s)),
        view.interval_s,
    );
    let mut table = Table::new(&[
        ("SOURCE", Align::Left),
        ("DESTINATION", Align::Left),
        ("SERVICE", Align::Left),
        ("DIR", Align::Left),
        ("PATH", Align::Left),
        ("CONNS/S", Align::Right),
        ("FAILS/S", Align::Right),
        ("SENT/S", Align::Right),
        ("RECV/S", Align::Right),
        ("CONNECT", Align::Right),
        ("SRTT", Align::Right),
        ("OPEN", Align::Right),
    ])
    .widened(wide, &[("OPENED", Align::Right), ("FAILED", Align::Right)]);
    for row in view.rows.iter().take(rows_max) {
        let micros = |us: Option<f64>| us.map(|us| figures::nanos(us * 1e3)).unwrap_or_default();
        table.row([
            row.key.source.clone(),
            format!("{}:{}", row.key.destination, row.key.port),
            row.key.service.clone(),
            row.key.direction.clone(),
            row.key.path.as_str().to_owned(),
            figures::count(row.conns_per_s),
            figures::count(row.fails_per_s),
            figures::bytes(row.tx_bytes_per_s),
            figures::bytes(row.rx_bytes_per_s),
            micros(row.connect_us),
            micros(row.srtt_us),
            row.active.to_string(),
        ]);
        table.more([row.opened.to_string(), row.failed.to_string()]);
    }
    out.push_str(&table.render());
    if view.rows.len() > rows_max {
        out.push_str(&format!("… and {} more (--rows N)\n", view.rows.len() - rows_max));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{EdgeKeyView, Path};

    fn view(rows: usize) -> TopView {
        let row = TopRow {
            key: EdgeKeyView {
                source: "shop/cart".into(),
                destination: "shop/web-0".into(),
                service: "shop/web".into(),
                port: 8080,
                direction: "outbound".into(),
                path: Path::Direct,
            },
            conns_per_s: 120.0,
            fails_per_s: 0.0,
            tx_bytes_per_s: 2048.0,
            rx_bytes_per_s: 0.0,
            connect_us: Some(53.1),
            srtt_us: None,
            active: 4,
            opened: 500,
            failed: 0,
        };
        TopView { node: "n1".into(), interval_s: 1.0, rows: vec![row; rows] }
    }

    #[test]
    fn a_row_shows_rates_latency_and_what_is_unknown() {
        let text = render(&view(1), 10, false);
        let row = text.lines().last().unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(&cells[..6], ["shop/cart", "shop/web-0:8080", "shop/web", "outbound", "direct", "120"]);
        assert_eq!(&cells[6..], ["0", "2.00", "KiB", "0", "B", "53.1", "µs", "-", "4"]);
        assert!(text.starts_with("node n1   1 edge   120 conns/s"), "{text}");
        let wide = render(&view(1), 10, true);
        assert!(wide.lines().nth(2).is_some_and(|line| line.ends_with("OPEN  OPENED  FAILED")), "{wide}");
        assert!(wide.ends_with("   4     500       0\n"), "{wide}");
    }

    #[test]
    fn several_nodes_stand_in_one_table_and_one_that_came_late_is_left_out() {
        let edges = |node: &str, at_ns: u64| EdgesView { node: node.into(), at_ns, edges: Vec::new() };
        let before = [edges("n1", 0), edges("n2", 0)];
        let now = [edges("n1", 1_000_000_000), edges("n2", 2_000_000_000), edges("n3", 1)];
        let view = of_all(&before, &now);
        assert_eq!((view.node.as_str(), view.interval_s), ("n1,n2", 2.0));
    }

    #[test]
    fn the_live_table_is_cut_and_says_so() {
        let text = render(&view(5), 3, false);
        assert!(text.ends_with("… and 2 more (--rows N)\n"), "{text}");
    }

    #[test]
    fn redrawing_clears_each_line_and_the_rest_of_the_screen() {
        assert_eq!(redraw("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
