//! Owns values that several unit tests of this module start from.

use mesh_core::{id::WorkloadId, plan::PodConfig, snapshot::Name};

/// A pod that wants nothing special.
pub(super) fn pod_config(namespace: &str, name: &str) -> PodConfig {
    PodConfig {
        workload: WorkloadId::of_pod(namespace, name, ""),
        name: Name::new(namespace, name),
        netns: format!("/run/netns/{name}").into(),
        addrs: vec!["10.1.0.2".parse().expect("an address")],
        outbound_fail_closed: false,
        inbound_fail_closed: false,
        dns_capture: true,
        inbound_ports: Default::default(),
        outbound_ports: Default::default(),
        excluded: Vec::new(),
        proxy_unknown: false,
        sight: 0,
        probe_ports: Default::default(),
        identity_hash: 0,
        policy_hash: 1,
    }
}
