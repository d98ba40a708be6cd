//! DNS messages as bytes: what a client asked, and the replies we make ourselves.
//!
//! Invariants:
//! - Decoding is total: any bytes give a query or a [`NotAQuery`].
//! - A reply over UDP never exceeds what the client said it takes; what does not fit is marked truncated.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record as WireRecord, RecordType,
        rdata::{A, AAAA, CNAME, SOA, SRV},
    },
    serialize::binary::BinEncodable,
};
use mesh_core::dns::{QType, Record, RecordData};

use super::Transport;

/// Header of every message.
const HEADER_LEN: usize = 12;
/// What every client takes over UDP (RFC 1035).
const UDP_MIN: u16 = 512;
/// What we say we take, and give at most: the value of DNS flag day 2020, below any usual MTU.
const UDP_MAX: u16 = 1232;

/// A query we understand.
#[derive(Debug)]
pub(crate) struct Query {
    bytes: Vec<u8>,
    message: Message,
    name: String,
}

/// Why bytes are no query for us.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotAQuery {
    /// A reply, or too short to have an id: answering could start a loop.
    Silent,
    /// Refused with this reply.
    Reply(Vec<u8>),
    /// Well-formed, but nothing we know (another class, operation or number of questions): for the resolver.
    Foreign,
}

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// Anything else.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, NotAQuery> {
        if bytes.len() < HEADER_LEN || is_reply(bytes) {
            return Err(NotAQuery::Silent);
        }
        let Ok(message) = Message::from_vec(bytes) else {
            return Err(NotAQuery::Reply(failure(bytes, ResponseCode::FormErr)));
        };
        let [question] = &message.queries[..] else { return Err(NotAQuery::Foreign) };
        if message.metadata.op_code != OpCode::Query || question.query_class() != DNSClass::IN {
            return Err(NotAQuery::Foreign);
        }
        if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
            return Err(NotAQuery::Reply(failure(bytes, ResponseCode::BADVERS)));
        }
        let name = question.name().to_ascii();
        Ok(Self { bytes: bytes.to_vec(), message, name })
    }

    /// The message as it came.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// The name asked for, as the client spelled it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn qtype(&self) -> QType {
        super::qtype(self.record_type())
    }

    pub(crate) fn record_type(&self) -> RecordType {
        self.message.queries.first().map_or(RecordType::A, |question| question.query_type())
    }

    /// A reply with these records.
    pub(crate) fn answer(
        &self,
        records: &[Record],
        additional: &[Record],
        ttl: u32,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let mut reply = self.reply(ResponseCode::NoError);
        reply.answers = to_wire(records, ttl);
        reply.additionals = to_wire(additional, ttl);
        self.encode(&reply, transport)
    }

    /// A reply that continues `records` with the answers of another server's `reply`.
    pub(crate) fn answer_after(
        &self,
        records: &[WireRecord],
        reply: &Message,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let mut joined = self.reply(reply.metadata.response_code);
        joined.metadata.authoritative = false;
        joined.metadata.truncation = reply.metadata.truncation;
        joined.answers = records.iter().chain(&reply.answers).cloned().collect();
        joined.authorities = reply.authorities.clone();
        self.encode(&joined, transport)
    }

    /// A reply without records: of the type asked (the name exists), or at all.
    pub(crate) fn nothing(
        &self,
        is_name_error: bool,
        zone: &str,
        ttl: u32,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let code = if is_name_error { ResponseCode::NXDomain } else { ResponseCode::NoError };
        let mut reply = self.reply(code);
        // Without an SOA record resolvers may not remember that there is nothing (RFC 2308).
        if let (Ok(zone), Ok(primary), Ok(contact)) =
            (absolute(zone), absolute(&format!("ns.dns.{zone}")), absolute(&format!("hostmaster.{zone}")))
        {
            let soa = SOA::new(primary, contact, 1, 7200, 1800, 86_400, ttl);
            reply.authorities.push(WireRecord::from_rdata(zone, ttl, RData::SOA(soa)));
        }
        self.encode(&reply, transport)
    }

    fn reply(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.message.metadata.id, OpCode::Query);
        reply.metadata.response_code = code;
        reply.metadata.authoritative = true;
        reply.metadata.recursion_desired = self.message.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.queries = self.message.queries.clone();
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_MAX);
            reply.edns = Some(edns);
        }
        reply
    }

    fn encode(&self, reply: &Message, transport: Transport) -> Option<Vec<u8>> {
        let max = match transport {
            Transport::Tcp => u16::MAX,
            Transport::Udp => {
                self.message.edns.as_ref().map_or(UDP_MIN, |edns| edns.max_payload().clamp(UDP_MIN, UDP_MAX))
            }
        };
        encode(reply, max)
    }
}

