//! Owns `meshctl top`: the readings, the table, and redrawing it in place.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    ANSWER_WITHIN, CtlError, Output, TopArgs,
    client::Client,
    figures,
    table::{Align, Table},
    write_out, yaml,
};
use crate::view::{EdgesView, TopRow, TopView, paths, rates};

/// Runs until it is interrupted, or once.
pub(super) fn run(client: &Client, args: &TopArgs, out: Output) -> Result<(), CtlError> {
    let interval = Duration::from_secs(args.interval.into());
    let read = || client.ask::<EdgesView>(paths::EDGES, &[], ANSWER_WITHIN);
    let mut before = read()?;
    let mut next = Instant::now() + interval;
    loop {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let now = read()?;
        let view = rates(&before, &now);
        before = now;
        match (out, args.once) {
            (Output::Json, _) => {
                let json = serde_json::to_string(&view).map_err(|source| CtlError::Encode { source })?;
                write_out(&format!("{json}\n"))?;
            }
            (Output::Yaml, _) => write_out(&format!("---\n{}", yaml(&view)?))?,
            (Output::Text, true) => write_out(&render(&view, usize::MAX))?,
            (Output::Text, false) => write_out(&redraw(&render(&view, args.rows as usize)))?,
        }
        if args.once {
            return Ok(());
        }
    }
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

/// The table with a heading line.
fn render(view: &TopView, rows_max: usize) -> String {
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
    ]);
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
        let text = render(&view(1), 10);
        let row = text.lines().last().unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(&cells[..6], ["shop/cart", "shop/web-0:8080", "shop/web", "outbound", "direct", "120"]);
        assert_eq!(&cells[6..], ["0", "2.00", "KiB", "0", "B", "53.1", "µs", "-", "4"]);
        assert!(text.starts_with("node n1   1 edge   120 conns/s"), "{text}");
    }

    #[test]
    fn the_live_table_is_cut_and_says_so() {
        let text = render(&view(5), 3);
        assert!(text.ends_with("… and 2 more (--rows N)\n"), "{text}");
    }

    #[test]
    fn redrawing_clears_each_line_and_the_rest_of_the_screen() {
        assert_eq!(redraw("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
