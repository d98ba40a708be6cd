//! One question over TLS, as an app would ask it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// No step takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// Says hello to a server that must be `name`, and returns what it answers until its end.
pub(crate) fn ask(to: SocketAddr, name: String, roots: &Path) -> anyhow::Result<String> {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(roots)? {
        store.add(root?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), ServerName::try_from(name)?)?;
    let socket = TcpStream::connect_timeout(&to, LIMIT)?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut stream = StreamOwned::new(client, socket);
    stream.write_all(b"hello\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
