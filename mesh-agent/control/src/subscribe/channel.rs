//! Owns how the agent reaches the controller: one TLS connection that carries the stream and requests for certificates.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_identity::peer::PeerRefusal;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    codegen::{
        Service,
        http::{Uri, uri::Scheme},
    },
    transport::{Channel, Endpoint},
};

use crate::link::{KEEPALIVE_EACH, KEEPALIVE_WITHIN};

/// How long a connection may take to be there, its handshake included.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Port of a URL that names none.
const DEFAULT_PORT: u16 = 15012;

/// Why a text is no address of a controller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the URL of a controller such as https://10.0.0.1:15012")]
pub struct UrlError(String);

/// Where a controller is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerUrl {
    authority: String,
}

impl ControllerUrl {
    /// Reads `https://HOST[:PORT]`.
    ///
    /// # Errors
    /// Anything else; above all `http`, for what the controller says must not be forged.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let bad = || UrlError(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
        let bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        let user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        if uri.scheme() != Some(&Scheme::HTTPS) || !bare || user {
            return Err(bad());
        }
        Ok(Self { authority: format!("{host}:{}", uri.port_u16().unwrap_or(DEFAULT_PORT)) })
    }

    /// The host: a name or an address.
    pub fn host(&self) -> &str {
        let host = self.authority.rsplit_once(':').map_or(&*self.authority, |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(DEFAULT_PORT)
    }
}

impl fmt::Display for ControllerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority)
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL.
    #[error("the controller's address")]
    Address(#[source] tonic::transport::Error),
    /// No connection, or a handshake that failed: the cause says whose fault it is.
    #[error("connect to {0}")]
    Connect(String, #[source] tonic::transport::Error),
}

/// Connects, with a handshake by `tls`; `name` is what the server is called, if not as in the URL.
///
/// # Errors
/// No connection, or a handshake that failed.
pub async fn connect(
    url: &ControllerUrl,
    tls: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
) -> Result<Channel, ConnectError> {
    // TLS is ours to do, so for tonic the scheme is a plain one.
    let endpoint =
        Endpoint::from_shared(format!("http://{}", url.authority)).map_err(ConnectError::Address)?;
    endpoint
        .http2_keep_alive_interval(KEEPALIVE_EACH)
        .keep_alive_timeout(KEEPALIVE_WITHIN)
        .keep_alive_while_idle(true)
        .connect_timeout(CONNECT_WITHIN)
        .connect_with_connector(Connector { authority: url.authority.clone(), tls, name })
        .await
        .map_err(|error| ConnectError::Connect(url.to_string(), error))
}

/// Makes TLS connections to one address.
struct Connector {
    authority: String,
    tls: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let (authority, tls, name) = (self.authority.clone(), Arc::clone(&self.tls), self.name.clone());
        Box::pin(async move {
            let stream = TcpStream::connect(&authority).await?;
            stream.set_nodelay(true)?;
            let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            // A server that is known by its identity needs a name for the protocol's form only.
            let name = match name {
                Some(name) => name,
                None => ServerName::try_from(host).map_err(io::Error::other)?,
            };
            let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|error| match error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            {
                Some(cause) => io::Error::new(error.kind(), PeerRefusal::of(cause)),
                None => error,
            })?;
            Ok(TokioIo::new(stream))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_named_by_a_url_with_or_without_a_port() {
        for (text, shown) in [
            ("https://10.0.0.1", "https://10.0.0.1:15012"),
            ("https://10.0.0.1:1234/", "https://10.0.0.1:1234"),
            ("https://[fd00::1]:15012", "https://[fd00::1]:15012"),
            ("https://istiod.istio-system.svc", "https://istiod.istio-system.svc:15012"),
        ] {
            let url = ControllerUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
        }
        assert_eq!(ControllerUrl::parse("https://[fd00::1]:7").unwrap().port(), 7);
    }

    #[test]
    fn a_controller_without_tls_is_none() {
        for text in
            ["http://10.0.0.1", "10.0.0.1:15012", "", "https://", "https://a/b", "https://u@a", "unix:///x"]
        {
            assert!(ControllerUrl::parse(text).is_err(), "{text}");
        }
    }
}
