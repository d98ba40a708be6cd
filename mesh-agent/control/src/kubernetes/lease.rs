//! Owns who of several controllers writes to the cluster: the holder of a Lease.
//!
//! Invariants:
//! - A holder stops before another one may begin: it gives up when it could not renew for [`GIVE_UP`], which is less than
//!   [`DURATION`], and others wait that long after they last *saw* a renewal. No two clocks are compared.
//! - The Lease is changed only from the state that was read: of two who try at once one is refused.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::names::{LEASE, is_absent, is_conflict, metadata};

/// Others wait so long after the last renewal that they saw.
pub const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops.
pub const GIVE_UP: Duration = Duration::from_secs(10);
/// How often a holder renews, and others look.
pub const EACH: Duration = Duration::from_secs(2);
/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(4);

/// Stands for election until dropped.
#[derive(Debug)]
pub struct Election {
    leases: Api<Lease>,
    namespace: String,
    identity: String,
    leading: watch::Sender<bool>,
    seen: Option<Seen>,
}

/// The Lease as it was seen last, and since when it has looked so.
#[derive(Clone, Debug)]
struct Seen {
    lease: Lease,
    since: Instant,
}

impl Election {
    /// A candidate; `identity` must be another one's in no other process.
    pub fn new(client: Client, namespace: &str, identity: impl Into<String>) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            identity: identity.into(),
            leading: watch::Sender::new(false),
            seen: None,
        }
    }

    /// Whether this candidate leads.
    pub fn leading(&self) -> watch::Receiver<bool> {
        self.leading.subscribe()
    }

    /// Stands for election until `stop`; then lets another one lead at once.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.stand() => {}
            () = stop => {}
        }
        if self.leading.send_replace(false) {
            self.resign().await;
        }
    }

    async fn stand(&mut self) {
        let mut renewed = Instant::now();
        loop {
            let tried = Instant::now();
            match timeout(REQUEST_WITHIN, self.attempt()).await {
                Ok(Ok(true)) => {
                    // What others count from is at least as late as this.
                    renewed = tried;
                    if !self.leading.send_replace(true) {
                        tracing::info!(identity = self.identity, "leading: this controller writes");
                    }
                }
                Ok(Ok(false)) => self.lose("another controller leads"),
                Ok(Err(error)) => tracing::warn!(%error, "renew or look at the lease"),
                Err(_late) => tracing::warn!("the API server takes too long to renew the lease"),
            }
            let next = tried + EACH;
            if *self.leading.borrow() {
                let end = renewed + GIVE_UP;
                tokio::time::sleep_until(next.min(end)).await;
                if Instant::now() >= end {
                    self.lose("the lease could not be renewed");
                }
            } else {
                tokio::time::sleep_until(next).await;
            }
        }
    }

    fn lose(&self, why: &str) {
        if self.leading.send_replace(false) {
            tracing::warn!(identity = self.identity, why, "no longer leading");
        }
    }

    /// Takes or renews the Lease if that is right. Returns whether it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let now = Instant::now();
        let found = match self.leases.get(LEASE).await {
            Ok(found) => found,
            Err(error) if is_absent(&error) => {
                let lease =
                    Lease { metadata: metadata(LEASE, Some(&self.namespace)), spec: Some(self.spec(None)) };
                return self.written(self.leases.create(&PostParams::default(), &lease).await);
            }
            Err(error) => return Err(error),
        };
        let is_as_seen = self.seen.as_ref().is_some_and(|seen| seen.lease.spec == found.spec);
        if !is_as_seen {
            self.seen = Some(Seen { lease: found.clone(), since: now });
        }
        let unchanged_for = self.seen.as_ref().map_or(Duration::ZERO, |seen| now - seen.since);
        if !may_take(found.spec.as_ref(), &self.identity, unchanged_for) {
            return Ok(false);
        }
        let lease = Lease { spec: Some(self.spec(found.spec.as_ref())), ..found };
        self.written(self.leases.replace(LEASE, &PostParams::default(), &lease).await)
    }

    fn written(&mut self, written: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
        match written {
            Ok(lease) => {
                self.seen = Some(Seen { lease, since: Instant::now() });
                Ok(true)
            }
            // Somebody was first; the next look says who.
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The Lease as ours, after `before`.
    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let holder = before.and_then(|spec| spec.holder_identity.as_deref());
        let is_ours = holder == Some(&self.identity);
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: before
                .filter(|_| is_ours)
                .and_then(|spec| spec.acquire_time.clone())
                .or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions.saturating_add(i32::from(before.is_some() && !is_ours))),
            ..LeaseSpec::default()
        }
    }

    /// Says that nobody holds the Lease.
    async fn resign(&self) {
        let Some(Seen { lease, .. }) = &self.seen else { return };
        let mut lease = lease.clone();
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
        }
        match timeout(REQUEST_WITHIN, self.leases.replace(LEASE, &PostParams::default(), &lease)).await {
            Ok(Ok(_)) => tracing::info!("another controller may lead now"),
            Ok(Err(error)) => tracing::warn!(%error, "give the lease back"),
            Err(_late) => tracing::warn!("the API server takes too long to take the lease back"),
        }
    }
}

