//! Owns what is said about local pods: state, reason, and when a failed one is tried again.

use std::{collections::BTreeMap, time::Instant};

use mesh_core::{
    id::WorkloadId,
    local::is_heard,
    plan::{ActualPod, LocalPods, Obstacle, PodConfig},
    snapshot::{Name, Snapshot},
};

use super::failures::Failures;
use crate::view::{PodState, PodView};

/// One local pod and when it is tried again.
#[derive(Clone, Debug)]
pub(super) struct PodRow {
    view: PodView,
    retry_at: Option<Instant>,
    is_heard: bool,
}

impl PodRow {
    /// Enrolment.
    pub(super) fn state(&self) -> PodState {
        self.view.state
    }

    /// Whether it is this pod's.
    pub(super) fn is_of(&self, pod: &Name) -> bool {
        *self.view.namespace == *pod.namespace && *self.view.name == *pod.name
    }

    /// Whether the source has told of it, so that what it needs is in the tables.
    pub(super) fn is_heard(&self) -> bool {
        self.is_heard
    }

    /// Whether nobody knows yet where it is.
    pub(super) fn is_missing(&self) -> bool {
        self.view.state == PodState::Pending && self.view.netns.is_none()
    }

    /// The row as of `now`.
    pub(super) fn view(&self, now: Instant) -> PodView {
        let retry_in_s = self.retry_at.map(|at| at.saturating_duration_since(now).as_secs_f64());
        PodView { retry_in_s, ..self.view.clone() }
    }
}

/// The local pods that are or should be in the mesh, by name.
pub(super) fn rows(
    snapshot: &Snapshot,
    local: &LocalPods,
    conflicts: &BTreeMap<Name, Obstacle>,
    actual: &BTreeMap<u32, ActualPod>,
    failures: &Failures,
    warnings: &BTreeMap<WorkloadId, String>,
) -> Vec<PodRow> {
    let mut rows: Vec<PodRow> = local
        .wanted
        .values()
        .map(|config| {
            let served = actual.iter().find(|(_, is)| is.workload == config.workload && is.listening);
            let obstacle = conflicts.get(&config.name);
            let row = wanted_row(config, served, obstacle, failures, warnings.get(&config.workload));
            PodRow { is_heard: snapshot.workload(config.workload).is_some_and(|pod| is_heard(pod)), ..row }
        })
        .collect();
    let blocked = snapshot.workloads().filter_map(|w| Some((w, local.blocked.get(&w.name)?)));
    rows.extend(blocked.map(|(workload, obstacle)| PodRow {
        view: PodView {
            namespace: workload.name.namespace.to_string(),
            name: workload.name.name.to_string(),
            workload_id: format!("{:?}", workload.id),
            addrs: workload.addrs.clone(),
            netns: workload.netns.as_deref().map(Into::into),
            state: state_of(obstacle),
            pod_id: None,
            netns_cookie: None,
            reason: Some(obstacle.to_string()),
            attempts: 0,
            retry_in_s: None,
        },
        retry_at: None,
        is_heard: is_heard(workload),
    }));
    rows.sort_by(|a, b| (&a.view.namespace, &a.view.name).cmp(&(&b.view.namespace, &b.view.name)));
    rows
}

fn wanted_row(
    config: &PodConfig,
    served: Option<(&u32, &ActualPod)>,
    obstacle: Option<&Obstacle>,
    failures: &Failures,
    warning: Option<&String>,
) -> PodRow {
    let failure = failures.of(config.workload);
    let state = match (served, obstacle, failure) {
        (Some(_), _, _) => PodState::Enrolled,
        (None, Some(obstacle), _) => state_of(obstacle),
        (None, None, Some(_)) => PodState::Failed,
        (None, None, None) => PodState::Pending,
    };
    let reason = failure.map(|f| f.reason.clone()).or_else(|| obstacle.map(ToString::to_string));
    PodRow {
        view: PodView {
            namespace: config.name.namespace.to_string(),
            name: config.name.name.to_string(),
            workload_id: format!("{:?}", config.workload),
            addrs: config.addrs.clone(),
            netns: Some(config.netns.to_string()),
            state,
            pod_id: served.map(|(id, _)| *id),
            netns_cookie: served.map(|(_, is)| is.netns_cookie),
            reason: reason.or_else(|| warning.cloned()),
            attempts: failure.map_or(0, |f| f.attempts),
            retry_in_s: None,
        },
        retry_at: failure.map(|f| f.retry_at),
        is_heard: false,
    }
}

