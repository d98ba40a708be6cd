//! Owns which ports of its parent a route is in force at: those that it means and that can carry its kind.
//!
//! Invariant: a port is one of them exactly if the compiler makes a table of the route for it (`source/kubernetes/tests/routes.rs` holds
//! both together; of a host that several ServiceEntries have, the compiler makes what the ports of any of them carry).

use std::{fmt, sync::Arc};

use mesh_core::{route::protocol::AppProtocol, snapshot::ServicePort};

use super::{ParentKind, ParentRef};
use crate::resource::Kind;

/// Ports that are named in a message.
const NAMED_MAX: usize = 4;

/// Why a route is in force at no port of its parent. As text it says so of the parent, whose name comes before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unattached {
    /// The parent has no ports.
    NoPorts,
    /// None of this number.
    NoNumber(u16),
    /// None of this name.
    NoName(Arc<str>),
    /// The port of this number has another name.
    NotBoth(u16, Arc<str>),
    /// At those that are meant something else is spoken: what at which, what routes of the kind want, and how to say that it is spoken.
    NotCarried {
        /// Ports and what is spoken there.
        spoken: Vec<(u16, AppProtocol)>,
        /// The route's kind.
        route: Kind,
        /// Whether the parent is a ServiceEntry.
        of_entry: bool,
    },
}

impl fmt::Display for Unattached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPorts => f.write_str("has no ports"),
            Self::NoNumber(number) => write!(f, "has no port {number}"),
            Self::NoName(name) => write!(f, "has no port called {name:?}"),
            Self::NotBoth(number, name) => write!(f, "has no port {number} called {name:?}"),
            Self::NotCarried { spoken, route, of_entry } => {
                let named = spoken.iter().take(NAMED_MAX);
                let named: Vec<String> =
                    named.map(|(number, protocol)| format!("{} at port {number}", word(*protocol))).collect();
                let (wanted, examples) =
                    if is_http(*route) { ("HTTP", "http…") } else { ("TLS or TCP", "tls… or tcp…") };
                let how = if *of_entry { "protocol" } else { "appProtocol or, without one, by its name" };
                write!(
                    f,
                    "speaks {}, and {route}s are for ports that speak {wanted}: say so by the port's {how} ({examples})",
                    named.join(", ")
                )
            }
        }
    }
}

/// The numbers of the ports that a route of a kind is in force at.
///
/// # Errors
/// Why there are none.
pub(crate) fn attached<'p>(
    route: Kind,
    parent: &ParentRef,
    ports: impl Iterator<Item = &'p ServicePort>,
) -> Result<Vec<u16>, Unattached> {
    // A headless service without ports has one that nobody can mean.
    let ports: Vec<&ServicePort> = ports.filter(|port| port.port != 0).collect();
    let has_number = |port: &&ServicePort| parent.port.is_none_or(|number| number == port.port);
    let has_name = |port: &&ServicePort| parent.section.as_ref().is_none_or(|name| *name == port.name);
    let meant: Vec<&ServicePort> =
        ports.iter().copied().filter(|port| has_number(port) && has_name(port)).collect();
    let mut carrying: Vec<u16> =
        meant.iter().filter(|port| carries(AppProtocol::of(port), route)).map(|port| port.port).collect();
    // Hosts of one ServiceEntry have the same ones.
    carrying.sort_unstable();
    carrying.dedup();
    if !carrying.is_empty() {
        return Ok(carrying);
    }
    if !meant.is_empty() {
        let mut spoken: Vec<_> = meant.iter().map(|port| (port.port, AppProtocol::of(port))).collect();
        spoken.sort_by_key(|(number, _)| *number);
        spoken.dedup();
        let of_entry = parent.kind == ParentKind::ServiceEntry;
        return Err(Unattached::NotCarried { spoken, route, of_entry });
    }
    Err(match (parent.port, &parent.section) {
        _ if ports.is_empty() => Unattached::NoPorts,
        (Some(number), _) if !ports.iter().any(has_number) => Unattached::NoNumber(number),
        (_, Some(name)) if !ports.iter().any(has_name) => Unattached::NoName(Arc::clone(name)),
        (Some(number), Some(name)) => Unattached::NotBoth(number, Arc::clone(name)),
        // With nothing said about it every port is meant.
        _ => Unattached::NoPorts,
    })
}

