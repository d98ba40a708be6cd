//! Owns getting Debian's cloud kernels: found through the package sources this machine already has.
//!
//! apt works in a private state folder, so the machine's own package lists never change.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

use super::Kernel;
use crate::process::{capture, run};

/// Debian's keys: they sign all suites, also those this machine does not use.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FLAVOUR: &str = "-cloud-amd64";

/// An unpacked kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelFiles {
    /// As `uname -r` will say.
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// `modules.dep` stands in it, and module paths in that file are relative to it.
    pub(super) modules: PathBuf,
}

/// Suites that carry a kernel line; the first element of a pair asks for the security archive.
fn suites(kernel: Kernel) -> &'static [(Archive, &'static str)] {
    match kernel {
        Kernel::V6_1 => &[(Archive::Main, "bookworm"), (Archive::Security, "bookworm-security")],
        Kernel::V6_12 => &[(Archive::Main, "bookworm-backports")],
        Kernel::V7_2 => &[(Archive::Main, "trixie-backports")],
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Archive {
    Main,
    Security,
}

/// The kernel from the cache in `folder`, else downloaded into it. Once cached, no network is used.
pub(super) fn obtain(kernel: Kernel, folder: &Path) -> anyhow::Result<KernelFiles> {
    let unpacked = folder.join("kernel");
    if let Some(files) = find_unpacked(&unpacked) {
        return Ok(files);
    }
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let lock = fs::File::create(folder.join("lock")).context("create a lock")?;
    lock.lock().context("wait for another run that fetches this kernel")?;
    if let Some(files) = find_unpacked(&unpacked) {
        return Ok(files);
    }
    println!("fetching Debian's {kernel} cloud kernel");
    let download = folder.join("download");
    let fresh = folder.join("kernel.new");
    for stale in [&download, &fresh, &unpacked] {
        remove(stale)?;
    }
    fetch(kernel, &download).with_context(|| format!("fetch a {kernel} kernel from Debian"))?;
    for package in entries(&download)?.iter().filter(|path| path.extension().is_some_and(|e| e == "deb")) {
        run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&fresh))?;
    }
    let files = find_unpacked(&fresh).context("the packages hold no kernel with modules")?;
    // Packages carry modules without their dependency list; installing them would make it.
    let base = files.modules.ancestors().nth(3).context("invariant: below lib/modules")?;
    capture(Command::new("depmod").arg("--basedir").arg(base).arg(&files.version))?;
    // Last, so that an interrupted download is never taken for a kernel.
    fs::rename(&fresh, &unpacked).context("keep the unpacked kernel")?;
    remove(&download)?;
    find_unpacked(&unpacked).context("invariant: found before the rename")
}

fn remove(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    listed.map(|entry| Ok(entry?.path())).collect()
}

/// Older packages use `/boot` and `/lib`, newer ones keep everything in `/usr/lib/modules`.
fn find_unpacked(unpacked: &Path) -> Option<KernelFiles> {
    let roots = ["lib/modules", "usr/lib/modules"].map(|below| unpacked.join(below));
    let modules = roots.iter().find_map(|root| entries(root).ok()?.into_iter().find(|path| path.is_dir()))?;
    let version = modules.file_name()?.to_str()?.to_owned();
    let images = [unpacked.join("boot").join(format!("vmlinuz-{version}")), modules.join("vmlinuz")];
    let image = images.into_iter().find(|path| path.is_file())?;
    Some(KernelFiles { version, image, modules })
}

/// Downloads the packages of the newest kernel of the line into `folder`.
fn fetch(kernel: Kernel, folder: &Path) -> anyhow::Result<()> {
    let state = folder.join("apt");
    for below in ["lists/partial", "cache/archives/partial"] {
        let path = state.join(below);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    fs::write(state.join("status"), "").context("write an empty package state")?;
    fs::write(state.join("sources.list"), sources(kernel)?).context("write a sources list")?;
    run(apt("apt-get", &state).args(["-q", "update"]))?;
    let names = capture(apt("apt-cache", &state).arg("pkgnames"))?;
    let names = String::from_utf8_lossy(&names);
    let packages = packages(kernel, &names.lines().collect::<Vec<_>>())?;
    run(apt("apt-get", &state).args(["-q", "download"]).args(&packages).current_dir(folder))
}

/// apt with all state in one folder, and the machine's own settings (proxies, keys) otherwise.
fn apt(program: &str, state: &Path) -> Command {
    let mut apt = Command::new(program);
    let at = |option: &str, below: &str| format!("{option}={}", state.join(below).display());
    for setting in [
        at("Dir::Etc::SourceList", "sources.list"),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        at("Dir::State::Lists", "lists"),
        at("Dir::State::Status", "status"),
        at("Dir::Cache", "cache"),
        "APT::Architecture=amd64".to_owned(),
        "APT::Architectures::=amd64".to_owned(),
        "APT::Sandbox::User=root".to_owned(),
        "Acquire::Languages=none".to_owned(),
        // Descriptions for software centres, on machines that have one.
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        "Acquire::Retries=3".to_owned(),
    ] {
        apt.args(["-o", &setting]);
    }
    apt
}

/// A sources list for the kernel's suites at the mirrors this machine is set up with.
fn sources(kernel: Kernel) -> anyhow::Result<String> {
    let format = "$(REPO_URI) $(RELEASE)";
    let targets =
        capture(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]));
    let targets = targets.context("ask apt for this machine's package sources")?;
    let targets = String::from_utf8_lossy(&targets);
    let options = if Path::new(KEYRING).exists() {
        format!("arch=amd64 signed-by={KEYRING}")
    } else {
        "arch=amd64".into()
    };
    let mut list = String::new();
    for &(archive, suite) in suites(kernel) {
        match mirror(&targets, archive) {
            Some(uri) => list += &format!("deb [{options}] {uri} {suite} main\n"),
            // The main archive carries the same line, a little older.
            None if archive == Archive::Security => {}
            None => bail!("no Debian mirror among this machine's package sources (apt-get indextargets)"),
        }
    }
    Ok(list)
}

