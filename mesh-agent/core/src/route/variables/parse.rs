//! Taking a header's value apart.
//!
//! Invariant: total; no text makes it panic, and every byte of a text is looked at a bounded number of times.

use std::sync::Arc;

use super::{
    AddressPart, HeaderChoice, HeaderText, Piece, Template, Variable,
    time::{TimeError, TimeFormat},
};

/// Variables of Envoy that stand for nothing here: what they ask for does not exist on this path, or is not kept.
const WITHOUT_VALUE: [&str; 87] = [
    "ACCESS_LOG_TYPE",
    "BYTES_RECEIVED",
    "BYTES_RETRANSMITTED",
    "BYTES_SENT",
    "CEL",
    "CLUSTER_METADATA",
    "COALESCE",
    "COMMON_DURATION",
    "CONNECTION_ID",
    "CONNECTION_TERMINATION_DETAILS",
    "CUSTOM_FLAGS",
    "DOWNSTREAM_HANDSHAKE_DURATION",
    "DOWNSTREAM_HEADER_BYTES_RECEIVED",
    "DOWNSTREAM_HEADER_BYTES_SENT",
    "DOWNSTREAM_LOCAL_DNS_SAN",
    "DOWNSTREAM_LOCAL_EMAIL_SAN",
    "DOWNSTREAM_LOCAL_IP_SAN",
    "DOWNSTREAM_LOCAL_OTHERNAME_SAN",
    "DOWNSTREAM_LOCAL_SUBJECT",
    "DOWNSTREAM_LOCAL_URI_SAN",
    "DOWNSTREAM_PEER_CERT",
    "DOWNSTREAM_PEER_CERT_V_END",
    "DOWNSTREAM_PEER_CERT_V_START",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_1",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256",
    "DOWNSTREAM_PEER_CHAIN_SERIALS",
    "DOWNSTREAM_PEER_DNS_SAN",
    "DOWNSTREAM_PEER_EMAIL_SAN",
    "DOWNSTREAM_PEER_FINGERPRINT_1",
    "DOWNSTREAM_PEER_FINGERPRINT_256",
    "DOWNSTREAM_PEER_IP_SAN",
    "DOWNSTREAM_PEER_ISSUER",
    "DOWNSTREAM_PEER_OTHERNAME_SAN",
    "DOWNSTREAM_PEER_SERIAL",
    "DOWNSTREAM_PEER_SUBJECT",
    "DOWNSTREAM_PEER_URI_SAN",
    "DOWNSTREAM_TLS_CIPHER",
    "DOWNSTREAM_TLS_SESSION_ID",
    "DOWNSTREAM_TLS_VERSION",
    "DOWNSTREAM_TRANSPORT_FAILURE_REASON",
    "DOWNSTREAM_WIRE_BYTES_RECEIVED",
    "DOWNSTREAM_WIRE_BYTES_SENT",
    "DURATION",
    "DYNAMIC_METADATA",
    "EMIT_TIME",
    "ENVIRONMENT",
    "FILTER_CHAIN_NAME",
    "FILTER_STATE",
    "GRPC_STATUS",
    "GRPC_STATUS_NUMBER",
    "LISTENER_METADATA",
    "LOCAL_REPLY_BODY",
    "METADATA",
    "PER_REQUEST_STATE",
    "REQUEST_DURATION",
    "REQUEST_TX_DURATION",
    "REQUESTED_SERVER_NAME",
    "RESPONSE_DURATION",
    "RESPONSE_FLAGS_LONG",
    "RESPONSE_TX_DURATION",
    "ROUNDTRIP_DURATION",
    "ROUTE_METADATA",
    "STREAM_ID",
    "TLS_JA3_FINGERPRINT",
    "TLS_JA4_FINGERPRINT",
    "TRACE_ID",
    "TRAILER",
    "UNIQUE_ID",
    "UPSTREAM_CLUSTER",
    "UPSTREAM_CLUSTER_RAW",
    "UPSTREAM_CONNECTION_ID",
    "UPSTREAM_CONNECTION_POOL_READY_DURATION",
    "UPSTREAM_FILTER_STATE",
    "UPSTREAM_HEADER_BYTES_RECEIVED",
    "UPSTREAM_HEADER_BYTES_SENT",
    "UPSTREAM_HOST_NAME",
    "UPSTREAM_LOCAL_ADDRESS",
    "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_LOCAL_PORT",
    "UPSTREAM_METADATA",
    "UPSTREAM_PEER_SUBJECT",
    "UPSTREAM_PEER_URI_SAN",
    "UPSTREAM_PROTOCOL",
    "UPSTREAM_REQUEST_ATTEMPT_COUNT",
    "UPSTREAM_TRANSPORT_FAILURE_REASON",
    "UPSTREAM_WIRE_BYTES_RECEIVED",
    "VIRTUAL_CLUSTER_NAME",
];

/// Why a text is no value of a header. Reads on after "is \"…\", ".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// A `%` that begins nothing.
    #[error("wanted a variable such as %REQ(x-id)% at the % in place {at}, or %% for the character itself")]
    Stray {
        /// Bytes before it.
        at: usize,
    },
    /// No such variable.
    #[error("wanted a variable that Envoy has, and %{name}% is none")]
    Unknown {
        /// Its name.
        name: Box<str>,
    },
    /// Something between parentheses is missing, too much or wrong.
    #[error("wanted %{name}{wanted}%")]
    Argument {
        /// The variable.
        name: Box<str>,
        /// What belongs behind the name.
        wanted: &'static str,
    },
    /// A time is formatted in a way that is not known.
    #[error("wanted a format of times that is known in %START_TIME%")]
    Time(#[from] TimeError),
}

