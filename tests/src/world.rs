//! A world: the nodes of one test, the wire between them, and everything that has to go at the end.

mod node;
mod plan;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::artefacts;
use crate::cgroup::{Cgroup, CgroupError};
use crate::clean::{self, CGROUP_PREFIX, SHORT_PREFIX};
use crate::manifests::Manifests;
use crate::netns::{NetNs, NetNsError};
use crate::place::{Place, PlaceParts};
use crate::saying::say;
use crate::verdict;
use crate::wiretap::{Wiretap, WiretapError};

pub use node::{Node, PodBuilder};
pub use plan::{Link, NAMESERVER4, NAMESERVER6};

/// Numbers the worlds of this process.
static NEXT_WORLD: AtomicU32 = AtomicU32::new(0);

/// The first wire address of an outsider; nodes are numbered from 1.
const FIRST_OUTSIDER: u8 = 101;

/// A world or a part of it could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// A network namespace.
    #[error("cannot make the network of {what}")]
    Network {
        /// The node, pod or wire.
        what: String,
        /// Why not.
        source: NetNsError,
    },
    /// A cgroup.
    #[error("cannot make the cgroup of {what}")]
    Cgroup {
        /// The node, pod or world.
        what: String,
        /// Why not.
        source: CgroupError,
    },
    /// A file or directory of the world.
    #[error("cannot make {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No node of that name.
    #[error("the world has no node {0}")]
    NoSuchNode(String),
    /// All addresses of the node, or the wire, are taken.
    #[error("{0} has no address left")]
    Full(String),
}

/// How a world shall look.
#[derive(Debug, Clone)]
pub struct WorldBuilder {
    test: String,
    nodes: Vec<String>,
    link: Link,
}

