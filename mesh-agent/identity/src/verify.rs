//! Decides about a peer's certificate, for both sides of TLS.
//!
//! In order: who it says it is (one URI, strictly parsed), whether that trust domain is trusted, the chain to a root *of that
//! domain* with validity, usage, constraints and revocation, and at last whether it is who was expected.
//!
//! Invariants: nothing is accepted by DNS name or address; signatures are TLS 1.3's only; the bundle and the time are read at each
//! handshake. Each refusal carries a [`PeerError`] that [`PeerRefusal::of`] finds again in the error of the handshake.

use std::{
    fmt,
    sync::{Arc, LazyLock},
    time::SystemTime,
};

use mesh_core::{identity::Identity, route::matching::StringMatch};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs::default_provider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use crate::{
    bundle::{Bundle, Trust},
    clock::{Clock, unix_time},
    peer::{CERTIFICATE_BYTES_MAX, NodeIdentity, PeerError, PeerRefusal, Principal, principal_of},
    svid::CHAIN_MAX,
};

/// What signatures are verified with.
static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| default_provider().signature_verification_algorithms);

/// The peer's side of TLS, which its certificate must be meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The peer dialled us.
    Client,
    /// We dialled the peer.
    Server,
}

/// Whom a verifier accepts, among those whose certificate is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Any workload of a trusted domain; policy decides later.
    AnyWorkload,
    /// One of these workloads.
    OneOf(Arc<[Identity]>),
    /// A workload whose SPIFFE id is one of these names.
    Named(Arc<[StringMatch]>),
    /// Any workload or any node of the *local* trust domain or its aliases: clients of the controller.
    WorkloadOrNode,
}

impl Expect {
    fn check(&self, principal: &Principal, bundle: &Bundle) -> Result<(), PeerRefusal> {
        match (self, principal) {
            (Self::AnyWorkload | Self::WorkloadOrNode, Principal::Workload(_)) => Ok(()),
            (Self::OneOf(expected), Principal::Workload(identity)) => {
                if expected.contains(identity) {
                    return Ok(());
                }
                let wanted = expected.first().map(ToString::to_string).unwrap_or_default();
                Err(PeerRefusal {
                    reason: PeerError::WrongIdentity,
                    detail: format!("it is {identity}, expected {wanted}"),
                })
            }
            (Self::Named(names), Principal::Workload(identity)) => {
                let own = identity.to_string();
                if names.iter().any(|name| name.matches(own.as_bytes())) {
                    return Ok(());
                }
                let detail = format!("it is {own}, which is none of the names expected");
                Err(PeerRefusal { reason: PeerError::WrongIdentity, detail })
            }
            (Self::WorkloadOrNode, Principal::Node(node)) => node_of_ours(node, bundle),
            (Self::AnyWorkload | Self::OneOf(_) | Self::Named(_), Principal::Node(node)) => {
                Err(PeerRefusal { reason: PeerError::WrongKind, detail: format!("it is {node}") })
            }
        }
    }
}

/// Nodes are never federated.
fn node_of_ours(node: &NodeIdentity, bundle: &Bundle) -> Result<(), PeerRefusal> {
    if bundle.domains().contains(&node.trust_domain) {
        Ok(())
    } else {
        Err(PeerRefusal { reason: PeerError::TrustDomain, detail: node.to_string() })
    }
}

/// Verifies a chain (leaf first) against the roots of `trust_domain`.
///
/// # Errors
/// The reason and, where it helps, more.
pub(crate) fn verify_chain(
    bundle: &Bundle,
    trust_domain: &str,
    chain: &[CertificateDer<'_>],
    side: Side,
    now: SystemTime,
) -> Result<(), PeerRefusal> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
    verify_path(bundle, trust_domain, leaf, intermediates, side, unix_time(now))
}

fn verify_path(
    bundle: &Bundle,
    trust_domain: &str,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    side: Side,
    now: UnixTime,
) -> Result<(), PeerRefusal> {
    if intermediates.len() >= CHAIN_MAX || intermediates.iter().any(|der| der.len() > CERTIFICATE_BYTES_MAX) {
        return Err(PeerError::Chain.into());
    }
    let anchors = bundle.anchors(trust_domain).ok_or_else(|| PeerRefusal {
        reason: PeerError::TrustDomain,
        detail: format!("{trust_domain} is not trusted"),
    })?;
    let refused = |error: webpki::Error| PeerRefusal { reason: reason_of(&error), detail: error.to_string() };
    let leaf = EndEntityCert::try_from(leaf).map_err(refused)?;
    let usage = || match side {
        Side::Client => KeyUsage::client_auth(),
        Side::Server => KeyUsage::server_auth(),
    };
    let verify = |lists: &[&CertRevocationList<'_>]| {
        // No list at all is fine, and so is a certificate that none speaks about. A stale list still revokes.
        let revocation = RevocationOptionsBuilder::new(lists).ok().map(|builder| {
            builder
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore)
                .build()
        });
        leaf.verify_for_usage(ALGORITHMS.all, anchors, intermediates, now, usage(), revocation, None)
            .map(|_| ())
    };
    let Some((first, others)) = bundle.crls().split_first() else {
        return verify(&[]).map_err(refused);
    };
    for layer in std::iter::once(first).chain(others) {
        let lists: Vec<_> = layer.iter().collect();
        match verify(&lists) {
            // A list of the issuer's name but by another key: the issuer was given a new key. Each list is tried alone, and
            // says nothing about what its signer did not issue.
            Err(webpki::Error::InvalidCrlSignatureForPublicKey) => {
                for list in lists {
                    match verify(&[list]) {
                        Err(webpki::Error::InvalidCrlSignatureForPublicKey) => {
                            verify(&[]).map_err(refused)?
                        }
                        result => result.map_err(refused)?,
                    }
                }
            }
            result => result.map_err(refused)?,
        }
    }
    Ok(())
}

