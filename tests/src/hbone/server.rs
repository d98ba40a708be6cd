//! The server: takes any CONNECT of a client with a good certificate, remembers what it said, and answers lines.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::{HboneError, io_error, runtime, tls};
use crate::authority::Credentials;
use crate::place::Place;
use crate::protocol::Identity;
use crate::waiting::limit;

/// How long the address may still be another's.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(2);

/// A CONNECT as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The client's SPIFFE identity.
    pub peer: String,
    /// The other end of the TCP connection.
    pub from: SocketAddr,
    /// `TLSv1_3`.
    pub tls: String,
    /// The protocol agreed on.
    pub alpn: String,
    /// `CONNECT`.
    pub method: String,
    /// The target.
    pub authority: String,
    /// All other headers.
    pub headers: BTreeMap<String, String>,
    /// Numbers the TLS connections, so that pooling shows.
    pub connection: usize,
}

/// An HBONE listener inside a place; ends with the value.
#[derive(Debug)]
pub struct HboneServer {
    shared: Arc<Shared>,
    control: watch::Sender<Control>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Control {
    Serve,
    /// GOAWAY on every connection; new ones are served.
    GoAway(u32),
    Stop,
}

#[derive(Debug)]
struct Shared {
    name: String,
    answer: StatusCode,
    seen: Mutex<Vec<Seen>>,
    failed: Mutex<Vec<String>>,
    connections: Mutex<usize>,
}

impl HboneServer {
    /// Listen at `on` inside `at` with these credentials; `name` is what `who` answers.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(
        at: &Place,
        on: SocketAddr,
        credentials: &Credentials,
        name: &str,
    ) -> Result<Self, HboneError> {
        Self::answering(at, on, credentials, name, StatusCode::OK)
    }

    /// As [`HboneServer::start`], answering every CONNECT with this status.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn answering(
        at: &Place,
        on: SocketAddr,
        credentials: &Credentials,
        name: &str,
        answer: StatusCode,
    ) -> Result<Self, HboneError> {
        let config = tls::server(credentials)?;
        let listener = at
            .run(|| {
                let listener = bind(on)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })?
            .map_err(io_error("listen"))?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            answer,
            seen: Mutex::default(),
            failed: Mutex::default(),
            connections: Mutex::default(),
        });
        let (control, orders) = watch::channel(Control::Serve);
        let _entered = runtime().enter();
        let listener = TcpListener::from_std(listener).map_err(io_error("watch the listener"))?;
        let accepting = Some(tokio::spawn(accept(listener, config, Arc::clone(&shared), orders)));
        Ok(Self { shared, control, accepting })
    }

    /// Every CONNECT so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.seen).clone()
    }

    /// Why handshakes or connections failed.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        lock(&self.shared.failed).clone()
    }

    /// Connections on which a handshake succeeded.
    #[must_use]
    pub fn connections(&self) -> usize {
        *lock(&self.shared.connections)
    }

    /// Send GOAWAY on every open connection; their streams may end in peace, new connections are served.
    pub fn go_away(&self) {
        self.control.send_modify(|control| {
            let round = if let Control::GoAway(round) = control { *round } else { 0 };
            *control = Control::GoAway(round + 1);
        });
    }
}

impl Drop for HboneServer {
    fn drop(&mut self) {
        self.control.send_replace(Control::Stop);
        // With it the listener goes, so that another can take its place.
        if let Some(accepting) = self.accepting.take() {
            drop(runtime().block_on(accepting));
        }
    }
}

/// Bind, waiting for a predecessor's descriptor: a process that another test is just starting holds a copy until it
/// executes its program.
fn bind(on: SocketAddr) -> io::Result<StdListener> {
    let deadline = Instant::now() + limit(PREDECESSOR_LIMIT);
    loop {
        match StdListener::bind(on) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return outcome,
        }
    }
}

async fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    shared: Arc<Shared>,
    mut orders: watch::Receiver<Control>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = orders.changed() => {
                if changed.is_err() || *orders.borrow() == Control::Stop {
                    return;
                }
                continue;
            }
        };
        let Ok((stream, from)) = accepted else { return };
        let (config, shared, orders) = (Arc::clone(&config), Arc::clone(&shared), orders.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, from, config, &shared, orders).await {
                lock(&shared.failed).push(error);
            }
        });
    }
}

async fn serve(
    stream: TcpStream,
    from: SocketAddr,
    config: Arc<ServerConfig>,
    shared: &Arc<Shared>,
    mut orders: watch::Receiver<Control>,
) -> Result<(), String> {
    let local = stream.local_addr().map_err(|error| error.to_string())?;
    let stream = TlsAcceptor::from(config).accept(stream).await.map_err(|error| error.to_string())?;
    let session = stream.get_ref().1;
    let peer = tls::identity(session.peer_certificates());
    let tls = session.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default();
    let alpn = String::from_utf8_lossy(session.alpn_protocol().unwrap_or_default()).into_owned();
    let number = {
        let mut connections = lock(&shared.connections);
        *connections += 1;
        *connections
    };
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 22);
    let mut connection = builder.handshake::<_, Bytes>(stream).await.map_err(|error| error.to_string())?;
    orders.mark_unchanged();
    loop {
        let (request, respond) = tokio::select! {
            request = connection.accept() => match request {
                None => return Ok(()),
                Some(request) => request.map_err(|error| error.to_string())?,
            },
            changed = orders.changed() => {
                if changed.is_err() || *orders.borrow() == Control::Stop {
                    return Ok(());
                }
                connection.graceful_shutdown();
                continue;
            }
        };
        let seen = Seen {
            peer: peer.clone(),
            from,
            tls: tls.clone(),
            alpn: alpn.clone(),
            method: request.method().to_string(),
            authority: request.uri().authority().map(ToString::to_string).unwrap_or_default(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| {
                    (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
                })
                .collect(),
            connection: number,
        };
        let identity = Identity { server: shared.name.clone(), accepted_from: from, peer: Some(from), local };
        lock(&shared.seen).push(seen);
        tokio::spawn(tunnel(request, respond, shared.answer, identity));
    }
}

/// One tunnel: `who` is answered with an identity, any other line with itself, the client's end with the server's.
async fn tunnel(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    answer: StatusCode,
    identity: Identity,
) {
    let mut response = Response::new(());
    *response.status_mut() = answer;
    let Ok(mut send) = respond.send_response(response, !answer.is_success()) else { return };
    if !answer.is_success() {
        return;
    }
    let mut receive = request.into_body();
    let mut left = BytesMut::new();
    while let Some(data) = receive.data().await {
        let Ok(data) = data else { return };
        if receive.flow_control().release_capacity(data.len()).is_err() {
            return;
        }
        left.extend_from_slice(&data);
        while let Some(end) = left.iter().position(|byte| *byte == b'\n') {
            let line = left.split_to(end + 1);
            let reply = if &line[..] == b"who\n" {
                let mut text = serde_json::to_vec(&identity).unwrap_or_default();
                text.push(b'\n');
                Bytes::from(text)
            } else {
                line.freeze()
            };
            if send_all(&mut send, reply).await.is_none() {
                return;
            }
        }
    }
    // Whoever reset the stream hears nothing more.
    drop(send.send_data(left.freeze(), true));
}

async fn send_all(send: &mut SendStream<Bytes>, mut rest: Bytes) -> Option<()> {
    while !rest.is_empty() {
        send.reserve_capacity(rest.len());
        let granted = std::future::poll_fn(|context| send.poll_capacity(context)).await?.ok()?;
        send.send_data(rest.split_to(granted.min(rest.len())), false).ok()?;
    }
    Some(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
