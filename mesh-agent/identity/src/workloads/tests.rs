//! Certificates over fake time: renewal, outages, priorities, rotations, and handshakes between two nodes all along.

use std::sync::atomic::AtomicUsize;

use rustls::pki_types::CertificateDer;
use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    bundle::TrustMaterial,
    ca::{Ca, CaOptions},
    clock::TokioClock,
    fixture::{DAY, Folder, handshake, identity, start},
    issuer::{Issuing, LocalIssuer},
    peer::{PeerError, identity_of},
    svid::fingerprint,
};

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// How the issuer of a test behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Up,
    Down,
    Refusing,
    Silent,
    Panicking,
    /// Answers with what was meant for the one who asked before.
    Confused,
}

/// A CA in this process behind a connection of moods.
#[derive(Debug)]
struct MoodyIssuer {
    local: LocalIssuer,
    mood: Mutex<Mood>,
    delay: Duration,
    asked: Mutex<Vec<Identity>>,
    last: Mutex<Option<crate::Issued>>,
}

impl MoodyIssuer {
    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

impl Issuer for MoodyIssuer {
    fn issue(&self, csr_pem: String, identity: Identity, ttl: Duration) -> Issuing<'_> {
        self.asked.lock().unwrap().push(identity.clone());
        let mood = *self.mood.lock().unwrap();
        Box::pin(async move {
            sleep(self.delay).await;
            match mood {
                Mood::Up => {
                    let issued = self.local.issue(csr_pem, identity, ttl).await?;
                    *self.last.lock().unwrap() = Some(issued.clone());
                    Ok(issued)
                }
                Mood::Down => Err(IssueError::Unavailable("connection refused".into())),
                Mood::Refusing => Err(IssueError::Refused("not_hosted".into())),
                Mood::Silent => std::future::pending().await,
                Mood::Panicking => panic!("a fault in the issuer"),
                Mood::Confused => Ok(self.last.lock().unwrap().clone().unwrap()),
            }
        })
    }

    fn trust(&self) -> watch::Receiver<Arc<TrustMaterial>> {
        self.local.trust()
    }
}

/// A node with its renewer, the CA of its mesh, and a clock that follows tokio's.
struct Node {
    certificates: Arc<Certificates>,
    issuer: Arc<MoodyIssuer>,
    renewer: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.renewer.abort();
    }
}

/// A mesh: its CA, in a folder of its own.
struct Mesh {
    ca: Arc<Ca>,
    clock: Arc<TokioClock>,
    _folder: Folder,
}

impl Mesh {
    fn new() -> Self {
        let (folder, clock) = (Folder::new(), Arc::new(TokioClock::starting_at(start())));
        let options = CaOptions {
            clock: clock.clone(),
            announce: 10 * MINUTE,
            retire: 2 * DAY,
            ..CaOptions::new(folder.path(), "cluster.local")
        };
        Self { ca: Arc::new(Ca::open(options).unwrap()), clock, _folder: folder }
    }

    fn node(&self, ttl: Duration, concurrency: usize, delay: Duration) -> Node {
        let issuer = Arc::new(MoodyIssuer {
            local: LocalIssuer::new(Arc::clone(&self.ca), "n1", |identity| {
                &*identity.service_account != "elsewhere"
            }),
            mood: Mutex::new(Mood::Up),
            delay,
            asked: Mutex::default(),
            last: Mutex::default(),
        });
        let options = Options {
            ttl,
            concurrency,
            clock: self.clock.clone(),
            ..Options::new(TrustDomains::new("cluster.local"))
        };
        let (certificates, renewer) = Certificates::new(options, issuer.clone());
        Node { certificates, issuer, renewer: tokio::spawn(renewer.run()) }
    }
}

impl Node {
    async fn ready(&self, account: &str) {
        self.certificates.wait_for(&identity(account), Instant::now() + MINUTE).await.unwrap();
    }

