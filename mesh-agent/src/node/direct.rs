//! Owns carrying the kernel's counters of Direct connections over into Istio's standard metrics.
//!
//! Invariants:
//! - What the maps held when the agent started is not counted again: to Prometheus, a restarted agent's counters
//!   begin at zero.
//! - An edge that the kernel evicted and made anew counts from zero.

use std::collections::HashMap;

use mesh_common::stats::{EdgeKey, EdgeVal, Outcome};
use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::{Name, Snapshot},
};
use mesh_proxy::{DirectTraffic, Metrics};

/// The last reading.
#[derive(Debug, Default)]
pub(super) struct Direct {
    seen: HashMap<EdgeKey, EdgeVal>,
}

impl Direct {
    /// Starts from what the kernel holds.
    pub(super) fn new(edges: &[(EdgeKey, EdgeVal)]) -> Self {
        Self { seen: edges.iter().filter(|(key, _)| is_direct(key)).copied().collect() }
    }

    /// Counts what is new since the last reading. `attested` tells the pods of this node.
    pub(super) fn fold(
        &mut self,
        edges: &[(EdgeKey, EdgeVal)],
        snapshot: &Snapshot,
        attested: impl Fn(WorkloadId) -> bool,
        metrics: &Metrics,
    ) {
        let mut moved = Vec::new();
        let now: HashMap<EdgeKey, EdgeVal> =
            edges.iter().filter(|(key, _)| is_direct(key)).copied().collect();
        for (key, value) in &now {
            let new = since(self.seen.get(key), value);
            if new != EdgeVal::ZERO {
                moved.push((key, new));
            }
        }
        if !moved.is_empty() {
            let services: HashMap<ServiceId, &Name> = snapshot.services().map(|s| (s.id, &s.name)).collect();
            for (key, new) in moved {
                metrics.add_direct(snapshot, &traffic(key, &new, &services, &attested));
            }
        }
        self.seen = now;
    }
}

fn is_direct(key: &EdgeKey) -> bool {
    key.path == Outcome::Direct as u8
}

fn since(before: Option<&EdgeVal>, now: &EdgeVal) -> EdgeVal {
    let before = before.filter(|before| before.opened <= now.opened && before.closed <= now.closed);
    let before = before.unwrap_or(&EdgeVal::ZERO);
    EdgeVal {
        opened: now.opened - before.opened,
        closed: now.closed - before.closed,
        bytes_tx: now.bytes_tx.saturating_sub(before.bytes_tx),
        bytes_rx: now.bytes_rx.saturating_sub(before.bytes_rx),
        ..EdgeVal::ZERO
    }
}

fn traffic(
    key: &EdgeKey,
    new: &EdgeVal,
    services: &HashMap<ServiceId, &Name>,
    attested: impl Fn(WorkloadId) -> bool,
) -> DirectTraffic {
    let workload = |id: u64| (id != 0).then_some(WorkloadId(id));
    let destination = workload(key.dst_workload);
    DirectTraffic {
        source: workload(key.src_workload),
        destination,
        service: services.get(&ServiceId(key.service)).map(|name| (*name).clone()),
        attested: destination.is_some_and(attested),
        opened: new.opened,
        closed: new.closed,
        to_server: new.bytes_tx,
        to_client: new.bytes_rx,
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn edge(path: Outcome, opened: u64) -> (EdgeKey, EdgeVal) {
        let key = EdgeKey { dst_workload: 7, path: path as u8, ..EdgeKey::ZERO };
        (key, EdgeVal { opened, ..EdgeVal::ZERO })
    }

    fn opened(registry: &Registry) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text.lines()
            .filter(|line| line.starts_with("istio_tcp_connections_opened_total"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    }

    #[test]
    fn only_what_is_new_since_the_last_reading_is_counted() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let mut direct = Direct::new(&[edge(Outcome::Direct, 100)]);
        let mut fold = |reading| direct.fold(&[reading], &Snapshot::default(), |_| false, &metrics);
        fold(edge(Outcome::Direct, 103));
        assert_eq!(opened(&registry), 3);
        fold(edge(Outcome::Direct, 103));
        assert_eq!(opened(&registry), 3);
        fold(edge(Outcome::Direct, 2));
        assert_eq!(opened(&registry), 5, "evicted and made anew");
        fold(edge(Outcome::Proxy, 50));
        assert_eq!(opened(&registry), 5, "the data path counts these itself");
    }
}
