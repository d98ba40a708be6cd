//! Owns the periodic clean-up: expired tickets and their counts, void verdicts, pins of dead namespaces.

use std::collections::HashMap;

use mesh_common::ticket::TupleKey;

use crate::{
    folders, links,
    map::MapError,
    node::{Node, lock},
    sys::LinkTarget,
    verdicts::Verdicts,
};

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Expired tickets.
    pub tickets: u32,
    /// Pods whose ticket count was wrong and has been set right.
    pub counts: u32,
    /// Verdicts of an older policy generation.
    pub verdicts: u32,
    /// Arrival pins whose namespace is gone.
    pub pins: u32,
    /// Pods that are in the maps but whose namespace is gone.
    pub pods: u32,
}

impl Node {
    /// Cleans up. To be called every few seconds, from one thread at a time; `now_ns` is CLOCK_MONOTONIC.
    pub fn sweep(&self, now_ns: u64) -> Result<Swept, MapError> {
        let (tickets, counts) = self.sweep_tickets(now_ns)?;
        let verdicts = Verdicts::new(&self.maps).sweep()?;
        let (pins, pods) = self.sweep_pins();
        Ok(Swept { tickets, counts, verdicts, pins, pods })
    }

    /// Deletes expired tickets and recomputes each pod's count of live ones.
    fn sweep_tickets(&self, now_ns: u64) -> Result<(u32, u32), MapError> {
        let maps = &self.maps;
        let mut before: HashMap<u64, u64> = HashMap::new();
        maps.tickets_used.each(|cookie, used| {
            before.insert(*cookie, *used);
        })?;
        let mut expired: Vec<TupleKey> = Vec::new();
        let mut alive: HashMap<u64, u64> = HashMap::new();
        maps.tickets.each(|key, ticket| {
            if ticket.expires_ns < now_ns {
                expired.push(*key);
            } else {
                *alive.entry(ticket.netns_cookie).or_default() += 1;
            }
        })?;
        let mut gone = 0;
        for key in &expired {
            // A connect may have renewed it since it was seen.
            if maps.tickets.get(key)?.is_some_and(|ticket| ticket.expires_ns < now_ns) {
                gone += u32::from(maps.tickets.delete(key)?);
            }
        }
        let mut corrected = 0;
        for (cookie, used) in before {
            let counted = alive.get(&cookie).copied().unwrap_or(0);
            // Only a count that stood still during the walk is known to be wrong; a busy pod's waits.
            if counted != used && maps.tickets_used.get(&cookie)? == Some(used) {
                maps.tickets_used.put(&cookie, &counted)?;
                corrected += 1;
            }
        }
        Ok((gone, corrected))
    }

    /// Removes arrival pins whose namespace is gone, with the pods they belonged to.
    fn sweep_pins(&self) -> (u32, u32) {
        let mut pins = 0;
        let mut dead = Vec::new();
        for pin in folders::entries(&self.folders.links()) {
            let Some(pod) = folders::arrival_pod(&pin) else { continue };
            // The agent's own sockets keep the namespaces of the pods it serves alive.
            if lock(&self.pods).contains_key(&pod) {
                continue;
            }
            // A pin that cannot be read is being replaced right now.
            if let Some(LinkTarget::Netns { inode: 0, .. }) = links::target(&pin) {
                pins += u32::from(links::remove(&pin));
                dead.push(pod);
            }
        }
        if !dead.is_empty() {
            self.remove(&dead);
        }
        (pins, dead.len() as u32)
    }
}
