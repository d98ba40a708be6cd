//! `:authority` of a CONNECT request: where the tunnelled connection goes.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// Longest DNS name, in bytes.
pub const HOST_BYTES_MAX: usize = 253;
/// Longest label of a DNS name, in bytes.
const LABEL_BYTES_MAX: usize = 63;

/// Host and port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address. IPv4 written as IPv6 is IPv4.
    Address(SocketAddr),
    /// A DNS name in lower case, without a dot at its end; ztunnel names services so towards gateways.
    Name(Arc<str>, u16),
}

/// Why a text is no authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthorityError {
    /// No port, or none from 1 to 65535.
    #[error("has no port from 1 to 65535")]
    Port,
    /// Neither an address nor a name.
    #[error("has a host that is neither an address nor a DNS name")]
    Host,
    /// Longer than any name with a port.
    #[error("is longer than a DNS name with a port")]
    Length,
}

impl Authority {
    /// Reads `10.0.0.1:80`, `[fd00::1]:80` or `web.shop.svc.cluster.local:80`.
    ///
    /// # Errors
    /// Any other form: no user, no zone, no number that merely resembles an address.
    pub fn parse(value: &[u8]) -> Result<Self, AuthorityError> {
        if value.len() > HOST_BYTES_MAX + ":65535".len() {
            return Err(AuthorityError::Length);
        }
        let text = std::str::from_utf8(value).map_err(|_| AuthorityError::Host)?;
        let (host, port) = text.rsplit_once(':').ok_or(AuthorityError::Port)?;
        let port = parse_port(port).ok_or(AuthorityError::Port)?;
        if let Some(inner) = host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(AuthorityError::Host)?;
            let addr: Ipv6Addr = inner.parse().map_err(|_| AuthorityError::Host)?;
            return Ok(Self::Address(SocketAddr::new(IpAddr::V6(addr).to_canonical(), port)));
        }
        if let Ok(addr) = host.parse::<Ipv4Addr>() {
            return Ok(Self::Address(SocketAddr::new(addr.into(), port)));
        }
        let name = host_name(host).ok_or(AuthorityError::Host)?;
        Ok(Self::Name(name, port))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(addr) => addr.port(),
            Self::Name(_, port) => *port,
        }
    }

    /// The address, if it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Address(addr) => Some(*addr),
            Self::Name(..) => None,
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

/// A port as digits alone; `u16::from_str` would take a sign and any number of zeros.
fn parse_port(text: &str) -> Option<u16> {
    let is_plain = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_plain)
}

/// A DNS name in lower case. One whose last label is a number is a malformed address.
pub(super) fn host_name(host: &str) -> Option<Arc<str>> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let is_number = |label: &str| {
        let digits = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
        match digits {
            Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
            None => label.bytes().all(|b| b.is_ascii_digit()),
        }
    };
    let is_name = host.len() <= HOST_BYTES_MAX
        && host.split('.').all(is_label)
        && host.rsplit('.').next().is_some_and(|last| !is_number(last));
    is_name.then(|| host.to_ascii_lowercase().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_read_back_as_they_were_written() {
        for text in ["10.0.0.1:80", "[fd00::1]:65535", "web.shop.svc.cluster.local:15008", "localhost:1"] {
            assert_eq!(Authority::parse(text.as_bytes()).unwrap().to_string(), text);
        }
    }

    #[test]
    fn forms_with_one_meaning_are_one_value() {
        for (text, same) in [
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("[FD00:0:0::1]:80", "[fd00::1]:80"),
            ("Web.Shop.:80", "web.shop:80"),
        ] {
            assert_eq!(Authority::parse(text.as_bytes()), Authority::parse(same.as_bytes()), "{text}");
        }
    }

    #[test]
    fn what_merely_resembles_an_authority_is_none() {
        use AuthorityError::{Host, Length, Port};
        let long = format!("{}:80", "a".repeat(300));
        for (text, error) in [
            ("", Port),
            ("10.0.0.1", Port),
            ("10.0.0.1:", Port),
            ("10.0.0.1:0", Port),
            ("10.0.0.1:080", Port),
            ("10.0.0.1:+80", Port),
            ("10.0.0.1:65536", Port),
            ("10.0.0.1:80 ", Port),
            ("[fd00::1]", Port),
            (":80", Host),
            ("010.0.0.1:80", Host),
            ("10.1:80", Host),
            ("0x7f.1:80", Host),
            ("web.0x7f000001:80", Host),
            ("2130706433:80", Host),
            ("user@10.0.0.1:80", Host),
            ("http://10.0.0.1:80", Host),
            ("fd00::1:80", Host),
            ("[fe80::1%eth0]:80", Host),
            ("[10.0.0.1]:80", Host),
            ("[fd00::1:80", Host),
            ("a..b:80", Host),
            (".:80", Host),
            ("a b:80", Host),
            ("wéb:80", Host),
            (&long, Length),
        ] {
            assert_eq!(Authority::parse(text.as_bytes()), Err(error), "{text}");
        }
        assert_eq!(Authority::parse(b"\xff\xfe:80"), Err(Host));
    }
}