/// Picks a mirror from lines of `URI release`.
fn mirror(targets: &str, archive: Archive) -> Option<&str> {
    let lines = targets.lines().filter_map(|line| line.split_once(' '));
    let mut fitting = lines.filter(|(uri, release)| match archive {
        Archive::Security => release.ends_with("-security"),
        Archive::Main => !release.ends_with("-security") && uri.trim_end_matches('/').ends_with("/debian"),
    });
    fitting.next().map(|(uri, _)| uri)
}

/// The packages that make up the newest kernel of the line.
fn packages(kernel: Kernel, names: &[&str]) -> anyhow::Result<Vec<String>> {
    let prefix = format!("linux-image-{kernel}.");
    let versions = names.iter().filter_map(|name| {
        let release = name.strip_suffix("-unsigned").unwrap_or(name).strip_suffix(FLAVOUR)?;
        release.starts_with(&prefix).then(|| release.strip_prefix("linux-image-")).flatten()
    });
    let newest =
        versions.max_by_key(|version| numbers(version)).context("no kernel of that line in the archive")?;
    let exists = |name: &String| names.contains(&name.as_str());
    let image = format!("linux-image-{newest}{FLAVOUR}");
    let unsigned = format!("{image}-unsigned");
    let image = if exists(&image) { image } else { unsigned };
    // Newer releases ship the image and its modules as packages of their own.
    let parts = ["binary", "modules"].map(|part| format!("linux-{part}-{newest}{FLAVOUR}"));
    let packages: Vec<String> = std::iter::once(image).chain(parts).filter(exists).collect();
    ensure!(!packages.is_empty(), "invariant: the newest version was found by its package");
    Ok(packages)
}

fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_the_line_wins_by_number() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-41-cloud-amd64",
            "linux-image-6.1.0-41-cloud-amd64-dbg",
            "linux-image-6.12.1-cloud-amd64",
            "linux-image-6.1.0-42-amd64",
        ];
        assert_eq!(packages(Kernel::V6_1, &names).unwrap(), ["linux-image-6.1.0-41-cloud-amd64"]);
        assert!(packages(Kernel::V7_2, &names).is_err());
    }

    #[test]
    fn a_kernel_in_several_packages_is_taken_whole() {
        let names = [
            "linux-image-7.2.9+deb13-cloud-amd64",
            "linux-image-7.2.12+deb13-cloud-amd64",
            "linux-binary-7.2.12+deb13-cloud-amd64",
            "linux-modules-7.2.12+deb13-cloud-amd64",
            "linux-modules-7.2.9+deb13-cloud-amd64",
        ];
        let expected =
            ["image", "binary", "modules"].map(|part| format!("linux-{part}-7.2.12+deb13-cloud-amd64"));
        assert_eq!(packages(Kernel::V7_2, &names).unwrap(), expected);
    }

    #[test]
    fn an_unsigned_image_will_do() {
        let names = ["linux-image-6.12.95+deb12-cloud-amd64-unsigned"];
        assert_eq!(packages(Kernel::V6_12, &names).unwrap(), names);
    }

    #[test]
    fn mirrors_are_told_apart_by_suite() {
        let targets = "http://a/other/ stable\nhttp://b/debian/ bookworm\nhttp://c/debian-security/ bookworm-security\n";
        assert_eq!(mirror(targets, Archive::Main), Some("http://b/debian/"));
        assert_eq!(mirror(targets, Archive::Security), Some("http://c/debian-security/"));
        assert_eq!(mirror("http://a/other/ stable\n", Archive::Main), None);
    }
}
