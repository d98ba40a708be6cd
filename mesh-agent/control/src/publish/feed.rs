//! Owns how a snapshot becomes resources, and which of them changed since the one before.
//!
//! Invariant: what did not change keeps its allocation in the snapshot (`compile.rs`), so it is neither encoded nor hashed
//! again: a change costs one pass of pointer comparisons plus the encoding of what changed.
//!
//! Not here: what a resource looks like (`mesh-wire`).

use std::sync::Arc;

use mesh_core::snapshot::Snapshot;
use mesh_identity::bundle::TrustMaterial;
use mesh_wire::{
    proto::nodemesh,
    wds::encoder::{Encoded, Encoder},
};
use prost::Message as _;

use super::world::{Edits, Resource};
use crate::{
    link::{Kind, SINGLE_NAMES},
    status::SourceStatus,
};

/// Remembers what was encoded last.
#[derive(Debug, Default)]
pub struct Feed {
    encoder: Encoder,
}

impl Feed {
    /// The resources that differ from the last call's.
    pub fn edits(&mut self, snapshot: &Arc<Snapshot>, source: &SourceStatus, trust: &TrustMaterial) -> Edits {
        let mut edits = Edits::new();
        let mut single = |kind: Kind, body: Vec<u8>| {
            let name: Arc<str> = SINGLE_NAMES[kind.index()].into();
            edits.insert((kind, Arc::clone(&name)), Some(Resource::new(name, body, Vec::new(), None)));
        };
        single(Kind::Trust, trust_message(trust).encode_to_vec());
        // A status that cannot be written as JSON does not exist; without one the agents would wait for it.
        let status = serde_json::to_string(source).unwrap_or_default();
        single(Kind::Source, nodemesh::Source { status }.encode_to_vec());
        for ((kind, name), edit) in self.encoder.update(snapshot) {
            let name: Arc<str> = name.into();
            let resource = edit.map(|Encoded { body, aliases, node }| {
                let aliases = aliases.into_iter().map(Arc::from).collect();
                Resource::new(Arc::clone(&name), body, aliases, node)
            });
            edits.insert((kind.into(), name), resource);
        }
        edits
    }
}

fn trust_message(material: &TrustMaterial) -> nodemesh::Trust {
    let ders =
        |roots: &[_]| roots.iter().map(|der: &rustls::pki_types::CertificateDer<'_>| der.to_vec()).collect();
    nodemesh::Trust {
        roots: ders(&material.roots),
        federated: material
            .federated
            .iter()
            .map(|(domain, roots)| (domain.to_string(), nodemesh::Roots { certificates: ders(roots) }))
            .collect(),
        revocation_lists: material.crls.iter().map(|crl| crl.to_vec()).collect(),
    }
}
