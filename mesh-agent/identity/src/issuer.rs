//! Who turns a request into a certificate: the CA in this process, or the controller over the network.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use mesh_core::identity::Identity;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::{
    bundle::TrustMaterial,
    ca::{Ca, SignRequest},
    peer::Principal,
};

/// A certificate as an issuer hands it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The leaf, then intermediates up to but without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots to trust; during a rotation more than one. The issuing root is among them.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why an issuer gave no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The issuer said no, by a [`crate::ca::Refusal`]'s label or the message of a foreign CA.
    #[error("the CA refused: {0}")]
    Refused(String),
    /// The issuer could not be reached, or failed; worth another try.
    #[error("the CA is not available: {0}")]
    Unavailable(String),
    /// The issuer's answer is no certificate for this key and identity, or chains to no root.
    #[error("the CA's answer is unusable: {0}")]
    Unusable(String),
}

/// What [`Issuer::issue`] returns.
pub type Issuing<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// Something that issues certificates to this node's workloads.
///
/// Cancelling (dropping) the future is allowed at any time. Implementations bound each call in time themselves.
pub trait Issuer: Send + Sync + fmt::Debug + 'static {
    /// Asks for a certificate for the public key in `csr_pem`, which carries `identity` as its only URI.
    fn issue(&self, csr_pem: String, identity: Identity, ttl: Duration) -> Issuing<'_>;

    /// The roots and revocations as the issuer last said them. It is the only source of what this node trusts: an issuer that
    /// learns roots with each certificate (a foreign CA) must put them in here before [`Self::issue`] returns.
    fn trust(&self) -> watch::Receiver<Arc<TrustMaterial>>;
}

/// The CA of this very process: file mode with the controller embedded.
pub struct LocalIssuer {
    ca: Arc<Ca>,
    node: String,
    hosted: Box<dyn Fn(&Identity) -> bool + Send + Sync>,
}

impl LocalIssuer {
    /// An issuer for `node`, for those identities that `hosted` says live on it.
    pub fn new(
        ca: Arc<Ca>,
        node: impl Into<String>,
        hosted: impl Fn(&Identity) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { ca, node: node.into(), hosted: Box::new(hosted) }
    }
}

impl fmt::Debug for LocalIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalIssuer").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Issuer for LocalIssuer {
    fn issue(&self, csr_pem: String, identity: Identity, ttl: Duration) -> Issuing<'_> {
        Box::pin(async move {
            let subject = Principal::Workload(identity);
            let request = SignRequest {
                csr: csr_pem.as_bytes(),
                subject: Some(&subject),
                ttl: Some(ttl),
                requester: &self.node,
            };
            let allowed =
                |subject: &Principal| subject.workload().is_some_and(|identity| (self.hosted)(identity));
            self.ca.sign(&request, &allowed).map_err(|refusal| match refusal.is_ours() {
                true => IssueError::Unavailable(refusal.to_string()),
                false => IssueError::Refused(refusal.as_str().to_owned()),
            })
        })
    }

    fn trust(&self) -> watch::Receiver<Arc<TrustMaterial>> {
        self.ca.trust()
    }
}
