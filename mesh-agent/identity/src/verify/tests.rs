//! Every reason for which a peer is refused, by real handshakes in memory.

use std::io;

use mesh_core::identity::Identity;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, ServerName},
};

use super::*;
use crate::{
    bundle::TrustMaterial,
    fixture::{
        Claims, DAY, Failed, Forged, Forger, SetClock, context, handshake, identity, self_signed, start,
    },
    tls::TlsContext,
};

/// A peer of another make: shows what it is given and accepts anybody.
#[derive(Debug)]
struct AcceptAny;

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes(&default_provider().signature_verification_algorithms)
    }
}

fn foreign_client(shows: Option<Forged>, alpn: &[u8]) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAny));
    let mut config = match shows {
        Some(Forged { chain, key }) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config)
}

fn foreign_server(shows: Forged, alpn: &[u8]) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(shows.chain, shows.key)
        .unwrap();
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config)
}

/// Our agent's side: a mesh with one root, and the certificate of `server`.
struct Mesh {
    root: Forger,
    clock: Arc<SetClock>,
    context: TlsContext,
}

impl Mesh {
    fn new() -> Self {
        let (root, clock) = (Forger::root("root"), SetClock::new());
        let context = context(&[&root], clock.clone());
        Self { root, clock, context }
    }

    fn own_server(&self) -> Arc<ServerConfig> {
        let verifier = self.verifier(Expect::AnyWorkload);
        let own = self.root.leaf(&Claims::of(identity("server")));
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(own.chain, own.key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }

    fn verifier(&self, expect: Expect) -> PeerVerifier {
        PeerVerifier::new(Arc::clone(&self.context.trust), self.clock.clone(), expect)
    }

    fn own_client(&self, expected: &[Identity]) -> Arc<ClientConfig> {
        Arc::new(self.context.client(None, expected).unwrap())
    }

    /// What our server says about a client.
    fn admit(&self, shows: Forged) -> Result<Identity, PeerError> {
        match handshake(foreign_client(Some(shows), b"h2"), self.own_server()) {
            Ok((_, server)) => Ok(crate::identity_of(&server.peer_certificates().unwrap()[0]).unwrap()),
            Err(Failed::Server(error)) => Err(PeerError::of(&error)),
            Err(Failed::Client(error)) => panic!("the client failed: {error}"),
        }
    }

    /// What our client says about a server, which should be `server`.
    fn dial(&self, shows: Forged) -> Result<(), PeerRefusal> {
        match handshake(self.own_client(&[identity("server")]), foreign_server(shows, b"h2")) {
            Ok(_) => Ok(()),
            Err(Failed::Client(error)) => Err(PeerRefusal::of(&error)),
            Err(Failed::Server(error)) => panic!("the server failed: {error}"),
        }
    }

    /// Both: a client's and a server's certificate that claim the same are refused for the same reason.
    fn both_refuse(&self, expected: PeerError, shows: impl Fn() -> Forged) {
        assert_eq!(self.admit(shows()), Err(expected), "as a client");
        assert_eq!(self.dial(shows()).unwrap_err().reason, expected, "as a server");
    }
}

#[test]
fn a_workload_of_the_mesh_is_admitted_and_named() {
    let mesh = Mesh::new();
    assert_eq!(mesh.admit(mesh.root.leaf(&Claims::of(identity("client")))), Ok(identity("client")));
    assert_eq!(mesh.dial(mesh.root.leaf(&Claims::of(identity("server")))), Ok(()));
}

#[test]
fn a_chain_through_an_intermediate_is_admitted_and_one_with_a_hole_is_not() {
    let mesh = Mesh::new();
    let intermediate = mesh.root.intermediate("intermediate");
    assert_eq!(mesh.dial(intermediate.leaf(&Claims::of(identity("server")))), Ok(()));
    mesh.both_refuse(PeerError::UnknownIssuer, || {
        let mut forged = intermediate.leaf(&Claims::of(identity("server")));
        forged.chain.truncate(1);
        forged
    });
}

#[test]
fn an_expired_certificate_is_refused_as_expired() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::Expired, || {
        let claims = Claims { until: start() - DAY / 2, ..Claims::of(identity("server")) };
        mesh.root.leaf(&claims)
    });
}

