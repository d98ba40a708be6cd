//! What is known of pods on its way into snapshots and to the plugin.

use std::time::Duration;

use mesh_core::{
    id::WorkloadId,
    snapshot::{Parts, Workload},
};

use super::*;
use crate::cni::protocol::PodRef;

fn name() -> Name {
    Name::new("shop", "web")
}

fn workload(meshed: bool) -> Workload {
    Workload {
        id: WorkloadId::of_pod("shop", "web", "u"),
        node: "n1".into(),
        meshed,
        ..Workload::named(name())
    }
}

fn world(version: u64, meshed: bool) -> Arc<Snapshot> {
    let parts = Parts { workloads: vec![Arc::new(workload(meshed))], ..Parts::default() };
    Arc::new(Snapshot::new(version, parts))
}

fn attached(netns: &str) -> Arc<LocalFacts> {
    let fact = Attached { uid: "u".into(), netns: netns.into(), addrs: Vec::new() };
    Arc::new(LocalFacts { attached: [(name(), fact)].into(), ..LocalFacts::default() })
}

async fn next(snapshots: &mut watch::Receiver<Arc<Snapshot>>) -> Arc<Snapshot> {
    tokio::time::timeout(Duration::from_secs(10), snapshots.changed()).await.unwrap().unwrap();
    Arc::clone(&snapshots.borrow_and_update())
}

#[tokio::test]
async fn the_world_changes_with_what_is_known_and_its_version_only_grows() {
    let (source, base) = watch::channel(world(4, true));
    let (facts, receiver) = watch::channel(Arc::default());
    let (locator, mut snapshots) = Locator::new("n1", base, receiver);
    let first = Arc::clone(&snapshots.borrow_and_update());
    assert!(Arc::ptr_eq(&first, &source.borrow()), "nothing is known: nothing is copied");
    tokio::spawn(locator.run());

    facts.send_replace(attached("/run/netns/a"));
    let second = next(&mut snapshots).await;
    assert!(second.version() > first.version());
    let netns = |snapshot: &Snapshot| snapshot.workload(workload(true).id).unwrap().netns.clone();
    assert_eq!(netns(&second).as_deref(), Some("/run/netns/a"));

    // The source's next world has it too, though its own number is behind.
    source.send_replace(world(5, false));
    let third = next(&mut snapshots).await;
    assert!(third.version() > second.version());
    assert_eq!(netns(&third).as_deref(), Some("/run/netns/a"));
    facts.send_replace(Arc::default());
    let fourth = next(&mut snapshots).await;
    assert!(fourth.version() > third.version());
    assert_eq!(netns(&fourth), None);
}

fn knowledge(test: &str) -> LocalKnowledge {
    let folder = std::env::temp_dir().join(format!("nodemesh-local-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    LocalKnowledge::load(folder.join(FILE))
}

#[test]
fn the_plugin_is_left_what_differs_from_its_namespace() {
    let local = knowledge("known");
    let known = local.known_pods(&world(1, true), "n1");
    assert_eq!(known.meshed_namespaces, ["shop".to_owned()].into());
    assert!(known.pods.is_empty());
    local.set_declared(BTreeMap::new(), ["shop".to_owned()].into());
    assert_eq!(local.known_pods(&world(1, false), "n1").pods, [("shop/web".to_owned(), false)].into());
    assert!(local.known_pods(&world(1, false), "n2").pods.is_empty(), "another node's");
    local.set_declared(BTreeMap::new(), BTreeSet::new());
    assert_eq!(local.known_pods(&world(1, true), "n1").pods, [("shop/web".to_owned(), true)].into());
}

#[test]
fn the_hosts_own_namespace_is_no_pods() {
    let local = knowledge("host");
    let container = ContainerRef { container_id: "c".into(), ifname: "eth0".into() };
    let pod = PodRef { namespace: "shop".into(), name: "web".into(), uid: "u".into() };
    let attachment = Attachment {
        container: container.clone(),
        netns: "/proc/self/ns/net".into(),
        addrs: Vec::new(),
        pod,
    };
    assert!(matches!(local.attach(attachment), Err(NetnsError::HostNetwork { .. })));
    assert!(local.facts().borrow().is_empty());
    assert_eq!(local.detach(&container), None);
}
