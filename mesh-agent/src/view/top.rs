//! Owns the shape of the per-edge counters, and how `meshctl top` turns two readings into rates.

use std::{cmp::Ordering, collections::HashMap};

use serde::{Deserialize, Serialize};

use super::Path;

/// Totals per edge at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdgesView {
    /// Node the edges were read on.
    pub node: String,
    /// CLOCK_MONOTONIC nanoseconds of the reading.
    pub at_ns: u64,
    /// The edges.
    pub edges: Vec<EdgeView>,
}

/// Who talks to whom, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EdgeKeyView {
    /// `namespace/name` of the client pod, or its id when it is no longer known, or `unknown`.
    pub source: String,
    /// `namespace/name` of the server pod, or its id, or `unknown`.
    pub destination: String,
    /// `namespace/name` of the service, empty when a pod was dialled by its own address.
    pub service: String,
    /// Destination port.
    pub port: u16,
    /// `outbound` (seen at the client) or `inbound` (captured on arrival).
    pub direction: String,
    /// How the bytes travel.
    pub path: Path,
}

/// One edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeView {
    /// Which edge.
    #[serde(flatten)]
    pub key: EdgeKeyView,
    /// Its totals.
    #[serde(flatten)]
    pub counters: EdgeCountersView,
}

/// Totals since the agent's maps were made. May restart from zero when the kernel evicts an idle edge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeCountersView {
    /// Connections established.
    pub opened: u64,
    /// Connections closed.
    pub closed: u64,
    /// Connects that failed.
    pub failed: u64,
    /// Bytes from source to destination: at close for Direct, as they pass for Proxy.
    pub bytes_tx: u64,
    /// Bytes from destination to source.
    pub bytes_rx: u64,
    /// Retransmitted segments.
    pub retrans: u64,
    /// Sum of connect latencies over `opened`, in nanoseconds.
    pub connect_ns_sum: u64,
    /// Sum of smoothed round trip times over `closed`, in microseconds.
    pub srtt_us_sum: u64,
}

impl EdgeCountersView {
    /// Adds another reading of the same edge (per CPU, or live connections).
    pub fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.closed += other.closed;
        self.failed += other.failed;
        self.bytes_tx += other.bytes_tx;
        self.bytes_rx += other.bytes_rx;
        self.retrans += other.retrans;
        self.connect_ns_sum += other.connect_ns_sum;
        self.srtt_us_sum += other.srtt_us_sum;
    }
}

/// Rates of all edges over an interval: what `meshctl top -o json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopView {
    /// Node.
    pub node: String,
    /// Seconds between the two readings.
    pub interval_s: f64,
    /// Busiest first.
    pub rows: Vec<TopRow>,
}

/// Rates of one edge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopRow {
    /// Which edge.
    #[serde(flatten)]
    pub key: EdgeKeyView,
    /// Connections established per second.
    pub conns_per_s: f64,
    /// Connects that failed per second.
    pub fails_per_s: f64,
    /// Bytes per second from source to destination.
    pub tx_bytes_per_s: f64,
    /// Bytes per second from destination to source.
    pub rx_bytes_per_s: f64,
    /// Mean connect latency in microseconds over the interval; over all time when none was opened in it.
    pub connect_us: Option<f64>,
    /// Mean smoothed round trip time in microseconds of the connections that closed; likewise.
    pub srtt_us: Option<f64>,
    /// Connections open now.
    pub active: u64,
    /// Connections established in all.
    pub opened: u64,
    /// Connects that failed in all.
    pub failed: u64,
}

/// Rates between two readings. A counter that went backwards was restarted: its new value is the difference.
pub fn rates(before: &EdgesView, now: &EdgesView) -> TopView {
    let interval_s = (now.at_ns.saturating_sub(before.at_ns) as f64 / 1e9).max(1e-3);
    let earlier: HashMap<&EdgeKeyView, &EdgeCountersView> =
        before.edges.iter().map(|e| (&e.key, &e.counters)).collect();
    let mut rows: Vec<TopRow> = now
        .edges
        .iter()
        .map(|edge| row(&edge.key, earlier.get(&edge.key).copied(), &edge.counters, interval_s))
        .collect();
    rows.sort_by(busiest);
    TopView { node: now.node.clone(), interval_s, rows }
}

