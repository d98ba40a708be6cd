//! Names of the mesh's own objects in a cluster, and what all of them carry. The chart uses the same words.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PatchParams;

/// Namespace of the mesh's own objects unless told otherwise.
pub const NAMESPACE: &str = "nodemesh-system";
/// ConfigMap with the mesh configuration.
pub const MESH_CONFIG: &str = "nodemesh";
/// Secret with the root that the controller made.
pub const OWN_AUTHORITY: &str = "nodemesh-ca";
/// Secret with an authority that somebody plugged in, in Istio's layout.
pub const PLUGGED_AUTHORITY: &str = "cacerts";
/// ConfigMap with the roots, in every namespace.
pub const ROOTS: &str = "nodemesh-ca-root-cert";
/// Key of [`ROOTS`].
pub const ROOTS_KEY: &str = "root-cert.pem";
/// Lease of the controller that writes.
pub const LEASE: &str = "nodemesh-controller";
/// The webhook's configuration.
pub const WEBHOOK: &str = "nodemesh";
/// Who writes our fields of an object.
pub const FIELD_MANAGER: &str = "nodemesh";

/// Metadata of an object of ours; `namespace` is `None` for a cluster-wide one.
pub(crate) fn metadata(name: &str, namespace: Option<&str>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: namespace.map(str::to_owned),
        labels: Some(labels()),
        ..ObjectMeta::default()
    }
}

/// Labels of all objects of ours.
pub(crate) fn labels() -> BTreeMap<String, String> {
    ["part-of", "managed-by"].map(|key| (format!("app.kubernetes.io/{key}"), FIELD_MANAGER.to_owned())).into()
}

/// How our fields are written: what others wrote into them gives way.
pub(crate) fn apply() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

/// Whether the API server says that there is no such object.
pub(crate) fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether the API server says that somebody else was first.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
