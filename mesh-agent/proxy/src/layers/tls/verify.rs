//! Whether a server is the one that a policy means.
//!
//! Invariants:
//! - A server's certificate leads to a root of the policy and carries one of the names it asks for, or nothing is sent.
//! - With revocation lists no certificate of the chain is revoked, and each is of an issuer with a list that has not ended: what
//!   cannot be known counts as revoked, as with Istio's proxies.
//! - With `insecureSkipVerify` neither is looked at, but the server still proves that it has the certificate's key.

use std::sync::Arc;

use mesh_core::route::matching::StringMatch;
use rustls::{
    CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

/// What is asked of a server's certificate.
#[derive(Debug)]
pub(super) enum Trust {
    /// Nothing.
    Anything,
    /// It leads to one of these roots, and has one of these names; the server name where there are none.
    Roots {
        /// Trusted authorities.
        roots: Arc<RootCertStore>,
        /// Names that are as good as the server name.
        names: Vec<StringMatch>,
        /// What authorities have revoked; none: nobody asks.
        revoked: Vec<CertRevocationList<'static>>,
    },
}

/// Judges servers.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) trust: Trust,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::Roots { roots, names, revoked } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let cert = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&cert, roots, intermediates, now, self.algorithms.all)?;
        if !revoked.is_empty() {
            self.verify_not_revoked(roots, revoked, end_entity, intermediates, now)?;
        }
        if names.is_empty() {
            verify_server_name(&cert, server_name)?;
        } else if !has_one_of(names, &cert, end_entity) {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl Verifier {
    /// Asks the lists about a chain that is good otherwise.
    fn verify_not_revoked(
        &self,
        roots: &RootCertStore,
        revoked: &[CertRevocationList<'_>],
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let lists: Vec<&CertRevocationList<'_>> = revoked.iter().collect();
        let refused = |error: webpki::Error| match error {
            webpki::Error::CertRevoked => rustls::Error::from(CertificateError::Revoked),
            webpki::Error::CrlExpired { .. } => CertificateError::ExpiredRevocationList.into(),
            _ => CertificateError::UnknownRevocationStatus.into(),
        };
        let options = RevocationOptionsBuilder::new(&lists)
            .map_err(|_| CertificateError::UnknownRevocationStatus)?
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Deny)
            .with_expiration_policy(ExpirationPolicy::Enforce)
            .build();
        let cert = EndEntityCert::try_from(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        cert.verify_for_usage(
            self.algorithms.all,
            &roots.roots,
            intermediates,
            now,
            KeyUsage::server_auth(),
            Some(options),
            None,
        )
        .map(|_| ())
        .map_err(refused)
    }
}

/// Whether one of the certificate's DNS names and URIs, or an address of it, is among the names that are meant.
fn has_one_of(names: &[StringMatch], cert: &ParsedCertificate<'_>, der: &CertificateDer<'_>) -> bool {
    let of_host = |name: &StringMatch| {
        // As for a server name: the certificate may have a wildcard, or an address.
        let StringMatch::Exact(name) = name else { return false };
        ServerName::try_from(&**name).is_ok_and(|name| verify_server_name(cert, &name).is_ok())
    };
    if names.iter().any(of_host) {
        return true;
    }
    let Ok(cert) = EndEntityCert::try_from(der) else { return false };
    let mut own = cert.valid_dns_names().chain(cert.valid_uri_names());
    own.any(|own| names.iter().any(|name| name.matches(own.as_bytes())))
}
