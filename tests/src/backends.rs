//! Servers that know nothing of a mesh and want what policies promise them: TLS, a PROXY header, a CONNECT.
//!
//! Sockets are made inside a [`Place`]'s namespace by the test process itself, so nothing redirects them; put them into pods
//! that have opted out. Each server ends with its value.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::hbone::runtime;
use crate::place::Place;
use crate::programs;
use crate::verdict::Failure;
use crate::waiting::limit;

/// No step of a server's end takes longer.
const STEP: Duration = Duration::from_secs(2);

/// Bytes of a question.
const QUESTION_MAX: usize = 16 << 10;

/// A listening server.
#[derive(Debug)]
pub struct Backend(JoinHandle<()>);

impl Drop for Backend {
    fn drop(&mut self) {
        self.0.abort();
        // Its port is free again when this is over.
        let by = Instant::now() + limit(STEP);
        while !self.0.is_finished() && Instant::now() < by {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// An authority and what it signs, in PEM.
#[derive(Debug)]
pub struct WebAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub certificate: String,
}

/// A certificate and its key, in PEM.
#[derive(Debug, Clone)]
pub struct WebCertificate {
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
}

impl WebAuthority {
    /// A new one.
    ///
    /// # Errors
    /// When a key or certificate cannot be made.
    pub fn new(name: &str) -> Result<Self, Failure> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// A certificate for a DNS name.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn issue(&self, name: &str) -> Result<WebCertificate, Failure> {
        let params = CertificateParams::new(vec![name.to_owned()])?;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(WebCertificate { certificate, key: key.serialize_pem() })
    }

    fn roots(&self) -> Result<RootCertStore, Failure> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.certificate.as_bytes())?)?;
        Ok(roots)
    }
}

/// A TLS server: answers whatever it is asked first with `NAME sni=SERVER-NAME client=yes|no`, to a GET as the body of a
/// response. With an authority for `clients` it wants one of theirs.
///
/// # Errors
/// When it cannot listen, or the certificate is none.
pub fn serve_tls(
    place: &Place,
    port: u16,
    name: &str,
    own: &WebCertificate,
    clients: Option<&WebAuthority>,
) -> Result<Backend, Failure> {
    let provider = Arc::new(default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => builder.with_client_cert_verifier(
            WebPkiClientVerifier::builder_with_provider(Arc::new(authority.roots()?), provider).build()?,
        ),
    };
    let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes())?];
    let config = builder.with_single_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes())?)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let name = name.to_owned();
    serve(place, port, move |socket| {
        let (acceptor, name) = (acceptor.clone(), name.clone());
        async move {
            let mut stream = acceptor.accept(socket).await?;
            let tls = stream.get_ref().1;
            let sni = tls.server_name().unwrap_or("-");
            let client = if tls.peer_certificates().is_some() { "yes" } else { "no" };
            let text = format!("{name} sni={sni} client={client}\n");
            answer(&mut stream, &text).await
        }
    })
}

/// A server that answers with what it read up to the word `ping`, bytes that are no text escaped; to a GET as the body of a
/// response.
///
/// # Errors
/// When it cannot listen.
pub fn serve_echo(place: &Place, port: u16) -> Result<Backend, Failure> {
    serve(place, port, |mut socket| async move {
        let read =
            question(&mut socket, |read| find(read, b"ping").is_some() || find(read, b"\r\n\r\n").is_some());
        let read = read.await?;
        let text = format!("{}\n", read.escape_ascii());
        say(&mut socket, &read, &text).await
    })
}

/// An HTTP proxy that knows CONNECT, for targets that `place` can reach.
///
/// # Errors
/// When it cannot listen.
pub fn serve_connect(place: &Place, port: u16) -> Result<Backend, Failure> {
    let from = place.clone();
    serve(place, port, move |mut socket| {
        let from = from.clone();
        async move {
            let is_other = |read: &[u8]| !b"CONNECT ".starts_with(&read[..read.len().min(8)]);
            let head = question(&mut socket, |read| read.ends_with(b"\r\n\r\n") || is_other(read)).await?;
            let head = String::from_utf8_lossy(&head).into_owned();
            let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()?.parse().ok());
            let Some(target) = target else {
                return socket.write_all(b"HTTP/1.1 405 No\r\ncontent-length: 0\r\n\r\n").await;
            };
            let dial = move || from.run(|| StdStream::connect::<SocketAddr>(target));
            let dialled = tokio::task::spawn_blocking(dial).await.map_err(io::Error::other)?;
            let server = dialled.map_err(io::Error::other)??;
            server.set_nonblocking(true)?;
            let mut server = TcpStream::from_std(server)?;
            socket.write_all(b"HTTP/1.1 200 OK\r\nvia: 1.1 proxy\r\n\r\n").await?;
            tokio::io::copy_bidirectional(&mut socket, &mut server).await.map(drop)
        }
    })
}

/// Says hello over TLS from a pod, as an app there would: to the server `name` at `to`, trusting `roots` (a PEM file). What
/// it answers.
///
/// # Errors
/// The program fails: the text of the error is what it printed.
pub fn ask_tls(place: &Place, to: SocketAddr, name: &str, roots: &Path) -> Result<String, Failure> {
    let mut command = Command::new(programs::pod_tool()?);
    command.arg("tls").arg(to.to_string()).arg(name).arg(roots).stdin(Stdio::null()).stdout(Stdio::piped());
    let output = place.spawn(command)?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(anyhow::anyhow!("no answer of {name}: {text}").into())
    }
}

fn serve<F>(
    place: &Place,
    port: u16,
    each: impl Fn(TcpStream) -> F + Send + Sync + 'static,
) -> Result<Backend, Failure>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let bind = || place.run(|| StdListener::bind((std::net::Ipv4Addr::UNSPECIFIED, port)));
    let by = Instant::now() + limit(STEP);
    // A process that another test starts has the sockets of this one until it runs its own program.
    let listener = loop {
        match bind()? {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < by => {
                std::thread::sleep(Duration::from_millis(5));
            }
            bound => break bound?,
        }
    };
    listener.set_nonblocking(true)?;
    let task = runtime().spawn(async move {
        let Ok(listener) = TcpListener::from_std(listener) else { return };
        let each = Arc::new(each);
        while let Ok((socket, _)) = listener.accept().await {
            // What a client breaks is its own business.
            drop(tokio::spawn(each(socket)));
        }
    });
    Ok(Backend(task))
}

async fn question<T: AsyncRead + Unpin>(io: &mut T, is_whole: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    while !is_whole(&read) && read.len() < QUESTION_MAX {
        if io.read_buf(&mut read).await? == 0 {
            break;
        }
    }
    Ok(read)
}

async fn answer<T: AsyncRead + AsyncWrite + Unpin>(io: &mut T, text: &str) -> io::Result<()> {
    let read = question(io, |read| read.ends_with(b"\n")).await?;
    say(io, &read, text).await
}

async fn say<T: AsyncWrite + Unpin>(io: &mut T, read: &[u8], text: &str) -> io::Result<()> {
    if find(read, b"GET /").is_some() {
        let length = text.len();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        io.write_all(head.as_bytes()).await?;
    }
    io.write_all(text.as_bytes()).await?;
    io.shutdown().await
}

fn find(read: &[u8], what: &[u8]) -> Option<usize> {
    read.windows(what.len()).position(|window| window == what)
}
