//! Single values on the wire: addresses, ports, names, texts; each with the error that says which field it was.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_core::snapshot::{Name, Protocol};
use prost_types::Any;

use super::{DecodeError, Kind, LIST_LEN_MAX, TEXT_BYTES_MAX};
use crate::proto::{nodemesh, workload::Extension};

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The bytes are no such message.
    #[error("is malformed: {0}")]
    Malformed(prost::DecodeError),
    /// More bytes than are decoded.
    #[error("has {0} bytes, more than are decoded")]
    TooLarge(usize),
    /// Neither 4 nor 16 bytes.
    #[error("is an address of {0} bytes; 4 or 16 are wanted")]
    AddressLength(usize),
    /// A prefix longer than the address.
    #[error("is a prefix of {0} bits, longer than the address")]
    PrefixLength(u32),
    /// Beyond 16 bits.
    #[error("is {0}, which is no port")]
    Port(u32),
    /// A value that this version does not know.
    #[error("is {0}, which is not known here")]
    Unknown(i32),
    /// Needed.
    #[error("is missing")]
    Missing,
    /// A list too long.
    #[error("has {0} entries, more than are decoded")]
    TooMany(usize),
    /// A form that this version does not know.
    #[error("is form {0}, which is not known here")]
    Form(u32),
    /// Not the JSON that is wanted.
    #[error("is no such entry: {0}")]
    Json(String),
    /// The name is another than what is in it.
    #[error("is {0:?}, which is not its own")]
    Name(String),
    /// A text too long.
    #[error("is a text of {0} bytes, longer than is decoded")]
    TooLong(usize),
}

/// A problem with the field it belongs to, innermost part last to be added.
#[derive(Debug)]
pub(super) struct Located {
    field: String,
    problem: Problem,
}

impl Located {
    /// The problem of `field`.
    pub(super) fn at(field: impl fmt::Display, problem: Problem) -> Self {
        Self { field: field.to_string(), problem }
    }

    /// The same, of a field within `outer`.
    pub(super) fn within(self, outer: impl fmt::Display) -> Self {
        Self { field: format!("{outer}.{}", self.field), problem: self.problem }
    }

    /// The error of the resource.
    pub(super) fn of(self, kind: Kind, name: &str) -> DecodeError {
        let name = name.chars().take(NAME_CHARS_SHOWN).collect();
        DecodeError { kind, name, field: self.field, problem: self.problem }
    }
}

/// How much of a resource's name an error repeats.
const NAME_CHARS_SHOWN: usize = 200;

/// A list that is not too long.
pub(super) fn bounded<'a, T>(field: &str, list: &'a [T]) -> Result<&'a [T], Located> {
    if list.len() > LIST_LEN_MAX {
        return Err(Located::at(field, Problem::TooMany(list.len())));
    }
    Ok(list)
}

/// Every entry of a list that is not too long, decoded.
pub(super) fn each<T, U, C: FromIterator<U>>(
    field: &str,
    list: &[T],
    decode: impl Fn(&T) -> Result<U, Problem>,
) -> Result<C, Located> {
    bounded(field, list)?
        .iter()
        .enumerate()
        .map(|(index, item)| decode(item).map_err(|p| Located::at(format_args!("{field}[{index}]"), p)))
        .collect()
}

/// A text that is not too long.
pub(super) fn text(text: &str) -> Result<Arc<str>, Problem> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(Problem::TooLong(text.len()));
    }
    Ok(text.into())
}

/// A text of a field.
pub(super) fn text_at(field: &str, value: &str) -> Result<Arc<str>, Located> {
    text(value).map_err(|problem| Located::at(field, problem))
}

/// An address of 4 or 16 bytes.
pub(super) fn address(bytes: &[u8]) -> Result<IpAddr, Problem> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(Ipv4Addr::from(v4).into())
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(Ipv6Addr::from(v6).into())
    } else {
        Err(Problem::AddressLength(bytes.len()))
    }
}

/// The bytes of an address.
pub(super) fn address_bytes(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A block of addresses. Bits beyond the prefix are kept.
pub(super) fn cidr(bytes: &[u8], length: u32) -> Result<IpNet, Problem> {
    let addr = address(bytes)?;
    let prefix = u8::try_from(length).map_err(|_| Problem::PrefixLength(length))?;
    IpNet::new(addr, prefix).map_err(|_| Problem::PrefixLength(length))
}

/// A port.
pub(super) fn port(port: u32) -> Result<u16, Problem> {
    u16::try_from(port).map_err(|_| Problem::Port(port))
}

/// Ports without order.
pub(super) fn ports(field: &str, list: &[u32]) -> Result<BTreeSet<u16>, Located> {
    each(field, list, |p| port(*p))
}

/// A transport protocol.
pub(super) fn protocol(value: i32) -> Result<Protocol, Problem> {
    match nodemesh::Protocol::try_from(value) {
        Ok(nodemesh::Protocol::Tcp) => Ok(Protocol::Tcp),
        Ok(nodemesh::Protocol::Udp) => Ok(Protocol::Udp),
        Err(_) => Err(Problem::Unknown(value)),
    }
}

/// A transport protocol, encoded.
pub(super) fn protocol_value(protocol: Protocol) -> i32 {
    match protocol {
        Protocol::Tcp => nodemesh::Protocol::Tcp.into(),
        Protocol::Udp => nodemesh::Protocol::Udp.into(),
    }
}

/// Namespace and name.
pub(super) fn name(name: &nodemesh::Name) -> Result<Name, Problem> {
    Ok(Name { namespace: text(&name.namespace)?, name: text(&name.name)? })
}

/// Namespace and name, encoded.
pub(super) fn name_value(name: &Name) -> nodemesh::Name {
    nodemesh::Name { namespace: name.namespace.to_string(), name: name.name.to_string() }
}

/// Our facts in a resource's extensions; `None` from foreign servers.
///
/// A malformed one is an error: guessing would be worse than keeping what was.
pub(super) fn facts<M: prost::Message + Default>(extensions: &[Extension]) -> Result<Option<M>, Located> {
    let Some(extension) = extensions.iter().find(|extension| extension.name == super::EXTENSION) else {
        return Ok(None);
    };
    let config = extension.config.as_ref().ok_or_else(|| Located::at("facts", Problem::Missing))?;
    let facts =
        M::decode(config.value.as_slice()).map_err(|e| Located::at("facts", Problem::Malformed(e)))?;
    Ok(Some(facts))
}

/// Our facts, a message of `nodemesh.v1`, as an extension.
pub(super) fn facts_value(message: &str, facts: &impl prost::Message) -> Extension {
    let type_url = format!("type.googleapis.com/nodemesh.v1.{message}");
    let config = Any { type_url, value: facts.encode_to_vec() };
    Extension { name: super::EXTENSION.to_owned(), config: Some(config) }
}
