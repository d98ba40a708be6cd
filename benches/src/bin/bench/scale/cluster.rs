//! Owns which objects there are, and the state of each service's endpoints.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_wire::CLUSTER;
use tokio::sync::Mutex;

use super::api::Api;
use super::objects::{self, AGENT, EndpointFacts, MESH, PodFacts};

/// Services of a namespace.
const SERVICES_PER_NAMESPACE: usize = 20;
/// The first address of a pod. Nobody sends a packet anywhere.
const FIRST_ADDRESS: u32 = u32::from_be_bytes([10, 128, 0, 1]);
/// Pods that are brought up at once.
const PARALLEL: usize = 24;

/// The cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    agents: usize,
    namespaces: usize,
    services: Vec<Service>,
    next_address: AtomicU32,
    next_name: AtomicUsize,
}

/// A service with its endpoints as they were written last.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) namespace: String,
    pub(super) app: String,
    /// The lock is held while the slice is written, so that writes do not overtake each other.
    pub(super) endpoints: Mutex<Vec<EndpointFacts>>,
}

impl Service {
    /// Where its slice is.
    pub(super) fn slice_path(&self) -> String {
        format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices/{}", self.namespace, self.app)
    }

    /// Where a pod of it is.
    pub(super) fn pod_path(&self, pod: &str) -> String {
        format!("/api/v1/namespaces/{}/pods/{pod}", self.namespace)
    }
}

impl Cluster {
    /// Nothing of it is written yet.
    pub(super) fn new(agents: usize, services: usize, pods: usize) -> Self {
        let namespaces = services.div_ceil(SERVICES_PER_NAMESPACE);
        let mut cluster = Self {
            agents,
            namespaces,
            services: Vec::new(),
            next_address: AtomicU32::new(FIRST_ADDRESS),
            next_name: AtomicUsize::new(0),
        };
        cluster.services = (0..services)
            .map(|number| {
                let own = pods / services + usize::from(number < pods % services);
                let app = format!("app{number}");
                let endpoints =
                    (0..own).map(|replica| cluster.endpoint(&app, number + replica * 7)).collect();
                Service {
                    // Neighbours by number are in one namespace, so that half of the services is half of the namespaces.
                    namespace: format!("ns{}", number / SERVICES_PER_NAMESPACE),
                    endpoints: Mutex::new(endpoints),
                    app,
                }
            })
            .collect();
        cluster
    }

    /// A pod that was never there before.
    pub(super) fn endpoint(&self, app: &str, node: usize) -> EndpointFacts {
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        EndpointFacts {
            pod: format!("{app}-5d4f8c7b9-{number:05}"),
            node: node_name(node % self.agents),
            addr: self.next_address.fetch_add(1, Ordering::Relaxed).into(),
            ready: true,
        }
    }

    pub(super) fn service(&self, number: usize) -> &Service {
        &self.services[number]
    }

    /// Names of the nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = String> {
        (0..self.agents).map(node_name)
    }

    /// Writes services with their pods; with the first of them also the nodes and the agents.
    pub(super) async fn lay_out(&self, api: &Api, services: Range<usize>) -> anyhow::Result<()> {
        if services.start == 0 {
            self.lay_out_mesh(api).await?;
        }
        let chosen = &self.services[services.clone()];
        let accounts = chosen.iter().map(|of| {
            let collection = format!("/api/v1/namespaces/{}/serviceaccounts", of.namespace);
            (collection, objects::account(&of.namespace, &of.app))
        });
        api.create_all(accounts).await.context("write service accounts")?;
        let declared = chosen.iter().map(|of| {
            let collection = format!("/api/v1/namespaces/{}/services", of.namespace);
            (collection, objects::service(&of.namespace, &of.app))
        });
        api.create_all(declared).await.context("write services")?;
        for service in chosen {
            let endpoints = service.endpoints.lock().await;
            let pods = stream::iter(endpoints.iter()).map(|endpoint| self.bring_up(api, service, endpoint));
            pods.buffer_unordered(PARALLEL).try_collect::<()>().await.context("write pods")?;
            let collection =
                format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", service.namespace);
            let slice = objects::slice(&service.namespace, &service.app, &endpoints);
            api.create(&collection, &slice).await.context("write slices")?;
        }
        Ok(())
    }

    async fn lay_out_mesh(&self, api: &Api) -> anyhow::Result<()> {
        let own = std::iter::once((MESH.to_owned(), false));
        let names = own.chain((0..self.namespaces).map(|number| (format!("ns{number}"), true)));
        let namespaces =
            names.map(|(name, meshed)| ("/api/v1/namespaces".to_owned(), objects::namespace(&name, meshed)));
        api.create_all(namespaces).await.context("write namespaces")?;
        let nodes = self.nodes().enumerate();
        let nodes = nodes.map(|(number, name)| ("/api/v1/nodes".to_owned(), objects::node(&name, number)));
        api.create_all(nodes).await.context("write nodes")?;
        let accounts = format!("/api/v1/namespaces/{MESH}/serviceaccounts");
        api.create(&accounts, &objects::account(MESH, AGENT)).await?;
        let agents = self.nodes().map(|node| {
            (format!("/api/v1/namespaces/{MESH}/pods"), objects::agent_pod(&agent_name(&node), &node))
        });
        api.create_all(agents).await.context("write the agents' pods")
    }

    /// Writes a pod and that it runs.
    pub(super) async fn bring_up(
        &self,
        api: &Api,
        service: &Service,
        endpoint: &EndpointFacts,
    ) -> anyhow::Result<()> {
        let facts = PodFacts {
            namespace: &service.namespace,
            app: &service.app,
            name: &endpoint.pod,
            node: &endpoint.node,
        };
        api.create(&format!("/api/v1/namespaces/{}/pods", service.namespace), &objects::pod(&facts)).await?;
        let status = format!("{}/status", service.pod_path(&endpoint.pod));
        api.patch(&status, &objects::running(endpoint.addr)).await
    }
}

fn node_name(number: usize) -> String {
    format!("n{number}")
}

/// The pod of the agent of a node.
pub(super) fn agent_name(node: &str) -> String {
    format!("agent-{node}")
}

/// Name of the resource that tells agents of a pod.
pub(super) fn resource_of(namespace: &str, pod: &str) -> String {
    format!("{CLUSTER}//Pod/{namespace}/{pod}")
}
