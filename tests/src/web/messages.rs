//! What tests and the web programs of `pod-tool` say to each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Headers in their order.
pub type Fields = Vec<(String, String)>;

fn value<'a>(fields: &'a Fields, name: &str) -> Option<&'a str> {
    fields.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
}

/// How `pod-tool web` serves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Serving {
    /// What answers say.
    pub name: String,
    /// Every request is answered with 503.
    pub failing: bool,
}

/// Requests one after the other, on one connection as long as it lasts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Script {
    /// Where to.
    pub to: SocketAddr,
    /// By HTTP/2 with prior knowledge; else HTTP/1.1.
    pub http2: bool,
    /// What.
    pub requests: Vec<Ask>,
}

/// One request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// Method.
    pub method: String,
    /// `host` or `:authority`.
    pub host: String,
    /// Path and query. The servers of `pod-tool web` look at the query, see `pod-tool/web/server.rs`.
    pub path: String,
    /// Further headers.
    pub headers: Fields,
    /// Bytes of its body, if it has one.
    pub bytes: Option<u64>,
    /// Its length is not said before.
    pub chunked: bool,
    /// Trailers.
    pub trailers: Fields,
    /// Milliseconds to wait before the response's body is read.
    pub dawdle_ms: u64,
}

impl Ask {
    /// A GET without a body.
    #[must_use]
    pub fn get(host: &str, path: &str) -> Self {
        Self {
            method: "GET".to_owned(),
            host: host.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            bytes: None,
            chunked: false,
            trailers: Vec::new(),
            dawdle_ms: 0,
        }
    }

    /// With another method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        method.clone_into(&mut self.method);
        self
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A POST of so many bytes.
    #[must_use]
    pub fn posting(mut self, bytes: u64) -> Self {
        self.bytes = Some(bytes);
        self.method("POST")
    }

    /// Without a length.
    #[must_use]
    pub fn chunked(mut self) -> Self {
        self.chunked = true;
        self
    }

    /// With one more trailer.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: &str) -> Self {
        self.trailers.push((name.to_owned(), value.to_owned()));
        self.chunked()
    }
}

/// What was answered.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Told {
    /// Status; 0 when there was no response.
    pub status: u16,
    /// Its version, such as `HTTP/1.1`.
    pub version: String,
    /// Headers.
    pub headers: Fields,
    /// The beginning of the body.
    pub text: String,
    /// The body's length.
    pub bytes: u64,
    /// Trailers.
    pub trailers: Fields,
    /// Milliseconds from the request to the end of its response.
    pub ms: u64,
    /// What went wrong.
    pub error: Option<String>,
}

impl Told {
    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        value(&self.headers, name)
    }

    /// What a server of `pod-tool web` saw of the request.
    ///
    /// # Errors
    /// When it was not one of those that answered.
    pub fn seen(&self) -> anyhow::Result<Seen> {
        serde_json::from_str(&self.text).map_err(|error| anyhow::anyhow!("{error}: {self:?}"))
    }
}

/// What a server saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Its name.
    pub server: String,
    /// Number of the connection, over all that it accepted.
    pub connection: u64,
    /// The client's address, as `accept` told it.
    #[serde(default)]
    pub peer: Option<SocketAddr>,
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// `host` or `:authority`.
    pub host: String,
    /// Version.
    pub version: String,
    /// Headers.
    pub headers: Fields,
    /// The body's length.
    pub bytes: u64,
    /// Trailers.
    pub trailers: Fields,
    /// Requests that it has answered so far, this one included, by path without query.
    pub so_far: BTreeMap<String, u64>,
}

impl Seen {
    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        value(&self.headers, name)
    }
}

/// A gRPC call to the service `echo.Echo`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// Where to.
    pub to: SocketAddr,
    /// Its `:authority`.
    pub authority: String,
    /// `Unary`, `Many` (each message a number of answers), `Talk` (an answer for each message), `Fail` (the status that the first
    /// message names), `Slow` (after so many milliseconds) or `Tell` (a [`Seen`] of this call).
    pub method: String,
    /// What is sent.
    pub messages: Vec<String>,
    /// Metadata.
    pub headers: Fields,
    /// `grpc-timeout`.
    pub deadline_ms: Option<u64>,
}

/// How a call ended.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Called {
    /// `grpc-status`.
    pub code: i32,
    /// `grpc-message`.
    pub message: String,
    /// What was received.
    pub messages: Vec<String>,
    /// Headers of the response.
    pub headers: Fields,
    /// Its trailers, without the status; none if the status was the whole response.
    pub trailers: Fields,
}

impl Called {
    /// What was received, or the status if it is not OK.
    ///
    /// # Errors
    /// The status with its message.
    pub fn said(&self) -> Result<Vec<&str>, (i32, &str)> {
        match self.code {
            0 => Ok(self.messages.iter().map(String::as_str).collect()),
            code => Err((code, &self.message)),
        }
    }

    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        value(&self.headers, name)
    }

    /// The value of a trailer.
    #[must_use]
    pub fn trailer(&self, name: &str) -> Option<&str> {
        value(&self.trailers, name)
    }

    /// What the server saw of a call of `Tell`.
    ///
    /// # Errors
    /// When it was another call, or failed.
    pub fn seen(&self) -> anyhow::Result<Seen> {
        let text = self.messages.first().map(String::as_str).unwrap_or_default();
        serde_json::from_str(text).map_err(|error| anyhow::anyhow!("{error}: {self:?}"))
    }
}

/// A conversation over a WebSocket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chat {
    /// Where to.
    pub to: SocketAddr,
    /// `host`.
    pub host: String,
    /// Path.
    pub path: String,
    /// What is said; each is answered before the next.
    pub messages: Vec<String>,
}

/// A load of requests that runs until it is stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mix {
    /// Clients of the HTTP service, with a `host`.
    pub http: SocketAddr,
    /// `host`.
    pub host: String,
    /// Clients that use their connections for ever, and how many.
    pub keep_alive: u32,
    /// Clients that make a connection for each request.
    pub short: u32,
    /// Clients of HTTP/2, each with several requests under way.
    pub http2: u32,
    /// A TCP service that echoes, and how many clients it has.
    pub tcp: Option<(SocketAddr, u32)>,
    /// Milliseconds between requests of one client.
    pub pause_ms: u64,
}

/// What became of a load's requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixReport {
    /// Requests with status 200, by who answered.
    pub by_server: BTreeMap<String, u64>,
    /// Everything else, by what it was: a status with its text, or an error.
    pub failed: BTreeMap<String, u64>,
    /// Requests by kind of client.
    pub by_kind: BTreeMap<String, u64>,
    /// When the newest of the requests was sent that a server has answered, in microseconds since 1970.
    #[serde(default)]
    pub last_sent_us: BTreeMap<String, u64>,
    /// Answers by another server than the one before, of all clients: when they came, in microseconds since 1970. At most
    /// [`Self::TURNS_MAX`].
    #[serde(default)]
    pub turns: Vec<(u64, String)>,
}

impl MixReport {
    /// Turns that are kept.
    pub const TURNS_MAX: usize = 4096;

    /// Requests that were answered with 200.
    #[must_use]
    pub fn ok(&self) -> u64 {
        self.by_server.values().sum()
    }

    /// Requests that were not.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}
