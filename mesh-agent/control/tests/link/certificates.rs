//! Who gets which certificates, and who gets in.

use std::{sync::Arc, time::Duration};

use mesh_control::{publish::server::controller_identity, subscribe::credentials::Credentials};
use mesh_core::identity::Identity;
use mesh_identity::{
    IssueError, Issued, Issuer, KeyAlgorithm, NodeIdentity, PrivateKey, Svid, TrustDomains, bundle::Trust,
    ca::SignRequest, clock::Clock as _, csr, tls::TlsContext,
};
use rustls::pki_types::ServerName;
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use crate::bed::{Bed, LIMIT, eventually, shop, synced, until};

const TTL: Duration = Duration::from_secs(3600);

fn account(name: &str) -> Identity {
    Identity::new("cluster.local", "shop", name)
}

fn request(identity: &Identity) -> (PrivateKey, String) {
    let key = PrivateKey::generate(KeyAlgorithm::default()).unwrap();
    let csr = csr::make(&key, &identity.clone().into()).unwrap();
    (key, csr)
}

async fn ask(issuer: &dyn Issuer, identity: &Identity) -> (PrivateKey, Result<Issued, IssueError>) {
    let (key, csr) = request(identity);
    (key, issuer.issue(csr, identity.clone(), TTL).await)
}

