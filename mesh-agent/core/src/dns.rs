//! DNS answers for services, decided from the snapshot.
//!
//! Follows the Kubernetes DNS specification for services. Names we do not know are never denied: another server may
//! know them, so they are forwarded. Of hosts that a ServiceEntry declares we answer addresses alone, and only where the mesh has one that
//! leads to it; the rest of what there is about them others know.
//!
//! Not here: the wire format, forwarding, caching (`mesh-proxy`).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{
    route::sight::Sight,
    snapshot::{Endpoint, Protocol, Service, ServicePort, Snapshot},
};

/// Seconds a client may keep our answers: short, because headless answers follow endpoints.
pub const TTL_S: u32 = 30;
/// Longest chain of ExternalName services followed before giving up.
const ALIAS_DEPTH_MAX: usize = 8;

/// Type of a question, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QType {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Ports.
    Srv,
    /// Alias.
    Cname,
    /// Name of an address: always forwarded.
    Ptr,
    /// Anything else: a name we know has no such data.
    Other,
}

/// What to tell the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsAnswer {
    /// These records, authoritative.
    Answer {
        /// Answer section.
        records: Vec<Record>,
        /// Additional section: addresses of SRV targets.
        additional: Vec<Record>,
    },
    /// The name is an alias that leads out of the mesh: ask upstream for `target` with the same type and put its
    /// answers after `records`.
    Alias {
        /// CNAME records, in order.
        records: Vec<Record>,
        /// Last target, without a trailing dot.
        target: String,
    },
    /// The name exists without data of this type.
    NoData,
    /// The name does not exist, and we are the one to know.
    NxDomain,
    /// Not ours: ask the resolver the pod dialled.
    Forward,
}

/// One resource record of class IN; its time to live is [`TTL_S`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// Owner, lower case, without a trailing dot.
    pub name: String,
    /// Data.
    pub data: RecordData,
}

/// Data of a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordData {
    /// IPv4 address.
    A(Ipv4Addr),
    /// IPv6 address.
    Aaaa(Ipv6Addr),
    /// Alias target.
    Cname(String),
    /// A port at a target.
    Srv {
        /// Lower is preferred.
        priority: u16,
        /// Share among equal priorities.
        weight: u16,
        /// Port.
        port: u16,
        /// Name of the host.
        target: String,
    },
}

/// Answers one question of a pod; services that it does not see are none of ours.
///
/// `qname` may be of any case and end with a dot. Besides full names the short forms `svc`, `svc.ns` and
/// `svc.ns.svc` are understood, for clients without search domains.
pub fn answer(snapshot: &Snapshot, sight: &Sight<'_>, qname: &str, qtype: QType) -> DnsAnswer {
    if qtype == QType::Ptr {
        return DnsAnswer::Forward;
    }
    let mut qname = qname.strip_suffix('.').unwrap_or(qname).to_ascii_lowercase();
    let mut chain = Vec::new();
    for _ in 0..ALIAS_DEPTH_MAX {
        // Only the client's own question may be short; targets of aliases are full names.
        let short = chain.is_empty().then_some(sight.namespace());
        let Some(found) = find(snapshot, short, &qname).filter(|found| sight.sees_name(found.service)) else {
            if let Some(answer) = declared(sight, &qname, qtype) {
                return after(chain, answer);
            }
            return match chain.is_empty() {
                true => DnsAnswer::Forward,
                false => DnsAnswer::Alias { records: chain, target: qname },
            };
        };
        let Some(target) = &found.service.external_name else {
            return after(chain, found.answer(snapshot, &qname, qtype));
        };
        if found.part != Part::Service {
            return after(chain, DnsAnswer::NxDomain);
        }
        let target = target.strip_suffix('.').unwrap_or(target).to_ascii_lowercase();
        chain.push(Record { name: qname, data: RecordData::Cname(target.clone()) });
        if qtype == QType::Cname {
            return DnsAnswer::Answer { records: chain, additional: Vec::new() };
        }
        qname = target;
    }
    DnsAnswer::Answer { records: chain, additional: Vec::new() }
}

