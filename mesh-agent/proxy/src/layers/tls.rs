//! TLS towards an endpoint, as a DestinationRule wants it.
//!
//! Invariants:
//! - Nothing is sent before the server is verified as the policy says; what a policy wants and cannot be had is an error,
//!   never plaintext.
//! - Files are looked at again at most once a second, and read again when they have changed. One that cannot be used any
//!   more leaves what was read before in use.
//! - Settings that differ never share a session or a connection.
//!
//! Not here: certificates of the mesh itself (`mesh-identity`).

mod files;
mod verify;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::{
    route::cluster::{ClientTls, ClientTlsMode},
    snapshot::{Credential, Material, Name, Snapshot, Workload},
};
use rustls::{ClientConfig, crypto::aws_lc_rs::default_provider, pki_types::ServerName};

use self::{
    files::{Folder, Stamp},
    verify::{Trust, Verifier},
};

pub(crate) use self::files::SetupError;

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Settings that are kept ready.
const SETTINGS_MAX: usize = 1024;

/// What is spoken inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Inside {
    /// Bytes: no protocol is asked for.
    Bytes,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

impl Inside {
    /// Settings of the mesh's own, asking for this.
    pub(super) fn asked_by(self, config: &ClientConfig) -> Arc<ClientConfig> {
        let mut config = config.clone();
        config.alpn_protocols = self.protocols();
        Arc::new(config)
    }

    fn protocols(self) -> Vec<Vec<u8>> {
        match self {
            Self::Bytes => Vec::new(),
            Self::Http1 => vec![b"http/1.1".to_vec()],
            Self::Http2 => vec![b"h2".to_vec()],
        }
    }
}

/// Settings that are ready for handshakes.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    /// Another one for other settings, and after a file has changed.
    pub(crate) id: u64,
    pub(super) config: Arc<ClientConfig>,
}

#[derive(Debug)]
struct Entry {
    ready: Result<Ready, SetupError>,
    /// Why the files cannot be used as they are now, also where what was read before is.
    failed: Option<SetupError>,
    stamps: Vec<Stamp>,
    /// The Secret that they were made of.
    credential: Option<Arc<Credential>>,
    looked: Instant,
}

/// Settings of all policies that want TLS.
#[derive(Debug)]
pub(crate) struct Origination {
    folder: Folder,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    all: HashMap<(ClientTls, Inside), Entry>,
    last: u64,
}

/// Whether a policy wants TLS towards an endpoint. `proved` is who the mesh has proved it to be by itself; to such a one nothing is added by
/// `ISTIO_MUTUAL`, but it has to be one of those that the policy names.
pub(crate) fn is_wanted(tls: &ClientTls, proved: Option<&Workload>) -> bool {
    match tls.mode {
        ClientTlsMode::Simple | ClientTlsMode::Mutual => true,
        ClientTlsMode::IstioMutual => proved.is_none_or(|_| !tls.subject_alt_names.is_empty()),
        ClientTlsMode::Disable => false,
    }
}

/// Whether `ISTIO_MUTUAL` has what it wants of an endpoint that the mesh has proved to be this.
///
/// # Errors
/// It is none of those that the policy names.
pub(crate) fn is_named(tls: &ClientTls, proved: &Workload) -> Result<(), SetupError> {
    let own = proved.identity().to_string();
    match tls.subject_alt_names.iter().any(|name| name.matches(own.as_bytes())) {
        true => Ok(()),
        false => Err(SetupError::OtherIdentity(own)),
    }
}

/// The server that is asked for and verified: by the policy's `sni`, else by the host.
pub(crate) fn server_name(tls: &ClientTls, host: &str) -> Result<ServerName<'static>, SetupError> {
    let name = tls.sni.as_deref().unwrap_or(host);
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    ServerName::try_from(bare.to_owned()).map_err(|_| SetupError::Name(name.to_owned()))
}

