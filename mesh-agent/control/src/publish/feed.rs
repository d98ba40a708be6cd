//! Owns how a snapshot becomes resources, and which of them changed since the one before.
//!
//! Invariant: what did not change keeps its allocation in the snapshot (`compile.rs`), so it is neither encoded nor hashed
//! again: a change costs one pass of pointer comparisons plus the encoding of what changed.
//!
//! Not here: what a resource looks like (`mesh-wire`).

use std::sync::Arc;

use mesh_core::{reach::Reach, snapshot::Snapshot};
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
    /// What was encoded last: roots and the state of the source change without it.
    last: Option<Arc<Snapshot>>,
}

impl Feed {
    /// The resources that differ from the last call's.
    pub fn edits(&mut self, snapshot: &Arc<Snapshot>, source: &SourceStatus, trust: &TrustMaterial) -> Edits {
        let mut edits = Edits::new();
        let mut single = |kind: Kind, body: Vec<u8>| {
            let name: Arc<str> = SINGLE_NAMES[kind.index()].into();
            edits.insert(
                (kind, Arc::clone(&name)),
                Some(Resource::new(kind, name, body, Vec::new(), Reach::Everyone)),
            );
        };
        single(Kind::Trust, trust_message(trust).encode_to_vec());
        // Each agent counts its own states. Ours would make this another resource, for everybody, at each change of anything.
        let source = SourceStatus { version: 0, ..source.clone() };
        // A status that cannot be written as JSON does not exist; without one the agents would wait for it.
        let status = serde_json::to_string(&source).unwrap_or_default();
        single(Kind::Source, nodemesh::Source { status }.encode_to_vec());
        if self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, snapshot)) {
            return edits;
        }
        self.last = Some(Arc::clone(snapshot));
        for ((kind, name), edit) in self.encoder.update(snapshot) {
            let (kind, name): (Kind, Arc<str>) = (kind.into(), name.into());
            let resource = edit.map(|Encoded { body, aliases, reach }| {
                let aliases = aliases.into_iter().map(Arc::from).collect();
                Resource::new(kind, Arc::clone(&name), body, aliases, reach)
            });
            edits.insert((kind, name), resource);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::publish::world::World;

    #[test]
    fn a_source_that_only_counts_on_is_no_change_for_agents() {
        let (mut feed, mut world) = (Feed::default(), World::default());
        let (snapshot, trust) = (Arc::new(Snapshot::default()), TrustMaterial::default());
        let source = SourceStatus { version: 1, resources: 3, ..SourceStatus::default() };
        assert!(world.apply(feed.edits(&snapshot, &source, &trust)) > 0);
        let later = SourceStatus { version: 2, ..source.clone() };
        assert_eq!(world.apply(feed.edits(&snapshot, &later, &trust)), 0);
        let other = SourceStatus { by_kind: BTreeMap::from([(crate::resource::Kind::Pod, 4)]), ..source };
        assert_eq!(world.apply(feed.edits(&snapshot, &other, &trust)), 1);
    }
}
