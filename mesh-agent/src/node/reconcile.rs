//! Owns bringing the node from what it is to what the snapshot wants: pods and kernel tables.
//!
//! Invariants:
//! - What is, is read from the kernel at each pass; a pass that was carried out makes the next one do nothing.
//! - Tables are in place before a pod's connects are redirected, and are corrected after pods came or went.
//! - One pod's failure is that pod's: it is kept with its reason and tried again, the others go on.
//!
//! Blocking: up to a few milliseconds a pod; runs on the blocking pool, never on the control thread.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    id::WorkloadId,
    plan::{self, ActualPod, LocalPods, PodConfig, PodKey, PodSpec, RemoveReason, Step},
    slots::{self, NodeView},
    snapshot::Snapshot,
};
use mesh_redirect::{DesiredTables, EnrolRequest, MapError, Netns, Node, TableWriter};

use super::{
    failures::Failures,
    local::LocalKnowledge,
    membership::Membership,
    namespaces::Namespaces,
    pods::{self, PodRow},
};
use crate::report::report;

/// Table entries that found no room are tried again after this time.
const TABLES_PAUSE: Duration = Duration::from_secs(5);

/// What the node shall be made to be.
#[derive(Debug)]
pub(super) struct Wanted {
    /// The world.
    pub(super) snapshot: Arc<Snapshot>,
    /// Every file of the configuration was read. If not, a pod that an earlier agent enrolled and that no file
    /// names is left alone: its file may be the broken one.
    pub(super) complete: bool,
}

/// What one pass found and left.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Local pods by name.
    pub(super) pods: Vec<PodRow>,
    /// Table entries that found no room, by map.
    pub(super) refused: BTreeMap<&'static str, u64>,
    /// Table writes that failed for another reason.
    pub(super) errors: Vec<String>,
    /// When to try again what failed.
    pub(super) retry_at: Option<Instant>,
}

/// Carries plans out.
#[derive(Debug)]
pub(super) struct Reconciler {
    node: String,
    kernel: Arc<Node>,
    membership: Membership,
    writer: TableWriter,
    slots: slots::Tables,
    /// What the tables were last made from, unless something was refused.
    written: Option<(Arc<Snapshot>, NodeView)>,
    namespaces: Namespaces,
    failures: Failures,
    /// What works less well than it could, by pod.
    warnings: BTreeMap<WorkloadId, String>,
}

impl Reconciler {
    /// Starts from what the kernel holds.
    pub(super) fn new(
        node: &str,
        kernel: &Arc<Node>,
        membership: Membership,
        local: &Arc<LocalKnowledge>,
    ) -> Result<Self, MapError> {
        Ok(Self {
            node: node.to_owned(),
            writer: TableWriter::new(kernel.maps())?,
            kernel: Arc::clone(kernel),
            membership,
            slots: slots::Tables::default(),
            written: None,
            namespaces: Namespaces::new(local),
            failures: Failures::default(),
            warnings: BTreeMap::new(),
        })
    }

    /// Starts again from what the kernel holds, after another agent wrote to it for a while. The data path lets go of pods which that
    /// one took out. Blocking.
    pub(super) fn resume(&mut self) -> Result<(), MapError> {
        self.writer = TableWriter::new(self.kernel.maps())?;
        self.written = None;
        let lost = self.kernel.resume()?;
        self.membership.forget(&lost);
        Ok(())
    }

