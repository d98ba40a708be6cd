//! Owns what the controller currently tells its clients: every resource, encoded once, and which changed when.
//!
//! Invariants:
//! - A resource's version is a hash of its contents, so it survives a restart of the controller, and equal contents are
//!   never sent twice. Who is told is not part of it, but a change all the same.
//! - The log holds every change after [`World::floor`]; a client that has seen less must say what it has.
//! - Memory is bounded by the resources and [`LOG_MAX`], whatever the number and speed of clients.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use mesh_core::reach::Reach;
use mesh_wire::proto::discovery::Resource as WireResource;
use prost::Message as _;
use prost_types::Any;

use crate::link::Kind;

/// Changes remembered. A client further behind is told to come again with what it has.
pub const LOG_MAX: usize = 1 << 18;

/// One resource as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Name, unique within its kind.
    pub name: Arc<str>,
    /// Hash of body and aliases.
    pub version: u64,
    /// The message with its name, version and aliases, as clients are told it.
    pub encoded: Bytes,
    /// Other names it can be asked for, sorted.
    pub aliases: Vec<Arc<str>>,
    /// Who is told of it.
    pub reach: Reach,
}

impl Resource {
    /// Makes a resource; the version follows from the contents.
    pub fn new(
        kind: Kind,
        name: impl Into<Arc<str>>,
        body: Vec<u8>,
        mut aliases: Vec<Arc<str>>,
        reach: Reach,
    ) -> Self {
        aliases.sort();
        let name = name.into();
        let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        digest.update(&body);
        for alias in &aliases {
            digest.update(&[0xff]);
            digest.update(alias.as_bytes());
        }
        let version = digest.finish().as_ref().iter().take(8).fold(0, |v, b| v << 8 | u64::from(*b));
        let message = WireResource {
            name: name.to_string(),
            aliases: aliases.iter().map(ToString::to_string).collect(),
            version: version_text(version),
            resource: Some(Any { type_url: kind.type_url().to_owned(), value: body }),
            ..WireResource::default()
        };
        Self { name, version, encoded: message.encode_to_vec().into(), aliases, reach }
    }

    /// The version as it goes over the wire.
    pub fn version_text(&self) -> String {
        version_text(self.version)
    }
}

/// A version as text of fixed length.
fn version_text(version: u64) -> String {
    format!("{version:016x}")
}

/// A change: the named resource was set or removed, or others are told of it than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// When.
    pub generation: u64,
    /// Kind of the resource.
    pub kind: Kind,
    /// Name of the resource.
    pub name: Arc<str>,
    /// Who was told of it before; `None`: there was none of this name.
    pub before: Option<Reach>,
    /// It says something else than before, or is gone.
    pub contents: bool,
}

/// What a new state is made of: `None` removes.
pub type Edits = BTreeMap<(Kind, Arc<str>), Option<Resource>>;

/// Everything published.
#[derive(Debug)]
pub struct World {
    generation: u64,
    tables: [Table; Kind::ALL.len()],
    log: VecDeque<Change>,
    floor: u64,
    log_max: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// In the order in which a client of all of them is told.
    in_order: BTreeMap<Arc<str>, Arc<Resource>>,
    /// The same: for each client each change is looked up.
    by_name: HashMap<Arc<str>, Arc<Resource>, RandomState>,
    /// Alias to name.
    aliases: HashMap<Arc<str>, Arc<str>, RandomState>,
}

impl Default for World {
    fn default() -> Self {
        Self::with_log(LOG_MAX)
    }
}

impl World {
    /// An empty world, of generation 0, which remembers `log_max` changes.
    pub fn with_log(log_max: usize) -> Self {
        Self { generation: 0, tables: Default::default(), log: VecDeque::new(), floor: 0, log_max }
    }

    /// Number of the last change; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Changes up to and including this one are forgotten.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Applies edits as one generation. Returns how many resources changed; without a change there is no new generation,
    /// except the first, which says that the world is known.
    pub fn apply(&mut self, edits: Edits) -> usize {
        let generation = self.generation + 1;
        let mut changed = 0;
        for ((kind, name), edit) in edits {
            if let Some(Edited { before, contents }) = self.tables[kind.index()].set(&name, edit) {
                changed += 1;
                self.log.push_back(Change { generation, kind, name, before, contents });
            }
        }
        if changed > 0 || self.generation == 0 {
            self.generation = generation;
        }
        while self.log.len() > self.log_max {
            if let Some(change) = self.log.pop_front() {
                self.floor = change.generation;
            }
        }
        changed
    }

    /// A resource by its name.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        self.tables[kind.index()].by_name.get(name)
    }

    /// A resource by its name or one of its aliases.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let table = &self.tables[kind.index()];
        table.by_name.get(name).or_else(|| table.by_name.get(table.aliases.get(name)?))
    }

    /// Resources of a kind after `name`, in order of name.
    pub fn after<'a>(&'a self, kind: Kind, name: Option<&str>) -> impl Iterator<Item = &'a Arc<Resource>> {
        let from = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.tables[kind.index()].in_order.range::<str, _>((from, Bound::Unbounded)).map(|(_, r)| r)
    }

    /// How many resources of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.tables[kind.index()].by_name.len()
    }

    /// Changes after a generation that is not below [`Self::floor`], oldest first.
    pub fn changes_after(&self, generation: u64) -> impl Iterator<Item = &Change> {
        let start = self.log.partition_point(|change| change.generation <= generation);
        self.log.range(start..)
    }
}

/// What an edit changed.
struct Edited {
    before: Option<Reach>,
    contents: bool,
}

