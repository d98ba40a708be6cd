//! What agents know: all of it, only what changed, and what they keep when the controller is away.

use std::{fs, sync::Arc, time::Duration};

use mesh_control::{
    link::Kind,
    problem::{Level, SourceError},
    publish::world::{Edits, Resource},
    status::SourceStatus,
};
use mesh_core::{
    reach::Reach,
    snapshot::{Credential, Endpoint, Material, Name, Parts, Service, Snapshot},
};

use crate::bed::{Bed, eventually, pod, service, shop, synced, until};

fn front(snapshot: &Snapshot) -> &Service {
    snapshot.service(&Name::new("shop", "front")).unwrap()
}

fn endpoints(snapshot: &Snapshot) -> Vec<Endpoint> {
    front(snapshot).ports[0].endpoints.clone()
}

#[tokio::test]
async fn an_agent_has_the_controllers_world_and_of_its_own_pods_what_others_need_not_know() {
    let mut bed = Bed::new("world", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    let snapshot = synced(&mut agent).await;
    let wanted = Arc::clone(&bed.snapshots.borrow());
    assert!(snapshot.services().eq(wanted.services()));
    assert_eq!(snapshot.mesh(), wanted.mesh());
    let at = |addr: &str| (addr.parse().unwrap(), Arc::clone(&wanted));
    let (cart, wanted_world) = at("10.1.0.1");
    assert_eq!(snapshot.workload_at(cart), wanted_world.workload_at(cart));
    let (web, wanted_world) = at("10.2.0.1");
    let (seen, real) = (snapshot.workload_at(web).unwrap(), wanted_world.workload_at(web).unwrap());
    assert_eq!(seen.identity(), real.identity());
    assert_eq!((seen.netns.as_deref(), seen.meshed), (None, true), "its namespace is its node's business");
    let sources = agent.sources.borrow().clone();
    assert!(sources.errors.is_empty() && sources.source.to_string_lossy().contains("/etc/mesh"));
    let sessions = controller.publication.sessions();
    assert_eq!((sessions.len(), &*sessions[0].node), (1, "n1"));
}

#[tokio::test]
async fn a_changed_endpoint_is_one_resource_for_each_agent() {
    let mut bed = Bed::new("endpoint", shop());
    let controller = bed.controller().await;
    let (mut one, mut two) = (bed.agent("n1"), bed.agent("n2"));
    synced(&mut one).await;
    synced(&mut two).await;
    let before = controller.metrics.resources_sent(Kind::Address);
    let mut parts = shop();
    let mut changed = (*parts.services[0]).clone();
    changed.ports[0].endpoints[1].ready = false;
    parts.services = vec![Arc::new(changed)];
    bed.publish(parts);
    for agent in [&mut one, &mut two] {
        until("the change", &mut agent.snapshots, |snapshot| !endpoints(snapshot)[1].ready).await;
    }
    assert_eq!(controller.metrics.resources_sent(Kind::Address) - before, 2);
}

#[tokio::test]
async fn a_removed_pod_is_gone_from_agents() {
    let mut bed = Bed::new("removed", shop());
    let _controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let mut parts = shop();
    let web = parts.workloads.pop().unwrap();
    parts.services = vec![Arc::new(service("front", "10.96.0.1", &[&parts.workloads[0]]))];
    bed.publish(parts);
    let snapshot = until("the removal", &mut agent.snapshots, |s| s.workload(web.id).is_none()).await;
    assert_eq!(endpoints(&snapshot).len(), 1);
}

#[tokio::test]
async fn after_a_restart_of_the_controller_nothing_is_sent_again() {
    let mut bed = Bed::new("restart", shop());
    let first = bed.controller().await;
    let mut agent = bed.agent("n1");
    let snapshot = synced(&mut agent).await;
    first.stop().await;
    until("the loss", &mut agent.link, |link| !link.connected && link.last_error.is_some()).await;
    assert!(Arc::ptr_eq(&snapshot, &agent.snapshots.borrow()), "the last state stays");
    let second = bed.controller().await;
    until("the return", &mut agent.link, |link| link.connected).await;
    eventually("the commit", || {
        second.publication.sessions().iter().any(|s| s.kinds.values().any(|kind| kind.acked > 0))
    })
    .await;
    for kind in Kind::ALL {
        assert_eq!(second.metrics.resources_sent(kind), 0, "{kind:?}");
    }
    assert!(Arc::ptr_eq(&snapshot, &agent.snapshots.borrow()));
}

#[tokio::test]
async fn an_agent_whose_session_is_old_proves_itself_again_and_is_sent_nothing_again() {
    let mut bed = Bed::new("old", shop());
    bed.session_age = Some(Duration::from_millis(500));
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    let snapshot = synced(&mut agent).await;
    let sent: Vec<u64> = Kind::ALL.iter().map(|kind| controller.metrics.resources_sent(*kind)).collect();
    eventually("the third session", || controller.metrics.sessions_ended("age") >= 2).await;
    until("the return", &mut agent.link, |link| link.connected).await;
    assert!(Arc::ptr_eq(&snapshot, &agent.snapshots.borrow()), "the last state stays");
    let now: Vec<u64> = Kind::ALL.iter().map(|kind| controller.metrics.resources_sent(*kind)).collect();
    assert_eq!(now, sent);
}

#[tokio::test]
async fn what_changed_while_the_link_was_down_is_all_that_is_sent() {
    let mut bed = Bed::new("meanwhile", shop());
    let first = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    first.stop().await;
    let mut parts = shop();
    parts.workloads.push(Arc::new(pod("new", "n2", "10.2.0.2")));
    bed.publish(parts);
    let second = bed.controller().await;
    let addr = "10.2.0.2".parse().unwrap();
    until("the new pod", &mut agent.snapshots, |snapshot| snapshot.workload_at(addr).is_some()).await;
    assert_eq!(second.metrics.resources_sent(Kind::Address), 1);
}

#[tokio::test]
async fn an_agent_starts_from_disk_while_the_controller_is_away_and_says_so() {
    let mut bed = Bed::new("disk", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    let before = synced(&mut agent).await;
    let saved = bed.saved("n1");
    eventually("the file", || saved.exists()).await;
    drop(agent);
    controller.stop().await;
    let mut agent = bed.agent("n1");
    let snapshot = Arc::clone(&agent.snapshots.borrow_and_update());
    assert!(snapshot.same_world(&before), "it is there before the controller");
    let sources = agent.sources.borrow().clone();
    assert_eq!(sources.errors.len(), 1, "nothing is taken away on the word of a file");
    assert!(sources.errors[0].message.contains("not heard"));
    let controller = bed.controller().await;
    synced(&mut agent).await;
    until("a clean source", &mut agent.sources, |sources| sources.errors.is_empty()).await;
    assert_eq!(controller.metrics.resources_sent(Kind::Address), 0, "the file was as good as memory");
}

#[tokio::test]
async fn a_damaged_file_is_not_used_and_the_controller_mends_it() {
    let mut bed = Bed::new("damaged", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let saved = bed.saved("n1");
    eventually("the file", || saved.exists()).await;
    drop(agent);
    controller.stop().await;
    let mut bytes = fs::read(&saved).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&saved, &bytes).unwrap();
    let mut agent = bed.agent("n1");
    assert_eq!(agent.snapshots.borrow().version(), 0);
    let sources = agent.sources.borrow().clone();
    assert!(sources.errors[0].message.contains("is damaged"), "{sources:?}");
    let _controller = bed.controller().await;
    let snapshot = synced(&mut agent).await;
    assert_eq!(endpoints(&snapshot).len(), 2);
    eventually("a good file", || fs::read(&saved).is_ok_and(|now| now != bytes)).await;
}

#[tokio::test]
async fn a_bad_resource_is_refused_by_name_and_the_last_good_one_stays() {
    let mut bed = Bed::new("nack", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    let before = synced(&mut agent).await;
    let name: Arc<str> = "shop/front.shop.svc.cluster.local".into();
    let bad = |name: &Arc<str>| {
        Some(Resource::new(Kind::Address, Arc::clone(name), vec![0xff; 3], Vec::new(), Reach::Everyone))
    };
    assert_eq!(controller.publication.count(Kind::Address), 3);
    controller.publication.apply(Edits::from([((Kind::Address, Arc::clone(&name)), bad(&name))]));
    eventually("the refusal", || {
        controller.publication.sessions().iter().any(|session| {
            let nack = session.kinds.get("address").and_then(|kind| kind.last_nack.as_ref());
            nack.is_some_and(|detail| detail.contains(&*name))
        })
    })
    .await;
    assert_eq!(controller.publication.count(Kind::Address), 3, "it replaced the good one");
    assert!(front(&agent.snapshots.borrow()) == front(&before));
    assert_eq!(agent.link.borrow().refused_resources, 1);
    // The link is as good as before.
    let mut parts = shop();
    parts.workloads.push(Arc::new(pod("new", "n2", "10.2.0.2")));
    bed.publish(parts);
    let addr = "10.2.0.2".parse().unwrap();
    until("the new pod", &mut agent.snapshots, |snapshot| snapshot.workload_at(addr).is_some()).await;
}

#[tokio::test]
async fn problems_of_the_configuration_are_seen_on_every_node() {
    let mut bed = Bed::new("problems", Parts::default());
    let _controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let problem = SourceError {
        file: "web.yaml".into(),
        document: Some(2),
        kind: Some("Service".into()),
        namespace: Some("shop".into()),
        name: Some("web".into()),
        level: Level::Error,
        field: "spec.ports".into(),
        message: "is missing".into(),
    };
    let status = SourceStatus { errors: vec![problem.clone()], ..SourceStatus::default() };
    bed.sources.send_replace(Arc::new(status));
    let sources = until("the problem", &mut agent.sources, |sources| !sources.errors.is_empty()).await;
    assert_eq!(sources.errors, [problem]);
    assert!(sources.source.to_string_lossy().starts_with("https://127.0.0.1:"));
}

#[tokio::test]
async fn a_secret_is_its_nodes_alone_changes_there_goes_again_and_is_never_on_disk() {
    let name = Name::new("shop", "client");
    let credential = |key: &str| {
        let material = Material { key: Some(key.as_bytes().into()), ..Material::default() };
        Arc::new(Credential { node: "n1".into(), name: Name::new("shop", "client"), content: Ok(material) })
    };
    let with = |key: &str| Parts { credentials: vec![credential(key)], ..shop() };
    let mut bed = Bed::new("secret", with("the first key"));
    let controller = bed.controller().await;
    let (mut one, mut two) = (bed.agent("n1"), bed.agent("n2"));
    assert_eq!(synced(&mut one).await.credential("n1", &name), Some(&credential("the first key")));
    assert_eq!(synced(&mut two).await.credentials().count(), 0);
    let sent = controller.metrics.resources_sent(Kind::Credential);
    assert_eq!(sent, 1, "to one node alone");

    bed.publish(with("the second key"));
    until("the other key", &mut one.snapshots, |snapshot| {
        snapshot.credential("n1", &name) == Some(&credential("the second key"))
    })
    .await;
    // With something that both are told, so that what the other has is newer than the secret.
    let mut parts = with("the second key");
    parts.workloads.push(Arc::new(pod("new", "n2", "10.2.0.2")));
    bed.publish(parts);
    let addr = "10.2.0.2".parse().unwrap();
    until("the new pod", &mut two.snapshots, |snapshot| snapshot.workload_at(addr).is_some()).await;
    assert_eq!(two.snapshots.borrow().credentials().count(), 0);
    until("the new pod", &mut one.snapshots, |snapshot| snapshot.workload_at(addr).is_some()).await;
    let saved = bed.saved("n1");
    let holds = |what: &[u8]| {
        fs::read(&saved).is_ok_and(|bytes| bytes.windows(what.len()).any(|window| window == what))
    };
    eventually("the file of now", || holds(b"new")).await;
    assert!(!holds(b"the first key") && !holds(b"the second key") && !holds(b"nodemesh.v1.Credential"));

    bed.publish(shop());
    until("the end", &mut one.snapshots, |snapshot| snapshot.credentials().count() == 0).await;
}
