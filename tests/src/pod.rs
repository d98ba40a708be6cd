//! A pod: a place on a node, with a veth, addresses of both families and a manifest.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;

use crate::manifests::PodManifest;
use crate::place::Place;

/// A pod of a node; dereferences to the [`Place`] in which its processes run. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pod {
    place: Place,
    identity: PodIdentity,
}

/// What the manifest of a pod says about it.
#[derive(Debug, Clone)]
pub(crate) struct PodIdentity {
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) node_name: String,
    pub(crate) node_ip4: Ipv4Addr,
    pub(crate) slot: u8,
}

impl Pod {
    pub(crate) fn new(place: Place, identity: PodIdentity) -> Self {
        Self { place, identity }
    }

    /// The place in which its processes run.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    /// Its Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.identity.namespace
    }

    /// Its uid: differs between two pods that were given the same name or address.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.identity.uid
    }

    /// The node's full name, as in `spec.nodeName`.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.identity.node_name
    }

    /// The node's own address.
    #[must_use]
    pub fn node_ip4(&self) -> Ipv4Addr {
        self.identity.node_ip4
    }

    /// Its slot on the node, which gives its addresses: `10.244.NODE.SLOT`, `fd00:244:NODE::SLOT`.
    #[must_use]
    pub fn slot(&self) -> u8 {
        self.identity.slot
    }

    /// The manifest of this pod, running and ready.
    #[must_use]
    pub fn manifest(&self) -> PodManifest {
        PodManifest::of(self)
    }
}

impl Deref for Pod {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

/// The IPv4 address of a slot on a node.
pub(crate) fn ip4_of(node: u8, slot: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, slot)
}

/// The IPv6 address of a slot on a node: the decimal digits of the slot read as hex digits, so that
/// `10.244.1.12` and `fd00:244:1::12` belong together.
pub(crate) fn ip6_of(node: u8, slot: u8) -> Ipv6Addr {
    let spelt = |number: u8| {
        let (hundreds, tens, ones) = (number / 100, number / 10 % 10, number % 10);
        u16::from(hundreds) << 8 | u16::from(tens) << 4 | u16::from(ones)
    };
    Ipv6Addr::new(0xfd00, 0x244, spelt(node), 0, 0, 0, 0, spelt(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_addresses_of_a_slot_look_alike() {
        assert_eq!(ip4_of(1, 112).to_string(), "10.244.1.112");
        assert_eq!(ip6_of(1, 112).to_string(), "fd00:244:1::112");
    }
}