impl Table {
    /// `None`: nothing changed.
    fn set(&mut self, name: &Arc<str>, edit: Option<Resource>) -> Option<Edited> {
        let Some(resource) = edit else {
            self.in_order.remove(name);
            let before = self.by_name.remove(name)?;
            self.forget_aliases(name, &before);
            return Some(Edited { before: Some(before.reach.clone()), contents: true });
        };
        let old = self.by_name.get(name);
        if old.is_some_and(|old| **old == resource) {
            return None;
        }
        let contents = old.is_none_or(|old| old.version != resource.version);
        let resource = Arc::new(resource);
        self.in_order.insert(Arc::clone(name), Arc::clone(&resource));
        let before = self.by_name.insert(Arc::clone(name), Arc::clone(&resource));
        if let Some(before) = &before {
            self.forget_aliases(name, before);
        }
        for alias in &resource.aliases {
            self.aliases.insert(Arc::clone(alias), Arc::clone(name));
        }
        Some(Edited { before: before.map(|before| before.reach.clone()), contents })
    }

    /// Drops the aliases of a resource that nobody else has taken.
    fn forget_aliases(&mut self, name: &str, before: &Resource) {
        for alias in &before.aliases {
            if self.aliases.get(alias).is_some_and(|owner| &**owner == name) {
                self.aliases.remove(alias);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str, body: &str, aliases: &[&str]) -> Resource {
        let aliases = aliases.iter().map(|a| Arc::from(*a)).collect();
        Resource::new(Kind::Address, name, body.as_bytes().to_vec(), aliases, Reach::Everyone)
    }

    fn edits(list: Vec<(&str, Option<Resource>)>) -> Edits {
        list.into_iter().map(|(name, edit)| ((Kind::Address, Arc::from(name)), edit)).collect()
    }

    #[test]
    fn equal_contents_make_no_generation() {
        let mut world = World::default();
        assert_eq!(world.apply(edits(vec![("a", Some(resource("a", "1", &[])))])), 1);
        assert_eq!(
            (world.generation(), world.apply(edits(vec![("a", Some(resource("a", "1", &[])))]))),
            (1, 0)
        );
        assert_eq!(world.generation(), 1);
        assert_eq!(world.apply(edits(vec![("b", None)])), 0);
        assert_eq!(world.generation(), 1);
    }

    #[test]
    fn an_empty_world_is_known_after_its_first_state() {
        let mut world = World::default();
        assert_eq!(world.apply(Edits::new()), 0);
        assert_eq!(world.generation(), 1);
        world.apply(Edits::new());
        assert_eq!(world.generation(), 1);
    }

    #[test]
    fn the_log_tells_what_changed_after_a_generation() {
        let mut world = World::default();
        world.apply(edits(vec![("a", Some(resource("a", "1", &[]))), ("b", Some(resource("b", "1", &[])))]));
        world.apply(edits(vec![("a", Some(resource("a", "2", &[])))]));
        world.apply(edits(vec![("b", None)]));
        let names = |after| world.changes_after(after).map(|c| c.name.to_string()).collect::<Vec<_>>();
        assert_eq!(names(0), ["a", "b", "a", "b"]);
        assert_eq!(names(1), ["a", "b"]);
        assert_eq!(names(2), ["b"]);
        assert!(names(3).is_empty());
    }

    #[test]
    fn who_is_told_is_a_change_but_no_other_version() {
        let mut world = World::default();
        let set = |reach: Reach| edits(vec![("a", Some(Resource { reach, ..resource("a", "1", &[]) }))]);
        world.apply(set(Reach::Everyone));
        let version = world.get(Kind::Address, "a").map(|resource| resource.version);
        assert_eq!(world.apply(set(Reach::node("n1".into()))), 1);
        assert_eq!(world.apply(set(Reach::nodes(["n1".into()]))), 0, "the same nodes");
        assert_eq!(world.get(Kind::Address, "a").map(|resource| resource.version), version);
        world.apply(edits(vec![("a", None)]));
        let told: Vec<_> = world.changes_after(0).map(|c| (c.before.clone(), c.contents)).collect();
        let one = Some(Reach::node("n1".into()));
        assert_eq!(told, [(None, true), (Some(Reach::Everyone), false), (one, true)]);
    }

    #[test]
    fn what_the_log_forgets_raises_its_floor() {
        let mut world = World::with_log(2);
        for body in ["1", "2", "3", "4"] {
            world.apply(edits(vec![("a", Some(resource("a", body, &[])))]));
        }
        assert_eq!((world.floor(), world.generation()), (2, 4));
        assert_eq!(world.changes_after(2).count(), 2);
    }

    #[test]
    fn an_alias_follows_the_resource_that_has_it_now() {
        let mut world = World::default();
        world.apply(edits(vec![("a", Some(resource("a", "1", &["/10.0.0.1"])))]));
        assert_eq!(world.find(Kind::Address, "/10.0.0.1").map(|r| &*r.name), Some("a"));
        world.apply(edits(vec![("b", Some(resource("b", "1", &["/10.0.0.1"])))]));
        world.apply(edits(vec![("a", None)]));
        assert_eq!(world.find(Kind::Address, "/10.0.0.1").map(|r| &*r.name), Some("b"));
        world.apply(edits(vec![("b", Some(resource("b", "1", &["/10.0.0.2"])))]));
        assert!(world.find(Kind::Address, "/10.0.0.1").is_none());
        assert!(world.find(Kind::Authorization, "b").is_none());
    }
}
