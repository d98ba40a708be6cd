//! The CA: what it signs, what it refuses, where its files come from. Rotations are in `tests/rotation.rs`.

mod rotation;

use std::os::unix::fs::PermissionsExt as _;

use mesh_core::identity::Identity;
use rustls::pki_types::CertificateRevocationListDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    store::{CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT},
    *,
};
use crate::{
    KeyAlgorithm, Principal, PrivateKey,
    bundle::{Trust, TrustDomains},
    clock::{Clock, unix_seconds},
    csr,
    fixture::{DAY, Folder, Forger, SetClock, identity, plugged_in, start},
    peer::{NodeIdentity, identity_of},
    svid::Svid,
};

pub(super) fn options(folder: &Folder, clock: &Arc<SetClock>) -> CaOptions {
    CaOptions { clock: clock.clone(), ..CaOptions::new(folder.path(), "cluster.local") }
}

pub(super) fn open(folder: &Folder, clock: &Arc<SetClock>) -> Ca {
    Ca::open(options(folder, clock)).unwrap()
}

/// A fresh key's certificate for a workload.
pub(super) fn certify(ca: &Ca, account: &str) -> Svid {
    let principal = Principal::Workload(identity(account));
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let csr = csr::make(&key, &principal).unwrap();
    let issued = ca.sign(&request(&csr, &principal), &|_| true).unwrap();
    Svid::new(principal, &key, &issued, ca.options.clock.now()).unwrap()
}

fn request<'a>(csr: &'a str, subject: &'a Principal) -> SignRequest<'a> {
    SignRequest { csr: csr.as_bytes(), subject: Some(subject), ttl: None, requester: "n1" }
}

/// What the CA says everybody should trust, as a verifier has it.
pub(super) fn bundle(ca: &Ca) -> Arc<crate::Bundle> {
    let material = TrustMaterial::clone(&ca.trust().borrow());
    Trust::new(TrustDomains::new("cluster.local"), material).unwrap().current()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_root_is_made_once_and_kept_for_the_owner_only() {
    let (parent, clock) = (Folder::new(), SetClock::new());
    let options = CaOptions { folder: parent.path().join("a/b"), ..options(&parent, &clock) };
    let first = Ca::open(options.clone()).unwrap();
    let second = Ca::open(options.clone()).unwrap();
    assert_eq!(*first.trust().borrow(), *second.trust().borrow());
    assert_eq!(mode(&options.folder), 0o700);
    for name in [ROOT_CERT, CA_KEY, "lock", "rotation.json"] {
        assert_eq!(mode(&options.folder.join(name)), 0o600, "{name}");
    }
    assert_eq!(certify(&first, "cart").check(&bundle(&second), start()), Ok(()));
}

#[test]
fn a_certificate_says_what_it_should_and_no_more() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let svid = certify(&ca, "cart");
    assert_eq!(svid.chain().len(), 1, "the root is not part of the chain");
    let (_, parsed) = X509Certificate::from_der(&svid.chain()[0]).unwrap();
    assert_eq!(parsed.subject().iter().count(), 0);
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "with an empty subject");
    assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/cart")]);
    assert!(!parsed.is_ca());
    assert_eq!(parsed.raw_serial().len(), 16, "random: {:?}", parsed.raw_serial());
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let usage = parsed.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_encipherment() && !usage.key_cert_sign());
    assert_eq!(svid.validity().not_before, start() - BACKDATE);
    assert_eq!(svid.validity().not_after, start() + DAY);
    assert_ne!(svid.serial(), certify(&ca, "cart").serial());
    let root = ca.trust().borrow().roots[0].clone();
    let (_, root) = X509Certificate::from_der(&root).unwrap();
    assert_eq!(root.validity().not_after.timestamp(), unix_seconds(start() + ROOT_LIFE) as i64);
}

#[test]
fn every_kind_of_key_is_certified_and_rsa_may_encipher() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    for algorithm in
        [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048]
    {
        let folder = folder.path().join(algorithm.as_str());
        let ca = Ca::open(CaOptions {
            algorithm,
            clock: clock.clone(),
            ..CaOptions::new(folder, "cluster.local")
        })
        .unwrap();
        let principal = Principal::Workload(identity("cart"));
        let key = PrivateKey::generate(algorithm).unwrap();
        let csr = csr::make(&key, &principal).unwrap();
        let issued = ca.sign(&request(&csr, &principal), &|_| true).unwrap();
        let svid = Svid::new(principal, &key, &issued, start()).unwrap();
        let (_, parsed) = X509Certificate::from_der(&svid.chain()[0]).unwrap();
        let usage = parsed.key_usage().unwrap().unwrap().value;
        assert_eq!(usage.key_encipherment(), algorithm == KeyAlgorithm::Rsa2048);
    }
}

