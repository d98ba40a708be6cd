//! A new agent takes over from a dead one, and two agents share a kernel.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use aya::maps::MapInfo;
use mesh_common::maps;
use mesh_core::plan::PodConfig;
use mesh_redirect::{EnrolRequest, Node, NodeOptions, TableWriter, VerdictEntry, Verdicts};

use crate::{
    bed::{Alive, Bed, Pod, chain, plain_backend, services},
    child,
};

fn map_ids(bpffs: &Path) -> Vec<u32> {
    let folder = bpffs.join("nodemesh/test%2enode").join(format!("v{:016x}/maps", mesh_common::abi::VERSION));
    maps::ALL.iter().map(|name| MapInfo::from_pin(folder.join(name)).unwrap().id()).collect()
}

#[test]
fn a_second_agent_adopts_pins_and_no_connect_slips_through() {
    let bed = bed!();
    let (client, server) = (bed.pod(), bed.pod());
    let mut node = bed.node();
    let mut enrolled = client.enrol(&node);
    let vip: SocketAddr = "10.96.0.1:80".parse().unwrap();
    let app = server.run(|| TcpListener::bind((server.v4, 80)).unwrap());
    std::thread::spawn(move || app.incoming().for_each(drop));
    let tables = services(&[(vip, &[plain_backend((server.v4, 80).into())])]);
    TableWriter::new(node.maps()).unwrap().apply(&tables);
    let (maps_before, links_before) = (map_ids(&bed.bpffs), link_ids(&node));

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let dialler = client.spawn({
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        move || {
            // The virtual address has no route: a connect the hook misses fails at once.
            while !stop.load(Ordering::Relaxed) {
                TcpStream::connect_timeout(&vip, Duration::from_secs(5))?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), std::io::Error>(())
        }
    });
    for _ in 0..5 {
        drop(node);
        node = bed.node();
        let status = node.status().unwrap();
        assert!(status.programs.iter().all(|program| program.attached && program.adopted), "{status:?}");
        let found = node.actual().unwrap();
        let (pod, actual) = found.first_key_value().unwrap();
        assert!(!actual.listening && actual.applied.is_none());
        drop(enrolled.listeners);
        enrolled = node
            .enrol(EnrolRequest { pod: *pod, netns: client.netns(), config: client.config() })
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert!(enrolled.adopted, "the arrival link was updated, not replaced");
        let mut writer = TableWriter::new(node.maps()).unwrap();
        let applied = writer.apply(&tables);
        assert_eq!((applied.written, applied.deleted), (0, 0), "the tables were adopted too");
    }
    stop.store(true, Ordering::Relaxed);
    dialler.join().unwrap().unwrap();
    assert!(done.load(Ordering::Relaxed) > 50, "{done:?}");
    assert_eq!(map_ids(&bed.bpffs), maps_before);
    assert_eq!(link_ids(&node), links_before);
}

fn link_ids(node: &Node) -> Vec<u32> {
    node.status().unwrap().programs.iter().map(|program| program.link_id).collect()
}

#[test]
fn a_link_on_another_or_dead_cgroup_is_not_reused() {
    let bed = bed!();
    let elsewhere = bed.cgroup.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let before = Node::open(NodeOptions { cgroup_root: Some(elsewhere.clone()), ..bed.options() }).unwrap();
    let links_before = link_ids(&before);
    drop(before);
    let node = bed.node();
    let status = node.status().unwrap();
    assert!(status.programs.iter().all(|program| program.attached && !program.adopted), "{status:?}");
    assert!(link_ids(&node).iter().all(|id| !links_before.contains(id)));
}

#[test]
fn a_pod_whose_enrolment_was_cut_short_is_taken_out() {
    let bed = bed!();
    let node = bed.node();
    let pod = bed.pod();
    let pod_id = pod.enrol(&node).pod;
    drop(node);
    // An agent that is killed before the last step leaves everything but the entry of `PODS`.
    let folder = bed.bpffs.join("nodemesh/test%2enode").join(format!("v{:016x}", mesh_common::abi::VERSION));
    let pods = aya::maps::MapData::from_pin(folder.join("maps").join(maps::PODS)).unwrap();
    let pods = aya::maps::Map::HashMap(pods);
    let mut pods: aya::maps::HashMap<_, u64, mesh_common::pod::PodCfg> = pods.try_into().unwrap();
    pods.remove(&pod.netns().cookie()).unwrap();

    let node = bed.node();
    assert!(!folder.join(format!("links/arrival-{pod_id}")).exists());
    assert!(node.map_fill().unwrap().iter().all(|map| map.entries == 0));
    assert!(!pod.enrol(&node).adopted);
}

