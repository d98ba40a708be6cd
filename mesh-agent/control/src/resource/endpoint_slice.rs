//! Endpoint slices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1;
use mesh_core::snapshot::{Name, Protocol};

use super::metadata::{self, Scope};
use crate::problem::Problems;

/// Some endpoints of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name.
    pub name: Name,
    /// The service, in the same namespace; `None` when the slice names none and so serves nobody.
    pub service: Option<Arc<str>>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports of all of them; `None` means every port of the service by its own number.
    pub ports: Option<Vec<SlicePort>>,
}

/// One address of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Address.
    pub addr: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// For its own DNS name.
    pub hostname: Option<Arc<str>>,
    /// The pod it is, by name.
    pub pod: Option<Arc<str>>,
}

/// One port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the service port.
    pub name: Arc<str>,
    /// Number; `None` means the service port's own.
    pub port: Option<u16>,
    /// Protocol.
    pub protocol: Protocol,
}

/// Label that names the service.
const SERVICE: &str = "kubernetes.io/service-name";

/// Reads a slice.
pub(crate) fn read(object: &v1::EndpointSlice, problems: &mut Problems) -> EndpointSlice {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    let service = object.metadata.labels.as_ref().and_then(|l| l.get(SERVICE)).filter(|s| !s.is_empty());
    if service.is_none() {
        problems.warning(format!("metadata.labels.{SERVICE}"), "is missing: the slice belongs to no service");
    }
    let v4 = match object.address_type.as_str() {
        "IPv4" => Some(true),
        "IPv6" => Some(false),
        "FQDN" => {
            problems
                .warning("addressType", "is \"FQDN\", which the mesh does not use; the slice has no effect");
            None
        }
        other => {
            problems.error("addressType", format!("is {other:?}, wanted \"IPv4\" or \"IPv6\""));
            None
        }
    };
    let mut endpoints = Vec::new();
    for (index, endpoint) in object.endpoints.iter().flatten().enumerate() {
        let Some(v4) = v4 else { break };
        let pod = endpoint.target_ref.as_ref().filter(|r| r.kind.as_deref() == Some("Pod"));
        for (which, text) in endpoint.addresses.iter().enumerate() {
            let field = format!("endpoints[{index}].addresses[{which}]");
            let Some(addr) = metadata::address(text, &field, problems) else { continue };
            if addr.is_ipv4() != v4 {
                problems.error(field, format!("is {text:?}, but addressType is {:?}", object.address_type));
            }
            endpoints.push(SliceEndpoint {
                addr,
                ready: endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true),
                hostname: endpoint.hostname.as_deref().filter(|h| !h.is_empty()).map(Into::into),
                pod: pod.and_then(|r| r.name.as_deref()).map(Into::into),
            });
        }
    }
    EndpointSlice {
        name,
        service: service.map(|s| s.as_str().into()),
        endpoints,
        ports: ports(object, problems),
    }
}

fn ports(object: &v1::EndpointSlice, problems: &mut Problems) -> Option<Vec<SlicePort>> {
    let declared = object.ports.as_ref()?;
    let mut ports = Vec::new();
    for (index, port) in declared.iter().enumerate() {
        let number = match port.port {
            None => None,
            Some(number) => match metadata::port(number, &format!("ports[{index}].port"), problems) {
                None => continue,
                number => number,
            },
        };
        let field = format!("ports[{index}].protocol");
        if let Some(protocol) = metadata::protocol(port.protocol.as_deref(), &field, problems) {
            ports.push(SlicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                port: number,
                protocol,
            });
        }
    }
    Some(ports)
}
