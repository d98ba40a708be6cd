//! PeerAuthentication: which ports take plaintext.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_core::{mode::Mode, snapshot::Name};

use super::{
    Labels,
    metadata::{self, Scope},
};
use crate::problem::Problems;

/// A mutual TLS policy. `None` as a mode means UNSET: what the next wider policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of equals wins.
    pub created: Option<i64>,
    /// Selects workloads of the namespace; empty for all of them.
    pub selector: Labels,
    /// Mode.
    pub mode: Option<Mode>,
    /// Modes by the workload's own port.
    pub ports: BTreeMap<u16, Option<Mode>>,
}

/// The resource as it is written.
pub(crate) mod wire {
    use std::collections::BTreeMap;

    use super::ObjectMeta;

    /// The whole.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct PeerAuthentication {
        #[serde(default)]
        pub(crate) metadata: ObjectMeta,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) spec: Option<Spec>,
    }

    /// `spec`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Spec {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) selector: Option<Selector>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) mtls: Option<Mtls>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) port_level_mtls: Option<BTreeMap<String, Mtls>>,
    }

    /// `spec.selector`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Selector {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) match_labels: Option<BTreeMap<String, String>>,
    }

    /// `spec.mtls` and each of `spec.portLevelMtls`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    pub(crate) struct Mtls {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) mode: Option<String>,
    }
}

/// Reads a policy. `root_namespace` is where mesh-wide policies live.
pub(crate) fn read(
    object: &wire::PeerAuthentication,
    root_namespace: &str,
    problems: &mut Problems,
) -> PeerAuthentication {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    let spec = object.spec.clone().unwrap_or_default();
    let selector = spec.selector.and_then(|s| s.match_labels).unwrap_or_default();
    let mode = spec.mtls.and_then(|mtls| mode(mtls.mode.as_deref(), "spec.mtls.mode", problems));
    let mut ports = BTreeMap::new();
    for (text, mtls) in spec.port_level_mtls.unwrap_or_default() {
        let field = format!("spec.portLevelMtls.{text}");
        let mode = self::mode(mtls.mode.as_deref(), &format!("{field}.mode"), problems);
        match text.parse::<u16>() {
            Ok(port) if port != 0 => {
                ports.insert(port, mode);
            }
            _ => problems.error(field, format!("is for port {text:?}, wanted a number from 1 to 65535")),
        }
    }
    if !ports.is_empty() && selector.is_empty() {
        problems.warning("spec.portLevelMtls", "has no effect without spec.selector.matchLabels");
    }
    if !selector.is_empty() && &*name.namespace == root_namespace {
        problems.warning(
            "spec.selector",
            format!("in the root namespace {root_namespace}: the policy has no effect"),
        );
    }
    PeerAuthentication {
        name,
        created: metadata::created(&object.metadata),
        selector: metadata::shared(selector.iter()),
        mode,
        ports,
    }
}

fn mode(text: Option<&str>, field: &str, problems: &mut Problems) -> Option<Mode> {
    match text {
        None | Some("UNSET") => None,
        Some("DISABLE") => Some(Mode::Disable),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("STRICT") => Some(Mode::Strict),
        Some(other) => {
            problems.error(field, format!("is {other:?}, wanted UNSET, DISABLE, PERMISSIVE or STRICT"));
            None
        }
    }
}