    fn leaf(&self, account: &str) -> CertificateDer<'static> {
        self.certificates.slot(&identity(account)).unwrap().svid.chain()[0].clone()
    }
}

/// `a` of one node dials `b` of another.
fn dial(client: &Node, a: &str, server: &Node, b: &str) -> Identity {
    let client = client.certificates.client_config(&identity(a), &[identity(b)]).unwrap();
    let server = server.certificates.server_config(&identity(b)).unwrap();
    let (_, server) = handshake(client, server).unwrap();
    identity_of(&server.peer_certificates().unwrap()[0]).unwrap()
}

#[tokio::test(start_paused = true)]
async fn two_nodes_of_a_mesh_shake_hands_and_the_server_knows_the_client() {
    let mesh = Mesh::new();
    let nodes = [mesh.node(DAY, 8, SECOND), mesh.node(DAY, 8, SECOND)];
    nodes[0].certificates.want([identity("a")]);
    nodes[1].certificates.want([identity("b")]);
    assert_eq!(nodes[0].certificates.missing(&identity("a")), Some(NotReady::Pending));
    assert_eq!(nodes[0].certificates.client_config(&identity("a"), &[]).unwrap_err(), NotReady::Pending);
    nodes[0].ready("a").await;
    nodes[1].ready("b").await;
    assert_eq!(dial(&nodes[0], "a", &nodes[1], "b"), identity("a"));

    let wrong = nodes[0].certificates.client_config(&identity("a"), &[identity("c")]).unwrap();
    let server = nodes[1].certificates.server_config(&identity("b")).unwrap();
    match handshake(wrong, server) {
        Err(crate::fixture::Failed::Client(error)) => {
            assert_eq!(PeerError::of(&error), PeerError::WrongIdentity);
        }
        _ => panic!("accepted"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_configuration_is_the_same_object_until_its_certificate_is_replaced() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, SECOND);
    node.certificates.want([identity("a")]);
    node.ready("a").await;
    let get = || node.certificates.client_config(&identity("a"), &[identity("b")]).unwrap();
    let (first, server) = (get(), node.certificates.server_config(&identity("a")).unwrap());
    assert!(Arc::ptr_eq(&first, &get()));
    assert!(Arc::ptr_eq(&server, &node.certificates.server_config(&identity("a")).unwrap()));
    sleep(15 * HOUR).await;
    assert!(!Arc::ptr_eq(&first, &get()));
    assert!(!Arc::ptr_eq(&server, &node.certificates.server_config(&identity("a")).unwrap()));
}

#[tokio::test(start_paused = true)]
async fn the_configurations_of_a_source_are_bounded() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, SECOND);
    node.certificates.want([identity("a")]);
    node.ready("a").await;
    for n in 0..CLIENT_CONFIGS_MAX + 10 {
        node.certificates.client_config(&identity("a"), &[identity(&format!("b{n}"))]).unwrap();
    }
    let slot = node.certificates.slot(&identity("a")).unwrap();
    assert_eq!(slot.clients.lock().unwrap().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_around_the_middle_of_its_life_and_not_all_at_once() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 64, Duration::ZERO);
    let accounts: Vec<String> = (0..64).map(|n| format!("a{n}")).collect();
    node.certificates.want(accounts.iter().map(|account| identity(account)));
    sleep(SECOND).await;
    assert_eq!(node.certificates.counters().obtained, 64);
    let renewed_after = |from: Duration, to: Duration| {
        let before = node.certificates.counters().renewed;
        let node = &node;
        async move {
            sleep(to - from).await;
            node.certificates.counters().renewed - before
        }
    };
    assert_eq!(renewed_after(Duration::ZERO, DAY.mul_f64(0.39)).await, 0);
    let lower = renewed_after(DAY.mul_f64(0.39), DAY.mul_f64(0.5)).await;
    let upper = renewed_after(DAY.mul_f64(0.5), DAY.mul_f64(0.61)).await;
    assert_eq!(lower + upper, 64);
    assert!(lower > 8 && upper > 8, "spread out: {lower} and {upper}");
}

