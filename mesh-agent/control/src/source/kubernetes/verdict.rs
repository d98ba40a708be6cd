//! What becomes of a resource, as its users are told: pure, from the index and the snapshot it was compiled to.

mod route;

use std::{net::IpAddr, sync::Arc};

use mesh_core::snapshot::{Name, Snapshot};

use self::route::Route;
use crate::{
    compile::Registry,
    index::Index,
    problem::{Level, Problem, SourceError},
    resource::{Key, ParentRef, Resource, ServiceEntry},
};

/// What became of a resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// What is wrong with it, by itself and beside others.
    pub problems: Vec<Problem>,
    /// What rules of Istio's kinds refer to and is not there; for routes of the Gateway API their parents say it.
    pub missing: Vec<Problem>,
    /// Something of it is in force: what it says now, or what it said when it could last be used.
    pub in_force: bool,
    /// `metadata.generation` of what is in force.
    pub good_generation: Option<i64>,
    /// One for each of a route's parents that were read, in order.
    pub parents: Vec<ParentVerdict>,
    /// Addresses that the hosts of a ServiceEntry were given.
    pub addresses: Vec<(Arc<str>, IpAddr)>,
}

impl Verdict {
    /// Whether what it says now cannot be used.
    pub fn is_refused(&self) -> bool {
        self.problems.iter().any(|problem| problem.level == Level::Error)
    }
}

/// What became of a route at one of its parents.
#[derive(Clone, Debug, PartialEq)]
pub struct ParentVerdict {
    /// The parent.
    pub parent: ParentRef,
    /// Why it is not accepted there.
    pub not_accepted: Option<Refusal>,
    /// Which reference leads nowhere.
    pub unresolved: Option<Refusal>,
    /// What of it is not carried out, where the rest is.
    pub partial: Option<String>,
}

/// Why something of a route is not so: the reason, in the API's word, and a message.
pub type Refusal = (&'static str, String);

/// What is wrong with a resource beside others.
#[derive(Debug, Default)]
pub(super) struct Beside<'a> {
    /// As the compiler found it.
    pub(super) compiled: Vec<&'a SourceError>,
    /// What it refers to and is not there.
    pub(super) missing: Vec<&'a SourceError>,
}

/// What a resource is judged in: all of it of one compilation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'a> {
    /// All resources.
    pub(super) index: &'a Index,
    /// What they were compiled to.
    pub(super) snapshot: &'a Snapshot,
    /// The services that rules can name, as the compiler found them.
    pub(super) services: &'a Registry,
}

/// Judges a resource. `own` is what is wrong with it by itself.
pub(super) fn judge(key: &Key, own: &[Problem], beside: Option<&Beside<'_>>, around: &Around<'_>) -> Verdict {
    // What is wrong beside others takes nothing out of force.
    let warning = |error: &&SourceError| Problem {
        level: Level::Warning,
        field: error.field.clone(),
        message: error.message.clone(),
    };
    let mut problems = own.to_vec();
    problems.extend(beside.into_iter().flat_map(|beside| &beside.compiled).map(warning));
    let missing = beside.into_iter().flat_map(|beside| &beside.missing).map(warning).collect();
    let resource = around.index.get(key);
    let (mut parents, mut addresses) = (Vec::new(), Vec::new());
    match resource {
        Some(Resource::ServiceEntry(entry)) => addresses = given(entry, around.snapshot),
        Some(resource) => {
            if let Some(route) = Route::of(key, resource) {
                parents = route.parents().iter().map(|parent| route.at(parent, around)).collect();
            }
        }
        None => {}
    }
    Verdict {
        problems,
        missing,
        in_force: resource.is_some(),
        good_generation: around.index.origin(key).and_then(|origin| origin.generation),
        parents,
        addresses,
    }
}

/// The addresses that hosts were given because nobody wrote any down.
fn given(entry: &ServiceEntry, snapshot: &Snapshot) -> Vec<(Arc<str>, IpAddr)> {
    if !entry.addresses.is_empty() || !entry.auto_allocate {
        return Vec::new();
    }
    let of = |host: &Arc<str>| {
        let service = snapshot.service(&Name::new(Arc::clone(&entry.name.namespace), Arc::clone(host)));
        let vips = service.map(|service| service.vips.clone()).unwrap_or_default();
        vips.into_iter().map(|vip| (Arc::clone(host), vip)).collect::<Vec<_>>()
    };
    entry.hosts.iter().flat_map(of).collect()
}