/// Whether a candidate may hold the Lease, which has looked as it does for so long.
fn may_take(spec: Option<&LeaseSpec>, identity: &str, unchanged_for: Duration) -> bool {
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    if holder.is_empty() || holder == identity {
        return true;
    }
    let said = spec.and_then(|spec| spec.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
    // Whoever wrote it may be of another version.
    unchanged_for >= said.map_or(DURATION, Duration::from_secs).clamp(Duration::from_secs(1), 4 * DURATION)
}

/// Runs `work` whenever `leading`, and drops it when not any more.
pub async fn while_leading<W: Future<Output = ()>>(
    mut leading: watch::Receiver<bool>,
    mut work: impl FnMut() -> W,
) {
    loop {
        if leading.wait_for(|leading| *leading).await.is_err() {
            return;
        }
        let lost = async {
            // Either way it is over.
            leading.wait_for(|leading| !*leading).await.ok();
        };
        tokio::select! {
            () = work() => {
                tracing::error!("the work of the leader ended; beginning again");
                sleep(EACH).await;
            }
            () = lost => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_taken_when_it_is_free_ours_or_not_renewed_for_its_duration() {
        let just = Duration::ZERO;
        assert!(may_take(None, "a", just));
        assert!(may_take(Some(&held_by("")), "a", just));
        assert!(may_take(Some(&held_by("a")), "a", just));
        assert!(!may_take(Some(&held_by("b")), "a", Duration::from_secs(14)));
        assert!(may_take(Some(&held_by("b")), "a", Duration::from_secs(15)));
        let forever = LeaseSpec { lease_duration_seconds: Some(i32::MAX), ..held_by("b") };
        assert!(
            may_take(Some(&forever), "a", 4 * DURATION),
            "a nonsensical duration is no way to lead for ever"
        );
        let never = LeaseSpec { lease_duration_seconds: Some(-1), ..held_by("b") };
        assert!(!may_take(Some(&never), "a", Duration::from_secs(14)));
    }

    #[test]
    fn a_holder_stops_before_others_may_begin() {
        assert!(GIVE_UP + REQUEST_WITHIN < DURATION && EACH < GIVE_UP);
    }

    #[tokio::test(start_paused = true)]
    async fn work_is_done_while_leading_and_not_after() {
        let leading = watch::Sender::new(false);
        let running = watch::Sender::new(0);
        let work = {
            let running = running.clone();
            move || {
                let running = running.clone();
                async move {
                    running.send_modify(|n| *n += 1);
                    let _end = scopeguard(running);
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::spawn(while_leading(leading.subscribe(), work));
        let mut seen = running.subscribe();
        for _ in 0..3 {
            leading.send_replace(true);
            seen.wait_for(|n| *n == 1).await.unwrap();
            leading.send_replace(false);
            seen.wait_for(|n| *n == 0).await.unwrap();
        }
    }

    struct Guard(watch::Sender<i32>);
    fn scopeguard(running: watch::Sender<i32>) -> Guard {
        Guard(running)
    }
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.send_modify(|n| *n -= 1);
        }
    }
}
