//! Connections that are relayed.

use std::time::Duration;

use mesh_core::{
    identity::Identity,
    route::{
        cluster::{ConnectTunnel, ProxyProtocol},
        matching::StringMatch,
    },
};
use mesh_identity::PeerError;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    time::Instant,
};

use super::*;
use crate::{
    close::CloseReason,
    kernel::LocalPeer,
    tests::fixture::{certificates, soon},
};

const HOST: &str = "web.default.svc.cluster.local";

/// Sends back what it reads, until the end.
async fn echo(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let (mut read, mut write) = tokio::io::split(stream);
    tokio::io::copy(&mut read, &mut write).await.ok();
    write.shutdown().await.ok();
}

/// Whether bytes come back through it, to the very end.
async fn is_carried(client: &mut TcpStream) -> bool {
    let sent = vec![7_u8; 100_000];
    let (mut read, mut write) = client.split();
    let send = async {
        write.write_all(&sent).await?;
        write.shutdown().await
    };
    let mut heard = Vec::new();
    let (sent_well, heard_well) = soon(async { tokio::join!(send, read.read_to_end(&mut heard)) }).await;
    sent_well.is_ok() && heard_well.is_ok() && heard == sent
}

struct Tls {
    folder: Folder,
    authority: Authority,
    roots: Arc<str>,
}

impl Tls {
    fn new() -> Self {
        let (folder, authority) = (Folder::new(), Authority::new("root"));
        let roots = folder.file("ca.pem", &authority.pem);
        Self { folder, authority, roots }
    }

    async fn server(
        &self,
        names: &[&str],
        shape: impl FnOnce(&mut CertificateParams),
    ) -> (SocketAddr, Notes) {
        serve(acceptor(self.authority.issue(names, shape), None), echo).await
    }
}

#[test]
fn a_plain_connection_becomes_tls_to_the_right_server() {
    test(|world| async move {
        let tls = Tls::new();
        let (addr, notes) = tls.server(&[HOST], |_| {}).await;
        publish(&world, "tcp", addr, |policy| policy.tls = Some(simple(&tls.roots)));
        assert!(is_carried(&mut connect(&world).await).await);
        let sni = notes.borrow()[0].sni.clone();
        assert_eq!(sni.as_deref(), Some(HOST), "without sni it is the service's own name");
        world.ended(CloseReason::Finished, 1).await;
        let named = ClientTls { sni: Some("api.example.com".into()), ..simple(&tls.roots) };
        let (addr, notes) = tls.server(&["*.example.com"], |_| {}).await;
        publish(&world, "tcp", addr, |policy| policy.tls = Some(named));
        assert!(is_carried(&mut connect(&world).await).await);
        let shown = Shown { sni: Some("api.example.com".into()), alpn: None, has_certificate: false };
        assert_eq!(notes.borrow()[0], shown);
    });
}

#[test]
fn a_server_that_is_not_verified_gets_nothing() {
    test(|world| async move {
        let tls = Tls::new();
        let long_ago = |params: &mut CertificateParams| {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        };
        let stranger = Authority::new("stranger");
        let refused = [
            (tls.server(&["other.example.com"], |_| {}).await, PeerError::WrongIdentity),
            (tls.server(&[HOST], long_ago).await, PeerError::Expired),
            (serve(acceptor(stranger.issue(&[HOST], |_| {}), None), echo).await, PeerError::UnknownIssuer),
        ];
        for ((addr, _), reason) in refused {
            publish(&world, "tcp", addr, |policy| policy.tls = Some(simple(&tls.roots)));
            let mut client = connect(&world).await;
            client.write_all(b"secret").await.unwrap();
            assert!(soon(client.read(&mut [0])).await.is_err(), "{reason:?}");
            world.ended(CloseReason::Tls(reason), 1).await;
        }
        // Without verification each of them will do.
        let (addr, _) = serve(acceptor(stranger.issue(&["x.y"], long_ago), None), echo).await;
        let trusting = ClientTls { insecure_skip_verify: true, ca_certificates: None, ..simple(&tls.roots) };
        publish(&world, "tcp", addr, |policy| policy.tls = Some(trusting));
        assert!(is_carried(&mut connect(&world).await).await);
    });
}

