//! MeshConfig: settings of the mesh, as YAML in a ConfigMap. Of its many fields those that the mesh reads are here.
//!
//! The others are Istio's own business and are left alone without a word: a MeshConfig is one for the whole installation.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1;
use mesh_core::{
    route::{cluster::OutlierDetection, normalize::PathNormalization, scope::OutboundPolicy},
    snapshot::Name,
};
use serde_json::Value;

use super::{
    destination_rule::{ConnectionPool, LocalityLb, connection_pool, keepalive, locality, outlier_detection},
    fields::{Node, Object},
    metadata::{self, Scope},
    parts::{self, ExportTo},
    sidecar,
    virtual_service::{Retries, retries},
};
use crate::problem::Problems;

/// Name of the ConfigMap, in the root namespace.
pub(crate) const CONFIG_MAP: &str = "istio";
/// The key that holds the settings.
const KEY: &str = "mesh";

/// Settings of the mesh. What is `None` has not been given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// Name of the ConfigMap.
    pub name: Name,
    /// Trust domain of identities, if given.
    pub trust_domain: Option<Arc<str>>,
    /// Trust domains whose identities count as the mesh's own.
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// What requests and connections are routed by where no resource says more.
    pub routing: Box<RoutingDefaults>,
}

/// What requests and connections are routed by where no resource says more (§2.11). What is `None` has not been given; the
/// methods tell what holds then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingDefaults {
    /// What happens to destinations that nothing describes.
    pub outbound: Option<OutboundPolicy>,
    /// How tries are repeated.
    pub retries: Option<Retries>,
    /// Preference for near endpoints.
    pub locality: Option<LocalityLb>,
    /// Who sees a service that does not say.
    pub service_export_to: Option<ExportTo>,
    /// Who sees a VirtualService that does not say.
    pub virtual_service_export_to: Option<ExportTo>,
    /// Who sees a DestinationRule that does not say.
    pub destination_rule_export_to: Option<ExportTo>,
    /// Limit of a connection attempt.
    pub connect_timeout: Option<Duration>,
    /// TCP keep-alive: probes, idle time, interval.
    pub keepalive: Option<(Option<u32>, Option<Duration>, Option<Duration>)>,
    /// Limits of destinations without a `connectionPool`.
    pub pool: Option<ConnectionPool>,
    /// Ejection of endpoints of destinations without an `outlierDetection`.
    pub outlier: Option<OutlierDetection>,
    /// How paths are made alike before they are matched and forwarded.
    pub path_normalization: PathNormalization,
    /// HTTP/1.1 clients are served by HTTP/2 upstream.
    pub h2_upgrade: bool,
    /// Endpoints of the mesh are spoken to by mutual TLS without being told to.
    pub auto_mtls: Option<bool>,
    /// How often a name without a time to live of its own is resolved again.
    pub dns_refresh: Option<Duration>,
    /// How long the first bytes of a connection are waited for; zero: as long as the agent is told to.
    pub detection_timeout: Option<Duration>,
}

impl RoutingDefaults {
    /// What happens to destinations that nothing describes.
    pub fn outbound(&self) -> OutboundPolicy {
        self.outbound.unwrap_or_default()
    }

    /// Limit of a connection attempt.
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout.unwrap_or(Duration::from_secs(10))
    }

    /// Preference for near endpoints; on, and plain, where nothing is said.
    pub fn locality(&self) -> LocalityLb {
        let plain = || LocalityLb {
            enabled: true,
            distribute: Vec::new(),
            failover: Vec::new(),
            failover_priority: Vec::new(),
            zone_aware: None,
        };
        self.locality.clone().unwrap_or_else(plain)
    }
}