/// The answer about a host that Kubernetes does not know; `None` if others know better.
fn declared(sight: &Sight<'_>, qname: &str, qtype: QType) -> Option<DnsAnswer> {
    if !matches!(qtype, QType::A | QType::Aaaa) {
        return None;
    }
    // A service of Kubernetes is found by its name whether it is seen or not.
    let service = sight.service_covering(qname).filter(|service| sight.sees_name(service))?;
    let endpoints = || service.ports.iter().flat_map(|port| &port.endpoints);
    // A client that tries an address of a family nobody serves would only learn that it is refused.
    let serves = |v4: bool| endpoints().any(|e| e.addr.is_ipv4() == v4) || endpoints().next().is_none();
    let addrs: BTreeSet<IpAddr> = service.vips.iter().copied().filter(|vip| serves(vip.is_ipv4())).collect();
    (!service.vips.is_empty()).then(|| match addrs.is_empty() {
        true => DnsAnswer::NoData,
        false => addresses(qname, qtype, &addrs),
    })
}

/// Puts the aliases that led to an answer before it.
fn after(mut chain: Vec<Record>, answer: DnsAnswer) -> DnsAnswer {
    if chain.is_empty() {
        return answer;
    }
    match answer {
        DnsAnswer::Answer { records, additional } => {
            chain.extend(records);
            DnsAnswer::Answer { records: chain, additional }
        }
        DnsAnswer::Alias { .. } | DnsAnswer::NoData | DnsAnswer::NxDomain | DnsAnswer::Forward => {
            DnsAnswer::Answer { records: chain, additional: Vec::new() }
        }
    }
}

/// A question about a service we know.
struct Found<'a> {
    service: &'a Service,
    part: Part<'a>,
    /// The service's own name in the form the client used.
    base: &'a str,
}

/// What of the service is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'a> {
    /// The service itself.
    Service,
    /// `_port._protocol`.
    Port { name: &'a str, protocol: &'a str },
    /// One endpoint, by host name or dashed address.
    Host(&'a str),
    /// Something below the service that can never exist.
    Nothing,
}

/// Finds the service a name is about. Short forms are relative to `client_namespace`, `None` for full names only.
fn find<'a>(snapshot: &'a Snapshot, client_namespace: Option<&str>, qname: &'a str) -> Option<Found<'a>> {
    let zone = snapshot.cluster_domain();
    let full = qname
        .len()
        .checked_sub(zone.len())
        .filter(|at| {
            !zone.is_empty() && qname.is_char_boundary(*at) && qname[*at..].eq_ignore_ascii_case(zone)
        })
        .and_then(|at| qname[..at].strip_suffix(".svc."));
    let service = |namespace: &str, name: &str| {
        let found = snapshot.service_named(namespace, name).map(|service| &**service);
        found.filter(|service| service.hostname.is_none())
    };
    let Some(below) = full else {
        // Short forms. Only names of services themselves: everything else is too likely to be someone's domain.
        let client_namespace = client_namespace?;
        let short = qname.strip_suffix(".svc").filter(|rest| rest.contains('.')).unwrap_or(qname);
        let (name, namespace) = short.split_once('.').unwrap_or((short, client_namespace));
        return Some(Found { service: service(namespace, name)?, part: Part::Service, base: qname });
    };
    let mut labels = below.rsplit('.');
    let (namespace, name) = (labels.next()?, labels.next()?);
    let service = service(namespace, name)?;
    let part = match (labels.next(), labels.next(), labels.next()) {
        (None, _, _) => Part::Service,
        (Some(host), None, _) => Part::Host(host),
        (Some(protocol), Some(port), None) => match (port.strip_prefix('_'), protocol.strip_prefix('_')) {
            (Some(name), Some(protocol)) => Part::Port { name, protocol },
            _ => Part::Nothing,
        },
        _ => Part::Nothing,
    };
    let below_service = below.len() - namespace.len() - name.len() - 1;
    Some(Found { service, part, base: &qname[below_service..] })
}

