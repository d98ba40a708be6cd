//! Owns what a dynamically linked program needs beside it in an image: its loader and libraries.
//!
//! Images of debug builds carry them, so that tests need no second, static build of everything.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::process;

/// The loader and libraries of `program`, where the program looks for them. None for a static one.
pub(crate) fn libraries_of(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("start ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && [said.as_ref(), complaint.as_ref()].iter().any(|text| is_static(text)) {
        return Ok(Vec::new());
    }
    ensure!(
        output.status.success(),
        "`{}`: {}",
        process::shown(Command::new("ldd").arg(program)),
        complaint.trim()
    );
    ensure!(!said.contains("not found"), "{} lacks libraries: {said}", program.display());
    Ok(parse(&said))
}

fn is_static(text: &str) -> bool {
    text.contains("not a dynamic executable")
}

/// Paths in lines such as `libc.so.6 => /lib/libc.so.6 (0x7f00)` and `/lib64/ld-linux.so.2 (0x7f00)`.
fn parse(said: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let line = line.rsplit("=> ").next()?.trim();
        let path = line.split(" (").next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    said.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_libraries_are_read_but_not_what_the_kernel_brings() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f4c)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f4d)\n\tstatically linked\n";
        assert_eq!(parse(said), ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
    }

    #[test]
    fn this_very_program_needs_a_loader() -> anyhow::Result<()> {
        let found = libraries_of(&std::env::current_exe()?)?;
        assert!(found.iter().any(|path| path.display().to_string().contains("ld-linux")), "{found:?}");
        Ok(())
    }
}
