//! Owns adding connections that the kernel carries alone to Istio's standard series.
//!
//! Whoever reads the kernel's counters calls [`Metrics::add_direct`] with what was added since it last looked.

use mesh_core::{
    id::WorkloadId,
    snapshot::{Name, Snapshot},
};

use super::{
    Metrics,
    edges::{EdgeKey, Parties, Reporter, Security},
};
use crate::close::CloseReason;

/// Direct connections between two workloads, as far as they are new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectTraffic {
    /// The client.
    pub source: Option<WorkloadId>,
    /// The server.
    pub destination: Option<WorkloadId>,
    /// The service that was dialled.
    pub service: Option<Name>,
    /// The server is an enrolled pod of this node: the kernel attests both ends, and both are reported.
    pub attested: bool,
    /// Connections opened.
    pub opened: u64,
    /// Connections that ended.
    pub closed: u64,
    /// Bytes from the client to the server.
    pub to_server: u64,
    /// Bytes from the server to the client.
    pub to_client: u64,
}

impl Metrics {
    /// Counts Direct connections under their edge. Labels come from `snapshot`.
    pub fn add_direct(&self, snapshot: &Snapshot, traffic: &DirectTraffic) {
        let workload = |id: Option<WorkloadId>| id.and_then(|id| snapshot.workload(id)).map(|w| &**w);
        let parties = Parties {
            source: workload(traffic.source),
            destination: workload(traffic.destination),
            service: traffic
                .service
                .as_ref()
                .and_then(|name| snapshot.service(name))
                .map(|service| &**service),
            cluster_domain: snapshot.cluster_domain(),
        };
        let (reporters, security) = match traffic.attested {
            true => (&[Reporter::Source, Reporter::Destination][..], Security::Kernel),
            false => (&[Reporter::Source][..], Security::Plaintext),
        };
        for reporter in reporters {
            let key = EdgeKey {
                reporter: *reporter,
                // Ids that the snapshot lost have no labels, and would never be removed.
                source: parties.source.map(|w| w.id),
                destination: parties.destination.map(|w| w.id),
                service: parties.service.map(|s| s.id),
                security,
            };
            let edge = self.edges.edge(key, parties);
            edge.opened.inc_by(traffic.opened);
            edge.received_bytes.inc_by(traffic.to_server);
            edge.sent_bytes.inc_by(traffic.to_client);
            if traffic.closed > 0 {
                edge.closed(CloseReason::Finished).inc_by(traffic.closed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::snapshot::{Name, Parts, Workload};
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn both_ends_of_an_attested_connection_are_reported_and_one_of_any_other() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let pods = ["client", "server"].map(|name| Arc::new(Workload::named(Name::new("shop", name))));
        let snapshot = Snapshot::new(1, Parts { workloads: pods.to_vec(), ..Parts::default() });
        let traffic = DirectTraffic {
            source: Some(pods[0].id),
            destination: Some(pods[1].id),
            attested: true,
            opened: 3,
            closed: 2,
            to_server: 10,
            to_client: 20,
            ..DirectTraffic::default()
        };
        metrics.add_direct(&snapshot, &traffic);
        metrics.add_direct(&snapshot, &DirectTraffic { destination: None, attested: false, ..traffic });

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let opened = |parts: &[&str]| {
            text.lines()
                .filter(|line| line.starts_with("istio_tcp_connections_opened_total"))
                .filter(|line| parts.iter().all(|part| line.contains(part)))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
                .sum::<u64>()
        };
        assert_eq!(opened(&["reporter=\"source\"", "destination_workload=\"server\""]), 3);
        assert_eq!(opened(&["reporter=\"destination\"", "connection_security_policy=\"kernel\""]), 3);
        assert_eq!(opened(&["reporter=\"source\"", "destination_workload=\"unknown\""]), 3);
        assert_eq!(opened(&["reporter=\"destination\"", "destination_workload=\"unknown\""]), 0);
        assert!(
            text.contains("istio_tcp_sent_bytes_total{reporter=\"destination\",source_workload=\"client\"")
        );
    }
}
