//! Who a peer's certificate says it is, and the closed set of reasons why a peer is refused.
//!
//! Invariant: names are read from exactly one URI of the subject alternative names and parsed strictly; a certificate of a
//! node ([`NodeIdentity`]) never reads as a workload. Every function here is total on a peer's bytes.
//! Not here: whether a certificate is to be trusted (`verify.rs`).

use std::{fmt, str::FromStr, sync::Arc};

use mesh_core::identity::{IDENTITY_BYTES_MAX, Identity};
use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError, PeerIncompatible};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// Longest certificate of a peer that is looked at, in bytes of DER.
pub const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;

/// Why a peer is refused during or right after a TLS handshake. The set is closed: [`Self::as_str`] is a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum PeerError {
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// A certificate that is not DER of X.509 v3, or longer than [`CERTIFICATE_BYTES_MAX`].
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// No URI among the subject alternative names.
    #[error("the peer's certificate names no identity")]
    NoIdentity,
    /// More than one URI among the subject alternative names.
    #[error("the peer's certificate names more than one identity")]
    ManyIdentities,
    /// The URI is not `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT` (nor, where nodes are expected, a node).
    #[error("the peer's certificate names no SPIFFE identity of a workload")]
    NotSpiffe,
    /// The certificate of a node, where a workload is expected; or the other way round.
    #[error("the peer's identity is of the wrong kind")]
    WrongKind,
    /// A trust domain that is neither ours nor an alias.
    #[error("the peer is of a trust domain that is not trusted")]
    TrustDomain,
    /// A valid peer, but not the one that was dialled.
    #[error("the peer is not who was expected")]
    WrongIdentity,
    /// `notAfter` has passed, of the certificate or of one above it.
    #[error("the peer's certificate has expired")]
    Expired,
    /// `notBefore` is still to come.
    #[error("the peer's certificate is not valid yet")]
    NotYetValid,
    /// No chain to a root of the peer's trust domain.
    #[error("the peer's certificate was issued by an unknown authority")]
    UnknownIssuer,
    /// A signature of the handshake or of the chain is wrong.
    #[error("a signature of the peer is wrong")]
    BadSignature,
    /// Listed in a certificate revocation list.
    #[error("the peer's certificate was revoked")]
    Revoked,
    /// The certificate is not for this side of TLS, or is that of an authority.
    #[error("the peer's certificate is not meant for this use")]
    Usage,
    /// A constraint of the chain is broken: path length, names, unknown critical extensions, too many certificates.
    #[error("the peer's chain of certificates breaks a constraint")]
    Chain,
    /// The peer cannot do TLS 1.3 as we do.
    #[error("the peer offers no TLS 1.3 that we accept")]
    Version,
    /// No application protocol in common (`h2` is the only one of HBONE).
    #[error("the peer does not speak the application protocol")]
    Alpn,
    /// Bytes that are not TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The peer sent an alert: it refused us.
    #[error("the peer refused us by an alert")]
    RefusedByPeer,
    /// Any other breach of the TLS protocol, or an error on our side.
    #[error("the handshake failed")]
    Handshake,
}

impl PeerError {
    /// Every reason, for metrics that exist before their first event.
    pub const ALL: [Self; 20] = [
        Self::NoCertificate,
        Self::Malformed,
        Self::NoIdentity,
        Self::ManyIdentities,
        Self::NotSpiffe,
        Self::WrongKind,
        Self::TrustDomain,
        Self::WrongIdentity,
        Self::Expired,
        Self::NotYetValid,
        Self::UnknownIssuer,
        Self::BadSignature,
        Self::Revoked,
        Self::Usage,
        Self::Chain,
        Self::Version,
        Self::Alpn,
        Self::NotTls,
        Self::RefusedByPeer,
        Self::Handshake,
    ];

    /// The reason as a stable label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoCertificate => "tls_no_certificate",
            Self::Malformed => "tls_malformed_certificate",
            Self::NoIdentity => "tls_no_identity",
            Self::ManyIdentities => "tls_many_identities",
            Self::NotSpiffe => "tls_not_spiffe",
            Self::WrongKind => "tls_wrong_kind",
            Self::TrustDomain => "tls_trust_domain",
            Self::WrongIdentity => "tls_wrong_identity",
            Self::Expired => "tls_expired",
            Self::NotYetValid => "tls_not_yet_valid",
            Self::UnknownIssuer => "tls_unknown_issuer",
            Self::BadSignature => "tls_bad_signature",
            Self::Revoked => "tls_revoked",
            Self::Usage => "tls_usage",
            Self::Chain => "tls_chain",
            Self::Version => "tls_version",
            Self::Alpn => "tls_alpn",
            Self::NotTls => "tls_not_tls",
            Self::RefusedByPeer => "tls_refused_by_peer",
            Self::Handshake => "tls_handshake",
        }
    }

    /// The reason behind an error of rustls, whichever side raised it. [`PeerRefusal::of`] has the details.
    pub fn of(error: &rustls::Error) -> Self {
        use rustls::Error as Tls;
        match error {
            Tls::InvalidCertificate(error) => Self::of_certificate(error),
            Tls::NoCertificatesPresented => Self::NoCertificate,
            Tls::NoApplicationProtocol => Self::Alpn,
            Tls::AlertReceived(AlertDescription::ProtocolVersion) => Self::Version,
            Tls::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Alpn,
            Tls::AlertReceived(_) => Self::RefusedByPeer,
            Tls::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled,
            ) => Self::Version,
            Tls::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload
                | InvalidMessage::MessageTooShort,
            ) => Self::NotTls,
            _ => Self::Handshake,
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        if let CertificateError::Other(OtherError(inner)) = error {
            return inner.downcast_ref::<PeerRefusal>().map_or(Self::Handshake, |refusal| refusal.reason);
        }
        match error {
            CertificateError::BadEncoding => Self::Malformed,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::BadSignature => Self::BadSignature,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Self::Usage,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Self::WrongIdentity
            }
            CertificateError::UnhandledCriticalExtension => Self::Chain,
            _ => Self::Handshake,
        }
    }
}

