//! Client sockets: made, bound and connected in every way an application might.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use mesh_tests::protocol::{
    CallFailure, Dial, Family, How, Names, Open, Reply, Transport, fill_pattern, pattern,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::objects::failed;

/// Bytes moved at a time by bulk transfers.
const BLOCK: usize = 64 * 1024;

/// The longest line that is read.
const LONGEST_LINE: usize = 64 * 1024;

pub(crate) fn open(open: &Open) -> Result<Socket, CallFailure> {
    let domain = match open.family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let (kind, protocol) = match open.transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(domain, kind, Some(protocol)).map_err(failed("socket"))?;
    if open.family == Family::V6 {
        // Mapped addresses are dialled by such sockets, whatever the system's default is.
        socket.set_only_v6(false).map_err(failed("set IPV6_V6ONLY"))?;
    }
    if open.reuse_address {
        socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    }
    if let Some(mark) = open.mark {
        socket.set_mark(mark).map_err(failed("set SO_MARK"))?;
    }
    if let Some(device) = &open.device {
        socket.bind_device(Some(device.as_bytes())).map_err(failed("set SO_BINDTODEVICE"))?;
    }
    if open.bind_no_port {
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
            .map_err(|errno| failed("set IP_BIND_ADDRESS_NO_PORT")(errno.into()))?;
    }
    if let Some(address) = open.bind {
        socket.bind(&address.into()).map_err(failed("bind"))?;
    }
    Ok(socket)
}

pub(crate) fn names(socket: &Socket) -> Names {
    let address = |name: io::Result<SockAddr>| name.ok().and_then(|name| name.as_socket());
    Names { local: address(socket.local_addr()), peer: address(socket.peer_addr()) }
}

pub(crate) fn dial(socket: &Socket, dial: &Dial) -> Result<Reply, CallFailure> {
    let timeout = Duration::from_millis(dial.timeout_ms);
    let to = SockAddr::from(dial.to);
    match &dial.how {
        How::Blocking => blocking(socket, &to, timeout),
        How::NonBlocking => non_blocking(socket, &to, timeout),
        How::IoUring => io_uring(socket, &to, timeout),
        How::FastOpenMessage(text) => fast_open_message(socket, &to, text, timeout),
        How::FastOpenConnect(text) => fast_open_connect(socket, &to, text, timeout),
    }
    .map_err(failed("connect"))?;
    Ok(Reply::Names(names(socket)))
}

fn blocking(socket: &Socket, to: &SockAddr, timeout: Duration) -> io::Result<()> {
    // A send time-out also bounds connect, which then says EINPROGRESS.
    socket.set_write_timeout(Some(timeout))?;
    socket.connect(to).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EINPROGRESS) => timed_out(),
        _ => error,
    })
}

fn non_blocking(socket: &Socket, to: &SockAddr, timeout: Duration) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let connected = match socket.connect(to) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
            await_connected(socket, timeout)
        }
        other => other,
    };
    socket.set_nonblocking(false)?;
    connected
}

fn await_connected(socket: &Socket, timeout: Duration) -> io::Result<()> {
    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    if poll(&mut watched, timeout)? == 0 {
        return Err(timed_out());
    }
    socket.take_error()?.map_or(Ok(()), Err)
}

fn io_uring(socket: &Socket, to: &SockAddr, timeout: Duration) -> io::Result<()> {
    let mut ring = io_uring::IoUring::new(4)?;
    let limit = io_uring::types::Timespec::from(timeout);
    let connect =
        io_uring::opcode::Connect::new(io_uring::types::Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len())
            .build()
            .flags(io_uring::squeue::Flags::IO_LINK);
    let expire = io_uring::opcode::LinkTimeout::new(&limit).build().user_data(1);
    #[expect(unsafe_code, reason = "io_uring takes addresses by pointer")]
    // SAFETY: `to`, `limit` and the socket outlive the ring's use of them: both entries have completed when
    // `submit_and_wait(2)` returns, and the ring is dropped before they are.
    unsafe {
        ring.submission().push_multiple(&[connect, expire]).map_err(io::Error::other)?;
    }
    ring.submit_and_wait(2)?;
    let outcome = ring.completion().find(|entry| entry.user_data() == 0).map(|entry| entry.result());
    match outcome {
        Some(0) => Ok(()),
        Some(code) if -code == nix::libc::ECANCELED || -code == nix::libc::EINTR => Err(timed_out()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::other("the ring lost the connect")),
    }
}

fn fast_open_message(socket: &Socket, to: &SockAddr, text: &str, timeout: Duration) -> io::Result<()> {
    socket.set_write_timeout(Some(timeout))?;
    let sent = socket.send_to_with_flags(text.as_bytes(), to, nix::libc::MSG_FASTOPEN)?;
    if sent == text.len() { Ok(()) } else { Err(io::Error::other("only a part was sent")) }
}