    /// One pass. An error means that the kernel could not be read; what was not done is done by the next pass.
    pub(super) fn pass(&mut self, wanted: &Wanted, now: Instant) -> Result<Outcome, MapError> {
        let local = plan::local_pods(&wanted.snapshot, &self.node);
        self.failures.keep_only(|pod| local.wanted.contains_key(&pod));
        self.namespaces.keep_only(|pod| local.wanted.contains_key(&pod));
        self.warnings.retain(|pod, _| local.wanted.contains_key(pod));
        let actual = self.kernel.actual()?;
        let (desired, open) = self.open_namespaces(&local, &actual, now);

        let mut steps = plan::plan(&desired, &actual);
        steps.retain(|step| is_due(step, &actual, wanted.complete, &self.failures, now));
        let removed: BTreeSet<u32> = steps.iter().filter_map(removed_pod).collect();
        self.membership.leave(&removed);
        let mut outcome = Outcome::default();
        let staying = actual.iter().filter(|(id, _)| !removed.contains(id)).map(|(_, pod)| pod);
        self.write_tables(&wanted.snapshot, view_of(staying), &mut outcome);
        let again = self.update(&steps, &actual, now);
        self.enrol(&steps, &open, now);

        let actual = self.kernel.actual()?;
        self.write_tables(&wanted.snapshot, view_of(actual.values()), &mut outcome);
        for (pod, config) in &local.wanted {
            if open.contains_key(pod) && actual.values().any(|is| is.applied.as_ref() == Some(config)) {
                self.failures.clear(*pod);
            }
        }
        let conflicts = plan::conflicts(&desired, &actual);
        outcome.pods =
            pods::rows(&wanted.snapshot, &local, &conflicts, &actual, &self.failures, &self.warnings);
        let tables = (!outcome.refused.is_empty() || !outcome.errors.is_empty()).then(|| now + TABLES_PAUSE);
        let at_once = again.then_some(now);
        outcome.retry_at = [self.failures.next_try(), tables, at_once].into_iter().flatten().min();
        Ok(outcome)
    }

    /// The desired pods with their namespaces. One that cannot be opened is a failure of its pod; what an
    /// earlier pass or agent enrolled for that pod stays as it is.
    fn open_namespaces(
        &mut self,
        local: &LocalPods,
        actual: &BTreeMap<u32, ActualPod>,
        now: Instant,
    ) -> (BTreeMap<PodKey, PodSpec>, BTreeMap<WorkloadId, Arc<Netns>>) {
        let (mut desired, mut open) = (BTreeMap::new(), BTreeMap::new());
        for config in local.wanted.values() {
            let pod = config.workload;
            let netns_cookie = match self.namespaces.open(config) {
                Ok(netns) => {
                    let cookie = netns.cookie();
                    open.insert(pod, netns);
                    Some(cookie)
                }
                Err(error) => {
                    if !self.failures.must_wait(config, now) {
                        self.fail(config, report(&error), now);
                    }
                    actual.values().find(|is| is.workload == pod).map(|is| is.netns_cookie)
                }
            };
            if let Some(netns_cookie) = netns_cookie {
                desired.insert(pod, PodSpec { config: config.clone(), netns_cookie });
            }
        }
        (desired, open)
    }

    /// Writes changed configurations. Returns whether a pod was taken out to be enrolled anew: its addresses are
    /// part of everything its listeners know.
    fn update(&mut self, steps: &[Step], actual: &BTreeMap<u32, ActualPod>, now: Instant) -> bool {
        let mut moved = BTreeSet::new();
        for step in steps {
            let Step::Update { pod, spec } = step else { continue };
            let applied = actual.get(pod).and_then(|is| is.applied.as_ref());
            if applied.is_some_and(|applied| applied.addrs != spec.config.addrs) {
                moved.insert(*pod);
                continue;
            }
            match self.kernel.update(*pod, &spec.config) {
                Ok(()) => tracing::debug!(pod = %spec.config.name, "pod updated"),
                Err(error) => self.fail(&spec.config, report(&error), now),
            }
        }
        self.membership.leave(&moved);
        !moved.is_empty()
    }

    fn enrol(&mut self, steps: &[Step], open: &BTreeMap<WorkloadId, Arc<Netns>>, now: Instant) {
        let kernel = &self.kernel;
        let requests: Vec<EnrolRequest> = steps
            .iter()
            .filter_map(|step| {
                let (pod, spec) = match step {
                    Step::Enrol { spec } => (None, spec),
                    Step::Adopt { pod, spec } => (Some(*pod), spec),
                    Step::Remove { .. } | Step::Update { .. } => return None,
                };
                let netns = Arc::clone(open.get(&spec.config.workload)?);
                let pod = pod.unwrap_or_else(|| kernel.next_pod_id());
                Some(EnrolRequest { pod, netns, config: spec.config.clone() })
            })
            .collect();
        let adopted = steps.iter().filter_map(|step| match step {
            Step::Adopt { spec, .. } => Some(spec.config.workload),
            Step::Enrol { .. } | Step::Remove { .. } | Step::Update { .. } => None,
        });
        let mut joined = self.membership.join(&requests, &adopted.collect());
        for EnrolRequest { config, .. } in &requests {
            self.warnings.remove(&config.workload);
            match joined.remove(&config.workload) {
                Some(Ok(warning)) => {
                    self.failures.clear(config.workload);
                    if let Some(warning) = warning {
                        tracing::warn!(pod = %config.name, %warning, "pod enrolled with a limitation");
                        self.warnings.insert(config.workload, warning);
                    }
                }
                Some(Err(error)) => self.fail(config, error.reason(), now),
                // Its thread panicked before it was done.
                None => {
                    self.fail(config, "the enrolment failed; this is a defect of the agent".to_owned(), now)
                }
            }
        }
    }

