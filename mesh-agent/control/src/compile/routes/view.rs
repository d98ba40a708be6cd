//! Who sees what: values for all clients, and others for clients of some namespaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::route::scope::{InNamespace, Scoped};

/// Asks what clients see: those of each of `namespaces`, and (`None`) those of every other.
///
/// Invariant of the callers: a namespace that is not in `namespaces` sees exactly what `None` does.
pub(super) fn scoped<T: Eq>(
    namespaces: BTreeSet<Arc<str>>,
    mut see: impl FnMut(Option<&str>) -> Option<Arc<T>>,
) -> Option<Scoped<T>> {
    let default = see(None);
    let by_namespace: BTreeMap<Arc<str>, InNamespace<T>> = namespaces
        .into_iter()
        .filter_map(|namespace| {
            let all = see(Some(&namespace));
            (all != default).then(|| (namespace, InNamespace { selected: Vec::new(), all }))
        })
        .collect();
    (default.is_some() || !by_namespace.is_empty()).then_some(Scoped { default, by_namespace })
}

/// Tables that were made already, by what they were made from: many clients see the same.
#[derive(Debug)]
pub(super) struct Made<T>(BTreeMap<Vec<usize>, Option<Arc<T>>>);

impl<T> Default for Made<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Made<T> {
    /// The table made from `of`, made at the first time.
    pub(super) fn or_make(&mut self, of: Vec<usize>, make: impl FnOnce() -> T) -> Arc<T> {
        let known = self.0.get(&of).cloned().flatten();
        known.unwrap_or_else(|| {
            let made = Arc::new(make());
            self.0.insert(of, Some(Arc::clone(&made)));
            made
        })
    }

    /// The same, of what may come to nothing.
    pub(super) fn or_make_some(&mut self, of: usize, make: impl FnOnce() -> Option<T>) -> Option<Arc<T>> {
        self.0.entry(vec![of]).or_insert_with(|| make().map(Arc::new)).clone()
    }
}
