//! Owns counts of tunnelled connections, by who talks to which port of whom.
//!
//! Connections with a socket of their own are counted by the kernel; of a tunnel it sees one socket, whatever the number
//! of connections in it.
//!
//! Invariants:
//! - Bytes and round trip times are added when a connection ends, as the kernel does; bytes of open ones are in their own
//!   views.
//! - At most [`FLOWS_MAX`] flows; connections of further ones are counted in none.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::Snapshot,
};

use super::Metrics;

/// As many as the kernel's table of edges holds.
const FLOWS_MAX: usize = 8192;

/// Who talks to whom through tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    pub(crate) source: Option<WorkloadId>,
    pub(crate) destination: Option<WorkloadId>,
    pub(crate) service: Option<ServiceId>,
    /// The destination's own port.
    pub(crate) port: u16,
}

/// What one flow came to.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    opened: AtomicU64,
    closed: AtomicU64,
    failed: AtomicU64,
    to_server: AtomicU64,
    to_client: AtomicU64,
    connect_ns: AtomicU64,
    srtt_us: AtomicU64,
}

impl Flow {
    /// The other side took a connection, so long after it was asked.
    pub(crate) fn open(&self, after: Duration) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.connect_ns.fetch_add(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// No connection came of an attempt.
    pub(crate) fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection ended; `srtt_us` is the round trip time of its tunnel.
    pub(crate) fn close(&self, to_server: u64, to_client: u64, srtt_us: u32) {
        self.closed.fetch_add(1, Ordering::Relaxed);
        self.to_server.fetch_add(to_server, Ordering::Relaxed);
        self.to_client.fetch_add(to_client, Ordering::Relaxed);
        self.srtt_us.fetch_add(srtt_us.into(), Ordering::Relaxed);
    }
}

/// All flows of the node.
#[derive(Debug, Default)]
pub(crate) struct Flows(Mutex<HashMap<FlowKey, Arc<Flow>>>);

impl Flows {
    /// The counts of a flow; `None` when there are too many.
    pub(crate) fn flow(&self, key: FlowKey) -> Option<Arc<Flow>> {
        let mut flows = self.lock();
        if flows.len() >= FLOWS_MAX && !flows.contains_key(&key) {
            return None;
        }
        Some(Arc::clone(flows.entry(key).or_default()))
    }

    /// Forgets the flows of workloads that the snapshot does not know any more.
    pub(crate) fn retain(&self, snapshot: &Snapshot) {
        let alive = |id: Option<WorkloadId>| id.is_none_or(|id| snapshot.workload(id).is_some());
        self.lock().retain(|key, _| alive(key.source) && alive(key.destination));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FlowKey, Arc<Flow>>> {
        // The map is consistent between its calls, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Outbound connections between two workloads that went through tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelledTraffic {
    /// The client.
    pub source: Option<WorkloadId>,
    /// The server.
    pub destination: Option<WorkloadId>,
    /// The service that was dialled.
    pub service: Option<ServiceId>,
    /// The server's own port.
    pub port: u16,
    /// Connections that the other side has taken.
    pub opened: u64,
    /// Connections that ended.
    pub closed: u64,
    /// Attempts that no connection came of.
    pub failed: u64,
    /// Bytes from client to server, of connections that ended.
    pub to_server: u64,
    /// Bytes from server to client, of connections that ended.
    pub to_client: u64,
    /// Sum over `opened` of the times until the other side took the connection, in nanoseconds.
    pub connect_ns: u64,
    /// Sum over `closed` of the smoothed round trip times of their tunnels, in microseconds.
    pub srtt_us: u64,
}

impl Metrics {
    /// What went through tunnels since the start, in no order.
    pub fn tunnelled(&self) -> Vec<TunnelledTraffic> {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let flows = self.flows.lock();
        let row = |(key, flow): (&FlowKey, &Arc<Flow>)| TunnelledTraffic {
            source: key.source,
            destination: key.destination,
            service: key.service,
            port: key.port,
            opened: read(&flow.opened),
            closed: read(&flow.closed),
            failed: read(&flow.failed),
            to_server: read(&flow.to_server),
            to_client: read(&flow.to_client),
            connect_ns: read(&flow.connect_ns),
            srtt_us: read(&flow.srtt_us),
        };
        flows.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn a_flow_is_counted_by_port_and_its_bytes_when_it_ends() {
        let metrics = Metrics::register(&mut Registry::default());
        let key = FlowKey {
            source: Some(WorkloadId(1)),
            destination: Some(WorkloadId(2)),
            service: None,
            port: 80,
        };
        let flow = metrics.flows.flow(key).unwrap();
        flow.open(Duration::from_micros(3));
        flow.open(Duration::from_micros(4));
        flow.close(3, 5, 40);
        flow.fail();
        metrics.flows.flow(FlowKey { port: 81, ..key }).unwrap().open(Duration::ZERO);
        let mut rows = metrics.tunnelled();
        rows.sort_by_key(|row| row.port);
        let counts: Vec<_> =
            rows.iter().map(|r| (r.port, r.opened, r.closed, r.to_server, r.to_client)).collect();
        assert_eq!(counts, [(80, 2, 1, 3, 5), (81, 1, 0, 0, 0)]);
        assert_eq!((rows[0].failed, rows[0].connect_ns, rows[0].srtt_us), (1, 7000, 40));
        metrics.flows.retain(&Snapshot::default());
        assert!(metrics.tunnelled().is_empty(), "both are unknown");
    }

    #[test]
    fn flows_beyond_the_bound_are_not_counted() {
        let flows = Flows::default();
        let key = |n: usize| FlowKey {
            source: Some(WorkloadId(n as u64)),
            destination: None,
            service: None,
            port: 1,
        };
        assert!((0..FLOWS_MAX).all(|n| flows.flow(key(n)).is_some()));
        assert!(flows.flow(key(FLOWS_MAX)).is_none());
        assert!(flows.flow(key(0)).is_some(), "a known one is");
    }
}
