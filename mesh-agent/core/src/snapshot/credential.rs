//! Secrets that DestinationRules name: PEM for connections of a node's pods to servers outside the mesh.
//!
//! Invariant: what is in one is never shown, neither by `Debug` nor otherwise.

use std::{fmt, sync::Arc};

use super::Name;

/// What a Secret means for the pods of one node that a DestinationRule selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// The only node that may have it.
    pub node: Arc<str>,
    /// Namespace and name of the Secret.
    pub name: Name,
    /// What is in it, or why there is nothing.
    pub content: Result<Material, Arc<str>>,
}

/// What TLS needs of a Secret, as PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Material {
    /// Client certificates.
    pub certificate: Option<Arc<[u8]>>,
    /// The key of the first.
    pub key: Option<Arc<[u8]>>,
    /// Authorities that servers are verified by.
    pub roots: Option<Arc<[u8]>>,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("certificate", self.certificate.is_some()),
            ("key", self.key.is_some()),
            ("roots", self.roots.is_some()),
        ];
        f.debug_set()
            .entries(parts.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_secret_is_not_shown() {
        let key: Arc<[u8]> = Arc::from(&b"hunter2"[..]);
        let material = Material { key: Some(key), ..Material::default() };
        let content = Ok(material);
        let credential = Credential { node: "n".into(), name: Name::new("a", "b"), content };
        let shown = format!("{credential:?}");
        assert!(shown.contains("key") && !shown.contains("hunter2") && !shown.contains("104"), "{shown}");
    }
}
