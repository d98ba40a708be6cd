//! As much of an HTTP/1.1 client as an agent's own endpoints need: one GET on a connection of its own.

use std::io::{self, Read, Write};

/// GET `path`: the status and the body. The answer has a Content-Length or ends with the connection.
pub(super) fn get(mut stream: impl Read + Write, path: &str) -> io::Result<(u16, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    match (status, answer.split_once("\r\n\r\n")) {
        (Some(status), Some((_, body))) => Ok((status, body.to_owned())),
        _ => Err(io::Error::other(format!("not HTTP: {answer:?}"))),
    }
}
