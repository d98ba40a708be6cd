//! One DNS query at a time, by each transport that resolvers use.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::str::FromStr as _;
use std::time::Duration;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use mesh_tests::protocol::{CallFailure, DnsAnswer, DnsBy, DnsQuery, Reply};

use crate::objects::failed;

pub(crate) fn query(query: &DnsQuery) -> Result<Reply, CallFailure> {
    let malformed = |text: String| CallFailure { errno: None, doing: "make the query".to_owned(), text };
    let name = Name::from_ascii(&query.name).map_err(|error| malformed(error.to_string()))?;
    let kind = RecordType::from_str(&query.kind).map_err(|error| malformed(error.to_string()))?;
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    let packet = message.to_vec().map_err(|error| malformed(error.to_string()))?;
    let timeout = Duration::from_millis(query.timeout_ms);
    let answer = match query.by {
        DnsBy::ConnectedUdp => connected_udp(query.server, &packet, timeout),
        DnsBy::UnconnectedUdp => unconnected_udp(query.server, &packet, timeout),
        DnsBy::Tcp => tcp(query.server, &packet, timeout),
    }
    .map_err(failed("ask the name server"))?;
    let answer = Message::from_vec(&answer).map_err(|error| CallFailure {
        errno: None,
        doing: "read the DNS answer".to_owned(),
        text: error.to_string(),
    })?;
    if answer.metadata.id != message.metadata.id {
        return Err(malformed("the answer has another id than the query".to_owned()));
    }
    Ok(Reply::Dns(summary(&answer)))
}

fn connected_udp(server: SocketAddr, packet: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let socket = udp_socket(server, timeout)?;
    socket.connect(server)?;
    socket.send(packet)?;
    let mut buffer = vec![0; 64 * 1024];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn unconnected_udp(server: SocketAddr, packet: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let socket = udp_socket(server, timeout)?;
    socket.send_to(packet, server)?;
    let mut buffer = vec![0; 64 * 1024];
    let (length, from) = socket.recv_from(&mut buffer)?;
    if from != server {
        return Err(io::Error::other(format!("the answer came from {from}, not from {server}")));
    }
    buffer.truncate(length);
    Ok(buffer)
}

fn udp_socket(server: SocketAddr, timeout: Duration) -> io::Result<UdpSocket> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(timeout))?;
    Ok(socket)
}

fn tcp(server: SocketAddr, packet: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    let length = u16::try_from(packet.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(packet);
    stream.write_all(&framed)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn summary(message: &Message) -> DnsAnswer {
    let addresses = message.answers.iter().filter_map(|record| match &record.data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    });
    DnsAnswer {
        code: message.metadata.response_code.to_string(),
        truncated: message.metadata.truncation,
        answers: message
            .answers
            .iter()
            .map(|record| format!("{} {}", record.data.record_type(), record.data))
            .collect(),
        addresses: addresses.collect(),
    }
}
