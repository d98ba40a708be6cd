//! How many connections each endpoint has from this worker: what least-request choice compares.
//!
//! Counted per worker, not over all of them: two random choices need a hint rather than the truth, and a shared count
//! would be written by every core for every connection.

use std::{cell::RefCell, collections::HashMap, net::SocketAddr};

/// Connections by endpoint. Invariant: an endpoint without connections has no entry.
#[derive(Debug, Default)]
pub(crate) struct Loads(RefCell<HashMap<SocketAddr, u32>>);

/// Counts a connection at its endpoint until dropped.
#[derive(Debug)]
pub(crate) struct LoadGuard<'a> {
    loads: &'a Loads,
    addr: SocketAddr,
}

impl Loads {
    /// Connections to an endpoint.
    pub(crate) fn of(&self, addr: SocketAddr) -> u32 {
        self.0.borrow().get(&addr).copied().unwrap_or(0)
    }

    /// Counts one more.
    pub(crate) fn count(&self, addr: SocketAddr) -> LoadGuard<'_> {
        *self.0.borrow_mut().entry(addr).or_default() += 1;
        LoadGuard { loads: self, addr }
    }
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        let mut loads = self.loads.0.borrow_mut();
        if let Some(load) = loads.get_mut(&self.addr) {
            *load -= 1;
            if *load == 0 {
                loads.remove(&self.addr);
            }
        }
    }
}
