//! Owns what a watch has told so far of objects of one kind, by their key.
//!
//! Invariant: a list counts once it is whole, and takes away what is not in it; until then the one before it counts.

use std::collections::BTreeMap;

use kube::runtime::watcher::Event;

/// Something that is listed and watched.
#[derive(Debug)]
pub(crate) struct Listed<K, V> {
    /// As of the last event.
    pub(crate) now: BTreeMap<K, V>,
    coming: BTreeMap<K, V>,
    /// Whether it was listed once.
    pub(crate) is_complete: bool,
}

impl<K, V> Default for Listed<K, V> {
    fn default() -> Self {
        Self { now: BTreeMap::new(), coming: BTreeMap::new(), is_complete: false }
    }
}

impl<K: Ord, V> Listed<K, V> {
    /// Takes an event; `of` says what it is about, or that it does not count.
    pub(crate) fn take<O>(&mut self, event: Event<O>, of: impl Fn(O) -> (K, Option<V>)) {
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply(object) => {
                if let (key, Some(value)) = of(object) {
                    self.coming.insert(key, value);
                }
            }
            Event::InitDone => {
                self.now = std::mem::take(&mut self.coming);
                self.is_complete = true;
            }
            Event::Apply(object) => match of(object) {
                (key, Some(value)) => {
                    self.now.insert(key, value);
                }
                (key, None) => {
                    self.now.remove(&key);
                }
            },
            Event::Delete(object) => {
                self.now.remove(&of(object).0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_list_takes_away_what_is_not_in_it() {
        let mut listed = Listed::default();
        let mut put = |event| {
            let before = listed.is_complete;
            listed.take(event, |(key, value): (&'static str, i32)| (key, Some(value)));
            (before, listed.is_complete, listed.now.clone())
        };
        let known = BTreeMap::from([("a", 1), ("b", 2)]);
        put(Event::InitApply(("a", 1)));
        put(Event::InitApply(("b", 2)));
        assert_eq!(put(Event::InitDone), (false, true, known.clone()));
        assert_eq!(put(Event::Init), (true, true, known.clone()));
        assert_eq!(put(Event::InitApply(("b", 3))), (true, true, known));
        assert_eq!(put(Event::InitDone).2, BTreeMap::from([("b", 3)]));
        put(Event::Apply(("c", 4)));
        assert_eq!(put(Event::Delete(("b", 3))).2, BTreeMap::from([("c", 4)]));
    }
}
