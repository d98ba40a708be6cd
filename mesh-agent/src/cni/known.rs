//! Owns what is left for the plugin when the agent is away: which pods were meshed as it last knew.
//!
//! Invariants:
//! - The file is replaced as a whole, so half of it is never read.
//! - No folder means no mesh: it was removed for good, and pods start. A folder without the file says nothing about any pod,
//!   and a pod of which nothing is known is outside the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::protocol::PodRef;

/// Name of the file in the agent's state folder.
pub const FILE: &str = "cni-pods.json";

/// What the agent last knew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KnownPods {
    /// Namespaces whose pods are meshed unless they say otherwise.
    pub meshed_namespaces: BTreeSet<String>,
    /// Pods of this node that differ from their namespace, as `namespace/name`, with whether they are meshed.
    pub pods: BTreeMap<String, bool>,
}

/// Nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// There is no agent on this node any more.
    #[error("the agent's state folder is gone")]
    Gone,
    /// The file is damaged.
    #[error("read {path}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

impl KnownPods {
    /// Reads what an agent left.
    ///
    /// # Errors
    /// [`LookError`].
    pub fn read(path: &Path) -> Result<Self, LookError> {
        match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| LookError::Unreadable { path: path.to_owned(), source: error.into() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
                Some(folder) if folder.is_dir() => Ok(Self::default()),
                _ => Err(LookError::Gone),
            },
            Err(source) => Err(LookError::Unreadable { path: path.to_owned(), source }),
        }
    }

    /// Leaves it for the plugin, in one step.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        super::install::replace(path, &serde_json::to_vec(self)?, 0o600)
    }

    /// Whether a pod was meshed, or would be by its namespace.
    pub fn is_meshed(&self, pod: &PodRef) -> bool {
        let named = self.pods.get(&pod.to_string()).copied();
        named.unwrap_or_else(|| self.meshed_namespaces.contains(&pod.namespace))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str) -> PodRef {
        PodRef { namespace: namespace.into(), name: name.into(), uid: String::new() }
    }

    #[test]
    fn a_pods_own_word_wins_over_its_namespace() {
        let known = KnownPods {
            meshed_namespaces: BTreeSet::from(["shop".into()]),
            pods: BTreeMap::from([("shop/out".into(), false), ("plain/in".into(), true)]),
        };
        for (namespace, name, meshed) in [
            ("shop", "web", true),
            ("shop", "out", false),
            ("plain", "in", true),
            ("plain", "web", false),
            ("unheard", "of", false),
        ] {
            assert_eq!(known.is_meshed(&pod(namespace, name)), meshed, "{namespace}/{name}");
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_written_and_no_folder_means_no_mesh() {
        let folder = std::env::temp_dir().join(format!("nodemesh-known-{}", std::process::id()));
        let path = folder.join(FILE);
        assert!(matches!(KnownPods::read(&path), Err(LookError::Gone)));
        fs::create_dir_all(&folder).unwrap();
        assert_eq!(KnownPods::read(&path).unwrap(), KnownPods::default());
        let known = KnownPods { meshed_namespaces: BTreeSet::from(["shop".into()]), ..KnownPods::default() };
        known.write(&path).unwrap();
        assert_eq!(KnownPods::read(&path).unwrap(), known);
        fs::write(&path, "{").unwrap();
        assert!(matches!(KnownPods::read(&path), Err(LookError::Unreadable { .. })));
        fs::remove_dir_all(folder).unwrap();
    }
}
