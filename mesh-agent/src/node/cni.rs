//! Owns answering the CNI plugin: a pod's network was made, is taken away, shall be checked.
//!
//! Invariants:
//! - Only root may ask.
//! - An ADD is answered when the pod's connects are redirected and its listeners open, or when it is known not to be meshed;
//!   it waits for nobody but this agent and, shortly, for the API server if nobody has heard of the pod, and for a controller that is
//!   there ([`super::hearing`]).
//! - What a client sends is bounded in size and time; one that fails ends alone.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant as StdInstant},
};

use mesh_core::{
    local::Membership,
    snapshot::{Name, Snapshot},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    hearing::{HEARD_WITHIN, Hearing},
    local::LocalKnowledge,
    shared::Shared,
};
use crate::{
    cni::{
        install::Unenrolled,
        protocol::{Answer, Attachment, ContainerRef, LINE_MAX, Request},
    },
    report::report,
    view::{PodState, PodView},
};

/// Requests under way at once; a node starts at most some hundred pods together, the rest waits in the backlog.
const REQUESTS_MAX: usize = 256;
/// A client that does not send its request within this time is hung up on.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// An enrolment is given this long; the plugin waits a little longer.
const ENROL_WITHIN: Duration = Duration::from_secs(15);
/// A pod that nobody has heard of may become known within this time.
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
/// A pod's removal is given this long.
const REMOVE_WITHIN: Duration = Duration::from_secs(4);
/// Failures of an enrolment that are reported before the time is over: the first may be a namespace still being set up.
const ATTEMPTS: u32 = 2;
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves until it is dropped.
pub(super) async fn serve(
    listener: UnixListener,
    shared: Arc<Shared>,
    local: Arc<LocalKnowledge>,
    unenrolled: Unenrolled,
) {
    let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut requests = JoinSet::new();
    loop {
        while requests.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let door = Door { shared: Arc::clone(&shared), local: Arc::clone(&local), unenrolled };
                requests.spawn(async move {
                    let _slot = slot;
                    if let Err(error) = door.attend(stream).await {
                        tracing::debug!(%error, "a request of the CNI plugin ended early");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept the CNI plugin");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Leaves for the plugin what it needs while no agent runs, for ever.
pub(super) async fn leave_known(shared: Arc<Shared>, local: Arc<LocalKnowledge>, file: std::path::PathBuf) {
    let (mut snapshots, mut facts) = (shared.snapshots.clone(), local.facts());
    let mut written = None;
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        facts.mark_unchanged();
        let known = local.known_pods(&snapshot, &shared.node);
        if written.as_ref() != Some(&known) {
            let (to, content) = (file.clone(), known.clone());
            match spawn_blocking(move || content.write(&to)).await {
                Ok(Ok(())) => written = Some(known),
                Ok(Err(error)) => {
                    tracing::warn!(%error, file = %file.display(), "leave word for the CNI plugin")
                }
                Err(error) => tracing::error!(%error, "leave word for the CNI plugin"),
            }
        }
        // Many changes come together.
        sleep(Duration::from_millis(100)).await;
        let changed = tokio::select! {
            changed = snapshots.changed() => changed,
            changed = facts.changed() => changed,
        };
        if changed.is_err() {
            return std::future::pending().await;
        }
    }
}

/// One client's.
struct Door {
    shared: Arc<Shared>,
    local: Arc<LocalKnowledge>,
    /// What the plugin makes of a refusal.
    unenrolled: Unenrolled,
}

impl Door {
    async fn attend(&self, mut stream: UnixStream) -> io::Result<()> {
        let peer = stream.peer_cred()?;
        if peer.uid() != 0 {
            tracing::warn!(uid = peer.uid(), "somebody other than root asks at the CNI socket");
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (read, mut write) = stream.split();
        let mut line = String::new();
        timeout(REQUEST_WITHIN, BufReader::new(read.take(LINE_MAX)).read_line(&mut line)).await??;
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(request) => self.answer(request).await,
            Err(error) => {
                let reason = format!(
                    "the agent does not understand the plugin, which may be of another version: {error}"
                );
                Answer::Refused { reason, again: true }
            }
        };
        let mut text = serde_json::to_vec(&answer).map_err(io::Error::from)?;
        text.push(b'\n');
        timeout(REQUEST_WITHIN, write.write_all(&text)).await?
    }

    async fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Add(attachment) => {
                let (pod, began) = (attachment.pod.clone(), Instant::now());
                let answer = self.add(attachment).await;
                let took = began.elapsed();
                match &answer {
                    Answer::Refused { reason, .. } => match self.unenrolled {
                        Unenrolled::Fail => {
                            tracing::warn!(%pod, %reason, ?took, "a pod does not start: it cannot be enrolled");
                        }
                        Unenrolled::Allow => {
                            tracing::warn!(%pod, %reason, ?took, "a pod starts outside the mesh: it cannot be enrolled");
                        }
                    },
                    other => tracing::debug!(%pod, answer = ?other, ?took, "CNI ADD"),
                }
                answer
            }
            Request::Del(container) => {
                self.del(container).await;
                Answer::Done
            }
            Request::Check(attachment) => self.check(&attachment),
            Request::Gc { valid } => {
                let local = Arc::clone(&self.local);
                match spawn_blocking(move || local.keep_only(&valid)).await {
                    Ok(0) => {}
                    Ok(gone) => tracing::info!(gone, "the container runtime no longer has some pods"),
                    Err(error) => tracing::error!(%error, "forget pods that are gone"),
                }
                Answer::Done
            }
        }
    }

    async fn add(&self, attachment: Attachment) -> Answer {
        let began = Instant::now();
        let (name, uid) = (name_of(&attachment), attachment.pod.uid.clone());
        let netns = attachment.netns.clone();
        // Before it is told, so that no answer is missed.
        let (mut facts, mut snapshots) = (self.local.facts(), self.shared.snapshots.clone());
        let mut outcomes = self.shared.outcomes();
        let mut has_waited = false;
        let local = Arc::clone(&self.local);
        match spawn_blocking(move || local.attach(attachment)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Answer::Refused { reason: report(&error), again: true },
            Err(error) => return Answer::Refused { reason: error.to_string(), again: true },
        }
        loop {
            let facts_now = Arc::clone(&facts.borrow_and_update());
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            outcomes.mark_unchanged();
            let give_up = match facts_now.membership(&snapshot, &name, &uid) {
                Membership::Unmeshed(reason) => {
                    return Answer::Unmeshed { reason: reason.map(|why| why.to_string()) };
                }
                Membership::Unknown if began.elapsed() >= KNOWN_WITHIN => {
                    return self.unknown(&snapshot, &name);
                }
                Membership::Unknown => began + KNOWN_WITHIN,
                Membership::Meshed(_) => {
                    let row = self.row(&name);
                    match judge(row.as_ref(), &netns, began.elapsed() >= ENROL_WITHIN) {
                        Some(Answer::Enrolled) => match self.hearing(&name, has_waited, began.elapsed()) {
                            true => return Answer::Enrolled,
                            false => {
                                has_waited = true;
                                began + HEARD_WITHIN
                            }
                        },
                        Some(answer) => return answer,
                        None => began + ENROL_WITHIN,
                    }
                }
            };
            tokio::select! {
                _ = facts.changed() => {}
                _ = snapshots.changed() => {}
                _ = outcomes.changed() => {}
                () = sleep_until(give_up) => {}
            }
        }
    }

    /// Whether an enrolled pod may start, as far as the controller is concerned. Without one there is nothing to wait for.
    fn hearing(&self, name: &Name, has_waited: bool, elapsed: Duration) -> bool {
        let Some(link) = &self.shared.link else { return true };
        let is_connected = link.borrow().connected;
        let outcome = self.shared.outcome();
        let is_heard = outcome.pods.iter().any(|row| row.is_heard() && row.is_of(name));
        let Some(hearing) = Hearing::of(is_heard, is_connected, has_waited, elapsed) else { return false };
        self.shared.hearings.count(hearing);
        match hearing {
            Hearing::AtOnce => {}
            Hearing::Waited => {
                tracing::debug!(pod = %name, ?elapsed, "a pod waited for the controller to tell of it")
            }
            Hearing::NotInTime | Hearing::LinkDown => tracing::info!(
                pod = %name,
                why = ?hearing,
                "a pod starts before the controller told of it; services that only its like see may be unknown here for a while"
            ),
        }
        true
    }

    /// A pod that neither the API server nor the controller has told of. The plugin would say the same if the agent were away.
    fn unknown(&self, snapshot: &Snapshot, name: &Name) -> Answer {
        let known = self.local.known_pods(snapshot, &self.shared.node);
        match known.meshed_namespaces.contains(&*name.namespace) {
            true => {
                let reason = "neither the API server nor the controller has told the agent of it, and its namespace is meshed";
                Answer::Refused { reason: reason.to_owned(), again: true }
            }
            false => Answer::Unmeshed { reason: Some("nobody has told the agent of it".to_owned()) },
        }
    }

    /// Waits until the pod is out of the kernel: whoever gets its address next gains nothing.
    async fn del(&self, container: ContainerRef) {
        let mut outcomes = self.shared.outcomes();
        let local = Arc::clone(&self.local);
        let Ok(Some(netns)) = spawn_blocking(move || local.detach(&container)).await else { return };
        let removed = async {
            loop {
                outcomes.mark_unchanged();
                let is_in =
                    |row: &PodView| row.state == PodState::Enrolled && row.netns.as_deref() == Some(&netns);
                if !self.rows().iter().any(is_in) || outcomes.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(REMOVE_WITHIN, removed).await.is_err() {
            tracing::warn!(netns, "a pod that is gone is still being taken out of the mesh");
        }
    }

    fn check(&self, attachment: &Attachment) -> Answer {
        let (facts, snapshot) = (self.local.facts(), self.shared.snapshot());
        let name = name_of(attachment);
        let membership = facts.borrow().membership(&snapshot, &name, &attachment.pod.uid);
        match membership {
            Membership::Unmeshed(reason) => Answer::Unmeshed { reason: reason.map(|why| why.to_string()) },
            Membership::Unknown => self.unknown(&snapshot, &name),
            Membership::Meshed(_) => {
                let row = self.row(&name);
                match row {
                    Some(row) if row.state == PodState::Enrolled => Answer::Enrolled,
                    Some(row) => {
                        let reason = row.reason.unwrap_or_else(|| row.state.as_str().to_owned());
                        Answer::Refused { reason, again: true }
                    }
                    None => {
                        Answer::Refused { reason: "the agent has not seen it yet".to_owned(), again: true }
                    }
                }
            }
        }
    }

    fn rows(&self) -> Vec<PodView> {
        let now = StdInstant::now();
        self.shared.outcome().pods.iter().map(|row| row.view(now)).collect()
    }

    fn row(&self, name: &Name) -> Option<PodView> {
        self.rows().into_iter().find(|row| row.namespace == *name.namespace && row.name == *name.name)
    }
}

/// What a pod's row says to an ADD; `None`: wait.
fn judge(row: Option<&PodView>, netns: &str, late: bool) -> Option<Answer> {
    let refused = |reason: String| Some(Answer::Refused { reason, again: true });
    let here = row.filter(|row| row.netns.as_deref() == Some(netns));
    match here {
        Some(row) if row.state == PodState::Enrolled => Some(Answer::Enrolled),
        Some(row) if row.state == PodState::Failed && (late || row.attempts >= ATTEMPTS) => {
            refused(row.reason.clone().unwrap_or_else(|| "it failed".to_owned()))
        }
        _ if late => {
            let said = row.and_then(|row| row.reason.clone());
            let state = said.unwrap_or_else(|| "the agent has not come to it".to_owned());
            refused(format!("it was not enrolled within {} s: {state}", ENROL_WITHIN.as_secs()))
        }
        _ => None,
    }
}

fn name_of(attachment: &Attachment) -> Name {
    Name::new(&*attachment.pod.namespace, &*attachment.pod.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: PodState, netns: &str, attempts: u32) -> PodView {
        PodView {
            namespace: "shop".into(),
            name: "web".into(),
            workload_id: String::new(),
            addrs: Vec::new(),
            netns: Some(netns.into()),
            state,
            pod_id: None,
            netns_cookie: None,
            reason: Some("port 15001 is taken".into()),
            attempts,
            retry_in_s: None,
        }
    }

    #[test]
    fn an_add_waits_until_this_very_sandbox_is_enrolled_or_has_failed() {
        use PodState::{Enrolled, Failed, Pending};
        for (state, netns, attempts, late, answered) in [
            (Enrolled, "/a", 0, false, Some(true)),
            (Enrolled, "/old", 0, false, None),
            (Pending, "/a", 0, false, None),
            (Failed, "/a", 1, false, None),
            (Failed, "/a", 2, false, Some(false)),
            (Failed, "/a", 1, true, Some(false)),
            (Pending, "/a", 0, true, Some(false)),
            (Enrolled, "/old", 0, true, Some(false)),
        ] {
            let answer = judge(Some(&row(state, netns, attempts)), "/a", late);
            assert_eq!(
                answer.map(|answer| answer == Answer::Enrolled),
                answered,
                "{state:?} {netns} {attempts} {late}"
            );
        }
        assert_eq!(judge(None, "/a", false), None);
        assert!(matches!(judge(None, "/a", true), Some(Answer::Refused { .. })));
    }

    #[test]
    fn a_failure_says_why() {
        let Some(Answer::Refused { reason, .. }) = judge(Some(&row(PodState::Failed, "/a", 2)), "/a", false)
        else {
            panic!("not refused")
        };
        assert_eq!(reason, "port 15001 is taken");
    }
}
