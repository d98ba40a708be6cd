//! Effective mutual TLS modes: mesh, namespace, workload and port (semantics.md S69).

use std::collections::BTreeMap;

use mesh_core::mode::{Mode, ModeSources, PortModes};

use crate::{
    index::{Index, Origin, located},
    problem::{Level, SourceError},
    resource::{Key, Kind, Labels, PeerAuthentication},
};

/// The policies that can reach the workloads of one namespace.
pub(super) struct NamespacePolicies<'a> {
    mesh: Option<&'a PeerAuthentication>,
    namespace: Option<&'a PeerAuthentication>,
    /// With a selector, those that win first.
    selecting: Vec<&'a PeerAuthentication>,
}

/// The policy of a whole namespace; of the root namespace: of the mesh. Later ones are reported.
pub(super) fn widest<'a>(
    index: &'a Index,
    namespace: &str,
    problems: &mut Vec<SourceError>,
) -> Option<&'a PeerAuthentication> {
    let mut wide: Vec<(&Origin, &PeerAuthentication)> =
        index.peer_authentications(namespace).filter(|(_, p)| p.selector.is_empty()).collect();
    wide.sort_by_key(|(_, policy)| precedence(policy));
    let (_, first) = *wide.first()?;
    for (origin, policy) in &wide[1..] {
        let key = Key { kind: Kind::PeerAuthentication, name: policy.name.clone() };
        let message = format!("has no effect: {} covers the same workloads and is older", first.name);
        problems.push(located(&key, origin, Level::Warning, "spec.selector", message));
    }
    Some(first)
}

/// Oldest first; one without a time is hand-written and counts as oldest, then the name decides.
fn precedence(policy: &PeerAuthentication) -> (Option<i64>, &str) {
    (policy.created, &policy.name.name)
}

impl<'a> NamespacePolicies<'a> {
    pub(super) fn of(
        index: &'a Index,
        namespace: &str,
        root: &str,
        mesh: Option<&'a PeerAuthentication>,
        problems: &mut Vec<SourceError>,
    ) -> Self {
        if namespace == root {
            // Its own wide policy is the mesh's, and selecting ones have no effect there.
            return Self { mesh, namespace: None, selecting: Vec::new() };
        }
        let mut selecting: Vec<_> = index
            .peer_authentications(namespace)
            .map(|(_, p)| p)
            .filter(|p| !p.selector.is_empty())
            .collect();
        selecting.sort_by_key(|policy| precedence(policy));
        Self { mesh, namespace: widest(index, namespace, problems), selecting }
    }

    /// The modes of a workload with these labels, and which policies they come from.
    pub(super) fn modes(&self, labels: &Labels) -> (PortModes, ModeSources) {
        let own = self
            .selecting
            .iter()
            .find(|policy| policy.selector.iter().all(|(key, value)| labels.get(key) == Some(value)));
        let decisive = [own.copied(), self.namespace, self.mesh]
            .into_iter()
            .flatten()
            .find_map(|policy| Some((policy.mode?, policy.name.clone())));
        let (default, source) = decisive.map_or((Mode::default(), None), |(mode, name)| (mode, Some(name)));
        // A port that is UNSET has the workload's mode, as if it were not there.
        let ports: BTreeMap<u16, Mode> = own
            .into_iter()
            .flat_map(|policy| &policy.ports)
            .filter_map(|(port, mode)| Some((*port, (*mode)?)))
            .collect();
        let sources =
            ModeSources { default: source, ports: own.filter(|_| !ports.is_empty()).map(|p| p.name.clone()) };
        (PortModes { default, ports }, sources)
    }
}
