//! What a MeshConfig says where no resource says more (semantics.md §2.11).

use std::{sync::Arc, time::Duration};

use mesh_core::{
    route::{
        cluster::{Locality, TrafficPolicy},
        defaults::{Distribution, MeshDefaults},
        normalize::PathNormalization,
        scope::OutboundPolicy,
    },
    snapshot::Snapshot,
};

use super::{compile, over_the_link};

fn world(mesh: &str) -> Arc<Snapshot> {
    let config = format!(
        "---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {{mesh: '{{{mesh}}}'}}}}\n"
    );
    compile(&[config]).snapshot
}

fn traffic(snapshot: &Snapshot, distribution: Option<Distribution>) -> TrafficPolicy {
    snapshot.mesh().defaults.clusters.get(distribution).policy.clone()
}

#[test]
fn without_a_word_istios_defaults_hold() {
    let world = world("");
    assert_eq!(*world.mesh().defaults, MeshDefaults::default());
    assert_eq!(traffic(&world, None), TrafficPolicy::default());
    assert_eq!(world.mesh().defaults.retries.as_ref().map(|retries| retries.attempts), Some(2));
    assert_eq!(world.mesh().defaults.dns_refresh, Duration::from_secs(60));
}

#[test]
fn what_is_said_reaches_agents_in_process_and_over_the_link() {
    let here = world(
        "outboundTrafficPolicy: {mode: REGISTRY_ONLY}, defaultHttpRetryPolicy: {attempts: 5}, connectTimeout: 3s, \
         tcpKeepalive: {time: 60s}, h2UpgradePolicy: UPGRADE, pathNormalization: {normalization: MERGE_SLASHES}, \
         protocolDetectionTimeout: 200ms, dnsRefreshRate: 7s, localityLbSetting: {distribute: [{from: a, to: {b: 100}}]}, \
         defaultTrafficPolicy: {connectionPool: {http: {http1MaxPendingRequests: 4}}, outlierDetection: {consecutive5xxErrors: 9}}",
    );
    let there = over_the_link(&here);
    assert_eq!(there.mesh(), here.mesh());
    let defaults = &there.mesh().defaults;
    assert_eq!(defaults.outbound, OutboundPolicy::RegistryOnly);
    assert_eq!(defaults.retries.as_ref().map(|retries| retries.attempts), Some(5));
    assert_eq!(defaults.path_normalization, PathNormalization::MergeSlashes);
    assert_eq!(defaults.detection_timeout, Some(Duration::from_millis(200)));
    assert_eq!(defaults.dns_refresh, Duration::from_secs(7));
    let policy = traffic(&there, None);
    assert_eq!(policy.pool.connect_timeout, Duration::from_secs(3));
    assert_eq!(policy.pool.keepalive, Some((None, Some(Duration::from_secs(60)), None)));
    assert_eq!((policy.pool.max_pending, policy.pool.h2_upgrade), (Some(4), true));
    assert!(!policy.pool.h2_upgrade_sniffed, "nobody says it of a destination");
    assert_eq!(policy.outlier.as_ref().and_then(|outlier| outlier.consecutive_5xx), Some(9));
    assert!(matches!(policy.balancing.locality, Locality::Distribute(_)));
    let near = traffic(&there, Some(Distribution::SameZone));
    assert_eq!(
        near.balancing.locality,
        Distribution::SameZone.locality(),
        "a service's word beats the mesh's"
    );
    assert_eq!(near.pool, policy.pool);
}

#[test]
fn retries_can_be_off_and_no_wait_for_first_bytes_is_without_end() {
    let world = world("defaultHttpRetryPolicy: {attempts: 0}, protocolDetectionTimeout: 0s");
    assert_eq!(world.mesh().defaults.retries, None);
    assert_eq!(world.mesh().defaults.detection_timeout, None);
}
