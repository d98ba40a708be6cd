//! `forwarded` (RFC 7239): the client's address and port, and the service it dialled.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{HEADER_BYTES_MAX, HeaderError, authority::host_name};

/// The first hop as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Forwarded {
    /// `for`: the client's address.
    pub client: Option<IpAddr>,
    /// The client's port.
    pub client_port: Option<u16>,
    /// `host`: DNS name of the service that was dialled, in lower case.
    pub host: Option<Arc<str>>,
}

impl Forwarded {
    /// A client that dialled an address, or a service of this name.
    pub fn new(client: SocketAddr, host: Option<&str>) -> Self {
        Self {
            client: Some(client.ip().to_canonical()),
            client_port: Some(client.port()),
            host: host.and_then(host_name),
        }
    }

    /// Reads the first hop of a value. Parameters other than `for` and `host`, and what they may not be, are skipped.
    ///
    /// # Errors
    /// It is too long, not ASCII, or not a list of parameters.
    pub fn parse(value: &[u8]) -> Result<Self, HeaderError> {
        if value.len() > HEADER_BYTES_MAX {
            return Err(HeaderError::TooLong);
        }
        if !value.is_ascii() || value.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
            return Err(HeaderError::Bytes);
        }
        let mut forwarded = Self::default();
        let mut rest = std::str::from_utf8(value).map_err(|_| HeaderError::Bytes)?.trim_matches(SPACE);
        while !rest.is_empty() {
            let (key, tail) = rest.split_once('=').ok_or(HeaderError::Form)?;
            let (text, tail) = value_of(tail)?;
            forwarded.set(key.trim_matches(SPACE), &text);
            let tail = tail.trim_start_matches(SPACE);
            rest = match tail.as_bytes().first() {
                None | Some(b',') => break,
                Some(b';') => tail[1..].trim_start_matches(SPACE),
                Some(_) => return Err(HeaderError::Form),
            };
        }
        Ok(forwarded)
    }

    fn set(&mut self, key: &str, text: &str) {
        if key.eq_ignore_ascii_case("for") {
            (self.client, self.client_port) = node(text);
        } else if key.eq_ignore_ascii_case("host") {
            self.host = host_name(without_port(text));
        }
    }
}

const SPACE: [char; 2] = [' ', '\t'];

/// A token or a quoted text, and what follows it.
fn value_of(text: &str) -> Result<(String, &str), HeaderError> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([';', ',', ' ', '\t', '"']).unwrap_or(text.len());
        return Ok((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next().ok_or(HeaderError::Form)?.1),
            c => value.push(c),
        }
    }
    Err(HeaderError::Form)
}

/// `10.0.0.1`, `10.0.0.1:80`, `[fd00::1]`, `[fd00::1]:80`; nothing for `unknown`, `_hidden` and the rest.
fn node(text: &str) -> (Option<IpAddr>, Option<u16>) {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return (Some(addr.ip().to_canonical()), Some(addr.port()));
    }
    let bare = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text);
    (bare.parse::<IpAddr>().ok().map(|addr| addr.to_canonical()), None)
}

fn without_port(text: &str) -> &str {
    match text.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => text,
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.client, self.client_port) {
            (Some(addr), Some(port)) => write!(f, "for=\"{}\"", SocketAddr::new(addr, port))?,
            (Some(IpAddr::V4(addr)), None) => write!(f, "for={addr}")?,
            (Some(IpAddr::V6(addr)), None) => write!(f, "for=\"[{addr}]\"")?,
            (None, _) => f.write_str("for=unknown")?,
        }
        match &self.host {
            Some(host) => write!(f, ";host={host}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Forwarded, HeaderError> {
        Forwarded::parse(text.as_bytes())
    }

    #[test]
    fn clients_are_written_as_ztunnel_does() {
        for (client, host, text) in [
            ("10.0.0.1:80", None, "for=\"10.0.0.1:80\""),
            ("[fd00::1]:80", None, "for=\"[fd00::1]:80\""),
            (
                "10.0.0.1:80",
                Some("web.shop.svc.cluster.local"),
                "for=\"10.0.0.1:80\";host=web.shop.svc.cluster.local",
            ),
        ] {
            let forwarded = Forwarded::new(client.parse().unwrap(), host);
            assert_eq!(forwarded.to_string(), text);
            assert_eq!(parse(text), Ok(forwarded));
        }
    }

    #[test]
    fn the_first_hop_counts_in_every_form_of_the_standard() {
        for (text, client, port, host) in [
            ("for=10.0.0.1", Some("10.0.0.1"), None, None),
            ("For=\"[fd00::1]\"", Some("fd00::1"), None, None),
            ("proto=http;for=\"10.0.0.1:80\" , for=10.0.0.2", Some("10.0.0.1"), Some(80), None),
            ("for=unknown;host=\"Web:8080\"", None, None, Some("web")),
            ("for=_hidden ; HOST=web", None, None, Some("web")),
            ("for=\"10.0.0.\\1\"", Some("10.0.0.1"), None, None),
            ("for=\"[::ffff:10.0.0.1]:80\"", Some("10.0.0.1"), Some(80), None),
            ("by=x", None, None, None),
            ("host=\"a b\"", None, None, None),
            ("", None, None, None),
        ] {
            let expected = Forwarded {
                client: client.map(|addr| addr.parse().unwrap()),
                client_port: port,
                host: host.map(Into::into),
            };
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_list_of_parameters_is_refused() {
        for (text, error) in [
            ("for", HeaderError::Form),
            ("for=\"10.0.0.1", HeaderError::Form),
            ("for=\"a\\", HeaderError::Form),
            ("for=a b", HeaderError::Form),
            ("for=a\"b", HeaderError::Form),
            ("for=é", HeaderError::Bytes),
            ("for=a\nhost=b", HeaderError::Bytes),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
        assert_eq!(parse(&" ".repeat(HEADER_BYTES_MAX + 1)), Err(HeaderError::TooLong));
    }
}