#[test]
fn a_certificate_expires_by_the_injected_clock() {
    let mesh = Mesh::new();
    let leaf = || mesh.root.leaf(&Claims::of(identity("server")));
    assert_eq!(mesh.dial(leaf()), Ok(()));
    mesh.clock.advance(2 * DAY);
    mesh.both_refuse(PeerError::Expired, leaf);
}

#[test]
fn a_certificate_of_the_future_is_refused_as_not_yet_valid() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::NotYetValid, || {
        let claims = Claims { from: start() + DAY / 2, ..Claims::of(identity("server")) };
        mesh.root.leaf(&claims)
    });
}

#[test]
fn another_trust_domain_is_refused_even_if_our_root_signed_it() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::TrustDomain, || {
        mesh.root.leaf(&Claims::of("spiffe://elsewhere.example/ns/shop/sa/server"))
    });
}

#[test]
fn an_alias_of_the_trust_domain_counts_and_stops_counting() {
    let mesh = Mesh::new();
    let leaf = || mesh.root.leaf(&Claims::of("spiffe://old.example/ns/shop/sa/client"));
    assert_eq!(mesh.admit(leaf()), Err(PeerError::TrustDomain));
    let aliased = crate::TrustDomains { local: "cluster.local".into(), aliases: vec!["old.example".into()] };
    assert!(mesh.context.trust.set_domains(aliased));
    assert_eq!(mesh.admit(leaf()).unwrap().trust_domain.as_ref(), "old.example");
    assert!(mesh.context.trust.set_domains(crate::TrustDomains::new("cluster.local")));
    assert_eq!(mesh.admit(leaf()), Err(PeerError::TrustDomain));
}

#[test]
fn a_federated_domain_is_trusted_by_its_own_roots_only() {
    let mesh = Mesh::new();
    let partner = Forger::root("partner");
    let mut material = mesh.context.trust.current().material().clone();
    material.federated.insert("partner.example".into(), vec![partner.certificate.clone()]);
    mesh.context.trust.set_material(material).unwrap();
    let claims = Claims::of("spiffe://partner.example/ns/shop/sa/client");
    assert!(mesh.admit(partner.leaf(&claims)).is_ok());
    assert_eq!(mesh.admit(mesh.root.leaf(&claims)), Err(PeerError::UnknownIssuer));
    assert_eq!(mesh.admit(partner.leaf(&Claims::of(identity("client")))), Err(PeerError::UnknownIssuer));
}

#[test]
fn a_self_signed_certificate_is_refused_as_of_an_unknown_issuer() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::UnknownIssuer, || self_signed(&Claims::of(identity("server"))));
}

#[test]
fn a_forged_root_of_the_same_name_is_refused() {
    let mesh = Mesh::new();
    let forger = Forger::root("root");
    let refused = mesh.admit(forger.leaf(&Claims::of(identity("client")))).unwrap_err();
    // The library may or may not say that a root of that name exists.
    assert!(matches!(refused, PeerError::UnknownIssuer | PeerError::BadSignature), "{refused:?}");
}

#[test]
fn another_pods_identity_of_the_right_ca_is_refused_by_the_client_and_both_are_named() {
    let mesh = Mesh::new();
    let refusal = mesh.dial(mesh.root.leaf(&Claims::of(identity("other")))).unwrap_err();
    assert_eq!(refusal.reason, PeerError::WrongIdentity);
    assert!(refusal.detail.contains("/sa/other") && refusal.detail.contains("/sa/server"), "{refusal}");
}

