//! Which AuthorizationPolicies apply to which workloads (semantics.md S72, S73).

use std::sync::Arc;

use mesh_core::{
    mode::PortModes,
    policy::{self, AuthorizationPolicy},
    snapshot::{Mesh, Name},
};

use crate::{
    index::Index,
    resource::{Applied, Labels},
};

/// The policies that can reach the workloads of one namespace: the root namespace's and its own, all together.
pub(super) struct NamespaceRules<'a> {
    /// Sorted by name.
    candidates: Vec<(&'a Labels, &'a Name, Option<u64>)>,
    mesh: &'a Mesh,
    /// The hash computed last; most workloads of a namespace have the same.
    last: Option<(PortModes, Vec<u64>, u64)>,
}

impl<'a> NamespaceRules<'a> {
    pub(super) fn of(index: &'a Index, namespace: &str, mesh: &'a Mesh) -> Self {
        let own = (namespace != &*mesh.root_namespace).then(|| index.authorization_policies(namespace));
        let mut candidates: Vec<_> = index
            .authorization_policies(&mesh.root_namespace)
            .chain(own.into_iter().flatten())
            .filter_map(|(_, p)| Some((&p.selector, &p.name, p.applies.as_ref()?.hash)))
            .collect();
        candidates.sort_by_key(|(_, name, _)| *name);
        Self { candidates, mesh, last: None }
    }

    /// The policies of a workload with these labels, sorted, and its policy hash.
    pub(super) fn of_workload(&mut self, labels: &Labels, modes: &PortModes) -> (Vec<Name>, u64) {
        let (mut names, mut contents) = (Vec::new(), Vec::new());
        for (selector, name, hash) in &self.candidates {
            if selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
                names.push((*name).clone());
                contents.extend(hash);
            }
        }
        if let Some((last_modes, last_contents, hash)) = &self.last
            && (last_modes, last_contents) == (modes, &contents)
        {
            return (names, *hash);
        }
        let hash = policy::policy_hash(modes, self.mesh, &contents);
        self.last = Some((modes.clone(), contents, hash));
        (names, hash)
    }
}

/// The policies that a namespace contributes.
pub(super) fn declared(index: &Index, namespace: &str) -> Vec<Arc<AuthorizationPolicy>> {
    let applied = index.authorization_policies(namespace).filter_map(|(_, policy)| policy.applies.as_ref());
    applied.map(|Applied { policy, .. }| Arc::clone(policy)).collect()
}
