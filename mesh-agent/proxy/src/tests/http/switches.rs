//! Connections and streams that switch protocols.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use super::fixture::{Client, echo, forward, publish, test};
use crate::tests::fixture::{World, soon};

/// A server that switches whatever it is asked to, then echoes in capitals. It says what it was asked.
async fn switching(
    status: &'static str,
) -> (std::net::SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (heads, seen) = tokio::sync::mpsc::unbounded_channel();
    drop(spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            heads.send(String::from_utf8(head).unwrap()).ok();
            // Bytes of the new protocol ride behind the head.
            stream.write_all(format!("{status}\r\n\r\nHI;").as_bytes()).await.unwrap();
            let mut bytes = [0; 1000];
            while let Ok(got @ 1..) = stream.read(&mut bytes).await {
                stream.write_all(&bytes[..got].to_ascii_uppercase()).await.unwrap();
            }
        }
    }));
    (addr, seen)
}

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket";

async fn published(world: &World, status: &'static str) -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (addr, seen) = switching(status).await;
    publish(world, vec![forward()], &[("web", addr)]);
    seen
}

#[test]
fn a_websocket_is_upgraded_and_carries_bytes_both_ways() {
    test(|world| async move {
        let mut seen = published(&world, SWITCH).await;
        let mut client = Client::connect(&world).await;
        client
            .send("GET /chat HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n")
            .await;
        let head = client.head().await.to_lowercase();
        assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"), "{head}");
        client.expect(b"HI;").await;
        client.send("hello").await;
        client.expect(b"HELLO").await;
        // Nothing of it is taken for a request.
        client.send("GET / HTTP/1.1\nX\r\n\r\n").await;
        client.expect(b"GET / HTTP/1.1\nX\r\n\r\n").await;
        let asked = soon(seen.recv()).await.unwrap().to_lowercase();
        assert!(asked.contains("upgrade: websocket") && asked.contains("sec-websocket-key: x"), "{asked}");
        client.stream.shutdown().await.unwrap();
        assert!(client.is_ended().await);
    });
}

#[test]
fn bytes_that_were_sent_before_the_switch_reach_the_new_protocol() {
    test(|world| async move {
        published(&world, SWITCH).await;
        let mut client = Client::connect(&world).await;
        client
            .send("GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
            .await;
        client.head().await;
        client.expect(b"EARLY").await;
    });
}

#[test]
fn without_a_switch_the_connection_goes_on_and_stays_guarded() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.ask("GET", "/a", "Connection: Upgrade\r\nUpgrade: nothing\r\n", "").await;
        assert_eq!((reply.status, &*reply.body), (200, "GET /a "));
        assert_eq!(client.get("/b").await.body, "GET /b ");
        client.send("GET / HTTP/1.1\nHost: web\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 400);
    });
}

#[test]
fn connect_makes_a_tunnel() {
    test(|world| async move {
        let mut seen = published(&world, "HTTP/1.1 200 OK").await;
        let mut client = Client::connect(&world).await;
        client.send("CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n").await;
        assert!(client.head().await.starts_with("HTTP/1.1 200"));
        client.expect(b"HI;").await;
        client.send("hello").await;
        client.expect(b"HELLO").await;
        assert!(soon(seen.recv()).await.unwrap().starts_with("CONNECT web:80 HTTP/1.1"));
    });
}

#[test]
fn a_websocket_over_http2_is_one_of_http1_to_the_server() {
    test(|world| async move {
        let mut seen = published(&world, SWITCH).await;
        let stream = TcpStream::connect(world.outbound).await.unwrap();
        let (mut send, connection) = soon(h2::client::handshake(stream)).await.unwrap();
        drop(spawn_local(connection));
        // The server's SETTINGS allow it once they are here.
        while !send.is_extended_connect_protocol_enabled() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let mut request = http::Request::builder()
            .method("CONNECT")
            .uri("http://web/chat")
            .header("sec-websocket-version", "13")
            .body(())
            .unwrap();
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        let (response, mut body) = send.send_request(request, false).unwrap();
        let response = soon(response).await.unwrap();
        assert_eq!(response.status(), 200);
        body.send_data(bytes::Bytes::from_static(b"hello"), false).unwrap();
        let mut got = Vec::new();
        let mut incoming = response.into_body();
        while !got.ends_with(b"HELLO") {
            got.extend_from_slice(&soon(incoming.data()).await.unwrap().unwrap());
        }
        let asked = soon(seen.recv()).await.unwrap().to_lowercase();
        assert!(asked.starts_with("get /chat http/1.1"), "{asked}");
        assert!(asked.contains("upgrade: websocket") && asked.contains("sec-websocket-key: "), "{asked}");
    });
}
