//! Owns who a workload is: keys, certificates, the CA that issues them, their rotation, and TLS configurations.
//!
//! - [`workloads::Certificates`] is what the data path holds: a TLS configuration for a source or destination, at once or
//!   "not ready"; it wants, renews and drops certificates by itself.
//! - [`issuer::Issuer`] is where certificates come from: [`issuer::LocalIssuer`] around a [`ca::Ca`] in this process, or the
//!   controller over the network.
//! - [`bundle::Trust`] is what is trusted, [`verify::PeerVerifier`] decides about a peer, [`peer::PeerError`] says why not.
//!
//! Invariant: peers are checked by identity, never by name or address; a private key of a workload never leaves memory.

pub mod bundle;
pub mod ca;
pub mod clock;
pub mod csr;
#[cfg(test)]
mod fixture;
pub mod issuer;
pub mod key;
pub mod peer;
pub mod schedule;
pub mod svid;
pub mod tls;
pub mod verify;
pub mod workloads;

pub use crate::{
    bundle::{Bundle, Trust, TrustDomains, TrustMaterial},
    ca::Ca,
    issuer::{IssueError, Issued, Issuer, LocalIssuer},
    key::{KeyAlgorithm, PrivateKey},
    peer::{NodeIdentity, PeerError, PeerRefusal, Principal, identity_of, principal_of},
    svid::Svid,
    workloads::{CertificateView, Certificates, NotReady},
};