fn state_of(obstacle: &Obstacle) -> PodState {
    match obstacle {
        // What is missing may still be written into the manifest.
        Obstacle::NoNetns | Obstacle::NoAddress => PodState::Pending,
        Obstacle::Skipped(_) => PodState::Skipped,
        Obstacle::NetnsTaken(_) => PodState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use mesh_core::snapshot::{Parts, Workload};

    use super::*;
    use crate::node::fixtures::pod_config;

    fn one(config: &PodConfig) -> LocalPods {
        LocalPods { wanted: BTreeMap::from([(config.workload, config.clone())]), ..LocalPods::default() }
    }

    fn only_row(
        local: &LocalPods,
        actual: &BTreeMap<u32, ActualPod>,
        failures: &Failures,
        now: Instant,
    ) -> PodView {
        let rows = rows(&Snapshot::default(), local, &BTreeMap::new(), actual, failures, &BTreeMap::new());
        assert_eq!(rows.len(), 1);
        rows[0].view(now)
    }

    #[test]
    fn a_pod_is_enrolled_only_while_this_agent_listens_in_it() {
        let config = pod_config("shop", "cart");
        let is = |listening: bool| {
            let applied = listening.then(|| config.clone());
            BTreeMap::from([(
                9,
                ActualPod { workload: config.workload, netns_cookie: 5, listening, applied },
            )])
        };
        let (failures, now) = (Failures::default(), Instant::now());
        let row = only_row(&one(&config), &is(true), &failures, now);
        assert_eq!((row.state, row.pod_id, row.netns_cookie), (PodState::Enrolled, Some(9), Some(5)));
        let row = only_row(&one(&config), &is(false), &failures, now);
        assert_eq!((row.state, row.pod_id), (PodState::Pending, None));
    }

    #[test]
    fn a_failure_shows_its_reason_and_how_long_it_waits() {
        let config = pod_config("shop", "cart");
        let (mut failures, now) = (Failures::default(), Instant::now());
        failures.note(&config, "TCP port 15001 is taken".into(), now);
        let row = only_row(&one(&config), &BTreeMap::new(), &failures, now + Duration::from_millis(100));
        assert_eq!((row.state, row.attempts), (PodState::Failed, 1));
        assert_eq!(row.reason.as_deref(), Some("TCP port 15001 is taken"));
        assert!((row.retry_in_s.unwrap() - 0.4).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn a_pod_that_cannot_be_meshed_is_shown_with_the_reason() {
        let name = Name::new("shop", "hostnet");
        let workload =
            Arc::new(Workload { addrs: vec!["10.0.0.9".parse().unwrap()], ..Workload::named(name.clone()) });
        let snapshot = Snapshot::new(1, Parts { workloads: vec![workload], ..Parts::default() });
        let blocked = BTreeMap::from([(name, Obstacle::Skipped("it runs on the host network".into()))]);
        let local = LocalPods { blocked, ..LocalPods::default() };
        let rows = rows(
            &snapshot,
            &local,
            &BTreeMap::new(),
            &BTreeMap::new(),
            &Failures::default(),
            &BTreeMap::new(),
        );
        let row = rows[0].view(Instant::now());
        assert_eq!((row.state, row.name.as_str()), (PodState::Skipped, "hostnet"));
        assert_eq!(row.reason.as_deref(), Some("it runs on the host network"));
    }
}