/// Encodes at most `max` bytes. Records that do not fit are left out and the reply is marked truncated.
fn encode(message: &Message, max: u16) -> Option<Vec<u8>> {
    let whole = message.to_vec().ok()?;
    if whole.len() <= usize::from(max) {
        return Some(whole);
    }
    // The options must be there even when records are not, so the records get what is left.
    let mut part = message.truncate();
    let bare = part.to_vec().ok()?.len();
    let mut room = usize::from(max).checked_sub(bare)?;
    for record in &message.answers {
        // Without compression, so that the sum is an upper bound.
        let Ok(len) = record.to_bytes().map(|bytes| bytes.len()) else { continue };
        let Some(left) = room.checked_sub(len) else { break };
        room = left;
        part.answers.push(record.clone());
    }
    part.to_vec().ok()
}

/// Records of ours as they go on the wire. One whose name cannot be a DNS name is left out.
pub(crate) fn to_wire(records: &[Record], ttl: u32) -> Vec<WireRecord> {
    let one = |record: &Record| {
        let data = match &record.data {
            RecordData::A(addr) => RData::A(A(*addr)),
            RecordData::Aaaa(addr) => RData::AAAA(AAAA(*addr)),
            RecordData::Cname(target) => RData::CNAME(CNAME(absolute(target).ok()?)),
            RecordData::Srv { priority, weight, port, target } => {
                RData::SRV(SRV::new(*priority, *weight, *port, absolute(target).ok()?))
            }
        };
        Some(WireRecord::from_rdata(absolute(&record.name).ok()?, ttl, data))
    };
    records.iter().filter_map(one).collect()
}

/// A name that no search domain is added to.
pub(crate) fn absolute(name: &str) -> Result<Name, hickory_proto::ProtoError> {
    let mut name = Name::from_ascii(name)?;
    name.set_fqdn(true);
    Ok(name)
}

/// The header and question of `query` turned into a failure.
pub(crate) fn failure(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let id = id(query).unwrap_or(0);
    let op_code = query.get(2).map_or(OpCode::Query, |flags| OpCode::from_u8((flags >> 3) & 0xf));
    let mut reply = Message::error_msg(id, op_code, code);
    reply.metadata.recursion_available = true;
    if let Ok(parsed) = Message::from_vec(query) {
        reply.metadata.recursion_desired = parsed.metadata.recursion_desired;
        reply.queries = parsed.queries;
        if parsed.edns.is_some() {
            reply.edns = Some(Edns::new());
        }
    }
    // A message of a header and at most the questions just read always fits.
    reply.to_vec().unwrap_or_default()
}

/// The message id.
pub(crate) fn id(message: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes([*message.first()?, *message.get(1)?]))
}

/// Puts another id into a message.
pub(crate) fn set_id(message: &mut [u8], id: u16) {
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
}

