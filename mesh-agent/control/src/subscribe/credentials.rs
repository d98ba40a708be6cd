//! Owns who the agent is towards the controller, and whom it takes for the controller.
//!
//! Invariants: the node's key exists in memory only; the token is sent to nobody but a server that proved to be the
//! controller; the controller is known by its identity, whatever its address or name. A service account's token goes to the server that
//! has the controller's DNS name; token and roots are read from their files each time, for both are replaced there.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use mesh_core::identity::Identity;
use mesh_identity::{
    bundle::{BundleError, Trust, TrustDomains, TrustMaterial},
    clock::Clock,
    csr,
    issuer::Issued,
    key::{KeyAlgorithm, PrivateKey},
    peer::{NodeIdentity, PeerError, Principal},
    svid::Svid,
    tls::TlsContext,
};
use rustls::pki_types::{CertificateDer, ServerName};
use zeroize::Zeroizing;

use crate::link::files::certificates;

/// Life asked for in a node's certificate.
pub const NODE_CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

/// Why a node cannot talk to the controller.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A name that fits into no identity.
    #[error("{0:?} is no name of a node")]
    Node(String),
    /// Roots that are none.
    #[error("the controller's roots")]
    Roots(#[source] BundleError),
    /// The file with the controller's roots.
    #[error("the controller's roots in {}: {cause}", path.display())]
    RootFile {
        /// Which.
        path: PathBuf,
        /// Why they cannot be read.
        cause: String,
    },
    /// A key, request or configuration could not be made.
    #[error("cannot make the node's {0}: {1}")]
    Make(&'static str, String),
    /// The controller's answer is no certificate for this node.
    #[error("the node's certificate as issued is unusable: {0}")]
    Unusable(String),
}

/// Longest file of a token or of roots, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How an agent in a pod proves itself, and what it knows the controller by.
#[derive(Clone, Debug)]
pub struct ServiceAccountFiles {
    /// The projected token of the agent's service account.
    pub token: PathBuf,
    /// The roots that the controller published, PEM.
    pub roots: PathBuf,
    /// The controller's DNS name.
    pub server_name: ServerName<'static>,
}

/// What the agent shows and expects.
pub struct Credentials {
    node: NodeIdentity,
    proof: Proof,
    tls: TlsContext,
    own: Mutex<Option<Own>>,
}

/// How the node proves itself, and to whom.
enum Proof {
    /// A token at first, a certificate then; the controller is who its certificate says.
    Certificate { token: Option<Zeroizing<String>>, controller: Identity },
    /// A service account's token always; the controller is who has the name.
    ServiceAccount(ServiceAccountFiles),
}

#[derive(Clone)]
struct Own {
    svid: Arc<Svid>,
    renew_at: SystemTime,
}

impl Credentials {
    /// A node that trusts `roots` and expects `controller`.
    ///
    /// # Errors
    /// A bad name, or roots that are none.
    pub fn new(
        node: &str,
        token: Option<Zeroizing<String>>,
        controller: Identity,
        roots: TrustMaterial,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CredentialError> {
        let bad = |_: PeerError| CredentialError::Node(node.to_owned());
        let node = NodeIdentity::new(&controller.trust_domain, node).map_err(bad)?;
        let domains = TrustDomains::new(Arc::clone(&controller.trust_domain));
        let trust = Arc::new(Trust::new(domains, roots).map_err(CredentialError::Roots)?);
        let proof = Proof::Certificate { token, controller };
        Ok(Self { node, proof, tls: TlsContext { trust, clock }, own: Mutex::default() })
    }

    /// A node that proves itself by its service account.
    ///
    /// # Errors
    /// A bad name.
    pub fn of_service_account(
        node: &str,
        files: ServiceAccountFiles,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CredentialError> {
        // It never has a certificate of its own, so its trust domain is nobody's business.
        let node = NodeIdentity::new("cluster.local", node)
            .map_err(|_: PeerError| CredentialError::Node(node.to_owned()))?;
        let trust = Arc::new(Trust::empty(TrustDomains::new("cluster.local")));
        let proof = Proof::ServiceAccount(files);
        Ok(Self { node, proof, tls: TlsContext { trust, clock }, own: Mutex::default() })
    }

    /// Whether the node proves itself by a certificate once it has one.
    pub fn wants_certificate(&self) -> bool {
        matches!(self.proof, Proof::Certificate { .. })
    }

    /// The name that the controller has to show, if it is known by one.
    pub fn server_name(&self) -> Option<ServerName<'static>> {
        match &self.proof {
            Proof::Certificate { .. } => None,
            Proof::ServiceAccount(files) => Some(files.server_name.clone()),
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node.node
    }

    /// The token as a header's value, if there is one.
    pub fn bearer(&self) -> Option<Zeroizing<String>> {
        let bearer = |token: &str| Zeroizing::new(format!("Bearer {token}"));
        match &self.proof {
            Proof::Certificate { token, .. } => token.as_ref().map(|token| bearer(token)),
            Proof::ServiceAccount(files) => match read(&files.token) {
                Ok(token) => std::str::from_utf8(&token).ok().map(|token| bearer(token.trim())),
                Err(error) => {
                    tracing::error!(path = %files.token.display(), %error, "read the token of the agent's service account");
                    None
                }
            },
        }
    }

    /// Trusts what the controller says from now on.
    ///
    /// # Errors
    /// Nothing that can be trusted; what was trusted before still is.
    pub fn set_trust(&self, material: TrustMaterial) -> Result<bool, BundleError> {
        self.tls.trust.set_material(material)
    }

    /// How to speak TLS with the controller: with the node's certificate, or without one when it has none that is valid.
    ///
    /// # Errors
    /// [`CredentialError::Make`].
    pub fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, CredentialError> {
        let config = match &self.proof {
            Proof::Certificate { controller, .. } => {
                self.tls.client(self.certificate().as_deref(), std::slice::from_ref(controller))
            }
            Proof::ServiceAccount(files) => self.tls.client_of_named(&roots(&files.roots)?),
        };
        config.map(Arc::new).map_err(|error| CredentialError::Make("TLS configuration", error.to_string()))
    }

    /// The node's certificate while it is valid.
    pub fn certificate(&self) -> Option<Arc<Svid>> {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        own.svid.validity().contains(self.now()).then_some(own.svid)
    }

    /// How long until a new certificate is due; zero when it is, or when there is none.
    pub fn renewal_in(&self) -> Duration {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        own.and_then(|own| own.renew_at.duration_since(self.now()).ok()).unwrap_or_default()
    }

    /// A new key and the request for its certificate.
    ///
    /// # Errors
    /// [`CredentialError::Make`].
    pub fn request(&self) -> Result<(PrivateKey, String), CredentialError> {
        let key = PrivateKey::generate(KeyAlgorithm::default())
            .map_err(|error| CredentialError::Make("key", error.to_string()))?;
        let request = csr::make(&key, &self.principal())
            .map_err(|error| CredentialError::Make("certificate request", error.to_string()))?;
        Ok((key, request))
    }

    /// Takes an issued certificate into use.
    ///
    /// # Errors
    /// [`CredentialError::Unusable`].
    pub fn install(&self, key: &PrivateKey, issued: &Issued) -> Result<Arc<Svid>, CredentialError> {
        let svid = Svid::new(self.principal(), key, issued, self.now())
            .map_err(|error| CredentialError::Unusable(error.to_string()))?;
        let now = self.now();
        svid.check(&self.tls.trust.current(), now)
            .map_err(|refusal| CredentialError::Unusable(refusal.to_string()))?;
        let jitter = random() as f64 / u64::MAX as f64 * 2.0 - 1.0;
        let svid = Arc::new(svid);
        let renew_at = svid.renew_at(now, jitter);
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Own { svid: Arc::clone(&svid), renew_at });
        Ok(svid)
    }

    pub(super) fn principal(&self) -> Principal {
        Principal::Node(self.node.clone())
    }

    fn now(&self) -> SystemTime {
        self.tls.clock.now()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The roots in a file.
fn roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let failed = |error: String| CredentialError::RootFile { path: path.to_owned(), cause: error };
    let pem = read(path).map_err(|error| failed(error.to_string()))?;
    certificates(&pem).map_err(|error| failed(error.to_string()))
}

/// A small file.
fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Any number. Waits without chance are still waits, so a system without random bytes is not worth failing for.
pub(super) fn random() -> u64 {
    let mut bytes = [0; 8];
    match SystemRandom::new().fill(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => u64::MAX / 2,
    }
}
