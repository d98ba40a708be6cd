//! An HTTP/1.1 server that does as it is told.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

/// What a request is answered with.
pub(super) enum Reply {
    /// These bytes; the connection stays open.
    Bytes(Vec<u8>),
    /// A response without end.
    Endless,
    /// Nothing.
    Hang,
    /// The connection ends.
    Close,
    /// A switch of protocols: what comes is sent back.
    Echo,
}

impl Reply {
    pub(super) fn ok(body: &str) -> Self {
        Self::Bytes(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into())
    }

    pub(super) fn status(status: u16) -> Self {
        Self::Bytes(format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n").into())
    }
}

#[derive(Default)]
struct Seen {
    connections: Cell<usize>,
    closed: Cell<usize>,
    heads: RefCell<Vec<String>>,
    bodies: RefCell<Vec<Vec<u8>>>,
}

/// A running server.
pub(super) struct Server {
    pub(super) addr: SocketAddr,
    seen: Rc<Seen>,
}

impl Server {
    pub(super) async fn start(addr: &str, answer: impl Fn(&str) -> Reply + 'static) -> Self {
        Self::on(TcpListener::bind(addr).await.unwrap(), answer)
    }

    pub(super) fn on(listener: TcpListener, answer: impl Fn(&str) -> Reply + 'static) -> Self {
        let addr = listener.local_addr().unwrap();
        let seen = Rc::new(Seen::default());
        let (all, answer) = (Rc::clone(&seen), Rc::new(answer));
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                all.connections.set(all.connections.get() + 1);
                let (all, answer) = (Rc::clone(&all), Rc::clone(&answer));
                spawn_local(async move {
                    serve(stream, &all, &*answer).await;
                    all.closed.set(all.closed.get() + 1);
                });
            }
        });
        Self { addr, seen }
    }

    /// Connections that were accepted.
    pub(super) fn connections(&self) -> usize {
        self.seen.connections.get()
    }

    /// Connections that have ended.
    pub(super) fn closed(&self) -> usize {
        self.seen.closed.get()
    }

    pub(super) fn heads(&self) -> Vec<String> {
        self.seen.heads.borrow().clone()
    }

    pub(super) fn bodies(&self) -> Vec<Vec<u8>> {
        self.seen.bodies.borrow().clone()
    }
}

async fn serve(mut stream: TcpStream, seen: &Seen, answer: &dyn Fn(&str) -> Reply) {
    let mut buffer = Vec::new();
    loop {
        let Some((head, body)) = request(&mut stream, &mut buffer).await else { return };
        seen.heads.borrow_mut().push(head.clone());
        seen.bodies.borrow_mut().push(body);
        match answer(&head) {
            Reply::Bytes(bytes) => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Reply::Close => return,
            Reply::Hang => {
                while stream.read(&mut [0; 64]).await.is_ok_and(|got| got > 0) {}
                return;
            }
            Reply::Endless => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.ok();
                while stream.write_all(b"1\r\nx\r\n").await.is_ok() {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                return;
            }
            Reply::Echo => {
                stream
                    .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nready")
                    .await
                    .ok();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
                return;
            }
        }
    }
}

/// The next request's head and body; `None` at the end.
async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let mut more = async |buffer: &mut Vec<u8>| {
        let mut chunk = [0; 4096];
        let got = stream.read(&mut chunk).await.ok().filter(|got| *got > 0)?;
        buffer.extend_from_slice(&chunk[..got]);
        Some(())
    };
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        more(buffer).await?;
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).unwrap();
    let lower = head.to_lowercase();
    let length = |line: &str| line.strip_prefix("content-length: ")?.parse::<usize>().ok();
    if let Some(length) = lower.lines().find_map(length) {
        while buffer.len() < length {
            more(buffer).await?;
        }
        return Some((head, buffer.drain(..length).collect()));
    }
    if !lower.contains("transfer-encoding: chunked") {
        return Some((head, Vec::new()));
    }
    let mut body = Vec::new();
    loop {
        let line = loop {
            if let Some(at) = buffer.windows(2).position(|two| two == b"\r\n") {
                break at;
            }
            more(buffer).await?;
        };
        let size = usize::from_str_radix(std::str::from_utf8(&buffer[..line]).unwrap(), 16).unwrap();
        while buffer.len() < line + 2 + size + 2 {
            more(buffer).await?;
        }
        body.extend_from_slice(&buffer[line + 2..][..size]);
        buffer.drain(..line + 2 + size + 2);
        if size == 0 {
            return Some((head, body));
        }
    }
}
