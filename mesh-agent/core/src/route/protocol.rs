//! What is spoken at a port of a service, as far as somebody said so.

use crate::snapshot::{Protocol, ServicePort};

/// What is spoken at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppProtocol {
    /// HTTP/1.1; clients may also begin with HTTP/2.
    Http,
    /// HTTP/2 without TLS, at the endpoint too.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web: HTTP/1.1 or HTTP/2.
    GrpcWeb,
    /// TLS that is not ended here: routed by its SNI.
    Tls,
    /// Bytes.
    Tcp,
    /// Datagrams.
    Udp,
    /// Nobody said it: the first bytes tell, if the client sends any.
    Sniffed,
}

/// TCP ports whose servers speak first or whose protocol nobody declares; never sniffed: SMTP, DNS, MySQL, MongoDB (A11).
const SERVER_SPEAKS_FIRST: [u16; 4] = [25, 53, 3306, 27017];

impl AppProtocol {
    /// By `appProtocol`, else by the beginning of the port's name, else by its number (A11).
    pub fn of(port: &ServicePort) -> Self {
        if port.protocol == Protocol::Udp {
            return Self::Udp;
        }
        let declared = port.app_protocol.as_deref().unwrap_or(&port.name);
        let named = match declared {
            "kubernetes.io/h2c" => Some(Self::Http2),
            "kubernetes.io/ws" => Some(Self::Http),
            "kubernetes.io/wss" => Some(Self::Tls),
            name => Self::of_name(name),
        };
        match named {
            Some(protocol) => protocol,
            None => Self::of_number(port.port),
        }
    }

    /// Whether rules for requests are tried where this is spoken.
    pub fn carries_requests(self) -> bool {
        self.is_http() || self == Self::Sniffed
    }

    /// Whether rules for TLS and TCP are tried where this is spoken.
    pub fn carries_streams(self) -> bool {
        matches!(self, Self::Tls | Self::Tcp | Self::Sniffed)
    }

    /// By a port's number alone.
    pub fn of_number(port: u16) -> Self {
        if SERVER_SPEAKS_FIRST.contains(&port) { Self::Tcp } else { Self::Sniffed }
    }

    /// By a name like `http` or `http-admin`; `None` for one that says nothing.
    pub fn of_name(name: &str) -> Option<Self> {
        let begins = |word: &str| {
            name.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
                && matches!(name.as_bytes().get(word.len()), None | Some(b'-'))
        };
        let is_any = |words: &[&str]| words.iter().any(|word| begins(word));
        // `grpc-web` before `grpc`, whose prefix it has.
        if begins("grpc-web") {
            Some(Self::GrpcWeb)
        } else if begins("grpc") {
            Some(Self::Grpc)
        } else if begins("http2") {
            Some(Self::Http2)
        } else if is_any(&["http", "http_proxy"]) {
            Some(Self::Http)
        } else if is_any(&["https", "tls"]) {
            Some(Self::Tls)
        } else if is_any(&["tcp", "mongo", "mysql", "redis"]) {
            Some(Self::Tcp)
        } else if begins("udp") {
            Some(Self::Udp)
        } else {
            None
        }
    }

    /// Whether requests are looked at.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// Whether the endpoint is spoken to by HTTP/2 whatever the client speaks.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16, name: &str, app_protocol: Option<&str>) -> ServicePort {
        ServicePort {
            name: name.into(),
            port: number,
            protocol: Protocol::Tcp,
            app_protocol: app_protocol.map(Into::into),
            endpoints: Vec::new(),
        }
    }

    #[test]
    fn names_say_what_is_spoken() {
        use AppProtocol::*;
        let cases = [
            ("http", Http),
            ("HTTP-admin", Http),
            ("http2-x", Http2),
            ("http_proxy", Http),
            ("grpc", Grpc),
            ("grpc-web", GrpcWeb),
            ("grpc-web-x", GrpcWeb),
            ("grpc-webby", Grpc),
            ("https", Tls),
            ("tls-in", Tls),
            ("tcp", Tcp),
            ("mysql-rw", Tcp),
            ("redis", Tcp),
            ("mongo", Tcp),
            ("httpx", Sniffed),
            ("web", Sniffed),
            ("", Sniffed),
            ("é", Sniffed),
        ];
        for (name, protocol) in cases {
            assert_eq!(AppProtocol::of(&port(80, name, None)), protocol, "{name}");
        }
    }

    #[test]
    fn app_protocol_beats_the_name() {
        let cases = [
            ("kubernetes.io/h2c", AppProtocol::Http2),
            ("kubernetes.io/ws", AppProtocol::Http),
            ("kubernetes.io/wss", AppProtocol::Tls),
            ("grpc", AppProtocol::Grpc),
            ("example.com/own", AppProtocol::Sniffed),
        ];
        for (declared, protocol) in cases {
            assert_eq!(AppProtocol::of(&port(80, "tcp-x", Some(declared))), protocol, "{declared}");
        }
    }

    #[test]
    fn ports_whose_servers_speak_first_are_not_sniffed_unless_they_are_declared() {
        assert_eq!(AppProtocol::of(&port(3306, "db", None)), AppProtocol::Tcp);
        assert_eq!(AppProtocol::of(&port(3306, "http", None)), AppProtocol::Http);
        assert_eq!(AppProtocol::of(&port(3307, "db", None)), AppProtocol::Sniffed);
    }

    #[test]
    fn udp_stays_udp_whatever_it_is_called() {
        let port = ServicePort { protocol: Protocol::Udp, ..port(53, "http", Some("http")) };
        assert_eq!(AppProtocol::of(&port), AppProtocol::Udp);
    }
}
