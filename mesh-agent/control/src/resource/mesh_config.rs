//! MeshConfig: settings of the mesh, as YAML in a ConfigMap. Of its many fields those that the mesh reads are here.

use std::sync::Arc;

use k8s_openapi::api::core::v1;
use mesh_core::snapshot::Name;

use super::metadata::{self, Scope};
use crate::problem::Problems;

/// Name of the ConfigMap, in the root namespace.
pub(crate) const CONFIG_MAP: &str = "istio";
/// The key that holds the settings.
const KEY: &str = "mesh";

/// Settings of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// Name of the ConfigMap.
    pub name: Name,
    /// Trust domain of identities, if given.
    pub trust_domain: Option<Arc<str>>,
    /// Trust domains whose identities count as the mesh's own.
    pub trust_domain_aliases: Vec<Arc<str>>,
}

/// The fields read, as they are written.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    trust_domain: Option<String>,
    trust_domain_aliases: Option<Vec<String>>,
    root_namespace: Option<String>,
}

/// Reads the settings; the caller has checked that the ConfigMap is the mesh's.
pub(crate) fn read(object: &v1::ConfigMap, problems: &mut Problems) -> MeshConfig {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    let text = object.data.as_ref().and_then(|data| data.get(KEY)).map(String::as_str).unwrap_or_default();
    let read: Option<Wire> = if text.trim().is_empty() {
        problems.warning(format!("data.{KEY}"), "is missing or empty; the mesh has its defaults");
        None
    } else {
        match serde_saphyr::from_str(text) {
            Ok(read) => read,
            Err(error) => {
                let message = error.without_snippet().to_string();
                let what = message.lines().next().unwrap_or_default();
                problems.error(format!("data.{KEY}"), format!("is no MeshConfig: {what}"));
                None
            }
        }
    };
    let wire = read.unwrap_or_default();
    if let Some(root) = wire.root_namespace.filter(|root| *root != *name.namespace && !root.is_empty()) {
        let message = format!(
            "is {root:?}, but the agent was started with root namespace {:?}, which counts",
            &*name.namespace
        );
        problems.warning(format!("data.{KEY}.rootNamespace"), message);
    }
    let trust_domain = wire.trust_domain.filter(|domain| !domain.is_empty());
    let aliases = wire.trust_domain_aliases.unwrap_or_default();
    let domains = trust_domain
        .iter()
        .map(|domain| ("trustDomain".to_owned(), domain))
        .chain(aliases.iter().enumerate().map(|(at, domain)| (format!("trustDomainAliases[{at}]"), domain)));
    for (field, domain) in domains {
        if !is_trust_domain(domain) {
            let wanted = "wanted lower-case letters, digits, '.', '-' and '_', at most 255";
            problems.error(format!("data.{KEY}.{field}"), format!("is {domain:?}, {wanted}"));
        }
    }
    MeshConfig {
        name,
        trust_domain: trust_domain.map(Into::into),
        trust_domain_aliases: aliases.into_iter().map(Into::into).collect(),
    }
}

/// A trust domain (SPIFFE-ID §2.1).
fn is_trust_domain(text: &str) -> bool {
    let is_fit = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    (1..=255).contains(&text.len()) && text.bytes().all(is_fit)
}

#[cfg(test)]
mod tests {
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
            ("trustDomain: [a]", Level::Error, "data.mesh"),
            ("trustDomain: {", Level::Error, "data.mesh"),
            ("rootNamespace: else", Level::Warning, "data.mesh.rootNamespace"),
            (" ", Level::Warning, "data.mesh"),
        ] {
            let parsed = read("istio", "istio-system", mesh);
            let said: Vec<_> = parsed.problems.iter().map(|p| (p.level, p.field.as_str())).collect();
            assert_eq!(said, [(level, field)], "{mesh}: {:?}", parsed.problems);
            assert_eq!(parsed.resources.len(), usize::from(level == Level::Warning), "{mesh}");
        }
    }
}
