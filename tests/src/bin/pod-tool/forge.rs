//! Packets that lie about where they come from.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_tests::protocol::{CallFailure, Reply};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::objects::failed;

const TCP_HEADER: u8 = 20;
const IP4_HEADER: u8 = 20;
const TCP: u8 = 6;
const SYN: u8 = 2;
const HOPS: u8 = 64;

/// Send one SYN that claims to come from `from`; `IPPROTO_RAW` lets the sender write the IP header.
pub(crate) fn syn(from: SocketAddr, to: SocketAddr) -> Result<Reply, CallFailure> {
    let (packet, domain) = match (from, to) {
        (SocketAddr::V4(from4), SocketAddr::V4(to4)) => {
            (packet4(*from4.ip(), *to4.ip(), from, to), Domain::IPV4)
        }
        (SocketAddr::V6(from6), SocketAddr::V6(to6)) => {
            (packet6(*from6.ip(), *to6.ip(), from, to), Domain::IPV6)
        }
        _ => {
            let text = format!("{from} and {to} are of different families");
            return Err(CallFailure { errno: None, doing: "forge".to_owned(), text });
        }
    };
    let raw = Protocol::from(libc::IPPROTO_RAW);
    let socket = Socket::new(domain, Type::RAW, Some(raw)).map_err(failed("socket"))?;
    // The port of a raw IPv6 destination must be zero.
    let to = SocketAddr::new(to.ip(), 0);
    socket.send_to(&packet, &to.into()).map_err(failed("sendto"))?;
    Ok(Reply::Done)
}

fn packet4(source: Ipv4Addr, target: Ipv4Addr, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, IP4_HEADER + TCP_HEADER, 0, 1, 0, 0, HOPS, TCP, 0, 0];
    packet.extend(source.octets());
    packet.extend(target.octets());
    // The kernel fills in the checksum of the IPv4 header.
    packet.extend(tcp_header(&source.octets(), &target.octets(), from.port(), to.port()));
    packet
}

fn packet6(source: Ipv6Addr, target: Ipv6Addr, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, TCP_HEADER, TCP, HOPS];
    packet.extend(source.octets());
    packet.extend(target.octets());
    packet.extend(tcp_header(&source.octets(), &target.octets(), from.port(), to.port()));
    packet
}

fn tcp_header(source: &[u8], target: &[u8], from: u16, to: u16) -> Vec<u8> {
    let mut header = Vec::with_capacity(usize::from(TCP_HEADER));
    header.extend(from.to_be_bytes());
    header.extend(to.to_be_bytes());
    header.extend(0x1234_5678u32.to_be_bytes());
    header.extend([0; 4]);
    header.extend([TCP_HEADER << 2, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&[source, target, &[0, TCP, 0, TCP_HEADER], &header].concat());
    header[16..18].copy_from_slice(&sum.to_be_bytes());
    header
}

/// The Internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn a_header_with_its_checksum_sums_to_zero() {
        let mut header =
            [0x45, 0, 0, 0x3c, 0x1c, 0x46, 0x40, 0, 0x40, 6, 0, 0, 172, 16, 10, 99, 172, 16, 10, 12];
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(sum, 0xb1e6);
        assert_eq!(checksum(&header), 0);
    }
}