#[tokio::test(start_paused = true)]
async fn an_hour_without_the_controller_is_not_noticed_by_traffic() {
    let mesh = Mesh::new();
    let nodes = [mesh.node(2 * HOUR, 8, SECOND), mesh.node(2 * HOUR, 8, SECOND)];
    nodes[0].certificates.want([identity("a")]);
    nodes[1].certificates.want([identity("b")]);
    nodes[0].ready("a").await;
    nodes[1].ready("b").await;
    sleep(40 * MINUTE).await;
    let asked = nodes[0].issuer.asked();
    nodes.iter().for_each(|node| node.issuer.set(Mood::Down));
    for _ in 0..60 {
        sleep(MINUTE).await;
        assert_eq!(dial(&nodes[0], "a", &nodes[1], "b"), identity("a"));
    }
    let attempts = nodes[0].issuer.asked() - asked;
    // Half life is between 48 and 72 minutes; with at most a minute's pause and at least half of one.
    assert!((25..=120).contains(&attempts), "{attempts} attempts");
    let failed = nodes[0].certificates.counters().failed as usize;
    assert!(failed == attempts || failed + 1 == attempts, "{failed} failed; one may be under way");
    assert!(nodes[0].certificates.views()[0].last_error.as_ref().unwrap().contains("connection refused"));
    nodes.iter().for_each(|node| node.issuer.set(Mood::Up));
    sleep(2 * MINUTE).await;
    assert_eq!(nodes[0].certificates.counters().renewed, 1);
    assert_eq!(nodes[0].certificates.views()[0].last_error, None);
    assert_eq!(dial(&nodes[0], "a", &nodes[1], "b"), identity("a"));
}

#[tokio::test(start_paused = true)]
async fn an_outage_longer_than_a_life_ends_in_expired_and_heals() {
    let mesh = Mesh::new();
    let node = mesh.node(HOUR, 8, SECOND);
    node.certificates.want([identity("a")]);
    node.ready("a").await;
    node.issuer.set(Mood::Down);
    sleep(61 * MINUTE).await;
    assert_eq!(node.certificates.missing(&identity("a")), Some(NotReady::Expired));
    assert_eq!(node.certificates.server_config(&identity("a")).unwrap_err(), NotReady::Expired);
    assert_eq!(node.certificates.views()[0].state, "expired");
    assert_eq!(node.certificates.counters().valid, 0);
    node.issuer.set(Mood::Up);
    let waiting = Instant::now();
    node.ready("a").await;
    assert_eq!(node.certificates.missing(&identity("a")), None);
    assert!(waiting.elapsed() <= 4 * SECOND, "a connection waits: {:?}", waiting.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_waiting_connection_gets_its_certificate_seconds_after_the_issuer_is_back() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, Duration::ZERO);
    node.issuer.set(Mood::Down);
    node.certificates.want([identity("a")]);
    sleep(HOUR).await;
    let asked = node.issuer.asked();
    assert!((60..=130).contains(&asked), "{asked} attempts in an hour that nobody waits for");
    let refused = node.certificates.wait_for(&identity("a"), Instant::now() + 5 * SECOND).await;
    assert!(matches!(refused, Err(NotReady::Failed(IssueError::Unavailable(_)))), "{refused:?}");
    let asked = node.issuer.asked() - asked;
    assert!(asked <= 6, "{asked} attempts in five seconds, though somebody waits");
    node.issuer.set(Mood::Up);
    let waiting = Instant::now();
    node.ready("a").await;
    assert!(waiting.elapsed() <= 2 * SECOND, "{:?}", waiting.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_waiting_connection_goes_before_what_nobody_asked_for() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 1, SECOND);
    node.certificates.want((0..20).map(|n| identity(&format!("a{n}"))));
    sleep(SECOND / 2).await;
    let running = node.issuer.asked.lock().unwrap()[0].clone();
    let wanted = (0..20).map(|n| identity(&format!("a{n}"))).rfind(|identity| *identity != running);
    let wanted = wanted.unwrap();
    node.certificates.wait_for(&wanted, Instant::now() + MINUTE).await.unwrap();
    assert_eq!(node.issuer.asked.lock().unwrap()[..2], [running, wanted]);
    assert_eq!(node.issuer.asked(), 3, "the next one has just begun");
}

