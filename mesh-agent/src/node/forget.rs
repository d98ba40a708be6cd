//! Owns when the node forgets connections of before its pods joined.
//!
//! The node's own address translation (kube-proxy) remembers a closed connection for two minutes, and a new one from the same port
//! straight to the same server is then given another port on its way, for which there is no ticket. So what has ended is deleted when
//! a pod has joined; what was open then is remembered and deleted when it ends.
//!
//! Invariants:
//! - A pod is enrolled before its connections are looked for: no new one is translated any more.
//! - Pods that join together cost one search; searching and looking take one twentieth of a processor at most.
//! - Nothing here delays or fails an enrolment.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_redirect::{Forgotten, TranslatedConnections};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep_until},
};

use super::shared::Shared;
use crate::report::report;

/// When the node's table is searched for a pod that joined: at once, and when the first packets have surely left of connects that
/// were under way at that moment. Also of a pod that is new: its address may have been another's.
const SEARCHES: [Duration; 2] = [Duration::ZERO, Duration::from_secs(5)];
/// How often connections that were open are looked for. Between its end and the next look, one is in the way of one port.
const LOOK_EACH: Duration = Duration::from_secs(1);
/// After a search or a look comes a rest that is longer by this factor.
const REST_FACTOR: u32 = 20;

/// What was done since the start, and the sign that pods may have joined.
#[derive(Debug, Default)]
pub(super) struct Forgetting {
    applied: Notify,
    deleted: AtomicU64,
    left_out: AtomicU64,
    open: AtomicU64,
    failed: AtomicU64,
}

/// Figures of [`Forgetting`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    /// Closed connections forgotten.
    pub(super) deleted: u64,
    /// Open ones for which there was no room.
    pub(super) left_out: u64,
    /// Open ones that will be forgotten when they end.
    pub(super) open: u64,
    /// Searches and looks that failed, at least in part.
    pub(super) failed: u64,
}

impl Forgetting {
    /// To be called after each pass of the reconciler.
    pub(super) fn note_applied(&self) {
        self.applied.notify_one();
    }

    pub(super) fn figures(&self) -> Figures {
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        Figures {
            deleted: read(&self.deleted),
            left_out: read(&self.left_out),
            open: read(&self.open),
            failed: read(&self.failed),
        }
    }

    fn note(&self, forgotten: &Forgotten, open: usize) {
        self.deleted.fetch_add(forgotten.deleted, Ordering::Relaxed);
        self.left_out.fetch_add(forgotten.left_out, Ordering::Relaxed);
        self.failed.fetch_add(forgotten.failed.is_some().into(), Ordering::Relaxed);
        self.open.store(open as u64, Ordering::Relaxed);
    }
}

/// Follows the reconciler. Runs until it is dropped; cancel safe.
pub(super) async fn follow(shared: &Arc<Shared>) {
    let mut plan = Plan::default();
    let mut connections = TranslatedConnections::default();
    let mut complained = None;
    loop {
        let next = plan.next(connections.open());
        let due = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.forgetting.applied.notified() => plan.note(&shared.kernel.served(), Instant::now()),
            () = due => {
                let began = Instant::now();
                let pods = plan.take(began);
                let kernel = Arc::clone(&shared.kernel);
                let mut work = std::mem::take(&mut connections);
                let worked = spawn_blocking(move || {
                    let forgotten = match pods.is_empty() {
                        true => work.look(&kernel),
                        false => work.search(&kernel, &pods),
                    };
                    (work, forgotten)
                });
                match worked.await {
                    Ok((work, forgotten)) => {
                        connections = work;
                        shared.forgetting.note(&forgotten, connections.open());
                        say(&forgotten, &mut complained);
                    }
                    Err(error) => tracing::error!(%error, "forget connections of before pods joined"),
                }
                plan.rest(began, Instant::now());
            }
        }
    }
}

/// The same complaint is made once.
fn say(forgotten: &Forgotten, complained: &mut Option<String>) {
    let Forgotten { deleted, left_out, failed } = forgotten;
    if *deleted > 0 || *left_out > 0 {
        tracing::info!(deleted, left_out, "closed connections of before pods joined forgotten");
    }
    let failed = failed.as_ref().map(|error| report(error));
    if failed != *complained {
        if let Some(error) = &failed {
            tracing::warn!(%error, "forget connections of before pods joined; new ones may be refused for two minutes");
        }
        *complained = failed;
    }
}

