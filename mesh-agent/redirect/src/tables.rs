//! Owns the service, backend and workload tables in the kernel: what is there, and the way to what shall be.
//!
//! Invariants:
//! - The mirror equals the maps: an entry is in it exactly when the kernel has taken it.
//! - A reader never sees a hole: backends are written before the services that count them, and deleted after.
//! - A service whose slots did not all fit is published with those that did, and reported; without any slot it
//!   is left out rather than refused.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use aya::Pod;
use mesh_common::{
    Addr,
    service::{
        Backend, BackendIndexKey, BackendKey, PEER_LOCAL, PEER_MESHED, PEER_PLAIN, PROTO_TCP, PROTO_UDP,
        SERVICE_ANSWERED, SERVICE_HIDDEN_SHIFT, SERVICE_L7, ServiceKey, ServiceVal, WorkloadVal,
    },
};
use mesh_core::{
    slots::{self, PeerEntry},
    snapshot::Protocol,
};

use crate::{
    map::{KernelMap, MapError},
    maps::Maps,
};

/// What the tables shall hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredTables {
    /// Frontends.
    pub services: HashMap<ServiceKey, ServiceVal>,
    /// Slots.
    pub backends: HashMap<BackendKey, Backend>,
    /// Workloads by address.
    pub workloads: HashMap<Addr, WorkloadVal>,
}

impl From<&slots::Tables> for DesiredTables {
    fn from(tables: &slots::Tables) -> Self {
        let services = tables.services.iter().map(|(frontend, entry)| {
            let proto = match frontend.protocol {
                Protocol::Tcp => PROTO_TCP,
                Protocol::Udp => PROTO_UDP,
            };
            let key = ServiceKey { addr: frontend.addr.into(), port: frontend.port, proto };
            let value = ServiceVal {
                service: entry.service.0,
                slots: entry.slots,
                count: entry.count,
                flags: (u32::from(entry.l7) * SERVICE_L7)
                    | (u32::from(entry.answered) * SERVICE_ANSWERED)
                    | (entry.hidden << SERVICE_HIDDEN_SHIFT),
                affinity_s: entry.affinity_s,
                pad: 0,
            };
            (key, value)
        });
        let backends = tables.backends.iter().flat_map(|(slots, entries)| {
            (0..).zip(entries.iter()).map(|(slot, entry)| {
                let backend = Backend {
                    addr: entry.addr.ip().into(),
                    workload: entry.peer.workload.map_or(0, |id| id.0),
                    incarnation: entry.peer.incarnation,
                    port: entry.addr.port(),
                    flags: peer_flags(&entry.peer),
                    pad: 0,
                };
                (BackendKey { slots: *slots, slot, pad: 0 }, backend)
            })
        });
        let workloads = tables.workloads.iter().map(|(addr, peer)| {
            let value = WorkloadVal {
                workload: peer.workload.map_or(0, |id| id.0),
                incarnation: peer.incarnation,
                flags: peer_flags(peer),
                pad: [0; 3],
            };
            (Addr::from(*addr), value)
        });
        Self { services: services.collect(), backends: backends.collect(), workloads: workloads.collect() }
    }
}

fn peer_flags(peer: &PeerEntry) -> u16 {
    let flag = |on: bool, flag: u16| if on { flag } else { 0 };
    flag(peer.meshed, PEER_MESHED) | flag(peer.local, PEER_LOCAL) | flag(peer.plain, PEER_PLAIN)
}

impl DesiredTables {
    /// The reverse index of the slots that session affinity needs.
    fn backend_index(&self) -> HashMap<BackendIndexKey, u32> {
        // Only services with affinity ever look a slot up by address.
        let sticky: HashSet<u64> =
            self.services.values().filter(|service| service.affinity_s != 0).map(|s| s.slots).collect();
        let sticky = self.backends.iter().filter(|(key, _)| sticky.contains(&key.slots));
        sticky
            .map(|(key, backend)| {
                let at =
                    BackendIndexKey { slots: key.slots, addr: backend.addr, port: backend.port, pad: [0; 3] };
                (at, key.slot)
            })
            .collect()
    }
}

/// What one [`TableWriter::apply`] did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Entries created or replaced.
    pub written: usize,
    /// Entries deleted.
    pub deleted: usize,
    /// Entries the kernel refused, by map: the map is full. They are tried again at the next apply.
    pub full: HashMap<&'static str, usize>,
    /// Refusals for any other reason; the first of each map.
    pub errors: Vec<MapError>,
}

impl Applied {
    fn refused(&mut self, error: MapError) {
        if error.is_full() {
            *self.full.entry(error.map).or_default() += 1;
        } else if !self.errors.iter().any(|known| known.map == error.map) {
            self.errors.push(error);
        }
    }
}

/// Writes the difference between what is and what shall be.
#[derive(Debug)]
pub struct TableWriter {
    maps: Arc<Maps>,
    services: HashMap<ServiceKey, ServiceVal>,
    backends: HashMap<BackendKey, Backend>,
    index: HashMap<BackendIndexKey, u32>,
    workloads: HashMap<Addr, WorkloadVal>,
}