#[test]
fn a_revoked_certificate_is_refused_and_a_stale_list_still_revokes() {
    let mesh = Mesh::new();
    let leaf = |serial| {
        let claims = Claims { serial, until: start() + 100 * DAY, ..Claims::of(identity("server")) };
        mesh.root.leaf(&claims)
    };
    let mut material = mesh.context.trust.current().material().clone();
    material.crls = vec![mesh.root.revoke(&[66], start() + DAY).0];
    mesh.context.trust.set_material(material).unwrap();
    mesh.both_refuse(PeerError::Revoked, || leaf(66));
    assert_eq!(mesh.dial(leaf(67)), Ok(()));
    mesh.clock.advance(50 * DAY);
    assert!(mesh.context.trust.current().crls_stale_for(mesh.clock.now()).is_some());
    mesh.both_refuse(PeerError::Revoked, || leaf(66));
    assert_eq!(mesh.dial(leaf(67)), Ok(()));
}

#[test]
fn what_a_revoked_intermediate_signed_is_refused() {
    let mesh = Mesh::new();
    let intermediate = mesh.root.intermediate("intermediate");
    let serial = {
        let (_, parsed) = x509_parser::parse_x509_certificate(&intermediate.certificate).unwrap();
        parsed.raw_serial().iter().skip_while(|byte| **byte == 0).copied().collect::<Vec<u8>>()
    };
    let mut material = mesh.context.trust.current().material().clone();
    let leaf = || intermediate.leaf(&Claims::of(identity("server")));
    assert_eq!(mesh.dial(leaf()), Ok(()));
    material.crls = vec![mesh.root.revoke_raw(&serial, start() + DAY)];
    mesh.context.trust.set_material(material).unwrap();
    mesh.both_refuse(PeerError::Revoked, leaf);
}

#[test]
fn every_list_of_an_issuer_counts_and_one_by_its_former_key_does_no_harm() {
    let mesh = Mesh::new();
    let (former, current) = (mesh.root.intermediate("issuing"), mesh.root.intermediate("issuing"));
    let leaf = |issuer: &Forger, serial| issuer.leaf(&Claims { serial, ..Claims::of(identity("server")) });
    let lists = [
        former.revoke(&[1], start() + DAY).0,
        current.revoke(&[2], start() + DAY).0,
        current.revoke(&[3], start() + DAY).0,
    ];
    for order in [[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]] {
        let mut material = mesh.context.trust.current().material().clone();
        material.crls = order.iter().map(|index| lists[*index].clone()).collect();
        mesh.context.trust.set_material(material).unwrap();
        for (issuer, serial, revoked) in [
            (&former, 1, true),
            (&former, 2, false),
            (&current, 1, false),
            (&current, 2, true),
            (&current, 3, true),
            (&current, 4, false),
        ] {
            let expected = if revoked { Some(PeerError::Revoked) } else { None };
            let refused = mesh.dial(leaf(issuer, serial)).err().map(|refusal| refusal.reason);
            assert_eq!(refused, expected, "serial {serial} with lists in order {order:?}");
        }
    }
}

#[test]
fn a_malformed_revocation_list_is_refused_and_the_last_good_bundle_stays() {
    let mesh = Mesh::new();
    let good = mesh.context.trust.current().material().clone();
    let mut bad = good.clone();
    bad.crls = vec![vec![0x30, 0x01, 0x00].into()];
    assert!(mesh.context.trust.set_material(bad).is_err());
    assert!(mesh.context.trust.set_material(TrustMaterial::default()).is_err());
    assert_eq!(*mesh.context.trust.current().material(), good);
}

#[test]
fn a_certificate_without_an_identity_is_refused() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::NoIdentity, || {
        let claims = Claims {
            uris: Vec::new(),
            dns: vec!["server.shop.svc".into()],
            ..Claims::of(identity("server"))
        };
        mesh.root.leaf(&claims)
    });
    mesh.both_refuse(PeerError::NoIdentity, || {
        mesh.root.leaf(&Claims { uris: Vec::new(), ..Claims::of(identity("server")) })
    });
}