#[test]
fn a_server_whose_certificate_is_revoked_or_unknown_to_the_lists_gets_nothing() {
    test(|world| async move {
        let tls = Tls::new();
        let stranger = Authority::new("stranger");
        let numbered =
            |number: u64| move |params: &mut CertificateParams| params.serial_number = Some(number.into());
        let (good, _) = tls.server(&[HOST], numbered(1)).await;
        let (bad, _) = tls.server(&[HOST], numbered(2)).await;
        let lists = [
            ("of both", tls.authority.revocations(&[2], 2100) + &stranger.revocations(&[1], 2100)),
            ("of another", stranger.revocations(&[], 2100)),
            ("ended", tls.authority.revocations(&[2], 2002)),
            ("broken", "no list at all".to_owned()),
        ];
        let wanted = [
            ("of both", good, None),
            ("of both", bad, Some((CloseReason::Tls(PeerError::Revoked), 1))),
            ("of another", good, Some((CloseReason::Tls(PeerError::Handshake), 1))),
            ("ended", good, Some((CloseReason::Tls(PeerError::Handshake), 2))),
            ("broken", good, Some((CloseReason::TlsSetup, 1))),
        ];
        for (name, addr, refusal) in wanted {
            let (_, list) = lists.iter().find(|(known, _)| *known == name).unwrap();
            let file = tls.folder.file(&format!("{name}.pem"), list);
            publish(&world, "tcp", addr, |policy| {
                policy.tls = Some(ClientTls { ca_crl: Some(file), ..simple(&tls.roots) });
            });
            let mut client = connect(&world).await;
            match refusal {
                None => assert!(is_carried(&mut client).await, "{name}"),
                Some((reason, so_far)) => {
                    client.write_all(b"secret").await.unwrap();
                    assert!(soon(client.read(&mut [0])).await.is_err(), "{name}");
                    world.ended(reason, so_far).await;
                }
            }
        }
    });
}

#[test]
fn a_server_without_tls_or_without_a_word_gets_nothing() {
    test(|world| async move {
        let tls = Tls::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        publish(&world, "tcp", addr, |policy| {
            policy.tls = Some(simple(&tls.roots));
            policy.pool.connect_timeout = Duration::from_millis(300);
        });
        let mut client = connect(&world).await;
        client.write_all(b"secret").await.unwrap();
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        server.write_all(b"220 mail.example.com ESMTP\r\n").await.unwrap();
        assert!(soon(client.read(&mut [0])).await.is_err());
        world.ended(CloseReason::Tls(PeerError::NotTls), 1).await;
        let mut client = connect(&world).await;
        client.write_all(b"secret").await.unwrap();
        let (mut silent, _) = soon(listener.accept()).await.unwrap();
        assert!(soon(client.read(&mut [0])).await.is_err());
        world.ended(CloseReason::TlsTimeout, 1).await;
        let mut seen = Vec::new();
        silent.read_to_end(&mut seen).await.ok();
        assert!(seen.starts_with(b"\x16\x03") && !seen.windows(6).any(|six| six == b"secret"));
    });
}

#[test]
fn other_names_are_as_good_as_the_server_name_if_the_policy_says_so() {
    test(|world| async move {
        let tls = Tls::new();
        let spiffe = "spiffe://cluster.local/ns/a/sa/b";
        let (addr, _) = tls.server(&[spiffe, "real.example.com", "192.0.2.7"], |_| {}).await;
        let exact = |name: &str| StringMatch::Exact(name.into());
        let cases = [
            (vec![exact(spiffe)], true),
            (vec![exact("no.example.com"), exact("real.example.com")], true),
            (vec![exact("192.0.2.7")], true),
            (vec![StringMatch::Prefix("spiffe://cluster.local/".into())], true),
            (vec![StringMatch::Prefix("spiffe://other/".into())], false),
            (vec![exact(HOST)], false),
        ];
        for (names, fits) in cases {
            let wanted = ClientTls { subject_alt_names: names.clone(), ..simple(&tls.roots) };
            publish(&world, "tcp", addr, |policy| policy.tls = Some(wanted));
            assert_eq!(is_carried(&mut connect(&world).await).await, fits, "{names:?}");
        }
    });
}

