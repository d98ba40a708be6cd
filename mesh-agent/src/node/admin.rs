//! Owns the answer to each question at the admin socket.
//!
//! Invariants:
//! - Questions that read kernel maps run on the blocking pool, never on the control thread.

mod seen;

use std::{sync::Arc, time::Duration};

use hyper::StatusCode;
use mesh_core::{id::WorkloadId, plan::ActualPod, snapshot::Workload};
use mesh_proxy::DestinationUse;
use mesh_redirect::{LiveTables, MapError, Stats, monotonic_ns};

use self::seen::{Seen, asked, of_pod};
use super::{
    edges,
    explain::{Asked, Question, RequestQuestion, World, explain},
    http::{self, Answer, Answers, Query},
    names::Names,
    profile::profile,
    proxy_config::Filter,
    shared::Shared,
    status::status,
};
use crate::{
    report::report,
    view::{ConnectionsView, EdgesView, ExplainView, StatusView, paths},
};

/// Live connections whose bytes are added to their edges, per worker; more wait for their end to be counted.
const LIVE_MAX: usize = 50_000;
/// Longest window of a profile; the client waits all the while.
const PROFILE_SECONDS_MAX: u64 = 600;

/// Answers over the running agent.
#[derive(Debug)]
pub(super) struct Admin {
    shared: Arc<Shared>,
}

impl Admin {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared) }
    }

    async fn status(&self) -> Result<StatusView, Refusal> {
        let shared = Arc::clone(&self.shared);
        Ok(blocking(move || status(&shared)).await??)
    }

    async fn connections(&self) -> Result<ConnectionsView, Refusal> {
        let proxied = self.shared.proxy.connections(edges::CONNECTIONS_MAX).await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let (direct, errors) = shared.kernel.direct_connections(true);
            for error in &errors {
                tracing::warn!(error = %report(error), "an answer lacks a pod's Direct connections");
            }
            let snapshot = shared.snapshot();
            edges::connections(
                direct.iter().map(|connection| &connection.flow),
                &proxied,
                &Names::new(&snapshot, &shared.departed()),
                monotonic_ns(),
            )
        })
        .await
    }

    async fn edges(&self) -> Result<EdgesView, Refusal> {
        let proxied = self.shared.proxy.connections(LIVE_MAX).await;
        let shared = Arc::clone(&self.shared);
        Ok(blocking(move || {
            let kernel = Stats::new(shared.kernel.maps()).edges()?;
            let snapshot = shared.snapshot();
            let edges = edges::edges(
                &kernel,
                &shared.tunnelled(),
                &proxied,
                &Names::new(&snapshot, &shared.departed()),
            );
            Ok::<_, MapError>(EdgesView { node: shared.node.clone(), at_ns: monotonic_ns(), edges })
        })
        .await??)
    }

    async fn profile(&self, query: &Query) -> Result<crate::view::ProfileView, Refusal> {
        let seconds = query.value("seconds").unwrap_or("5");
        let window = seconds.parse().ok().filter(|s| (1..=PROFILE_SECONDS_MAX).contains(s));
        let Some(window) = window else {
            return Err(Refusal::asked(format!(
                "seconds = {seconds:?} is not a number from 1 to {PROFILE_SECONDS_MAX}"
            )));
        };
        profile(&self.shared.kernel, Duration::from_secs(window))
            .await
            .map_err(|error| Refusal::failed(report(&error)))
    }

    async fn explain(&self, query: &Query) -> Result<ExplainView, Refusal> {
        let wanted = |name| query.value(name).map(str::to_owned);
        let (Some(from), Some(to)) = (wanted("from"), wanted("to")) else {
            return Err(Refusal::asked("explain wants from=POD and to=HOST:PORT".to_owned()));
        };
        let request = asked(query, &to)?;
        let used = match request {
            Some(_) => self.shared.proxy.destinations().await,
            None => Vec::new(),
        };
        let shared = Arc::clone(&self.shared);
        blocking(move || explain_now(&shared, &from, &to, request, used)).await?
    }

    /// Answers a question about what a pod's requests are routed by.
    async fn proxy_config<V: Send + 'static>(
        &self,
        query: &Query,
        view: impl FnOnce(&Seen<'_>) -> Result<V, Refusal> + Send + 'static,
    ) -> Result<V, Refusal> {
        let filter = Filter::of(query).map_err(Refusal::asked)?;
        let pod = query.value("pod").map(str::to_owned);
        let used = self.shared.proxy.destinations().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let snapshot = shared.snapshot();
            let local = snapshot.workloads().filter(|w| *w.node == *shared.node && !w.terminated);
            let client = pod.as_deref().map(|pod| client(local.map(|w| &**w), pod)).transpose()?;
            let actual = shared.kernel.actual()?;
            let is_client = |pod: &ActualPod| client.is_some_and(|client| pod.workload == client.id);
            let enrolled = actual.iter().find(|(_, pod)| is_client(pod)).map(|(id, pod)| (*id, pod));
            view(&Seen::new(&shared, &snapshot, client, enrolled, &used, &filter))
        })
        .await?
    }
}

