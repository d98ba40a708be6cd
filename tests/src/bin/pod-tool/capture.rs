//! Recording the TCP packets of the pod's interfaces by a packet socket.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mesh_tests::protocol::{CallFailure, Packet};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::objects::{failed, lock};

/// How many packets a capture remembers.
const REMEMBERED: usize = 10_000;

/// How often a quiet capture looks whether it was stopped, µs.
const WAKE_US: i64 = 50_000;

/// A running recording.
#[derive(Debug)]
pub(crate) struct Capture {
    stopped: AtomicBool,
    packets: Mutex<VecDeque<Packet>>,
}

impl Capture {
    pub(crate) fn packets(&self) -> Vec<Packet> {
        lock(&self.packets).iter().cloned().collect()
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

pub(crate) fn start() -> Result<Arc<Capture>, CallFailure> {
    let socket =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .map_err(|errno| failed("socket")(errno.into()))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, WAKE_US))
        .map_err(|errno| failed("set SO_RCVTIMEO")(errno.into()))?;
    let capture = Arc::new(Capture { stopped: AtomicBool::new(false), packets: Mutex::default() });
    let running = Arc::clone(&capture);
    std::thread::spawn(move || record(&socket, &running));
    Ok(capture)
}

fn record(socket: &OwnedFd, capture: &Capture) {
    let mut buffer = vec![0; 64 * 1024];
    while !capture.stopped.load(Ordering::Acquire) {
        let Ok((length, from)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else { continue };
        let outgoing = from.is_some_and(|from| is_outgoing(&from));
        if let Some(packet) = parse(&buffer[..length], outgoing) {
            let mut packets = lock(&capture.packets);
            if packets.len() == REMEMBERED {
                packets.pop_front();
            }
            packets.push_back(packet);
        }
    }
}

fn is_outgoing(address: &LinkAddr) -> bool {
    AsRef::<libc::sockaddr_ll>::as_ref(address).sll_pkttype == libc::PACKET_OUTGOING
}

/// The TCP packet in an IP packet, if it is one (no IPv6 extension headers).
fn parse(bytes: &[u8], outgoing: bool) -> Option<Packet> {
    let (source, target, tcp): (IpAddr, IpAddr, &[u8]) = match bytes.first()? >> 4 {
        4 => {
            if *bytes.get(9)? != 6 {
                return None;
            }
            let header = usize::from(bytes.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]));
            let address = |at: usize| -> Option<Ipv4Addr> {
                Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?))
            };
            (address(12)?.into(), address(16)?.into(), bytes.get(header..total)?)
        }
        6 => {
            if *bytes.get(6)? != 6 {
                return None;
            }
            let address = |at: usize| -> Option<Ipv6Addr> {
                Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?))
            };
            (address(8)?.into(), address(24)?.into(), bytes.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Packet {
        from: SocketAddr::new(source, port(0)?),
        to: SocketAddr::new(target, port(2)?),
        flags: *tcp.get(13)?,
        payload: tcp.len().saturating_sub(header),
        outgoing,
    })
}
