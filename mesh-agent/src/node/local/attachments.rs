//! Owns the file with what the container runtime said, for the next agent.
//!
//! Invariant: written as a whole; one that cannot be read is as good as none, because a look at the node's processes finds
//! running pods too.

use std::{fs, io, path::Path};

use crate::cni::{install::replace, protocol::Attachment};

/// Name of the file in the state folder.
pub(in crate::node) const FILE: &str = "cni-attachments.json";

/// What an earlier agent left.
pub(super) fn load(file: &Path) -> Vec<Attachment> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "read the pods of an earlier agent");
            return Vec::new();
        }
    };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(file = %file.display(), %error, "the pods of an earlier agent cannot be read");
        Vec::new()
    })
}

/// Leaves it for the next agent. A failure costs that one a look at the node's processes.
pub(super) fn save<'a>(file: &Path, attachments: impl Iterator<Item = &'a Attachment>) {
    let all: Vec<&Attachment> = attachments.collect();
    let saved =
        serde_json::to_vec(&all).map_err(io::Error::from).and_then(|text| replace(file, &text, 0o600));
    if let Err(error) = saved {
        tracing::warn!(file = %file.display(), %error, "keep the node's pods for the next agent");
    }
}