#[test]
fn a_certificate_with_two_identities_is_refused_even_if_one_fits() {
    let mesh = Mesh::new();
    mesh.both_refuse(PeerError::ManyIdentities, || {
        let uris = vec![identity("server").to_string(), identity("other").to_string()];
        mesh.root.leaf(&Claims { uris, ..Claims::of(identity("server")) })
    });
}

#[test]
fn a_uri_that_is_merely_similar_to_an_identity_is_refused() {
    let mesh = Mesh::new();
    for uri in ["https://cluster.local/ns/shop/sa/server", "spiffe://cluster.local/ns/shop/sa/server/x"] {
        mesh.both_refuse(PeerError::NotSpiffe, || mesh.root.leaf(&Claims::of(uri)));
    }
}

#[test]
fn a_node_is_no_workload_but_a_client_of_the_controller() {
    let mesh = Mesh::new();
    let node = || mesh.root.leaf(&Claims::of("spiffe://cluster.local/node/n1"));
    mesh.both_refuse(PeerError::WrongKind, node);
    let verifier = mesh.verifier(Expect::WorkloadOrNode);
    let forged = node();
    let now = UnixTime::now();
    assert!(verifier.verify_client_cert(&forged.chain[0], &[], now).is_ok());
}

#[test]
fn a_certificate_for_one_side_is_not_accepted_on_the_other() {
    let mesh = Mesh::new();
    let of = |usage| {
        let claims = Claims { usages: vec![usage], ..Claims::of(identity("server")) };
        mesh.root.leaf(&claims)
    };
    assert_eq!(mesh.admit(of(ExtendedKeyUsagePurpose::ServerAuth)), Err(PeerError::Usage));
    let refusal = mesh.dial(of(ExtendedKeyUsagePurpose::ClientAuth)).unwrap_err();
    assert_eq!(refusal.reason, PeerError::Usage);
    assert!(mesh.admit(of(ExtendedKeyUsagePurpose::ClientAuth)).is_ok());
}

#[test]
fn a_client_without_a_certificate_is_refused_except_where_it_may_be_anonymous() {
    let mesh = Mesh::new();
    match handshake(foreign_client(None, b"h2"), mesh.own_server()) {
        Err(Failed::Server(error)) => assert_eq!(PeerError::of(&error), PeerError::NoCertificate),
        _ => panic!("admitted"),
    }
    let own = mesh.root.leaf(&Claims::of(identity("controller")));
    let verifier = mesh.verifier(Expect::WorkloadOrNode).or_anonymous();
    let server = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(own.chain, own.key)
        .unwrap();
    let server = Arc::new(server);
    assert!(handshake(foreign_client(None, b"h2"), Arc::clone(&server)).is_ok());
    let stranger = self_signed(&Claims::of(identity("client")));
    assert!(handshake(foreign_client(Some(stranger), b"h2"), server).is_err());
}

#[test]
fn a_peer_without_h2_is_refused_on_both_sides() {
    let mesh = Mesh::new();
    let client = foreign_client(Some(mesh.root.leaf(&Claims::of(identity("client")))), b"http/1.1");
    match handshake(client, mesh.own_server()) {
        Err(Failed::Server(error)) => assert_eq!(PeerError::of(&error), PeerError::Alpn),
        _ => panic!("admitted"),
    }
    let server = foreign_server(mesh.root.leaf(&Claims::of(identity("server"))), b"http/1.1");
    assert!(handshake(mesh.own_client(&[identity("server")]), server).is_err());
}

/// A record of the handshake type around a message.
fn record(message: &[u8]) -> Vec<u8> {
    let mut record = vec![0x16, 3, 1];
    record.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    record.extend(message);
    record
}