#[test]
fn mutual_tls_shows_the_policys_certificate() {
    test(|world| async move {
        let tls = Tls::new();
        let clients = Authority::new("clients");
        let acceptor = acceptor(tls.authority.issue(&[HOST], |_| {}), Some(&clients));
        let (addr, notes) = serve(acceptor, echo).await;
        publish(&world, "tcp", addr, |policy| policy.tls = Some(simple(&tls.roots)));
        assert!(!is_carried(&mut connect(&world).await).await, "the server wants a certificate");
        let (cert, key) = clients.issue(&["client"], |_| {});
        let files = (tls.folder.file("cert.pem", &cert), tls.folder.file("key.pem", &key));
        let mutual =
            ClientTls { mode: ClientTlsMode::Mutual, client_certificate: Some(files), ..simple(&tls.roots) };
        publish(&world, "tcp", addr, |policy| policy.tls = Some(mutual));
        assert!(is_carried(&mut connect(&world).await).await);
        assert!(notes.borrow().last().unwrap().has_certificate);
    });
}

/// A server that is no agent's and has a certificate of the mesh for this identity.
async fn of_the_mesh(account: &str) -> (SocketAddr, Notes) {
    let own = Identity::new("cluster.local", "default", account);
    let certificates = certificates(std::slice::from_ref(&own));
    certificates.wait_for(&own, Instant::now() + Duration::from_secs(10)).await.unwrap();
    serve(TlsAcceptor::from(certificates.server_config(&own).unwrap()), echo).await
}

fn istio_mutual(names: &[&str]) -> ClientTls {
    let names = names.iter().map(|name| StringMatch::Exact((*name).into())).collect();
    let mode = ClientTlsMode::IstioMutual;
    ClientTls { mode, subject_alt_names: names, ca_certificates: None, ..simple(&"".into()) }
}

#[test]
fn istio_mutual_shows_the_pods_own_certificate_to_servers_outside_of_the_mesh_and_never_goes_in_plaintext() {
    test(|world| async move {
        let (addr, notes) = of_the_mesh("vault").await;
        let vault = "spiffe://cluster.local/ns/default/sa/vault";
        for names in [&[][..], &[vault], &["other", vault]] {
            publish(&world, "tcp", addr, |policy| policy.tls = Some(istio_mutual(names)));
            assert!(is_carried(&mut connect(&world).await).await, "{names:?}");
            assert!(notes.borrow().last().unwrap().has_certificate);
        }
        // It is somebody, and not the one who is meant.
        publish(&world, "tcp", addr, |policy| policy.tls = Some(istio_mutual(&["spiffe://cluster.local/x"])));
        assert!(!is_carried(&mut connect(&world).await).await);
        world.ended(CloseReason::Tls(PeerError::WrongIdentity), 1).await;
        // It has the name, and nobody of the mesh gave it.
        let (stranger, _) = Tls::new().server(&[vault], |_| {}).await;
        publish(&world, "tcp", stranger, |policy| policy.tls = Some(istio_mutual(&[])));
        assert!(!is_carried(&mut connect(&world).await).await);
        world.ended(CloseReason::Tls(PeerError::UnknownIssuer), 1).await;
        // It does not speak TLS at all.
        let plain = TcpListener::bind("127.0.0.3:0").await.unwrap();
        publish(&world, "tcp", plain.local_addr().unwrap(), |policy| policy.tls = Some(istio_mutual(&[])));
        let mut client = connect(&world).await;
        client.write_all(b"secret").await.unwrap();
        let (mut server, _) = soon(plain.accept()).await.unwrap();
        let mut first = [0; 3];
        soon(server.read_exact(&mut first)).await.unwrap();
        assert_eq!(first[..2], [22, 3], "a handshake's record, and nothing of the client's");
    });
}

