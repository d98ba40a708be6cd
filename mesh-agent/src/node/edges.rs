//! Owns what `meshctl top` and `meshctl connections` read: edges and live connections, with names.

use std::collections::BTreeMap;

use mesh_common::{
    pod::DIR_INBOUND,
    stats::{EdgeKey, EdgeVal, Outcome},
};
use mesh_proxy::{Direction, TunnelledTraffic};
use mesh_redirect::DirectFlow;

use super::names::Names;
use crate::view::{ConnectionView, ConnectionsView, EdgeCountersView, EdgeKeyView, EdgeView, Path, Security};

/// Rows of an answer about connections; more are only counted.
pub(super) const CONNECTIONS_MAX: usize = 20_000;

/// Adds up the kernel's edges, what went through tunnels, and the bytes of proxied connections that are still open, which the kernel only
/// counts when they close.
pub(super) fn edges(
    kernel: &[(EdgeKey, EdgeVal)],
    tunnelled: &[TunnelledTraffic],
    proxied: &[mesh_proxy::ConnectionView],
    names: &Names<'_>,
) -> Vec<EdgeView> {
    let mut sums: BTreeMap<EdgeKeyView, EdgeCountersView> = BTreeMap::new();
    for (key, value) in kernel {
        sums.entry(edge_key(key, names)).or_default().add(&counters(value));
    }
    for traffic in tunnelled {
        let counters = EdgeCountersView {
            opened: traffic.opened,
            closed: traffic.closed,
            failed: traffic.failed,
            bytes_tx: traffic.to_server,
            bytes_rx: traffic.to_client,
            connect_ns_sum: traffic.connect_ns,
            srtt_us_sum: traffic.srtt_us,
            ..EdgeCountersView::default()
        };
        sums.entry(tunnelled_key(traffic, names)).or_default().add(&counters);
    }
    for live in proxied {
        let Some(key) = live_key(live) else { continue };
        let so_far = EdgeCountersView {
            bytes_tx: live.bytes_to_server,
            bytes_rx: live.bytes_to_client,
            ..EdgeCountersView::default()
        };
        sums.entry(key).or_default().add(&so_far);
    }
    sums.into_iter().map(|(key, counters)| EdgeView { key, counters }).collect()
}

fn edge_key(key: &EdgeKey, names: &Names<'_>) -> EdgeKeyView {
    let inbound = u16::from(key.dir) == DIR_INBOUND;
    EdgeKeyView {
        source: names.workload(key.src_workload).unwrap_or_else(unknown),
        destination: names.workload(key.dst_workload).unwrap_or_else(unknown),
        service: names.service(key.service).unwrap_or_default(),
        port: key.port,
        direction: if inbound { Direction::Inbound } else { Direction::Outbound }.as_str().to_owned(),
        path: if key.path == Outcome::Direct as u8 { Path::Direct } else { Path::Proxy },
    }
}

fn tunnelled_key(traffic: &TunnelledTraffic, names: &Names<'_>) -> EdgeKeyView {
    let workload = |id: Option<mesh_core::id::WorkloadId>| id.and_then(|id| names.workload(id.0));
    EdgeKeyView {
        source: workload(traffic.source).unwrap_or_else(unknown),
        destination: workload(traffic.destination).unwrap_or_else(unknown),
        service: traffic.service.and_then(|id| names.service(id.0)).unwrap_or_default(),
        port: traffic.port,
        direction: Direction::Outbound.as_str().to_owned(),
        path: Path::Proxy,
    }
}

/// The edge of a proxied connection, once it is known where it goes.
fn live_key(live: &mesh_proxy::ConnectionView) -> Option<EdgeKeyView> {
    let name = |name: &Option<mesh_core::snapshot::Name>| name.as_ref().map(ToString::to_string);
    Some(EdgeKeyView {
        source: name(&live.source).unwrap_or_else(unknown),
        destination: name(&live.destination).unwrap_or_else(unknown),
        service: name(&live.service).unwrap_or_default(),
        port: live.upstream?.port(),
        direction: live.direction.as_str().to_owned(),
        path: Path::Proxy,
    })
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn counters(value: &EdgeVal) -> EdgeCountersView {
    EdgeCountersView {
        opened: value.opened,
        closed: value.closed,
        failed: value.failed,
        bytes_tx: value.bytes_tx,
        bytes_rx: value.bytes_rx,
        retrans: value.retrans,
        connect_ns_sum: value.connect_ns_sum,
        srtt_us_sum: value.srtt_us_sum,
    }
}

/// Live connections, oldest first.
pub(super) fn connections<'a>(
    direct: impl Iterator<Item = &'a DirectFlow>,
    proxied: &[mesh_proxy::ConnectionView],
    names: &Names<'_>,
    now_ns: u64,
) -> ConnectionsView {
    let direct = direct.map(|flow| direct_view(flow, names, now_ns));
    let mut rows: Vec<ConnectionView> = direct.chain(proxied.iter().map(proxied_view)).collect();
    rows.sort_by(|a, b| b.age_s.total_cmp(&a.age_s).then_with(|| a.source_addr.cmp(&b.source_addr)));
    let left_off = rows.len().saturating_sub(CONNECTIONS_MAX) as u64;
    rows.truncate(CONNECTIONS_MAX);
    ConnectionsView { connections: rows, left_off }
}

