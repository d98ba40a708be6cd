//! As much HTTP/1.1 as a test needs: one GET, and a server that answers every request.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mesh_tests::protocol::{CallFailure, HttpAnswer, Reply};

use crate::objects::failed;

pub(crate) fn get(to: SocketAddr, host: &str, path: &str, timeout_ms: u64) -> Result<Reply, CallFailure> {
    let timeout = Duration::from_millis(timeout_ms);
    let mut stream = TcpStream::connect_timeout(&to, timeout).map_err(failed("connect"))?;
    stream.set_read_timeout(Some(timeout)).map_err(failed("set SO_RCVTIMEO"))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        .map_err(failed("send"))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(failed("recv"))?;
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    match (status, text.split_once("\r\n\r\n")) {
        (Some(status), Some((_, body))) => Ok(Reply::Http(HttpAnswer { status, body: body.to_owned() })),
        _ => Err(CallFailure { errno: None, doing: "read HTTP".to_owned(), text: format!("{text:?}") }),
    }
}

/// Answer each request with `body`; requests have no body.
pub(crate) fn serve(stream: TcpStream, body: &str) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut close = false;
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 || line == "\r\n" {
                break;
            }
            close |= line.trim().eq_ignore_ascii_case("connection: close");
        }
        let length = body.len();
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
        write!(writer, "{head}Content-Length: {length}\r\n\r\n{body}")?;
        if close {
            return Ok(());
        }
    }
}
