//! Owns the table of connections that the node translates: reading it, and deleting an entry.
//!
//! The kernel tracks connections that pass through the node's own namespace if something there wants it, such as kube-proxy's
//! rules. An entry has two tuples: the connection as the client made it, and how the answers to it look.
//!
//! Invariants:
//! - Only TCP entries whose addresses or ports were translated are ever seen here.
//! - An entry is deleted by its tuple, zone and id: a successor with the same tuple stays.
//! - A node that tracks nothing is not made to: nothing is asked of a kernel without a table.
//!
//! Not here: which entries matter (`forget.rs`).

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use nix::{libc, sys::socket::SockProtocol};

use crate::netlink::{ALL, Netlink, ONE, attributes, malformed, put_attribute};

/// What a search may take. The rest of a table that takes longer is left for the next search.
const SEARCH_MAX: Duration = Duration::from_secs(10);
/// The number of entries of the reader's namespace. Reading it does not load the module, which asking by netlink does.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// `NFNL_SUBSYS_CTNETLINK`, then what is wanted of it (`linux/netfilter/nfnetlink_conntrack.h`).
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// `struct nfgenmsg`: family, version, resource.
const FAMILY_HEADER: usize = 4;

const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_STATE: u16 = 4;
const ID: u16 = 12;
const ZONE: u16 = 18;
const STATUS_MASK: u16 = 26;
/// A tuple's parts.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const V4_SRC: u16 = 1;
const V4_DST: u16 = 2;
const V6_SRC: u16 = 3;
const V6_DST: u16 = 4;
const PROTOCOL: u16 = 1;
const SRC_PORT: u16 = 2;
const DST_PORT: u16 = 3;
/// Of TCP's own state.
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// This attribute has attributes in it.
const NESTED: u16 = 0x8000;

/// `enum tcp_conntrack` of the kernel; not the states of a socket.
const TCP_TIME_WAIT: u8 = 7;
const TCP_CLOSE: u8 = 8;

/// Bits of an entry's status: its source, its destination was translated.
const TRANSLATED_SRC: u32 = 1 << 4;
const TRANSLATED_DST: u32 = 1 << 5;
/// Which entries the kernel sends: status bits, and the bits that are looked at. What only has another source port is there too: the
/// clash with an entry of the first kind makes such ones. The two cannot be told in one question.
const KINDS: [(u32, u32); 2] =
    [(TRANSLATED_DST, TRANSLATED_DST), (TRANSLATED_SRC, TRANSLATED_SRC | TRANSLATED_DST)];

/// One way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
}

impl Tuple {
    fn mirrored(self) -> Self {
        Self { src: self.dst, dst: self.src }
    }
}

/// A tracked TCP connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    /// As the client made it.
    pub(crate) original: Tuple,
    /// As the answers look that the node sees.
    pub(crate) reply: Tuple,
    /// The node saw it end.
    pub(crate) is_closed: bool,
    key: RawKey<'a>,
}

impl Entry<'_> {
    /// Answers look other than the client would expect.
    pub(crate) fn is_translated(&self) -> bool {
        self.reply != self.original.mirrored()
    }

    /// Its name, to be kept.
    pub(crate) fn key(&self) -> Key {
        let RawKey { family, original, zone, id } = self.key;
        Key { family, original: original.into(), zone, id }
    }
}

/// The parts of a name where they were read.
#[derive(Clone, Copy, Debug)]
struct RawKey<'a> {
    family: u8,
    original: &'a [u8],
    zone: Option<[u8; 2]>,
    id: [u8; 4],
}

/// The kernel's name of one entry, in the kernel's own bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    family: u8,
    original: Box<[u8]>,
    zone: Option<[u8; 2]>,
    id: [u8; 4],
}

/// The node's table.
#[derive(Debug)]
pub(crate) struct Conntrack(Netlink);

impl Conntrack {
    /// The table of the calling thread's namespace; `None` if it has no entries.
    pub(crate) fn here() -> io::Result<Option<Self>> {
        match fs::read_to_string(COUNT) {
            Ok(count) if count.trim() == "0" => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(_) | Err(_) => {}
        }
        Netlink::here(SockProtocol::NetlinkNetFilter).map(|netlink| Some(Self(netlink)))
    }

