//! Owns writing container images without a container engine: an OCI image layout in one tar archive.
//!
//! Invariant: the same files and settings give the same bytes, wherever and whenever they are written. Entries are sorted,
//! belong to root and carry one fixed time; nothing of the machine gets in.
//!
//! `ctr images import`, `docker load`, `podman load` and `skopeo copy oci-archive:` all read the result.

mod layer;
mod libraries;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub(crate) use libraries::libraries_of;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image with one layer and nothing below it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    /// What it is called once loaded, such as `localhost/nodemesh:dev`.
    pub(crate) name: String,
    /// What is in it, by absolute path without the leading slash. Parent folders come by themselves.
    pub(crate) files: BTreeMap<String, Content>,
    /// What runs if nothing else is asked for.
    pub(crate) entrypoint: Vec<String>,
    /// `UID[:GID]`; root if empty.
    pub(crate) user: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Seconds since 1970: the time of every file and of the image.
    pub(crate) time: u64,
}

/// What a path of an image holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// A copy of an executable of this machine.
    Program(PathBuf),
    /// Text that everybody may read.
    Text(String),
    /// A folder that everybody may write to.
    Scratch,
}

impl Image {
    /// Adds an executable.
    pub(crate) fn program(&mut self, at: &str, from: &Path) {
        self.files.insert(at.to_owned(), Content::Program(from.to_path_buf()));
    }

    /// Writes the archive and returns the manifest's digest, by which registries know the image.
    pub(crate) fn write(&self, to: &Path) -> anyhow::Result<String> {
        let folder = to.parent().context("invariant: an archive is in a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        // Beside the result, and under its name only when whole.
        let beside = |end: &str| to.with_extension(format!("{}.{end}", std::process::id()));
        let (layer_path, fresh) = (beside("layer"), beside("new"));
        let written = self.write_parts(&layer_path, &fresh);
        let removed = fs::remove_file(&layer_path);
        let digest = written?;
        removed.with_context(|| format!("remove {}", layer_path.display()))?;
        fs::rename(&fresh, to).with_context(|| format!("keep {}", to.display()))?;
        Ok(digest)
    }

    fn write_parts(&self, layer_path: &Path, fresh: &Path) -> anyhow::Result<String> {
        let layer = layer::write(&self.files, self.time, layer_path)?;
        let config = blob(&self.config(&layer.digest)?);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": CONFIG, "digest": config.name(), "size": config.bytes.len() },
            "layers": [{ "mediaType": LAYER, "digest": layer.digest, "size": layer.size }],
        });
        let manifest = blob(&manifest);
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": MANIFEST,
                "digest": manifest.name(),
                "size": manifest.bytes.len(),
                "annotations": {
                    // The first is read by containerd, the second by the others.
                    "io.containerd.image.name": self.name,
                    "org.opencontainers.image.ref.name": self.name,
                },
                "platform": { "architecture": architecture(), "os": "linux" },
            }],
        });
        let file = File::create(fresh).with_context(|| format!("create {}", fresh.display()))?;
        let mut archive = tar::Builder::new(io::BufWriter::new(file));
        layer::folder(&mut archive, "blobs", 0o755, 0)?;
        layer::folder(&mut archive, "blobs/sha256", 0o755, 0)?;
        let mut blobs =
            BTreeMap::from([(config.hash.clone(), &config.bytes), (manifest.hash.clone(), &manifest.bytes)]);
        let layer_hash = layer.digest.trim_start_matches("sha256:").to_owned();
        let empty = Vec::new();
        blobs.insert(layer_hash.clone(), &empty);
        for (hash, bytes) in blobs {
            let path = format!("blobs/sha256/{hash}");
            if hash == layer_hash {
                layer::copy(&mut archive, &path, layer_path, 0o644, 0)?;
            } else {
                layer::text(&mut archive, &path, bytes, 0)?;
            }
        }
        layer::text(&mut archive, "index.json", index.to_string().as_bytes(), 0)?;
        layer::text(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0)?;
        let mut file = archive.into_inner().context("end the archive")?;
        file.flush().context("write the archive")?;
        Ok(manifest.name())
    }

    fn config(&self, diff_id: &str) -> anyhow::Result<Value> {
        let mut settings = json!({
            "Env": ["PATH=/"],
            "Labels": self.labels,
            "WorkingDir": "/",
        });
        if !self.entrypoint.is_empty() {
            settings["Entrypoint"] = json!(self.entrypoint);
        }
        if !self.user.is_empty() {
            settings["User"] = json!(self.user);
        }
        Ok(json!({
            "architecture": architecture(),
            "os": "linux",
            "created": rfc3339(self.time),
            "config": settings,
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "created": rfc3339(self.time), "created_by": "cargo xtask dist" }],
        }))
    }
}