pub(crate) fn is_reply(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

/// Whether `reply` answers `query` sent with `id`: same id, and the same question if it repeats one.
pub(crate) fn answers(reply: &[u8], query: &[u8], sent_id: u16) -> bool {
    if reply.len() < HEADER_LEN || !is_reply(reply) || id(reply) != Some(sent_id) {
        return false;
    }
    match (question(query), question(reply)) {
        (Some(asked), Some(answered)) => asked.eq_ignore_ascii_case(answered),
        // Some servers leave the question out of failures; the id and the connected socket must do then.
        (_, None) => count_of_questions(reply) == 0,
        (None, Some(_)) => true,
    }
}

fn count_of_questions(message: &[u8]) -> u16 {
    match message.get(4..6) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// The bytes of a message's only question: name, type, class.
fn question(message: &[u8]) -> Option<&[u8]> {
    if count_of_questions(message) != 1 {
        return None;
    }
    let mut at = HEADER_LEN;
    loop {
        match usize::from(*message.get(at)?) {
            0 => break,
            // A pointer in the first name of a message has nothing to point at.
            len if len > 63 => return None,
            len => at += 1 + len,
        }
    }
    message.get(HEADER_LEN..at + 5)
}

/// Whether a decoded reply is one.
pub(crate) fn decode_reply(bytes: &[u8]) -> Option<Message> {
    Message::from_vec(bytes).ok().filter(|message| message.metadata.message_type == MessageType::Response)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn query(name: &str, record_type: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(hickory_proto::op::Query::query(Name::from_ascii(name).unwrap(), record_type));
        message.to_vec().unwrap()
    }

    fn reply_to(query: &[u8]) -> Vec<u8> {
        failure(query, ResponseCode::ServFail)
    }

    #[test]
    fn no_bytes_make_decoding_panic() {
        // Every prefix, and every single byte changed in four ways.
        let whole = query("a.web.default.svc.cluster.local.", RecordType::A);
        for len in 0..whole.len() {
            drop(Query::parse(&whole[..len]));
            answers(&whole[..len], &whole, 7);
        }
        for at in 0..whole.len() {
            for xor in [0x01, 0x80, 0xc0, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= xor;
                drop(Query::parse(&bytes));
                answers(&bytes, &whole, 7);
            }
        }
    }

    #[test]
    fn a_reply_must_carry_the_id_and_the_question() {
        let asked = query("example.com.", RecordType::A);
        let check = |reply: &[u8], want: bool| assert_eq!(answers(reply, &asked, 7), want, "{reply:?}");
        check(&reply_to(&asked), true);
        check(&reply_to(&query("EXAMPLE.com.", RecordType::A)), true);
        check(&reply_to(&query("example.org.", RecordType::A)), false);
        check(&reply_to(&query("example.com.", RecordType::AAAA)), false);
        check(&asked, false);
        let mut other_id = reply_to(&asked);
        set_id(&mut other_id, 8);
        check(&other_id, false);
        let without_question = Message::error_msg(7, OpCode::Query, ResponseCode::Refused).to_vec().unwrap();
        check(&without_question, true);
        check(&without_question[..11], false);
    }

    #[test]
    fn truncation_keeps_the_options_and_never_exceeds_the_limit() {
        let mut bytes = Message::from_vec(&query("many.default.svc.cluster.local.", RecordType::A)).unwrap();
        bytes.set_edns(Edns::new());
        let query = Query::parse(&bytes.to_vec().unwrap()).unwrap();
        let record = |i: u8| Record {
            name: "many.default.svc.cluster.local".into(),
            data: RecordData::A(Ipv4Addr::new(10, 0, 0, i)),
        };
        let mut whole = 0;
        for count in 0..200 {
            let records: Vec<Record> = (0..count).map(record).collect();
            let bytes = query.answer(&records, &[], 30, Transport::Udp).unwrap();
            let reply = Message::from_vec(&bytes).unwrap();
            assert!(bytes.len() <= usize::from(UDP_MAX), "{count}: {}", bytes.len());
            assert!(reply.edns.is_some(), "{count}");
            assert_eq!(reply.metadata.truncation, reply.answers.len() < usize::from(count), "{count}");
            whole += usize::from(!reply.metadata.truncation);
        }
        assert!((20..150).contains(&whole), "{whole}");
    }
}
