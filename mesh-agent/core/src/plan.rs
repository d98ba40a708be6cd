//! Which local pods are to be enrolled, and the steps from what is to what should be.
//!
//! Invariants:
//! - `actual` is read back from the kernel's pins, never remembered across a crash.
//! - Removals come first: they free addresses and namespaces that an enrolment may need.
//! - A plan that was carried out makes the next plan empty.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    id::{WorkloadId, hash},
    policy,
    route::sight::sight_kind,
    snapshot::{Name, Snapshot, Workload},
};

/// Key of a desired pod.
pub type PodKey = WorkloadId;

/// What the snapshot wants of a local pod: everything the kernel and the listeners depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodConfig {
    /// Id.
    pub workload: WorkloadId,
    /// Namespace and name.
    pub name: Name,
    /// Path of the network namespace.
    pub netns: Arc<str>,
    /// Own addresses, at most one per family, sorted.
    pub addrs: Vec<IpAddr>,
    /// Connects that need the agent are refused while it is down.
    pub outbound_fail_closed: bool,
    /// Plaintext arrivals are dropped while the agent is down, unless the port says otherwise.
    pub inbound_fail_closed: bool,
    /// Port 53 goes to the in-pod DNS proxy.
    pub dns_capture: bool,
    /// Inbound ports that differ from the pod's default.
    pub inbound_ports: BTreeMap<u16, PortRule>,
    /// Outbound ports that differ from the pod's default.
    pub outbound_ports: BTreeMap<u16, PortRule>,
    /// Destinations that are left alone.
    pub excluded: Vec<ipnet::IpNet>,
    /// Destinations that nothing describes are the agent's to decide on (REGISTRY_ONLY, or an egress proxy).
    pub proxy_unknown: bool,
    /// The kind of its sight ([`sight_kind`]).
    pub sight: u32,
    /// Ports the kubelet may probe.
    pub probe_ports: BTreeSet<u16>,
    /// Moves the pod's policy generation: of its policy, and of its addresses, which rules may name.
    pub policy_hash: u64,
    /// Of the pod's own identity and addresses: when it moves, verdicts on the pod as a client are void.
    pub identity_hash: u64,
}

/// How one port differs from its pod's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortRule {
    /// Left alone.
    pub excluded: bool,
    /// Overrides the direction's fail_closed while the agent is down.
    pub fail_closed: Option<bool>,
    /// Outbound: destinations that nothing describes are the agent's to decide on.
    pub proxy_unknown: bool,
}

impl PodConfig {
    /// What `workload` wants, or why it cannot be enrolled although it is meshed.
    fn of(snapshot: &Snapshot, workload: &Workload) -> Result<Self, Obstacle> {
        let netns = workload.netns.clone().ok_or(Obstacle::NoNetns)?;
        if workload.addrs.is_empty() {
            return Err(Obstacle::NoAddress);
        }
        let mut addrs = workload.addrs.clone();
        addrs.sort_unstable();
        // Verdicts are cached by workload, not by address.
        let with_addrs = |what: &str, of: String| {
            let addrs: Vec<String> = addrs.iter().map(ToString::to_string).collect();
            let parts: Vec<&str> = [what, &of].into_iter().chain(addrs.iter().map(String::as_str)).collect();
            hash(&parts)
        };
        // A verdict lets connections past the agent, where nobody counts or routes them.
        let (limits, routed) = (snapshot.counted_ports(workload), snapshot.ports_routed_by_name(workload));
        let policy = workload.policy_hash.to_string();
        let judged = match limits.is_empty() && routed.is_empty() {
            true => policy,
            false => format!("{policy} {limits:?} {routed:?}"),
        };
        let policy_hash = with_addrs("policy", judged);
        let identity_hash = with_addrs("identity", workload.identity().to_string());
        let inbound_fail_closed = policy::fail_closed_inbound_default(snapshot, workload);
        let mut inbound_ports: BTreeMap<u16, PortRule> = BTreeMap::new();
        for port in workload.modes.ports.keys() {
            let closed = policy::fail_closed_inbound(snapshot, workload, *port);
            if closed != inbound_fail_closed {
                inbound_ports.entry(*port).or_default().fail_closed = Some(closed);
            }
        }
        for port in &workload.settings.exclude_inbound_ports {
            inbound_ports.entry(*port).or_default().excluded = true;
        }
        let sight = snapshot.sight_of(workload);
        let mut outbound_ports: BTreeMap<u16, PortRule> = BTreeMap::new();
        for port in &workload.settings.exclude_outbound_ports {
            outbound_ports.entry(*port).or_default().excluded = true;
        }
        for port in sight.unlisted_ports() {
            outbound_ports.entry(port).or_default().proxy_unknown = true;
        }
        Ok(Self {
            workload: workload.id,
            name: workload.name.clone(),
            netns,
            addrs,
            outbound_fail_closed: workload.settings.outbound_fail_closed,
            inbound_fail_closed,
            dns_capture: !workload.settings.dns_capture_off,
            inbound_ports,
            outbound_ports,
            excluded: workload.settings.exclude_outbound_cidrs.clone(),
            proxy_unknown: sight.holds_unknown(),
            sight: sight_kind(workload),
            probe_ports: workload.probe_ports.clone(),
            policy_hash,
            identity_hash,
        })
    }
}

