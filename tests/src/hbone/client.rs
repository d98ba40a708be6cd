//! The client: one TLS connection is a [`Session`], each CONNECT on it a [`Tunnel`].

use std::io;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{PingPong, Reason, RecvStream, SendStream};
use http::{Method, Request, Uri, Version};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{HboneError, http2_error, io_error, runtime, tls, within};
use crate::authority::Credentials;
use crate::place::Place;
use crate::protocol::Identity;
use crate::waiting::limit;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connection to an HBONE listener. Dropping it, and all its tunnels, ends the connection.
#[derive(Debug)]
pub struct Session {
    sender: Mutex<SendRequest<Bytes>>,
    ping: Mutex<PingPong>,
    identity: String,
    local: SocketAddr,
}

/// A CONNECT to be sent.
#[derive(Debug, Clone)]
pub struct Connect {
    method: Method,
    authority: String,
    headers: Vec<(String, String)>,
}

impl Connect {
    /// CONNECT with this `:authority`.
    #[must_use]
    pub fn to(authority: impl ToString) -> Self {
        Self { method: Method::CONNECT, authority: authority.to_string(), headers: Vec::new() }
    }

    /// One more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another method than CONNECT.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    fn request(&self) -> Result<Request<()>, HboneError> {
        let uri = if self.method == Method::CONNECT {
            Uri::builder().authority(self.authority.as_str()).build()?
        } else {
            Uri::builder().scheme("https").authority(self.authority.as_str()).path_and_query("/").build()?
        };
        let mut request = Request::builder().method(self.method.clone()).uri(uri).version(Version::HTTP_2);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        Ok(request.body(())?)
    }
}

fn connect(to: SocketAddr) -> io::Result<StdStream> {
    let stream = StdStream::connect_timeout(&to, limit(CONNECT_LIMIT))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

impl Session {
    /// Connect from inside `from`, show these credentials, and wait for the server's first answer, so that a
    /// refused certificate is an error here.
    ///
    /// # Errors
    /// [`HboneError::is_tls`] when the handshake failed.
    pub fn open(from: &Place, to: SocketAddr, credentials: &Credentials) -> Result<Self, HboneError> {
        Self::with_tls(from, to, tls::client(credentials)?)
    }

    /// As [`Session::open`], showing no certificate.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open_anonymously(
        from: &Place,
        to: SocketAddr,
        credentials: &Credentials,
    ) -> Result<Self, HboneError> {
        Self::with_tls(from, to, tls::anonymous_client(credentials)?)
    }

    /// As [`Session::open_anonymously`], from the namespace that the test itself is in.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open_anonymously_here(to: SocketAddr, credentials: &Credentials) -> Result<Self, HboneError> {
        let stream = connect(to).map_err(io_error("connect"))?;
        within("the TLS handshake", Self::over(stream, to, tls::anonymous_client(credentials)?))
    }

    fn with_tls(from: &Place, to: SocketAddr, config: Arc<ClientConfig>) -> Result<Self, HboneError> {
        let stream = from.run(|| connect(to))?.map_err(io_error("connect"))?;
        within("the TLS handshake", Self::over(stream, to, config))
    }

    async fn over(stream: StdStream, to: SocketAddr, config: Arc<ClientConfig>) -> Result<Self, HboneError> {
        let stream = TcpStream::from_std(stream).map_err(io_error("watch the socket"))?;
        let local = stream.local_addr().map_err(io_error("name the socket"))?;
        let connector = TlsConnector::from(config);
        let stream = connector.connect(ServerName::IpAddress(to.ip().into()), stream).await;
        let stream = stream.map_err(io_error("shake hands"))?;
        let identity = tls::identity(stream.get_ref().1.peer_certificates());
        let handshake = h2::client::Builder::new().enable_push(false).handshake(stream).await;
        let (sender, mut connection) = handshake.map_err(http2_error("begin HTTP/2"))?;
        let ping = connection.ping_pong();
        tokio::spawn(async move {
            // How it ends shows in each of its streams.
            drop(connection.await);
        });
        let mut ping = ping.ok_or_else(|| HboneError::Gibberish("no ping".to_owned()))?;
        ping.ping(h2::Ping::opaque()).await.map_err(http2_error("the first round trip"))?;
        Ok(Self { sender: Mutex::new(sender), ping: Mutex::new(ping), identity, local })
    }

    /// The server's SPIFFE identity.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// This end of the connection.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Open a tunnel.
    ///
    /// # Errors
    /// [`HboneError::Refused`] with the status; others when the connection has ended.
    pub fn connect(&self, connect: &Connect) -> Result<Tunnel, HboneError> {
        let request = connect.request()?;
        let sender = self.sender();
        within("an answer to CONNECT", async {
            let mut sender = sender.ready().await.map_err(http2_error("open a stream"))?;
            let sent = sender.send_request(request, false);
            let (answer, send) = sent.map_err(http2_error("send CONNECT"))?;
            let answer = answer.await.map_err(http2_error("wait for an answer to CONNECT"))?;
            if !answer.status().is_success() {
                let authority = connect.authority.clone();
                return Err(HboneError::Refused { authority, status: answer.status().as_u16() });
            }
            Ok(Tunnel { send, receive: answer.into_body(), left: BytesMut::new() })
        })
    }

    pub(super) fn sender(&self) -> SendRequest<Bytes> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A round trip of the connection itself.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn ping(&self) -> Result<(), HboneError> {
        let mut ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner);
        within("a pong", async {
            ping.ping(h2::Ping::opaque()).await.map_err(http2_error("ping"))?;
            Ok(())
        })
    }
}