    /// Calls `visit` for each translated TCP connection of both families. Entries come and go meanwhile; one may be missed or seen
    /// twice. After an error nothing else can be asked here.
    ///
    /// Blocking: the kernel walks its whole table twice.
    pub(crate) fn each_translated(
        &mut self,
        mut visit: impl FnMut(Entry<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let began = Instant::now();
        for (status, mask) in KINDS {
            let mut request = request(libc::AF_UNSPEC as u8);
            put_attribute(&mut request, STATUS, &status.to_be_bytes());
            put_attribute(&mut request, STATUS_MASK, &mask.to_be_bytes());
            self.0.ask(GET, ALL, &request, |message| {
                if began.elapsed() > SEARCH_MAX {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                match entry(message)?.filter(Entry::is_translated) {
                    Some(entry) => visit(entry),
                    None => Ok(()),
                }
            })?;
        }
        Ok(())
    }

    /// Whether the node saw this connection end; `None`: it is no longer there.
    pub(crate) fn is_closed(&mut self, key: &Key) -> io::Result<Option<bool>> {
        let mut is_closed = None;
        let asked = self.0.ask(GET, ONE, &key.request(), |message| {
            let found = entry(message)?.filter(|entry| entry.key.id == key.id);
            is_closed = found.map(|entry| entry.is_closed);
            Ok(())
        });
        gone_is_none(asked).map(|_| is_closed)
    }

    /// Deletes an entry. `false`: it was gone already.
    pub(crate) fn delete(&mut self, key: &Key) -> io::Result<bool> {
        let mut request = key.request();
        put_attribute(&mut request, ID, &key.id);
        gone_is_none(self.0.ask(DELETE, ONE, &request, |_| Ok(()))).map(|deleted| deleted.is_some())
    }
}

impl Key {
    fn request(&self) -> Vec<u8> {
        let mut request = request(self.family);
        put_attribute(&mut request, ORIGINAL | NESTED, &self.original);
        if let Some(zone) = self.zone {
            put_attribute(&mut request, ZONE, &zone);
        }
        request
    }
}

fn gone_is_none(asked: io::Result<()>) -> io::Result<Option<()>> {
    match asked {
        Ok(()) => Ok(Some(())),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn request(family: u8) -> Vec<u8> {
    vec![family, 0, 0, 0]
}

/// `None`: it is no TCP connection.
fn entry(message: &[u8]) -> io::Result<Option<Entry<'_>>> {
    let family = *message.first().ok_or_else(malformed)?;
    let (mut original, mut reply, mut state, mut zone, mut id) = (None, None, None, None, None);
    for (kind, value) in attributes(message.get(FAMILY_HEADER..).ok_or_else(malformed)?) {
        match kind {
            ORIGINAL => original = Some(value),
            REPLY => reply = Some(value),
            PROTOCOL_STATE => state = tcp_state(value),
            ZONE => zone = Some(value.try_into().map_err(|_| malformed())?),
            ID => id = Some(value.try_into().map_err(|_| malformed())?),
            _ => {}
        }
    }
    let (raw, reply, id) =
        (original.ok_or_else(malformed)?, reply.ok_or_else(malformed)?, id.ok_or_else(malformed)?);
    let (Some(original), Some(reply), Some(state)) = (tuple(raw), tuple(reply), state) else {
        return Ok(None);
    };
    let is_closed = matches!(state, TCP_TIME_WAIT | TCP_CLOSE);
    Ok(Some(Entry { original, reply, is_closed, key: RawKey { family, original: raw, zone, id } }))
}

fn tcp_state(protocol: &[u8]) -> Option<u8> {
    let (_, tcp) = attributes(protocol).find(|(kind, _)| *kind == TCP)?;
    let (_, state) = attributes(tcp).find(|(kind, _)| *kind == TCP_STATE)?;
    state.first().copied()
}

/// `None`: it is not one of TCP.
fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let part = |wanted| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, part)| part);
    let (mut src, mut dst) = (None, None);
    for (kind, addr) in attributes(part(TUPLE_IP)?) {
        match kind {
            V4_SRC => src = Some(IpAddr::from(<[u8; 4]>::try_from(addr).ok()?)),
            V4_DST => dst = Some(IpAddr::from(<[u8; 4]>::try_from(addr).ok()?)),
            V6_SRC => src = Some(IpAddr::from(<[u8; 16]>::try_from(addr).ok()?)),
            V6_DST => dst = Some(IpAddr::from(<[u8; 16]>::try_from(addr).ok()?)),
            _ => {}
        }
    }
    let (mut src_port, mut dst_port, mut protocol) = (None, None, None);
    for (kind, value) in attributes(part(TUPLE_PROTOCOL)?) {
        match kind {
            PROTOCOL => protocol = value.first().copied(),
            SRC_PORT => src_port = Some(u16::from_be_bytes(value.try_into().ok()?)),
            DST_PORT => dst_port = Some(u16::from_be_bytes(value.try_into().ok()?)),
            _ => {}
        }
    }
    (i32::from(protocol?) == libc::IPPROTO_TCP).then_some(())?;
    Some(Tuple { src: SocketAddr::new(src?, src_port?), dst: SocketAddr::new(dst?, dst_port?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, value) in parts {
            put_attribute(&mut bytes, *kind, value);
        }
        bytes
    }

    fn raw_tuple(protocol: u8, src: &str, dst: &str) -> Vec<u8> {
        let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let (src_kind, dst_kind) = if src.is_ipv4() { (V4_SRC, V4_DST) } else { (V6_SRC, V6_DST) };
        let ip = nested(&[(src_kind, &octets(src.ip())), (dst_kind, &octets(dst.ip()))]);
        let ports = nested(&[
            (PROTOCOL, &[protocol]),
            (SRC_PORT, &src.port().to_be_bytes()),
            (DST_PORT, &dst.port().to_be_bytes()),
        ]);
        nested(&[(TUPLE_IP | NESTED, &ip), (TUPLE_PROTOCOL | NESTED, &ports)])
    }

    /// What the kernel sends of a connection by a service's address.
    fn message(protocol: u8, state: u8, ends: [&str; 3]) -> Vec<u8> {
        let [client, service, server] = ends;
        let tcp = nested(&[(TCP_STATE, &[state])]);
        let mut bytes = request(if client.starts_with('[') { 10 } else { 2 });
        bytes.extend(nested(&[
            (ORIGINAL | NESTED, &raw_tuple(protocol, client, service)),
            (REPLY | NESTED, &raw_tuple(protocol, server, client)),
            (PROTOCOL_STATE | NESTED, &nested(&[(TCP | NESTED, &tcp)])),
            (ID, &[1, 2, 3, 4]),
            (ZONE, &[0, 7]),
        ]));
        bytes
    }

    const V4: [&str; 3] = ["10.244.1.5:40000", "10.96.0.9:80", "10.244.1.6:8080"];
    const V6: [&str; 3] = ["[fd00::5]:40000", "[fd00:96::9]:80", "[fd00::6]:8080"];

    #[test]
    fn an_entry_has_the_ends_and_the_state_the_kernel_names() {
        for ends in [V4, V6] {
            for (state, closed) in [(3, false), (4, false), (5, false), (6, false), (7, true), (8, true)] {
                let bytes = message(6, state, ends);
                let entry = entry(&bytes).unwrap().unwrap();
                let [client, service, server] = ends.map(|end| end.parse().unwrap());
                assert_eq!(entry.original, Tuple { src: client, dst: service });
                assert_eq!(entry.reply, Tuple { src: server, dst: client });
                assert_eq!((entry.is_closed, entry.is_translated()), (closed, true), "{state}");
            }
        }
    }

    #[test]
    fn an_entry_that_mirrors_itself_is_not_translated_and_one_of_udp_is_none() {
        let bytes = message(6, 7, [V4[0], V4[2], V4[2]]);
        assert!(!entry(&bytes).unwrap().unwrap().is_translated());
        assert!(entry(&message(17, 7, V4)).unwrap().is_none());
    }

    #[test]
    fn a_name_says_what_the_kernel_said() {
        let bytes = message(6, 7, V6);
        let key = entry(&bytes).unwrap().unwrap().key();
        assert_eq!((key.family, key.zone, key.id), (10, Some([0, 7]), [1, 2, 3, 4]));
        let request = key.request();
        let said: Vec<_> = attributes(&request[FAMILY_HEADER..]).collect();
        assert_eq!(said, [(ORIGINAL, &raw_tuple(6, V6[0], V6[1])[..]), (ZONE, &[0, 7][..])]);
    }

    #[test]
    fn what_is_cut_short_anywhere_is_refused_or_is_no_connection_and_never_a_panic() {
        let bytes = message(6, 7, V4);
        // The last attribute is the zone, which most entries lack, and its last two bytes fill it up.
        for len in 0..bytes.len() - 2 {
            let whole = matches!(entry(&bytes[..len]), Ok(Some(entry)) if entry.key.zone.is_some());
            assert!(!whole, "{len}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 3, 4, 0x7f, 0xff] {
                let mut broken = bytes.clone();
                broken[at] = value;
                drop(entry(&broken).map(|entry| entry.map(|entry| entry.key())));
            }
        }
    }
}
