//! Asking DNS for the agent itself: the addresses of endpoints that are given by names.
//!
//! Invariants:
//! - A question leaves from a socket of its own with a random port and id, connected to the server: what does not repeat question and
//!   id, from that server, is counted as no answer.
//! - Every lookup ends in time, whatever servers send.
//!
//! Not here: which names, when again, and what becomes of the answers (`mesh_core::resolve`).

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use mesh_core::resolve::{ADDRESSES_MAX, Answer, Failure, Said};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    forward::{read_message, write_message},
    wire,
};

/// Time for one server to answer one question.
const ATTEMPT_MAX: Duration = Duration::from_secs(2);
/// How often all servers are asked, one after the other.
const ROUNDS: usize = 2;
/// Most servers that are asked, as the C library has it.
const SERVERS_MAX: usize = 3;
/// The largest reply by UDP.
const REPLY_MAX: usize = 4096;
/// Longest chain of aliases that is followed within one reply.
const ALIASES_MAX: usize = 8;

/// Asks servers for addresses of names.
#[derive(Debug, Default)]
pub struct Lookup {
    keys: RandomState,
}

impl Lookup {
    /// Asks for both families of a name (without trailing dot), one server after the other until one knows.
    ///
    /// Cancel safety: dropping the future closes its sockets.
    pub async fn addresses(&self, servers: &[SocketAddr], name: &str) -> Answer {
        let Ok(name) = wire::absolute(name) else {
            return Answer { v4: Err(Failure::BadName), v6: Err(Failure::BadName) };
        };
        let (v4, v6) = tokio::join!(
            self.family(servers, &name, RecordType::A),
            self.family(servers, &name, RecordType::AAAA)
        );
        Answer { v4, v6 }
    }

    async fn family(&self, servers: &[SocketAddr], name: &Name, kind: RecordType) -> Result<Said, Failure> {
        let mut last = Failure::NoServer;
        for round in 0..ROUNDS {
            for (at, server) in servers.iter().take(SERVERS_MAX).enumerate() {
                let id = self.id(round, at, name, kind);
                match timeout(ATTEMPT_MAX, ask(*server, name, kind, id)).await {
                    Ok(Ok(said)) => return Ok(said),
                    // Other servers would say the same.
                    Ok(Err(Failure::NoSuchName)) => return Err(Failure::NoSuchName),
                    Ok(Err(failure)) => last = failure,
                    Err(_) => last = Failure::TimedOut,
                }
            }
        }
        Err(last)
    }

    /// An id that a stranger cannot guess: keyed, and of another input each time.
    fn id(&self, round: usize, server: usize, name: &Name, kind: RecordType) -> u16 {
        let moment = std::time::Instant::now();
        // The upper bits of a keyed hash are as good as any.
        u16::try_from(self.keys.hash_one((moment, round, server, name, u16::from(kind))) >> 48).unwrap_or(0)
    }
}

async fn ask(server: SocketAddr, name: &Name, kind: RecordType, id: u16) -> Result<Said, Failure> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    let query = message.to_vec().map_err(|_| Failure::BadName)?;
    let bytes = over_udp(server, &query, id).await.map_err(|_| Failure::Unreachable)?;
    let mut reply = wire::decode_reply(&bytes).ok_or(Failure::BadReply)?;
    if reply.metadata.truncation {
        let bytes = over_tcp(server, &query).await.map_err(|_| Failure::Unreachable)?;
        if !wire::answers(&bytes, &query, id) {
            return Err(Failure::BadReply);
        }
        reply = wire::decode_reply(&bytes).ok_or(Failure::BadReply)?;
    }
    said(&reply, name, kind)
}

async fn over_udp(server: SocketAddr, query: &[u8], id: u16) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut reply = vec![0; REPLY_MAX];
    loop {
        let len = socket.recv(&mut reply).await?;
        if wire::answers(&reply[..len], query, id) {
            reply.truncate(len);
            return Ok(reply);
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    read_message(&mut stream).await
}

/// What a reply says of a name: the addresses at the end of its aliases, and the shortest time on the way.
fn said(reply: &Message, name: &Name, kind: RecordType) -> Result<Said, Failure> {
    match reply.metadata.response_code {
        ResponseCode::NoError => {}
        ResponseCode::NXDomain => return Err(Failure::NoSuchName),
        _ => return Err(Failure::ServerFailure),
    }
    let mut owner = name.to_lowercase();
    let mut ttl: Option<u32> = None;
    let mut shorten = |by: u32| ttl = Some(ttl.map_or(by, |known| known.min(by)));
    let mut passed = BTreeSet::new();
    for _ in 0..ALIASES_MAX {
        if !passed.insert(owner.clone()) {
            break;
        }
        let alias = reply.answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if record.name.to_lowercase() == owner => {
                Some((target.0.to_lowercase(), record.ttl))
            }
            _ => None,
        });
        let Some((target, time)) = alias else { break };
        shorten(time);
        owner = target;
    }
    let mut addrs = Vec::new();
    for record in reply.answers.iter().filter(|record| record.name.to_lowercase() == owner) {
        let addr = match (&record.data, kind) {
            (RData::A(addr), RecordType::A) => IpAddr::from(addr.0),
            (RData::AAAA(addr), RecordType::AAAA) => IpAddr::from(addr.0),
            _ => continue,
        };
        // Names of others must not lead to what only this machine can reach.
        if addr.is_loopback() || addr.is_unspecified() || addr.is_multicast() {
            continue;
        }
        shorten(record.ttl);
        if addrs.len() < ADDRESSES_MAX {
            addrs.push(addr);
        }
    }
    Ok(Said { addrs, ttl: Duration::from_secs(ttl.unwrap_or(0).into()) })
}

/// The servers of a `resolv.conf`.
pub fn servers_of(resolv_conf: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let addr = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        Some(SocketAddr::new(addr.parse().ok()?, 53))
    };
    resolv_conf.lines().filter_map(server).take(SERVERS_MAX).collect()
}

#[cfg(test)]
mod tests;
