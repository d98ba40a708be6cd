//! A look at the CA's folder: does what is due in it and makes an authority of what it holds.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;

use super::{
    CaError, CaOptions, KnownRoot,
    authority::{Authority, PluggedIn, certificates},
    rotation::{Announced, Journal},
    store::{CA_CERT, CA_CRL, CA_KEY, CERT_CHAIN, Locked, NEXT_KEY, ROOT_CERT, Signature, Store},
};
use crate::{clock::unix_seconds, key::PrivateKey};

/// What a look at the folder found.
pub(super) struct Loaded {
    pub(super) authority: Authority,
    /// Announced and retired roots.
    pub(super) others: Vec<CertificateDer<'static>>,
    /// Those that are retired, and until when.
    pub(super) retired: Vec<KnownRoot>,
    pub(super) switched: bool,
}

/// What reloading remembers.
#[derive(Debug, Default)]
pub(super) struct Reload {
    pub(super) signature: Signature,
    /// Files from elsewhere (a Secret), which take precedence over the folder's.
    pub(super) plugged: Option<PluggedIn>,
    /// What the first look takes for the journal if the folder has none. Only the first: a journal that is removed later was
    /// removed on purpose.
    pub(super) known: Vec<KnownRoot>,
    /// When something in the journal is due.
    pub(super) due: Option<SystemTime>,
}

/// Makes a root and announces it. The key is stored first: a key without an announcement is nothing.
pub(super) fn announce(
    folder: &Locked<'_>,
    journal: &mut Journal,
    options: &CaOptions,
    trust_domain: &str,
    announce: Option<Duration>,
) -> Result<(), CaError> {
    let now = options.clock.now();
    let (key, pem) = PrivateKey::generate_pem(options.algorithm)?;
    let root = Authority::make_root(trust_domain, &key, now, options.root_life)?;
    folder.write(NEXT_KEY, pem.as_bytes())?;
    let switch_at = unix_seconds(now + announce.unwrap_or(options.announce));
    journal.announced = Some(Announced { root, switch_at });
    journal.write(folder)?;
    tracing::info!(switch_at, "a new root is announced");
    Ok(())
}

/// Looks at the folder, does what is due in it, and makes an authority of it.
pub(super) fn load(
    store: &Store,
    options: &CaOptions,
    trust_domain: &str,
    reload: &mut Reload,
) -> Result<Loaded, CaError> {
    let now = options.clock.now();
    let folder = store.lock()?;
    let known = std::mem::take(&mut reload.known);
    let found = Journal::find(&folder)?;
    // What was recalled is written down, or the next look would know nothing of it.
    let (mut switched, mut changed, mut rotate_at) = (false, found.is_none(), None);
    let mut journal = found.unwrap_or_else(|| Journal::recalled(known, now + options.retire));
    let plugged = match &reload.plugged {
        Some(plugged) => Some(plugged.clone()),
        None => plugged_in_of(&folder)?,
    };
    let authority = match plugged {
        Some(plugged) => {
            changed |= journal.abandon();
            Authority::plugged_in(&plugged, now)?
        }
        None => {
            switched = journal.advance(&folder, now)?;
            let authority = self_signed(&folder, options, trust_domain)?;
            // Never more than half its life, or each root would at once be followed by the next.
            let ahead = options.rotate_before.min(options.root_life / 2);
            let at = authority.not_after.checked_sub(ahead).unwrap_or(now);
            if journal.announced.is_none() && at <= now {
                announce(&folder, &mut journal, options, trust_domain, None)?;
            }
            rotate_at = journal.announced.is_none().then_some(at);
            authority
        }
    };
    let roots = authority.roots.iter().map(|root| pem_of(root)).collect();
    if journal.note(roots, now, options.retire) || changed {
        journal.write(&folder)?;
    }
    if folder.is_readable_by_others(CA_KEY) {
        tracing::warn!(folder = %options.folder.display(), "{CA_KEY} is readable by others than its owner");
    }
    let announced = journal.announced.iter().map(|next| (&next.root, next.switch_at));
    let old = journal.retired.iter().map(|old| (&old.root, old.until));
    let due = announced.clone().chain(old.clone()).map(|(_, at)| at).min();
    let (mut others, mut retired) = (Vec::new(), Vec::new());
    for (pem, _) in announced {
        others.extend(certificates(ROOT_CERT, pem.as_bytes())?);
    }
    let time = |at| SystemTime::UNIX_EPOCH + Duration::from_secs(at);
    for (pem, until) in old {
        let until = Some(time(until));
        let roots = certificates(ROOT_CERT, pem.as_bytes())?;
        retired.extend(roots.into_iter().map(|certificate| KnownRoot { certificate, until }));
    }
    others.extend(retired.iter().map(|root| root.certificate.clone()));
    let due = due.map(time);
    reload.due = due.into_iter().chain(rotate_at).min();
    reload.signature = store.signature();
    Ok(Loaded { authority, others, retired, switched })
}

/// The self-signed root of the folder; made, if there is none.
fn self_signed(folder: &Locked<'_>, options: &CaOptions, trust_domain: &str) -> Result<Authority, CaError> {
    let now = options.clock.now();
    let (root, key) = match (folder.read(ROOT_CERT)?, folder.read(CA_KEY)?) {
        (Some(root), Some(key)) => (root, key),
        (Some(_), None) => return Err(CaError::NoKey(options.folder.clone())),
        // The key is stored first, so a key alone is where somebody died.
        (None, key) => {
            let key = match key {
                Some(key) => key,
                None => {
                    let (_, pem) = PrivateKey::generate_pem(options.algorithm)?;
                    folder.write(CA_KEY, pem.as_bytes())?;
                    zeroize::Zeroizing::new(pem.as_bytes().to_vec())
                }
            };
            let root =
                Authority::make_root(trust_domain, &PrivateKey::from_pem(&key)?, now, options.root_life)?;
            folder.write(ROOT_CERT, root.as_bytes())?;
            tracing::info!(folder = %options.folder.display(), "made a root certificate");
            (zeroize::Zeroizing::new(root.into_bytes()), key)
        }
    };
    let mut authority = Authority::self_signed(&root, &key, now)?;
    if let Some(crl) = folder.read(CA_CRL)? {
        authority = authority.with_crls(&crl, now)?;
    }
    Ok(authority)
}

/// The plugged-in CA of the folder, if it has one.
fn plugged_in_of(folder: &Locked<'_>) -> Result<Option<PluggedIn>, CaError> {
    let Some(ca_cert) = folder.read(CA_CERT)? else { return Ok(None) };
    let read = |name| folder.read(name).map(Option::unwrap_or_default);
    Ok(Some(PluggedIn {
        ca_cert: ca_cert.to_vec(),
        ca_key: read(CA_KEY)?,
        cert_chain: read(CERT_CHAIN)?.to_vec(),
        root_cert: read(ROOT_CERT)?.to_vec(),
        crl: read(CA_CRL)?.to_vec(),
    }))
}

/// A certificate as PEM.
fn pem_of(der: &CertificateDer<'_>) -> String {
    crate::key::pem("CERTIFICATE", der).to_string()
}
