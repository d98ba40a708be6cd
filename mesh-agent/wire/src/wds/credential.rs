//! Secrets that DestinationRules name, for the nodes whose pods they are for.

use std::sync::Arc;

use mesh_core::snapshot::{Credential, Material, Name};

use super::value::{self, Located, Problem, text_at};
use crate::proto::nodemesh;

/// The resource's name: one for each node and Secret.
pub(super) fn resource_name(credential: &Credential) -> String {
    let Credential { node, name, .. } = credential;
    format!("{node}/{}/{}", name.namespace, name.name)
}

pub(super) fn encode(credential: &Credential) -> nodemesh::Credential {
    let name = Some(value::name_value(&credential.name));
    let node = credential.node.to_string();
    let bytes = |part: &Option<Arc<[u8]>>| part.as_deref().map(<[u8]>::to_vec).unwrap_or_default();
    match &credential.content {
        Ok(material) => nodemesh::Credential {
            name,
            node,
            certificate: bytes(&material.certificate),
            key: bytes(&material.key),
            roots: bytes(&material.roots),
            problem: String::new(),
        },
        Err(problem) => {
            nodemesh::Credential { name, node, problem: problem.to_string(), ..Default::default() }
        }
    }
}

pub(super) fn decode(message: &nodemesh::Credential) -> Result<Credential, Located> {
    let Some(name) = &message.name else { return Err(Located::at("name", Problem::Missing)) };
    let name: Name = value::name(name).map_err(|problem| Located::at("name", problem))?;
    let node = text_at("node", &message.node)?;
    let part = |bytes: &[u8]| (!bytes.is_empty()).then(|| Arc::from(bytes));
    let content = match &*message.problem {
        "" => Ok(Material {
            certificate: part(&message.certificate),
            key: part(&message.key),
            roots: part(&message.roots),
        }),
        problem => Err(text_at("problem", problem)?),
    };
    Ok(Credential { node, name, content })
}
