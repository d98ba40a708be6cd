//! Owns the images of test clusters: what every node has, test applications, and the mesh itself in its debug build.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{
    image::{Content, Image, libraries_of},
    workspace::Workspace,
};

/// By which tests find the archives.
pub(crate) const VARIABLE: &str = "MESH_CLUSTER_IMAGES";

/// Where the archives are.
pub(crate) fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("images")
}

/// Writes them all and returns their folder.
pub(crate) fn write(
    workspace: &Workspace,
    kubernetes: &Path,
    programs: &BTreeMap<String, PathBuf>,
) -> anyhow::Result<PathBuf> {
    let folder = folder(workspace);
    let ours = |name: &str| programs.get(name).with_context(|| format!("{name} was not built"));
    let apps = [("pod-tool", ours("pod-tool")?.clone()), ("bookinfo", ours("bookinfo")?.clone())];
    let mesh = [("mesh-agent", ours("mesh-agent")?.clone()), ("meshctl", ours("meshctl")?.clone())];
    let images = [
        ("pause", of_programs("localhost/pause:test", &[("pause", kubernetes.join("pause"))])?),
        ("coredns", of_programs("localhost/coredns:test", &[("coredns", kubernetes.join("coredns"))])?),
        ("apps", of_programs("localhost/apps:test", &apps)?),
        ("nodemesh", of_programs("localhost/nodemesh:dev", &mesh)?),
    ];
    for (name, image) in images {
        image.write(&folder.join(format!("{name}.tar"))).with_context(|| format!("write image {name}"))?;
    }
    Ok(folder)
}

/// An image with these programs in its root, what they need to run, and the first of them as its entry point.
pub(crate) fn of_programs(name: &str, programs: &[(&str, PathBuf)]) -> anyhow::Result<Image> {
    let mut image = Image { name: name.to_owned(), ..Image::default() };
    for (program, path) in programs {
        image.program(program, path);
        for library in libraries_of(path)? {
            image.program(library.to_string_lossy().trim_start_matches('/'), &library);
        }
    }
    image.entrypoint = programs.first().map(|(program, _)| format!("/{program}")).into_iter().collect();
    // The C library asks files first, as it does everywhere.
    image.files.insert("etc/nsswitch.conf".to_owned(), Content::Text("hosts: files dns\n".to_owned()));
    image.files.insert("tmp".to_owned(), Content::Scratch);
    Ok(image)
}
