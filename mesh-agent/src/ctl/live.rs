//! Owns reading what the mesh reads from a cluster, once, for questions that are otherwise asked about files.

use std::path::PathBuf;

use k8s_openapi::api::{
    core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, ResourceExt,
    api::{ApiResource, DynamicObject},
};

use mesh_control::{kubernetes::names::MESH_CONFIG, resource::is_for_others};
use mesh_core::snapshot::Name;

use super::{
    cluster::{self, Cluster, ClusterArgs, ClusterError, Doing, defined, list, resource},
    install::ObjectKind,
};

/// Where a cluster's mesh has its MeshConfig.
pub(super) fn mesh_config(of: &ClusterArgs) -> Name {
    Name::new(of.mesh_namespace.as_str(), MESH_CONFIG)
}

/// Every object of a kind that the mesh reads, and its MeshConfig: one text a kind, named after it.
pub(super) fn texts(of: &ClusterArgs) -> Result<Vec<(PathBuf, String)>, ClusterError> {
    cluster::run(of, async |cluster| {
        let mut kinds: Vec<ApiResource> = [
            ObjectKind::of::<Namespace>(),
            ObjectKind::of::<Node>(),
            ObjectKind::of::<ServiceAccount>(),
            ObjectKind::of::<Pod>(),
            ObjectKind::of::<Service>(),
            ObjectKind::of::<EndpointSlice>(),
        ]
        .into_iter()
        .map(resource)
        .collect();
        kinds.extend(served(&cluster).await?);
        let mut texts = Vec::new();
        for kind in kinds {
            let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &kind);
            let objects = list(&api, "").await.doing(|| format!("list {}", kind.plural))?;
            let text = objects.into_iter().filter_map(|object| document(&kind, object)).collect();
            texts.push((PathBuf::from(format!("cluster/{}", kind.plural)), text));
        }
        // Of all others nothing is read, and who asks need not be allowed to.
        let kind = resource(ObjectKind::of::<ConfigMap>());
        let config = mesh_config(of);
        let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), &config.namespace, &kind);
        let found = api.get_opt(&config.name).await.doing(|| format!("read ConfigMap {config}"))?;
        let text = found.and_then(|object| document(&kind, object));
        texts.extend(text.map(|text| (PathBuf::from(format!("cluster/{}", kind.plural)), text)));
        Ok(texts)
    })
}

/// The kinds of the mesh that the cluster serves, each in a version that the mesh reads.
async fn served(cluster: &Cluster) -> Result<Vec<ApiResource>, ClusterError> {
    let found = cluster.definitions().await?;
    let mut kinds = Vec::new();
    for wanted in mesh_control::crd::all() {
        let Some(found) = found.iter().find(|found| found.name_any() == wanted.name_any()) else { continue };
        let is_served =
            |name: &str| found.spec.versions.iter().any(|version| version.served && version.name == name);
        let Some(version) = wanted.spec.versions.iter().find(|version| is_served(&version.name)) else {
            continue;
        };
        kinds.push(defined(found, &version.name));
    }
    Ok(kinds)
}

/// One document of YAML, in one line. Items of lists come without their kind. Routes that other controllers alone carry out are left
/// to these.
fn document(kind: &ApiResource, mut object: DynamicObject) -> Option<String> {
    object.metadata.managed_fields = None;
    object.types =
        Some(kube::api::TypeMeta { api_version: kind.api_version.clone(), kind: kind.kind.clone() });
    let object = serde_json::to_value(&object).ok()?;
    (!is_for_others(&object)).then(|| format!("---\n{object}\n"))
}
