//! Nodes: where their pods are.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1;
use mesh_core::balance::locality::Place;

use super::{
    Labels,
    metadata::{self, Scope},
};
use crate::problem::Problems;

/// Where a pod is, if it says so itself: parts with dots between them, since labels have no slashes.
const LOCALITY: &str = "istio-locality";
const NETWORK: &str = "topology.istio.io/network";

/// A node, as far as pods are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: std::sync::Arc<str>,
    /// Where it is.
    pub place: Place,
    /// Its labels, as selectors of nodes take them.
    pub labels: BTreeMap<String, String>,
}

/// Reads a node.
pub(crate) fn read(object: &v1::Node, problems: &mut Problems) -> Node {
    let name = metadata::name(&object.metadata, Scope::Cluster, problems).name;
    let labels = metadata::labels(&object.metadata);
    let part = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let place = Place {
        region: part("topology.kubernetes.io/region"),
        zone: part("topology.kubernetes.io/zone"),
        subzone: part("topology.istio.io/subzone"),
        node: name.clone(),
        network: part(NETWORK),
    };
    Node { name, place, labels: object.metadata.labels.clone().unwrap_or_default() }
}

/// What a pod's own labels say of its place; its node says the rest.
pub(super) fn place_of_pod(labels: &Labels) -> Place {
    let own = labels.get(LOCALITY).map(|text| Place::parse(&text.replace('.', "/"))).unwrap_or_default();
    Place { network: labels.get(NETWORK).cloned().unwrap_or_default(), ..own }
}

/// Where a pod is: where it says, else where its node is.
pub(crate) fn place(own: &Place, node: &str, of_node: Option<&Node>) -> Place {
    let mut place = own.clone();
    if let Some(of_node) = of_node {
        if place.region.is_empty() {
            place = Place { network: place.network, ..of_node.place.clone() };
        }
        if place.network.is_empty() {
            place.network.clone_from(&of_node.place.network);
        }
    }
    Place { node: node.into(), ..place }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn a_pod_is_where_its_label_says_else_where_its_node_is() {
        let object: v1::Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n1", "labels": {
                "topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z", "topology.istio.io/subzone": "s",
                "failure-domain.beta.kubernetes.io/zone": "old", "topology.istio.io/network": "net",
            }}
        }))
        .unwrap();
        let mut problems = Problems::default();
        let node = read(&object, &mut problems);
        let of = |pairs: &[(&str, &str)], node: Option<&Node>| {
            let place = place(&place_of_pod(&labels(pairs)), "n1", node);
            [place.region, place.zone, place.subzone, place.node, place.network]
                .map(|part| part.to_string())
                .join("|")
        };
        assert_eq!(of(&[], Some(&node)), "r|z|s|n1|net");
        assert_eq!(of(&[], None), "|||n1|");
        assert_eq!(of(&[("istio-locality", "r2.z2")], Some(&node)), "r2|z2||n1|net");
        assert_eq!(of(&[("istio-locality", "r2.z2.s2")], None), "r2|z2|s2|n1|");
        assert_eq!(of(&[("topology.istio.io/network", "own")], Some(&node)), "r|z|s|n1|own");
    }
}
