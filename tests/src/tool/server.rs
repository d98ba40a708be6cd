//! Servers inside a `pod-tool`.

use std::net::SocketAddr;

use super::socket::close;
use super::{PodTool, ToolError};
use crate::protocol::{Identity, ListenTcp, Reply, Request, Serve, SocketId};

/// The accept queue of a server that was not given another.
const DEFAULT_BACKLOG: i32 = 1024;

/// How a TCP server behaves.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    listen: ListenTcp,
}

impl ServerOptions {
    /// A [`Serve::Lines`] server with this name in its answers.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let on = SocketAddr::from(([0, 0, 0, 0], 0));
        Self {
            listen: ListenTcp {
                on,
                only_v6: false,
                backlog: DEFAULT_BACKLOG,
                fast_open: false,
                name: name.to_owned(),
                serve: Serve::Lines,
            },
        }
    }

    /// What it does with connections.
    #[must_use]
    pub fn serving(mut self, serve: Serve) -> Self {
        self.listen.serve = serve;
        self
    }

    /// `IPV6_V6ONLY`: a `[::]` listener that takes no IPv4.
    #[must_use]
    pub fn only_v6(mut self) -> Self {
        self.listen.only_v6 = true;
        self
    }

    /// The length of its accept queue.
    #[must_use]
    pub fn backlog(mut self, backlog: i32) -> Self {
        self.listen.backlog = backlog;
        self
    }

    /// Accept TCP Fast Open.
    #[must_use]
    pub fn fast_open(mut self) -> Self {
        self.listen.fast_open = true;
        self
    }

    pub(super) fn listen_on(mut self, on: SocketAddr) -> ListenTcp {
        self.listen.on = on;
        self.listen
    }
}

/// A server in a pod; stops when dropped (its connections go on).
#[derive(Debug)]
pub struct Server {
    tool: PodTool,
    socket: SocketId,
    local: SocketAddr,
}

impl Server {
    pub(super) fn new(tool: PodTool, socket: SocketId, local: SocketAddr) -> Self {
        Self { tool, socket, local }
    }

    /// Where it listens (port 0 resolved).
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Whom it has accepted so far, oldest first.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn accepted(&self) -> Result<Vec<Identity>, ToolError> {
        match self.tool.call(Request::Accepted { socket: self.socket })? {
            Reply::Accepted { connections } => Ok(connections),
            other => Err(self.tool.unexpected(&other)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        close(&self.tool, self.socket);
    }
}
