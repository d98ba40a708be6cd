//! Owns the changes: how they are written, and when each of them has arrived everywhere.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_wire::proto::{nodemesh, workload};
use prost::Message as _;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use super::agents::Fleet;
use super::api::Api;
use super::cluster::{Cluster, resource_of};
use super::controller::{Controller, cpu_of};
use super::objects;

/// A change that takes longer than this after the last write is lost.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(10);
/// A large number without a common factor with usual numbers of services, so that neighbours in time are none in the cluster.
const STRIDE: usize = 7_919;

/// One change of an endpoint, on its way to every agent.
#[derive(Debug)]
pub(super) struct Change {
    written: Instant,
    ready: bool,
    /// By agent, whether it is there.
    there: Mutex<Vec<bool>>,
    left: AtomicUsize,
    took: Mutex<Option<Duration>>,
    /// By version of the resource, whether it is in it: what all agents are sent is looked into once.
    is_in: Mutex<HashMap<Arc<str>, bool>>,
}

impl Change {
    fn new(agents: usize, ready: bool) -> Self {
        Self {
            written: Instant::now(),
            ready,
            there: Mutex::new(vec![false; agents]),
            left: AtomicUsize::new(agents),
            took: Mutex::default(),
            is_in: Mutex::default(),
        }
    }

    /// An agent has it, in a state that it was told to be whole, and has said so.
    pub(super) fn arrived_at(&self, agent: usize, now: Instant) {
        let was_there = {
            let mut there = self.there.lock().unwrap_or_else(PoisonError::into_inner);
            there.get_mut(agent).is_none_or(|there| std::mem::replace(there, true))
        };
        if !was_there && self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let took = now.saturating_duration_since(self.written);
            *self.took.lock().unwrap_or_else(PoisonError::into_inner) = Some(took);
        }
    }

    fn took(&self) -> Option<Duration> {
        *self.took.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this version of the resource has it.
    fn is_in(&self, version: &Arc<str>, body: &[u8]) -> bool {
        let mut known = self.is_in.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(Arc::clone(version)).or_insert_with(|| self.is_as_left(body))
    }

    /// Whether this resource is the pod as the change left it, and its endpoints too.
    fn is_as_left(&self, body: &[u8]) -> bool {
        let Ok(address) = workload::Address::decode(body) else { return false };
        let Some(workload::address::Type::Workload(of)) = address.r#type else { return false };
        let facts = of.extensions.iter().find_map(|extension| extension.config.as_ref());
        let Some(Ok(facts)) = facts.map(|any| nodemesh::WorkloadFacts::decode(any.value.as_slice())) else {
            return false;
        };
        let mut endpoints = facts.endpoints.iter().flat_map(|of| &of.endpoints).peekable();
        facts.ready == self.ready
            && endpoints.peek().is_some()
            && endpoints.all(|endpoint| endpoint.not_ready != self.ready)
    }
}

/// The changes on their way, by the resource that carries them.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    pending: RwLock<HashMap<String, Arc<Change>>>,
}

impl Tracker {
    /// The change that this resource brings, if it brings one.
    pub(super) fn fulfilled(&self, resource: &str, version: &Arc<str>, body: &[u8]) -> Option<Arc<Change>> {
        let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
        pending.get(resource).filter(|change| change.is_in(version, body)).cloned()
    }

    /// Waits for a change from now on. The one before it of the same resource has arrived, or is lost.
    fn expect(&self, resource: String, change: &Arc<Change>) {
        let mut pending = self.pending.write().unwrap_or_else(PoisonError::into_inner);
        pending.insert(resource, Arc::clone(change));
    }

    fn is_pending(&self, resource: &str) -> bool {
        let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
        pending.get(resource).is_some_and(|change| change.took().is_none())
    }
}

/// What is changed, and how fast.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Which services.
    pub(super) services: Range<usize>,
    /// A second.
    pub(super) rate: u32,
    /// For how long.
    pub(super) time: Duration,
    /// Of a hundred.
    pub(super) replaced: u32,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(super) struct Churn {
    /// From the write of the slice to the last agent's acknowledgement of the whole state, sorted.
    pub(super) arrivals: Vec<Duration>,
    /// How long the API server took to answer that write, sorted.
    pub(super) writes: Vec<Duration>,
    /// What was left of the way then, sorted; zero if the agents were faster than the answer.
    pub(super) rest: Vec<Duration>,
    /// Changes that did not arrive everywhere.
    pub(super) lost: usize,
    /// From the first write to the last arrival.
    pub(super) time: Duration,
    /// Encoded size of all responses meanwhile.
    pub(super) bytes: u64,
    /// Number of them.
    pub(super) responses: u64,
    /// States that the controller published meanwhile.
    pub(super) generations: u64,
    /// CPU time of the controller meanwhile.
    pub(super) controller_cpu: Duration,
    /// CPU time of this program, its agents above all.
    pub(super) own_cpu: Duration,
}

