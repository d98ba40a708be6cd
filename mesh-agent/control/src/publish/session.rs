//! Owns one client's view of the world: what it asked for, what it has, and what to tell it next. Pure: no I/O, no clock.
//!
//! Invariants:
//! - A response is made only when there is room for it, from the world as it is then. A slow client therefore gets the
//!   newest state late, never a queue of old ones; at most [`OUTSTANDING_MAX`] responses are unacknowledged.
//! - Memory grows with what the client *names* ([`NAMES_MAX`]) and with what it was not sent yet, never with the world: what a client
//!   of everything has is what it was told up to where it is in the log, and the log says who was told.
//! - A resource is shown to those alone that its reach includes, and its removal is told only to who had it. Who had it and keeps it
//!   hears nothing of others that gain or lose it.
//! - A commit is said only when the client has everything of that generation, in all kinds it asked for.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use super::world::{Change, Resource, World};
use crate::link::{Kind, WILDCARD, commit_text};

/// Responses sent and not yet acknowledged.
pub const OUTSTANDING_MAX: usize = 8;
/// Resources a client may ask for by name, or say that it has.
pub const NAMES_MAX: usize = 1 << 20;
/// Bytes of resources in one response; one larger resource travels alone. When all agents of a large cluster come at once, a few times
/// this is held in memory for each of them.
pub const RESPONSE_BYTES: usize = 64 << 10;
/// Names removed in one response.
const REMOVED_MAX: usize = 4096;
/// Longest detail of a refusal that is kept, in bytes.
const DETAIL_BYTES_MAX: usize = 1024;

/// What a client says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Names to send from now on; [`WILDCARD`] means all.
    pub subscribe: Vec<String>,
    /// Names not to send any more.
    pub unsubscribe: Vec<String>,
    /// What the client has, by name, from an earlier stream. Only the first request of a kind may say so.
    pub known: BTreeMap<String, String>,
    /// The response this answers; empty if none.
    pub nonce: String,
    /// Why the response was refused; `None` when it was taken.
    pub refused: Option<String>,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Kind of everything in it.
    pub kind: Kind,
    /// Names this response.
    pub nonce: String,
    /// New or changed resources.
    pub resources: Vec<Arc<Resource>>,
    /// Names that are gone.
    pub removed: Vec<String>,
    /// With this response the client has the whole generation.
    pub commit: Option<u64>,
}

impl Response {
    /// What the response says about itself.
    pub fn system_version(&self) -> String {
        self.commit.map(commit_text).unwrap_or_default()
    }
}

/// Why a session cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The world's log no longer reaches back far enough. The client comes again and says what it has.
    #[error("too far behind; subscribe again with the versions you have")]
    TooFarBehind,
    /// More than [`NAMES_MAX`] names.
    #[error("more than {NAMES_MAX} names")]
    TooManyNames,
}

impl SessionError {
    /// The reason as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TooFarBehind => "too_far_behind",
            Self::TooManyNames => "too_many_names",
        }
    }
}

/// An answer of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It took the response.
    Ack(Kind),
    /// It did not, for this reason.
    Nack(Kind, String),
}

/// What is known of a client's state of one kind; shown to operators.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct KindStatus {
    /// All resources, rather than some by name.
    pub wildcard: bool,
    /// Names asked for.
    pub names: usize,
    /// Responses sent.
    pub sent: u64,
    /// Resources in them.
    pub resources: u64,
    /// Responses taken.
    pub acked: u64,
    /// Responses refused.
    pub nacked: u64,
    /// Why the last refused response was.
    pub last_nack: Option<String>,
}

/// One client.
#[derive(Debug)]
pub struct Session {
    node: Option<Arc<str>>,
    subscriptions: [Option<Subscription>; Kind::ALL.len()],
    /// The client has everything up to here, in every kind it asked for.
    seen: u64,
    /// The client waits for a commit: it has had none, or was sent something since.
    owes_commit: bool,
    outstanding: VecDeque<(String, Kind)>,
    next_nonce: u64,
    status: [KindStatus; Kind::ALL.len()],
}

