//! Owns the certificate authority's place in the cluster: a Secret that somebody plugged in, else one that the first controller makes.
//!
//! Invariants: a Secret that is there is never overwritten; whoever comes second uses what the first one made; a change takes effect
//! without a restart, and only if what it would issue verifies.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::StreamExt as _;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{WatchStreamExt as _, watcher},
};
use mesh_identity::{
    Ca,
    ca::{AuthorityError, CaError, PluggedIn},
    key::KeyAlgorithm,
};
use tokio::{task::spawn_blocking, time::sleep};

use super::names::{OWN_AUTHORITY, PLUGGED_AUTHORITY, is_absent, is_conflict, metadata};

/// Pause before the API server is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// Keys of both Secrets.
const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const CERT_CHAIN: &str = "cert-chain.pem";
const ROOT_CERT: &str = "root-cert.pem";
const CA_CRL: &str = "ca-crl.pem";

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server refused or is away.
    #[error("read or make the Secret {0} in {1}")]
    Api(&'static str, String, #[source] Box<kube::Error>),
    /// A root could not be made.
    #[error("make a root")]
    Make(#[from] AuthorityError),
    /// A Secret without one of the keys that matter.
    #[error("the Secret {0} has no {1}")]
    Incomplete(&'static str, &'static str),
}

/// Where the authority is kept.
#[derive(Clone, Debug)]
pub struct AuthoritySecrets {
    secrets: Api<Secret>,
    namespace: String,
}

impl AuthoritySecrets {
    /// In this namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { secrets: Api::namespaced(client, namespace), namespace: namespace.to_owned() }
    }

    /// The authority: what was plugged in, else our own, which is made, with a key of the kind `algorithm`, if nobody has.
    ///
    /// # Errors
    /// The API server, or a Secret that holds no authority.
    pub async fn load_or_make(
        &self,
        trust_domain: &str,
        algorithm: KeyAlgorithm,
    ) -> Result<PluggedIn, SecretError> {
        loop {
            if let Some(found) = self.load().await? {
                return Ok(found);
            }
            let made = PluggedIn::self_signed(trust_domain, algorithm, SystemTime::now())?;
            let secret = Secret {
                metadata: metadata(OWN_AUTHORITY, Some(&self.namespace)),
                type_: Some("Opaque".to_owned()),
                data: Some(
                    [
                        (CA_CERT, &made.ca_cert),
                        (CA_KEY, &*made.ca_key),
                        (CERT_CHAIN, &made.ca_cert),
                        (ROOT_CERT, &made.root_cert),
                    ]
                    .map(|(key, value)| (key.to_owned(), ByteString(value.clone())))
                    .into(),
                ),
                ..Secret::default()
            };
            match self.secrets.create(&PostParams::default(), &secret).await {
                Ok(_) => tracing::info!(secret = OWN_AUTHORITY, "made the root of the mesh"),
                // Another controller was first: its root is the mesh's.
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(self.api_error(OWN_AUTHORITY, error)),
            }
        }
    }

    async fn load(&self) -> Result<Option<PluggedIn>, SecretError> {
        for name in [PLUGGED_AUTHORITY, OWN_AUTHORITY] {
            match self.secrets.get(name).await {
                Ok(secret) => return plugged_in(name, secret).map(Some),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(self.api_error(name, error)),
            }
        }
        Ok(None)
    }

    fn api_error(&self, name: &'static str, error: kube::Error) -> SecretError {
        SecretError::Api(name, self.namespace.clone(), Box::new(error))
    }

    /// Has `ca` follow the Secrets, for ever.
    pub async fn follow(&self, ca: Arc<Ca>) {
        let watch = |name: &str| {
            let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
            watcher(self.secrets.clone(), config).default_backoff()
        };
        let mut plugged = pin!(watch(PLUGGED_AUTHORITY));
        let mut own = pin!(watch(OWN_AUTHORITY));
        loop {
            let event = tokio::select! {
                event = plugged.next() => event,
                event = own.next() => event,
            };
            match event {
                Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_))) => continue,
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::warn!(%error, "watch the authority's Secrets; the authority stays as it is");
                    continue;
                }
                // The watcher never ends.
                None => sleep(PAUSE).await,
            }
            while let Err(error) = self.reload(&ca).await {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(%error, cause, "the authority stays as it was");
                match error {
                    ReloadError::Secret(SecretError::Api(..)) => sleep(PAUSE).await,
                    // Only another change of the Secret mends it.
                    _ => break,
                }
            }
        }
    }

    async fn reload(&self, ca: &Arc<Ca>) -> Result<(), ReloadError> {
        // Both are gone: whoever deleted them did not mean that running traffic ends.
        let Some(found) = self.load().await? else {
            tracing::error!("the Secret with the root of the mesh is gone; this controller goes on with it");
            return Ok(());
        };
        let ca = Arc::clone(ca);
        spawn_blocking(move || ca.replace(Some(found))).await??;
        Ok(())
    }
}

/// Why a Secret did not take effect.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the Secret holds no authority whose certificates verify")]
    Ca(#[from] CaError),
    #[error("looking at the Secret failed")]
    Defect(#[from] tokio::task::JoinError),
}

fn plugged_in(name: &'static str, secret: Secret) -> Result<PluggedIn, SecretError> {
    let mut data = secret.data.unwrap_or_default();
    let mut take = |key: &str| data.remove(key).map(|ByteString(bytes)| bytes);
    let mut wanted = |key: &'static str| take(key).ok_or(SecretError::Incomplete(name, key));
    let (ca_cert, ca_key, root_cert) = (wanted(CA_CERT)?, wanted(CA_KEY)?, wanted(ROOT_CERT)?);
    Ok(PluggedIn {
        ca_cert,
        ca_key: ca_key.into(),
        root_cert,
        cert_chain: take(CERT_CHAIN).unwrap_or_default(),
        crl: take(CA_CRL).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_without_a_key_is_no_authority() {
        let of = |keys: &[&str]| {
            let data = keys.iter().map(|key| ((*key).to_owned(), ByteString(b"x".to_vec()))).collect();
            plugged_in("cacerts", Secret { data: Some(data), ..Secret::default() })
        };
        assert!(of(&[CA_CERT, CA_KEY, ROOT_CERT]).is_ok());
        for keys in [&[][..], &[CA_CERT, CA_KEY], &[CA_CERT, ROOT_CERT], &[CA_KEY, ROOT_CERT]] {
            assert!(matches!(of(keys), Err(SecretError::Incomplete("cacerts", _))), "{keys:?}");
        }
    }

    #[test]
    fn what_is_made_is_an_authority_that_a_ca_takes() {
        let folder = std::env::temp_dir().join(format!("nodemesh-authority-{}", std::process::id()));
        let made =
            PluggedIn::self_signed("cluster.local", KeyAlgorithm::default(), SystemTime::now()).unwrap();
        let options = mesh_identity::ca::CaOptions::new(&folder, "cluster.local");
        let ca = Ca::open_with(options, Some(made.clone()));
        std::fs::remove_dir_all(&folder).ok();
        assert_eq!(ca.unwrap().trust().borrow().roots.len(), 1);
        assert_eq!(made.ca_cert, made.root_cert);
    }
}
