//! A node of a world: its host, its pods and its agents.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plan::{self, Link, NAMESERVER4};
use super::{World, WorldError, make_directory};
use crate::agent::{Agent, AgentBuilder, AgentSeat};
use crate::cgroup::Cgroup;
use crate::kernel::Kernel;
use crate::netns::NetNs;
use crate::place::{Place, PlaceParts};
use crate::pod::{Pod, PodIdentity, ip4_of, ip6_of};

/// The first slot given to a pod; below are the network, the gateway and slots for tests to choose.
const FIRST_POD_SLOT: u8 = 10;

/// Numbers pods over all worlds, for uids.
static NEXT_POD: AtomicU64 = AtomicU64::new(1);

/// A node: a network namespace that routes for its pods, with a cgroup subtree of its own.
#[derive(Debug)]
pub struct Node {
    name: String,
    full_name: String,
    index: u8,
    link: Link,
    netns: Arc<NetNs>,
    cgroup: Cgroup,
    host: Place,
    kubelet: Place,
    seat: AgentSeat,
    next_slot: AtomicU8,
    pods: Mutex<Vec<Pod>>,
    agents: Mutex<Vec<Agent>>,
    world: WorldPaths,
}

/// What a node has to know of its world once that has been made.
#[derive(Debug, Clone)]
struct WorldPaths {
    directory: PathBuf,
}

