//! Owns what is known of meshes that put a proxy into each pod: how their injectors and their proxies are called.
//!
//! Invariant: a name that anybody may give to a container is a proxy only with the mark that its mesh leaves on the pods it injects. A pod
//! taken for another mesh's by mistake would be left out of this one.

use std::{fmt, sync::Arc};

/// A proxy of another mesh in a pod. It would be redirected like an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    /// The mesh.
    pub mesh: &'static str,
    /// Its container.
    pub container: Arc<str>,
}

impl fmt::Display for Injected {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "a sidecar of {} (container {})", self.mesh, self.container)
    }
}

#[derive(Debug)]
struct SidecarMesh {
    name: &'static str,
    /// How names of its MutatingWebhookConfigurations begin.
    injectors: &'static [&'static str],
    proxies: &'static [Proxy],
}

#[derive(Debug)]
struct Proxy {
    container: &'static str,
    /// A pod of several services has one for each: its name goes on with `-` and the service's.
    is_per_service: bool,
    /// Label or annotation of injected pods, where the container's name alone says too little.
    mark: Option<&'static str>,
}

impl Proxy {
    const fn named(container: &'static str) -> Self {
        Self { container, is_per_service: false, mark: None }
    }

    fn is_called(&self, container: &str) -> bool {
        match container.strip_prefix(self.container) {
            Some("") => true,
            Some(rest) => self.is_per_service && rest.starts_with('-'),
            None => false,
        }
    }
}

const MESHES: [SidecarMesh; 5] = [
    SidecarMesh {
        name: "Istio",
        injectors: &["istio-sidecar-injector", "istio-revision-tag"],
        proxies: &[Proxy::named("istio-proxy")],
    },
    SidecarMesh {
        name: "Linkerd",
        injectors: &["linkerd-proxy-injector"],
        proxies: &[Proxy::named("linkerd-proxy")],
    },
    SidecarMesh {
        name: "Kuma",
        injectors: &["kuma-admission-mutating"],
        proxies: &[Proxy::named("kuma-sidecar")],
    },
    SidecarMesh {
        name: "Consul",
        injectors: &["consul-connect-injector"],
        proxies: &[
            Proxy { container: "consul-dataplane", is_per_service: true, mark: None },
            // Before Consul 1.14; others call theirs so too.
            Proxy {
                container: "envoy-sidecar",
                is_per_service: true,
                mark: Some("consul.hashicorp.com/connect-inject-status"),
            },
        ],
    },
    SidecarMesh {
        name: "Open Service Mesh",
        injectors: &["osm-webhook"],
        proxies: &[Proxy { container: "envoy", is_per_service: false, mark: Some("osm-proxy-uuid") }],
    },
];

/// The mesh whose injector a MutatingWebhookConfiguration is, by its name.
pub fn injector(webhook: &str) -> Option<&'static str> {
    let is_its = |mesh: &&SidecarMesh| mesh.injectors.iter().any(|begin| webhook.starts_with(begin));
    MESHES.iter().find(is_its).map(|mesh| mesh.name)
}

/// The first of a pod's long-lived containers that is another mesh's proxy. `is_marked` says whether the pod has a label or annotation.
pub(super) fn find<'a>(
    containers: impl IntoIterator<Item = &'a str>,
    is_marked: impl Fn(&str) -> bool,
) -> Option<Injected> {
    containers.into_iter().find_map(|container| {
        let is_it = |proxy: &Proxy| proxy.is_called(container) && proxy.mark.is_none_or(&is_marked);
        let mesh = MESHES.iter().find(|mesh| mesh.proxies.iter().any(is_it))?;
        Some(Injected { mesh: mesh.name, container: container.into() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh_of(containers: &[&str], marks: &[&str]) -> Option<&'static str> {
        find(containers.iter().copied(), |key| marks.contains(&key)).map(|found| found.mesh)
    }

    #[test]
    fn proxies_of_other_meshes_are_known_by_their_containers() {
        for (container, mesh) in [
            ("istio-proxy", "Istio"),
            ("linkerd-proxy", "Linkerd"),
            ("kuma-sidecar", "Kuma"),
            ("consul-dataplane", "Consul"),
            ("consul-dataplane-cart", "Consul"),
        ] {
            assert_eq!(mesh_of(&["app", container], &[]), Some(mesh), "{container}");
        }
        for container in ["app", "istio-proxy-2", "linkerd-proxy-logs", "consul-dataplanes", "consul"] {
            assert_eq!(mesh_of(&[container], &[]), None, "{container}");
        }
    }

    #[test]
    fn a_name_that_anybody_may_give_is_a_proxy_only_in_a_pod_that_its_mesh_marked() {
        let (consul, osm) = ("consul.hashicorp.com/connect-inject-status", "osm-proxy-uuid");
        for (container, mark, mesh) in [
            ("envoy-sidecar", consul, "Consul"),
            ("envoy-sidecar-cart", consul, "Consul"),
            ("envoy", osm, "Open Service Mesh"),
        ] {
            assert_eq!(mesh_of(&[container], &[mark]), Some(mesh), "{container}");
            assert_eq!(mesh_of(&[container], &[]), None, "{container} of somebody else");
        }
        assert_eq!(mesh_of(&["envoy"], &[consul]), None, "the mark of another");
    }

    #[test]
    fn whoever_is_known_to_inject_is_known_by_what_it_injects() {
        for mesh in &MESHES {
            assert!(!mesh.injectors.is_empty() && !mesh.proxies.is_empty(), "{}", mesh.name);
            for begin in mesh.injectors {
                assert_eq!(injector(&format!("{begin}-1")), Some(mesh.name));
            }
        }
        assert_eq!(injector("cert-manager-webhook"), None);
    }
}