/// An open tunnel: bytes both ways, ends of its own each way.
#[derive(Debug)]
pub struct Tunnel {
    send: SendStream<Bytes>,
    receive: RecvStream,
    left: BytesMut,
}

impl Tunnel {
    /// Send all of `bytes`, as flow control allows.
    ///
    /// # Errors
    /// When the tunnel has ended.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), HboneError> {
        let mut rest = Bytes::copy_from_slice(bytes);
        let send = &mut self.send;
        within("room to send", async {
            while rest.has_remaining() {
                send.reserve_capacity(rest.len());
                let granted = std::future::poll_fn(|context| send.poll_capacity(context)).await;
                let ended = || http2_error("send")(Reason::CANCEL.into());
                let granted = granted.ok_or_else(ended)?.map_err(http2_error("send"))?;
                let part = rest.split_to(granted.min(rest.len()));
                send.send_data(part, false).map_err(http2_error("send"))?;
            }
            Ok(())
        })
    }

    /// End this direction.
    ///
    /// # Errors
    /// When the tunnel has ended.
    pub fn finish(&mut self) -> Result<(), HboneError> {
        self.send.send_data(Bytes::new(), true).map_err(http2_error("finish"))
    }

    /// RST_STREAM.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CANCEL);
        // The connection's task sends it; this wakes it now instead of at the next frame.
        drop(runtime().enter());
    }

    /// Receive one line without its line feed; what came before the end if it ends first.
    ///
    /// # Errors
    /// When the tunnel is reset or nothing comes in time.
    pub fn receive_line(&mut self) -> Result<String, HboneError> {
        loop {
            if let Some(end) = self.left.iter().position(|byte| *byte == b'\n') {
                let line = self.left.split_to(end);
                self.left.advance(1);
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            if !self.receive_more()? {
                return Ok(String::from_utf8_lossy(&self.left.split()).into_owned());
            }
        }
    }

    /// Receive to the orderly end.
    ///
    /// # Errors
    /// When the tunnel is reset or nothing comes in time.
    pub fn receive_to_end(&mut self) -> Result<Vec<u8>, HboneError> {
        while self.receive_more()? {}
        Ok(self.left.split().to_vec())
    }

    /// Ask a [`crate::protocol::Serve::Lines`] server who it is.
    ///
    /// # Errors
    /// As [`Tunnel::send`] and [`Tunnel::receive_line`].
    pub fn who(&mut self) -> Result<Identity, HboneError> {
        self.send(b"who\n")?;
        let line = self.receive_line()?;
        serde_json::from_str(&line).map_err(|_| HboneError::Gibberish(line))
    }

    /// Whether there was more before the orderly end.
    fn receive_more(&mut self) -> Result<bool, HboneError> {
        let (receive, left) = (&mut self.receive, &mut self.left);
        within("bytes of the tunnel", async {
            let Some(data) = receive.data().await else { return Ok(false) };
            let data = data.map_err(http2_error("receive"))?;
            let released = receive.flow_control().release_capacity(data.len());
            released.map_err(http2_error("open the window"))?;
            left.extend_from_slice(&data);
            Ok(true)
        })
    }
}
