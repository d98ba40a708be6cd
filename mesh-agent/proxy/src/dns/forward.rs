//! Asking the pod's own resolver, from the pod's namespace.
//!
//! Invariants:
//! - Each question leaves from a socket of its own (a fresh random port) with a fresh random id, connected to the resolver:
//!   a reply must come from there, carry the id and repeat the question.
//! - Garbage is counted and ignored until the time-out; it never ends the wait.

use std::{io, net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use hickory_proto::{
    op::{Message, OpCode, Query as WireQuestion, ResponseCode},
    rr::Record as WireRecord,
};
use mesh_core::{
    balance,
    dns::Record,
    snapshot::{Protocol, Snapshot},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    Transport,
    wire::{self, Query},
};
use crate::{
    kernel::UpstreamTags,
    metrics::DnsOutcome,
    target::canonical,
    worker::{Pod, Worker},
};

/// The largest DNS message.
const MESSAGE_MAX: usize = 65_535;

/// A question for the pod's resolver and what to make of its reply.
#[derive(Debug)]
pub(crate) struct Question {
    /// What is sent; the id is replaced.
    bytes: Vec<u8>,
    then: Then,
}

#[derive(Debug)]
enum Then {
    /// Pass the reply on under the client's id.
    Pass,
    /// Put these aliases before its answers.
    Prepend { query: Vec<u8>, records: Vec<WireRecord> },
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("the resolver did not answer in time")]
    TimedOut,
    #[error("talk to the resolver")]
    Unreachable {
        #[source]
        source: io::Error,
    },
}

impl Question {
    /// The client's own question.
    pub(crate) fn whole(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), then: Then::Pass }
    }

    /// The question for the last target of `records`. `None` when that is no name to ask for.
    pub(crate) fn alias(query: &Query, records: &[Record], target: &str, ttl: u32) -> Option<Self> {
        let target = wire::absolute(target).ok()?;
        let mut message = Message::new(0, hickory_proto::op::MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(WireQuestion::query(target, query.record_type()));
        let then = Then::Prepend { query: query.bytes(), records: wire::to_wire(records, ttl) };
        Some(Self { bytes: message.to_vec().ok()?, then })
    }

    /// The message the client sent.
    fn client_query(&self) -> &[u8] {
        match &self.then {
            Then::Pass => &self.bytes,
            Then::Prepend { query, .. } => query,
        }
    }

    /// What the client gets for the resolver's reply.
    fn finish(&self, mut reply: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
        match &self.then {
            Then::Pass => {
                wire::set_id(&mut reply, wire::id(&self.bytes)?);
                Some(reply)
            }
            Then::Prepend { query, records } => {
                let query = Query::parse(query).ok()?;
                query.answer_after(records, &wire::decode_reply(&reply)?, transport)
            }
        }
    }
}

/// Asks the resolver that `client` dialled; always gives the client something, a failure if need be.
///
/// Cancel safety: dropping the future closes its socket.
pub(crate) async fn ask(
    worker: &Worker,
    pod: &Arc<Pod>,
    client: SocketAddr,
    question: &Question,
    transport: Transport,
) -> Vec<u8> {
    let limit = worker.settings().dns.forward_timeout;
    let exchange = async {
        let client = canonical(client);
        let resolver = worker.kernel().resolver(&pod.handle, client.port(), client.is_ipv4());
        let unknown = || io::Error::other("the pod's resolver is not known");
        let resolver = canonical(resolver.ok_or_else(unknown)?);
        let resolver = endpoint(&worker.snapshot(), resolver, transport, worker.random()).unwrap_or(resolver);
        let id = u16::try_from(worker.random() >> 48).unwrap_or(0);
        let mut bytes = question.bytes.clone();
        wire::set_id(&mut bytes, id);
        match transport {
            Transport::Udp => over_udp(worker, pod, resolver, &bytes, id).await,
            Transport::Tcp => over_tcp(worker, pod, resolver, &bytes, id).await,
        }
    };
    let outcome = match timeout(limit, exchange).await {
        Ok(outcome) => outcome.map_err(|source| ForwardError::Unreachable { source }),
        Err(_) => Err(ForwardError::TimedOut),
    };
    let (counted, reply) = match outcome {
        Ok(reply) => match question.finish(reply, transport) {
            Some(reply) => (DnsOutcome::Forwarded, Some(reply)),
            None => (DnsOutcome::BadReply, None),
        },
        Err(error) => {
            if worker.may_log() {
                let error = crate::connect::report(&error);
                tracing::debug!(pod = %pod.handle.name, error, "cannot forward a DNS query");
            }
            match error {
                ForwardError::TimedOut => (DnsOutcome::TimedOut, None),
                ForwardError::Unreachable { .. } => (DnsOutcome::Unreachable, None),
            }
        }
    };
    worker.metrics().dns(counted).inc();
    reply.unwrap_or_else(|| wire::failure(question.client_query(), ResponseCode::ServFail))
}

/// An endpoint behind the resolver's address when that is a service's: our own sockets are not redirected, so nobody
/// else would balance them.
fn endpoint(
    snapshot: &Snapshot,
    resolver: SocketAddr,
    transport: Transport,
    draw: u64,
) -> Option<SocketAddr> {
    let protocol = match transport {
        Transport::Udp => Protocol::Udp,
        Transport::Tcp => Protocol::Tcp,
    };
    let (_, port) = snapshot.service_at(resolver.ip(), resolver.port(), protocol)?;
    let same_family = |e: &mesh_core::snapshot::Endpoint| e.addr.is_ipv4() == resolver.is_ipv4();
    Some(balance::pick(&port.endpoints, draw, &[], same_family, |_| 0).endpoint()?.socket_addr())
}

async fn over_udp(
    worker: &Worker,
    pod: &Arc<Pod>,
    resolver: SocketAddr,
    query: &[u8],
    id: u16,
) -> io::Result<Vec<u8>> {
    let socket: OwnedFd = worker.sockets().udp(&pod.handle, resolver)?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    // Pods' resolvers answer within the size their client named, which we pass on; this is the largest usual one.
    let mut reply = vec![0; 4096];
    loop {
        let len = socket.recv(&mut reply).await?;
        if wire::answers(&reply[..len], query, id) {
            reply.truncate(len);
            return Ok(reply);
        }
        worker.metrics().dns(DnsOutcome::BadReply).inc();
    }
}

async fn over_tcp(
    worker: &Worker,
    pod: &Arc<Pod>,
    resolver: SocketAddr,
    query: &[u8],
    id: u16,
) -> io::Result<Vec<u8>> {
    let tags = UpstreamTags { src_workload: Some(pod.handle.workload), ..UpstreamTags::default() };
    let socket: OwnedFd = worker.sockets().tcp(&pod.handle, resolver, &tags)?;
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(resolver).await?;
    write_message(&mut stream, query).await?;
    loop {
        let reply = read_message(&mut stream).await?;
        if wire::answers(&reply, query, id) {
            return Ok(reply);
        }
        worker.metrics().dns(DnsOutcome::BadReply).inc();
    }
}

/// Reads one length-prefixed message.
///
/// # Errors
/// As `read(2)`; UnexpectedEof at the end of the stream.
pub(super) async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    // Grows with what arrives: a length alone must not cost 64 KiB.
    let mut message = Vec::with_capacity(usize::from(len).min(1024));
    let got = stream.take(u64::from(len)).read_to_end(&mut message).await?;
    if got < usize::from(len) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

/// Writes one length-prefixed message, in one call so that it leaves in one segment.
///
/// # Errors
/// As `write(2)`.
pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    debug_assert!(message.len() <= MESSAGE_MAX);
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&len.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
