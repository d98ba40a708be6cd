//! TLS configurations: 1.3 only, no resumption, no tickets, no early data, keys extractable by the record layer.
//!
//! Between agents both sides show a certificate and ALPN is `h2`. The controller's side differs only in whom it expects. Suites
//! are those of TLS 1.3 with AES-128-GCM first (cheapest in CPU where AES is in hardware); a peer may choose any of them, so
//! whoever takes a connection's secrets must handle all three.

use std::sync::{Arc, LazyLock};

use mesh_core::{identity::Identity, route::matching::StringMatch};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{ResolvesClientCert, Resumption, WebPkiServerVerifier},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{
            cipher_suite::{
                TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
            },
            default_provider, kx_group,
        },
    },
    pki_types::CertificateDer,
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
    version::TLS13,
};

use crate::{
    bundle::Trust,
    clock::{Clock, TlsTime},
    svid::Svid,
    verify::{Expect, PeerVerifier},
};

/// The application protocol of HBONE and of the controller.
pub const ALPN_H2: &[u8] = b"h2";

/// Suites and groups. A client sends a key share for the first group only; the post-quantum one is there for peers that offer
/// nothing else.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1, kx_group::X25519MLKEM768],
        ..default_provider()
    })
});

/// Configurations could not be built.
#[derive(Debug, thiserror::Error)]
#[error("cannot build a TLS configuration")]
pub struct TlsError(#[from] rustls::Error);

/// What every configuration of a process shares.
#[derive(Clone, Debug)]
pub struct TlsContext {
    /// What is trusted.
    pub trust: Arc<Trust>,
    /// The time certificates are judged by.
    pub clock: Arc<dyn Clock>,
}

impl TlsContext {
    /// The configuration of a client that shows `own` (nothing, if `None`) and accepts one of the `expected` servers.
    ///
    /// # Errors
    /// Only if aws-lc and rustls disagree about versions.
    pub fn client(&self, own: Option<&Svid>, expected: &[Identity]) -> Result<ClientConfig, TlsError> {
        let mut config = self.client_expecting(own, Expect::OneOf(expected.into()))?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        Ok(config)
    }

    /// The configuration of a client that shows `own` to a server which is no agent's and has a certificate of the mesh; without names any
    /// workload will do. No protocol is asked for.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn client_of_workload(&self, own: &Svid, names: &[StringMatch]) -> Result<ClientConfig, TlsError> {
        let expect = if names.is_empty() { Expect::AnyWorkload } else { Expect::Named(names.into()) };
        self.client_expecting(Some(own), expect)
    }

    fn client_expecting(&self, own: Option<&Svid>, expect: Expect) -> Result<ClientConfig, TlsError> {
        let verifier = self.verifier(expect);
        let builder = ClientConfig::builder_with_details(
            Arc::clone(&PROVIDER),
            Arc::new(TlsTime(Arc::clone(&self.clock))),
        )
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match own {
            Some(svid) => {
                let resolver = SingleCertAndKey::from(svid.certified_key());
                builder.with_client_cert_resolver(Arc::new(resolver) as Arc<dyn ResolvesClientCert>)
            }
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// The configuration of a client that shows nothing and accepts the server that has the DNS name it dials, under what is trusted or
    /// one of `roots`: for a client that does not know the server's identity yet. Workloads' certificates have no DNS names, so none of
    /// them is taken for the server.
    ///
    /// # Errors
    /// Nothing is trusted, or as [`Self::client`].
    pub fn client_of_named(&self, roots: &[CertificateDer<'static>]) -> Result<ClientConfig, TlsError> {
        let known = self.trust.current();
        let mut anchors = RootCertStore::empty();
        anchors.add_parsable_certificates(known.material().roots.iter().chain(roots).cloned());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(anchors), Arc::clone(&PROVIDER))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = ClientConfig::builder_with_details(
            Arc::clone(&PROVIDER),
            Arc::new(TlsTime(Arc::clone(&self.clock))),
        )
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// The configuration of a server that shows `own` and accepts the clients that `expect` says.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn server(&self, own: &Svid, expect: Expect) -> Result<ServerConfig, TlsError> {
        self.server_with(own, self.verifier(expect))
    }

    /// As [`Self::server`], but a client may also come without a certificate: it then has to authenticate otherwise.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn server_or_anonymous(&self, own: &Svid, expect: Expect) -> Result<ServerConfig, TlsError> {
        self.server_with(own, self.verifier(expect).or_anonymous())
    }

    fn server_with(&self, own: &Svid, verifier: PeerVerifier) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_details(
            Arc::clone(&PROVIDER),
            Arc::new(TlsTime(Arc::clone(&self.clock))),
        )
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(own.certified_key())));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        config.enable_secret_extraction = true;
        Ok(config)
    }

    fn verifier(&self, expect: Expect) -> PeerVerifier {
        PeerVerifier::new(Arc::clone(&self.trust), Arc::clone(&self.clock), expect)
    }
}
