//! The task that fetches and renews certificates.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use mesh_core::identity::Identity;
use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinSet},
};

use super::{Certificates, State};
use crate::{
    bundle::TrustMaterial,
    csr,
    issuer::IssueError,
    key::{KeyAlgorithm, PrivateKey},
    peer::Principal,
    schedule::Priority,
    svid::Svid,
};

/// Longest sleep, so that a step of the wall clock is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(30);

type Attempt = (Identity, Result<Svid, IssueError>);

/// Fetches and renews, one instance per [`Certificates`].
#[derive(Debug)]
#[must_use = "certificates are fetched only while this runs"]
pub struct Renewer {
    certificates: Arc<Certificates>,
    trust: watch::Receiver<Arc<TrustMaterial>>,
    /// Requests under way. Dropping it ends them.
    attempts: JoinSet<Attempt>,
    /// Whose they are, for one that panics.
    running: HashMap<Id, Identity>,
}

impl Renewer {
    pub(super) fn new(certificates: Arc<Certificates>) -> Self {
        let mut trust = certificates.issuer.trust();
        trust.mark_changed();
        Self { certificates, trust, attempts: JoinSet::new(), running: HashMap::new() }
    }

    /// Works until dropped.
    pub async fn run(mut self) {
        let mut trust_ended = false;
        loop {
            self.start_attempts();
            let pause = self.pause();
            let wake = Arc::clone(&self.certificates);
            tokio::select! {
                () = wake.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                Some(done) = self.attempts.join_next_with_id() => self.finish(done),
                changed = self.trust.changed(), if !trust_ended => {
                    trust_ended = changed.is_err();
                    self.trust_changed();
                }
            }
        }
    }

    fn start_attempts(&mut self) {
        let now = self.certificates.now();
        while self.attempts.len() < self.certificates.options.concurrency.max(1) {
            let next = {
                let mut schedule = self.certificates.schedule.lock().unwrap_or_else(PoisonError::into_inner);
                schedule.pop(now)
            };
            let Some(identity) = next else { return };
            let handle = self.attempts.spawn(attempt(Arc::clone(&self.certificates), identity.clone()));
            self.running.insert(handle.id(), identity);
        }
    }

    fn pause(&self) -> Duration {
        if self.attempts.len() >= self.certificates.options.concurrency.max(1) {
            return SLEEP_MAX;
        }
        let now = self.certificates.now();
        let schedule = self.certificates.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        let due = schedule.next_due(now);
        due.map_or(SLEEP_MAX, |due| due.duration_since(now).unwrap_or(Duration::ZERO).min(SLEEP_MAX))
    }

    fn finish(&mut self, done: Result<(Id, Attempt), JoinError>) {
        match done {
            Ok((id, (identity, result))) => {
                self.running.remove(&id);
                self.certificates.settle(&identity, result);
            }
            Err(error) => {
                if let Some(identity) = self.running.remove(&error.id()) {
                    self.certificates.settle(&identity, Err(IssueError::Unavailable(error.to_string())));
                }
            }
        }
    }

    /// Certificates that the new roots or revocations do away with are replaced ahead of time.
    fn trust_changed(&mut self) {
        self.trust.mark_unchanged();
        let certificates = &self.certificates;
        certificates.follow_trust();
        let bundle = certificates.context.trust.current();
        let now = certificates.now();
        if let Some(age) = bundle.crls_stale_for(now) {
            tracing::warn!(
                stale_s = age.as_secs(),
                "a revocation list is past its next update; it is still used"
            );
        }
        let entries = certificates.entries.read().unwrap_or_else(PoisonError::into_inner);
        let mut schedule = certificates.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        for (identity, entry) in entries.iter() {
            if let Some(slot) = &entry.borrow().slot
                && let Err(refusal) = slot.svid.check(&bundle, now)
            {
                tracing::info!(%identity, %refusal, "replacing a certificate that is no longer trusted");
                schedule.hurry(identity, Priority::Expiring, now);
            }
        }
    }
}

/// One request: a fresh key, a CSR, the issuer's answer, checked.
async fn attempt(certificates: Arc<Certificates>, identity: Identity) -> Attempt {
    let limit = certificates.options.attempt_timeout;
    let result = match tokio::time::timeout(limit, fetch(&certificates, &identity)).await {
        Ok(result) => result,
        Err(_) => Err(IssueError::Unavailable(format!("no answer within {} s", limit.as_secs()))),
    };
    (identity, result)
}

async fn fetch(certificates: &Certificates, identity: &Identity) -> Result<Svid, IssueError> {
    let internal = |error: &dyn std::fmt::Display| IssueError::Unavailable(error.to_string());
    let algorithm = certificates.options.algorithm;
    let key = match algorithm {
        // A tenth of a second and more is too long for the control thread.
        KeyAlgorithm::Rsa2048 => tokio::task::spawn_blocking(move || PrivateKey::generate(algorithm))
            .await
            .map_err(|error| internal(&error))?,
        _ => PrivateKey::generate(algorithm),
    }
    .map_err(|error| internal(&error))?;
    let principal = Principal::Workload(identity.clone());
    let csr = csr::make(&key, &principal).map_err(|error| internal(&error))?;
    let issued = certificates.issuer.issue(csr, identity.clone(), certificates.options.ttl).await?;
    let unusable = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        IssueError::Unusable(format!("{error}{cause}"))
    };
    Svid::new(principal, &key, &issued, certificates.now()).map_err(|error| unusable(&error))
}

impl Certificates {
    /// Takes an attempt's result over, unless the identity is not wanted any more.
    fn settle(&self, identity: &Identity, result: Result<Svid, IssueError>) {
        let now = self.now();
        let Some(entry) = self.entry(identity) else { return };
        let outcome = result.and_then(|svid| {
            let renew_at = svid.renew_at(now, 2.0 * random() - 1.0);
            self.make_slot(svid, renew_at).map_err(|error| IssueError::Unusable(error.to_string()))
        });
        let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(slot) => {
                schedule.succeeded(identity, now, slot.renew_at);
                drop(schedule);
                tracing::info!(%identity, serial = slot.svid.serial(), "certificate obtained");
                let next = State { slot: Some(Arc::new(slot)), error: None, retry_at: None };
                let previous = entry.send_replace(next);
                let count =
                    if previous.slot.is_some() { &self.counts.renewed } else { &self.counts.obtained };
                count.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let retry_at = schedule.failed(identity, now, random());
                let failures = schedule.failures(identity);
                drop(schedule);
                let count = match error {
                    IssueError::Refused(_) => &self.counts.refused,
                    IssueError::Unavailable(_) | IssueError::Unusable(_) => &self.counts.failed,
                };
                count.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%identity, %error, failures, "no certificate");
                entry.send_modify(|state| {
                    state.error = Some(error);
                    state.retry_at = retry_at;
                });
            }
        }
    }
}

/// Uniform in `0.0..1.0`; the middle, if there is no randomness.
fn random() -> f64 {
    let mut bytes = [0; 4];
    match SystemRandom::new().fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_ne_bytes(bytes)) / (f64::from(u32::MAX) + 1.0),
        Err(_) => 0.5,
    }
}