#[tokio::test(start_paused = true)]
async fn requests_under_way_are_bounded() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 3, 10 * SECOND - SECOND);
    node.certificates.want((0..10).map(|n| identity(&format!("a{n}"))));
    sleep(SECOND).await;
    assert_eq!(node.issuer.asked(), 3);
    sleep(9 * SECOND).await;
    assert_eq!(node.issuer.asked(), 6);
}

#[tokio::test(start_paused = true)]
async fn who_is_not_wanted_gets_nothing_and_who_no_longer_is_loses_it() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, SECOND);
    let stranger = node.certificates.wait_for(&identity("stranger"), Instant::now() + HOUR).await;
    assert_eq!(stranger, Err(NotReady::NotWanted));
    node.certificates.want([identity("a")]);
    node.ready("a").await;
    node.certificates.want([identity("a"), identity("b")]);
    let certificates = Arc::clone(&node.certificates);
    let waiting =
        tokio::spawn(async move { certificates.wait_for(&identity("b"), Instant::now() + HOUR).await });
    tokio::task::yield_now().await;
    node.certificates.want([]);
    assert_eq!(waiting.await.unwrap(), Err(NotReady::NotWanted));
    assert_eq!(node.certificates.server_config(&identity("a")).unwrap_err(), NotReady::NotWanted);
    sleep(MINUTE).await;
    assert_eq!(node.certificates.views(), []);
    let asked = node.issuer.asked();
    sleep(DAY).await;
    assert_eq!(node.issuer.asked(), asked, "nobody renews what nobody wants");
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_not_hosted_is_refused_and_asked_for_with_back_off() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, Duration::ZERO);
    node.certificates.want([identity("elsewhere")]);
    let refused = node.certificates.wait_for(&identity("elsewhere"), Instant::now() + 10 * SECOND).await;
    assert_eq!(refused, Err(NotReady::Failed(IssueError::Refused("not_hosted".into()))));
    assert_eq!(mesh.ca.counters().refused[&crate::ca::Refusal::NotHosted], node.issuer.asked() as u64);
    assert_eq!(node.certificates.counters().refused, node.issuer.asked() as u64);
    assert_eq!(node.certificates.views()[0].state, "failed");
}

#[tokio::test(start_paused = true)]
async fn every_request_brings_a_fresh_key() {
    let mesh = Mesh::new();
    let node = mesh.node(HOUR, 8, SECOND);
    node.certificates.want([identity("a")]);
    sleep(DAY).await;
    assert!(node.certificates.counters().renewed >= 20);
    assert_eq!(mesh.ca.counters().refused.len(), 0, "no replayed key");
}

#[tokio::test(start_paused = true)]
async fn silence_refusal_panic_and_confusion_of_an_issuer_are_survived() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 2, Duration::ZERO);
    node.certificates.want([identity("b")]);
    node.ready("b").await;
    for (mood, says) in [
        (Mood::Silent, "no answer within 10 s"),
        (Mood::Refusing, "refused: not_hosted"),
        (Mood::Panicking, "panicked"),
        (Mood::Confused, "is for spiffe://cluster.local/ns/shop/sa/b"),
    ] {
        node.issuer.set(mood);
        node.certificates.want([identity("a"), identity("b")]);
        let why = node.certificates.wait_for(&identity("a"), Instant::now() + 25 * SECOND).await.unwrap_err();
        assert!(why.to_string().contains(says), "{mood:?}: {why}");
        assert!(node.certificates.server_config(&identity("b")).is_ok(), "{mood:?}: others go on");
        node.certificates.want([identity("b")]);
    }
    node.issuer.set(Mood::Up);
    node.certificates.want([identity("a"), identity("b")]);
    node.ready("a").await;
    assert_eq!(dial(&node, "a", &node, "b"), identity("a"));
    let used = AtomicUsize::new(node.issuer.asked());
    assert!(used.into_inner() >= 8);
}

