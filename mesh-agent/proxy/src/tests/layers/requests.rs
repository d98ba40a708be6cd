//! HTTP requests.

use mesh_core::route::cluster::ProxyProtocol;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::*;
use crate::tests::fixture::soon;

/// Answers each request of a connection.
async fn answer(stream: TlsStream<TcpStream>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).await.is_ok_and(|got| got > 0) {
                continue;
            }
            return;
        }
        if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
            return;
        }
        stream.flush().await.ok();
    }
}

/// Status and body of a request for a host.
async fn get(world: &World, host: &str) -> (u16, String) {
    let mut client = connect(world).await;
    let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon(client.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[test]
fn a_plain_request_becomes_one_over_tls_for_the_host_it_names() {
    test(|world| async move {
        let (folder, authority) = (Folder::new(), Authority::new("root"));
        let roots = folder.file("ca.pem", &authority.pem);
        let (addr, notes) = serve(acceptor(authority.issue(&["*.example.com"], |_| {}), None), answer).await;
        publish(&world, "http", addr, |policy| policy.tls = Some(simple(&roots)));
        for host in ["a.example.com", "a.example.com:80", "b.example.com", "a.example.com"] {
            assert_eq!(get(&world, host).await, (200, "ok".to_owned()), "{host}");
        }
        // One connection for each server name, whichever client asks.
        let shown = |name: &str| Shown {
            sni: Some(name.to_owned()),
            alpn: Some("http/1.1".to_owned()),
            has_certificate: false,
        };
        assert_eq!(*notes.borrow(), [shown("a.example.com"), shown("b.example.com")]);
        let (status, body) = get(&world, "web").await;
        assert_eq!(status, 503);
        assert!(body.ends_with("transport failure reason: tls_wrong_identity"), "{body}");
    });
}

#[test]
fn other_settings_never_use_a_connection_that_is_there() {
    test(|world| async move {
        let (folder, authority) = (Folder::new(), Authority::new("root"));
        let roots = folder.file("ca.pem", &authority.pem);
        let stranger = folder.file("other.pem", &Authority::new("stranger").pem);
        let (addr, notes) = serve(acceptor(authority.issue(&["web"], |_| {}), None), answer).await;
        publish(&world, "http", addr, |policy| policy.tls = Some(simple(&roots)));
        assert_eq!(get(&world, "web").await.0, 200);
        publish(&world, "http", addr, |policy| policy.tls = Some(simple(&stranger)));
        let (status, body) = get(&world, "web").await;
        assert_eq!(status, 503);
        assert!(body.ends_with("tls_unknown_issuer"), "{body}");
        publish(&world, "http", addr, |policy| policy.tls = Some(simple(&roots)));
        assert_eq!(get(&world, "web").await.0, 200);
        assert_eq!(notes.borrow().len(), 1, "the first connection was kept, and used again");
    });
}

#[test]
fn each_clients_requests_come_behind_its_own_header() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        publish(&world, "http", addr, |policy| policy.proxy_protocol = Some(ProxyProtocol::V1));
        for _ in 0..2 {
            let mut client = connect(&world).await;
            let port = client.local_addr().unwrap().port();
            client.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
            let (server, _) = soon(listener.accept()).await.unwrap();
            let mut first = String::new();
            soon(BufReader::new(server).read_line(&mut first)).await.unwrap();
            assert_eq!(first, format!("PROXY TCP4 127.0.0.1 10.96.0.1 {port} 80\r\n"));
        }
    });
}
