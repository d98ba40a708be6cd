//! Names, labels and annotations: what all kinds share.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use k8s_openapi::{api::core::v1, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use mesh_core::snapshot::{Name, Protocol};

use super::{Labels, Namespace, ServiceAccount};
use crate::problem::Problems;

/// Whether a kind lives in a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Cluster,
    Namespaced,
}

/// Namespace of manifests that name none, as `kubectl` has it.
const DEFAULT_NAMESPACE: &str = "default";
/// Ambient Istio's opt-in label.
const ISTIO_MODE: &str = "istio.io/dataplane-mode";
/// Our own opt-in label; wins over Istio's on the same object.
const MESH: &str = "nodemesh.dev/mesh";

/// Checks `metadata.name` and `.namespace`. The name is empty, and a problem noted, when there is none.
pub(crate) fn name(meta: &ObjectMeta, scope: Scope, problems: &mut Problems) -> Name {
    let name = meta.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        let generated = meta.generate_name.is_some();
        let hint = if generated { "; generateName needs an API server" } else { "" };
        problems.error("metadata.name", format!("is missing{hint}"));
    } else if !is_subdomain(name) {
        problems.error(
            "metadata.name",
            format!("is {name:?}, wanted lower-case letters, digits, '-' and '.', at most 253"),
        );
    }
    let namespace = match scope {
        Scope::Cluster => "",
        Scope::Namespaced => match meta.namespace.as_deref().unwrap_or_default() {
            "" => DEFAULT_NAMESPACE,
            namespace => namespace,
        },
    };
    if scope == Scope::Namespaced && !is_label(namespace) {
        problems.error(
            "metadata.namespace",
            format!("is {namespace:?}, wanted lower-case letters, digits and '-', at most 63"),
        );
    }
    Name::new(namespace, name)
}

/// A DNS label (RFC 1123).
pub(super) fn is_label(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Labels with dots between them (RFC 1123).
pub(super) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// A name of a container port (IANA service name).
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 15 && is_label(text) && text.bytes().any(|c| c.is_ascii_lowercase()) && !text.contains("--")
}

pub(super) fn labels(meta: &ObjectMeta) -> Labels {
    shared(meta.labels.iter().flatten())
}

pub(super) fn shared<'a>(pairs: impl Iterator<Item = (&'a String, &'a String)>) -> Labels {
    pairs.map(|(key, value)| (Arc::from(&**key), Arc::from(&**value))).collect()
}

/// Seconds since 1970; absent in hand-written manifests.
pub(super) fn created(meta: &ObjectMeta) -> Option<i64> {
    meta.creation_timestamp.as_ref().map(|time| time.0.as_second())
}

/// What the labels say about membership: `None` for nothing.
pub(crate) fn opt_in(meta: &ObjectMeta, problems: &mut Problems) -> Option<bool> {
    let label = |key: &str| meta.labels.as_ref()?.get(key).map(String::as_str);
    let ours = match label(MESH) {
        Some("enabled") => Some(true),
        Some("disabled" | "none") => Some(false),
        None => None,
        Some(other) => {
            let field = format!("metadata.labels.{MESH}");
            problems.warning(
                field,
                format!("is {other:?}, wanted \"enabled\" or \"disabled\"; it has no effect"),
            );
            None
        }
    };
    // Another mesh's mode, e.g. Kmesh's, is no mistake: it only is not ours.
    let theirs = match label(ISTIO_MODE) {
        Some("ambient") => Some(true),
        Some("none") => Some(false),
        _ => None,
    };
    ours.or(theirs)
}

/// Parses an address; a mapped IPv4 address becomes IPv4.
pub(super) fn address(text: &str, field: &str, problems: &mut Problems) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(addr) => Some(addr.to_canonical()),
        Err(_) => {
            problems.error(field, format!("is {text:?}, wanted an IPv4 or IPv6 address"));
            None
        }
    }
}

/// Checks a port number.
pub(super) fn port(number: i32, field: &str, problems: &mut Problems) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Some(port),
        // Kubernetes' types read a missing number as 0.
        Ok(_) => {
            problems.error(field, "is 0 or missing, wanted a number from 1 to 65535");
            None
        }
        Err(_) => {
            problems.error(field, format!("is {number}, wanted a number from 1 to 65535"));
            None
        }
    }
}

/// Reads a protocol; SCTP is known and not carried, `None` without a problem.
pub(super) fn protocol(text: Option<&str>, field: &str, problems: &mut Problems) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => {
            problems.warning(field, "is \"SCTP\", which the mesh does not carry; the port is left alone");
            None
        }
        Some(other) => {
            problems.error(field, format!("is {other:?}, wanted \"TCP\", \"UDP\" or \"SCTP\""));
            None
        }
    }
}

/// Reads a comma-separated list of ports from an annotation.
pub(super) fn port_list(text: &str, field: &str, problems: &mut Problems) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        match item.parse::<u16>() {
            Ok(port) if port != 0 => {
                ports.insert(port);
            }
            _ => problems.warning(
                field,
                format!(
                    "holds {item:?}, which has no effect: wanted numbers from 1 to 65535 with commas between"
                ),
            ),
        }
    }
    ports
}

/// Reads a namespace.
pub(crate) fn namespace(object: &v1::Namespace, problems: &mut Problems) -> Namespace {
    let name = name(&object.metadata, Scope::Cluster, problems).name;
    if !name.is_empty() && !is_label(&name) {
        problems.error(
            "metadata.name",
            format!("is {name:?}, wanted lower-case letters, digits and '-', at most 63"),
        );
    }
    Namespace { name, opt_in: opt_in(&object.metadata, problems) }
}

/// Reads a service account.
pub(crate) fn service_account(object: &v1::ServiceAccount, problems: &mut Problems) -> ServiceAccount {
    ServiceAccount { name: name(&object.metadata, Scope::Namespaced, problems) }
}
