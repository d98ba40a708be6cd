//! Enrolling and removing pods.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use mesh_common::{maps, pod::PodCfg};
use mesh_redirect::{EnrolError, EnrolRequest, LiveTables, Netns, NetnsError, Node};

use crate::bed::{Alive, Bed, chain};

fn pin_folder(bed: &Bed) -> std::path::PathBuf {
    bed.bpffs.join("nodemesh/test%2enode").join(format!("v{:016x}", mesh_common::abi::VERSION))
}

#[test]
fn an_enrolled_pod_is_complete_and_a_removed_one_leaves_nothing() {
    let bed = bed!();
    let node = bed.node();
    let pod = bed.pod();
    let mut request = pod.request(&node);
    request.config.probe_ports = [8080].into();
    request.config.excluded = vec!["192.0.2.0/24".parse().unwrap(), "::/0".parse().unwrap()];
    request
        .config
        .inbound_ports
        .insert(9, mesh_core::plan::PortRule { excluded: true, ..Default::default() });
    let enrolled = node.enrol(request).unwrap();
    let live = LiveTables::new(node.maps());
    let entry = live.pod(pod.netns().cookie()).unwrap().unwrap();
    assert_eq!((IpAddr::from(entry.addr4), IpAddr::from(entry.addr6)), (pod.v4, pod.v6));
    assert_eq!(live.inbound(enrolled.pod).unwrap().unwrap().incarnation, pod.netns().cookie());
    let actual = node.actual().unwrap();
    assert!(actual[&enrolled.pod].listening && actual[&enrolled.pod].applied.is_some());
    assert!(enrolled.warnings.is_empty(), "{:?}", enrolled.warnings);
    let reuse = pod.run(|| fs::read_to_string("/proc/sys/net/ipv4/tcp_tw_reuse").unwrap());
    assert_eq!(reuse.trim(), "1");
    assert!(pin_folder(&bed).join(format!("links/arrival-{}", enrolled.pod)).exists());

    node.remove(&[enrolled.pod]);
    assert!(node.actual().unwrap().is_empty());
    for map in node.map_fill().unwrap() {
        assert_eq!(map.entries, 0, "{}", map.name);
    }
    assert!(!pin_folder(&bed).join(format!("links/arrival-{}", enrolled.pod)).exists());
    assert!(node.sockets(enrolled.pod).is_none());
}

#[test]
fn a_port_the_app_holds_is_named_and_nothing_stays_behind() {
    let bed = bed!();
    let node = bed.node();
    let pod = bed.pod();
    let app = pod.run(|| TcpListener::bind((pod.v4, 15006)).unwrap());
    let error = node.enrol(pod.request(&node)).unwrap_err();
    assert!(matches!(&error, EnrolError::PortTaken { port: 15006, protocol: "TCP", .. }), "{error:?}");
    assert!(chain(&error).contains("test/pod-1") && chain(&error).contains("EADDRINUSE"), "{error}");
    for map in node.map_fill().unwrap() {
        assert_eq!(map.entries, 0, "{}", map.name);
    }
    drop(app);
    let dns = pod.run(|| UdpSocket::bind("0.0.0.0:15053").unwrap());
    let error = node.enrol(pod.request(&node)).unwrap_err();
    assert!(matches!(&error, EnrolError::PortTaken { port: 15053, protocol: "UDP", .. }), "{error:?}");
    drop(dns);
    node.enrol(pod.request(&node)).unwrap();
}

#[test]
fn the_nodes_own_namespace_and_other_files_are_no_pods() {
    let bed = bed!();
    let error = Netns::open("/proc/self/ns/net".as_ref()).unwrap_err();
    assert!(matches!(error, NetnsError::HostNetwork { .. }), "{error:?}");
    let error = Netns::open("/proc/self/ns/uts".as_ref()).unwrap_err();
    assert!(matches!(error, NetnsError::NotANamespace { .. }), "{error:?}");
    let error = Netns::open("/proc/self/ns/nothing".as_ref()).unwrap_err();
    assert!(matches!(error, NetnsError::Open { .. }), "{error:?}");
    let error = Netns::of_process(std::process::id() as i32).unwrap_err();
    assert!(matches!(error, NetnsError::HostNetwork { .. }), "{error:?}");
    drop(bed);
}

