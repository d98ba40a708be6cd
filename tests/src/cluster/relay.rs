//! A way from this machine's loopback into a network that has no other: bytes both ways, nothing understood.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::place::Place;

/// A listener on the loopback whose connections go on to one address inside a place. Ends with its value; connections
/// that are open end with either side.
#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    over: Arc<AtomicBool>,
}

impl Relay {
    /// A relay on a free port.
    pub(crate) fn start(place: Place, to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
            for connection in listener.incoming().flatten() {
                if told.load(Ordering::Acquire) {
                    break;
                }
                let place = place.clone();
                std::thread::spawn(move || {
                    // Refused inside is closed outside: whoever dialled tries again.
                    if let Ok(Ok(inner)) = place.run(|| TcpStream::connect(to)) {
                        drop(join(&connection, &inner));
                    }
                });
            }
        })?;
        Ok(Self { address, over })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes the listener; if nobody listens any more, all is well.
        drop(TcpStream::connect(self.address));
    }
}

fn join(one: &TcpStream, other: &TcpStream) -> io::Result<()> {
    one.set_nodelay(true)?;
    other.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(|| pass(one, other));
        pass(other, one);
    });
    Ok(())
}

/// Copies until the end, and says so on the far side.
fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    // A reset on one side is an end on the other.
    drop(io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
}