/// What is to be done when.
#[derive(Debug, Default)]
struct Plan {
    /// When pods were seen first, and how many searches there were for each.
    pods: BTreeMap<u32, (Instant, usize)>,
    rest_until: Option<Instant>,
    looked: Option<Instant>,
}

impl Plan {
    fn note(&mut self, served: &BTreeSet<u32>, now: Instant) {
        self.pods.retain(|pod, _| served.contains(pod));
        for pod in served {
            self.pods.entry(*pod).or_insert((now, 0));
        }
    }

    /// When there is something to do, with so many connections to look for.
    fn next(&self, open: usize) -> Option<Instant> {
        let searches = self.pods.values().filter_map(search_at).min();
        let look = (open > 0).then(|| self.looked.map(|looked| looked + LOOK_EACH)).flatten();
        let next = [searches, look].into_iter().flatten().min()?;
        Some(self.rest_until.map_or(next, |rest| next.max(rest)))
    }

    /// The pods whose search is due; none: a look is.
    fn take(&mut self, now: Instant) -> BTreeSet<u32> {
        let due = self.pods.iter_mut().filter(|(_, pod)| search_at(pod).is_some_and(|at| at <= now));
        due.map(|(pod, (_, searches))| {
            *searches += 1;
            *pod
        })
        .collect()
    }

    fn rest(&mut self, began: Instant, ended: Instant) {
        self.looked = Some(ended);
        self.rest_until = Some(ended + (ended - began) * REST_FACTOR);
    }
}

fn search_at((since, searches): &(Instant, usize)) -> Option<Instant> {
    Some(*since + *SEARCHES.get(*searches)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_millis(30);

    fn pods(ids: &[u32]) -> BTreeSet<u32> {
        ids.iter().copied().collect()
    }

    /// Takes what is due at the next point in time.
    fn step(plan: &mut Plan, open: usize) -> Option<(Instant, BTreeSet<u32>)> {
        let at = plan.next(open)?;
        let due = plan.take(at);
        plan.rest(at, at + TOOK);
        Some((at, due))
    }

    #[test]
    fn pods_that_join_together_are_searched_for_together_twice_and_then_no_more() {
        let (mut plan, began) = (Plan::default(), Instant::now());
        assert_eq!(plan.next(0), None);
        plan.note(&pods(&[1, 2, 3]), began);
        assert_eq!(step(&mut plan, 0), Some((began, pods(&[1, 2, 3]))));
        plan.note(&pods(&[1, 3]), began + Duration::from_secs(1));
        assert_eq!(step(&mut plan, 0), Some((began + SEARCHES[1], pods(&[1, 3]))));
        assert_eq!(step(&mut plan, 0), None);
        plan.note(&pods(&[1, 3, 4]), began + Duration::from_secs(60));
        assert_eq!(step(&mut plan, 0), Some((began + Duration::from_secs(60), pods(&[4]))));
    }

    #[test]
    fn pods_that_come_one_after_another_do_not_keep_a_processor_busy() {
        let (mut plan, began) = (Plan::default(), Instant::now());
        let (mut now, mut searches) = (began, 0);
        for pod in 0..1000 {
            now = began + Duration::from_millis(10) * pod;
            plan.note(&(0..=pod).collect(), now);
            if plan.next(0).is_some_and(|at| at <= now) {
                assert!(!plan.take(now).is_empty());
                plan.rest(now, now + TOOK);
                searches += 1;
            }
        }
        let busy = TOOK * searches;
        assert!(searches > 10 && busy <= (now - began) / REST_FACTOR + TOOK, "{searches} {busy:?}");
    }

    #[test]
    fn open_connections_are_looked_for_until_there_are_none() {
        let (mut plan, began) = (Plan::default(), Instant::now());
        plan.note(&pods(&[1]), began);
        let mut looks = 0;
        while let Some((at, due)) = step(&mut plan, 7) {
            looks += u32::from(due.is_empty());
            if at > began + Duration::from_secs(60) {
                break;
            }
        }
        assert!((50..=60).contains(&looks), "{looks}");
        assert_eq!(plan.next(0), None);
    }
}