impl Origination {
    /// With the folder that the files of policies are in.
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: Folder(folder.to_owned()), known: Mutex::default() }
    }

    /// Settings for handshakes.
    ///
    /// # Errors
    /// A file cannot be read or used, or what is asked for cannot be done.
    pub(crate) fn ready(
        &self,
        tls: &ClientTls,
        inside: Inside,
        credential: Option<&Arc<Credential>>,
    ) -> Result<Ready, SetupError> {
        self.ready_at(tls, inside, credential, Instant::now())
    }

    fn ready_at(
        &self,
        tls: &ClientTls,
        inside: Inside,
        credential: Option<&Arc<Credential>>,
        now: Instant,
    ) -> Result<Ready, SetupError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { all, last } = &mut *known;
        // The name is not part of them.
        let key = (ClientTls { sni: None, ..tls.clone() }, inside);
        // One that is another now holds at once, and so does that there is none any more.
        if let Some(entry) = all.get_mut(&key).filter(|entry| entry.credential.as_ref() == credential) {
            if now.saturating_duration_since(entry.looked) < LOOK {
                return entry.ready.clone();
            }
            entry.looked = now;
            if !entry.stamps.iter().any(|stamp| self.folder.is_old(stamp)) {
                return entry.ready.clone();
            }
        }
        let paths = paths(tls);
        let stamps: Vec<Stamp> = paths.map(|path| self.folder.stamp(path)).collect();
        let made = configure(&self.folder, tls, inside, credential.map(|credential| &**credential));
        *last += 1;
        let made = made.map(|config| Ready { id: *last, config: Arc::new(config) });
        let failed = made.as_ref().err().cloned();
        let before = all.get(&key).filter(|_| tls.credential_name.is_none());
        let before = before.and_then(|entry| entry.ready.as_ref().ok()).cloned();
        let ready = match (made, before) {
            (Err(error), Some(before)) => {
                tracing::warn!(
                    error = crate::connect::report(&error),
                    "files for TLS are not usable; what was read before stays"
                );
                Ok(before)
            }
            (Err(error), None) => {
                // Looked at once a second at most, and so said.
                tracing::warn!(
                    error = crate::connect::report(&error),
                    "what a DestinationRule wants for TLS cannot be used; connections are refused"
                );
                Err(error)
            }
            (made, _) => made,
        };
        if all.len() >= SETTINGS_MAX {
            // They are made anew when they are asked for.
            all.clear();
        }
        all.insert(
            key,
            Entry { ready: ready.clone(), failed, stamps, credential: credential.cloned(), looked: now },
        );
        ready
    }

    /// Why settings cannot be used as their files are now, and whether what was read before is in use; `None` if they can, and of
    /// settings that no connection has asked for.
    pub(crate) fn unusable(
        &self,
        tls: &ClientTls,
        credential: Option<&Arc<Credential>>,
    ) -> Option<(SetupError, bool)> {
        let key = |inside| (ClientTls { sni: None, ..tls.clone() }, inside);
        [Inside::Http1, Inside::Http2, Inside::Bytes].into_iter().find_map(|inside| {
            let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if !known().all.contains_key(&key(inside)) {
                return None;
            }
            // As they are now: the last connection may be long ago.
            let ready = self.ready(tls, inside, credential);
            let error = known().all.get(&key(inside))?.failed.clone()?;
            Some((error, ready.is_ok()))
        })
    }
}

/// The files that settings are made of.
fn paths(tls: &ClientTls) -> impl Iterator<Item = &str> {
    let own = tls.client_certificate.iter().flat_map(|(certificate, key)| [&**certificate, &**key]);
    own.chain(tls.ca_certificates.as_deref()).chain(tls.ca_crl.as_deref())
}

/// The Secret that a policy means for this node's pods.
pub(crate) fn credential<'s>(
    snapshot: &'s Snapshot,
    node: &str,
    tls: &ClientTls,
) -> Option<&'s Arc<Credential>> {
    let (namespace, name) = tls.credential_name.as_deref()?.split_once('/')?;
    snapshot.credential(node, &Name::new(namespace, name))
}

/// What is in the Secret that a policy names, if it names one.
fn material<'c>(
    tls: &ClientTls,
    credential: Option<&'c Credential>,
) -> Result<Option<&'c Material>, SetupError> {
    let Some(name) = &tls.credential_name else { return Ok(None) };
    if !name.contains('/') {
        return Err(SetupError::Secret(Arc::clone(name)));
    }
    let failed = |why: &Arc<str>| SetupError::Credential { name: Arc::clone(name), why: Arc::clone(why) };
    match credential {
        None => Err(failed(&"the controller has not sent it, which an agent keeps in memory only".into())),
        Some(Credential { content: Err(why), .. }) => Err(failed(why)),
        Some(Credential { content: Ok(material), .. }) => Ok(Some(material)),
    }
}

fn configure(
    folder: &Folder,
    tls: &ClientTls,
    inside: Inside,
    credential: Option<&Credential>,
) -> Result<ClientConfig, SetupError> {
    let material = material(tls, credential)?;
    let place = || PathBuf::from(format!("Secret {}", tls.credential_name.as_deref().unwrap_or_default()));
    let provider = Arc::new(default_provider());
    let trust = if tls.insecure_skip_verify {
        Trust::Anything
    } else {
        let roots = match (material, &tls.ca_certificates) {
            // Never the system's: who names a Secret wants to say whom to trust.
            (Some(material), _) => {
                let roots = material.roots.as_deref();
                files::roots(&place(), roots.ok_or(SetupError::NoSecretRoots)?)?
            }
            (None, Some(path)) => folder.roots(path)?,
            (None, None) => files::system_roots()?,
        };
        let revoked = tls.ca_crl.as_deref().map(|path| folder.revocations(path)).transpose()?;
        Trust::Roots { roots, names: tls.subject_alt_names.clone(), revoked: revoked.unwrap_or_default() }
    };
    let verifier = Verifier { trust, algorithms: provider.signature_verification_algorithms };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(SetupError::Unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match (tls.mode, material, &tls.client_certificate) {
        (ClientTlsMode::Mutual, Some(material), _) => {
            let (Some(certificate), Some(key)) = (&material.certificate, &material.key) else {
                return Err(SetupError::NoCertificate);
            };
            let (chain, key) = (files::certificates(&place(), certificate)?, files::key(&place(), key)?);
            builder.with_client_auth_cert(chain, key).map_err(SetupError::Unusable)?
        }
        (ClientTlsMode::Mutual, None, Some((certificate, key))) => {
            let (chain, key) = (folder.certificates(certificate)?, folder.key(key)?);
            builder.with_client_auth_cert(chain, key).map_err(SetupError::Unusable)?
        }
        (ClientTlsMode::Mutual, None, None) => return Err(SetupError::NoCertificate),
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = inside.protocols();
    Ok(config)
}

#[cfg(test)]
mod tests;