#[test]
fn a_hundred_pods_are_enrolled_in_parallel() {
    let bed = bed!();
    let node = bed.node();
    let pods: Vec<_> = (0..100).map(|_| bed.pod()).collect();
    let requests: Vec<_> = pods.iter().map(|pod| pod.request(&node)).collect();
    let started = Instant::now();
    let enrolled: Vec<_> = std::thread::scope(|scope| {
        let work = |requests: &[EnrolRequest]| -> Vec<_> {
            let each = requests.iter().map(|request| node.enrol(request.clone()));
            each.map(|result| result.unwrap_or_else(|e| panic!("{}", chain(&e)))).collect()
        };
        let workers: Vec<_> =
            requests.chunks(13).map(|requests| scope.spawn(move || work(requests))).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let took = started.elapsed();
    eprintln!("100 pods enrolled in {took:?}");
    // Natively 0.1 s; the bound leaves room for an emulated guest on a busy machine.
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(node.actual().unwrap().len(), 100);
    for (pod, enrolled) in pods.iter().zip(&enrolled) {
        assert_eq!(enrolled.sockets.netns().cookie(), pod.netns().cookie());
    }
    let started = Instant::now();
    node.remove(&enrolled.iter().map(|pod| pod.pod).collect::<Vec<_>>());
    eprintln!("100 pods removed in {:?}", started.elapsed());
    assert!(node.actual().unwrap().is_empty());
}

#[test]
fn established_connections_survive_enrolment_and_removal() {
    use std::io::{Read as _, Write as _};
    let bed = bed!();
    let node = bed.node();
    let (client, server) = (bed.pod(), bed.pod());
    let app = server.run(|| TcpListener::bind((server.v4, 8080)).unwrap());
    let mut dialled = client.run(|| TcpStream::connect(SocketAddr::new(server.v4, 8080)).unwrap());
    let (mut served, _) = app.accept().unwrap();
    let mut talk = || {
        dialled.write_all(b"x").unwrap();
        served.read_exact(&mut [0]).unwrap();
    };
    talk();
    let _alive = Alive::new(&node);
    let enrolled = [client.enrol(&node), server.enrol(&node)];
    talk();
    node.remove(&[enrolled[0].pod, enrolled[1].pod]);
    talk();
}

#[test]
fn a_full_map_is_reported_by_name_and_costs_only_the_pod_that_came_too_late() {
    let bed = bed!();
    let node = bed.node();
    let (early, late) = (bed.pod(), bed.pod());
    let _early = early.enrol(&node);
    fill_pods(&bed);
    let error = node.enrol(late.request(&node)).unwrap_err();
    assert_eq!(error.full_map(), Some(maps::PODS), "{}", chain(&error));
    let fill = node.map_fill().unwrap();
    let pods = fill.iter().find(|map| map.name == maps::PODS).unwrap();
    assert!(pods.is_nearly_full(), "{pods:?}");
    assert!(LiveTables::new(node.maps()).pod(early.netns().cookie()).unwrap().is_some());
}

fn fill_pods(bed: &Bed) {
    let map = MapData::from_pin(pin_folder(bed).join("maps").join(maps::PODS)).unwrap();
    let mut pods: HashMap<_, u64, PodCfg> = HashMap::try_from(Map::HashMap(map)).unwrap();
    for cookie in 1 << 40.. {
        let entry = PodCfg { pod: u32::MAX, ..PodCfg::ZERO };
        if pods.insert(cookie, entry, 0).is_err() {
            return;
        }
    }
}

#[test]
fn ids_of_new_pods_continue_above_what_is_pinned() {
    let bed = bed!();
    let pod = bed.pod();
    let first = {
        let node = bed.node();
        let _skipped = node.next_pod_id();
        pod.enrol(&node).pod
    };
    let node: Node = bed.node();
    assert!(node.next_pod_id() > first);
}

#[test]
fn a_sweep_sets_ticket_counts_right_and_removes_pods_of_dead_namespaces() {
    let bed = bed!();
    let gone = {
        let node = bed.node();
        let pod = bed.pod();
        pod.enrol(&node).pod
    };
    // The agent's sockets and the pod's handle are closed: the namespace dies with the last of them.
    let node = bed.node();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let swept = node.sweep(mesh_redirect::monotonic_ns()).unwrap();
        if swept.pods == 1 && swept.pins == 1 {
            break;
        }
        assert!(Instant::now() < deadline, "{swept:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!node.actual().unwrap().contains_key(&gone));

    let pod = bed.pod();
    let _enrolled = pod.enrol(&node);
    let map = MapData::from_pin(pin_folder(&bed).join("maps").join(maps::TICKETS_USED)).unwrap();
    let mut used: HashMap<_, u64, u64> = HashMap::try_from(Map::HashMap(map)).unwrap();
    used.insert(pod.netns().cookie(), 7, 0).unwrap();
    assert_eq!(node.sweep(mesh_redirect::monotonic_ns()).unwrap().counts, 1);
    assert_eq!(used.get(&pod.netns().cookie(), 0).unwrap(), 0);
}
