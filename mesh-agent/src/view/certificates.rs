//! Owns the shape of `meshctl certificates`.

use serde::{Deserialize, Serialize};

/// The certificates of this node's workloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificatesView {
    /// Node.
    pub node: String,
    /// Trust domain that identities are of.
    pub trust_domain: String,
    /// Trust domains whose identities count as the mesh's own.
    pub trust_domain_aliases: Vec<String>,
    /// Where certificates come from: the folder of the CA in this process, or the controller's URL.
    pub issuer: String,
    /// SHA-256 fingerprints of the roots that are trusted now; during a rotation more than one.
    pub roots: Vec<String>,
    /// One for each identity of a pod of this node, by identity.
    pub certificates: Vec<CertificateView>,
}

/// The certificate of one identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// SPIFFE identity.
    pub identity: String,
    /// `valid`, `pending`, `failed`, `expired`, or `untrusted`: valid in time, but not by the roots and revocations of
    /// now.
    pub state: String,
    /// Serial number, lower-case hexadecimal.
    pub serial: Option<String>,
    /// Kind of its key: `ecdsa-p256`, `ecdsa-p384`, `ed25519` or `rsa`.
    pub key: Option<String>,
    /// Start of its life, RFC 3339 in UTC.
    pub not_before: Option<String>,
    /// End of its life.
    pub not_after: Option<String>,
    /// When it will be replaced, or the next attempt is due.
    pub renew_at: Option<String>,
    /// Certificates in the chain that is sent: the leaf and what is between it and the root.
    pub chain_depth: usize,
    /// SHA-256 fingerprints of that chain, the leaf's first.
    pub chain: Vec<String>,
    /// Why the last attempt to get one failed, if it did.
    pub last_error: Option<String>,
}