#[tokio::test(start_paused = true)]
async fn a_root_is_rotated_under_load_without_a_failed_handshake() {
    let mesh = Mesh::new();
    let nodes = [mesh.node(DAY, 8, SECOND), mesh.node(DAY, 8, SECOND)];
    nodes[0].certificates.want([identity("a")]);
    nodes[1].certificates.want([identity("b")]);
    nodes[0].ready("a").await;
    nodes[1].ready("b").await;
    let roots = |node: &Node| node.certificates.trust().current().material().roots.clone();
    let old = roots(&nodes[0])[0].clone();
    mesh.ca.rotate(None).unwrap();
    let mut most = 0;
    // Four days, in steps of five minutes: announced, switched, everything renewed, the old root dropped.
    for _ in 0..4 * 24 * 12 {
        sleep(5 * MINUTE).await;
        mesh.ca.refresh().unwrap();
        assert_eq!(dial(&nodes[0], "a", &nodes[1], "b"), identity("a"));
        assert_eq!(dial(&nodes[1], "b", &nodes[0], "a"), identity("b"));
        most = most.max(roots(&nodes[1]).len());
    }
    assert_eq!(most, 2, "there was an overlap");
    assert_eq!(roots(&nodes[0]).len(), 1);
    assert_ne!(roots(&nodes[0])[0], old);
    assert_eq!(mesh.ca.counters().root_switches, 1);
    assert_eq!(nodes[0].certificates.counters().failed, 0);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_whose_root_is_gone_is_replaced_at_once() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, SECOND);
    node.certificates.want([identity("a")]);
    node.ready("a").await;
    let before = node.leaf("a");
    // The root is replaced without any overlap.
    mesh.ca.rotate(Some(Duration::ZERO)).unwrap();
    std::fs::remove_file(mesh.ca.folder().join("rotation.json")).unwrap();
    mesh.ca.refresh().unwrap();
    tokio::task::yield_now().await;
    assert_eq!(mesh.ca.trust().borrow().roots.len(), 1);
    sleep(5 * SECOND).await;
    assert_ne!(node.leaf("a"), before);
    assert_eq!(node.certificates.views()[0].state, "valid");
    assert_eq!(dial(&node, "a", &node, "a"), identity("a"));
}

#[tokio::test(start_paused = true)]
async fn a_view_tells_what_an_operator_asks() {
    let mesh = Mesh::new();
    let node = mesh.node(DAY, 8, Duration::ZERO);
    node.certificates.want([identity("b"), identity("a")]);
    assert_eq!(node.certificates.views()[0].state, "pending");
    node.ready("a").await;
    node.ready("b").await;
    let views = node.certificates.views();
    assert_eq!(
        views.iter().map(|view| &view.identity[..]).collect::<Vec<_>>(),
        ["spiffe://cluster.local/ns/shop/sa/a", "spiffe://cluster.local/ns/shop/sa/b"]
    );
    let view = &views[0];
    assert_eq!(view.state, "valid");
    assert_eq!(view.not_before.as_deref(), Some("2027-01-15T07:58:00Z"));
    assert_eq!(view.not_after.as_deref(), Some("2027-01-16T08:00:00Z"));
    assert!(view.renew_at.as_deref().unwrap().starts_with("2027-01-15T"));
    assert_eq!((view.chain.len(), view.roots.len()), (1, 1));
    assert_eq!(view.roots[0], fingerprint(&mesh.ca.trust().borrow().roots[0]));
    assert_eq!(view.serial.as_ref().unwrap().len(), 32);
    let json = serde_json::to_value(view).unwrap();
    assert_eq!(json["state"], "valid");
    assert!(json.get("last_error").is_none());
}
