//! A name server outside the mesh: what pods would ask without it, and what the mesh forwards to.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::place::Place;
use crate::world::{NAMESERVER4, Node};

/// The longest answer that goes by UDP; longer ones are truncated, as without EDNS.
const UDP_BYTES: usize = 512;

/// How long answers are good for, in seconds, where a test says nothing else.
const TTL_S: u32 = 5;

/// How often the loops look whether they shall end.
const POLL: Duration = Duration::from_millis(50);

/// A running name server; ends when dropped.
#[derive(Debug)]
pub struct NameServer {
    shared: Arc<Shared>,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    records: Mutex<BTreeMap<Name, Vec<IpAddr>>>,
    ttl_s: AtomicU32,
    asked: Mutex<Vec<Question>>,
    stopped: AtomicBool,
}

/// A question as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Who asked.
    pub from: SocketAddr,
    /// The name, lower case, with a final dot.
    pub name: String,
    /// `A`, `AAAA`, …
    pub kind: String,
    /// It came by TCP.
    pub tcp: bool,
}

impl NameServer {
    /// Serve these names (all others do not exist) on port 53 of `place`, by UDP and TCP.
    ///
    /// # Errors
    /// When a name is none, or the port is taken.
    pub fn start(place: &Place, records: &[(&str, Vec<IpAddr>)]) -> io::Result<Self> {
        Self::start_at(place, place.at4(53), records)
    }

    /// Serve on `node` at the address that pods have in their resolv.conf; it knows no name.
    ///
    /// # Errors
    /// When the node cannot be given the address, or the port is taken.
    pub fn of_cluster(node: &Node) -> io::Result<Self> {
        let host = node.host();
        host.netns().ip(&[format!("addr add {NAMESERVER4}/32 dev lo")]).map_err(io::Error::other)?;
        Self::start_at(host, (NAMESERVER4, 53).into(), &[])
    }

    fn start_at(place: &Place, address: SocketAddr, records: &[(&str, Vec<IpAddr>)]) -> io::Result<Self> {
        let mut known = BTreeMap::new();
        for (name, addresses) in records {
            known.insert(Name::from_str(name).map_err(io::Error::other)?.to_lowercase(), addresses.clone());
        }
        let made =
            place.run(|| UdpSocket::bind(address).and_then(|udp| Ok((udp, TcpListener::bind(address)?))));
        let (datagrams, listener) = made.map_err(io::Error::other)??;
        let shared = Arc::new(Shared {
            records: Mutex::new(known),
            ttl_s: AtomicU32::new(TTL_S),
            asked: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        datagrams.set_read_timeout(Some(POLL))?;
        listener.set_nonblocking(true)?;
        let (by_udp, by_tcp) = (Arc::clone(&shared), Arc::clone(&shared));
        std::thread::spawn(move || by_udp.serve_datagrams(&datagrams));
        std::thread::spawn(move || by_tcp.serve_streams(&listener));
        Ok(Self { shared, address })
    }

    /// Where it answers.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Let a name have these addresses from now on.
    ///
    /// # Errors
    /// When it is no name.
    pub fn set(&self, name: &str, addresses: Vec<IpAddr>) -> io::Result<()> {
        let name = Name::from_str(name).map_err(io::Error::other)?.to_lowercase();
        lock(&self.shared.records).insert(name, addresses);
        Ok(())
    }

    /// Let a name not exist from now on.
    ///
    /// # Errors
    /// When it is no name.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        lock(&self.shared.records).remove(&Name::from_str(name).map_err(io::Error::other)?.to_lowercase());
        Ok(())
    }

    /// Let answers be good for so many seconds from now on.
    pub fn set_ttl(&self, seconds: u32) {
        self.shared.ttl_s.store(seconds, Ordering::Relaxed);
    }

    /// What it was asked so far, oldest first.
    #[must_use]
    pub fn asked(&self) -> Vec<Question> {
        lock(&self.shared.asked).clone()
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
    }
}

impl Shared {
    fn serve_datagrams(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while !self.stopped.load(Ordering::Acquire) {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            if let Some(answer) = self.answer(&buffer[..length], from, false)
                && let Err(error) = socket.send_to(&answer, from)
            {
                eprintln!("name server: cannot answer {from}: {error}");
            }
        }
    }

    fn serve_streams(self: Arc<Self>, listener: &TcpListener) {
        while !self.stopped.load(Ordering::Acquire) {
            match listener.accept() {
                Ok((stream, from)) => {
                    let server = Arc::clone(&self);
                    std::thread::spawn(move || {
                        // A client that hangs up has what it wanted.
                        drop(server.converse(stream, from));
                    });
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    fn converse(&self, mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        loop {
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut query)?;
            let Some(answer) = self.answer(&query, from, true) else { return Ok(()) };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat())?;
        }
    }

    fn answer(&self, query: &[u8], from: SocketAddr, tcp: bool) -> Option<Vec<u8>> {
        let mut message = Message::from_vec(query).ok()?;
        let question = message.queries.first()?.clone();
        let (name, kind) = (question.name().to_lowercase(), question.query_type());
        lock(&self.asked).push(Question { from, name: name.to_string(), kind: kind.to_string(), tcp });
        message.metadata.message_type = MessageType::Response;
        message.metadata.recursion_available = true;
        message.additionals.clear();
        let ttl_s = self.ttl_s.load(Ordering::Relaxed);
        match lock(&self.records).get(&name) {
            None => message.metadata.response_code = ResponseCode::NXDomain,
            Some(addresses) => {
                let data = addresses.iter().filter_map(|address| match address {
                    IpAddr::V4(v4) if kind == RecordType::A => Some(RData::A(A(*v4))),
                    IpAddr::V6(v6) if kind == RecordType::AAAA => Some(RData::AAAA(AAAA(*v6))),
                    _ => None,
                });
                message.answers =
                    data.map(|data| Record::from_rdata(question.name().clone(), ttl_s, data)).collect();
            }
        }
        let bytes = message.to_vec().ok()?;
        if tcp || bytes.len() <= UDP_BYTES {
            return Some(bytes);
        }
        message.answers.clear();
        message.metadata.truncation = true;
        message.to_vec().ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
