//! Listening on the wire between nodes: what passes there as an eavesdropper has it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::netns::{NetNs, NetNsError};

/// Bytes of packets that a tap remembers; the oldest go first.
const REMEMBERED_BYTES: usize = 64 << 20;

/// How often a quiet tap looks whether it was stopped, µs.
const WAKE_US: i64 = 50_000;

/// A tap could not be set.
#[derive(Debug, thiserror::Error)]
pub enum WiretapError {
    /// The wire's namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The packet socket cannot be made.
    #[error("cannot listen on the wire")]
    Socket(#[source] io::Error),
}

/// A recording of every packet on the wire; stops when dropped.
#[derive(Debug)]
pub struct Wiretap {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    packets: Mutex<Packets>,
}

#[derive(Debug, Default)]
struct Packets {
    kept: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Wiretap {
    pub(crate) fn start(wire: &NetNs) -> Result<Self, WiretapError> {
        let listening = wire.run(|| {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Datagram,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, WAKE_US))?;
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))
                .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &(16 << 20)))?;
            Ok::<OwnedFd, nix::errno::Errno>(socket)
        })?;
        let socket = listening.map_err(|errno| WiretapError::Socket(errno.into()))?;
        let shared = Arc::new(Shared::default());
        let listener = Arc::clone(&shared);
        let thread = std::thread::spawn(move || record(&socket, &listener));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Whether any packet so far held these bytes.
    #[must_use]
    pub fn heard(&self, bytes: &[u8]) -> bool {
        let packets = lock(&self.shared.packets);
        packets.kept.iter().any(|packet| packet.windows(bytes.len()).any(|window| window == bytes))
    }

    /// How many bytes of packets were heard in all that are still remembered.
    #[must_use]
    pub fn bytes(&self) -> usize {
        lock(&self.shared.packets).bytes
    }
}

impl Drop for Wiretap {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            drop(thread.join());
        }
    }
}

fn record(socket: &OwnedFd, shared: &Shared) {
    let mut buffer = vec![0; 128 * 1024];
    while !shared.stopped.load(Ordering::Acquire) {
        let Ok((length, _)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else { continue };
        let mut packets = lock(&shared.packets);
        packets.bytes += length;
        packets.kept.push_back(buffer[..length].to_vec());
        while packets.bytes > REMEMBERED_BYTES {
            let Some(oldest) = packets.kept.pop_front() else { break };
            packets.bytes -= oldest.len();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
