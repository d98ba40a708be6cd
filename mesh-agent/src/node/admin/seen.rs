//! Owns the questions of `meshctl proxy-config`, and what they and `meshctl explain` need of the data path.

use std::sync::Arc;

use mesh_core::{
    plan::ActualPod,
    snapshot::{Snapshot, Workload},
};
use mesh_proxy::{DestinationUse, preview::AskedRequest};
use mesh_redirect::LiveTables;

use super::{Query, Refusal, Shared};
use crate::{
    node::{
        explain::Asked,
        proxy_config::{self, Filter},
    },
    view::{ClustersView, EndpointsView, ListenersView, RoutesView},
};

/// The live world as one pod sees it, or as everybody does.
pub(super) struct Seen<'a> {
    shared: &'a Shared,
    snapshot: &'a Arc<Snapshot>,
    client: Option<&'a Workload>,
    enrolled: Option<(u32, &'a ActualPod)>,
    used: Vec<DestinationUse>,
    filter: &'a Filter,
}

impl<'a> Seen<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        snapshot: &'a Arc<Snapshot>,
        client: Option<&'a Workload>,
        enrolled: Option<(u32, &'a ActualPod)>,
        used: &[DestinationUse],
        filter: &'a Filter,
    ) -> Self {
        let used = of_pod(used, enrolled.map(|(pod, _)| pod));
        Self { shared, snapshot, client, enrolled, used, filter }
    }

    pub(super) fn routes(&self) -> Result<RoutesView, Refusal> {
        let view = proxy_config::routes(self.snapshot, self.client, self.filter);
        self.unless_empty(view.tables.is_empty(), view, "rule")
    }

    pub(super) fn clusters(&self) -> Result<ClustersView, Refusal> {
        let unusable = self.shared.proxy.unusable_tls(self.snapshot);
        let view = proxy_config::clusters(self.snapshot, self.client, (&self.used, &unusable), self.filter);
        self.unless_empty(view.clusters.is_empty(), view, "destination")
    }

    pub(super) fn endpoints(&self) -> Result<EndpointsView, Refusal> {
        let view = proxy_config::endpoints(self.snapshot, self.client, &self.used, self.filter);
        self.unless_empty(view.endpoints.is_empty(), view, "endpoint")
    }

    pub(super) fn listeners(&self) -> Result<ListenersView, Refusal> {
        let tables = LiveTables::new(self.shared.kernel.maps());
        let enrolled = self.enrolled.is_some();
        let view = proxy_config::listeners(self.snapshot, &tables, self.client, enrolled, self.filter);
        self.unless_empty(
            view.in_pod.is_empty() && view.services.is_empty(),
            view,
            "listener or service port",
        )
    }

    /// Somebody who asks for something that is not there wants to hear so.
    fn unless_empty<V>(&self, is_empty: bool, view: V, what: &str) -> Result<V, Refusal> {
        match self.filter.describe().filter(|_| is_empty) {
            None => Ok(view),
            Some(filter) => {
                let whom = self.client.map(|client| format!(" for pod {}", client.name)).unwrap_or_default();
                Err(Refusal::asked(format!(
                    "there is no {what} with {filter}{whom}; `meshctl proxy-config clusters` lists hosts, ports and subsets"
                )))
            }
        }
    }
}

/// What requests of one pod have in use.
pub(super) fn of_pod(used: &[DestinationUse], pod: Option<u32>) -> Vec<DestinationUse> {
    used.iter().filter(|used| Some(used.pod) == pod).cloned().collect()
}

/// The request or TLS connection that is asked about, if one is.
pub(super) fn asked(query: &Query, to: &str) -> Result<Option<Asked>, Refusal> {
    if let Some(sni) = query.value("sni") {
        return Ok(Some(Asked::Tls(sni.trim_end_matches('.').to_ascii_lowercase())));
    }
    if ["method", "path", "header"].iter().all(|key| query.value(key).is_none()) {
        return Ok(None);
    }
    let header = |line: &str| match line.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => {
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        }
        _ => Err(Refusal::asked(format!("header = {line:?} is not NAME: VALUE"))),
    };
    Ok(Some(Asked::Request(AskedRequest {
        method: query.value("method").unwrap_or("GET").to_owned(),
        target: query.value("path").unwrap_or("/").to_owned(),
        authority: to.to_owned(),
        headers: query.values("header").map(header).collect::<Result<_, _>>()?,
    })))
}
