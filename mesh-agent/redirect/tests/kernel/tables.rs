//! The service tables: size, differences, and what happens when they are full.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Instant,
};

use mesh_common::{
    limits, maps,
    service::{BackendKey, ServiceKey},
};
use mesh_core::snapshot::Protocol;
use mesh_redirect::{DesiredTables, LiveTables, TableWriter, monotonic_ns};

use crate::bed::{plain_backend, services};

fn vip(number: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a60_0000 + number)), 80)
}

fn many(count: u32, backends: u32) -> DesiredTables {
    let mut tables = services(&[(vip(0), &[])]);
    let (_, template) = tables.services.drain().next().unwrap();
    for number in 0..count {
        let slots = u64::from(number) + 1;
        let key = ServiceKey { addr: vip(number).ip().into(), port: 80, proto: 6 };
        tables.services.insert(key, mesh_common::service::ServiceVal { slots, count: backends, ..template });
        for slot in 0..backends {
            let backend = plain_backend(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + slot)), 80));
            tables.backends.insert(BackendKey { slots, slot, pad: 0 }, backend);
        }
    }
    tables
}

#[test]
fn ten_thousand_services_are_written_once_and_then_only_by_difference() {
    let bed = bed!();
    let node = bed.node();
    let mut tables = many(10_000, 3);
    let mut writer = TableWriter::new(node.maps()).unwrap();
    let started = Instant::now();
    let applied = writer.apply(&tables);
    eprintln!("10 000 services with 3 backends each written in {:?}", started.elapsed());
    assert_eq!((applied.written, applied.deleted, applied.full.len()), (40_000, 0, 0));

    let key = BackendKey { slots: 7, slot: 1, pad: 0 };
    tables.backends.get_mut(&key).unwrap().port = 81;
    tables.services.retain(|key, _| key.addr != vip(8).ip().into());
    let started = Instant::now();
    let applied = writer.apply(&tables);
    eprintln!("one changed slot and one service less applied in {:?}", started.elapsed());
    assert_eq!((applied.written, applied.deleted), (1, 1));

    let started = Instant::now();
    let mut adopted = TableWriter::new(node.maps()).unwrap();
    eprintln!("tables read back in {:?}", started.elapsed());
    let applied = adopted.apply(&tables);
    assert_eq!((applied.written, applied.deleted), (0, 0));
    assert_eq!(adopted.apply(&DesiredTables::default()).deleted, 39_999);
    assert!(node.map_fill().unwrap().iter().all(|map| map.entries == 0));
}

#[test]
fn a_full_service_table_is_reported_and_the_rest_goes_on() {
    let bed = bed!();
    let node = bed.node();
    let mut writer = TableWriter::new(node.maps()).unwrap();
    let over = limits::SERVICES_MAX as u32 + 10;
    let applied = writer.apply(&many(over, 0));
    assert_eq!(applied.full.get(maps::SERVICES), Some(&10), "{applied:?}");
    let applied = writer.apply(&many(over, 0));
    assert_eq!(applied.full.get(maps::SERVICES), Some(&10), "tried again and refused again");
    let fill = node.map_fill().unwrap();
    assert!(fill.iter().any(|map| map.name == maps::SERVICES && map.is_nearly_full()));

    let applied = writer.apply(&many(100, 1));
    assert!(applied.full.is_empty(), "room again: {applied:?}");
    let live = LiveTables::new(node.maps());
    let pod = bed.pod();
    let _enrolled = pod.enrol(&node);
    let said =
        live.explain(pod.netns().cookie(), vip(99), Protocol::Tcp, monotonic_ns(), 0).unwrap().unwrap();
    assert!(said.backend.is_some());
}

#[test]
fn a_service_whose_slots_do_not_fit_gets_those_that_do_and_never_a_hole() {
    let bed = bed!();
    let node = bed.node();
    let mut writer = TableWriter::new(node.maps()).unwrap();
    let per_service = 60_000;
    let applied = writer.apply(&many(9, per_service));
    let refused = 9 * per_service as usize - limits::BACKENDS_MAX;
    assert_eq!(applied.full.get(maps::BACKENDS), Some(&refused), "{:?}", applied.full);
    let pod = bed.pod();
    let _enrolled = pod.enrol(&node);
    let live = LiveTables::new(node.maps());
    for number in 0..9 {
        for draw in [0, 1, 12_345, u32::MAX] {
            let said = live.explain(pod.netns().cookie(), vip(number), Protocol::Tcp, monotonic_ns(), draw);
            let said = said.unwrap().unwrap();
            assert!(said.slots == 0 || said.backend.is_some(), "service {number}: {said:?}");
        }
    }
}