impl Found<'_> {
    fn answer(&self, snapshot: &Snapshot, qname: &str, qtype: QType) -> DnsAnswer {
        match self.part {
            Part::Service if qtype == QType::Srv => {
                self.ports(snapshot, qname, self.service.ports.iter().filter(|p| p.port != 0).collect())
            }
            Part::Service => addresses(qname, qtype, &self.service_addrs()),
            Part::Host(host) => {
                let hosts = self.endpoints().filter(|e| is_host(e, host)).map(|e| e.addr).collect();
                addresses(qname, qtype, &hosts)
            }
            Part::Port { name, protocol } => {
                let ports: Vec<_> =
                    self.service.ports.iter().filter(|p| is_port(p, name, protocol)).collect();
                match (ports.is_empty(), qtype) {
                    (true, _) => DnsAnswer::NxDomain,
                    (false, QType::Srv) => self.ports(snapshot, qname, ports),
                    (false, _) => DnsAnswer::NoData,
                }
            }
            Part::Nothing => DnsAnswer::NxDomain,
        }
    }

    /// Endpoints that DNS may show, by port and address.
    fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.service
            .ports
            .iter()
            .flat_map(|p| &p.endpoints)
            .filter(|e| e.ready || self.service.publish_not_ready)
    }

    fn service_addrs(&self) -> BTreeSet<IpAddr> {
        if self.service.headless {
            return self.endpoints().map(|e| e.addr).collect();
        }
        self.service.vips.iter().copied().collect()
    }

    /// SRV records of these ports: of the virtual address, or of each endpoint of a headless service.
    fn ports(&self, snapshot: &Snapshot, qname: &str, ports: Vec<&ServicePort>) -> DnsAnswer {
        let base = match self.base.len() == qname.len() && !qname.ends_with(snapshot.cluster_domain()) {
            // A short name was asked; targets are full names all the same.
            true => {
                let name = &self.service.name;
                format!("{}.{}.svc.{}", name.name, name.namespace, snapshot.cluster_domain())
            }
            false => self.base.to_owned(),
        };
        let mut records = BTreeSet::new();
        let mut additional = BTreeSet::new();
        let mut add = |target: String, port: u16, addr: IpAddr| {
            additional.insert(address_record(&target, addr));
            let data = RecordData::Srv { priority: 0, weight: 100, port, target };
            records.insert(Record { name: qname.to_owned(), data });
        };
        for port in ports {
            if self.service.headless {
                let shown = |e: &&Endpoint| e.ready || self.service.publish_not_ready;
                for endpoint in port.endpoints.iter().filter(shown) {
                    add(format!("{}.{base}", host_of(endpoint)), endpoint.port, endpoint.addr);
                }
            } else {
                for vip in &self.service.vips {
                    add(base.clone(), port.port, *vip);
                }
            }
        }
        if records.is_empty() {
            return if self.service_addrs().is_empty() { DnsAnswer::NxDomain } else { DnsAnswer::NoData };
        }
        DnsAnswer::Answer {
            records: records.into_iter().collect(),
            additional: additional.into_iter().collect(),
        }
    }
}

/// A name with these addresses: those of the type, or the right kind of nothing.
fn addresses(qname: &str, qtype: QType, addrs: &BTreeSet<IpAddr>) -> DnsAnswer {
    if addrs.is_empty() {
        return DnsAnswer::NxDomain;
    }
    let wanted = |addr: &&IpAddr| match qtype {
        QType::A => addr.is_ipv4(),
        QType::Aaaa => addr.is_ipv6(),
        QType::Srv | QType::Cname | QType::Ptr | QType::Other => false,
    };
    let records: Vec<_> = addrs.iter().filter(wanted).map(|addr| address_record(qname, *addr)).collect();
    if records.is_empty() {
        return DnsAnswer::NoData;
    }
    DnsAnswer::Answer { records, additional: Vec::new() }
}

fn address_record(name: &str, addr: IpAddr) -> Record {
    let data = match addr {
        IpAddr::V4(v4) => RecordData::A(v4),
        IpAddr::V6(v6) => RecordData::Aaaa(v6),
    };
    Record { name: name.to_owned(), data }
}

/// The address with dashes, as a label: `10-0-0-1`, `fd00--1`.
fn dashed(addr: IpAddr) -> String {
    addr.to_string().replace(['.', ':'], "-")
}

fn host_of(endpoint: &Endpoint) -> String {
    endpoint.hostname.as_deref().map_or_else(|| dashed(endpoint.addr), str::to_ascii_lowercase)
}

fn is_host(endpoint: &Endpoint, label: &str) -> bool {
    endpoint.hostname.as_deref().is_some_and(|host| host.eq_ignore_ascii_case(label))
        || dashed(endpoint.addr) == label
}

fn is_port(port: &ServicePort, name: &str, protocol: &str) -> bool {
    let own = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    port.port != 0 && !port.name.is_empty() && port.name.eq_ignore_ascii_case(name) && protocol == own
}

#[cfg(test)]
mod tests;
