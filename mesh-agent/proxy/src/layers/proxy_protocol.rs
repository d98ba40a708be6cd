//! The header of the PROXY protocol, which tells a server whose connection it is.
//!
//! Addresses are the client's own and what it dialled, both without the IPv4-in-IPv6 form.

use std::net::SocketAddr;

use mesh_core::route::cluster::ProxyProtocol;

/// What every header of version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, for somebody else's connection.
const PROXIED: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
const UNKNOWN: u8 = 0;

/// The bytes that a connection begins with. Where the two addresses are of different families it says that they are unknown.
pub(super) fn header(version: ProxyProtocol, client: SocketAddr, dialled: SocketAddr) -> Vec<u8> {
    let canonical = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let (client, dialled) = (canonical(client), canonical(dialled));
    match version {
        ProxyProtocol::V1 => match (client, dialled) {
            (SocketAddr::V4(_), SocketAddr::V4(_)) => text("TCP4", client, dialled),
            (SocketAddr::V6(_), SocketAddr::V6(_)) => text("TCP6", client, dialled),
            _ => b"PROXY UNKNOWN\r\n".to_vec(),
        },
        ProxyProtocol::V2 => {
            let ports = [client.port().to_be_bytes(), dialled.port().to_be_bytes()].concat();
            match (client, dialled) {
                (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                    binary(TCP4, &[&from.ip().octets()[..], &to.ip().octets(), &ports])
                }
                (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                    binary(TCP6, &[&from.ip().octets()[..], &to.ip().octets(), &ports])
                }
                _ => binary(UNKNOWN, &[]),
            }
        }
    }
}

fn text(family: &str, client: SocketAddr, dialled: SocketAddr) -> Vec<u8> {
    let (from, to) = (client.ip(), dialled.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), dialled.port()).into_bytes()
}

fn binary(family: u8, parts: &[&[u8]]) -> Vec<u8> {
    let addresses = parts.concat();
    // At most two IPv6 addresses and two ports.
    let length = u16::try_from(addresses.len()).unwrap_or(0).to_be_bytes();
    [&SIGNATURE[..], &[PROXIED, family], &length, &addresses].concat()
}

#[cfg(test)]
mod tests {
    use ppp::{HeaderResult, v1, v2};

    use super::*;

    fn header(version: ProxyProtocol, client: &str, dialled: &str) -> Vec<u8> {
        super::header(version, client.parse().unwrap(), dialled.parse().unwrap())
    }

    const FOUR: (&str, &str) = ("10.0.0.1:40000", "10.96.0.1:443");
    const SIX: (&str, &str) = ("[fd00::1]:40000", "[fd00::2]:443");

    #[test]
    fn others_read_the_text_form_as_it_is_meant() {
        for (client, dialled) in [FOUR, SIX] {
            let bytes = header(ProxyProtocol::V1, client, dialled);
            let HeaderResult::V1(Ok(parsed)) = HeaderResult::parse(&bytes) else { panic!("{bytes:?}") };
            let seen = match parsed.addresses {
                v1::Addresses::Tcp4(a) => (
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                v1::Addresses::Tcp6(a) => (
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                v1::Addresses::Unknown => panic!(),
            };
            assert_eq!(seen, (client.parse::<SocketAddr>().unwrap(), dialled.parse::<SocketAddr>().unwrap()));
        }
        assert_eq!(header(ProxyProtocol::V1, FOUR.0, SIX.1), b"PROXY UNKNOWN\r\n");
    }

    #[test]
    fn others_read_the_binary_form_as_it_is_meant() {
        for (client, dialled) in [FOUR, SIX] {
            let bytes = header(ProxyProtocol::V2, client, dialled);
            let HeaderResult::V2(Ok(parsed)) = HeaderResult::parse(&bytes) else { panic!("{bytes:?}") };
            assert_eq!((parsed.command, parsed.protocol), (v2::Command::Proxy, v2::Protocol::Stream));
            let seen = match parsed.addresses {
                v2::Addresses::IPv4(a) => (
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                v2::Addresses::IPv6(a) => (
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                _ => panic!(),
            };
            assert_eq!(seen, (client.parse::<SocketAddr>().unwrap(), dialled.parse::<SocketAddr>().unwrap()));
        }
        let bytes = header(ProxyProtocol::V2, FOUR.0, SIX.1);
        let HeaderResult::V2(Ok(parsed)) = HeaderResult::parse(&bytes) else { panic!("{bytes:?}") };
        assert_eq!(parsed.addresses, v2::Addresses::Unspecified);
    }

    #[test]
    fn addresses_of_dual_stack_sockets_are_shown_as_they_are() {
        let mapped = header(ProxyProtocol::V1, "[::ffff:10.0.0.1]:40000", "10.96.0.1:443");
        assert_eq!(mapped, b"PROXY TCP4 10.0.0.1 10.96.0.1 40000 443\r\n");
    }
}
