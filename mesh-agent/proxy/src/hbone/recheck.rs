//! Looks at the peers of living tunnels again when what is trusted has changed.
//!
//! Invariant: a tunnel ends when its peer's certificate was revoked or its trust domain is trusted no more, and for nothing
//! else: certificates and roots that are replaced in the course of things break no connection.

use std::{cell::RefCell, sync::Arc};

use mesh_identity::{
    Bundle, Certificates, PeerError,
    verify::{Expect, PeerVerifier},
};
use rustls::{
    client::danger::ServerCertVerifier,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::ClientCertVerifier,
};

use super::tunnel::Role;

/// What living tunnels were last judged by.
#[derive(Debug, Default)]
pub(super) struct Recheck(RefCell<Option<Arc<Bundle>>>);

/// Judges peers by what is trusted now.
pub(super) struct Judge(PeerVerifier);

impl Recheck {
    /// A judge, if something has changed since the last time.
    pub(super) fn judge(&self, certificates: &Certificates) -> Option<Judge> {
        let current = certificates.trust().current();
        let mut last = self.0.borrow_mut();
        let changed = last.as_ref().is_some_and(|last| !Arc::ptr_eq(last, &current));
        *last = Some(current);
        changed.then(|| {
            let context = certificates.context();
            let (trust, clock) = (Arc::clone(&context.trust), Arc::clone(&context.clock));
            Judge(PeerVerifier::new(trust, clock, Expect::AnyWorkload))
        })
    }
}

impl Judge {
    /// Why a peer that was accepted once may not stay; `chain` begins with its certificate.
    pub(super) fn refuses(&self, role: Role, chain: &[CertificateDer<'_>]) -> Option<PeerError> {
        let (leaf, intermediates) = chain.split_first()?;
        let now = UnixTime::now();
        let outcome = match role {
            Role::Server => self.0.verify_client_cert(leaf, intermediates, now).map(|_| ()),
            Role::Client => {
                let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
                self.0.verify_server_cert(leaf, intermediates, &nobody, &[], now).map(|_| ())
            }
        };
        let reason = PeerError::of(&outcome.err()?);
        matches!(reason, PeerError::Revoked | PeerError::TrustDomain).then_some(reason)
    }
}
