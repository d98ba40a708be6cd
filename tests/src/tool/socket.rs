//! Handles on what lives inside a `pod-tool`: connections, datagram sockets, captures and loads.

use std::net::SocketAddr;
use std::time::Duration;

use super::{PodTool, ToolError, default_timeout_ms, milliseconds};
use crate::protocol::{Dial, How, Identity, LoadReport, Names, Packet, Reply, Request, SocketId};
use crate::waiting::limit;

/// A TCP socket in a pod; closed when dropped.
#[derive(Debug)]
pub struct Connection {
    tool: PodTool,
    socket: SocketId,
}

impl Connection {
    pub(super) fn new(tool: PodTool, socket: SocketId) -> Self {
        Self { tool, socket }
    }

    /// `connect` this very socket, also after an earlier attempt failed.
    ///
    /// # Errors
    /// The errno of the attempt.
    pub fn dial(&self, to: SocketAddr, how: How) -> Result<Names, ToolError> {
        self.tool.dial(Dial { socket: self.socket, to, how, timeout_ms: default_timeout_ms() })
    }

    /// As [`Connection::dial`], with a time-out of one's own.
    ///
    /// # Errors
    /// The errno of the attempt.
    pub fn dial_within(&self, to: SocketAddr, how: How, within: Duration) -> Result<Names, ToolError> {
        self.tool.dial(Dial { socket: self.socket, to, how, timeout_ms: milliseconds(limit(within)) })
    }

    /// `getsockname` and `getpeername` as the application sees them.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn names(&self) -> Result<Names, ToolError> {
        match self.tool.call(Request::Names { socket: self.socket })? {
            Reply::Names(names) => Ok(names),
            other => Err(self.tool.unexpected(&other)),
        }
    }

    /// Send all of `text`.
    ///
    /// # Errors
    /// The errno of `send`.
    pub fn send(&self, text: &str) -> Result<(), ToolError> {
        self.tool.done(Request::Send { socket: self.socket, text: text.to_owned() })
    }

    /// One `recv` of at most `max` bytes; empty at the end of the stream.
    ///
    /// # Errors
    /// The errno of `recv`; `EAGAIN` when nothing came in time.
    pub fn recv(&self, max: usize) -> Result<String, ToolError> {
        self.recv_within(max, Duration::from_millis(default_timeout_ms()))
    }

    /// As [`Connection::recv`], with a time-out of one's own (not scaled).
    ///
    /// # Errors
    /// The errno of `recv`; `EAGAIN` when nothing came in time.
    pub fn recv_within(&self, max: usize, within: Duration) -> Result<String, ToolError> {
        self.text(Request::Recv { socket: self.socket, max, timeout_ms: milliseconds(within) })
    }

    /// Receive one line, with its line feed unless the stream ended.
    ///
    /// # Errors
    /// The errno of `recv`.
    pub fn recv_line(&self) -> Result<String, ToolError> {
        self.text(Request::RecvLine { socket: self.socket, timeout_ms: default_timeout_ms() })
    }

    /// Ask a [`Serve::Lines`] server who it is.
    ///
    /// # Errors
    /// The errno of the failed call; no line is an error too.
    pub fn who(&self) -> Result<Identity, ToolError> {
        self.send("who\n")?;
        self.greeting()
    }

    /// Read the identity line of a server that speaks first.
    ///
    /// # Errors
    /// The errno of the failed call; anything but an identity is an error too.
    pub fn greeting(&self) -> Result<Identity, ToolError> {
        let line = self.recv_line()?;
        serde_json::from_str(&line).map_err(|error| ToolError::Socket {
            place: self.tool.shared.place.clone(),
            doing: "read the server's identity".to_owned(),
            text: format!("{line:?}: {error}"),
            errno: None,
        })
    }

    /// Send `bytes` of the stream `seed`.
    ///
    /// # Errors
    /// The errno of `send`.
    pub fn send_bulk(&self, bytes: u64, seed: u8) -> Result<u64, ToolError> {
        self.count(Request::SendBulk { socket: self.socket, bytes, seed })
    }

    /// Receive `bytes` and compare them with the stream `seed`; the end of the stream ends it early.
    ///
    /// # Errors
    /// The errno of `recv`, or a byte that differs.
    pub fn recv_bulk(&self, bytes: u64, seed: u8) -> Result<u64, ToolError> {
        let timeout_ms = default_timeout_ms();
        self.count(Request::RecvBulk { socket: self.socket, bytes, seed, timeout_ms })
    }

    /// Half-close.
    ///
    /// # Errors
    /// The errno of `shutdown`.
    pub fn shutdown_write(&self) -> Result<(), ToolError> {
        self.tool.done(Request::ShutdownWrite { socket: self.socket })
    }

    /// Close with a reset.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn reset(self) -> Result<(), ToolError> {
        self.tool.done(Request::Reset { socket: self.socket })
    }

    fn text(&self, request: Request) -> Result<String, ToolError> {
        match self.tool.call(request)? {
            Reply::Text { text } => Ok(text),
            other => Err(self.tool.unexpected(&other)),
        }
    }

    fn count(&self, request: Request) -> Result<u64, ToolError> {
        match self.tool.call(request)? {
            Reply::Count { bytes } => Ok(bytes),
            other => Err(self.tool.unexpected(&other)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        close(&self.tool, self.socket);
    }
}

/// A UDP socket in a pod; closed when dropped.
#[derive(Debug)]
pub struct Datagrams {
    tool: PodTool,
    socket: SocketId,
}

impl Datagrams {
    pub(super) fn new(tool: PodTool, socket: SocketId) -> Self {
        Self { tool, socket }
    }

    /// `connect` it.
    ///
    /// # Errors
    /// The errno of `connect`.
    pub fn connect(&self, to: SocketAddr) -> Result<Names, ToolError> {
        let how = How::Blocking;
        self.tool.dial(Dial { socket: self.socket, to, how, timeout_ms: default_timeout_ms() })
    }

    /// `getsockname` and `getpeername`.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn names(&self) -> Result<Names, ToolError> {
        match self.tool.call(Request::Names { socket: self.socket })? {
            Reply::Names(names) => Ok(names),
            other => Err(self.tool.unexpected(&other)),
        }
    }

    /// Send to the connected peer.
    ///
    /// # Errors
    /// The errno of `send`.
    pub fn send(&self, text: &str) -> Result<(), ToolError> {
        self.tool.done(Request::SendTo { socket: self.socket, to: None, text: text.to_owned() })
    }

    /// Send to `to` without connecting.
    ///
    /// # Errors
    /// The errno of `sendto`.
    pub fn send_to(&self, to: SocketAddr, text: &str) -> Result<(), ToolError> {
        self.tool.done(Request::SendTo { socket: self.socket, to: Some(to), text: text.to_owned() })
    }

    /// Receive one datagram and its source.
    ///
    /// # Errors
    /// The errno of `recvfrom`; `EAGAIN` when nothing came in time.
    pub fn recv_from(&self) -> Result<(String, SocketAddr), ToolError> {
        let timeout_ms = default_timeout_ms();
        match self.tool.call(Request::RecvFrom { socket: self.socket, timeout_ms })? {
            Reply::Datagram { text, from } => Ok((text, from)),
            other => Err(self.tool.unexpected(&other)),
        }
    }

    /// Receive the identity that a [`PodTool::serve_udp`] server answered with, and its source.
    ///
    /// # Errors
    /// The errno of `recvfrom`, or a datagram that is no identity.
    pub fn recv_identity(&self) -> Result<(Identity, SocketAddr), ToolError> {
        let (text, from) = self.recv_from()?;
        let identity = serde_json::from_str(&text).map_err(|error| ToolError::Protocol {
            place: self.tool.shared.place.clone(),
            answer: format!("{text:?}: {error}"),
        })?;
        Ok((identity, from))
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        close(&self.tool, self.socket);
    }
}