#[test]
fn every_refusal_has_its_reason_and_is_counted() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let cart = Principal::Workload(identity("cart"));
    let other = Principal::Workload(identity("other"));
    let foreign = Principal::Workload(Identity::new("elsewhere", "shop", "cart"));
    let fresh = |principal: &Principal| {
        csr::make(&PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(), principal).unwrap()
    };
    let refused = |request: &SignRequest<'_>| ca.sign(request, &|subject| *subject == cart).unwrap_err();

    assert_eq!(refused(&request("nonsense", &cart)), Refusal::Malformed);
    assert_eq!(refused(&request(&"x".repeat(20_000), &cart)), Refusal::Malformed);
    assert_eq!(refused(&request(&fresh(&other), &other)), Refusal::NotHosted);
    assert_eq!(refused(&request(&fresh(&other), &cart)), Refusal::IdentityMismatch);
    assert_eq!(refused(&request(&fresh(&foreign), &foreign)), Refusal::TrustDomain);
    let csr = fresh(&cart);
    for ttl in [Duration::ZERO, 91 * DAY] {
        assert_eq!(refused(&SignRequest { ttl: Some(ttl), ..request(&csr, &cart) }), Refusal::Ttl);
    }
    // Only a refusal: the key is still fresh. And what the request itself says is enough.
    let request_alone = SignRequest { subject: None, ..request(&csr, &cart) };
    let issued = ca.sign(&request_alone, &|subject| *subject == cart).unwrap();
    assert_eq!(identity_of(&issued.chain[0]), Ok(identity("cart")));
    assert_eq!(refused(&request(&csr, &cart)), Refusal::ReplayedKey);

    let params = |uris: &[&str]| {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names =
            uris.iter().map(|uri| rcgen::SanType::URI((*uri).try_into().unwrap())).collect();
        params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    };
    let cart_uri = identity("cart").to_string();
    let cart_uri = cart_uri.as_str();
    for uris in [&[][..], &[cart_uri, cart_uri], &["https://a.example"]] {
        let csr = params(uris);
        let request = SignRequest { subject: None, ..request(&csr, &cart) };
        assert_eq!(refused(&request), Refusal::NoIdentity, "{uris:?}");
    }
    // A request without a name is fine if its requester says for whom it is.
    assert!(ca.sign(&request(&params(&[]), &cart), &|_| true).is_ok());

    let counters = ca.counters();
    assert_eq!(counters.issued, 2);
    assert_eq!(counters.refused[&Refusal::Malformed], 2);
    assert_eq!(counters.refused[&Refusal::Ttl], 2);
    assert_eq!(counters.refused[&Refusal::NoIdentity], 3);
    for once in [Refusal::NotHosted, Refusal::IdentityMismatch, Refusal::TrustDomain, Refusal::ReplayedKey] {
        assert_eq!(counters.refused[&once], 1, "{once:?}");
    }
}

#[test]
fn a_replayed_key_is_refused_for_another_identity_too() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let sign = |account: &str| {
        let principal = Principal::Workload(identity(account));
        let csr = csr::make(&key, &principal).unwrap();
        ca.sign(&request(&csr, &principal), &|_| true)
    };
    assert!(sign("cart").is_ok());
    assert_eq!(sign("bank").unwrap_err(), Refusal::ReplayedKey);
}

#[test]
fn the_cas_own_key_is_never_certified() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let key = PrivateKey::from_pem(folder.read(CA_KEY).as_bytes()).unwrap();
    let principal = Principal::Workload(identity("cart"));
    let csr = csr::make(&key, &principal).unwrap();
    assert_eq!(ca.sign(&request(&csr, &principal), &|_| true).unwrap_err(), Refusal::ReplayedKey);
}

#[test]
fn a_node_gets_a_certificate_of_its_own_kind() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let node = Principal::Node(NodeIdentity::new("cluster.local", "n1").unwrap());
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let csr = csr::make(&key, &node).unwrap();
    let issued = ca.sign(&request(&csr, &node), &|subject| *subject == node).unwrap();
    assert_eq!(crate::principal_of(&issued.chain[0]), Ok(node.clone()));
    assert_eq!(identity_of(&issued.chain[0]), Err(crate::PeerError::WrongKind));
    assert!(Svid::new(node, &key, &issued, start()).is_ok());
}

#[test]
fn the_controllers_own_certificate_has_its_names_and_one_identity() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let controller = Identity::new("cluster.local", "istio-system", "nodemesh-controller");
    let issued = ca.issue_own(&key, &controller, &["istiod.istio-system.svc".into()], DAY).unwrap();
    assert_eq!(identity_of(&issued.chain[0]), Ok(controller.clone()));
    let (_, parsed) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    assert!(names.value.general_names.contains(&GeneralName::DNSName("istiod.istio-system.svc")));
    assert!(Svid::new(controller.into(), &key, &issued, start()).is_ok());
}