impl Churn {
    /// Makes changes as planned and waits until all have arrived.
    pub(super) async fn run(
        api: &Api,
        cluster: &Arc<Cluster>,
        fleet: &Fleet,
        controller: &Controller,
        plan: &Plan,
    ) -> anyhow::Result<Self> {
        let (bytes, responses) = (controller.bytes_sent()?, controller.responses_sent()?);
        let (generation, cpu, own_cpu) = (controller.generation()?, controller.cpu()?, cpu_of("self")?);
        let began = Instant::now();
        let number = plan.time.as_secs() as usize * plan.rate as usize;
        let mut under_way = JoinSet::new();
        let mut done = Vec::with_capacity(number);
        for change in 0..number {
            let due = began + Duration::from_secs(1) * change as u32 / plan.rate;
            sleep_until(due.into()).await;
            let chosen = plan.services.start + change * STRIDE % plan.services.len();
            let work = Work {
                api: api.clone(),
                cluster: Arc::clone(cluster),
                service: chosen,
                turn: change / plan.services.len(),
                tracker: Arc::clone(fleet.tracker()),
                agents: fleet.len(),
            };
            let is_replaced = change * plan.replaced as usize % 100 + plan.replaced as usize >= 100;
            under_way
                .spawn(async move { if is_replaced { work.replace().await } else { work.flip().await } });
            while let Some(ended) = under_way.try_join_next() {
                done.push(ended??);
            }
        }
        while let Some(ended) = under_way.join_next().await {
            done.push(ended??);
        }
        let last_write = Instant::now();
        while done.iter().any(|(change, _)| change.took().is_none()) && last_write.elapsed() < ARRIVAL_LIMIT {
            sleep(Duration::from_millis(20)).await;
        }
        let time = began.elapsed();
        let mut arrivals: Vec<Duration> = done.iter().filter_map(|(change, _)| change.took()).collect();
        let mut writes: Vec<Duration> = done.iter().map(|(_, write)| *write).collect();
        let rest = done.iter().filter_map(|(change, write)| Some(change.took()?.saturating_sub(*write)));
        let mut rest: Vec<Duration> = rest.collect();
        for times in [&mut arrivals, &mut writes, &mut rest] {
            times.sort_unstable();
        }
        Ok(Self {
            lost: done.len() - arrivals.len(),
            arrivals,
            writes,
            rest,
            time,
            bytes: controller.bytes_sent()? - bytes,
            responses: controller.responses_sent()? - responses,
            generations: controller.generation()? - generation,
            controller_cpu: controller.cpu()?.saturating_sub(cpu),
            own_cpu: cpu_of("self")?.saturating_sub(own_cpu),
        })
    }

    /// Encoded size of responses to all agents for each change.
    pub(super) fn bytes_per_change(&self) -> f64 {
        self.bytes as f64 / self.arrivals.len().max(1) as f64
    }
}

/// The value below which this share of them is, in milliseconds.
pub(super) fn quantile_ms(sorted: &[Duration], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).map_or(0.0, |value| value.as_secs_f64() * 1e3)
}

/// One change to be made.
struct Work {
    api: Api,
    cluster: Arc<Cluster>,
    service: usize,
    /// How often each service had its turn before.
    turn: usize,
    tracker: Arc<Tracker>,
    agents: usize,
}

impl Work {
    /// A pod becomes ready, or unready: its kubelet says so, then the EndpointSlice controller.
    async fn flip(&self) -> anyhow::Result<(Arc<Change>, Duration)> {
        let service = self.cluster.service(self.service);
        let mut endpoints = service.endpoints.lock().await;
        let at = self.turn % endpoints.len();
        let (pod, ready) = (endpoints[at].pod.clone(), !endpoints[at].ready);
        let resource = resource_of(&service.namespace, &pod);
        // With few pods the same one is soon there again: two changes of one pod may be sent as one.
        while self.tracker.is_pending(&resource) {
            sleep(Duration::from_millis(5)).await;
        }
        let status = format!("{}/status", service.pod_path(&pod));
        self.api.patch(&status, &objects::readiness(ready)).await.context("patch a pod's status")?;
        endpoints[at].ready = ready;
        self.write_slice(service, &endpoints, resource, ready).await
    }

    /// A pod goes, and another one comes, as in a rollout.
    async fn replace(&self) -> anyhow::Result<(Arc<Change>, Duration)> {
        let service = self.cluster.service(self.service);
        let mut endpoints = service.endpoints.lock().await;
        let at = self.turn % endpoints.len();
        let new = self.cluster.endpoint(&service.app, self.service + self.turn);
        self.cluster.bring_up(&self.api, service, &new).await.context("bring a pod up")?;
        let old = std::mem::replace(&mut endpoints[at], new);
        let resource = resource_of(&service.namespace, &endpoints[at].pod);
        let done = self.write_slice(service, &endpoints, resource, true).await?;
        self.api.delete(&service.pod_path(&old.pod)).await.context("remove a pod")?;
        Ok(done)
    }

    async fn write_slice(
        &self,
        service: &super::cluster::Service,
        endpoints: &[objects::EndpointFacts],
        resource: String,
        ready: bool,
    ) -> anyhow::Result<(Arc<Change>, Duration)> {
        let slice = objects::slice(&service.namespace, &service.app, endpoints);
        let change = Arc::new(Change::new(self.agents, ready));
        self.tracker.expect(resource, &change);
        self.api.replace(&service.slice_path(), &slice).await.context("replace a slice")?;
        Ok((Arc::clone(&change), change.written.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_has_arrived_when_the_last_agent_has_it() {
        let change = Change::new(2, true);
        let later = change.written + Duration::from_millis(30);
        change.arrived_at(0, later);
        change.arrived_at(0, later);
        assert_eq!(change.took(), None);
        change.arrived_at(1, later + Duration::from_millis(20));
        assert_eq!(change.took(), Some(Duration::from_millis(50)));
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let seen: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!((quantile_ms(&seen, 0.5), quantile_ms(&seen, 0.99)), (100.0, 198.0));
        assert_eq!((quantile_ms(&seen[..1], 0.99), quantile_ms(&[], 0.5)), (1.0, 0.0));
    }

    #[test]
    fn a_tenth_of_the_changes_is_a_tenth_of_them() {
        let replaced = |percent: usize| (0..1000).filter(|n| n * percent % 100 + percent >= 100).count();
        assert_eq!((replaced(0), replaced(10), replaced(33), replaced(100)), (0, 100, 330, 1000));
    }
}
