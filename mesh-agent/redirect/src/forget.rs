//! Owns forgetting connections of before a pod joined that have ended and that the node still translates.
//!
//! Such an entry has the pod's port and a server's own address in the answers it expects. A new connection from that port that goes
//! straight to the server would have the same answers, so the kernel gives it another port on its way, and the server's node does not
//! find the ticket that was written for the real one.
//!
//! Invariants:
//! - A connection that may still carry anything is never touched: the node has seen its end, and the pod has no socket of it.
//! - What is open is remembered, up to a bound, and looked for by name: the whole table is searched only when pods join.
//!
//! Not here: when to search and look (the agent), the table itself (`conntrack.rs`).

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    sync::Arc,
};

use mesh_core::snapshot::Name;

use crate::{
    conntrack::{Conntrack, Entry, Key, Tuple},
    diag::{Diag, OPEN_STATES, Wanted},
    netns::Netns,
    node::{Node, lock},
};

/// Open connections that are remembered until they end, of all pods. More than that are left out, and counted: the entry of such a one
/// stays for the two minutes that the kernel keeps it.
const WATCHED_MAX: usize = 8192;

/// Why something could not be forgotten.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    /// The node's table.
    #[error("read the node's table of tracked connections")]
    Table(#[source] io::Error),
    /// An entry of it.
    #[error("delete from the node's table of tracked connections")]
    Delete(#[source] io::Error),
    /// Whether a pod is done with a connection.
    #[error("list the connections of pod {pod}")]
    Sockets {
        /// Which.
        pod: Name,
        /// Cause.
        source: io::Error,
    },
}

/// What a search or a look came to.
#[derive(Debug, Default)]
pub struct Forgotten {
    /// Entries deleted.
    pub deleted: u64,
    /// Open connections that found no room among those to be remembered.
    pub left_out: u64,
    /// The first thing that failed. The rest was done as far as it could be.
    pub failed: Option<ForgetError>,
}

/// The open connections of before their pods joined.
#[derive(Debug, Default)]
pub struct TranslatedConnections {
    open: Vec<Open>,
}

/// An open connection of a pod.
#[derive(Debug)]
struct Open {
    pod: u32,
    original: Tuple,
    key: Key,
}

/// A pod whose connections may be forgotten.
#[derive(Debug)]
struct Client {
    pod: u32,
    name: Name,
    netns: Arc<Netns>,
    /// Local and remote ends of what the pod has open, listed when first wanted. `None` inside: they cannot be had.
    sockets: Option<Option<HashSet<(SocketAddr, SocketAddr)>>>,
}

impl Node {
    /// Local ids of the pods that this agent serves.
    pub fn served(&self) -> BTreeSet<u32> {
        lock(&self.pods).keys().copied().collect()
    }

    fn clients(&self, wanted: impl Fn(u32) -> bool) -> HashMap<IpAddr, Client> {
        let pods = lock(&self.pods);
        let pods = pods.iter().filter(|(pod, _)| wanted(**pod));
        pods.flat_map(|(pod, served)| {
            served.config.addrs.iter().map(|addr| {
                let netns = Arc::clone(served.sockets.netns());
                let client = Client { pod: *pod, name: served.config.name.clone(), netns, sockets: None };
                (*addr, client)
            })
        })
        .collect()
    }
}

impl TranslatedConnections {
    /// How many are remembered.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Searches the node's whole table for connections of `pods`, which must be enrolled already: else a new one could come by the
    /// same way meanwhile. Deletes those that have ended and remembers the others.
    ///
    /// Blocking: the kernel walks its table twice and sends every translated entry of the node.
    pub fn search(&mut self, node: &Node, pods: &BTreeSet<u32>) -> Forgotten {
        self.open.retain(|open| !pods.contains(&open.pod));
        let mut clients = node.clients(|pod| pods.contains(&pod));
        let mut forgotten = Forgotten::default();
        let tables = Conntrack::here().and_then(|table| Ok(table.zip(Conntrack::here()?)));
        let (mut table, mut hand) = match tables {
            Ok(Some(tables)) => tables,
            Ok(None) => return forgotten,
            Err(error) => {
                forgotten.note(ForgetError::Table(error));
                return forgotten;
            }
        };
        let searched = table.each_translated(|entry| {
            let Some(client) = concerned(&mut clients, &entry) else { return Ok(()) };
            if entry.is_closed && client.is_done_with(node, entry.original, &mut forgotten) {
                forgotten.delete(&mut hand, &entry.key());
            } else if self.open.len() < WATCHED_MAX {
                self.open.push(Open { pod: client.pod, original: entry.original, key: entry.key() });
            } else {
                forgotten.left_out += 1;
            }
            Ok(())
        });
        if let Err(error) = searched {
            forgotten.note(ForgetError::Table(error));
        }
        forgotten
    }

    /// Looks whether those that were open have ended, and deletes such entries.
    ///
    /// Blocking: one question to the kernel for each.
    pub fn look(&mut self, node: &Node) -> Forgotten {
        let pods: HashSet<u32> = self.open.iter().map(|open| open.pod).collect();
        let mut clients = node.clients(|pod| pods.contains(&pod));
        let mut forgotten = Forgotten::default();
        let mut table = match Conntrack::here() {
            Ok(Some(table)) => table,
            Ok(None) => {
                self.open.clear();
                return forgotten;
            }
            Err(error) => {
                forgotten.note(ForgetError::Table(error));
                return forgotten;
            }
        };
        self.open.retain(|open| {
            let Some(client) = clients.get_mut(&open.original.src.ip()) else { return false };
            match table.is_closed(&open.key) {
                Ok(None) => false,
                Ok(Some(false)) => true,
                Ok(Some(true)) => {
                    let done = client.is_done_with(node, open.original, &mut forgotten);
                    if done {
                        forgotten.delete(&mut table, &open.key);
                    }
                    !done
                }
                Err(error) => {
                    forgotten.note(ForgetError::Table(error));
                    true
                }
            }
        });
        forgotten
    }
}

/// The pod that made a connection, if one of `clients` did and its answers come to its own address: others cannot be in the way.
fn concerned<'a>(clients: &'a mut HashMap<IpAddr, Client>, entry: &Entry<'_>) -> Option<&'a mut Client> {
    let addr = entry.original.src.ip();
    (entry.reply.dst.ip() == addr).then_some(())?;
    clients.get_mut(&addr)
}

impl Client {
    /// Whether no socket of the pod has these ends, but one that only waits for its time to be over.
    fn is_done_with(&mut self, node: &Node, ends: Tuple, forgotten: &mut Forgotten) -> bool {
        let sockets = self.sockets.get_or_insert_with(|| match open_ends(node, &self.netns) {
            Ok(sockets) => Some(sockets),
            Err(source) => {
                forgotten.note(ForgetError::Sockets { pod: self.name.clone(), source });
                None
            }
        });
        sockets.as_ref().is_some_and(|sockets| !sockets.contains(&(ends.src, ends.dst)))
    }
}

fn open_ends(node: &Node, netns: &Netns) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
    let mut sockets = HashSet::new();
    let wanted = Wanted { states: OPEN_STATES, storage: node.maps.socks.as_fd(), bytes: false };
    Diag::inside(netns)?.each(wanted, |socket| {
        sockets.insert((socket.id.local(), socket.id.remote()));
    })?;
    Ok(sockets)
}

impl Forgotten {
    fn delete(&mut self, table: &mut Conntrack, key: &Key) {
        match table.delete(key) {
            Ok(deleted) => self.deleted += u64::from(deleted),
            Err(error) => self.note(ForgetError::Delete(error)),
        }
    }

    fn note(&mut self, error: ForgetError) {
        self.failed.get_or_insert(error);
    }
}