fn reason_of(error: &webpki::Error) -> PeerError {
    use webpki::Error as Pki;
    match error {
        Pki::CertExpired { .. } => PeerError::Expired,
        Pki::CertNotValidYet { .. } => PeerError::NotYetValid,
        Pki::CertRevoked => PeerError::Revoked,
        Pki::UnknownIssuer | Pki::CertDistrusted => PeerError::UnknownIssuer,
        Pki::InvalidSignatureForPublicKey
        | Pki::InvalidCrlSignatureForPublicKey
        | Pki::SignatureAlgorithmMismatch => PeerError::BadSignature,
        Pki::CaUsedAsEndEntity
        | Pki::EndEntityUsedAsCa
        | Pki::EmptyEkuExtension
        | Pki::RequiredEkuNotFoundContext(_) => PeerError::Usage,
        Pki::NameConstraintViolation
        | Pki::PathLenConstraintViolated
        | Pki::UnsupportedCriticalExtension
        | Pki::MalformedNameConstraint
        | Pki::MaximumNameConstraintComparisonsExceeded
        | Pki::MaximumPathBuildCallsExceeded
        | Pki::MaximumPathDepthExceeded
        | Pki::MaximumSignatureChecksExceeded
        | Pki::UnknownRevocationStatus
        | Pki::IssuerNotCrlSigner => PeerError::Chain,
        _ => PeerError::Malformed,
    }
}

/// The verifier of one side for one expectation.
pub struct PeerVerifier {
    trust: Arc<Trust>,
    clock: Arc<dyn Clock>,
    expect: Expect,
    /// Whether a client may come without a certificate.
    anonymous: bool,
}

impl PeerVerifier {
    /// A verifier that demands a certificate.
    pub fn new(trust: Arc<Trust>, clock: Arc<dyn Clock>, expect: Expect) -> Self {
        Self { trust, clock, expect, anonymous: false }
    }

    /// Lets clients in that show no certificate; one that is shown must be valid all the same. For the controller, whose
    /// clients may authenticate by token.
    pub fn or_anonymous(mut self) -> Self {
        self.anonymous = true;
        self
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        side: Side,
    ) -> Result<(), PeerRefusal> {
        let bundle = self.trust.current();
        let principal = principal_of(leaf)?;
        // The time is the injected one, not rustls's argument, so that it is one clock however a configuration was built.
        let now = unix_time(self.clock.now());
        verify_path(&bundle, principal.trust_domain(), leaf, intermediates, side, now)?;
        self.expect.check(&principal, &bundle)
    }
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier").field("expect", &self.expect).finish_non_exhaustive()
    }
}

/// The error of rustls that carries a refusal and makes it send the fitting alert.
fn tls_error(refusal: PeerRefusal) -> rustls::Error {
    tracing::debug!(reason = refusal.reason.as_str(), detail = refusal.detail, "peer refused");
    rustls::Error::InvalidCertificate(match refusal.reason {
        PeerError::Expired => CertificateError::Expired,
        PeerError::NotYetValid => CertificateError::NotValidYet,
        PeerError::Revoked => CertificateError::Revoked,
        PeerError::UnknownIssuer => CertificateError::UnknownIssuer,
        PeerError::Malformed => CertificateError::BadEncoding,
        PeerError::BadSignature => CertificateError::BadSignature,
        _ => CertificateError::Other(OtherError(Arc::new(refusal))),
    })
}

/// TLS 1.2 is switched off in every configuration; if it were not, this would refuse.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
}

/// Schemes of TLS 1.3 (RFC 8446 §4.2.3) that aws-lc verifies: no PKCS#1 padding, no SHA-1.
fn schemes(algorithms: &WebPkiSupportedAlgorithms) -> Vec<SignatureScheme> {
    let of_tls13 = |scheme: &SignatureScheme| {
        matches!(
            scheme,
            SignatureScheme::ECDSA_NISTP256_SHA256
                | SignatureScheme::ECDSA_NISTP384_SHA384
                | SignatureScheme::ED25519
                | SignatureScheme::RSA_PSS_SHA256
                | SignatureScheme::RSA_PSS_SHA384
                | SignatureScheme::RSA_PSS_SHA512
        )
    };
    algorithms.supported_schemes().into_iter().filter(of_tls13).collect()
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, Side::Server)
            .map(|()| ServerCertVerified::assertion())
            .map_err(tls_error)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes(&ALGORITHMS)
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.anonymous
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Clients have one certificate; hints would only tell strangers about our CAs.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, Side::Client)
            .map(|()| ClientCertVerified::assertion())
            .map_err(tls_error)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes(&ALGORITHMS)
    }
}

#[cfg(test)]
mod tests;
