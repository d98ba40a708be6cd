//! Values of headers with variables, in Envoy's words: `%REQ(x-id)%`, `%DOWNSTREAM_REMOTE_ADDRESS%`, `%START_TIME(%s)%` ….
//!
//! Invariants:
//! - What Envoy refuses is no [`HeaderText`]: an unknown variable, or a `%` that begins none and is not doubled.
//! - A text is taken apart when it is read; one without variables costs nothing more than a text.
//! - A variable that stands for nothing is empty; a header whose value comes out empty, or too long, is not sent.

mod parse;
mod time;

use std::{net::SocketAddr, sync::Arc, time::Duration};

pub use self::parse::TemplateError;
use self::time::TimeFormat;
use crate::route::request::{Headers, RequestView};

/// Longest value that a template makes, in bytes: clients say what some variables stand for.
pub const VALUE_MAX: usize = 16 << 10;

/// The value that a header gets.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "Written", try_from = "Written")]
pub enum HeaderText {
    /// As it stands.
    Plain(Arc<str>),
    /// With variables.
    Template(Arc<Template>),
}

/// A text with at least one variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    source: Arc<str>,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(Box<str>),
    /// A variable, and how many characters of it are taken.
    Variable(Variable, Option<usize>),
}

/// Something that a request tells.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Variable {
    RequestHeader {
        name: HeaderChoice,
        without_query: bool,
    },
    ResponseHeader(HeaderChoice),
    Client(AddressPart),
    Dialled(AddressPart),
    Upstream(AddressPart),
    Protocol,
    StartTime(TimeFormat),
    ResponseCode,
    ResponseFlags,
    ResponseCodeDetails,
    RouteName,
    HostName,
    /// Envoy has it, and here it never stands for anything.
    Nothing,
}

/// A header, or another where that is not there. Names are lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HeaderChoice {
    first: Box<str>,
    or: Option<Box<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AddressPart {
    Whole,
    Ip,
    Port,
}

/// How it is written down.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
enum Written {
    Plain(Arc<str>),
    Template { format: Arc<str> },
}

impl From<HeaderText> for Written {
    fn from(text: HeaderText) -> Self {
        match text {
            HeaderText::Plain(text) => Self::Plain(text),
            HeaderText::Template(template) => Self::Template { format: Arc::clone(&template.source) },
        }
    }
}

impl TryFrom<Written> for HeaderText {
    type Error = TemplateError;

    fn try_from(written: Written) -> Result<Self, TemplateError> {
        match written {
            Written::Plain(text) => Ok(Self::Plain(text)),
            Written::Template { format } => Self::parse(&format),
        }
    }
}

impl From<&str> for HeaderText {
    /// The text as it stands, whatever is in it.
    fn from(text: &str) -> Self {
        Self::Plain(text.into())
    }
}

impl std::fmt::Display for HeaderText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(text) => text,
            Self::Template(template) => &template.source,
        })
    }
}

impl HeaderText {
    /// The template, if it is one.
    pub fn template(&self) -> Option<&Template> {
        match self {
            Self::Plain(_) => None,
            Self::Template(template) => Some(template),
        }
    }
}

/// What variables stand for: everything that is known by the time a header is made.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The request.
    pub request: RequestView<'a>,
    /// The response, while its headers are made: status and headers.
    pub response: Option<(u16, &'a dyn Headers)>,
    /// The client's address.
    pub client: SocketAddr,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// The endpoint that answered.
    pub upstream: Option<SocketAddr>,
    /// `HTTP/1.1` or the like, as the client spoke it.
    pub protocol: &'a str,
    /// When the request came, since the beginning of 1970.
    pub started: Duration,
    /// Response flags, as in the access log.
    pub flags: &'a str,
    /// Response code details, as in the access log.
    pub details: &'a str,
    /// The route, as in the access log.
    pub route: &'a str,
    /// The client's pod.
    pub host_name: &'a str,
}

impl std::fmt::Debug for Facts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values of headers may be secrets.
        f.debug_struct("Facts")
            .field("request", &self.request)
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

impl Template {
    /// As it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The value of the header; `None`: there is none to be sent.
    pub fn value(&self, facts: &Facts<'_>) -> Option<Vec<u8>> {
        let mut value = Vec::with_capacity(self.source.len());
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => value.extend_from_slice(text.as_bytes()),
                Piece::Variable(variable, most) => {
                    let from = value.len();
                    variable.put(facts, &mut value);
                    if let Some(most) = most {
                        value.truncate(from.saturating_add(*most).min(value.len()));
                    }
                }
            }
            if value.len() > VALUE_MAX {
                return None;
            }
        }
        (!value.is_empty()).then_some(value)
    }
}

impl Variable {
    /// Appends what it stands for.
    fn put(&self, facts: &Facts<'_>, value: &mut Vec<u8>) {
        match self {
            Self::RequestHeader { name, without_query } => {
                let found = name.find(|name| {
                    let is_pseudo = name.starts_with(':') || name == "host";
                    if is_pseudo {
                        return facts.request.header(name).map(|value| value.into_owned());
                    }
                    facts.request.headers.first(name).map(<[u8]>::to_vec)
                });
                let mut found = found.unwrap_or_default();
                if *without_query && let Some(query) = found.iter().position(|byte| *byte == b'?') {
                    found.truncate(query);
                }
                value.extend_from_slice(&found);
            }
            Self::ResponseHeader(name) => {
                let Some((status, headers)) = facts.response else { return };
                let found = name.find(|name| match name {
                    ":status" => Some(status.to_string().into_bytes()),
                    name => headers.first(name).map(<[u8]>::to_vec),
                });
                value.extend_from_slice(&found.unwrap_or_default());
            }
            Self::Client(part) => part.put(facts.client, value),
            Self::Dialled(part) => part.put(facts.dialled, value),
            Self::Upstream(part) => {
                if let Some(upstream) = facts.upstream {
                    part.put(upstream, value);
                }
            }
            Self::Protocol => value.extend_from_slice(facts.protocol.as_bytes()),
            Self::StartTime(format) => value.extend_from_slice(format.apply(facts.started).as_bytes()),
            Self::ResponseCode => {
                if let Some((status, _)) = facts.response {
                    value.extend_from_slice(status.to_string().as_bytes());
                }
            }
            Self::ResponseFlags => value.extend_from_slice(facts.flags.as_bytes()),
            Self::ResponseCodeDetails => value.extend_from_slice(facts.details.as_bytes()),
            Self::RouteName => value.extend_from_slice(facts.route.as_bytes()),
            Self::HostName => value.extend_from_slice(facts.host_name.as_bytes()),
            Self::Nothing => {}
        }
    }
}

impl HeaderChoice {
    fn find(&self, get: impl Fn(&str) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
        get(&self.first).or_else(|| get(self.or.as_deref()?))
    }
}

impl AddressPart {
    fn put(self, addr: SocketAddr, value: &mut Vec<u8>) {
        let text = match self {
            Self::Whole => addr.to_string(),
            Self::Ip => addr.ip().to_string(),
            Self::Port => addr.port().to_string(),
        };
        value.extend_from_slice(text.as_bytes());
    }
}

#[cfg(test)]
mod tests;