impl HeaderText {
    /// Takes apart a text with variables.
    ///
    /// # Errors
    /// When Envoy would refuse it.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut pieces = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            plain.push_str(&rest[..at]);
            let place = text.len() - rest.len() + at;
            let after = &rest[at + 1..];
            if let Some(after) = after.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let (variable, after) = variable(after, place)?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain).into()));
            }
            pieces.push(variable);
            rest = after;
        }
        plain.push_str(rest);
        if pieces.is_empty() {
            return Ok(Self::Plain(plain.into()));
        }
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain.into()));
        }
        Ok(Self::Template(Arc::new(Template { source: text.into(), pieces })))
    }

    /// Names of variables that Envoy has and that never stand for anything here.
    pub fn without_value(&self) -> Vec<&str> {
        let Self::Template(template) = self else { return Vec::new() };
        let names = template.source.split('%').filter_map(|piece| {
            let name = &piece[..name_len(piece)];
            WITHOUT_VALUE.contains(&name).then_some(name)
        });
        names.collect()
    }
}

/// How many bytes of a text are a variable's name.
fn name_len(text: &str) -> usize {
    text.bytes().take_while(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'_').count()
}

/// What follows a `%`, and the rest behind it.
fn variable(text: &str, at: usize) -> Result<(Piece, &str), TemplateError> {
    let stray = || TemplateError::Stray { at };
    let (name, mut rest) = text.split_at(name_len(text));
    if name.is_empty() {
        return Err(stray());
    }
    let mut argument = None;
    if let Some(inner) = rest.strip_prefix('(') {
        let (inside, behind) = inner.split_once(')').ok_or_else(stray)?;
        argument = Some(inside);
        rest = behind;
    }
    let mut most = None;
    if let Some(length) = rest.strip_prefix(':') {
        let digits = length.bytes().take_while(u8::is_ascii_digit).count();
        most = Some(length[..digits].parse().map_err(|_| stray())?);
        rest = &length[digits..];
    }
    let rest = rest.strip_prefix('%').ok_or_else(stray)?;
    Ok((Piece::Variable(known(name, argument)?, most), rest))
}

fn known(name: &str, argument: Option<&str>) -> Result<Variable, TemplateError> {
    let wanted = |wanted: &'static str| TemplateError::Argument { name: name.into(), wanted };
    let of_header = || argument.and_then(header_choice).ok_or_else(|| wanted("(NAME) or (NAME?OTHER)"));
    let variable = match name {
        "REQ" => return Ok(Variable::RequestHeader { name: of_header()?, without_query: false }),
        "REQ_WITHOUT_QUERY" => {
            return Ok(Variable::RequestHeader { name: of_header()?, without_query: true });
        }
        "RESP" => return Ok(Variable::ResponseHeader(of_header()?)),
        "START_TIME" => return Ok(Variable::StartTime(TimeFormat::parse(argument.unwrap_or_default())?)),
        name if WITHOUT_VALUE.contains(&name) => return Ok(Variable::Nothing),
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
            Variable::Client(AddressPart::Whole)
        }
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Variable::Client(AddressPart::Ip)
        }
        "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Variable::Client(AddressPart::Port),
        "DOWNSTREAM_LOCAL_ADDRESS" => Variable::Dialled(AddressPart::Whole),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Variable::Dialled(AddressPart::Ip),
        "DOWNSTREAM_LOCAL_PORT" => Variable::Dialled(AddressPart::Port),
        "UPSTREAM_REMOTE_ADDRESS" | "UPSTREAM_HOST" => Variable::Upstream(AddressPart::Whole),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Variable::Upstream(AddressPart::Ip),
        "UPSTREAM_REMOTE_PORT" => Variable::Upstream(AddressPart::Port),
        "PROTOCOL" => Variable::Protocol,
        "RESPONSE_CODE" => Variable::ResponseCode,
        "RESPONSE_FLAGS" => Variable::ResponseFlags,
        "RESPONSE_CODE_DETAILS" => Variable::ResponseCodeDetails,
        "ROUTE_NAME" => Variable::RouteName,
        "HOSTNAME" => Variable::HostName,
        name => return Err(TemplateError::Unknown { name: name.into() }),
    };
    if argument.is_some() { Err(wanted(" without parentheses")) } else { Ok(variable) }
}

fn header_choice(text: &str) -> Option<HeaderChoice> {
    let (first, or) = text.split_once('?').map_or((text, None), |(first, or)| (first, Some(or)));
    let name = |name: &str| {
        let token = name.strip_prefix(':').unwrap_or(name);
        let is_fit = |b: u8| b.is_ascii_alphanumeric() || b"!#$&'*+-.^_`|~".contains(&b);
        (!token.is_empty() && token.bytes().all(is_fit)).then(|| name.to_ascii_lowercase().into_boxed_str())
    };
    let or = match or {
        None => None,
        Some(or) => Some(name(or)?),
    };
    Some(HeaderChoice { first: name(first)?, or })
}