#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    /// Names the client has not had an answer to yet.
    unanswered: VecDeque<Arc<str>>,
    /// What the client had before this stream and has not been compared yet.
    known: BTreeMap<String, String>,
    scan: Scan,
    /// Resources the client has, unless it asked for all.
    shown: BTreeSet<Arc<str>>,
    /// Where in the log this subscription is.
    seen: u64,
    /// Resources that it has to be told of, and whether it has them, as they were.
    pending: BTreeMap<Arc<str>, bool>,
    removed: VecDeque<String>,
}

/// How far the first, complete state has been sent.
#[derive(Debug, Default, PartialEq, Eq)]
enum Scan {
    /// Not asked for, or done.
    #[default]
    Done,
    /// All up to this name.
    After(Option<Arc<str>>),
}

impl Scan {
    /// Whether this name will still be come to.
    fn is_before(&self, name: &str) -> bool {
        match self {
            Self::Done => false,
            Self::After(last) => last.as_deref().is_none_or(|last| last < name),
        }
    }
}

impl Session {
    /// A client that has asked for nothing yet. It is shown what everyone is, and `node`.
    pub fn new(node: Option<Arc<str>>) -> Self {
        Self {
            node,
            subscriptions: Default::default(),
            seen: 0,
            owes_commit: true,
            outstanding: VecDeque::new(),
            next_nonce: 0,
            status: Default::default(),
        }
    }

    /// Whether the client is one of our agents: it asked for all that only those know, which they do last.
    pub fn is_agent(&self) -> bool {
        // One of a version before knows fewer, and needs its commits all the same.
        let mut needed = Kind::ALL.iter().filter(|kind| kind.is_ours() && !kind.is_new());
        needed.all(|kind| self.subscriptions[kind.index()].is_some())
    }

    /// The client has everything up to here.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// State of one kind.
    pub fn status(&self, kind: Kind) -> Option<&KindStatus> {
        self.subscriptions[kind.index()].as_ref().map(|_| &self.status[kind.index()])
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`SessionError::TooManyNames`].
    pub fn request(
        &mut self,
        kind: Kind,
        request: Request,
        world: &World,
    ) -> Result<Option<Answer>, SessionError> {
        let first = self.subscriptions[kind.index()].is_none();
        let Request { subscribe, unsubscribe, known, nonce, refused } = request;
        if known.len() > NAMES_MAX {
            return Err(SessionError::TooManyNames);
        }
        let subscription = self.subscriptions[kind.index()].get_or_insert_default();
        if first {
            subscription.known = known;
            // The log is read from here on; what is there already is scanned or answered by name.
            subscription.seen = world.generation();
        }
        // A first request that names nothing asks for everything.
        let all = subscribe.iter().any(|name| name == WILDCARD) || (first && subscribe.is_empty());
        if all && !subscription.wildcard {
            subscription.wildcard = true;
            subscription.scan = Scan::After(None);
            subscription.unanswered.clear();
        }
        for name in unsubscribe {
            if name == WILDCARD {
                subscription.wildcard = false;
                subscription.scan = Scan::Done;
            } else {
                subscription.names.remove(name.as_str());
                subscription.shown.remove(name.as_str());
                subscription.unanswered.retain(|asked| **asked != *name);
            }
        }
        for name in subscribe.into_iter().filter(|name| name != WILDCARD) {
            let name: Arc<str> = name.into();
            if subscription.names.insert(Arc::clone(&name)) && !subscription.wildcard {
                subscription.unanswered.push_back(name);
            }
        }
        if subscription.names.len() > NAMES_MAX {
            return Err(SessionError::TooManyNames);
        }
        let status = &mut self.status[kind.index()];
        (status.wildcard, status.names) = (subscription.wildcard, subscription.names.len());
        Ok(self.answered(kind, &nonce, refused))
    }