/// A refusal with what is worth telling an operator. It travels inside [`rustls::Error`]; [`Self::of`] takes it out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}{}{detail}", if detail.is_empty() { "" } else { ": " })]
pub struct PeerRefusal {
    /// Why.
    pub reason: PeerError,
    /// More about it: who was presented, who was expected. Bounded; may be empty.
    pub detail: String,
}

impl PeerRefusal {
    /// Reason and detail behind an error of rustls.
    pub fn of(error: &rustls::Error) -> Self {
        if let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) = error
            && let Some(refusal) = inner.downcast_ref::<Self>()
        {
            return refusal.clone();
        }
        Self { reason: PeerError::of(error), detail: error.to_string() }
    }
}

impl From<PeerError> for PeerRefusal {
    fn from(reason: PeerError) -> Self {
        Self { reason, detail: String::new() }
    }
}

/// Who a node is: `spiffe://TRUST-DOMAIN/node/NAME`. Agents show it to the controller, and to nobody else.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIdentity {
    /// Trust domain, lower case.
    pub trust_domain: Arc<str>,
    /// The node's name as Kubernetes knows it.
    pub node: Arc<str>,
}

impl NodeIdentity {
    /// Makes a node's identity of its parts.
    ///
    /// # Errors
    /// A part that would not read back.
    pub fn new(trust_domain: &str, node: &str) -> Result<Self, PeerError> {
        Self::parse(&format!("spiffe://{trust_domain}/node/{node}"))
    }

    /// Reads `spiffe://TRUST-DOMAIN/node/NAME`.
    ///
    /// # Errors
    /// [`PeerError::NotSpiffe`] for any other form.
    pub fn parse(text: &str) -> Result<Self, PeerError> {
        if text.len() > IDENTITY_BYTES_MAX {
            return Err(PeerError::NotSpiffe);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(PeerError::NotSpiffe)?;
        let (trust_domain, node) = rest.split_once("/node/").ok_or(PeerError::NotSpiffe)?;
        let domain_is_valid = !trust_domain.is_empty()
            && trust_domain
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b));
        let node_is_valid = !node.is_empty()
            && node.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
            && node != "."
            && node != "..";
        if domain_is_valid && node_is_valid {
            Ok(Self { trust_domain: trust_domain.into(), node: node.into() })
        } else {
            Err(PeerError::NotSpiffe)
        }
    }
}

impl fmt::Display for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/node/{}", self.trust_domain, self.node)
    }
}

/// Whom a certificate of the mesh can be for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Principal {
    /// A workload.
    Workload(Identity),
    /// A node's agent towards the controller.
    Node(NodeIdentity),
}

impl Principal {
    /// Reads either form of URI.
    ///
    /// # Errors
    /// [`PeerError::NotSpiffe`] for any other form.
    pub fn parse(uri: &str) -> Result<Self, PeerError> {
        match Identity::parse(uri) {
            Ok(identity) => Ok(Self::Workload(identity)),
            Err(_) => NodeIdentity::parse(uri).map(Self::Node),
        }
    }

    /// The trust domain of either kind.
    pub fn trust_domain(&self) -> &Arc<str> {
        match self {
            Self::Workload(identity) => &identity.trust_domain,
            Self::Node(node) => &node.trust_domain,
        }
    }

    /// The workload, if it is one.
    pub fn workload(&self) -> Option<&Identity> {
        match self {
            Self::Workload(identity) => Some(identity),
            Self::Node(_) => None,
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(identity) => identity.fmt(f),
            Self::Node(node) => node.fmt(f),
        }
    }
}

impl FromStr for Principal {
    type Err = PeerError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        Self::parse(uri)
    }
}

impl From<Identity> for Principal {
    fn from(identity: Identity) -> Self {
        Self::Workload(identity)
    }
}

impl From<NodeIdentity> for Principal {
    fn from(node: NodeIdentity) -> Self {
        Self::Node(node)
    }
}

/// The workload a certificate names, for a certificate the verifier already accepted (or to show it).
///
/// # Errors
/// No identity, several, one that is not a workload's; nothing here says that the certificate is genuine.
pub fn identity_of(certificate: &[u8]) -> Result<Identity, PeerError> {
    match principal_of(certificate)? {
        Principal::Workload(identity) => Ok(identity),
        Principal::Node(_) => Err(PeerError::WrongKind),
    }
}

/// The workload or node a certificate names.
///
/// # Errors
/// As [`identity_of`], but a node is one too.
pub fn principal_of(certificate: &[u8]) -> Result<Principal, PeerError> {
    if certificate.len() > CERTIFICATE_BYTES_MAX {
        return Err(PeerError::Malformed);
    }
    match X509Certificate::from_der(certificate) {
        Ok(([], certificate)) => principal_in(&certificate),
        _ => Err(PeerError::Malformed),
    }
}

/// [`principal_of`] for a parsed certificate.
pub(crate) fn principal_in(certificate: &X509Certificate<'_>) -> Result<Principal, PeerError> {
    // An error here is a second extension of the same kind.
    let names = certificate.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let names = names.ok_or(PeerError::NoIdentity)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or(PeerError::NoIdentity)?;
    if uris.next().is_some() {
        return Err(PeerError::ManyIdentities);
    }
    Principal::parse(uri)
}

#[cfg(test)]
mod tests;