/// The pods of one node as the snapshot wants them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPods {
    /// To be enrolled, once their network namespaces are open.
    pub wanted: BTreeMap<PodKey, PodConfig>,
    /// Asked for the mesh and cannot be in it; shown to the user and counted, by name.
    pub blocked: BTreeMap<Name, Obstacle>,
}

/// Why a local pod that asked for the mesh is not in it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obstacle {
    /// No `nodemesh.dev/netns` annotation.
    NoNetns,
    /// No `status.podIP` yet.
    NoAddress,
    /// The pod can never be enrolled, e.g. it runs on the host network.
    Skipped(Arc<str>),
    /// Another pod has the same network namespace, and has it enrolled.
    NetnsTaken(Name),
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoNetns => f.write_str("the annotation nodemesh.dev/netns is missing"),
            Self::NoAddress => f.write_str("status.podIP is missing"),
            Self::Skipped(why) => f.write_str(why),
            Self::NetnsTaken(by) => write!(f, "its network namespace is pod {by}'s"),
        }
    }
}

/// Picks this node's pods: scheduled here (`spec.nodeName`), meshed and alive.
pub fn local_pods(snapshot: &Snapshot, node: &str) -> LocalPods {
    let mut pods = LocalPods::default();
    for workload in snapshot.workloads().filter(|w| &*w.node == node && !w.terminated) {
        if let Some(why) = &workload.skipped {
            pods.blocked.insert(workload.name.clone(), Obstacle::Skipped(Arc::clone(why)));
        } else if workload.meshed {
            match PodConfig::of(snapshot, workload) {
                Ok(config) => {
                    pods.wanted.insert(workload.id, config);
                }
                Err(obstacle) => {
                    pods.blocked.insert(workload.name.clone(), obstacle);
                }
            }
        }
    }
    pods
}

/// A desired pod whose network namespace has been opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// What the snapshot wants.
    pub config: PodConfig,
    /// Cookie of the network namespace at `config.netns`: the pod's incarnation. Never 0.
    pub netns_cookie: u64,
}

/// A pod as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActualPod {
    /// Workload it was enrolled for.
    pub workload: WorkloadId,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// This process holds its listeners. False for a pod found in pins after a restart.
    pub listening: bool,
    /// What was written last; `None` after a restart, when pins are all there is.
    pub applied: Option<PodConfig>,
}

/// One step of the reconciler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the pod out.
    Remove {
        /// Local pod id.
        pod: u32,
        /// Why.
        reason: RemoveReason,
    },
    /// Take over a pod found in pins: open listeners, write its configuration. Established connections live on.
    Adopt {
        /// Local pod id.
        pod: u32,
        /// What it shall be.
        spec: PodSpec,
    },
    /// Write a changed configuration.
    Update {
        /// Local pod id.
        pod: u32,
        /// What it shall be.
        spec: PodSpec,
    },
    /// Bring the pod in, under a new local pod id.
    Enrol {
        /// What it shall be.
        spec: PodSpec,
    },
}