/// Reads the settings; the caller has checked that the ConfigMap is the mesh's. `root` is the namespace of mesh-wide policies, which need
/// not be the ConfigMap's own.
pub(crate) fn read(object: &v1::ConfigMap, root: &str, problems: &mut Problems) -> MeshConfig {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    let text = object.data.as_ref().and_then(|data| data.get(KEY)).map(String::as_str).unwrap_or_default();
    let mut config =
        MeshConfig { name, trust_domain: None, trust_domain_aliases: Vec::new(), routing: Box::default() };
    let value: Value = if text.trim().is_empty() {
        problems.warning(format!("data.{KEY}"), "is missing or empty; the mesh has its defaults");
        return config;
    } else {
        match serde_saphyr::from_str(text) {
            Ok(read) => read,
            Err(error) => {
                let message = error.without_snippet().to_string();
                let what = message.lines().next().unwrap_or_default();
                problems.error(format!("data.{KEY}"), format!("is no MeshConfig: {what}"));
                return config;
            }
        }
    };
    if value.is_null() {
        return config;
    }
    let node = Node { path: format!("data.{KEY}"), value: &value };
    let Some(mut mesh) = node.object(problems) else { return config };
    root_namespace(&mut mesh, root, problems);
    config.trust_domain = mesh.shared("trustDomain", problems);
    if let Some(domain) = &config.trust_domain {
        check_trust_domain(domain, &mesh.at("trustDomain"), problems);
    }
    for node in mesh.list("trustDomainAliases", problems) {
        if let Some(domain) = node.text(problems) {
            check_trust_domain(domain, &node.path, problems);
            config.trust_domain_aliases.push(domain.into());
        }
    }
    config.routing = Box::new(routing(&mut mesh, problems));
    config
}

fn root_namespace(mesh: &mut Object<'_>, counts: &str, problems: &mut Problems) {
    if let Some(root) = mesh.text("rootNamespace", problems).filter(|root| *root != counts) {
        let message =
            format!("is {root:?}, but the mesh was started with root namespace {counts:?}, which counts");
        problems.warning(mesh.at("rootNamespace"), message);
    }
}

fn routing(mesh: &mut Object<'_>, problems: &mut Problems) -> RoutingDefaults {
    let least = Duration::from_millis(1);
    let upgrade = [("DO_NOT_UPGRADE", false), ("UPGRADE", true)];
    let mut policy = mesh.object("defaultTrafficPolicy", problems);
    let pool = policy.as_mut().and_then(|policy| connection_pool(policy, "connectionPool", problems));
    let outlier = policy.as_mut().and_then(|policy| outlier_detection(policy, "outlierDetection", problems));
    if let Some(policy) = policy {
        policy.finish(problems);
    }
    RoutingDefaults {
        outbound: sidecar::outbound(mesh, OutboundPolicy::AllowAny, problems),
        retries: retries(mesh, "defaultHttpRetryPolicy", problems),
        locality: locality(mesh, problems),
        service_export_to: parts::export_to(mesh, "defaultServiceExportTo", problems),
        virtual_service_export_to: parts::export_to(mesh, "defaultVirtualServiceExportTo", problems),
        destination_rule_export_to: parts::export_to(mesh, "defaultDestinationRuleExportTo", problems),
        connect_timeout: mesh.duration_of("connectTimeout", least, problems),
        keepalive: keepalive(mesh, "tcpKeepalive", problems),
        pool,
        outlier,
        path_normalization: path_normalization(mesh, problems).unwrap_or_default(),
        h2_upgrade: mesh.word("h2UpgradePolicy", &upgrade, problems).unwrap_or_default(),
        auto_mtls: mesh.bool("enableAutoMtls", problems),
        dns_refresh: mesh.duration_of("dnsRefreshRate", Duration::from_secs(1), problems),
        detection_timeout: mesh.duration("protocolDetectionTimeout", problems),
    }
}

