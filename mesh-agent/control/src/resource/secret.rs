//! Secret: what TLS needs of it, and nothing else.
//!
//! Invariant: what is in one is in no message.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1;
use mesh_core::snapshot::{Material, Name};

use super::metadata::{self, Scope};
use crate::problem::Problems;

/// A Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// Name.
    pub name: Name,
    /// What of it is for TLS.
    pub material: Material,
}

/// Reads a Secret, of type `kubernetes.io/tls` or with Istio's own keys.
pub(crate) fn read(secret: &v1::Secret, problems: &mut Problems) -> Secret {
    let name = metadata::name(&secret.metadata, Scope::Namespaced, problems);
    let mut data: BTreeMap<&str, &[u8]> = BTreeMap::new();
    data.extend(secret.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice())));
    // As the API server has it: text wins.
    data.extend(secret.string_data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes())));
    let part = |keys: [&str; 2]| {
        let found = keys.into_iter().find_map(|key| data.get(key).copied());
        found.filter(|bytes| !bytes.is_empty()).map(Arc::<[u8]>::from)
    };
    let material = Material {
        certificate: part(["tls.crt", "cert"]),
        key: part(["tls.key", "key"]),
        roots: part(["ca.crt", "cacert"]),
    };
    Secret { name, material }
}