/// ClientHello of TLS 1.2: no extension that says which versions are supported.
fn hello_of_tls12() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    // ECDHE-ECDSA with AES-128-GCM; no compression.
    body.extend([0, 2, 0xc0, 0x2b, 1, 0]);
    // Groups: P-256. Signatures: ECDSA with P-256.
    let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3];
    body.extend([0, extensions.len() as u8]);
    body.extend(extensions);
    let mut message = vec![1, 0, 0, body.len() as u8];
    message.extend(body);
    record(&message)
}

#[test]
fn tls_1_2_is_refused_by_the_server() {
    let mesh = Mesh::new();
    let mut server = ServerConnection::new(mesh.own_server()).unwrap();
    server.read_tls(&mut io::Cursor::new(hello_of_tls12())).unwrap();
    let error = server.process_new_packets().unwrap_err();
    assert_eq!(PeerError::of(&error), PeerError::Version, "{error}");
}

#[test]
fn tls_1_2_is_refused_by_the_client() {
    let mesh = Mesh::new();
    let name = ServerName::try_from("nobody.invalid").unwrap();
    let mut client = ClientConnection::new(mesh.own_client(&[identity("server")]), name).unwrap();
    client.write_tls(&mut Vec::new()).unwrap();
    let mut body = vec![3, 3];
    body.extend([9; 32]);
    body.extend([0, 0xc0, 0x2b, 0, 0, 0]);
    let mut message = vec![2, 0, 0, body.len() as u8];
    message.extend(body);
    client.read_tls(&mut io::Cursor::new(record(&message))).unwrap();
    let error = client.process_new_packets().unwrap_err();
    assert_eq!(PeerError::of(&error), PeerError::Version, "{error}");
}

#[test]
fn what_is_not_tls_is_told_apart() {
    let mesh = Mesh::new();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0; 64]] {
        let mut server = ServerConnection::new(mesh.own_server()).unwrap();
        server.read_tls(&mut io::Cursor::new(bytes)).unwrap();
        let error = server.process_new_packets().unwrap_err();
        assert_eq!(PeerError::of(&error), PeerError::NotTls, "{error}");
    }
}

#[test]
fn a_connection_gives_its_secrets_and_no_tickets() {
    let mesh = Mesh::new();
    let svid = svid_of(&mesh, identity("server"));
    let server = mesh.context.server(&svid, Expect::AnyWorkload).unwrap();
    assert_eq!(server.send_tls13_tickets, 0);
    assert_eq!(server.max_early_data_size, 0);
    let client = mesh.context.client(Some(&svid), &[identity("server")]).unwrap();
    let (client, server) = handshake(Arc::new(client), Arc::new(server)).map_err(|_| ()).unwrap();
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert!(client.dangerous_extract_secrets().is_ok());
    assert!(server.dangerous_extract_secrets().is_ok());
}

/// A certificate of ours by the forger's root.
fn svid_of(mesh: &Mesh, identity: Identity) -> crate::Svid {
    let ca = crate::fixture::local_ca(&mesh.root, mesh.clock.clone());
    let key = crate::PrivateKey::generate(crate::KeyAlgorithm::EcdsaP256).unwrap();
    let issued = ca.issue_own(&key, &identity, &[], DAY).unwrap();
    crate::Svid::new(identity.into(), &key, &issued, start()).unwrap()
}

#[test]
fn only_signatures_of_tls_1_3_are_offered() {
    let offered = schemes(&default_provider().signature_verification_algorithms);
    assert!(offered.contains(&SignatureScheme::ECDSA_NISTP256_SHA256));
    assert!(!offered.iter().any(|scheme| matches!(
        scheme,
        SignatureScheme::RSA_PKCS1_SHA256
            | SignatureScheme::RSA_PKCS1_SHA1
            | SignatureScheme::ECDSA_SHA1_Legacy
    )));
}
