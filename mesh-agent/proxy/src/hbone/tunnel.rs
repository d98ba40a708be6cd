//! One TLS connection to another agent with its streams: an object of one event loop.
//!
//! Two kinds of tasks work on it. The tunnel's own task reads records, opens them where they lie and writes the data
//! straight into the apps' sockets. A connection's task reads its app's bytes straight into records, seals them there and
//! sends at once. Neither wakes the other while sockets take what they get.
//!
//! Invariants:
//! - Bytes are read from an app only when the tunnel's socket took everything before and the windows have room.
//! - A stream whose app does not read keeps at most its window here, and holds back nobody else.
//! - Legs that wait for the tunnel's socket are served in turn.
//! - After [`State::end`] is set nothing is read or sent; every leg hears of it.

mod incoming;
mod io;
mod leg;
mod outgoing;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use self::state::State;
pub(crate) use self::{
    io::TunnelIo,
    state::{Opened, TunnelEnd, Turn},
    stream::{Early, TunnelStream},
};
use std::{
    cell::{Cell, RefCell},
    fmt,
    future::poll_fn,
    os::fd::AsFd,
    rc::Rc,
    sync::Arc,
};

use mesh_core::identity::Identity;
use rustls::pki_types::CertificateDer;

use super::{
    h2::{Connection, ErrorCode, Limits, OpenError, StreamKey},
    tls::handshake::Established,
    workspace::Workspace,
};
use crate::{
    close::Side,
    kernel::{Kernel, TcpFigures},
    stream::Stream,
};

/// Which end of the tunnel this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Opens streams for apps that connect.
    Client,
    /// Dials apps for streams.
    Server,
}

impl Role {
    /// The side of a connection that the app here is.
    pub(crate) const fn app_side(self) -> Side {
        match self {
            Self::Client => Side::Downstream,
            Self::Server => Side::Upstream,
        }
    }

    /// Metric label.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// A tunnel, shared by its task and the tasks of its streams.
pub(crate) struct Tunnel {
    state: RefCell<State>,
    workspace: Rc<Workspace>,
    /// The last answer about the socket, and when it was asked.
    figures: Cell<Option<(u32, Option<TcpFigures>)>>,
    /// Who the peer proved to be.
    pub(crate) peer: Arc<Identity>,
    /// The certificates by which it did.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) role: Role,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Takes over a TLS connection. Run [`Tunnel::turn`] until it says that it ended.
    pub(crate) fn new(
        role: Role,
        stream: Stream,
        established: Established,
        peer: Arc<Identity>,
        limits: Limits,
        workspace: Rc<Workspace>,
    ) -> Rc<Self> {
        let now = std::time::Instant::now();
        let h2 = match role {
            Role::Client => Connection::client(limits, now),
            Role::Server => Connection::server(limits, now),
        };
        let tick = workspace.tick.get();
        let chain = established.peer.clone();
        let state = State::new(role, stream, established, h2, tick);
        Rc::new(Self { state: RefCell::new(state), workspace, figures: Cell::new(None), peer, chain, role })
    }

    /// The tunnel task's next turn: carries bytes until there is something to tell.
    pub(crate) async fn turn(&self) -> Turn {
        poll_fn(|cx| self.state.borrow_mut().poll(&self.workspace, cx)).await
    }

    /// Opens a stream; its headers are sent with the first bytes of the app, or by the first poll of the stream.
    pub(crate) fn open(self: &Rc<Self>, fields: &[(&str, &str)]) -> Result<TunnelStream, OpenError> {
        let key = self.state.borrow_mut().open(fields)?;
        Ok(TunnelStream::new(Rc::clone(self), key))
    }

    /// The stream of a request that [`Turn::Opened`] told of.
    pub(crate) fn stream(self: &Rc<Self>, key: StreamKey) -> TunnelStream {
        TunnelStream::new(Rc::clone(self), key)
    }

    /// Streams this tunnel would still take.
    pub(crate) fn room(&self) -> u32 {
        self.state.borrow().room()
    }

    /// Streams with a connection behind them.
    pub(crate) fn streams(&self) -> usize {
        self.state.borrow().streams()
    }

    /// Whether a stream opened now would wait behind others for the socket.
    pub(crate) fn is_saturated(&self) -> bool {
        self.state.borrow().is_blocked()
    }

    /// What the kernel measured of its socket, asked at most once a tick.
    pub(crate) fn figures(&self, kernel: &dyn Kernel) -> Option<TcpFigures> {
        let now = self.workspace.tick.get();
        match self.figures.get() {
            Some((tick, figures)) if tick == now => figures,
            _ => {
                let figures = kernel.tcp_figures(self.state.borrow().stream.as_fd());
                self.figures.set(Some((now, figures)));
                figures
            }
        }
    }

    /// Takes no new streams if its peer's kernel does not answer: a new connection may get through where this one waits for
    /// its next retransmission.
    pub(crate) fn leave_if_unanswered(&self, kernel: &dyn Kernel) {
        if self.figures(kernel).is_some_and(|figures| figures.unanswered) {
            self.shutdown();
        }
    }

    /// Whether new streams are not taken any more.
    pub(crate) fn is_leaving(&self) -> bool {
        self.state.borrow().is_leaving()
    }

    /// Tick since which it has carried no stream; `None` while it does.
    pub(crate) fn idle_since(&self) -> Option<u32> {
        self.state.borrow().idle_since()
    }

    /// Goes away in order: no new streams, those that there are run on.
    pub(crate) fn shutdown(&self) {
        self.state.borrow_mut().shutdown(&self.workspace);
    }

    /// Ends it now; its streams are reset.
    pub(crate) fn abort(&self, end: TunnelEnd) {
        let mut state = self.state.borrow_mut();
        state.go_away(ErrorCode::NO_ERROR);
        state.fail(&self.workspace, end);
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // What its legs kept is gone with them.
        self.state.get_mut().release_all(&self.workspace);
    }
}
