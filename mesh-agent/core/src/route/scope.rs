//! Who sees what: the same host can mean different things to clients of different namespaces.

use std::{collections::BTreeMap, sync::Arc};

/// Something that depends on the client's namespace, and on its labels where a resource selects workloads.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Scoped<T> {
    /// For clients of every namespace that is not in `by_namespace`; `None`: not there for them.
    pub default: Option<Arc<T>>,
    /// For clients of these namespaces.
    pub by_namespace: BTreeMap<Arc<str>, InNamespace<T>>,
}

/// What clients of one namespace see.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InNamespace<T> {
    /// For workloads that these labels select, in order of precedence; before `all`.
    pub selected: Vec<(BTreeMap<Arc<str>, Arc<str>>, Arc<T>)>,
    /// For all others.
    pub all: Option<Arc<T>>,
}

impl<T> Scoped<T> {
    /// The same for every client.
    pub fn everywhere(value: Arc<T>) -> Self {
        Self { default: Some(value), by_namespace: BTreeMap::new() }
    }

    /// What a client of `namespace` with these labels sees.
    pub fn get(&self, namespace: &str, labels: &BTreeMap<Arc<str>, Arc<str>>) -> Option<&Arc<T>> {
        let Some(own) = self.by_namespace.get(namespace) else { return self.default.as_ref() };
        let selects = |selector: &BTreeMap<Arc<str>, Arc<str>>| {
            selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        let selected = own.selected.iter().find(|(selector, _)| selects(selector));
        selected.map(|(_, value)| value).or(own.all.as_ref())
    }
}

/// What an Istio `Sidecar` lets its workloads see. It limits visibility; it is no firewall (S65).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SidecarScope {
    /// What is visible at which ports; an egress listener without port is the rest.
    pub egress: Vec<EgressListener>,
    /// What happens to destinations that nothing describes; `None`: as the mesh says.
    pub outbound: Option<OutboundPolicy>,
}

/// One egress listener of a `Sidecar`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressListener {
    /// Only for this port.
    pub port: Option<u16>,
    /// Visible hosts; excluded ones win.
    pub hosts: Vec<EgressHost>,
}

/// `namespace/host` of an egress listener.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressHost {
    /// Written `~namespace/host`: takes away.
    pub excluded: bool,
    /// Namespace of the service; `None` is every one.
    pub namespace: Option<Arc<str>>,
    /// Host name, `*`, or `*.suffix`.
    pub host: Arc<str>,
}

/// What happens to destinations that no resource describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundPolicy {
    /// They are reached as if there were no mesh.
    #[default]
    AllowAny,
    /// 502 for HTTP, a reset for TCP.
    RegistryOnly,
}