#[test]
fn s47_istio_mutual_wants_the_account_that_an_entry_says_of_its_endpoint_unless_names_are_said() {
    test(|world| async move {
        let (addr, _) = of_the_mesh("vault").await;
        let vault = "spiffe://cluster.local/ns/default/sa/vault";
        let mut refused = 0;
        // Of the rule, of the entry, of the endpoint, and the trust domain of a mesh that has been called `cluster.local`.
        for (rule, entry, account, domain, carried) in [
            (&[][..], &[][..], None, "cluster.local", true),
            (&[], &[], Some("vault"), "cluster.local", true),
            (&[], &[], Some("other"), "cluster.local", false),
            (&[], &[], Some("vault"), "renamed", true),
            (&[vault], &[], Some("other"), "cluster.local", true),
            (&["other"], &[vault], Some("vault"), "cluster.local", false),
            (&[], &[vault], Some("other"), "cluster.local", true),
            (&[], &["other"], Some("vault"), "cluster.local", true),
            (&[], &["other"], None, "cluster.local", false),
        ] {
            let mut web = service("web", VIP.parse().unwrap(), vec![endpoint(addr, None)]);
            web.ports[0].name = "tcp".into();
            web.subject_alt_names = entry.iter().map(|name: &&str| (*name).into()).collect();
            let account: Option<Arc<str>> = account.map(Into::into);
            web.ports[0].endpoints[0].traits = Some(Arc::new(Traits { account, ..Traits::default() }));
            let mesh = Mesh {
                trust_domain: domain.into(),
                trust_domain_aliases: vec!["cluster.local".into()],
                ..Mesh::default()
            };
            publish_in(&world, mesh, web, None, |policy| policy.tls = Some(istio_mutual(rule)));
            let case = format!("{rule:?} {entry:?} {domain}");
            assert_eq!(is_carried(&mut connect(&world).await).await, carried, "{case}");
            refused += u64::from(!carried);
            if refused > 0 {
                world.ended_so_far(CloseReason::Tls(PeerError::WrongIdentity), refused).await;
            }
        }
    });
}

#[test]
fn istio_mutual_leaves_pods_of_the_mesh_to_the_mesh_unless_it_names_others() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let near = workload("near", "a", addr.ip());
        let own = near.identity().to_string();
        let peer = LocalPeer { incarnation: 5, policy_gen: 9 };
        world.kernel.local.lock().unwrap().insert(near.id, peer);
        let publish = |names: &[&str]| {
            publish_with(&world, "tcp", addr, Some(&near), |policy| policy.tls = Some(istio_mutual(names)));
        };
        for names in [&[][..], &[&*own]] {
            publish(names);
            let mut client = connect(&world).await;
            client.write_all(b"hello").await.unwrap();
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            let mut heard = [0; 5];
            soon(app.read_exact(&mut heard)).await.unwrap();
            assert_eq!(&heard, b"hello", "{names:?}");
        }
        publish(&["spiffe://cluster.local/ns/default/sa/other"]);
        let mut client = connect(&world).await;
        client.write_all(b"secret").await.unwrap();
        assert!(soon(client.read(&mut [0])).await.is_err());
        world.ended(CloseReason::TlsSetup, 1).await;
    });
}

#[test]
fn what_cannot_be_set_up_is_refused_before_anything_is_sent() {
    test(|world| async move {
        let tls = Tls::new();
        let (addr, notes) = tls.server(&[HOST], |_| {}).await;
        let no_file = ClientTls { ca_certificates: Some("/nowhere/ca.pem".into()), ..simple(&tls.roots) };
        let no_certificate = ClientTls { mode: ClientTlsMode::Mutual, ..simple(&tls.roots) };
        let secret = ClientTls { credential_name: Some("a-secret".into()), ..simple(&tls.roots) };
        let name = ClientTls { sni: Some("not a name".into()), ..simple(&tls.roots) };
        for (count, tls) in [no_file, no_certificate, secret, name].into_iter().enumerate() {
            publish(&world, "tcp", addr, |policy| policy.tls = Some(tls));
            assert!(!is_carried(&mut connect(&world).await).await);
            world.ended(CloseReason::TlsSetup, count as u64 + 1).await;
        }
        assert!(notes.borrow().is_empty());
    });
}

#[test]
fn servers_are_told_whose_connection_it_is() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            publish(&world, "tcp", addr, |policy| policy.proxy_protocol = Some(version));
            let mut client = connect(&world).await;
            client.write_all(b"hello").await.unwrap();
            client.shutdown().await.unwrap();
            let (mut server, _) = soon(listener.accept()).await.unwrap();
            let mut seen = Vec::new();
            soon(server.read_to_end(&mut seen)).await.unwrap();
            let (from, to) = (client.local_addr().unwrap(), SocketAddr::new(VIP.parse().unwrap(), 80));
            let header = match version {
                ProxyProtocol::V1 => {
                    format!("PROXY TCP4 {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port())
                        .into_bytes()
                }
                ProxyProtocol::V2 => {
                    ppp::v2::Builder::with_addresses(0x21, ppp::v2::Protocol::Stream, (from, to))
                        .build()
                        .unwrap()
                }
            };
            assert_eq!(seen, [&header[..], b"hello"].concat(), "{version:?}");
        }
    });
}