#[test]
fn a_plugged_in_intermediate_signs_and_its_chain_goes_along() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let root = Forger::root("root");
    let upper = root.intermediate("upper");
    let lower = upper.intermediate("lower");
    folder.write(ROOT_CERT, &root.pem);
    folder.write(CA_CERT, &lower.pem);
    folder.write(CA_KEY, &lower.key_pem);
    // As Istio's tools write it: signing certificate, those above, the root too.
    folder.write(CERT_CHAIN, format!("{}{}{}", lower.pem, upper.pem, root.pem));
    let ca = open(&folder, &clock);
    let svid = certify(&ca, "cart");
    assert_eq!(svid.chain()[1..], [lower.certificate.clone(), upper.certificate.clone()]);
    assert_eq!(ca.trust().borrow().roots, std::slice::from_ref(&root.certificate));
    assert!(matches!(ca.rotate(None), Err(CaError::PluggedIn)));
    let rest: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!rest.contains(&"next-key.pem".into()), "{rest:?}");
}

#[test]
fn a_plugged_in_ca_whose_certificates_would_not_verify_is_refused() {
    let clock = SetClock::new();
    let root = Forger::root("root");
    let intermediate = root.intermediate("intermediate");
    let good = plugged_in(&intermediate, &root);
    let stranger = Forger::root("stranger");
    let bad: [(&str, PluggedIn); 5] = [
        ("another key", PluggedIn { ca_key: stranger.key_pem.clone().into_bytes().into(), ..good.clone() }),
        ("another root", PluggedIn { root_cert: stranger.pem.clone().into_bytes(), ..good.clone() }),
        ("no root", PluggedIn { root_cert: Vec::new(), ..good.clone() }),
        ("a list that is none", PluggedIn { crl: good.ca_cert.clone(), ca_cert: Vec::new(), ..good.clone() }),
        (
            "revoked",
            PluggedIn {
                crl: {
                    let (_, parsed) = X509Certificate::from_der(&intermediate.certificate).unwrap();
                    let list = root.revoke_raw(parsed.raw_serial(), start() + DAY);
                    crate::key::pem("X509 CRL", &list).as_bytes().to_vec()
                },
                ..good.clone()
            },
        ),
    ];
    for (what, files) in bad {
        let folder = Folder::new();
        assert!(Ca::open_with(options(&folder, &clock), Some(files)).is_err(), "{what}");
    }
    let folder = Folder::new();
    assert!(Ca::open_with(options(&folder, &clock), Some(good)).is_ok());
}

#[test]
fn a_root_without_its_key_is_an_error_and_nothing_is_overwritten() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    drop(open(&folder, &clock));
    std::fs::remove_file(folder.path().join(CA_KEY)).unwrap();
    let before = folder.read(ROOT_CERT);
    assert!(matches!(Ca::open(options(&folder, &clock)), Err(CaError::NoKey(_))));
    assert_eq!(folder.read(ROOT_CERT), before);
}

#[test]
fn bad_files_are_counted_and_the_previous_ca_goes_on_until_they_are_good() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let good = folder.read(CA_KEY);
    folder.write(CA_KEY, "rubbish");
    assert!(ca.refresh().is_err());
    assert_eq!(ca.refresh().ok(), Some(()), "not tried again before something changes");
    assert_eq!(ca.counters().reload_failures, 1);
    assert_eq!(certify(&ca, "cart").check(&bundle(&ca), start()), Ok(()));
    folder.write(CA_KEY, &good);
    ca.refresh().unwrap();
    assert_eq!(certify(&ca, "cart").check(&bundle(&ca), start()), Ok(()));
}

#[test]
fn a_revocation_list_takes_effect_without_a_restart() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let root = Forger::root("root");
    let intermediate = root.intermediate("intermediate");
    let ca = Ca::open_with(options(&folder, &clock), Some(plugged_in(&intermediate, &root))).unwrap();
    let mut trust = ca.trust();
    assert!(!trust.has_changed().unwrap());
    let (der, pem) = intermediate.revoke(&[99], start() + DAY);
    ca.replace(Some(PluggedIn { crl: pem.into_bytes(), ..plugged_in(&intermediate, &root) })).unwrap();
    assert!(trust.has_changed().unwrap());
    let crls: &[CertificateRevocationListDer<'static>] = &trust.borrow_and_update().crls;
    assert_eq!(crls, [der]);
}

#[test]
fn a_certificate_never_outlives_the_ca_and_an_ended_ca_signs_nothing() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let options = CaOptions { root_life: 2 * DAY, rotate_before: Duration::ZERO, ..options(&folder, &clock) };
    let ca = Ca::open(options).unwrap();
    clock.advance(DAY + DAY / 2);
    assert_eq!(certify(&ca, "cart").validity().not_after, start() + 2 * DAY);
    clock.advance(DAY);
    let principal = Principal::Workload(identity("cart"));
    let csr = csr::make(&PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(), &principal).unwrap();
    let refusal = ca.sign(&request(&csr, &principal), &|_| true).unwrap_err();
    assert_eq!(refusal, Refusal::CaExpired);
    assert!(refusal.is_ours());
}
