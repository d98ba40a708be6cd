//! Our half of TLS against rustls's, over loopback, in both roles.

use std::{net::TcpListener as StdListener, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::{Builder, LocalOptions},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    TlsError,
    handshake::{self, Established, HandshakeError},
    record::{CONTENT_MAX, HEADER, TRAILER},
    session::{Opened, Session},
};
use crate::stream::{Io, Stream};

/// A root and a certificate of it for 127.0.0.1, for both sides.
pub(crate) struct Pki {
    root: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let root_key = rcgen::KeyPair::generate().unwrap();
        let mut root = rcgen::CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root_certificate = root.self_signed(&root_key).unwrap();
        let issuer = rcgen::Issuer::new(root, root_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec!["0.0.0.0".into()]).unwrap();
        let certificate = leaf.signed_by(&key, &issuer).unwrap();
        Self {
            root: root_certificate.der().clone(),
            certificate: certificate.der().clone(),
            key: key.serialize_der(),
        }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        roots
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone().into())
    }

    pub(crate) fn client(&self, suite: SupportedCipherSuite) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(provider(suite))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(self.roots())
            .with_client_auth_cert(vec![self.certificate.clone()], self.key())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_secret_extraction = true;
        Arc::new(config)
    }

    pub(crate) fn server(&self, suite: SupportedCipherSuite, tickets: usize) -> Arc<ServerConfig> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()), provider(suite))
            .build()
            .unwrap();
        let mut config = ServerConfig::builder_with_provider(provider(suite))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.key())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = tickets;
        Arc::new(config)
    }
}

fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() })
}

pub(crate) const SUITES: [SupportedCipherSuite; 3] = [
    aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
    aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

fn run(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async { timeout(Duration::from_secs(180), test).await.expect("in time") });
}

/// Our end and the peer's end of a connection on loopback.
async fn sockets() -> (Stream, TcpStream) {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_nonblocking(true).unwrap();
    let (ours, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Stream::new(ours).unwrap(), TcpStream::from_std(peer).unwrap())
}

/// An established connection of ours with the bytes around it.
struct Ours {
    stream: Stream,
    session: Session,
    bytes: Vec<u8>,
}

impl Ours {
    async fn new(mut stream: Stream, established: Established) -> Self {
        let Established { session, unsent, rest, peer } = established;
        assert_eq!(peer.len(), 1);
        write(&mut stream, &unsent).await;
        Self { stream, session, bytes: rest }
    }

    async fn send(&mut self, content: &[u8]) {
        if let Some(update) = self.session.before_batch().unwrap() {
            write(&mut self.stream, &update).await;
        }
        let mut record = [vec![0; HEADER], content.to_vec(), vec![0; TRAILER]].concat();
        self.session.seal(&mut record).unwrap();
        write(&mut self.stream, &record).await;
    }

    /// The next data of the peer; `None` at its end.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, TlsError> {
        loop {
            let opened = self.session.open(&mut self.bytes)?;
            match opened {
                Opened::Data { range, end } => {
                    let data = self.bytes[range].to_vec();
                    self.bytes.drain(..end);
                    return Ok(Some(data));
                }
                Opened::Silent { end } => drop(self.bytes.drain(..end)),
                Opened::Closed => return Ok(None),
                Opened::Partial => {
                    let mut buf = [0; 5000];
                    match self.stream.read(&mut buf).unwrap() {
                        Io::Bytes(count) => {
                            assert_ne!(count, 0, "ended without close_notify");
                            self.bytes.extend_from_slice(&buf[..count]);
                        }
                        Io::Blocked => handshake::wait(&mut self.stream, Stream::is_readable).await,
                    }
                }
            }
        }
    }

    async fn exactly(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.next().await.unwrap().expect("more data"));
        }
        all
    }
}

async fn write(stream: &mut Stream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match stream.write(bytes).unwrap() {
            Io::Bytes(count) => bytes = &bytes[count..],
            Io::Blocked => handshake::wait(stream, Stream::is_writable).await,
        }
    }
}

