//! Owns how objects get into a cluster and out of it: server-side apply under one name, in order.

use std::collections::BTreeSet;

use k8s_openapi::{
    api::core::v1::Namespace, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    manifest::{Manifest, ObjectKind},
    objects::{self, INSTALLED, MANAGER},
};
use crate::ctl::cluster::{Cluster, ClusterError, Doing};

/// Why a namespace is kept.
pub(crate) const WAS_THERE: &str = "it was there before";

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    /// It was not there.
    Created,
    /// It was there and is changed.
    Configured,
    /// It was there, and just so.
    Unchanged,
    /// It is gone.
    Deleted,
    /// It was there and is left alone.
    Kept,
}

impl Action {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
            Self::Deleted => "deleted",
            Self::Kept => "kept",
        }
    }
}

/// One object and what became of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Done {
    pub(crate) kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
    pub(crate) action: Action,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

impl Done {
    pub(crate) fn new(kind: ObjectKind, namespace: Option<&str>, name: &str, action: Action) -> Self {
        let namespace = namespace.map(ToOwned::to_owned);
        Self { kind: kind.kind, namespace, name: name.to_owned(), action, note: None }
    }

    fn of(manifest: &Manifest, action: Action) -> Self {
        Self::new(manifest.kind, manifest.namespace.as_deref(), &manifest.name, action)
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        let name = match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => self.name.clone(),
        };
        let note = self.note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
        format!("{} {name} {}{note}", self.kind, self.action.as_str())
    }
}

/// Applies one object. In a dry run nothing is changed, and what is not there is not even asked about: its namespace may be missing.
pub(crate) async fn apply(
    cluster: &Cluster,
    manifest: &Manifest,
    dry_run: bool,
) -> Result<Done, ClusterError> {
    let api = cluster.api(manifest.kind, manifest.namespace.as_deref());
    let before = api.get_opt(&manifest.name).await.doing(|| format!("get {manifest}"))?;
    if dry_run && before.is_none() {
        return Ok(Done::of(manifest, Action::Created));
    }
    let mut params = PatchParams::apply(MANAGER).force().validation_strict();
    params.dry_run = dry_run;
    let after = api
        .patch(&manifest.name, &params, &Patch::Apply(&manifest.object))
        .await
        .doing(|| format!("apply {manifest}"))?;
    let action = match before {
        None => Action::Created,
        Some(before) if before.metadata.resource_version == after.metadata.resource_version => {
            Action::Unchanged
        }
        Some(_) => Action::Configured,
    };
    Ok(Done::of(manifest, action))
}

/// Applies the mesh's namespace. One that somebody else made is not marked as the installation's: it is not ours to delete, with all that is in it.
pub(crate) async fn apply_namespace(
    cluster: &Cluster,
    manifest: &Manifest,
    dry_run: bool,
) -> Result<Done, ClusterError> {
    let before = cluster.api(manifest.kind, None).get_opt(&manifest.name).await;
    let before = before.doing(|| format!("get {manifest}"))?;
    if before.is_none_or(|found| found.labels().contains_key(INSTALLED)) {
        return apply(cluster, manifest, dry_run).await;
    }
    let mut manifest = manifest.clone();
    if let Some(labels) = manifest.object["metadata"]["labels"].as_object_mut() {
        labels.remove(INSTALLED);
    }
    let note = Some(WAS_THERE.to_owned());
    Ok(Done { note, ..apply(cluster, &manifest, dry_run).await? })
}

/// Takes our labels off a namespace that is not ours. Whether there were any.
pub(crate) async fn release_namespace(
    cluster: &Cluster,
    namespace: &Namespace,
) -> Result<bool, ClusterError> {
    let managers = namespace.metadata.managed_fields.as_deref().unwrap_or_default();
    if !managers.iter().any(|fields| fields.manager.as_deref() == Some(MANAGER)) {
        return Ok(false);
    }
    let (kind, name) = (ObjectKind::of::<Namespace>(), namespace.name_any());
    // What we applied once and do not any more goes, unless somebody else wants it too.
    let nothing = json!({"apiVersion": "v1", "kind": kind.kind, "metadata": {"name": name}});
    let params = PatchParams::apply(MANAGER).force();
    let done = cluster.api(kind, None).patch(&name, &params, &Patch::Apply(&nothing)).await;
    done.doing(|| format!("take labels off namespace {name}"))?;
    Ok(true)
}

/// Whether a definition is the one that an installation made. Labels of ours survive that somebody applies the definition of the kind's own
/// project over it; so do the marks of that project.
pub(crate) fn is_ours(definition: &impl ResourceExt) -> bool {
    let labels = definition.labels();
    let is = |key: &str, value: &str| labels.get(key).is_some_and(|found| found == value);
    let of_others = definition.annotations().contains_key("gateway.networking.k8s.io/bundle-version")
        || is("app", "istio-pilot")
        || is("chart", "istio");
    labels.contains_key(INSTALLED) && is(objects::PART_OF.0, objects::PART_OF.1) && !of_others
}

/// Takes our labels off a definition that is not ours any more.
pub(crate) async fn release_definition(
    cluster: &Cluster,
    definition: &CustomResourceDefinition,
) -> Result<(), ClusterError> {
    let name = definition.name_any();
    let ours = objects::labels(objects::MESH);
    let labels: serde_json::Map<String, Value> = definition
        .labels()
        .iter()
        .filter(|(key, value)| *key == INSTALLED || ours.get(*key) == Some(*value))
        .map(|(key, _)| (key.clone(), Value::Null))
        .collect();
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    let api = cluster.api(ObjectKind::of::<CustomResourceDefinition>(), None);
    let done = api.patch(&name, &PatchParams::default(), &patch).await;
    done.map(drop).doing(|| format!("take labels off definition {name}"))
}

