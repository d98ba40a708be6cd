//! What tests ask of etcd itself, by the JSON form of its API at the port for clients.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

/// How long an answer may take.
const WITHIN: Duration = Duration::from_secs(30);

/// Forget every revision but the newest, on disk too.
pub(super) fn compact(port: u16) -> io::Result<()> {
    // Any read names the newest revision; numbers of 64 bits are text here.
    let read = ask(port, "/v3/kv/range", &json!({"key": "AA=="}))?;
    let revision = read["header"]["revision"].as_str().ok_or_else(|| unexpected(&read))?;
    ask(port, "/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(|_| ())
}

fn ask(port: u16, path: &str, question: &Value) -> io::Result<Value> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), WITHIN)?;
    stream.set_read_timeout(Some(WITHIN))?;
    let body = question.to_string();
    // Of HTTP/1.0 the end of the connection is the end of the answer.
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    let said: Value = serde_json::from_str(body)?;
    if status == "200" { Ok(said) } else { Err(unexpected(&said)) }
}

fn unexpected(answer: &Value) -> io::Error {
    io::Error::other(format!("etcd answered {answer}"))
}
