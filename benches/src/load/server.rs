//! Owns the server half: echo, counted streams and one-byte requests on one port.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::http;
use super::task::{ECHO, REQUEST, RESPONSE, STREAM, StreamHeader, StreamTotals};

/// Threads that accept: as many as the client has connections under way in its busiest task.
const ACCEPTORS: usize = 4;

/// Bytes offered to one `read` of a stream.
const READ_BYTES: usize = 256 * 1024;

/// Bytes offered to one `read` of an echo: bulk of `Task::Push` as well as single bytes.
const ECHO_BYTES: usize = 64 * 1024;

/// A peer that says nothing for so long has been lost by the path under test.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Serve until killed; HTTP at an address of its own, if one is given. Prints `listening` when clients may come.
///
/// # Errors
/// When the address cannot be listened on or accepting fails.
pub fn run(listen: SocketAddr, http: Option<SocketAddr>) -> anyhow::Result<()> {
    let bind = |addr| TcpListener::bind(addr).with_context(|| format!("cannot listen on {addr}"));
    let listener = bind(listen)?;
    let http = http.map(bind).transpose()?;
    println!("listening");
    std::thread::scope(|scope| {
        if let Some(listener) = http {
            scope.spawn(move || {
                if let Err(error) = http::serve(&listener) {
                    eprintln!("HTTP is not served any more: {error:#}");
                }
            });
        }
        let acceptors: Vec<_> = (0..ACCEPTORS).map(|_| scope.spawn(|| accept_for_ever(&listener))).collect();
        for acceptor in acceptors {
            match acceptor.join() {
                Ok(result) => result.context("cannot accept")?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })
}

fn accept_for_ever(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            // The client gave up between SYN and accept.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        if let Err(error) = serve(stream)
            && !is_end(&error)
        {
            eprintln!("a connection failed: {error}");
        }
    }
}

/// Answer a request at once, in the accepting thread; anything longer gets a thread of its own.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_LIMIT))?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let session = match kind[0] {
        REQUEST => {
            stream.write_all(&[RESPONSE])?;
            // The server closes first, so that the client's ports are free again at once and the rate is not
            // bounded by TIME_WAIT.
            return stream.shutdown(Shutdown::Write);
        }
        ECHO => echo,
        STREAM => receive,
        other => return Err(io::Error::other(format!("unknown kind of connection {other}"))),
    };
    std::thread::spawn(move || {
        if let Err(error) = session(stream)
            && !is_end(&error)
        {
            eprintln!("a session failed: {error}");
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(&[ECHO])?;
    let mut buffer = vec![0; ECHO_BYTES];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn receive(mut stream: TcpStream) -> io::Result<()> {
    let mut header = [0; StreamHeader::LEN];
    stream.read_exact(&mut header)?;
    let header = StreamHeader::from_bytes(header);
    let opens = Instant::now() + Duration::from_millis(header.warm_up_ms.into());
    let closes = opens + Duration::from_millis(header.window_ms.into());
    let mut buffer = vec![0; READ_BYTES];
    let mut totals = StreamTotals::default();
    let mut first: Option<(Instant, u64)> = None;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        totals.total_bytes += length as u64;
        let now = Instant::now();
        if now < opens || now > closes {
            continue;
        }
        match first {
            None => first = Some((now, totals.total_bytes)),
            Some((since, bytes)) => {
                totals.window_bytes = totals.total_bytes - bytes;
                totals.window_ns = u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX);
            }
        }
    }
    stream.write_all(&totals.to_bytes())
}

/// Whether the client went away, which is how it ends an echo.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
    )
}