fn fast_open_connect(socket: &Socket, to: &SockAddr, text: &str, timeout: Duration) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpFastOpenConnect, &true)?;
    blocking(socket, to, timeout)?;
    let mut stream = socket;
    stream.write_all(text.as_bytes())
}

fn timed_out() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ETIMEDOUT)
}

pub(crate) fn send(mut socket: &Socket, text: &str) -> Result<Reply, CallFailure> {
    socket.write_all(text.as_bytes()).map_err(failed("send"))?;
    Ok(Reply::Done)
}

pub(crate) fn recv(mut socket: &Socket, max: usize, timeout_ms: u64) -> Result<Reply, CallFailure> {
    limit_reads(socket, timeout_ms)?;
    let mut buffer = vec![0; max.max(1)];
    let length = socket.read(&mut buffer).map_err(failed("recv"))?;
    Ok(Reply::Text { text: String::from_utf8_lossy(&buffer[..length]).into_owned() })
}

/// Byte by byte, so that nothing behind the line is consumed.
pub(crate) fn recv_line(mut socket: &Socket, timeout_ms: u64) -> Result<Reply, CallFailure> {
    limit_reads(socket, timeout_ms)?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LONGEST_LINE && line.last() != Some(&b'\n') {
        if socket.read(&mut byte).map_err(failed("recv"))? == 0 {
            break;
        }
        line.push(byte[0]);
    }
    Ok(Reply::Text { text: String::from_utf8_lossy(&line).into_owned() })
}

pub(crate) fn send_bulk(mut socket: &Socket, bytes: u64, seed: u8) -> Result<Reply, CallFailure> {
    let mut block = vec![0; BLOCK];
    let mut sent = 0;
    while sent < bytes {
        let part = block_length(bytes - sent);
        fill_pattern(&mut block[..part], seed, sent);
        socket.write_all(&block[..part]).map_err(failed("send"))?;
        sent += part as u64;
    }
    Ok(Reply::Count { bytes: sent })
}

pub(crate) fn recv_bulk(
    mut socket: &Socket,
    bytes: u64,
    seed: u8,
    timeout_ms: u64,
) -> Result<Reply, CallFailure> {
    limit_reads(socket, timeout_ms)?;
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    while received < bytes {
        let part = block_length(bytes - received);
        let length = socket.read(&mut block[..part]).map_err(failed("recv"))?;
        if length == 0 {
            break;
        }
        let wrong = block[..length]
            .iter()
            .enumerate()
            .find(|(index, byte)| **byte != pattern(seed, received + *index as u64));
        if let Some((index, byte)) = wrong {
            let at = received + index as u64;
            let text = format!("byte {at} is {byte}, not {}", pattern(seed, at));
            return Err(CallFailure { errno: None, doing: "compare".to_owned(), text });
        }
        received += length as u64;
    }
    Ok(Reply::Count { bytes: received })
}

pub(crate) fn shutdown_write(socket: &Socket) -> Result<Reply, CallFailure> {
    socket.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
    Ok(Reply::Done)
}

/// A zero linger time makes the coming close a reset.
pub(crate) fn reset(socket: &Socket) -> Result<Reply, CallFailure> {
    socket.set_linger(Some(Duration::ZERO)).map_err(failed("set SO_LINGER"))?;
    Ok(Reply::Done)
}

pub(crate) fn send_to(socket: &Socket, to: Option<SocketAddr>, text: &str) -> Result<Reply, CallFailure> {
    match to {
        Some(to) => socket.send_to(text.as_bytes(), &to.into()).map_err(failed("sendto"))?,
        None => socket.send(text.as_bytes()).map_err(failed("send"))?,
    };
    Ok(Reply::Done)
}

pub(crate) fn recv_from(socket: &Socket, timeout_ms: u64) -> Result<Reply, CallFailure> {
    let mut buffer = vec![0; BLOCK];
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    limit_reads(socket, timeout_ms)?;
    loop {
        let (length, from) = receive_datagram(socket, &mut buffer).map_err(failed("recvfrom"))?;
        if let Some(from) = from {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            return Ok(Reply::Datagram { text, from });
        }
        if Instant::now() > deadline {
            return Err(failed("recvfrom")(timed_out()));
        }
    }
}

/// `recvfrom` into initialised memory.
pub(crate) fn receive_datagram(
    socket: &Socket,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<SocketAddr>)> {
    let (length, from) =
        nix::sys::socket::recvfrom::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd(), buffer)?;
    Ok((length, from.and_then(|from| storage_address(&from))))
}

fn storage_address(storage: &nix::sys::socket::SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::from((address.ip(), address.port())));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::from((address.ip(), address.port()))))
}

fn limit_reads(socket: &Socket, timeout_ms: u64) -> Result<(), CallFailure> {
    let timeout = Duration::from_millis(timeout_ms.max(1));
    socket.set_read_timeout(Some(timeout)).map_err(failed("set SO_RCVTIMEO"))
}

fn block_length(left: u64) -> usize {
    usize::try_from(left).unwrap_or(BLOCK).min(BLOCK)
}