/// The order of rows: the busiest first.
pub fn busiest(a: &TopRow, b: &TopRow) -> Ordering {
    let busy = |r: &TopRow| (r.conns_per_s + r.fails_per_s, r.tx_bytes_per_s + r.rx_bytes_per_s);
    busy(b).partial_cmp(&busy(a)).unwrap_or(Ordering::Equal).then_with(|| a.key.cmp(&b.key))
}

fn row(
    key: &EdgeKeyView,
    before: Option<&EdgeCountersView>,
    now: &EdgeCountersView,
    interval_s: f64,
) -> TopRow {
    let zero = EdgeCountersView::default();
    let before = before.unwrap_or(&zero);
    let since = |old: u64, new: u64| new.checked_sub(old).unwrap_or(new);
    let per_s = |old: u64, new: u64| since(old, new) as f64 / interval_s;
    let mean = |sum: (u64, u64), count: (u64, u64)| match since(count.0, count.1) {
        0 if count.1 == 0 => None,
        0 => Some(sum.1 as f64 / count.1 as f64),
        n => Some(since(sum.0, sum.1) as f64 / n as f64),
    };
    TopRow {
        key: key.clone(),
        conns_per_s: per_s(before.opened, now.opened),
        fails_per_s: per_s(before.failed, now.failed),
        tx_bytes_per_s: per_s(before.bytes_tx, now.bytes_tx),
        rx_bytes_per_s: per_s(before.bytes_rx, now.bytes_rx),
        connect_us: mean((before.connect_ns_sum, now.connect_ns_sum), (before.opened, now.opened))
            .map(|ns| ns / 1e3),
        srtt_us: mean((before.srtt_us_sum, now.srtt_us_sum), (before.closed, now.closed)),
        active: now.opened.saturating_sub(now.closed),
        opened: now.opened,
        failed: now.failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(source: &str) -> EdgeKeyView {
        EdgeKeyView {
            source: source.into(),
            destination: "default/b".into(),
            service: "default/web".into(),
            port: 80,
            direction: "outbound".into(),
            path: Path::Direct,
        }
    }

    fn view(at_ns: u64, edges: &[(&str, EdgeCountersView)]) -> EdgesView {
        let edges = edges.iter().map(|(s, c)| EdgeView { key: key(s), counters: *c }).collect();
        EdgesView { node: "n1".into(), at_ns, edges }
    }

    fn counters(opened: u64, closed: u64, bytes_tx: u64) -> EdgeCountersView {
        EdgeCountersView {
            opened,
            closed,
            bytes_tx,
            connect_ns_sum: opened * 50_000,
            srtt_us_sum: closed * 30,
            ..EdgeCountersView::default()
        }
    }

    #[test]
    fn rates_are_differences_over_the_interval_and_the_busiest_edge_comes_first() {
        let before = view(0, &[("default/a", counters(10, 10, 1000)), ("default/c", counters(0, 0, 0))]);
        let now =
            view(2_000_000_000, &[("default/a", counters(14, 12, 5000)), ("default/c", counters(40, 40, 0))]);
        let top = rates(&before, &now);
        assert_eq!(top.interval_s, 2.0);
        assert_eq!(top.rows[0].key.source, "default/c");
        assert_eq!(top.rows[0].conns_per_s, 20.0);
        let a = &top.rows[1];
        assert_eq!((a.conns_per_s, a.tx_bytes_per_s, a.active), (2.0, 2000.0, 2));
        assert_eq!((a.connect_us, a.srtt_us), (Some(50.0), Some(30.0)));
    }

    #[test]
    fn an_edge_the_kernel_evicted_and_made_anew_counts_from_zero() {
        let before = view(0, &[("default/a", counters(1000, 1000, 0))]);
        let now = view(1_000_000_000, &[("default/a", counters(3, 3, 0))]);
        assert_eq!(rates(&before, &now).rows[0].conns_per_s, 3.0);
    }

    #[test]
    fn latency_without_a_new_connection_is_the_mean_of_all() {
        let same = counters(4, 4, 0);
        let top = rates(&view(0, &[("default/a", same)]), &view(1_000_000_000, &[("default/a", same)]));
        assert_eq!(top.rows[0].connect_us, Some(50.0));
        let never = counters(0, 0, 0);
        let top = rates(&view(0, &[("default/a", never)]), &view(1_000_000_000, &[("default/a", never)]));
        assert_eq!(top.rows[0].connect_us, None);
    }
}