impl WorldBuilder {
    /// Add nodes.
    #[must_use]
    pub fn nodes(mut self, names: &[&str]) -> Self {
        self.nodes.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// How pods are connected to their node (routed unless said otherwise).
    #[must_use]
    pub fn linked_by(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// Make the world.
    ///
    /// # Errors
    /// When the kernel refuses one of its parts; what was made is removed again.
    pub fn start(self) -> Result<World, WorldError> {
        World::start(self)
    }
}

/// Nodes connected by a wire, apart from the machine's own network. Dropping it ends all its processes and
/// removes its namespaces, cgroups, pins and files, after saving artefacts if the test is failing.
#[derive(Debug)]
pub struct World {
    test: String,
    id: String,
    directory: PathBuf,
    cgroup: Cgroup,
    wire: NetNs,
    nodes: BTreeMap<String, Node>,
    outsiders: Mutex<Vec<Place>>,
    next_outsider: AtomicU8,
    manifests: Manifests,
}

impl World {
    /// A world for the test of this name (see [`crate::test_name!`]); no nodes yet.
    #[must_use]
    pub fn named(test: &str) -> WorldBuilder {
        WorldBuilder { test: test.to_owned(), nodes: Vec::new(), link: Link::Routed }
    }

    /// A world with nodes of these names and routed pods.
    ///
    /// # Errors
    /// As [`WorldBuilder::start`].
    pub fn with_nodes(test: &str, names: &[&str]) -> Result<Self, WorldError> {
        Self::named(test).nodes(names).start()
    }

    fn start(builder: WorldBuilder) -> Result<Self, WorldError> {
        verdict::reset();
        let suffix = next_suffix();
        let id = format!("{SHORT_PREFIX}{suffix}");
        let directory = std::env::temp_dir().join(&id);
        for part in ["config", "logs"] {
            make_directory(&directory.join(part))?;
        }
        let cgroup = Cgroup::create_top(&format!("{CGROUP_PREFIX}{suffix}"))
            .map_err(|source| WorldError::Cgroup { what: id.clone(), source })?;
        let network = |source| WorldError::Network { what: "the wire".to_owned(), source };
        let wire = NetNs::create(&format!("{id}-wire")).map_err(network)?;
        let manifests = Manifests::new(directory.join("config"));
        // From here on the half-made world cleans up after itself.
        let mut world = Self {
            test: builder.test,
            id,
            directory,
            cgroup,
            wire,
            nodes: BTreeMap::new(),
            outsiders: Mutex::new(Vec::new()),
            next_outsider: AtomicU8::new(FIRST_OUTSIDER),
            manifests,
        };
        world.wire.ip(&plan::wire_lines()).map_err(network)?;
        let count = builder.nodes.len();
        for (position, name) in builder.nodes.into_iter().enumerate() {
            let index = u8::try_from(position + 1).map_err(|_| WorldError::Full("the wire".to_owned()))?;
            let node = Node::create(&world, &name, index, count, builder.link)?;
            world.nodes.insert(name, node);
        }
        Ok(world)
    }

    /// The node of this (short) name.
    ///
    /// # Errors
    /// [`WorldError::NoSuchNode`].
    pub fn node(&self, name: &str) -> Result<&Node, WorldError> {
        self.nodes.get(name).ok_or_else(|| WorldError::NoSuchNode(name.to_owned()))
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The manifests that all agents of this world watch.
    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// A host on the wire that is no node: it reaches pods as traffic from outside the mesh does.
    ///
    /// # Errors
    /// When the kernel refuses one of its parts.
    pub fn outsider(&self, name: &str) -> Result<Place, WorldError> {
        let slot = self.next_outsider.fetch_add(1, Ordering::Relaxed);
        let network = |source| WorldError::Network { what: name.to_owned(), source };
        let netns = NetNs::create(&format!("{}-{name}", self.id)).map_err(network)?;
        self.wire.ip(&plan::plug_lines(slot, netns.name())).map_err(network)?;
        let nodes: Vec<u8> = self.nodes.values().map(Node::index).collect();
        netns.ip(&plan::outsider_lines(slot, &nodes)).map_err(network)?;
        let cgroup = self.child_cgroup(&["outside", name])?;
        let place = Place::new(PlaceParts {
            name: name.to_owned(),
            netns: Arc::new(netns),
            cgroup,
            ip4: plan::wire_ip4(slot),
            ip6: plan::wire_ip6(slot),
            log: self.log_path(name),
            resolv_conf: None,
        });
        self.outsiders.lock().unwrap_or_else(PoisonError::into_inner).push(place.clone());
        Ok(place)
    }

    /// A fresh service address pair for the `number`th service of a test: `10.96.0.NUMBER`,
    /// `fd00:96::NUMBER` (the name server's are [`NAMESERVER4`] and [`NAMESERVER6`]).
    #[must_use]
    pub fn service_ips(number: u16) -> (Ipv4Addr, Ipv6Addr) {
        plan::service_ips(number)
    }

    /// Cut or mend the wire of a node.
    ///
    /// # Errors
    /// When there is no such node or the kernel refuses.
    pub fn set_wire(&self, node: &str, up: bool) -> Result<(), WorldError> {
        let index = self.node(node)?.index();
        let state = if up { "up" } else { "down" };
        self.wire
            .ip(&[format!("link set w{index} {state}")])
            .map_err(|source| WorldError::Network { what: "the wire".to_owned(), source })
    }

    /// Listen to everything that passes between nodes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn tap_wire(&self) -> Result<Wiretap, WiretapError> {
        Wiretap::start(&self.wire)
    }

    /// The folder of the certificate authority that all agents of this world share: their `--ca-dir`.
    #[must_use]
    pub fn ca_dir(&self) -> PathBuf {
        self.directory.join("ca")
    }

    /// The name of the test.
    #[must_use]
    pub fn test_name(&self) -> &str {
        &self.test
    }

    /// The world's scratch directory; removed with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where agents and tools log.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Every place of the world: hosts of nodes, their pods, outsiders.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        for node in self.nodes.values() {
            places.push(node.host().clone());
            places.extend(node.pods().iter().map(|pod| Place::clone(pod)));
        }
        places.extend(self.outsiders.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
        places
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn wire(&self) -> &NetNs {
        &self.wire
    }

    pub(crate) fn log_path(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    pub(crate) fn child_cgroup(&self, path: &[&str]) -> Result<Cgroup, WorldError> {
        path.iter().try_fold(self.cgroup.clone(), |group, name| {
            group.child(name).map_err(|source| WorldError::Cgroup { what: (*name).to_owned(), source })
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if verdict::failed() {
            artefacts::save(self);
        }
        for node in self.nodes.values() {
            for agent in node.agents() {
                agent.kill9();
            }
        }
        if let Err(error) = self.cgroup.remove() {
            say(&format!("{:#}", anyhow::Error::new(error)));
        }
        for place in self.places() {
            place.netns().remove();
        }
        self.wire.remove();
        for node in self.nodes.values() {
            clean::remove_pins(node.full_name());
        }
        if std::env::var_os("MESH_TESTS_KEEP").is_none() {
            clean::remove_directory(&self.directory);
        }
    }
}

/// What tells one world's names from another's: the process, by which leftovers are known, and a number.
pub(crate) fn next_suffix() -> String {
    format!("{}-{}", std::process::id(), NEXT_WORLD.fetch_add(1, Ordering::Relaxed))
}

fn make_directory(path: &Path) -> Result<(), WorldError> {
    fs::create_dir_all(path).map_err(|source| WorldError::File { path: path.to_path_buf(), source })
}
