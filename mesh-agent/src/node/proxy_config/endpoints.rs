//! Endpoints of destinations with how they are doing.

use std::net::SocketAddr;

use mesh_core::{
    balance::locality::Place,
    snapshot::{Snapshot, Workload},
};
use mesh_proxy::{DestinationUse, EndpointStanding, EndpointUse, Unfit, preview};

use super::{Filter, destinations, pod_name, words};
use crate::view::{EndpointView, EndpointsView};

/// Endpoints by destination; `in_use` is what the pod's requests have in use.
pub(in super::super) fn endpoints(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    in_use: &[DestinationUse],
    filter: &Filter,
) -> EndpointsView {
    let mut rows: Vec<EndpointView> = Vec::new();
    for destination in destinations(snapshot, client, filter) {
        let (service, policy) = (destination.service, destination.policy);
        let cluster = words::cluster(snapshot, &destination.key);
        let used = in_use.iter().find(|used| used.cluster.as_ref() == Some(&destination.key));
        let all = preview::endpoints(snapshot, client, service, destination.port.port, policy);
        for standing in all {
            let is_wanted = filter.address.is_none_or(|wanted| wanted == standing.addr.ip());
            // Endpoints of other subsets are listed with theirs.
            if is_wanted && standing.unfit != Some(Unfit::OtherSubset) {
                let own = used.and_then(|used| used.endpoints.get(&standing.addr));
                rows.push(row(&standing, own, cluster.clone()));
            }
        }
    }
    // Without a client one row for all of them is enough.
    rows.dedup();
    EndpointsView { pod: pod_name(client), endpoints: rows }
}

/// One endpoint in its shape.
pub(in super::super) fn row(
    standing: &EndpointStanding,
    used: Option<&EndpointUse>,
    cluster: String,
) -> EndpointView {
    let used = used.copied().unwrap_or_default();
    let status = match (standing.unfit, used.out_for) {
        (Some(Unfit::NotReady), _) => "UNHEALTHY",
        (_, Some(_)) => "EJECTED",
        _ => "HEALTHY",
    };
    let workload = standing.workload.as_deref();
    EndpointView {
        addr: SocketAddr::new(standing.addr.ip().to_canonical(), standing.addr.port()),
        workload: workload.map(|workload| workload.name.to_string()),
        node: workload.map(|workload| workload.node.to_string()).filter(|node| !node.is_empty()),
        locality: Place::of_endpoint(workload, standing.traits.as_deref()).locality(),
        weight: standing.weight,
        priority: standing.class.and_then(|class| u32::try_from(class).ok()),
        status: status.to_owned(),
        outlier_check: if used.out_for.is_some() { "FAILED" } else { "OK" }.to_owned(),
        ejected_for_ms: used.out_for.map(words::millis),
        failures: used.failures,
        active_requests: used.active,
        cluster,
    }
}