#[tokio::test]
async fn a_node_gets_certificates_for_its_own_pods() {
    let mut bed = Bed::new("own", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let (key, issued) = ask(&*agent.issuer, &account("cart")).await;
    let svid = Svid::new(account("cart").into(), &key, &issued.unwrap(), bed.clock.now()).unwrap();
    assert_eq!(svid.principal().workload(), Some(&account("cart")));
    // The node's own, and the pod's.
    assert_eq!(controller.metrics.certificates_issued(), 2);
    assert!(agent.link.borrow().certificate_expires.is_some());
}

#[tokio::test]
async fn a_node_does_not_get_the_identity_of_another_nodes_pod() {
    let mut bed = Bed::new("other", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    for name in ["web", "nobody"] {
        let (_, refused) = ask(&*agent.issuer, &account(name)).await;
        assert_eq!(refused, Err(IssueError::Refused("not_hosted".into())), "{name}");
    }
    assert_eq!(controller.metrics.certificates_refused("not_hosted"), 2);
}

#[tokio::test]
async fn a_node_cannot_ask_in_one_name_with_a_request_for_another() {
    let mut bed = Bed::new("mismatch", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let (_, csr) = request(&account("web"));
    let refused = agent.issuer.issue(csr, account("cart"), TTL).await;
    assert_eq!(refused, Err(IssueError::Refused("identity_mismatch".into())));
    assert_eq!(controller.metrics.certificates_refused("identity_mismatch"), 1);
}

#[tokio::test]
async fn malformed_and_replayed_requests_are_refused_by_reason() {
    let mut bed = Bed::new("replay", shop());
    let controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let refused = agent.issuer.issue("no request".into(), account("cart"), TTL).await;
    assert_eq!(refused, Err(IssueError::Refused("malformed".into())));
    let (_, csr) = request(&account("cart"));
    assert!(agent.issuer.issue(csr.clone(), account("cart"), TTL).await.is_ok());
    let refused = agent.issuer.issue(csr, account("cart"), TTL).await;
    assert_eq!(refused, Err(IssueError::Refused("replayed_key".into())));
    assert_eq!(controller.metrics.certificates_refused("malformed"), 1);
    assert_eq!(controller.metrics.certificates_refused("replayed_key"), 1);
}

#[tokio::test]
async fn a_wrong_token_opens_nothing() {
    let mut bed = Bed::new("token", shop());
    let controller = bed.controller().await;
    let mut options = bed.options("n1");
    options.token = Some(Zeroizing::new(bed.token("n2").replace("n2.", "n1.")));
    let mut agent = bed.agent_with(options);
    let link = until("the refusal", &mut agent.link, |link| link.last_error.is_some()).await;
    assert!(link.last_error.as_ref().is_some_and(|error| error.contains("bad_token")), "{link:?}");
    assert!(controller.metrics.refusals("bad_token") > 0);
    assert!(controller.metrics.certificates_refused("unauthenticated") > 0);
    assert_eq!(agent.snapshots.borrow().version(), 0);
}

#[tokio::test]
async fn a_node_without_a_token_gets_nothing() {
    let mut bed = Bed::new("no-token", shop());
    let controller = bed.controller().await;
    let mut agent =
        bed.agent_with(mesh_control::subscribe::SubscribeOptions { token: None, ..bed.options("n1") });
    until("the refusal", &mut agent.link, |link| link.last_error.is_some()).await;
    assert!(controller.metrics.refusals("no_credentials") > 0);
}

#[tokio::test]
async fn a_server_of_another_authority_never_sees_the_token() {
    let mut real = Bed::new("real", shop());
    let _real = real.controller().await;
    let mut other = Bed::new("impostor", shop());
    let impostor = other.controller().await;
    let mut options = real.options("n1");
    options.controller = other.options("n1").controller;
    let mut agent = real.agent_with(options);
    let link = until("the refusal", &mut agent.link, |link| link.last_error.is_some()).await;
    assert!(link.last_error.as_ref().is_some_and(|error| error.contains("unknown authority")), "{link:?}");
    assert_eq!(impostor.metrics.refusals("bad_token"), 0, "it was not asked");
    assert_eq!(agent.snapshots.borrow().version(), 0);
}

#[tokio::test]
async fn a_pod_of_the_mesh_is_not_the_controller() {
    let mut bed = Bed::new("posing", shop());
    let _controller = bed.controller().await;
    let mut options = bed.options("n1");
    // As if a pod that is called so had the controller's address.
    options.identity = controller_identity("cluster.local", "elsewhere");
    let mut agent = bed.agent_with(options);
    let link = until("the refusal", &mut agent.link, |link| link.last_error.is_some()).await;
    assert!(link.last_error.as_ref().is_some_and(|error| error.contains("not who was expected")), "{link:?}");
}

/// Does a TLS handshake with a certificate and reads until the server ends it.
async fn shake(bed: &Bed, svid: &Svid) {
    let trust = Trust::new(TrustDomains::new("cluster.local"), bed.roots()).unwrap();
    let context = TlsContext { trust: Arc::new(trust), clock: Arc::clone(&bed.clock) as _ };
    let config = context.client(Some(svid), &[controller_identity("cluster.local", "istio-system")]).unwrap();
    let stream = TcpStream::connect(bed.addr()).await.unwrap();
    let name = ServerName::try_from("controller").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    // In TLS 1.3 the client hears of a refusal after its own side is done.
    let read = tokio::time::timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await.unwrap();
    assert!(read.is_err(), "the server took it");
}

#[tokio::test]
async fn an_expired_certificate_of_a_node_is_refused_and_counted() {
    let mut bed = Bed::new("expired", shop());
    let key = PrivateKey::generate(KeyAlgorithm::default()).unwrap();
    let node = NodeIdentity::new("cluster.local", "n1").unwrap();
    let csr = csr::make(&key, &node.clone().into()).unwrap();
    let ttl = Some(Duration::from_secs(60));
    let asked = SignRequest { csr: csr.as_bytes(), subject: None, ttl, requester: "n1" };
    let issued = bed.ca.sign(&asked, &|_| true).unwrap();
    let svid = Svid::new(node.into(), &key, &issued, bed.clock.now()).unwrap();
    bed.clock.advance(Duration::from_secs(3600));
    let controller = bed.controller().await;
    shake(&bed, &svid).await;
    eventually("the count", || controller.metrics.refusals("tls_expired") == 1).await;
}

#[tokio::test]
async fn a_node_whose_certificate_ran_out_comes_back_with_its_token() {
    let mut bed = Bed::new("ran-out", shop());
    let first = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let expires = agent.link.borrow().certificate_expires.unwrap();
    first.stop().await;
    bed.clock.advance(Duration::from_secs(48 * 3600));
    let _second = bed.controller().await;
    // It may not have heard yet that the first one has gone.
    until("a new certificate", &mut agent.link, |link| {
        link.connected && link.certificate_expires > Some(expires)
    })
    .await;
}

#[tokio::test]
async fn a_new_root_reaches_agents_before_it_signs() {
    let mut bed = Bed::new("rotation", shop());
    let _controller = bed.controller().await;
    let mut agent = bed.agent("n1");
    synced(&mut agent).await;
    let mut trust = agent.issuer.trust();
    assert_eq!(trust.borrow().roots.len(), 1);
    let ca = Arc::clone(&bed.ca);
    tokio::task::spawn_blocking(move || ca.rotate(Some(Duration::from_secs(3600)))).await.unwrap().unwrap();
    let material = until("the new root", &mut trust, |material| material.roots.len() == 2).await;
    assert_eq!(*material, bed.roots());
    let (key, issued) = ask(&*agent.issuer, &account("cart")).await;
    Svid::new(account("cart").into(), &key, &issued.unwrap(), bed.clock.now()).unwrap();
}

#[test]
fn a_name_that_fits_into_no_identity_is_no_node() {
    let bed = Bed::new("name", shop());
    for node in ["", "a/b", "..", "a b"] {
        let controller = controller_identity("cluster.local", "istio-system");
        let made = Credentials::new(node, None, controller, bed.roots(), Arc::clone(&bed.clock) as _);
        assert!(made.is_err(), "{node:?}");
    }
}