fn path_normalization(mesh: &mut Object<'_>, problems: &mut Problems) -> Option<PathNormalization> {
    let mut object = mesh.object("pathNormalization", problems)?;
    let words = [
        ("DEFAULT", PathNormalization::Base),
        ("NONE", PathNormalization::None),
        ("BASE", PathNormalization::Base),
        ("MERGE_SLASHES", PathNormalization::MergeSlashes),
        ("DECODE_AND_MERGE_SLASHES", PathNormalization::DecodeAndMergeSlashes),
    ];
    let read = object.word("normalization", &words, problems);
    object.finish(problems);
    read
}

/// A trust domain (SPIFFE-ID §2.1).
fn check_trust_domain(text: &str, path: &str, problems: &mut Problems) {
    let is_fit = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    if !(1..=255).contains(&text.len()) || !text.bytes().all(is_fit) {
        let wanted = "wanted lower-case letters, digits, '.', '-' and '_', at most 255";
        problems.error(path, format!("is {text:?}, {wanted}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        problem::Level,
        resource::Resource,
        source::document::{Known, Parsed, Rules, parse},
    };

    fn read(name: &str, namespace: &str, mesh: &str) -> Parsed {
        let indented = mesh.replace('\n', "\n    ");
        let text = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\ndata:\n  \
             meshNetworks: 'networks: {{}}'\n  mesh: |-\n    {indented}\n"
        );
        parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new())
    }

    #[test]
    fn the_trust_domain_and_its_aliases_are_read_and_other_fields_left_alone() {
        let parsed = read(
            "istio",
            "istio-system",
            "enableTracing: true\ntrustDomain: prod\ntrustDomainAliases: [old]\nrootNamespace: istio-system",
        );
        assert_eq!(parsed.problems, []);
        let Resource::MeshConfig(config) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
        assert_eq!(config.trust_domain.as_deref(), Some("prod"));
        assert_eq!(config.trust_domain_aliases, ["old".into()]);
    }

    #[test]
    fn defaults_of_routing_are_read() {
        let mesh = "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\ndefaultHttpRetryPolicy: {attempts: 3, retryOn: 5xx}\n\
                    localityLbSetting: {}\nzoneAwareLbSetting: {enabled: false}\ndefaultServiceExportTo: ['.']\ndefaultVirtualServiceExportTo: ['*']\n\
                    defaultDestinationRuleExportTo: [a]\nconnectTimeout: 3s\nh2UpgradePolicy: UPGRADE\n\
                    pathNormalization: {normalization: MERGE_SLASHES}\nenableAutoMtls: false\ndnsRefreshRate: 5s\n\
                    protocolDetectionTimeout: 100ms\ntcpKeepalive: {probes: 3, time: 60s}\n\
                    defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 9}}, outlierDetection: {}}";
        let parsed = read("istio", "istio-system", mesh);
        assert_eq!(parsed.problems, []);
        let Resource::MeshConfig(config) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
        let routing = &config.routing;
        assert_eq!(routing.outbound(), OutboundPolicy::RegistryOnly);
        let Some(Retries::On(retries)) = &routing.retries else { panic!("{routing:?}") };
        assert!(retries.attempts == 3 && retries.on.server_error);
        assert!(!routing.locality().enabled);
        assert!(routing.service_export_to.as_ref().is_some_and(|to| to.own && !to.everyone));
        assert!(routing.virtual_service_export_to.as_ref().is_some_and(|to| to.everyone));
        assert!(routing.destination_rule_export_to.as_ref().is_some_and(|to| to.includes("a", "b")));
        assert_eq!(routing.connect_timeout(), Duration::from_secs(3));
        assert!(routing.h2_upgrade);
        assert_eq!(routing.path_normalization, PathNormalization::MergeSlashes);
        assert_eq!(routing.auto_mtls, Some(false));
        assert_eq!(routing.dns_refresh, Some(Duration::from_secs(5)));
        assert_eq!(routing.detection_timeout, Some(Duration::from_millis(100)));
        assert_eq!(routing.keepalive, Some((Some(3), Some(Duration::from_secs(60)), None)));
        assert_eq!(routing.pool.as_ref().and_then(|pool| pool.max_connections), Some(9));
        assert!(routing.outlier.is_some());
    }

    #[test]
    fn the_root_namespace_is_the_meshs_wherever_the_settings_are() {
        let rules =
            Rules { root_namespace: "istio-system".to_owned(), mesh_config: Name::new("own", "nodemesh") };
        for (root, said) in [("istio-system", 0), ("own", 1)] {
            let text = format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: nodemesh, namespace: own}}\ndata:\n  mesh: 'rootNamespace: {root}'\n"
            );
            let parsed = parse("a.yaml".as_ref(), &text, &rules, &Known::new());
            assert_eq!(parsed.resources.len(), 1);
            assert_eq!(parsed.problems.len(), said, "{root}: {:?}", parsed.problems);
            assert!(parsed.problems.iter().all(|p| p.message.contains("root namespace \"istio-system\"")));
        }
    }

    #[test]
    fn what_is_not_said_is_as_istio_has_it() {
        let parsed = read("istio", "istio-system", "rootNamespace: istio-system");
        let Resource::MeshConfig(config) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
        let routing = &config.routing;
        assert_eq!(**routing, RoutingDefaults::default());
        assert_eq!(routing.outbound(), OutboundPolicy::AllowAny);
        assert_eq!(routing.connect_timeout(), Duration::from_secs(10));
        assert!(routing.locality().enabled);
        assert_eq!(routing.path_normalization, PathNormalization::Base);
    }

    #[test]
    fn other_config_maps_are_nobodys_business() {
        for (name, namespace) in [("istio", "default"), ("other", "istio-system")] {
            let parsed = read(name, namespace, "trustDomain: [");
            assert!(parsed.problems.is_empty() && parsed.resources.is_empty(), "{parsed:?}");
            assert_eq!(parsed.ignored.get("v1/ConfigMap"), Some(&1));
        }
    }

    #[test]
    fn mistakes_name_the_field() {
        for (mesh, level, field) in [
            ("trustDomain: Prod", Level::Error, "data.mesh.trustDomain"),
            ("trustDomain: a/b", Level::Error, "data.mesh.trustDomain"),
            ("trustDomainAliases: [a, '']", Level::Error, "data.mesh.trustDomainAliases[1]"),
            ("trustDomain: [a]", Level::Error, "data.mesh.trustDomain"),
            ("[a]", Level::Error, "data.mesh"),
            ("trustDomain: {", Level::Error, "data.mesh"),
            ("rootNamespace: else", Level::Warning, "data.mesh.rootNamespace"),
            ("outboundTrafficPolicy: {mode: SOME}", Level::Error, "data.mesh.outboundTrafficPolicy.mode"),
            ("outboundTrafficPolicy: {}", Level::Warning, "data.mesh.outboundTrafficPolicy.mode"),
            (
                "pathNormalization: {normalization: x}",
                Level::Error,
                "data.mesh.pathNormalization.normalization",
            ),
            ("connectTimeout: fast", Level::Error, "data.mesh.connectTimeout"),
            (
                "defaultHttpRetryPolicy: {attempts: -1}",
                Level::Error,
                "data.mesh.defaultHttpRetryPolicy.attempts",
            ),
            ("defaultServiceExportTo: ['A B']", Level::Error, "data.mesh.defaultServiceExportTo[0]"),
            (
                "localityLbSetting: {distribute: [{from: a, to: {b: 90}}]}",
                Level::Error,
                "data.mesh.localityLbSetting.distribute[0].to",
            ),
            (" ", Level::Warning, "data.mesh"),
        ] {
            let parsed = read("istio", "istio-system", mesh);
            let said: Vec<_> = parsed.problems.iter().map(|p| (p.level, p.field.as_str())).collect();
            assert_eq!(said, [(level, field)], "{mesh}: {:?}", parsed.problems);
            assert_eq!(parsed.resources.len(), usize::from(level == Level::Warning), "{mesh}");
        }
    }
}
