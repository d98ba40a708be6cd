//! What the programs count, and what `explain` says of the same maps.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use mesh_common::stats::{Hist, Hook, Outcome, Reason};
use mesh_core::snapshot::Protocol;
use mesh_redirect::{EventKind, Events, LiveTables, RunStats, Stats, TableWriter, monotonic_ns};

use crate::bed::{Alive, plain_backend, services};

#[test]
fn a_connection_shows_in_counters_edges_histograms_events_and_run_times() {
    let bed = bed!();
    let node = bed.node();
    let (client, server) = (bed.pod(), bed.pod());
    let _enrolled = client.enrol(&node);
    let _alive = Alive::new(&node);
    let _measuring = RunStats::enable().unwrap();
    Stats::new(node.maps()).report_connections(true).unwrap();
    let vip: SocketAddr = "10.96.0.1:80".parse().unwrap();
    TableWriter::new(node.maps())
        .unwrap()
        .apply(&services(&[(vip, &[plain_backend((server.v4, 80).into())])]));
    let app = server.run(|| TcpListener::bind((server.v4, 80)).unwrap());
    let mut dialled = client.run(|| TcpStream::connect(vip).unwrap());
    let (mut served, _) = app.accept().unwrap();
    dialled.write_all(&[7; 1000]).unwrap();
    served.read_exact(&mut [0; 1000]).unwrap();
    served.write_all(&[7; 500]).unwrap();
    dialled.read_exact(&mut [0; 500]).unwrap();

    let stats = Stats::new(node.maps());
    let (live, errors) = node.direct_connections(true);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(live.len(), 1);
    let flow = &live[0].flow;
    assert_eq!((flow.source, flow.server), (client.workload(), (server.v4, 80).into()));
    assert_eq!((flow.dialled, flow.client), (vip, dialled.local_addr().unwrap()));
    // The SYN counts as one byte.
    assert!(flow.bytes.is_some_and(|b| (1000..=1001).contains(&b.sent) && b.received == 500), "{flow:?}");
    drop((dialled, served));
    let deadline = Instant::now() + Duration::from_secs(2);
    while stats.edges().unwrap().iter().all(|(_, edge)| edge.closed == 0) {
        assert!(Instant::now() < deadline, "{:?}", stats.edges());
    }

    let counters = stats.counters().unwrap();
    let direct = counters.iter().find(|c| c.hook == Hook::Connect4 && c.outcome == Outcome::Direct).unwrap();
    assert_eq!((direct.reason, direct.count), (Reason::Unmeshed, 1));
    let edges = stats.edges().unwrap();
    assert_eq!(edges.len(), 1);
    let (key, edge) = edges[0];
    assert_eq!((key.src_workload, key.service, key.path), (client.workload().0, 500, Outcome::Direct as u8));
    assert_eq!((edge.opened, edge.closed, edge.failed), (1, 1, 0));
    assert!(edge.bytes_tx >= 1000 && edge.bytes_rx >= 500, "{edge:?}");
    let histograms = stats.histograms().unwrap();
    assert_eq!(histograms.len(), Hist::ALL.len());
    assert!(histograms.iter().all(|h| h.total() == 1 && h.quantile(0.5).is_some()), "{histograms:?}");
    assert!(node.direct_connections(false).0.is_empty());

    let mut events = Events::open(node.maps()).unwrap();
    let seen: Vec<_> = std::iter::from_fn(|| events.next_event()).collect();
    let kinds: Vec<_> = seen.iter().filter_map(EventKind::of).collect();
    assert_eq!(kinds, [EventKind::Open, EventKind::Close]);
    assert_eq!(seen[0].sock_cookie, seen[1].sock_cookie);
    assert_eq!(mesh_redirect::socket_addr(seen[1].dialled, seen[1].dialled_port), vip);
    assert!(seen[1].bytes_tx >= 1000 && seen[1].duration_ns > 0);

    let runs = node.program_runs();
    let connect4 = runs.iter().find(|program| program.name == "connect4").unwrap();
    assert!(connect4.runs >= 1 && connect4.run_time_ns > 0, "{runs:?}");
}

#[test]
fn explain_says_what_the_kernel_does() {
    let bed = bed!();
    let node = bed.node();
    let (client, server) = (bed.pod(), bed.pod());
    let enrolled = client.enrol(&node);
    let vip: SocketAddr = "10.96.0.1:80".parse().unwrap();
    let backend = plain_backend((server.v4, 80).into());
    TableWriter::new(node.maps()).unwrap().apply(&services(&[(vip, &[backend, backend])]));
    let live = LiveTables::new(node.maps());
    let ask = |cookie, to| live.explain(cookie, to, Protocol::Tcp, monotonic_ns(), 1).unwrap();
    let cookie = client.netns().cookie();
    let said = ask(cookie, vip).unwrap();
    assert_eq!((said.outcome, said.reason, said.slots), (Outcome::Direct, Reason::Unmeshed, 2));
    assert_eq!((said.backend, said.service), (Some((server.v4, 80).into()), Some(500)));
    let said = ask(cookie, "192.0.2.1:443".parse().unwrap()).unwrap();
    assert_eq!((said.outcome, said.reason), (Outcome::Bypass, Reason::UnknownDestination));
    assert_eq!(ask(cookie + 1_000_000, vip), None, "not enrolled");

    // A meshed peer elsewhere needs the agent; what happens without it depends on the agent's life.
    let mut remote = backend;
    remote.flags = mesh_common::service::PEER_MESHED;
    TableWriter::new(node.maps()).unwrap().apply(&services(&[(vip, &[remote])]));
    assert_eq!(ask(cookie, vip).unwrap().reason, Reason::AgentDown);
    let alive = Alive::new(&node);
    let said = ask(cookie, vip).unwrap();
    assert_eq!((said.outcome, said.reason), (Outcome::Proxy, Reason::RemotePeer));
    drop(enrolled.listeners);
    assert_eq!(ask(cookie, vip).unwrap().reason, Reason::NoListener);
    drop(alive);
}
