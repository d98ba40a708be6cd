//! What holds for requests and connections where no resource says more: what a MeshConfig says, else Istio's own values (§2.11).
//!
//! Not here: who sees a resource that does not say (`mesh-control` settles that when it compiles).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::route::{
    cluster::{Cluster, Locality, TrafficPolicy},
    http::RetryPolicy,
    normalize::PathNormalization,
    scope::OutboundPolicy,
};

/// How often a name is resolved again whose answer has no time to live, or that could not be resolved.
const DNS_REFRESH: Duration = Duration::from_secs(60);

/// Which endpoints of a service its clients prefer: `spec.trafficDistribution` of a Service (B9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// Those of the client's network, region and zone, in that order; `PreferClose` is the same.
    SameZone,
    /// The same, then those of its subzone, and of its node before all others.
    SameNode,
}

impl Distribution {
    /// The preference as classes of endpoints: in force without outlier detection too.
    pub fn locality(self) -> Locality {
        let zone =
            ["topology.istio.io/network", "topology.kubernetes.io/region", "topology.kubernetes.io/zone"];
        let node = ["topology.istio.io/subzone", "kubernetes.io/hostname"];
        let more = if self == Self::SameNode { &node[..] } else { &[] };
        let labels = zone.iter().chain(more).map(|label| ((*label).into(), None)).collect();
        Locality::Failover { regions: Vec::new(), labels, forced: true }
    }
}

/// What holds where no resource says more. A part that is not written has its default.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct MeshDefaults {
    /// What happens to destinations that nothing describes.
    pub outbound: OutboundPolicy,
    /// How tries of requests that no rule is about are repeated; `None` is never.
    pub retries: Option<RetryPolicy>,
    /// How paths are made alike before they are matched and forwarded (S96).
    pub path_normalization: PathNormalization,
    /// How long the first bytes of a connection are waited for where nobody said what it speaks; `None`: as long as the agent
    /// is told to.
    pub detection_timeout: Option<Duration>,
    /// How often a name is resolved again whose answer has no time to live, or that could not be resolved.
    pub dns_refresh: Duration,
    /// What destinations have that no DestinationRule is about.
    pub clusters: DefaultClusters,
}

/// What destinations have that no DestinationRule is about, by the preference of the service.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DefaultClusters {
    any: Arc<Cluster>,
    same_zone: Arc<Cluster>,
    same_node: Arc<Cluster>,
}

impl Default for MeshDefaults {
    fn default() -> Self {
        Self {
            outbound: OutboundPolicy::AllowAny,
            retries: Some(RetryPolicy::built_in()),
            path_normalization: PathNormalization::default(),
            detection_timeout: None,
            dns_refresh: DNS_REFRESH,
            clusters: DefaultClusters::of(&TrafficPolicy::default()),
        }
    }
}

impl DefaultClusters {
    /// With the policy of the mesh; a preference of a service beats its own, as a whole (S48).
    pub fn of(mesh: &TrafficPolicy) -> Self {
        let cluster = |locality| {
            let mut policy = mesh.clone();
            policy.balancing.locality = locality;
            Arc::new(Cluster { origin: None, labels: BTreeMap::new(), policy })
        };
        Self {
            any: cluster(mesh.balancing.locality.clone()),
            same_zone: cluster(Distribution::SameZone.locality()),
            same_node: cluster(Distribution::SameNode.locality()),
        }
    }

    /// That of a service; the same allocation for as long as the mesh says the same.
    pub fn get(&self, distribution: Option<Distribution>) -> &Arc<Cluster> {
        match distribution {
            None => &self.any,
            Some(Distribution::SameZone) => &self.same_zone,
            Some(Distribution::SameNode) => &self.same_node,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::cluster::Balancing;

    #[test]
    fn s48_the_preference_of_a_service_takes_the_place_of_the_meshs() {
        let traffic = TrafficPolicy {
            balancing: Balancing { locality: Locality::Distribute(Vec::new()), ..Balancing::default() },
            ..TrafficPolicy::default()
        };
        let clusters = DefaultClusters::of(&traffic);
        let locality = |distribution| &clusters.get(distribution).policy.balancing.locality;
        assert_eq!(*locality(None), Locality::Distribute(Vec::new()));
        let Locality::Failover { labels, forced: true, .. } = locality(Some(Distribution::SameZone)) else {
            panic!("{:?}", locality(Some(Distribution::SameZone)));
        };
        assert_eq!(labels.len(), 3);
        let Locality::Failover { labels, forced: true, .. } = locality(Some(Distribution::SameNode)) else {
            panic!("{:?}", locality(Some(Distribution::SameNode)));
        };
        assert_eq!(labels.last().map(|(label, _)| &**label), Some("kubernetes.io/hostname"));
    }
}