/// Applies a definition of a kind where there is none, or where it is ours. Another's is used as it is.
pub(crate) async fn apply_definition(
    cluster: &Cluster,
    manifest: &Manifest,
    dry_run: bool,
) -> Result<Done, ClusterError> {
    let api = cluster.api(manifest.kind, None);
    let before = api.get_opt(&manifest.name).await.doing(|| format!("get {manifest}"))?;
    if before.is_none_or(|found| is_ours(&found)) {
        return apply(cluster, manifest, dry_run).await;
    }
    let note = Some("not ours, used as it is".to_owned());
    Ok(Done { note, ..Done::of(manifest, Action::Kept) })
}

/// What is wrong with a definition in a cluster, if anything: API servers say so in conditions.
pub(crate) fn complaint(definition: &CustomResourceDefinition) -> Option<String> {
    let conditions =
        definition.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let said = |type_: &str| conditions.iter().find(|condition| condition.type_ == type_);
    let message = |condition: &k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinitionCondition| {
        condition.message.clone().unwrap_or_default()
    };
    for type_ in ["NonStructuralSchema", "Terminating"] {
        if let Some(condition) = said(type_).filter(|condition| condition.status == "True") {
            return Some(format!("{type_}: {}", message(condition)));
        }
    }
    for type_ in ["NamesAccepted", "Established"] {
        match said(type_) {
            Some(condition) if condition.status == "True" => {}
            Some(condition) => return Some(format!("not {type_}: {}", message(condition))),
            None => return Some(format!("not {type_} yet")),
        }
    }
    None
}

/// Waits until definitions are served.
pub(crate) async fn definitions_served(cluster: &Cluster, names: &[String]) -> Result<(), ClusterError> {
    const TRIES: u32 = 150;
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    for name in names {
        let mut left = TRIES;
        loop {
            let found = api.get(name).await.doing(|| format!("get CustomResourceDefinition {name}"))?;
            match complaint(&found) {
                None => break,
                Some(complaint) if left == 0 || complaint.starts_with("NonStructural") => {
                    return Err(ClusterError::Said(format!(
                        "CustomResourceDefinition {name} is {complaint}"
                    )));
                }
                Some(_) => left -= 1,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
    Ok(())
}

/// Deletes what an earlier revision made and this one does not.
pub(crate) async fn prune(
    cluster: &Cluster,
    kinds: &[ObjectKind],
    wanted: &[Manifest],
    dry_run: bool,
) -> Result<Vec<Done>, ClusterError> {
    let wanted: BTreeSet<(ObjectKind, Option<&str>, &str)> = wanted
        .iter()
        .map(|manifest| (manifest.kind, manifest.namespace.as_deref(), manifest.name.as_str()))
        .collect();
    let mut done = Vec::new();
    for kind in kinds {
        // Another mesh may live in another namespace; what is cluster-wide there is one of.
        let within = kind.namespaced.then_some(cluster.mesh.as_str());
        for object in cluster.list(*kind, within, &format!("{INSTALLED}=true")).await? {
            let (namespace, name) = (object.namespace(), object.name_any());
            if !wanted.contains(&(*kind, namespace.as_deref(), &name)) {
                if !dry_run {
                    delete(cluster, *kind, namespace.as_deref(), &name).await?;
                }
                done.push(Done::new(*kind, namespace.as_deref(), &name, Action::Deleted));
            }
        }
    }
    Ok(done)
}

/// Deletes an object; one that is gone already is no error.
pub(crate) async fn delete(
    cluster: &Cluster,
    kind: ObjectKind,
    namespace: Option<&str>,
    name: &str,
) -> Result<(), ClusterError> {
    match cluster.api(kind, namespace).delete(name, &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error).doing(|| format!("delete {} {name}", kind.kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(labels: Value, annotations: Value) -> CustomResourceDefinition {
        let mut made = mesh_control::crd::all().remove(0);
        made.metadata.labels = serde_json::from_value(labels).unwrap();
        made.metadata.annotations = serde_json::from_value(annotations).unwrap();
        made
    }

    #[test]
    fn a_definition_that_its_own_project_was_applied_over_is_not_ours_any_more() {
        let mut ours = json!(objects::labels(objects::MESH));
        assert!(is_ours(&definition(ours.clone(), json!({}))));
        // As an earlier version made it.
        ours["app.kubernetes.io/version"] = "0.0.1".into();
        assert!(is_ours(&definition(ours.clone(), json!({"api-approved.kubernetes.io": "unapproved"}))));
        let bundle = json!({"gateway.networking.k8s.io/bundle-version": "v1.4.0"});
        assert!(!is_ours(&definition(ours.clone(), bundle)));
        for (key, value) in
            [("app", "istio-pilot"), ("chart", "istio"), ("app.kubernetes.io/part-of", "istio")]
        {
            let mut labels = ours.clone();
            labels[key] = value.into();
            assert!(!is_ours(&definition(labels, json!({}))), "{key}");
        }
        assert!(!is_ours(&definition(json!({}), json!({}))));
    }
}