impl TableWriter {
    /// Reads what the maps hold, so that a restarted agent only writes what changed while it was away.
    pub fn new(maps: &Arc<Maps>) -> Result<Self, MapError> {
        Ok(Self {
            services: read(&maps.services)?,
            backends: read(&maps.backends)?,
            index: read(&maps.backend_index)?,
            workloads: read(&maps.workloads)?,
            maps: Arc::clone(maps),
        })
    }

    /// Brings the maps to `desired`. O(entries) in memory, system calls only for differences.
    pub fn apply(&mut self, desired: &DesiredTables) -> Applied {
        let mut done = Applied::default();
        let index = desired.backend_index();

        put_missing(&self.maps.backends, &mut self.backends, &desired.backends, &mut done);
        put_missing(&self.maps.backend_index, &mut self.index, &index, &mut done);
        let services = self.publishable(&desired.services);
        put_missing(&self.maps.services, &mut self.services, &services, &mut done);
        put_missing(&self.maps.workloads, &mut self.workloads, &desired.workloads, &mut done);

        delete_rest(&self.maps.services, &mut self.services, &services, &mut done);
        delete_rest(&self.maps.backends, &mut self.backends, &desired.backends, &mut done);
        delete_rest(&self.maps.backend_index, &mut self.index, &index, &mut done);
        delete_rest(&self.maps.workloads, &mut self.workloads, &desired.workloads, &mut done);

        if !done.full.is_empty() {
            // Deletions may have made room for what was refused before them.
            done.full.clear();
            put_missing(&self.maps.backends, &mut self.backends, &desired.backends, &mut done);
            put_missing(&self.maps.backend_index, &mut self.index, &index, &mut done);
            let services = self.publishable(&desired.services);
            put_missing(&self.maps.services, &mut self.services, &services, &mut done);
            put_missing(&self.maps.workloads, &mut self.workloads, &desired.workloads, &mut done);
        }
        done
    }

    /// Entries held now, by map.
    pub fn len(&self) -> [(&'static str, usize); 4] {
        [
            (self.maps.services.name(), self.services.len()),
            (self.maps.backends.name(), self.backends.len()),
            (self.maps.backend_index.name(), self.index.len()),
            (self.maps.workloads.name(), self.workloads.len()),
        ]
    }

    /// The services with their counts cut to the slots that are really there.
    fn publishable(&self, services: &HashMap<ServiceKey, ServiceVal>) -> HashMap<ServiceKey, ServiceVal> {
        let present = |slots: u64, slot: u32| self.backends.contains_key(&BackendKey { slots, slot, pad: 0 });
        let mut counts: HashMap<u64, u32> = HashMap::new();
        let mut out = HashMap::with_capacity(services.len());
        for (key, service) in services {
            let count = *counts.entry(service.slots).or_insert_with(|| {
                (0..service.count).take_while(|slot| present(service.slots, *slot)).count() as u32
            });
            let count = count.min(service.count);
            // No slots on purpose means "refuse"; no slots for want of room must not.
            if count > 0 || service.count == 0 {
                out.insert(*key, ServiceVal { count, ..*service });
            }
        }
        out
    }
}

fn read<K: Pod + Eq + Hash, V: Pod>(map: &KernelMap<K, V>) -> Result<HashMap<K, V>, MapError> {
    let mut entries = HashMap::new();
    map.each(|key, value| {
        entries.insert(*key, *value);
    })?;
    Ok(entries)
}

/// Writes entries that differ, those that exist first: replacing never needs room.
fn put_missing<K: Pod + Eq + Hash, V: Pod + Eq>(
    map: &KernelMap<K, V>,
    mirror: &mut HashMap<K, V>,
    desired: &HashMap<K, V>,
    done: &mut Applied,
) {
    let mut new = Vec::new();
    for (key, value) in desired {
        match mirror.get_mut(key) {
            Some(is) if is == value => {}
            Some(is) => match map.put(key, value) {
                Ok(()) => {
                    *is = *value;
                    done.written += 1;
                }
                Err(error) => done.refused(error),
            },
            None => new.push((key, value)),
        }
    }
    for (key, value) in new {
        match map.put(key, value) {
            Ok(()) => {
                mirror.insert(*key, *value);
                done.written += 1;
            }
            Err(error) => done.refused(error),
        }
    }
}

fn delete_rest<K: Pod + Eq + Hash, V: Pod>(
    map: &KernelMap<K, V>,
    mirror: &mut HashMap<K, V>,
    desired: &HashMap<K, V>,
    done: &mut Applied,
) {
    mirror.retain(|key, _| {
        if desired.contains_key(key) {
            return true;
        }
        match map.delete(key) {
            Ok(_) => {
                done.deleted += 1;
                false
            }
            Err(error) => {
                done.refused(error);
                true
            }
        }
    });
}
