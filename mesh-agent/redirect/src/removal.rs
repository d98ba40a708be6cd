//! Owns taking pods out of the mesh.
//!
//! Invariants:
//! - `PODS` goes first: connects stop being redirected before anything they need is gone.
//! - Afterwards no map holds anything that names the pod's namespace or addresses, so whoever gets the address next
//!   gains nothing.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use mesh_common::{
    Addr,
    pod::{LISTENER_INBOUND, POD_NODE, listener_key},
    ports,
};

use crate::{
    folders, links,
    map::MapError,
    maps::Maps,
    node::{Node, lock},
};

/// A pod to be taken out, as far as it is known.
#[derive(Debug)]
pub(crate) struct Doomed {
    pub(crate) pod: u32,
    pub(crate) cookie: Option<u64>,
    pub(crate) addrs: Vec<IpAddr>,
}

impl Node {
    /// Takes pods out of the mesh and forgets everything about them before it returns. Unknown ids are ignored.
    ///
    /// Established connections live on. The caller tells the proxy to close the listeners.
    pub fn remove(&self, pods: &[u32]) {
        let mut known: HashMap<u32, (u64, Vec<IpAddr>)> = HashMap::new();
        let listed = self.maps.pods.each(|cookie, entry| {
            if entry.flags & POD_NODE == 0 && pods.contains(&entry.pod) {
                let addrs = [entry.addr4, entry.addr6].into_iter().filter(|addr| !addr.is_unspecified());
                known.insert(entry.pod, (*cookie, addrs.map(IpAddr::from).collect()));
            }
        });
        if let Err(error) = listed {
            tracing::warn!(%error, "cannot list the pods in the kernel");
        }
        let doomed: Vec<Doomed> = pods
            .iter()
            .map(|pod| {
                let served = lock(&self.pods).remove(pod);
                let mut addrs = served.as_ref().map(|s| s.config.addrs.clone()).unwrap_or_default();
                let mut cookie = served.as_ref().map(|s| s.sockets.netns().cookie());
                if let Some((found, also)) = known.remove(pod) {
                    cookie = Some(found);
                    addrs.extend(also);
                }
                Doomed { pod: *pod, cookie, addrs }
            })
            .collect();
        self.take_out(&doomed);
    }

    /// Each part is tried whatever became of the others: a leftover is swept later, a skipped part is not.
    pub(crate) fn take_out(&self, doomed: &[Doomed]) {
        let maps = &self.maps;
        let mut failures: Vec<MapError> = Vec::new();
        let mut note = |result: Result<bool, MapError>| {
            if let Err(error) = result {
                failures.push(error);
            }
        };
        let mut cookies: HashSet<u64> = HashSet::new();
        for Doomed { pod, cookie, .. } in doomed {
            let Some(cookie) = cookie else { continue };
            match maps.pods.get(cookie) {
                // Another pod id owns the namespace by now, and what is keyed by it.
                Ok(Some(entry)) if entry.pod != *pod => continue,
                Ok(Some(_)) => note(maps.pods.delete(cookie)),
                Ok(None) => {}
                Err(error) => note(Err(error)),
            }
            cookies.insert(*cookie);
        }
        let ids: HashSet<u32> = doomed.iter().map(|doomed| doomed.pod).collect();
        let mut workloads: HashSet<u64> = HashSet::new();
        for pod in &ids {
            links::remove(&self.folders.arrival(*pod));
            if let Ok(Some(inbound)) = maps.inbound.get(pod) {
                workloads.insert(inbound.workload);
            }
            note(maps.inbound.delete(pod));
            for kind in (0..ports::OUTBOUND.len() as u32).chain([LISTENER_INBOUND]) {
                note(maps.listeners.delete(&listener_key(*pod, kind)));
            }
        }
        // A workload that is enrolled under another id keeps what is keyed by it.
        let kept = maps.inbound.each(|_, other| {
            workloads.remove(&other.workload);
        });
        note(kept.map(|()| true));
        for workload in &workloads {
            note(maps.policy_gen.delete(workload));
        }
        let addrs: HashSet<Addr> =
            doomed.iter().flat_map(|doomed| &doomed.addrs).map(|addr| Addr::from(*addr)).collect();
        note(maps.probes.delete_where(|key, _| addrs.contains(&key.addr)).map(|_| true));
        note(maps.port_cfgs.delete_where(|key, _| ids.contains(&key.pod)).map(|_| true));
        note(maps.excluded.delete_where(|key, _| ids.contains(&u32::from_be(key.data.pod_be))).map(|_| true));
        for cookie in &cookies {
            note(maps.tickets_used.delete(cookie));
        }
        for error in failures {
            tracing::warn!(error = %crate::report(&error), "leftover of a removed pod");
        }
        purge(maps, &cookies, &addrs);
    }

    /// Takes out what an agent that died while enrolling left: a guard without a pod. Only while nothing is being
    /// enrolled.
    pub(crate) fn remove_halves(&self) {
        let mut whole: HashSet<u32> = HashSet::new();
        let pins = folders::entries(&self.folders.links());
        let mut found: HashMap<u32, Option<u64>> =
            pins.iter().filter_map(|pin| Some((folders::arrival_pod(pin)?, None))).collect();
        let listed = self
            .maps
            .pods
            .each(|_, pod| {
                whole.insert(pod.pod);
            })
            .and_then(|()| {
                self.maps.inbound.each(|pod, inbound| {
                    found.insert(*pod, Some(inbound.incarnation));
                })
            });
        if let Err(error) = listed {
            tracing::warn!(%error, "cannot look for half-enrolled pods");
            return;
        }
        let halves: Vec<Doomed> = found
            .into_iter()
            .filter(|(pod, _)| !whole.contains(pod))
            .map(|(pod, cookie)| Doomed { pod, cookie, addrs: Vec::new() })
            .collect();
        if !halves.is_empty() {
            tracing::info!(pods = halves.len(), "taking out half-enrolled pods");
            self.take_out(&halves);
        }
    }
}

/// Deletes what the programs and the agent cached about namespaces and addresses.
pub(crate) fn purge(maps: &Maps, cookies: &HashSet<u64>, addrs: &HashSet<Addr>) {
    let results = [
        maps.verdicts
            .delete_where(|key, _| cookies.contains(&key.netns_cookie) || cookies.contains(&key.incarnation)),
        maps.tickets.delete_where(|key, ticket| {
            cookies.contains(&ticket.netns_cookie)
                || cookies.contains(&ticket.incarnation)
                || addrs.contains(&key.src)
                || addrs.contains(&key.dst)
        }),
        maps.affinity.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.orig_dst.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.dns_orig.delete_where(|key, _| cookies.contains(&key.netns_cookie)),
        maps.client_addr.delete_where(|key, _| addrs.contains(&key.src) || addrs.contains(&key.dst)),
    ];
    for error in results.into_iter().filter_map(Result::err) {
        tracing::warn!(error = %crate::report(&error), "cache entries of a removed pod stay");
    }
}
