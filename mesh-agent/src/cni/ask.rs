//! Owns one question to the node's agent.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use super::protocol::{Answer, LINE_MAX, Request};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// Nobody listens, or whoever did has ended: the next agent of the node may answer.
    #[error("the agent does not listen")]
    Away(#[source] io::Error),
    /// It took too long.
    #[error("the agent did not answer")]
    Cut(#[source] io::Error),
    /// The answer is none.
    #[error("the agent's answer cannot be read")]
    Unreadable(#[source] serde_json::Error),
}

/// Asks, and waits for the answer.
pub(super) fn ask(socket: &Path, request: &Request, within: Duration) -> Result<Answer, AskError> {
    let mut stream = UnixStream::connect(socket).map_err(AskError::Away)?;
    let mut line = serde_json::to_vec(request).map_err(AskError::Unreadable)?;
    line.push(b'\n');
    let mut text = String::new();
    stream
        .set_read_timeout(Some(within))
        .and_then(|()| stream.set_write_timeout(Some(within)))
        .and_then(|()| stream.write_all(&line))
        .and_then(|()| BufReader::new(stream.take(LINE_MAX)).read_line(&mut text))
        .map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => AskError::Away(error),
            _ => AskError::Cut(error),
        })?;
    if text.is_empty() {
        return Err(AskError::Away(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_str(&text).map_err(AskError::Unreadable)
}