fn direct_view(flow: &DirectFlow, names: &Names<'_>, now_ns: u64) -> ConnectionView {
    // Only a ticket makes the kernel vouch for the client: it is written for pods of this node alone.
    let attested = flow.ticket;
    let destination = flow.destination.map_or(0, |id| id.0);
    ConnectionView {
        path: Path::Direct,
        direction: Direction::Outbound.as_str().to_owned(),
        source: names.workload(flow.source.0),
        source_addr: flow.client,
        destination: names.workload(destination),
        destination_addr: Some(flow.server),
        dialled: Some(flow.dialled),
        service: flow.service.and_then(|id| names.service(id.0)),
        security: if attested { Security::Kernel } else { Security::None },
        peer: names.identity(destination).filter(|_| attested),
        age_s: now_ns.saturating_sub(flow.started_ns) as f64 / 1e9,
        bytes_tx: flow.bytes.map(|bytes| bytes.sent),
        bytes_rx: flow.bytes.map(|bytes| bytes.received),
    }
}

fn proxied_view(live: &mesh_proxy::ConnectionView) -> ConnectionView {
    let name = |name: &Option<mesh_core::snapshot::Name>| name.as_ref().map(ToString::to_string);
    ConnectionView {
        path: Path::Proxy,
        direction: live.direction.as_str().to_owned(),
        source: name(&live.source),
        source_addr: live.client,
        destination: name(&live.destination),
        destination_addr: live.upstream,
        dialled: live.original_dst,
        service: name(&live.service),
        security: match live.security {
            mesh_proxy::Security::MutualTls => Security::MutualTls,
            mesh_proxy::Security::Kernel => Security::Kernel,
            mesh_proxy::Security::Plaintext => Security::None,
        },
        peer: live.peer.as_ref().map(ToString::to_string),
        age_s: live.age_ms as f64 / 1e3,
        bytes_tx: Some(live.bytes_to_server),
        bytes_rx: Some(live.bytes_to_client),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::id::WorkloadId;
    use mesh_core::snapshot::{Name, Parts, Service, Snapshot, Workload};

    use mesh_redirect::DirectBytes;

    use super::*;

    fn snapshot() -> Snapshot {
        let workloads = ["cart", "web-0"].map(|name| Arc::new(Workload::named(Name::new("shop", name))));
        let service = Arc::new(Service::named(Name::new("shop", "web")));
        Snapshot::new(1, Parts { workloads: workloads.to_vec(), services: vec![service], ..Parts::default() })
    }

    fn id(name: &str) -> u64 {
        Workload::named(Name::new("shop", name)).id.0
    }

    fn live(bytes: u64) -> mesh_proxy::ConnectionView {
        mesh_proxy::ConnectionView {
            id: 1,
            direction: Direction::Outbound,
            pod: Name::new("shop", "cart"),
            client: "10.1.0.2:40000".parse().unwrap(),
            original_dst: Some("10.96.0.1:80".parse().unwrap()),
            upstream: Some("10.1.0.3:8080".parse().unwrap()),
            service: Some(Name::new("shop", "web")),
            source: Some(Name::new("shop", "cart")),
            destination: Some(Name::new("shop", "web-0")),
            security: mesh_proxy::Security::Kernel,
            peer: None,
            bytes_to_server: bytes,
            bytes_to_client: 0,
            age_ms: 1500,
            idle_ms: 0,
        }
    }

    #[test]
    fn open_proxied_connections_add_their_bytes_to_their_edge() {
        let snapshot = snapshot();
        let service = Service::named(Name::new("shop", "web")).id.0;
        let key = EdgeKey {
            src_workload: id("cart"),
            dst_workload: id("web-0"),
            service,
            port: 8080,
            dir: 1,
            path: Outcome::Proxy as u8,
            pad: 0,
        };
        let value = EdgeVal { opened: 3, closed: 2, bytes_tx: 100, ..EdgeVal::ZERO };
        let edges = edges(&[(key, value)], &[], &[live(11)], &Names::new(&snapshot, &Arc::default()));
        assert_eq!(edges.len(), 1, "{edges:?}");
        assert_eq!(edges[0].key.source, "shop/cart");
        assert_eq!(edges[0].key.service, "shop/web");
        assert_eq!((edges[0].counters.opened, edges[0].counters.bytes_tx), (3, 111));
    }

    #[test]
    fn ids_that_are_no_longer_known_stay_visible_as_ids() {
        let snapshot = snapshot();
        let key = EdgeKey { src_workload: 0, dst_workload: 0xabc, ..EdgeKey::ZERO };
        let edges = edges(&[(key, EdgeVal::ZERO)], &[], &[], &Names::new(&snapshot, &Arc::default()));
        assert_eq!(edges[0].key.source, "unknown");
        assert_eq!(edges[0].key.destination, "w0000000000000abc");
    }

    #[test]
    fn direct_and_proxied_connections_stand_in_one_list_by_age() {
        let snapshot = snapshot();
        let flow = DirectFlow {
            pod: 1,
            source: WorkloadId(id("cart")),
            destination: Some(WorkloadId(id("web-0"))),
            service: None,
            client: "10.1.0.2:41000".parse().unwrap(),
            server: "10.1.0.3:8080".parse().unwrap(),
            dialled: "10.1.0.3:80".parse().unwrap(),
            reason: None,
            ticket: true,
            policy_gen: 1,
            started_ns: 1_000_000_000,
            bytes: Some(DirectBytes { sent: 5, received: 9 }),
        };
        let view = connections(
            [&flow].into_iter(),
            &[live(7)],
            &Names::new(&snapshot, &Arc::default()),
            2_000_000_000,
        );
        assert_eq!(view.left_off, 0);
        let [old, young] = &view.connections[..] else { panic!("{view:?}") };
        assert_eq!((old.path, old.age_s, old.bytes_tx), (Path::Proxy, 1.5, Some(7)));
        assert_eq!((young.path, young.age_s, young.bytes_tx), (Path::Direct, 1.0, Some(5)));
        assert_eq!(young.destination.as_deref(), Some("shop/web-0"));
        assert_eq!(young.service, None);
    }
}
