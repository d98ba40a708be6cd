//! Requests: ours and foreign ones are read, everything else is refused without a panic.

use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};

use super::*;
use crate::{fixture::identity, key::KeyAlgorithm};

fn request() -> Vec<u8> {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let pem = make(&key, &identity("cart").into()).unwrap();
    CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

#[test]
fn a_request_by_each_kind_of_key_reads_back() {
    for algorithm in
        [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048]
    {
        let key = PrivateKey::generate(algorithm).unwrap();
        let csr = Csr::parse(make(&key, &identity("cart").into()).unwrap().as_bytes()).unwrap();
        assert_eq!(csr.public_key(), key.public_key());
        assert_eq!(csr.uris(), [identity("cart").to_string()]);
        assert_eq!(algorithm.as_str().parse::<KeyAlgorithm>().unwrap(), algorithm);
    }
}

#[test]
fn a_stored_key_reads_back_and_its_pem_is_nothing_else() {
    for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
        let (key, pem) = PrivateKey::generate_pem(algorithm).unwrap();
        assert!(pem.lines().all(|line| line.len() <= 64), "{}", pem.lines().count());
        assert_eq!(PrivateKey::from_pem(pem.as_bytes()).unwrap().public_key(), key.public_key());
    }
    assert!(PrivateKey::from_pem(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").is_err());
    assert!(!format!("{:?}", PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()).contains("key:"));
}

#[test]
fn requests_of_other_libraries_are_read() {
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::URI("spiffe://a/ns/b/sa/c".try_into().unwrap()),
            SanType::DnsName("a.example".try_into().unwrap()),
        ];
        let request = params.serialize_request(&key).unwrap();
        assert_eq!(Csr::parse(request.der()).unwrap().uris(), ["spiffe://a/ns/b/sa/c"]);
        assert_eq!(Csr::parse(request.pem().unwrap().as_bytes()), Csr::parse(request.der()));
    }
    let bare = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
    assert!(Csr::parse(bare.der()).unwrap().uris().is_empty());
}

#[test]
fn a_request_signed_by_another_key_is_refused() {
    let mut request = request();
    let last = request.len() - 1;
    request[last] ^= 1;
    assert_eq!(Csr::parse(&request), Err(CsrError::Signature));
}

#[test]
fn a_request_for_a_swapped_identity_is_refused() {
    let request = request();
    let at = request.windows(4).position(|bytes| bytes == b"cart").unwrap();
    let mut swapped = request;
    swapped[at..at + 4].copy_from_slice(b"bank");
    assert_eq!(Csr::parse(&swapped), Err(CsrError::Signature));
}

#[test]
fn what_is_no_request_is_refused_as_malformed_or_too_long() {
    let request = request();
    let mut behind = request.clone();
    behind.push(0);
    let longest = vec![0x30; CSR_BYTES_MAX];
    let texts: [&[u8]; 6] =
        [b"", b"0", b"hello", b"-----BEGIN CERTIFICATE REQUEST-----\n!!\n", &behind, &longest];
    for text in texts {
        assert_eq!(Csr::parse(text), Err(CsrError::Malformed));
    }
    assert_eq!(Csr::parse(&request[..request.len() - 1]), Err(CsrError::Malformed));
    assert_eq!(Csr::parse(&vec![0x30; CSR_BYTES_MAX + 1]), Err(CsrError::TooLong));
}

#[test]
fn a_short_rsa_key_is_refused() {
    assert_eq!(Csr::parse(include_bytes!("rsa1024.der")), Err(CsrError::Key));
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        prop_assert!(Csr::parse(&bytes).is_err());
        let mut der = vec![0x30];
        der.extend(&bytes);
        prop_assert!(Csr::parse(&der).is_err());
    }

    #[test]
    fn a_damaged_request_neither_panics_nor_carries_another_key(
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
        cut in any::<prop::sample::Index>(),
    ) {
        let request = request();
        let good = Csr::parse(&request).unwrap();
        let mut damaged = request.clone();
        let at = at.index(damaged.len());
        damaged[at] ^= flip;
        if let Ok(csr) = Csr::parse(&damaged) {
            prop_assert_eq!(csr, good);
        }
        prop_assert!(Csr::parse(&request[..cut.index(request.len())]).is_err());
    }
}