#[test]
fn pins_of_another_abi_are_taken_over_without_a_gap_and_then_removed() {
    let bed = bed!();
    let node = bed.node();
    let pod = bed.pod();
    let pod_id = pod.enrol(&node).pod;
    let links_before = link_ids(&node);
    drop(node);
    // What an agent of another build would have left.
    let folder = bed.bpffs.join("nodemesh/test%2enode");
    let current = folder.join(format!("v{:016x}", mesh_common::abi::VERSION));
    let old = folder.join("v00000000deadbeef");
    fs::rename(&current, &old).unwrap();

    let node = bed.node();
    assert_eq!(link_ids(&node), links_before);
    assert!(node.actual().unwrap().is_empty(), "maps of another ABI are not read");
    let enrolled = pod.enrol(&node);
    assert!(enrolled.adopted, "the arrival link moved to the new version");
    assert!(!old.join(format!("links/arrival-{pod_id}")).exists());
    node.retire_old_versions();
    assert!(!old.exists());
    assert!(node.status().unwrap().programs.iter().all(|program| program.attached));
}

#[test]
fn two_agents_on_one_kernel_keep_to_their_own_cgroups() {
    let bed = bed!();
    let vip: SocketAddr = "10.96.0.1:80".parse().unwrap();
    let servers = [bed.pod(), bed.pod()];
    let clients = [bed.pod(), bed.pod()];
    let mut nodes = Vec::new();
    for (at, name) in ["a", "b"].into_iter().enumerate() {
        let root = bed.cgroup.join(name);
        fs::create_dir(&root).unwrap();
        fs::create_dir(root.join("pod")).unwrap();
        let node =
            Node::open(NodeOptions { node: name.into(), cgroup_root: Some(root), ..bed.options() }).unwrap();
        let enrolled = clients[at].enrol(&node);
        let alive = Alive::new(&node);
        let backend = plain_backend((servers[at].v4, 80).into());
        TableWriter::new(node.maps()).unwrap().apply(&services(&[(vip, &[backend])]));
        nodes.push((node, enrolled, alive));
    }
    let apps: Vec<_> =
        servers.iter().map(|pod| pod.run(|| TcpListener::bind((pod.v4, 80)).unwrap())).collect();
    for app in &apps {
        app.set_nonblocking(true).unwrap();
    }
    for (at, name) in ["a", "b"].into_iter().enumerate() {
        let group = bed.cgroup.join(name).join("pod");
        let peer = child::dial(&group, &clients[at].path(), vip).unwrap();
        assert_eq!(peer, vip.to_string());
        apps[at].accept().unwrap();
        apps[1 - at].accept().unwrap_err();
    }
    // The same namespace, but a process outside the agent's cgroup: no hook, so nobody answers.
    let error = child::dial(&bed.cgroup.join("b/pod"), &clients[0].path(), vip).unwrap_err();
    assert!(error.contains("Unreachable"), "{error}");
}

/// A verdict of the first agent, as a second one finds it after it adopted both pods with these configurations:
/// whether it still counts.
fn verdict_after_restart(
    bed: &Bed,
    client: impl FnOnce(&mut PodConfig),
    server: impl FnOnce(&mut PodConfig),
) -> bool {
    let pods = [bed.pod(), bed.pod()];
    let node = bed.node();
    let enrolled = pods.each_ref().map(|pod| pod.enrol(&node));
    let workload = pods[1].workload();
    let policy_gen = Verdicts::new(node.maps()).policy_gen(workload).unwrap().unwrap();
    let entry = VerdictEntry {
        client: pods[0].netns().cookie(),
        workload,
        incarnation: pods[1].netns().cookie(),
        port: 8080,
        v4: true,
        policy_gen,
        allow: true,
    };
    Verdicts::new(node.maps()).put(&entry).unwrap();
    let ids = enrolled.each_ref().map(|pod| pod.pod);
    drop((enrolled, node));

    let node = bed.node();
    let mut configs = pods.each_ref().map(Pod::config);
    client(&mut configs[0]);
    server(&mut configs[1]);
    let mut listeners = Vec::new();
    for ((pod, id), config) in pods.iter().zip(ids).zip(configs) {
        let request = EnrolRequest { pod: id, netns: pod.netns(), config };
        listeners.push(node.enrol(request).unwrap_or_else(|error| panic!("{}", chain(&error))));
    }
    let verdicts = Verdicts::new(node.maps());
    let stands = verdicts.policy_gen(workload).unwrap() == Some(policy_gen);
    assert_eq!(verdicts.sweep().unwrap(), u32::from(!stands));
    stands
}

#[test]
fn verdicts_outlive_a_restart_while_nothing_they_were_made_from_changed() {
    assert!(verdict_after_restart(&bed!(), |_| {}, |_| {}));
}

#[test]
fn a_policy_that_changed_while_no_agent_ran_voids_verdicts() {
    assert!(!verdict_after_restart(&bed!(), |_| {}, |server| server.policy_hash += 1));
}

#[test]
fn a_client_that_is_somebody_else_after_the_restart_inherits_no_verdict() {
    assert!(!verdict_after_restart(&bed!(), |client| client.identity_hash += 1, |_| {}));
}