/// As image formats call the machine we run on.
fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// Small content of a layout, under its hash.
struct Blob {
    hash: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn name(&self) -> String {
        format!("sha256:{}", self.hash)
    }
}

fn blob(value: &Value) -> Blob {
    let bytes = value.to_string().into_bytes();
    Blob { hash: hex(&Sha256::digest(&bytes)), bytes }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A time in seconds since 1970 as images write it, by the civil calendar.
fn rfc3339(time: u64) -> String {
    let (days, seconds) = (time / 86_400, time % 86_400);
    // Years begin in March here, so that a leap day is the last of its year; 719468 days lie before 1970.
    let since = days + 719_468;
    let era = since / 146_097;
    let day_of_era = since % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(folder: &Path) -> Image {
        let program = folder.join("program");
        fs::write(&program, b"\x7fELF and so on").unwrap();
        let mut image = Image { name: "localhost/x:test".into(), time: 1_700_000_000, ..Image::default() };
        image.program("bin/program", &program);
        image.files.insert("etc/words".into(), Content::Text("words\n".into()));
        image.files.insert("tmp".into(), Content::Scratch);
        image.entrypoint = vec!["/bin/program".into()];
        image.labels.insert("org.opencontainers.image.title".into(), "x".into());
        image
    }

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("nodemesh-image-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn the_same_files_give_the_same_bytes_whatever_their_times() {
        let folder = scratch("same");
        let image = image(&folder);
        let one = image.write(&folder.join("one.tar")).unwrap();
        let file = File::options().write(true).open(folder.join("program")).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let other = image.write(&folder.join("other.tar")).unwrap();
        assert_eq!(one, other);
        assert_eq!(fs::read(folder.join("one.tar")).unwrap(), fs::read(folder.join("other.tar")).unwrap());

        let mut changed = image.clone();
        changed.files.insert("etc/words".into(), Content::Text("other words\n".into()));
        assert_ne!(changed.write(&folder.join("changed.tar")).unwrap(), one);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn every_blob_is_called_by_its_hash_and_the_manifest_leads_to_all_of_them() {
        let folder = scratch("blobs");
        let digest = image(&folder).write(&folder.join("image.tar")).unwrap();
        let mut found = BTreeMap::new();
        let mut archive = tar::Archive::new(File::open(folder.join("image.tar")).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            if let Some(hash) = path.strip_prefix("blobs/sha256/").filter(|hash| !hash.is_empty()) {
                assert_eq!(hash, hex(&Sha256::digest(&bytes)));
            }
            found.insert(path, bytes);
        }
        let json = |digest: &str| -> Value {
            let path = format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
            serde_json::from_slice(&found[&path]).unwrap()
        };
        let index: Value = serde_json::from_slice(&found["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], digest);
        let manifest = json(&digest);
        let config = json(manifest["config"]["digest"].as_str().unwrap());
        assert_eq!(config["config"]["Entrypoint"][0], "/bin/program");
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = manifest["layers"][0]["digest"].as_str().unwrap();
        let layer = &found[&format!("blobs/sha256/{}", layer.trim_start_matches("sha256:"))];
        let mut layer = tar::Archive::new(&layer[..]);
        let entries: Vec<(String, u32)> = layer
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap())
            })
            .collect();
        let expected = [
            ("bin/", 0o755),
            ("bin/program", 0o755),
            ("etc/", 0o755),
            ("etc/words", 0o644),
            ("tmp/", 0o1777),
        ];
        assert_eq!(entries, expected.map(|(path, mode)| (path.to_owned(), mode)));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_709_164_799), "2024-02-28T23:59:59Z");
        assert_eq!(rfc3339(1_709_164_800), "2024-02-29T00:00:00Z");
        assert_eq!(rfc3339(4_102_444_799), "2099-12-31T23:59:59Z");
    }
}