impl Node {
    pub(super) fn create(
        world: &World,
        name: &str,
        index: u8,
        count: usize,
        link: Link,
    ) -> Result<Self, WorldError> {
        let full_name = format!("{}-{name}", world.id());
        let network = |source| WorldError::Network { what: name.to_owned(), source };
        let netns = Arc::new(NetNs::create(&full_name).map_err(network)?);
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"] {
            netns.sysctl(setting, "1").map_err(network)?;
        }
        world.wire().ip(&plan::plug_lines(index, netns.name())).map_err(network)?;
        netns.ip(&plan::node_lines(index, count, link)).map_err(network)?;
        let cgroup = world.child_cgroup(&[name])?;
        world.child_cgroup(&[name, "kubepods"])?;
        let place = |part: &str, label: String| -> Result<Place, WorldError> {
            Ok(Place::new(PlaceParts {
                log: world.log_path(&label),
                name: label,
                netns: Arc::clone(&netns),
                cgroup: world.child_cgroup(&[name, part])?,
                ip4: plan::wire_ip4(index),
                ip6: plan::wire_ip6(index),
                resolv_conf: None,
            }))
        };
        let host = place("host", name.to_owned())?;
        let kubelet = place("kubelet", format!("{name}-kubelet"))?;
        let directory = world.directory().join(name);
        make_directory(&directory)?;
        let seat = AgentSeat {
            place: place("agent", format!("{name}-agent"))?,
            node_name: full_name.clone(),
            cgroup_root: cgroup.path().to_path_buf(),
            prober_cgroup: kubelet.cgroup().path().to_path_buf(),
            config: world.manifests().directory().to_path_buf(),
            ca_dir: world.ca_dir(),
            directory,
            logs: world.logs(),
        };
        Ok(Self {
            name: name.to_owned(),
            full_name,
            index,
            link,
            netns,
            cgroup,
            host,
            kubelet,
            seat,
            next_slot: AtomicU8::new(FIRST_POD_SLOT),
            pods: Mutex::new(Vec::new()),
            agents: Mutex::new(Vec::new()),
            world: WorldPaths { directory: world.directory().to_path_buf() },
        })
    }

    /// Its short name in the test.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name for the agent and in manifests; unique on the machine, since pins are named after it.
    #[must_use]
    pub fn full_name(&self) -> &str {
        &self.full_name
    }

    /// Its number in the address plan, from 1.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Its cgroup subtree: the agent's `--cgroup-root`.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Where ordinary host processes of the node run.
    #[must_use]
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// Where the node's kubelet would run: the host's network, a cgroup of its own.
    #[must_use]
    pub fn kubelet(&self) -> &Place {
        &self.kubelet
    }

    /// A process group of the host below the kubelet's own: what a pod's would be where the kubelet runs in
    /// the root of the pods' groups.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn below_the_kubelet(&self, name: &str) -> Result<Place, WorldError> {
        let cgroup = self.kubelet.cgroup().child(name);
        let label = format!("{}-kubelet-{name}", self.name);
        Ok(Place::new(PlaceParts {
            cgroup: cgroup.map_err(|source| WorldError::Cgroup { what: label.clone(), source })?,
            log: self.world.directory.join("logs").join(format!("{label}.log")),
            name: label,
            netns: Arc::clone(&self.netns),
            ip4: plan::wire_ip4(self.index),
            ip6: plan::wire_ip6(self.index),
            resolv_conf: None,
        }))
    }

    /// The pods made so far and not removed.
    #[must_use]
    pub fn pods(&self) -> Vec<Pod> {
        lock(&self.pods).clone()
    }

    /// The agents started so far, dead ones included.
    #[must_use]
    pub fn agents(&self) -> Vec<Agent> {
        lock(&self.agents).clone()
    }

    /// Make a pod, named `NAME` (in namespace `default`) or `NAMESPACE/NAME`. It is in no manifest yet.
    ///
    /// # Errors
    /// When the kernel refuses one of its parts.
    pub fn pod(&self, name: &str) -> Result<Pod, WorldError> {
        self.pod_builder(name).start()
    }

    /// As [`Node::pod`], with choices.
    #[must_use]
    pub fn pod_builder<'a>(&'a self, name: &'a str) -> PodBuilder<'a> {
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        PodBuilder { node: self, namespace, name, slot: None }
    }

    /// Make `count` pods `PREFIX-0`, `PREFIX-1`, … on several threads.
    ///
    /// # Errors
    /// That of the first pod that could not be made.
    pub fn pods_in_bulk(&self, prefix: &str, count: usize) -> Result<Vec<Pod>, WorldError> {
        const MAKERS: usize = 4;
        let names: Vec<String> = (0..count).map(|number| format!("{prefix}-{number}")).collect();
        let made: Vec<Result<Vec<Pod>, WorldError>> = std::thread::scope(|scope| {
            let makers: Vec<_> = names
                .chunks(count.div_ceil(MAKERS).max(1))
                .map(|chunk| scope.spawn(move || chunk.iter().map(|name| self.pod(name)).collect()))
                .collect();
            makers
                .into_iter()
                .map(|maker| maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        Ok(made.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// Take a pod away: its processes, cable, namespace and cgroup (not its manifest).
    ///
    /// # Errors
    /// When its processes survive or the kernel refuses.
    pub fn remove_pod(&self, pod: &Pod) -> Result<(), WorldError> {
        pod.cgroup().remove().map_err(|source| WorldError::Cgroup { what: pod.name().to_owned(), source })?;
        self.netns
            .ip(&[format!("link delete p{}", pod.slot())])
            .map_err(|source| WorldError::Network { what: pod.name().to_owned(), source })?;
        pod.netns().remove();
        lock(&self.pods).retain(|other| other.uid() != pod.uid());
        Ok(())
    }

    /// What agents of this node have in the kernel, whether one runs or not.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        Kernel::of(&self.full_name)
    }

    /// An agent for this node, not started yet.
    #[must_use]
    pub fn agent(&self) -> AgentBuilder<'_> {
        AgentBuilder::new(&self.seat, &self.agents)
    }
}

/// A pod to be made.
#[derive(Debug)]
pub struct PodBuilder<'a> {
    node: &'a Node,
    namespace: &'a str,
    name: &'a str,
    slot: Option<u8>,
}

impl PodBuilder<'_> {
    /// Take this slot, and so these addresses, such as those of a removed pod.
    #[must_use]
    pub fn slot(mut self, slot: u8) -> Self {
        self.slot = Some(slot);
        self
    }

    /// Make it.
    ///
    /// # Errors
    /// When the kernel refuses one of its parts.
    pub fn start(self) -> Result<Pod, WorldError> {
        let Self { node, namespace, name, slot } = self;
        let slot = match slot {
            Some(slot) => slot,
            None => node
                .next_slot
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |slot| slot.checked_add(1))
                .map_err(|_| WorldError::Full(node.name.clone()))?,
        };
        let number = NEXT_POD.fetch_add(1, Ordering::Relaxed);
        let label = if namespace == "default" { name.to_owned() } else { format!("{namespace}.{name}") };
        let network = |source| WorldError::Network { what: label.clone(), source };
        // The number keeps a new pod's namespace apart from a removed one of the same name.
        let netns = NetNs::create(&format!("{}-{label}-{number}", node.full_name)).map_err(network)?;
        node.netns.ip(&plan::host_end_lines(node.index, slot, netns.name(), node.link)).map_err(network)?;
        netns.ip(&plan::pod_end_lines(node.index, slot, node.link)).map_err(network)?;
        let uid = format!("00000000-0000-4000-8000-{number:012x}");
        let cgroup = node
            .cgroup
            .child("kubepods")
            .and_then(|group| group.child(&format!("pod{uid}")))
            .map_err(|source| WorldError::Cgroup { what: label.clone(), source })?;
        let place = Place::new(PlaceParts {
            name: name.to_owned(),
            netns: Arc::new(netns),
            cgroup,
            ip4: ip4_of(node.index, slot),
            ip6: ip6_of(node.index, slot),
            log: node.world.directory.join("logs").join(format!("{}-{label}.log", node.name)),
            resolv_conf: Some(node.world.resolv_conf(namespace)?),
        });
        let node_name = node.full_name.clone();
        let node_ip4 = plan::wire_ip4(node.index);
        let namespace = namespace.to_owned();
        let pod = Pod::new(place, PodIdentity { namespace, uid, node_name, node_ip4, slot });
        lock(&node.pods).push(pod.clone());
        Ok(pod)
    }
}

impl WorldPaths {
    /// The resolver configuration that a kubelet would write for a pod of `namespace`.
    fn resolv_conf(&self, namespace: &str) -> Result<PathBuf, WorldError> {
        let path = self.directory.join(format!("resolv-{namespace}.conf"));
        let text = format!(
            "search {namespace}.svc.cluster.local svc.cluster.local cluster.local\n\
             nameserver {NAMESERVER4}\noptions ndots:5 timeout:2 attempts:2\n"
        );
        fs::write(&path, text).map_err(|source| WorldError::File { path: path.clone(), source })?;
        Ok(path)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
