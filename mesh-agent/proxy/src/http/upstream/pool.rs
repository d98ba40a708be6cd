//! Connections to one endpoint that requests may share: free ones of HTTP/1.1, and those of HTTP/2 with room.
//!
//! Invariants:
//! - The connection used last is used first, so that the others grow idle and end.
//! - A connection that is leaving is not given out.
//! - At most [`FREE_MAX`] connections are kept free.
//! - Once a pool has settled, connections from before are given out no more; requests on them end as they would.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use hyper::client::conn::{http1, http2};
use tokio::sync::Notify;

use super::{
    super::body::Body,
    connection::{Connection, Sender},
    reply::Fault,
};

/// Free connections to one endpoint.
const FREE_MAX: usize = 256;

/// The connections to one endpoint that one kind of request may use.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: RefCell<Vec<(Rc<Connection>, http1::SendRequest<Body>)>>,
    shared: RefCell<Vec<(Rc<Connection>, http2::SendRequest<Body>)>>,
    /// Connections of HTTP/2 that are open, those too that take no more requests.
    carrying: Cell<u32>,
    /// Told when a connection of HTTP/2 can take another request.
    pub(super) room: Rc<Notify>,
    /// An HTTP/2 connection that is being made.
    pub(super) dialling: RefCell<Option<Rc<Dialling>>>,
    /// Tick from which only connections count that were made since: the other end may have begun those from before without knowing what
    /// this pool is for.
    settled: Option<u32>,
}

/// A connection that several requests wait for.
#[derive(Debug, Default)]
pub(super) struct Dialling {
    pub(super) done: Notify,
    pub(super) failed: Cell<Option<Fault>>,
    pub(super) is_over: Cell<bool>,
}

/// When a connection is to be used no more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetime {
    /// Requests it may serve.
    pub(super) requests_max: u32,
    /// Streams it may carry at once.
    pub(super) streams_max: u32,
    /// Ticks since it was made.
    pub(super) ticks_max: u32,
    /// Ticks without a request.
    pub(super) idle_ticks_max: u32,
}

impl Lifetime {
    /// Whether a connection may serve another request.
    pub(super) fn allows(&self, connection: &Connection, tick: u32) -> bool {
        !connection.leaving.get()
            && !connection.live.tunnel_leaves()
            && connection.served.get() < self.requests_max
            && tick.wrapping_sub(connection.made) < self.ticks_max
    }

    fn is_idle(&self, connection: &Connection, tick: u32) -> bool {
        connection.streams.get() == 0 && tick.wrapping_sub(connection.used.get()) >= self.idle_ticks_max
    }
}

impl Pool {
    /// An empty pool, which settles at a tick if one is given.
    pub(super) fn settling(settled: Option<u32>) -> Self {
        Self { settled, ..Self::default() }
    }

    /// Whether a connection may serve another request.
    fn allows(&self, life: &Lifetime, connection: &Connection, tick: u32) -> bool {
        let is_before = |one: u32, other: u32| one.wrapping_sub(other) > u32::MAX / 2;
        let is_unsettled =
            self.settled.is_some_and(|at| is_before(connection.made, at) && !is_before(tick, at));
        !is_unsettled && life.allows(connection, tick)
    }

    /// A connection for another request, if there is one.
    pub(super) fn take(&self, life: &Lifetime, tick: u32) -> Option<(Rc<Connection>, Sender)> {
        let mut free = self.free.borrow_mut();
        while let Some((connection, sender)) = free.pop() {
            if !sender.is_closed() && self.allows(life, &connection, tick) && !life.is_idle(&connection, tick)
            {
                return Some((connection, Sender::Http1(sender)));
            }
        }
        let mut shared = self.shared.borrow_mut();
        shared.retain(|(connection, sender)| !sender.is_closed() && self.allows(life, connection, tick));
        let with_room = shared
            .iter()
            .filter(|(connection, _)| connection.streams.get() < life.streams_max.min(connection.room.get()));
        let (connection, sender) = with_room.min_by_key(|(connection, _)| connection.streams.get())?;
        Some((Rc::clone(connection), Sender::Http2(sender.clone())))
    }

    /// Takes a free connection back; one too many is closed.
    pub(super) fn give_back(&self, connection: &Rc<Connection>, sender: http1::SendRequest<Body>, tick: u32) {
        connection.used.set(tick);
        let mut free = self.free.borrow_mut();
        if free.len() < FREE_MAX {
            free.push((Rc::clone(connection), sender));
        }
    }

    /// Adds a connection that carries several requests at once.
    pub(super) fn share(&self, connection: &Rc<Connection>, sender: http2::SendRequest<Body>) {
        self.carrying.set(self.carrying.get() + 1);
        self.shared.borrow_mut().push((Rc::clone(connection), sender));
    }

    /// Forgets a connection that has ended.
    pub(super) fn forget(&self, connection: &Rc<Connection>) {
        self.free.borrow_mut().retain(|(other, _)| !Rc::ptr_eq(other, connection));
        self.shared.borrow_mut().retain(|(other, _)| !Rc::ptr_eq(other, connection));
    }

    /// A connection that was shared has ended.
    pub(super) fn end_shared(&self) {
        self.carrying.set(self.carrying.get() - 1);
    }

    /// Whether a connection of HTTP/2 is open, if only for the requests that it has.
    pub(super) fn is_carrying(&self) -> bool {
        self.carrying.get() > 0
    }

    /// Closes one connection that nobody uses; whether there was one.
    pub(super) fn evict(&self) -> bool {
        let mut free = self.free.borrow_mut();
        if !free.is_empty() {
            // The one that has been free for longest.
            drop(free.remove(0));
            return true;
        }
        let mut shared = self.shared.borrow_mut();
        let idle = shared.iter().position(|(connection, _)| connection.streams.get() == 0);
        idle.map(|at| shared.swap_remove(at)).is_some()
    }

    /// Closes what has been idle, or has lived, for too long.
    pub(super) fn sweep(&self, life: &Lifetime, tick: u32) {
        let keep =
            |connection: &Connection| self.allows(life, connection, tick) && !life.is_idle(connection, tick);
        self.free.borrow_mut().retain(|(connection, sender)| !sender.is_closed() && keep(connection));
        self.shared.borrow_mut().retain(|(connection, sender)| !sender.is_closed() && keep(connection));
    }

    /// Closes everything once it is not used any more.
    pub(super) fn close(&self) {
        self.free.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }

    /// Whether nothing is pooled or being made.
    pub(super) fn is_empty(&self) -> bool {
        self.free.borrow().is_empty() && self.shared.borrow().is_empty() && self.dialling.borrow().is_none()
    }
}