    fn answered(&mut self, kind: Kind, nonce: &str, refused: Option<String>) -> Option<Answer> {
        let at = self.outstanding.iter().position(|(sent, of)| sent == nonce && *of == kind)?;
        // Responses of a kind are answered in order, so earlier ones that were not will not be.
        let mut index = 0;
        self.outstanding.retain(|(_, of)| {
            index += 1;
            *of != kind || index > at + 1
        });
        let status = &mut self.status[kind.index()];
        Some(match refused {
            None => {
                status.acked += 1;
                Answer::Ack(kind)
            }
            Some(mut detail) => {
                truncate(&mut detail, DETAIL_BYTES_MAX);
                status.nacked += 1;
                status.last_nack = Some(detail.clone());
                Answer::Nack(kind, detail)
            }
        })
    }

    /// The next response, if there is something to say and the client keeps up.
    ///
    /// # Errors
    /// [`SessionError::TooFarBehind`].
    pub fn next(&mut self, world: &World) -> Result<Option<Response>, SessionError> {
        if world.generation() == 0 || self.outstanding.len() >= OUTSTANDING_MAX {
            return Ok(None);
        }
        for kind in Kind::ALL {
            let Some(subscription) = &mut self.subscriptions[kind.index()] else { continue };
            subscription.read_log(kind, world, self.node.as_deref())?;
        }
        for kind in Kind::ALL {
            let Some(subscription) = &mut self.subscriptions[kind.index()] else { continue };
            let (resources, removed) = subscription.collect(kind, world, self.node.as_deref());
            if !resources.is_empty() || !removed.is_empty() {
                return Ok(Some(self.respond(kind, resources, removed, world)));
            }
        }
        self.seen = world.generation();
        // An agent waits for the word that it has everything, even if that is what it had before it came.
        Ok((self.is_agent() && self.owes_commit)
            .then(|| self.respond(Kind::LAST, Vec::new(), Vec::new(), world)))
    }

    fn respond(
        &mut self,
        kind: Kind,
        resources: Vec<Arc<Resource>>,
        removed: Vec<String>,
        world: &World,
    ) -> Response {
        let caught_up = self.subscriptions.iter().flatten().all(Subscription::is_idle);
        let commit = (caught_up && self.is_agent()).then(|| world.generation());
        self.owes_commit = commit.is_none();
        if caught_up {
            self.seen = world.generation();
        }
        self.next_nonce += 1;
        let nonce = self.next_nonce.to_string();
        self.outstanding.push_back((nonce.clone(), kind));
        let status = &mut self.status[kind.index()];
        status.sent += 1;
        status.resources += resources.len() as u64;
        Response { kind, nonce, resources, removed, commit }
    }
}

impl Subscription {
    fn is_idle(&self) -> bool {
        self.scan == Scan::Done
            && self.unanswered.is_empty()
            && self.pending.is_empty()
            && self.removed.is_empty()
            && self.known.is_empty()
    }

    /// Notes which changes concern this client.
    fn read_log(&mut self, kind: Kind, world: &World, node: Option<&str>) -> Result<(), SessionError> {
        if self.seen < world.floor() {
            return Err(SessionError::TooFarBehind);
        }
        // What the client has is as before the first change of several; what it gets is as after the last.
        let mut touched: BTreeMap<&Arc<str>, (bool, bool)> = BTreeMap::new();
        for change in world.changes_after(self.seen).filter(|change| change.kind == kind) {
            let (_, contents) =
                touched.entry(&change.name).or_insert_with(|| (self.has(change, node), false));
            *contents |= change.contents;
        }
        for (name, (has, contents)) in touched {
            let resource = world.get(kind, name).filter(|resource| resource.reach.includes(node));
            let wanted = resource.is_some_and(|resource| self.wildcard || self.asked_for(resource));
            let differs = if wanted { contents || !has } else { has };
            // What is pending already is so for what the client has.
            if differs && !self.pending.contains_key(name) {
                self.pending.insert(Arc::clone(name), has);
            }
        }
        self.seen = world.generation();
        Ok(())
    }

