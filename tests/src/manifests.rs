//! The directory of manifests that agents watch, and builders for what tests put there.

mod policies;
mod resources;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::yaml;

pub use policies::{AuthorizationPolicyManifest, PolicyAction, Rule, mesh_config};
pub use resources::{
    EndpointSliceManifest, MtlsMode, NamespaceManifest, PeerAuthenticationManifest, PodManifest,
    ServiceAccountManifest, ServiceManifest,
};

/// A manifest could not be written or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} manifest {path}")]
pub struct ManifestError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A directory of manifests. Every change is one rename, so a watcher never reads half a file.
#[derive(Debug, Clone)]
pub struct Manifests {
    directory: PathBuf,
}

impl Manifests {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The directory: an agent's `--config`.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Add or replace one resource; its file is `NAMESPACE/KIND-NAME.yaml`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply(&self, resource: impl Into<Value>) -> Result<(), ManifestError> {
        let resource = resource.into();
        let text = |pointer: &str| resource.pointer(pointer).and_then(Value::as_str).unwrap_or("");
        let file = file_of(text("/kind"), text("/metadata/namespace"), text("/metadata/name"));
        self.write(&file, &yaml::document(&resource))
    }

    /// Write many resources as the documents of one file, in one step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply_all(&self, file: &str, resources: &[Value]) -> Result<(), ManifestError> {
        let documents: Vec<String> = resources.iter().map(yaml::document).collect();
        self.write(Path::new(file), &documents.join("---\n"))
    }

    /// Write a file as it is, such as a broken one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply_text(&self, file: &str, text: &str) -> Result<(), ManifestError> {
        self.write(Path::new(file), text)
    }

    /// Remove a resource that [`Manifests::apply`] wrote; `namespace` is empty for a Namespace.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<(), ManifestError> {
        self.delete_file(file_of(kind, namespace, name))
    }

    /// Remove a file.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete_file(&self, file: impl AsRef<Path>) -> Result<(), ManifestError> {
        let path = self.directory.join(file);
        fs::remove_file(&path).map_err(|source| ManifestError { doing: "remove", path, source })
    }

    fn write(&self, file: &Path, text: &str) -> Result<(), ManifestError> {
        let path = self.directory.join(file);
        let written = (|| {
            let parent = path.parent().unwrap_or(&self.directory);
            fs::create_dir_all(parent)?;
            // Not `*.yaml`, so no reader takes it for a manifest before the rename.
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let unfinished = parent.join(format!(".{name}.new"));
            fs::write(&unfinished, text)?;
            fs::rename(&unfinished, &path)
        })();
        written.map_err(|source| ManifestError { doing: "write", path, source })
    }
}

fn file_of(kind: &str, namespace: &str, name: &str) -> PathBuf {
    let directory = if namespace.is_empty() { "cluster" } else { namespace };
    Path::new(directory).join(format!("{}-{name}.yaml", kind.to_lowercase()))
}