async fn our_server(
    pki: &Pki,
    suite: SupportedCipherSuite,
) -> (Ours, tokio_rustls::client::TlsStream<TcpStream>) {
    let (mut stream, peer) = sockets().await;
    let name = ServerName::try_from("0.0.0.0").unwrap();
    let connector = TlsConnector::from(pki.client(suite));
    // The client's first data goes out right behind its handshake, into the same read of ours.
    let theirs = async {
        let mut theirs = connector.connect(name, peer).await.unwrap();
        theirs.write_all(b"early").await.unwrap();
        theirs
    };
    let (established, theirs) = tokio::join!(
        async {
            let established = handshake::server(&mut stream, pki.server(suite, 0)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
            established
        },
        theirs
    );
    let mut ours = Ours::new(stream, established).await;
    assert_eq!(ours.exactly(5).await, b"early");
    (ours, theirs)
}

async fn our_client(
    pki: &Pki,
    suite: SupportedCipherSuite,
    tickets: usize,
) -> (Ours, tokio_rustls::server::TlsStream<TcpStream>) {
    let (mut stream, peer) = sockets().await;
    let acceptor = TlsAcceptor::from(pki.server(suite, tickets));
    let (ours, theirs) = tokio::join!(
        async {
            let established = handshake::client(&mut stream, pki.client(suite)).await.unwrap();
            let mut ours = Ours::new(stream, established).await;
            ours.send(b"first").await;
            ours
        },
        async {
            let mut theirs = acceptor.accept(peer).await.unwrap();
            let mut first = [0; 5];
            theirs.read_exact(&mut first).await.unwrap();
            assert_eq!(&first, b"first");
            theirs
        }
    );
    (ours, theirs)
}

#[test]
fn both_roles_exchange_data_with_rustls_under_every_cipher() {
    run(async {
        let pki = Pki::new();
        let large: Vec<u8> = (0..CONTENT_MAX).map(|at| (at % 251) as u8).collect();
        for suite in SUITES {
            let (mut ours, mut theirs) = our_server(&pki, suite).await;
            ours.send(&large).await;
            let mut got = vec![0; large.len()];
            theirs.read_exact(&mut got).await.unwrap();
            assert_eq!(got, large);
            theirs.write_all(&large).await.unwrap();
            assert_eq!(ours.exactly(large.len()).await, large);

            // Session tickets come first and are not for us.
            let (mut ours, mut theirs) = our_client(&pki, suite, 2).await;
            theirs.write_all(&large).await.unwrap();
            assert_eq!(ours.exactly(large.len()).await, large);
            ours.send(b"bye").await;
            theirs.read_exact(&mut [0; 3]).await.unwrap();
        }
    });
}

#[test]
fn the_end_of_data_is_told_apart_from_a_cut_in_both_directions() {
    run(async {
        let pki = Pki::new();
        let (mut ours, mut theirs) = our_server(&pki, SUITES[0]).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.next().await, Ok(None));
        assert_eq!(ours.next().await, Ok(None));
        let end = ours.session.close_notify().unwrap();
        write(&mut ours.stream, &end).await;
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);

        let (ours, mut theirs) = our_server(&pki, SUITES[0]).await;
        drop(ours);
        assert_eq!(theirs.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn keys_are_updated_by_either_side() {
    run(async {
        let pki = Pki::new();
        for suite in SUITES {
            let (mut ours, mut theirs) = our_client(&pki, suite, 0).await;
            for round in 0..3_u8 {
                theirs.get_mut().1.refresh_traffic_keys().unwrap();
                theirs.write_all(&[round; 9]).await.unwrap();
                assert_eq!(ours.exactly(9).await, [round; 9]);
                // The next batch is past our own limit.
                ours.session.refresh_after(1);
                ours.send(&[round; 5]).await;
                ours.session.refresh_after(u64::MAX);
                let mut got = [9; 5];
                theirs.read_exact(&mut got).await.unwrap();
                assert_eq!(got, [round; 5]);
            }
        }
    });
}

#[test]
fn a_peers_request_for_our_update_is_answered_once() {
    run(async {
        let pki = Pki::new();
        let (mut client, mut server) = pair(&pki).await;
        for _ in 0..3 {
            let request = client.session.sealed_key_update(1).unwrap();
            write(&mut client.stream, &request).await;
        }
        client.send(b"x").await;
        assert_eq!(server.exactly(1).await, b"x");
        assert!(server.session.owes_update());
        server.send(b"y").await;
        assert!(!server.session.owes_update());
        assert!(server.session.before_batch().unwrap().is_none());
        assert_eq!(client.exactly(1).await, b"y");
    });
}

#[test]
fn floods_of_records_without_data_end_the_connection() {
    run(async {
        let pki = Pki::new();
        let (mut client, mut server) = pair(&pki).await;
        for _ in 0..200 {
            let request = client.session.sealed_key_update(1).unwrap();
            write(&mut client.stream, &request).await;
        }
        assert_eq!(server.next().await, Err(TlsError::Flood));
    });
}

#[test]
fn garbage_behind_the_handshake_is_refused() {
    run(async {
        let pki = Pki::new();
        for (garbage, error) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], TlsError::Unexpected),
            (&[23, 3, 3, 0x50, 0], TlsError::RecordSize),
            (
                &[23, 3, 3, 0, 17, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
                TlsError::BadRecord,
            ),
        ] {
            let (mut ours, mut theirs) = our_server(&pki, SUITES[0]).await;
            theirs.get_mut().0.write_all(garbage).await.unwrap();
            assert_eq!(ours.next().await, Err(error));
            // The peer learns why.
            let alert = ours.session.fatal(error.alert().unwrap()).unwrap();
            write(&mut ours.stream, &alert).await;
            assert!(theirs.read(&mut [0]).await.unwrap_err().to_string().contains("alert"));
        }
    });
}

#[test]
fn a_handshake_that_is_none_fails_with_its_own_reason() {
    run(async {
        let pki = Pki::new();
        let config = pki.server(SUITES[0], 0);
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "does not speak TLS"),
            (b"\x16\x03", "closed the connection"),
            (b"", "closed the connection"),
            (b"\x16\x02\x00", "does not speak TLS"),
        ] {
            let (mut stream, mut peer) = sockets().await;
            peer.write_all(bytes).await.unwrap();
            peer.shutdown().await.unwrap();
            let error = handshake::server(&mut stream, Arc::clone(&config)).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }

        // Another protocol than h2.
        let (mut stream, peer) = sockets().await;
        let mut other = (*pki.client(SUITES[0])).clone();
        other.alpn_protocols = Vec::new();
        let connector = TlsConnector::from(Arc::new(other));
        let (error, _) = tokio::join!(
            handshake::server(&mut stream, Arc::clone(&config)),
            connector.connect(ServerName::try_from("0.0.0.0").unwrap(), peer)
        );
        assert!(matches!(error, Err(HandshakeError::Alpn)), "{error:?}");

        // A stranger's certificate, and the alert that tells it.
        let (mut stream, peer) = sockets().await;
        let connector = TlsConnector::from(Pki::new().client(SUITES[0]));
        let (error, told) = tokio::join!(
            handshake::server(&mut stream, config),
            connector.connect(ServerName::try_from("0.0.0.0").unwrap(), peer)
        );
        assert!(told.is_err());
        assert!(matches!(error, Err(HandshakeError::Tls(_))), "{error:?}");
    });
}

async fn pair(pki: &Pki) -> (Ours, Ours) {
    let (mut stream, peer) = sockets().await;
    let mut other = Stream::new(peer.into_std().unwrap()).unwrap();
    let (client, server) = tokio::join!(
        async {
            let established = handshake::client(&mut stream, pki.client(SUITES[0])).await.unwrap();
            Ours::new(stream, established).await
        },
        async { handshake::server(&mut other, pki.server(SUITES[0], 0)).await.unwrap() }
    );
    let server = Ours::new(other, server).await;
    (client, server)
}