    fn fail(&mut self, config: &PodConfig, reason: String, now: Instant) {
        let name = &config.name;
        if self.failures.note(config, reason.clone(), now) {
            tracing::warn!(pod = %name, %reason, "pod not as it should be; it will be tried again");
        }
    }

    fn write_tables(&mut self, snapshot: &Arc<Snapshot>, view: NodeView, outcome: &mut Outcome) {
        let current =
            self.written.as_ref().is_some_and(|(from, seen)| Arc::ptr_eq(from, snapshot) && *seen == view);
        if current {
            return;
        }
        self.slots = slots::tables(snapshot, &view, &self.slots);
        let applied = self.writer.apply(&DesiredTables::from(&self.slots));
        tracing::debug!(written = applied.written, deleted = applied.deleted, "kernel tables written");
        outcome.refused = applied.full.iter().map(|(map, entries)| (*map, *entries as u64)).collect();
        outcome.errors = applied.errors.iter().map(|error| report(error)).collect();
        let complete = outcome.refused.is_empty() && outcome.errors.is_empty();
        self.written = complete.then(|| (Arc::clone(snapshot), view));
    }
}

/// Whether a step is to be carried out now.
fn is_due(
    step: &Step,
    actual: &BTreeMap<u32, ActualPod>,
    complete: bool,
    failures: &Failures,
    now: Instant,
) -> bool {
    match step {
        Step::Remove { pod, reason: RemoveReason::Gone } => {
            complete || actual.get(pod).is_none_or(|is| is.listening)
        }
        Step::Remove { .. } => true,
        Step::Adopt { spec, .. } | Step::Update { spec, .. } | Step::Enrol { spec } => {
            !failures.must_wait(&spec.config, now)
        }
    }
}

fn removed_pod(step: &Step) -> Option<u32> {
    match step {
        Step::Remove { pod, .. } => Some(*pod),
        Step::Adopt { .. } | Step::Update { .. } | Step::Enrol { .. } => None,
    }
}

/// Pods with pins count as enrolled even before this agent listens in them: their guards honour tickets.
fn view_of<'a>(pods: impl Iterator<Item = &'a ActualPod>) -> NodeView {
    NodeView { enrolled: pods.map(|pod| (pod.workload, pod.netns_cookie)).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fixtures::pod_config;

    fn actual(listening: bool) -> BTreeMap<u32, ActualPod> {
        let config = pod_config("shop", "cart");
        let applied = listening.then(|| config.clone());
        BTreeMap::from([(7, ActualPod { workload: config.workload, netns_cookie: 1, listening, applied })])
    }

    #[test]
    fn a_pod_found_in_pins_is_not_removed_while_a_file_is_broken() {
        let (failures, now) = (Failures::default(), Instant::now());
        let gone = Step::Remove { pod: 7, reason: RemoveReason::Gone };
        assert!(!is_due(&gone, &actual(false), false, &failures, now));
        assert!(is_due(&gone, &actual(false), true, &failures, now));
        // One that this agent serves was in the last good state of its file: it is really gone.
        assert!(is_due(&gone, &actual(true), false, &failures, now));
        let replaced = Step::Remove { pod: 7, reason: RemoveReason::NewIncarnation };
        assert!(is_due(&replaced, &actual(false), false, &failures, now));
    }

    #[test]
    fn a_pod_that_failed_waits_for_its_turn() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let config = pod_config("shop", "cart");
        let enrol = Step::Enrol { spec: PodSpec { config: config.clone(), netns_cookie: 1 } };
        assert!(is_due(&enrol, &BTreeMap::new(), true, &failures, now));
        failures.note(&config, "port 15001 is taken".into(), now);
        assert!(!is_due(&enrol, &BTreeMap::new(), true, &failures, now));
        assert!(is_due(&enrol, &BTreeMap::new(), true, &failures, now + Duration::from_secs(1)));
    }
}
