//! Services by the names that requests have, without allocating.

use std::{borrow::Borrow, borrow::Cow, cmp::Ordering, sync::Arc};

use super::{Name, Service, Snapshot};

/// Namespace and name, owned or borrowed; ordered as [`Name`] is.
trait NameParts {
    fn parts(&self) -> (&str, &str);
}

impl NameParts for Name {
    fn parts(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl NameParts for (&str, &str) {
    fn parts(&self) -> (&str, &str) {
        *self
    }
}

impl<'a> Borrow<dyn NameParts + 'a> for Name {
    fn borrow(&self) -> &(dyn NameParts + 'a) {
        self
    }
}

impl PartialEq for dyn NameParts + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn NameParts + '_ {}

impl PartialOrd for dyn NameParts + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn NameParts + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl Snapshot {
    /// A service by namespace and name.
    pub fn service_named(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        let parts = (namespace, name);
        self.services.get::<dyn NameParts + '_>(&parts)
    }

    /// The service that clients of `namespace` mean by a full name (lower case, without trailing dot): that of Kubernetes, else of those
    /// that declare the host the one of their own namespace, else the one of precedence (S57).
    pub fn service_by_host(&self, namespace: &str, host: &str) -> Option<&Arc<Service>> {
        self.service_of_kubernetes(host).or_else(|| self.declared(namespace, host))
    }

    /// The same, and where no service has the name, the one with the longest wildcard that covers it (S4).
    pub fn service_covering(&self, namespace: &str, host: &str) -> Option<&Arc<Service>> {
        if let Some(service) = self.service_by_host(namespace, host) {
            return Some(service);
        }
        if self.by_host.is_empty() {
            return None;
        }
        let mut rest = host;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(service) = self.declared(namespace, &format!("*.{parent}")) {
                return Some(service);
            }
            rest = parent;
        }
        None
    }

    /// The services that declare a host which Kubernetes does not know, those of precedence first.
    pub fn services_declaring(&self, host: &str) -> &[Name] {
        self.by_host.get(host).map_or(&[], Vec::as_slice)
    }

    fn service_of_kubernetes(&self, host: &str) -> Option<&Arc<Service>> {
        let short = host.strip_suffix(self.cluster_domain())?.strip_suffix(".svc.")?;
        let (name, namespace) = short.split_once('.')?;
        self.service_named(namespace, name).filter(|service| service.hostname.is_none())
    }

    fn declared(&self, namespace: &str, host: &str) -> Option<&Arc<Service>> {
        let names = self.services_declaring(host);
        let own = names.iter().find(|name| &*name.namespace == namespace);
        self.service(own.or(names.first())?)
    }

    /// The full name of a service.
    pub fn host_of<'s>(&self, service: &'s Service) -> Cow<'s, str> {
        service.host(self.cluster_domain())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Parts;

    #[test]
    fn services_are_found_by_their_full_names_only() {
        let names = [("a", "web"), ("a-b", "web"), ("b", "web"), ("b", "api")];
        let services =
            names.iter().map(|(ns, name)| Arc::new(Service::named(Name::new(*ns, *name)))).collect();
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        for (namespace, name) in names {
            let found = snapshot.service_named(namespace, name).unwrap();
            assert_eq!(found.name, Name::new(namespace, name));
            let host = snapshot.host_of(found).into_owned();
            assert_eq!(host, format!("{name}.{namespace}.svc.cluster.local"));
            assert_eq!(snapshot.service_by_host("a", &host), Some(found));
        }
        for host in [
            "web.a",
            "web.a.svc",
            "web.c.svc.cluster.local",
            "x.web.a.svc.cluster.local",
            "svc.cluster.local",
        ] {
            assert_eq!(snapshot.service_by_host("a", host), None, "{host}");
        }
    }

    /// A service of a host that Kubernetes does not know.
    fn declaring(namespace: &str, host: &str) -> Arc<Service> {
        Arc::new(Service { hostname: Some(host.into()), ..Service::named(Name::new(namespace, host)) })
    }

    #[test]
    fn s57_a_host_is_the_clients_own_namespaces_else_that_of_precedence() {
        let services = vec![declaring("b", "api.x"), declaring("a", "api.x"), declaring("c", "other.x")];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let of = |namespace, host| Some(&*snapshot.service_by_host(namespace, host)?.name.namespace);
        assert_eq!(of("a", "api.x"), Some("a"));
        assert_eq!(of("b", "api.x"), Some("b"));
        assert_eq!(of("z", "api.x"), Some("b"), "the first of the parts");
        assert_eq!(of("a", "other.x"), Some("c"));
        assert_eq!(of("a", "x"), None);
        let service = snapshot.service(&Name::new("c", "other.x")).unwrap();
        assert_eq!(snapshot.host_of(service), "other.x");
    }

    #[test]
    fn s53_a_service_of_kubernetes_has_its_name_whoever_else_declares_it() {
        let host = "web.a.svc.cluster.local";
        let services = vec![declaring("a", host), Arc::new(Service::named(Name::new("a", "web")))];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        assert_eq!(&*snapshot.service_by_host("a", host).unwrap().name.name, "web");
    }

    #[test]
    fn s4_a_wildcard_covers_what_no_name_is_and_the_longest_counts() {
        let services = vec![declaring("a", "*.x"), declaring("a", "*.b.x"), declaring("a", "own.b.x")];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let covering = |host| Some(&*snapshot.service_covering("a", host)?.name.name);
        assert_eq!(covering("own.b.x"), Some("own.b.x"));
        assert_eq!(covering("c.b.x"), Some("*.b.x"));
        assert_eq!(covering("d.c.b.x"), Some("*.b.x"));
        assert_eq!(covering("b.x"), Some("*.x"));
        assert_eq!(covering("x"), None);
        assert_eq!(snapshot.service_by_host("a", "c.b.x"), None);
    }
}
