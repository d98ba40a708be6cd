//! Servers that tell who they are and whom they see.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_tests::protocol::{CallFailure, Identity, ListenTcp, Serve, fill_pattern};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::receive_datagram;
use crate::http;
use crate::objects::{failed, lock};

/// How many connections a server remembers.
const REMEMBERED: usize = 10_000;

/// Stack of a connection's thread: thousands may live at once.
const STACK: usize = 64 * 1024;

/// How long a stalling server holds a connection that it never reads.
const STALL: Duration = Duration::from_secs(600);

/// A listening socket, or a UDP socket, with what it has seen.
#[derive(Debug)]
pub(crate) struct Server {
    name: String,
    socket: Socket,
    local: SocketAddr,
    stopped: AtomicBool,
    seen: Mutex<VecDeque<Identity>>,
}

impl Server {
    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    pub(crate) fn accepted(&self) -> Vec<Identity> {
        lock(&self.seen).iter().cloned().collect()
    }

    /// Close the listener: a shutdown wakes the accepting thread, which then lets the socket go.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // An unconnected UDP socket says ENOTCONN but its reader wakes all the same.
        drop(self.socket.shutdown(Shutdown::Both));
    }

    fn remember(&self, identity: &Identity) {
        let mut seen = lock(&self.seen);
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(identity.clone());
    }
}

pub(crate) fn listen_tcp(listen: ListenTcp) -> Result<Arc<Server>, CallFailure> {
    let socket = Socket::new(Domain::for_address(listen.on), Type::STREAM, Some(Protocol::TCP))
        .map_err(failed("socket"))?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    if listen.on.is_ipv6() {
        socket.set_only_v6(listen.only_v6).map_err(failed("set IPV6_V6ONLY"))?;
    }
    socket.bind(&listen.on.into()).map_err(failed("bind"))?;
    if listen.fast_open {
        set_fast_open(&socket, listen.backlog).map_err(failed("set TCP_FASTOPEN"))?;
    }
    socket.listen(listen.backlog).map_err(failed("listen"))?;
    let server = new_server(socket, listen.name, listen.on)?;
    let accepting = Arc::clone(&server);
    std::thread::spawn(move || accept_loop(&accepting, listen.serve));
    Ok(server)
}

pub(crate) fn listen_udp(on: SocketAddr, name: String) -> Result<Arc<Server>, CallFailure> {
    let socket =
        Socket::new(Domain::for_address(on), Type::DGRAM, Some(Protocol::UDP)).map_err(failed("socket"))?;
    if on.is_ipv6() {
        socket.set_only_v6(false).map_err(failed("set IPV6_V6ONLY"))?;
    }
    socket.bind(&on.into()).map_err(failed("bind"))?;
    let server = new_server(socket, name, on)?;
    let answering = Arc::clone(&server);
    std::thread::spawn(move || answer_datagrams(&answering));
    Ok(server)
}

fn new_server(socket: Socket, name: String, on: SocketAddr) -> Result<Arc<Server>, CallFailure> {
    let local = socket.local_addr().map_err(failed("getsockname"))?.as_socket().unwrap_or(on);
    let seen = Mutex::new(VecDeque::new());
    Ok(Arc::new(Server { name, socket, local, stopped: AtomicBool::new(false), seen }))
}

/// nix has no option for the listening side of TCP Fast Open.
fn set_fast_open(socket: &Socket, queue: i32) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    #[expect(unsafe_code, reason = "no safe wrapper of TCP_FASTOPEN in nix or socket2")]
    // SAFETY: the option takes one int, which outlives the call, and the length given is its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            (&raw const queue).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn accept_loop(server: &Arc<Server>, serve: Serve) {
    while !server.stopped.load(Ordering::Acquire) {
        match server.socket.accept() {
            Ok((socket, from)) => {
                let Some(from) = from.as_socket() else { continue };
                let server = Arc::clone(server);
                let work = move || handle(&server, serve, socket.into(), from);
                if let Err(error) = std::thread::Builder::new().stack_size(STACK).spawn(work) {
                    eprintln!("pod-tool: no thread for a connection: {error}");
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            // Out of descriptors, or the peer was faster: neither ends a server.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn handle(server: &Server, serve: Serve, stream: TcpStream, accepted_from: SocketAddr) {
    let local = stream.local_addr().unwrap_or(server.local);
    let peer = stream.peer_addr().ok();
    let identity = Identity { server: server.name.clone(), accepted_from, peer, local };
    server.remember(&identity);
    // The far end may go at any time; that is its business, and the test looks at that end.
    drop(converse(serve, stream, &identity));
}

fn converse(serve: Serve, mut stream: TcpStream, identity: &Identity) -> io::Result<()> {
    let line = serde_json::to_string(identity)? + "\n";
    match serve {
        Serve::Lines => lines(stream, &line),
        Serve::Greet => {
            stream.write_all(line.as_bytes())?;
            lines(stream, &line)
        }
        Serve::GreetAndClose => stream.write_all(line.as_bytes()),
        Serve::Echo => echo(stream),
        Serve::Sink => sink(stream),
        Serve::Source { bytes } => source(stream, bytes),
        Serve::Stall => {
            std::thread::sleep(STALL);
            Ok(())
        }
        Serve::Reset => Socket::from(stream).set_linger(Some(Duration::ZERO)),
        Serve::Http => http::serve(stream, &line),
    }
}

fn lines(stream: TcpStream, identity: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let answer = if line == "who\n" { identity } else { line.as_str() };
        writer.write_all(answer.as_bytes())?;
        line.clear();
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let received = io::copy(&mut stream, &mut io::sink())?;
    writeln!(stream, "{received}")
}

fn source(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let mut block = vec![0; 64 * 1024];
    let mut sent = 0;
    while sent < bytes {
        let part = usize::try_from(bytes - sent).unwrap_or(block.len()).min(block.len());
        fill_pattern(&mut block[..part], 1, sent);
        stream.write_all(&block[..part])?;
        sent += part as u64;
    }
    Ok(())
}

fn answer_datagrams(server: &Server) {
    let mut buffer = vec![0; 64 * 1024];
    while !server.stopped.load(Ordering::Acquire) {
        let Ok((_, Some(from))) = receive_datagram(&server.socket, &mut buffer) else {
            // An ICMP error of an earlier answer, or the shutdown that the condition sees.
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let identity =
            Identity { server: server.name.clone(), accepted_from: from, peer: None, local: server.local };
        server.remember(&identity);
        if let Ok(text) = serde_json::to_vec(&identity)
            && let Err(error) = server.socket.send_to(&text, &from.into())
        {
            eprintln!("pod-tool: cannot answer {from}: {error}");
        }
    }
}
