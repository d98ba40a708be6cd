//! Owns the definitions (CRDs) of the kinds that the mesh reads, for clusters that have none.
//!
//! Invariants:
//! - Schemas are structural and name every field the readers in [`crate::resource`] know, so that an API server prunes nothing they ask
//!   for; what fields mean is checked by those readers and the admission webhook, not here.
//! - Served versions are those that users write; all have one schema, so no conversion is needed.
//!
//! Not here: whether a cluster has a definition already. One that is there is used as it is.

mod gateway_api;
mod istio_networking;
mod istio_security;
mod schema;

use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionNames,
        CustomResourceDefinitionSpec, CustomResourceDefinitionVersion, CustomResourceSubresourceStatus,
        CustomResourceSubresources, CustomResourceValidation,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use schema::{Schema, object, text};

/// What API servers want said about definitions in the groups of Kubernetes itself.
const APPROVAL: &str = "api-approved.kubernetes.io";

/// A column of `kubectl get`.
struct Column {
    name: &'static str,
    path: &'static str,
    kind: &'static str,
}

const AGE: Column = Column { name: "Age", path: ".metadata.creationTimestamp", kind: "date" };

/// One definition, before it is written out.
struct Definition {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    /// Served versions; the first is the one stored.
    versions: &'static [&'static str],
    cluster_wide: bool,
    spec: Schema,
    /// `None` for a kind without status.
    status: Option<Schema>,
    columns: Vec<Column>,
}

/// All definitions, by group and kind.
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut all: Vec<Definition> = Vec::new();
    all.extend(gateway_api::definitions());
    all.extend(istio_networking::definitions());
    all.extend(istio_security::definitions());
    all.into_iter().map(Definition::finish).collect()
}

impl Definition {
    fn finish(self) -> CustomResourceDefinition {
        let mut fields = vec![
            ("apiVersion", text()),
            ("kind", text()),
            ("metadata", object([]).any_more(false)),
            ("spec", self.spec),
        ];
        let subresources = self.status.as_ref().map(|_| CustomResourceSubresources {
            status: Some(CustomResourceSubresourceStatus(serde_json::json!({}))),
            ..Default::default()
        });
        fields.extend(self.status.map(|status| ("status", status)));
        let schema = object(fields).finish();
        let columns: Vec<CustomResourceColumnDefinition> = self
            .columns
            .iter()
            .chain([&AGE])
            .map(|column| CustomResourceColumnDefinition {
                name: column.name.to_owned(),
                json_path: column.path.to_owned(),
                type_: column.kind.to_owned(),
                ..Default::default()
            })
            .collect();
        let version = |(at, name): (usize, &&str)| CustomResourceDefinitionVersion {
            name: (*name).to_owned(),
            served: true,
            storage: at == 0,
            schema: Some(CustomResourceValidation { open_api_v3_schema: Some(schema.clone()) }),
            subresources: subresources.clone(),
            additional_printer_columns: Some(columns.clone()),
            ..Default::default()
        };
        let annotations = (self.group == crate::resource::GATEWAY_GROUP).then(|| {
            let unapproved = "unapproved, the fields of the Gateway API that Nodemesh knows";
            [(APPROVAL.to_owned(), unapproved.to_owned())].into()
        });
        let category = if self.group == crate::resource::GATEWAY_GROUP { "gateway-api" } else { "istio-io" };
        CustomResourceDefinition {
            metadata: ObjectMeta {
                name: Some(format!("{}.{}", self.plural, self.group)),
                annotations,
                ..Default::default()
            },
            spec: CustomResourceDefinitionSpec {
                group: self.group.to_owned(),
                names: CustomResourceDefinitionNames {
                    kind: self.kind.to_owned(),
                    list_kind: Some(format!("{}List", self.kind)),
                    plural: self.plural.to_owned(),
                    singular: Some(self.kind.to_ascii_lowercase()),
                    short_names: (!self.short.is_empty())
                        .then(|| self.short.iter().map(ToString::to_string).collect()),
                    categories: Some(vec![category.to_owned()]),
                },
                scope: if self.cluster_wide { "Cluster" } else { "Namespaced" }.to_owned(),
                versions: self.versions.iter().enumerate().map(version).collect(),
                ..Default::default()
            },
            status: None,
        }
    }
}

#[cfg(test)]
mod readers;
#[cfg(test)]
mod tests;
