//! A controller's way to the API server, which a test can cut.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_tests::Failure;

/// Passes bytes on to one address of this machine, unless it is cut. Ends with its value.
pub(crate) struct Relay {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    state: Mutex<State>,
}

/// Under one lock, so that nothing passes once it is cut.
#[derive(Default)]
struct State {
    cut: bool,
    open: Vec<TcpStream>,
}

impl Relay {
    /// A relay on a free port.
    pub(crate) fn to(target: SocketAddr) -> Result<Self, Failure> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let relay = Self { addr, shared: Arc::clone(&shared) };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.over.load(Ordering::Acquire) {
                    return;
                }
                // Whoever is refused tries again, as with an API server that cannot be reached.
                drop(shared.join(client, target));
            }
        });
        Ok(relay)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Ends all connections and lets no other through.
    pub(crate) fn cut(&self) {
        let mut state = self.shared.lock();
        state.cut = true;
        close(&mut state);
    }

    /// Lets connections through again.
    pub(crate) fn mend(&self) {
        self.shared.lock().cut = false;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        close(&mut self.shared.lock());
        // Wakes the listener.
        drop(TcpStream::connect(self.addr));
    }
}

fn close(state: &mut State) {
    for stream in state.open.drain(..) {
        // One that has ended already is as good.
        drop(stream.shutdown(Shutdown::Both));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, client: TcpStream, target: SocketAddr) -> io::Result<()> {
        let mut state = self.lock();
        if state.cut {
            return Ok(());
        }
        let server = TcpStream::connect(target)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        for (from, to) in [(&client, &server), (&server, &client)] {
            let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
            std::thread::spawn(move || {
                // A reset on one side is an end on the other.
                drop(io::copy(&mut from, &mut to));
                drop(to.shutdown(Shutdown::Both));
                drop(from.shutdown(Shutdown::Both));
            });
        }
        state.open.extend([client, server]);
        Ok(())
    }
}