fn explain_now(
    shared: &Shared,
    from: &str,
    to: &str,
    request: Option<Asked>,
    used: Vec<DestinationUse>,
) -> Result<ExplainView, Refusal> {
    let port = to.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let Some((host, port)) = port.filter(|(host, port)| !host.is_empty() && *port != 0) else {
        return Err(Refusal::asked(format!("to = {to:?} is not HOST:PORT")));
    };
    let snapshot = shared.snapshot();
    let local = snapshot.workloads().filter(|w| *w.node == *shared.node && !w.terminated);
    let from = client(local.map(|w| &**w), from)?;
    let actual = shared.kernel.actual()?;
    let tables = LiveTables::new(shared.kernel.maps());
    let entry = actual.iter().find(|(_, pod)| pod.workload == from.id);
    let pod = match entry {
        Some((_, pod)) => tables.pod(pod.netns_cookie)?.map(|cfg| (pod.netns_cookie, cfg)),
        None => None,
    };
    let inbound = |id: WorkloadId| {
        let (pod, _) = actual.iter().find(|(_, pod)| pod.workload == id)?;
        Some((*pod, tables.inbound(*pod).ok().flatten()?))
    };
    let world = World { tables: &tables, snapshot: &snapshot, inbound: &inbound };
    let request =
        request.map(|asked| RequestQuestion { asked, in_use: of_pod(&used, entry.map(|(id, _)| *id)) });
    let without_certificate = entry.and_then(|_| shared.identities.certificates().missing(&from.identity()));
    let view = explain(&world, &Question { from, pod, host, port, now_ns: monotonic_ns(), request })
        .map_err(|error| Refusal::asked(error.to_string()))?;
    Ok(ExplainView { without_certificate: without_certificate.map(|why| why.to_string()), ..view })
}

/// The local pod that `text` names: `namespace/name`, or a name that only one has.
fn client<'a>(local: impl Iterator<Item = &'a Workload>, text: &str) -> Result<&'a Workload, Refusal> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    let mut found: Vec<&Workload> = local
        .filter(|w| {
            &*w.name.name == name && namespace.is_none_or(|namespace| &*w.name.namespace == namespace)
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    match &found[..] {
        [one] => Ok(one),
        [] => Err(Refusal::asked(format!(
            "no pod {text} on this node; `meshctl status` lists its pods, other nodes' agents know theirs"
        ))),
        several => {
            let names: Vec<String> = several.iter().map(|w| w.name.to_string()).collect();
            Err(Refusal::asked(format!("{text} may be any of {}; give NAMESPACE/NAME", names.join(", "))))
        }
    }
}

impl Answers for Admin {
    async fn get(&self, path: &str, query: &Query) -> Answer {
        fn answer<T: serde::Serialize>(outcome: Result<T, Refusal>) -> Answer {
            match outcome {
                Ok(view) => http::json(&view),
                Err(refusal) => http::error(refusal.status, &refusal.text),
            }
        }
        match path {
            paths::STATUS => answer(self.status().await),
            paths::CERTIFICATES => answer(Ok::<_, Refusal>(self.shared.identities.view())),
            paths::CONNECTIONS => answer(self.connections().await),
            paths::EDGES => answer(self.edges().await),
            paths::PROFILE => answer(self.profile(query).await),
            paths::EXPLAIN => answer(self.explain(query).await),
            paths::ROUTES => answer(self.proxy_config(query, |view| view.routes()).await),
            paths::CLUSTERS => answer(self.proxy_config(query, |view| view.clusters()).await),
            paths::ENDPOINTS => answer(self.proxy_config(query, |view| view.endpoints()).await),
            paths::LISTENERS => answer(self.proxy_config(query, |view| view.listeners()).await),
            other => http::error(StatusCode::NOT_FOUND, &format!("the agent has no {other}")),
        }
    }
}

/// Why a question is not answered.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    text: String,
}

impl Refusal {
    fn asked(text: String) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text }
    }

    fn failed(text: String) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, text }
    }
}

impl From<MapError> for Refusal {
    fn from(error: MapError) -> Self {
        Self::failed(report(&error))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Refusal::failed("the answer could not be computed; the agent's log says why".to_owned()))
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Name;

    use super::*;

    #[test]
    fn a_bare_name_must_be_unique() {
        let pods = [("shop", "cart"), ("test", "cart"), ("shop", "web")]
            .map(|(namespace, name)| Workload::named(Name::new(namespace, name)));
        assert_eq!(client(pods.iter(), "web").unwrap().name, pods[2].name);
        assert_eq!(client(pods.iter(), "test/cart").unwrap().name, pods[1].name);
        let refusal = client(pods.iter(), "cart").unwrap_err();
        assert!(refusal.text.contains("shop/cart, test/cart"), "{}", refusal.text);
        let refusal = client(pods.iter(), "shop/none").unwrap_err();
        assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
        assert!(refusal.text.contains("no pod shop/none"), "{}", refusal.text);
    }
}