/// A proxy that takes tunnels to anywhere but port 1.
async fn proxy(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.split(' ').nth(1).unwrap().to_owned();
    if !head.starts_with("CONNECT ") || target.ends_with(":1") {
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").await.ok();
        return;
    }
    let mut server = TcpStream::connect(target).await.unwrap();
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    copy_bidirectional(&mut stream, &mut server).await.ok();
}

fn tunnel(to: SocketAddr) -> Option<ConnectTunnel> {
    Some(ConnectTunnel { post: false, host: to.ip().to_string().into(), port: to.port() })
}

#[test]
fn connections_go_through_an_http_proxy() {
    test(|world| async move {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = server.local_addr().unwrap();
        spawn_local(async move {
            while let Ok((socket, _)) = server.accept().await {
                spawn_local(echo(socket));
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                spawn_local(proxy(socket));
            }
        });
        publish(&world, "tcp", addr, |policy| policy.tunnel = tunnel(target));
        assert!(is_carried(&mut connect(&world).await).await);
        let forbidden = SocketAddr::from(([127, 0, 0, 1], 1));
        publish(&world, "tcp", addr, |policy| policy.tunnel = tunnel(forbidden));
        assert!(!is_carried(&mut connect(&world).await).await);
        world.ended(CloseReason::ProxyRefused, 1).await;
        // The proxy itself may want TLS.
        let tls = Tls::new();
        let (addr, _) = serve(acceptor(tls.authority.issue(&[HOST], |_| {}), None), proxy).await;
        publish(&world, "tcp", addr, |policy| {
            policy.tunnel = tunnel(target);
            policy.tls = Some(simple(&tls.roots));
        });
        assert!(is_carried(&mut connect(&world).await).await);
    });
}

#[test]
fn connections_go_through_an_http_proxy_as_bodies_of_one_exchange() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let asked = Rc::new(RefCell::new(Vec::new()));
        let noted = Rc::clone(&asked);
        spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let noted = Rc::clone(&noted);
                // By other hands: what comes as a body goes back as one.
                let echo =
                    hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                        noted.borrow_mut().push(format!(
                            "{} {:?}",
                            request.method(),
                            request.headers()["host"]
                        ));
                        std::future::ready(Ok::<_, std::convert::Infallible>(hyper::Response::new(
                            request.into_body(),
                        )))
                    });
                let io = hyper_util::rt::TokioIo::new(socket);
                spawn_local(hyper::server::conn::http1::Builder::new().serve_connection(io, echo));
            }
        });
        let post = Some(ConnectTunnel { post: true, host: "far.example.com".into(), port: 443 });
        publish(&world, "tcp", addr, |policy| policy.tunnel = post);
        assert!(is_carried(&mut connect(&world).await).await);
        assert_eq!(*asked.borrow(), [r#"POST "far.example.com:443""#]);
        world.ended(CloseReason::Finished, 1).await;
    });
}

#[test]
fn a_connection_over_tls_ends_when_its_time_is_over_or_its_server_breaks_off() {
    test(|world| async move {
        let tls = Tls::new();
        let (addr, _) = tls.server(&[HOST], |_| {}).await;
        publish(&world, "tcp", addr, |policy| {
            policy.tls = Some(simple(&tls.roots));
            policy.pool.idle_timeout = Duration::from_millis(200);
        });
        let mut idle = connect(&world).await;
        idle.write_all(b"x").await.unwrap();
        soon(idle.read_exact(&mut [0])).await.unwrap();
        assert!(soon(idle.read(&mut [0])).await.is_err());
        world.ended(CloseReason::IdleTimeout, 1).await;
        // An end that TLS does not announce may be anybody's: no orderly end for the client.
        let rude = |mut stream: TlsStream<TcpStream>| async move {
            stream.write_all(b"half").await.unwrap();
            stream.flush().await.unwrap();
            drop(stream.into_inner().0);
        };
        let (addr, _) = serve(acceptor(tls.authority.issue(&[HOST], |_| {}), None), rude).await;
        publish(&world, "tcp", addr, |policy| policy.tls = Some(simple(&tls.roots)));
        let mut client = connect(&world).await;
        let mut heard = Vec::new();
        assert!(soon(client.read_to_end(&mut heard)).await.is_err());
        world.ended(CloseReason::UpstreamReset, 1).await;
    });
}