/// Why a pod is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveReason {
    /// No longer wanted on this node.
    Gone,
    /// Its network namespace is another one now: a new sandbox under the same name.
    NewIncarnation,
    /// Enrolled twice; the later enrolment stays.
    Duplicate,
}

/// The steps from `actual` (by local pod id) to `desired`, in the order to carry them out.
///
/// Of several desired pods with one network namespace only one can be enrolled: [`claims`] says which.
pub fn plan(desired: &BTreeMap<PodKey, PodSpec>, actual: &BTreeMap<u32, ActualPod>) -> Vec<Step> {
    let claims = claims(desired, actual);
    let wanted = |workload: &WorkloadId| {
        let spec = desired.get(workload)?;
        (claims.get(&spec.netns_cookie) == Some(workload)).then_some(spec)
    };

    let mut removals = Vec::new();
    let mut kept: BTreeMap<WorkloadId, (u32, &ActualPod)> = BTreeMap::new();
    // Later enrolments have larger ids, so they are seen first and stay.
    for (pod, is) in actual.iter().rev() {
        let reason = match wanted(&is.workload) {
            None => RemoveReason::Gone,
            Some(spec) if spec.netns_cookie != is.netns_cookie => RemoveReason::NewIncarnation,
            Some(_) if kept.contains_key(&is.workload) => RemoveReason::Duplicate,
            Some(_) => {
                kept.insert(is.workload, (*pod, is));
                continue;
            }
        };
        removals.push(Step::Remove { pod: *pod, reason });
    }
    removals.reverse();

    let mut steps = removals;
    let mut enrolments = Vec::new();
    for spec in desired.keys().filter_map(wanted) {
        match kept.get(&spec.config.workload) {
            None => enrolments.push(Step::Enrol { spec: spec.clone() }),
            Some((pod, is)) if !is.listening => steps.push(Step::Adopt { pod: *pod, spec: spec.clone() }),
            Some((pod, is)) if is.applied.as_ref() != Some(&spec.config) => {
                steps.push(Step::Update { pod: *pod, spec: spec.clone() });
            }
            Some(_) => {}
        }
    }
    // Pods that run already are served before new ones.
    steps.append(&mut enrolments);
    steps
}

/// Which desired pod owns each network namespace: the one already enrolled there, else the smallest name.
pub fn claims(
    desired: &BTreeMap<PodKey, PodSpec>,
    actual: &BTreeMap<u32, ActualPod>,
) -> BTreeMap<u64, PodKey> {
    let enrolled: BTreeSet<(u64, WorkloadId)> =
        actual.values().map(|is| (is.netns_cookie, is.workload)).collect();
    let mut claims: BTreeMap<u64, &PodSpec> = BTreeMap::new();
    for spec in desired.values() {
        let rank =
            |s: &PodSpec| (!enrolled.contains(&(s.netns_cookie, s.config.workload)), s.config.name.clone());
        let better = claims.get(&spec.netns_cookie).is_none_or(|holder| rank(spec) < rank(holder));
        if better {
            claims.insert(spec.netns_cookie, spec);
        }
    }
    claims.into_iter().map(|(cookie, spec)| (cookie, spec.config.workload)).collect()
}

/// The desired pods that cannot be enrolled because another owns their network namespace.
pub fn conflicts(
    desired: &BTreeMap<PodKey, PodSpec>,
    actual: &BTreeMap<u32, ActualPod>,
) -> BTreeMap<Name, Obstacle> {
    let claims = claims(desired, actual);
    desired
        .values()
        .filter_map(|spec| {
            let owner = claims.get(&spec.netns_cookie).filter(|owner| **owner != spec.config.workload)?;
            let owner = desired.get(owner)?.config.name.clone();
            Some((spec.config.name.clone(), Obstacle::NetnsTaken(owner)))
        })
        .collect()
}

#[cfg(test)]
mod tests;
