//! The live view: requests, edges of both nodes, and how to look around.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_tests::bookinfo::{App, NAMESPACE, TrafficReport};
use mesh_tests::{Agent, programs};
use serde_json::Value;

use crate::checks::opened;

/// Edges shown at most.
const ROWS: usize = 24;

/// Between two lines when standard output is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Clear the screen and go to its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Redraws itself on a terminal, else prints a line now and then.
#[derive(Debug)]
pub(crate) struct View {
    terminal: bool,
    look_around: String,
    newest: BTreeMap<String, Arc<Mutex<Value>>>,
    before: (Instant, TrafficReport),
    last_line: Option<Instant>,
}

impl View {
    pub(crate) fn new(app: &App<'_>, terminal: bool) -> Self {
        let newest = app.agents().iter().map(|(node, agent)| (node.clone(), follow(agent.clone()))).collect();
        let look_around = look_around(app);
        println!("{look_around}");
        Self { terminal, look_around, newest, before: (Instant::now(), app.traffic()), last_line: None }
    }

    pub(crate) fn refresh(&mut self, app: &App<'_>) -> io::Result<()> {
        let due = self.terminal || self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if !due {
            return Ok(());
        }
        let now = Instant::now();
        let traffic = app.traffic();
        let seconds = now.duration_since(self.before.0).as_secs_f64().max(0.001);
        let rate = (traffic.ok - self.before.1.ok.min(traffic.ok)) as f64 / seconds;
        let tops: Vec<(String, Value)> =
            self.newest.iter().map(|(node, top)| (node.clone(), lock(top).clone())).collect();
        let (direct, proxied) = tops.iter().fold((0, 0), |(direct, proxied), (_, top)| {
            (direct + opened(&top["rows"], "direct"), proxied + opened(&top["rows"], "proxy"))
        });
        let summary = format!(
            "{rate:.0} pages/s   p50 {:.1} ms   slowest {:.1} ms   {} pages, {} failed   connections: {direct} Direct, \
             {proxied} Proxy   reviews: {}",
            traffic.p50_us as f64 / 1e3,
            traffic.max_us as f64 / 1e3,
            traffic.ok,
            traffic.failures(),
            versions(&traffic),
        );
        let mut out = io::stdout().lock();
        if self.terminal {
            let edges = edges(&tops);
            let failures = failures(&traffic);
            write!(
                out,
                "{CLEAR}Nodemesh demo — Ctrl-C ends it\n\n{summary}\n{failures}\n{edges}\n{}",
                self.look_around
            )?;
        } else {
            writeln!(out, "{summary}")?;
        }
        out.flush()?;
        self.before = (now, traffic);
        self.last_line = Some(now);
        Ok(())
    }
}

/// Keep asking `meshctl top`, which takes as long as the interval it measures.
fn follow(agent: Agent) -> Arc<Mutex<Value>> {
    let newest = Arc::new(Mutex::new(Value::Null));
    let shown = Arc::downgrade(&newest);
    std::thread::spawn(move || {
        while let Some(shown) = shown.upgrade() {
            match agent.meshctl(&["top", "--once"]) {
                Ok(top) => *lock(&shown) = top,
                // The driver notices a dead agent by itself; do not spin meanwhile.
                Err(_) => std::thread::sleep(Duration::from_secs(1)),
            }
        }
    });
    newest
}

fn versions(traffic: &TrafficReport) -> String {
    let shares = traffic.versions.iter().map(|(version, pages)| {
        format!("{version} {:.0} %", 100.0 * *pages as f64 / traffic.ok.max(1) as f64)
    });
    shares.collect::<Vec<_>>().join(", ")
}

fn failures(traffic: &TrafficReport) -> String {
    traffic.failed.iter().fold(String::new(), |mut text, (reason, count)| {
        // Writing to a String cannot fail.
        if writeln!(text, "  {count} × {reason}").is_err() {
            text.clear();
        }
        text
    })
}

/// The busiest edges of all nodes.
fn edges(tops: &[(String, Value)]) -> String {
    let mut text = format!(
        "{:4} {:18} {:22} {:13} {:8} {:7} {:>7} {:>6} {:>9} {:>9} {:>8}\n",
        "node", "from", "to", "service", "way", "path", "conn/s", "open", "sent/s", "received", "conn µs"
    );
    let mut rows: Vec<(&str, &Value)> = tops
        .iter()
        .flat_map(|(node, top)| {
            let rows = top["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
            rows.iter().map(move |row| (node.as_str(), row))
        })
        .collect();
    rows.sort_by(|(_, one), (_, other)| number(other, "conns_per_s").total_cmp(&number(one, "conns_per_s")));
    let left_off = rows.len().saturating_sub(ROWS);
    for (node, row) in rows.into_iter().take(ROWS) {
        let line = format!(
            "{node:4} {:18} {:22} {:13} {:8} {:7} {:7.1} {:6} {:>9} {:>9} {:8.0}\n",
            short(row, "source"),
            short(row, "destination"),
            short(row, "service"),
            short(row, "direction"),
            short(row, "path"),
            number(row, "conns_per_s"),
            row["active"].as_u64().unwrap_or(0),
            bytes(number(row, "tx_bytes_per_s")),
            bytes(number(row, "rx_bytes_per_s")),
            number(row, "connect_us"),
        );
        text.push_str(&line);
    }
    if left_off > 0 {
        text.push_str(&format!("     … and {left_off} more\n"));
    }
    text
}

/// A name without the demo's own namespace.
fn short<'r>(row: &'r Value, field: &str) -> &'r str {
    let name = row[field].as_str().unwrap_or("");
    name.strip_prefix(NAMESPACE).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name)
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or(0.0)
}

fn bytes(per_second: f64) -> String {
    match per_second {
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}

/// The exact commands to look around with.
fn look_around(app: &App<'_>) -> String {
    let meshctl =
        programs::meshctl().map_or_else(|_| "meshctl".to_owned(), |path| path.display().to_string());
    let mut text = "Look around, in another terminal:\n".to_owned();
    for (number, (node, agent)) in app.agents().iter().enumerate() {
        let socket = agent.admin_socket().display();
        let questions = if number == 0 {
            let reviews = format!("explain --from {NAMESPACE}/productpage-v1-{node} --to reviews:9080");
            vec!["status".to_owned(), "connections".into(), "top".into(), "profile".into(), reviews]
        } else {
            vec!["status".to_owned(), "top".into()]
        };
        for question in questions {
            text.push_str(&format!("  {meshctl} --admin-socket {socket} {question}\n"));
        }
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