/// Whether routes of a kind are tried where this is spoken.
fn carries(spoken: AppProtocol, route: Kind) -> bool {
    if is_http(route) { spoken.carries_requests() } else { spoken.carries_streams() }
}

fn is_http(route: Kind) -> bool {
    matches!(route, Kind::HttpRoute | Kind::GrpcRoute)
}

/// What is spoken, for messages.
fn word(protocol: AppProtocol) -> &'static str {
    match protocol {
        AppProtocol::Http => "HTTP",
        AppProtocol::Http2 => "HTTP/2",
        AppProtocol::Grpc => "gRPC",
        AppProtocol::GrpcWeb => "gRPC-Web",
        AppProtocol::Tls => "TLS",
        AppProtocol::Tcp => "TCP",
        AppProtocol::Udp => "UDP",
        AppProtocol::Sniffed => "anything",
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{Name, Protocol};

    use super::*;

    fn port(name: &str, number: u16) -> ServicePort {
        ServicePort {
            name: name.into(),
            port: number,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: Vec::new(),
        }
    }

    fn at(route: Kind, number: Option<u16>, name: Option<&str>, ports: &[ServicePort]) -> String {
        let parent = ParentRef {
            kind: ParentKind::Service,
            name: Name::new("shop", "web"),
            port: number,
            section: name.map(Into::into),
        };
        match attached(route, &parent, ports.iter()) {
            Ok(ports) => format!("{ports:?}"),
            Err(why) => why.to_string(),
        }
    }

    #[test]
    fn of_the_ports_that_are_meant_those_count_that_carry_the_kind() {
        let ports = [port("http", 80), port("https", 443), port("web", 90), port("mysql", 3306)];
        for (route, number, name, wanted) in [
            (Kind::HttpRoute, None, None, "[80, 90]"),
            (Kind::GrpcRoute, None, None, "[80, 90]"),
            (Kind::TlsRoute, None, None, "[90, 443, 3306]"),
            (Kind::TcpRoute, None, Some("mysql"), "[3306]"),
            (Kind::HttpRoute, Some(80), Some("http"), "[80]"),
            (Kind::HttpRoute, Some(81), None, "has no port 81"),
            (Kind::HttpRoute, None, Some("grpc"), "has no port called \"grpc\""),
            (Kind::HttpRoute, Some(81), Some("grpc"), "has no port 81"),
            (Kind::HttpRoute, Some(80), Some("https"), "has no port 80 called \"https\""),
        ] {
            assert_eq!(at(route, number, name, &ports), wanted, "{route} {number:?} {name:?}");
        }
        assert_eq!(at(Kind::HttpRoute, None, None, &[port("", 0)]), "has no ports");
        assert_eq!(at(Kind::HttpRoute, Some(80), None, &[]), "has no ports");
    }

    #[test]
    fn what_is_spoken_instead_is_said_and_what_to_do() {
        let tls = [port("db", 3306), port("https", 443), port("https", 443)];
        assert_eq!(
            at(Kind::HttpRoute, None, None, &tls),
            "speaks TLS at port 443, TCP at port 3306, and HTTPRoutes are for ports that speak HTTP: say so by the port's appProtocol or, without one, by its name (http…)"
        );
        let http = at(Kind::TcpRoute, Some(80), None, &[port("http", 80)]);
        assert!(
            http.starts_with("speaks HTTP at port 80, and TCPRoutes are for ports that speak TLS or TCP")
        );
    }
}
