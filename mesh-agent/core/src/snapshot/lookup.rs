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

    /// The service whose full name is `host` (lower case, without trailing dot).
    pub fn service_by_host(&self, host: &str) -> Option<&Arc<Service>> {
        let short = host.strip_suffix(self.cluster_domain())?.strip_suffix(".svc.")?;
        let (name, namespace) = short.split_once('.')?;
        self.service_named(namespace, name)
    }

    /// The full name of a service.
    pub fn host_of<'s>(&self, service: &'s Service) -> Cow<'s, str> {
        let Name { namespace, name } = &service.name;
        Cow::Owned(format!("{name}.{namespace}.svc.{}", self.cluster_domain()))
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
            assert_eq!(snapshot.service_by_host(&host), Some(found));
        }
        for host in [
            "web.a",
            "web.a.svc",
            "web.c.svc.cluster.local",
            "x.web.a.svc.cluster.local",
            "svc.cluster.local",
        ] {
            assert_eq!(snapshot.service_by_host(host), None, "{host}");
        }
    }
}