/// A recording of a pod's TCP packets; stops when dropped.
#[derive(Debug)]
pub struct Capture {
    tool: PodTool,
    socket: SocketId,
}

impl Capture {
    pub(super) fn new(tool: PodTool, socket: SocketId) -> Self {
        Self { tool, socket }
    }

    /// The packets so far, oldest first.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn packets(&self) -> Result<Vec<Packet>, ToolError> {
        match self.tool.call(Request::Captured { socket: self.socket })? {
            Reply::Packets { packets } => Ok(packets),
            other => Err(self.tool.unexpected(&other)),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        close(&self.tool, self.socket);
    }
}

/// A load in a pod; stops when dropped.
#[derive(Debug)]
pub struct RunningLoad {
    tool: PodTool,
    socket: SocketId,
}

impl RunningLoad {
    pub(super) fn new(tool: PodTool, socket: SocketId) -> Self {
        Self { tool, socket }
    }

    /// What it has done so far.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn report(&self) -> Result<LoadReport, ToolError> {
        self.ask(Request::LoadReport { socket: self.socket })
    }

    /// Let running attempts end, and tell what it has done.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn stop(self) -> Result<LoadReport, ToolError> {
        self.ask(Request::StopLoad { socket: self.socket })
    }

    fn ask(&self, request: Request) -> Result<LoadReport, ToolError> {
        match self.tool.call(request)? {
            Reply::Load(report) => Ok(report),
            other => Err(self.tool.unexpected(&other)),
        }
    }
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        close(&self.tool, self.socket);
    }
}

/// Close without caring: the tool may have been killed with its pod.
pub(super) fn close(tool: &PodTool, socket: SocketId) {
    if tool.is_alive() {
        drop(tool.call(Request::Close { socket }));
    }
}