    /// Whether the client has what was there before a change.
    fn has(&self, change: &Change, node: Option<&str>) -> bool {
        // What the scan has not come to was asked for by name, if at all.
        match self.wildcard && !self.scan.is_before(&change.name) {
            true => change.before.as_ref().is_some_and(|before| before.includes(node)),
            false => self.shown.contains(&change.name),
        }
    }

    fn asked_for(&self, resource: &Resource) -> bool {
        !self.names.is_empty()
            && (self.names.contains(&resource.name)
                || resource.aliases.iter().any(|alias| self.names.contains(alias)))
    }

    /// Takes what fits into one response.
    fn collect(
        &mut self,
        kind: Kind,
        world: &World,
        node: Option<&str>,
    ) -> (Vec<Arc<Resource>>, Vec<String>) {
        let mut batch = Batch::default();
        // What was removed and is there again must not be removed by a later response.
        if !self.removed.is_empty() {
            return (Vec::new(), self.take_removed());
        }
        self.scan(kind, world, node, &mut batch);
        while !batch.is_full()
            && let Some(name) = self.unanswered.pop_front()
        {
            match world.find(kind, &name).filter(|resource| resource.reach.includes(node)) {
                Some(resource) => {
                    let has = self.known.remove(&*resource.name);
                    self.shown.insert(Arc::clone(&resource.name));
                    if !is_same(has, resource) {
                        batch.push(resource);
                    }
                }
                // The client asked, so it is told that there is none.
                None => self.removed.push_back(name.to_string()),
            }
        }
        while !batch.is_full()
            && let Some((name, has)) = self.pending.pop_first()
        {
            // What it says it has is compared here, where the scan missed it.
            let has = self.known.remove(&*name).is_some() || has;
            match world.get(kind, &name).filter(|resource| resource.reach.includes(node)) {
                Some(resource) => {
                    if !self.wildcard {
                        self.shown.insert(Arc::clone(&name));
                    }
                    batch.push(resource);
                }
                None if has => {
                    self.shown.remove(&name);
                    self.removed.push_back(name.to_string());
                }
                // It came and went before the client heard of it.
                None => {}
            }
        }
        // What the client still claims to have, once everything was compared, does not exist for it.
        if self.scan == Scan::Done && self.unanswered.is_empty() && !self.known.is_empty() {
            let mut gone: Vec<String> = std::mem::take(&mut self.known).into_keys().collect();
            gone.sort();
            self.removed.extend(gone);
        }
        (batch.resources, self.take_removed())
    }

    fn take_removed(&mut self) -> Vec<String> {
        let count = self.removed.len().min(REMOVED_MAX);
        self.removed.drain(..count).collect()
    }

    fn scan(&mut self, kind: Kind, world: &World, node: Option<&str>, batch: &mut Batch) {
        let Scan::After(after) = std::mem::take(&mut self.scan) else { return };
        let mut last = None;
        for resource in world.after(kind, after.as_deref()) {
            if batch.is_full() {
                if let Some(last) = last {
                    self.scan = Scan::After(Some(last));
                }
                return;
            }
            last = Some(Arc::clone(&resource.name));
            if !resource.reach.includes(node) {
                continue;
            }
            let has = self.known.remove(&*resource.name);
            // It is sent as it is now, so a change that the log also has need not be sent again.
            self.pending.remove(&resource.name);
            if !is_same(has, resource) {
                batch.push(resource);
            }
        }
    }
}

/// Whether a version that a client says it has is the one that there is.
fn is_same(has: Option<String>, resource: &Resource) -> bool {
    has.is_some_and(|version| version == resource.version_text())
}

/// Resources of one response.
#[derive(Debug, Default)]
struct Batch {
    resources: Vec<Arc<Resource>>,
    bytes: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes >= RESPONSE_BYTES
    }

    fn push(&mut self, resource: &Arc<Resource>) {
        self.bytes += resource.encoded.len();
        self.resources.push(Arc::clone(resource));
    }
}

/// Cuts a text at a character's boundary.
fn truncate(text: &mut String, max: usize) {
    if text.len() > max {
        let end = (0..=max).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests;
