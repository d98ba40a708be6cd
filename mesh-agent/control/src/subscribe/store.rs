//! Owns the resources an agent has, and makes the state of the mesh of them.
//!
//! Invariant: a resource that cannot be used changes nothing: the one before it stays, and is what the agent claims to
//! have when it comes back.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use mesh_core::snapshot::Snapshot;
use mesh_identity::bundle::{Bundle, BundleError, TrustDomains, TrustMaterial};
use mesh_wire::{
    proto::nodemesh,
    wds::{
        self, DecodeError,
        assembler::{self, Assembler, Resource},
    },
};
use prost::Message as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};

use crate::{link::Kind, status::SourceStatus};

/// A resource as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Kind.
    pub kind: Kind,
    /// Name.
    pub name: Arc<str>,
    /// Version, as the controller said it.
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Bytes,
}

/// What the resources say together.
#[derive(Debug)]
pub struct State {
    /// The world.
    pub snapshot: Snapshot,
    /// What certificates are judged by, once the controller said it.
    pub trust: Option<TrustMaterial>,
    /// The controller's source, once it said so.
    pub source: Option<SourceStatus>,
}

/// What takes the resources of a stream: the agent's [`Store`], or something that only looks at them.
pub trait Holder {
    /// What of a kind is held, by name, with its version.
    fn versions(&self, kind: Kind) -> BTreeMap<String, String>;

    /// Takes a resource.
    ///
    /// # Errors
    /// It cannot be used; the one of that name before stays.
    fn set(&mut self, kind: Kind, name: Arc<str>, version: Arc<str>, body: Bytes)
    -> Result<(), RefusedError>;

    /// Forgets a resource; one that is not there is no error.
    fn remove(&mut self, kind: Kind, name: &str);
}

/// The resources of an agent.
#[derive(Debug, Default)]
pub struct Store {
    held: [BTreeMap<Arc<str>, Entry>; Kind::ALL.len()],
    assembler: Assembler,
    trust: Option<TrustMaterial>,
    source: Option<SourceStatus>,
}

#[derive(Clone, Debug)]
struct Entry {
    version: Arc<str>,
    body: Bytes,
}

/// A resource as it is used.
enum Usable {
    Part(Resource),
    Trust(TrustMaterial),
    Source(Box<SourceStatus>),
}

/// Why a resource is refused.
#[derive(Debug, thiserror::Error)]
pub enum RefusedError {
    /// A part of the world.
    #[error(transparent)]
    Part(#[from] DecodeError),
    /// Not the message its kind says.
    #[error("{} {name:?}: {source}", kind.as_str())]
    Message {
        /// Kind.
        kind: Kind,
        /// Name.
        name: Arc<str>,
        /// What the decoder said.
        source: prost::DecodeError,
    },
    /// Roots or revocations that cannot be used.
    #[error("{} {name:?}: {source}", Kind::Trust.as_str())]
    Trust {
        /// Name.
        name: Arc<str>,
        /// Why not.
        source: BundleError,
    },
    /// A status that is not one of ours.
    #[error("{} {name:?}: {source}", Kind::Source.as_str())]
    Status {
        /// Name.
        name: Arc<str>,
        /// Why not.
        source: serde_json::Error,
    },
}

impl Store {
    /// Takes what an earlier run held. Returns what of it cannot be used.
    pub fn load(&mut self, held: Vec<Held>) -> Vec<RefusedError> {
        held.into_iter()
            .filter_map(|Held { kind, name, version, body }| self.set(kind, name, version, body).err())
            .collect()
    }

    /// Everything held that may be written to disk. Cheap: contents are shared.
    pub fn held(&self) -> Vec<Held> {
        let of = |kind: Kind| {
            self.held[kind.index()].iter().map(move |(name, entry)| Held {
                kind,
                name: Arc::clone(name),
                version: Arc::clone(&entry.version),
                body: entry.body.clone(),
            })
        };
        Kind::ALL.into_iter().filter(|kind| !kind.is_secret()).flat_map(of).collect()
    }

    /// What the resources say together; the snapshot gets `version`. Parts that did not change keep their allocation.
    pub fn state(&mut self, version: u64) -> State {
        State {
            snapshot: Snapshot::new(version, self.assembler.parts()),
            trust: self.trust.clone(),
            source: self.source.clone(),
        }
    }
}

impl Holder for Store {
    fn versions(&self, kind: Kind) -> BTreeMap<String, String> {
        let held = self.held[kind.index()].iter();
        held.map(|(name, entry)| (name.to_string(), entry.version.to_string())).collect()
    }

    fn set(
        &mut self,
        kind: Kind,
        name: Arc<str>,
        version: Arc<str>,
        body: Bytes,
    ) -> Result<(), RefusedError> {
        match usable(kind, &name, &body)? {
            Usable::Part(resource) => self.assembler.set(&name, resource),
            Usable::Trust(material) => self.trust = Some(material),
            Usable::Source(status) => self.source = Some(*status),
        }
        self.held[kind.index()].insert(name, Entry { version, body });
        Ok(())
    }

    /// Roots stay what they were: without them nothing works.
    fn remove(&mut self, kind: Kind, name: &str) {
        self.held[kind.index()].remove(name);
        if let Some(kind) = part(kind) {
            self.assembler.remove(kind, name);
        }
    }
}

/// The kind as a part of the world, if it is one.
fn part(kind: Kind) -> Option<wds::Kind> {
    wds::Kind::ALL.into_iter().find(|part| Kind::from(*part) == kind)
}

fn usable(kind: Kind, name: &Arc<str>, body: &[u8]) -> Result<Usable, RefusedError> {
    if let Some(kind) = part(kind) {
        return Ok(Usable::Part(assembler::decode(kind, name, body)?));
    }
    let malformed = |source| RefusedError::Message { kind, name: Arc::clone(name), source };
    if kind == Kind::Source {
        let message = nodemesh::Source::decode(body).map_err(malformed)?;
        let status = serde_json::from_str(&message.status);
        let status = status.map_err(|source| RefusedError::Status { name: Arc::clone(name), source })?;
        return Ok(Usable::Source(Box::new(status)));
    }
    let message = nodemesh::Trust::decode(body).map_err(malformed)?;
    let ders = |ders: Vec<Vec<u8>>| ders.into_iter().map(CertificateDer::from).collect();
    let material = TrustMaterial {
        roots: ders(message.roots),
        federated: message
            .federated
            .into_iter()
            .map(|(domain, roots)| (domain.into(), ders(roots.certificates)))
            .collect(),
        crls: message.revocation_lists.into_iter().map(CertificateRevocationListDer::from).collect(),
    };
    // Roots that cannot be used must not replace those that can.
    Bundle::new(TrustDomains::new(""), material.clone())
        .map_err(|source| RefusedError::Trust { name: Arc::clone(name), source })?;
    Ok(Usable::Trust(material))
}
