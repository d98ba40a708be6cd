//! TLS of the harness's own HBONE: chains are checked, names are not; the peer's SPIFFE identity is read from its
//! certificate and left to the test to judge.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::authority::{AuthorityError, Credentials};

const ALPN: &[u8] = b"h2";

/// TLS 1.3, ALPN `h2`, with a client certificate.
pub(super) fn client(credentials: &Credentials) -> Result<Arc<ClientConfig>, AuthorityError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = ByChain { roots: roots(credentials)?, provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(credentials.chain.clone(), credentials.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// As [`client`], but showing no certificate.
pub(super) fn anonymous_client(credentials: &Credentials) -> Result<Arc<ClientConfig>, AuthorityError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = ByChain { roots: roots(credentials)?, provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// TLS 1.3, ALPN `h2`; clients must have a certificate of a root that the credentials trust.
pub(super) fn server(credentials: &Credentials) -> Result<Arc<ServerConfig>, AuthorityError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(credentials)?), Arc::clone(&provider));
    let verifier = verifier.build().map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain.clone(), credentials.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The URI names of a peer's certificate, joined by commas; empty without a certificate.
pub(super) fn identity(chain: Option<&[CertificateDer<'_>]>) -> String {
    let Some(first) = chain.and_then(|chain| chain.first()) else { return String::new() };
    let Ok((_, certificate)) = X509Certificate::from_der(first) else { return "unreadable".to_owned() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return String::new() };
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    uris.collect::<Vec<_>>().join(",")
}

fn roots(credentials: &Credentials) -> Result<RootCertStore, AuthorityError> {
    let mut store = RootCertStore::empty();
    for root in &credentials.roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

/// Accepts any server with a good chain.
#[derive(Debug)]
struct ByChain {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByChain {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let bad = |_| Error::InvalidCertificate(CertificateError::BadEncoding);
        let certificate = webpki::EndEntityCert::try_from(end_entity).map_err(bad)?;
        certificate
            .verify_for_usage(
                self.provider.signature_verification_algorithms.all,
                &self.roots.roots,
                intermediates,
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
