//! The DNS proxy: answers pods' queries for services from the snapshot and forwards the rest to the pod's own resolver.
//!
//! Invariants:
//! - A query is answered at most once; replies and unreadable datagrams are never answered.
//! - Forwarded bytes pass unchanged but for the message id, so options we do not know survive.
//! - Queries in flight and TCP connections are bounded per pod; what is over is dropped and counted.
//!
//! Not here: what a name means (`mesh_core::dns`).

mod forward;
pub(crate) mod lookup;
pub(crate) mod tcp;
pub(crate) mod udp;
pub(crate) mod wire;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use mesh_core::dns::{DnsAnswer, QType, RecordData, answer};

use crate::{
    metrics::DnsOutcome,
    worker::{Pod, Worker},
};
use wire::Query;

/// What to do with a query.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Not a query: say nothing.
    Ignore,
    /// Send this.
    Reply(Vec<u8>),
    /// Ask the pod's resolver.
    Forward(forward::Question),
}

/// How a query came, which limits the size of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// Decides on a query. A panic in the decoder, which works on bytes from a pod, costs that query only.
pub(crate) fn plan(worker: &Worker, pod: &Arc<Pod>, bytes: &[u8], transport: Transport) -> Plan {
    catch_unwind(AssertUnwindSafe(|| plan_inner(worker, pod, bytes, transport))).unwrap_or_else(|_| {
        worker.metrics().panics.inc();
        Plan::Ignore
    })
}

fn plan_inner(worker: &Worker, pod: &Arc<Pod>, bytes: &[u8], transport: Transport) -> Plan {
    let count = |outcome| worker.metrics().dns(outcome).inc();
    let query = match Query::parse(bytes) {
        Ok(query) => query,
        Err(wire::NotAQuery::Silent) => {
            count(DnsOutcome::Malformed);
            return Plan::Ignore;
        }
        Err(wire::NotAQuery::Reply(reply)) => {
            count(DnsOutcome::Malformed);
            return Plan::Reply(reply);
        }
        Err(wire::NotAQuery::Foreign) => return Plan::Forward(forward::Question::whole(bytes)),
    };
    let snapshot = worker.snapshot();
    let ttl = u32::try_from(worker.settings().dns.ttl.as_secs()).unwrap_or(u32::MAX);
    let sight = snapshot.sight(pod.handle.workload, &pod.handle.name.namespace);
    let (outcome, reply) = match answer(&snapshot, &sight, query.name(), query.qtype()) {
        DnsAnswer::Forward => return Plan::Forward(forward::Question::whole(bytes)),
        DnsAnswer::Alias { records, target } => {
            return match forward::Question::alias(&query, &records, &target, ttl) {
                Some(question) => Plan::Forward(question),
                None => {
                    count(DnsOutcome::Answered);
                    reply_or_ignore(query.answer(&records, &[], ttl, transport))
                }
            };
        }
        DnsAnswer::Answer { mut records, additional } => {
            if records.len() > 1 && !records.iter().any(|r| matches!(r.data, RecordData::Cname(_))) {
                // Clients take the first: give each one another first.
                let by = worker.random() % records.len() as u64;
                records.rotate_left(usize::try_from(by).unwrap_or(0));
            }
            (DnsOutcome::Answered, query.answer(&records, &additional, ttl, transport))
        }
        DnsAnswer::NoData => {
            (DnsOutcome::NoData, query.nothing(false, snapshot.cluster_domain(), ttl, transport))
        }
        DnsAnswer::NxDomain => {
            (DnsOutcome::NameError, query.nothing(true, snapshot.cluster_domain(), ttl, transport))
        }
    };
    count(outcome);
    reply_or_ignore(reply)
}

fn reply_or_ignore(reply: Option<Vec<u8>>) -> Plan {
    reply.map_or(Plan::Ignore, Plan::Reply)
}

/// The question types that matter to us.
fn qtype(of: hickory_proto::rr::RecordType) -> QType {
    use hickory_proto::rr::RecordType;
    match of {
        RecordType::A => QType::A,
        RecordType::AAAA => QType::Aaaa,
        RecordType::SRV => QType::Srv,
        RecordType::CNAME => QType::Cname,
        RecordType::PTR => QType::Ptr,
        _ => QType::Other,
    }
}
