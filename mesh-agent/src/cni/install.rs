//! Owns putting the plugin into the node's CNI folders, keeping it there, and taking it away.
//!
//! Invariants:
//! - Every change is a rename: a runtime reads the old configuration or the new one.
//! - Only the first usable configuration is touched, because only that one is in force; an entry of ours in another one goes.
//! - The program is there before the configuration names it, and is removed after it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::{
    PLUGIN,
    conflist::{self, ChainError, Form},
    input::Settings,
    known,
};
use crate::cli::{CniCommand, CniPlaces, PodArgs};

pub use super::input::{Settings as PluginSettings, Unenrolled};

/// End of the name of a single plugin's file while the chain made of it is in force.
const SAVED: &str = ".nodemesh-saved";
/// Beginning of the names of files being written.
const UNFINISHED: &str = ".nodemesh-";

/// The plugin cannot be put in place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or folder.
    #[error("{doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With which.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The configuration in force cannot take the plugin.
    #[error("the CNI configuration {path} {source}")]
    Chain {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ChainError,
    },
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// The plugin is the last of the chain in this file.
    In(PathBuf),
    /// It was not, and has just been made so.
    Put(PathBuf),
    /// No network has been configured on this node yet.
    NoNetwork,
}

/// Keeps the plugin in place.
#[derive(Clone, Debug)]
pub struct Installer {
    /// Folder of plugins.
    pub bin_dir: PathBuf,
    /// Folder of configurations.
    pub conf_dir: PathBuf,
    /// The plugin's own part of the configuration.
    pub settings: Settings,
}

impl Installer {
    /// With these places, and the mesh's own namespace exempt.
    pub fn of(places: &CniPlaces) -> Self {
        Self {
            bin_dir: places.cni_bin_dir.clone(),
            conf_dir: places.cni_conf_dir.clone(),
            settings: Settings {
                socket: places.cni_socket.clone(),
                known: places.state_dir.join(known::FILE),
                unenrolled: places.cni_unenrolled,
                ..Settings::default()
            },
        }
    }

    /// As a node's agent has it, if it shall put the plugin in place.
    pub fn of_agent(pods: &PodArgs, state_dir: &Path) -> Option<Self> {
        Some(Self::of(&CniPlaces {
            cni_bin_dir: pods.cni_bin_dir.clone(),
            cni_conf_dir: pods.cni_conf_dir.clone()?,
            cni_socket: pods.cni_socket.clone()?,
            state_dir: state_dir.to_owned(),
            cni_unenrolled: pods.cni_unenrolled,
        }))
    }

    /// Copies this program to the plugin's place. Blocking.
    ///
    /// # Errors
    /// [`InstallError::Io`].
    pub fn copy_program(&self) -> Result<(), InstallError> {
        fs::create_dir_all(&self.bin_dir).map_err(io_error("make the folder", &self.bin_dir))?;
        let target = self.bin_dir.join(PLUGIN);
        let unfinished = self.bin_dir.join(format!("{UNFINISHED}{PLUGIN}"));
        let copied = (|| {
            let mut source = File::open("/proc/self/exe")?;
            // A leftover may be running, and then cannot be written.
            remove_if_there(&unfinished)?;
            let mut copy = File::options().write(true).create_new(true).mode(0o755).open(&unfinished)?;
            io::copy(&mut source, &mut copy)?;
            copy.sync_all()?;
            fs::rename(&unfinished, &target)
        })();
        copied.map_err(io_error("copy the plugin to", &target))
    }

    /// Puts the entry into the configuration in force, if it is not there. Blocking.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn ensure(&self) -> Result<Installed, InstallError> {
        if !self.bin_dir.join(PLUGIN).exists() {
            self.copy_program()?;
        }
        let files = self.files()?;
        let Some(first) = files.iter().position(|file| conflist::is_usable(&file.text, file.form)) else {
            return Ok(Installed::NoNetwork);
        };
        let chosen = &files[first];
        let entry = conflist::entry(&self.settings);
        let new = conflist::insert(&chosen.text, chosen.form, &entry)
            .map_err(|source| InstallError::Chain { path: chosen.path.clone(), source })?;
        let path = chosen.as_list();
        let changed = new.is_some();
        if let Some(new) = new {
            replace(&path, new.as_bytes(), 0o600).map_err(io_error("write", &path))?;
            if chosen.form == Form::Single {
                let saved = suffixed(&chosen.path, SAVED);
                fs::rename(&chosen.path, &saved).map_err(io_error("put aside", &chosen.path))?;
            }
            tracing::info!(file = %path.display(), "CNI plugin put into the chain");
        }
        for other in files[first + 1..].iter().filter(|file| file.path != path) {
            remove_from(other)?;
        }
        Ok(if changed { Installed::Put(path) } else { Installed::In(path) })
    }

    /// Takes the plugin away: from every configuration, then the program. Blocking.
    ///
    /// # Errors
    /// [`InstallError`]; what could be removed is.
    pub fn remove(&self) -> Result<bool, InstallError> {
        let mut found = false;
        let mut failed = None;
        for file in self.files()? {
            match restore(&file).and_then(|restored| if restored { Ok(true) } else { remove_from(&file) }) {
                Ok(changed) => found |= changed,
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            // A chain that names a program that is not there would stop every pod.
            return Err(error);
        }
        let program = self.bin_dir.join(PLUGIN);
        found |= remove_if_there(&program).map_err(io_error("remove", &program))?;
        Ok(found)
    }

    /// [`Installer::remove`], and what the agent left for the plugin: afterwards nothing says that any pod was meshed. Blocking.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn uninstall(&self) -> Result<bool, InstallError> {
        let found = self.remove()?;
        let known = &self.settings.known;
        Ok(remove_if_there(known).map_err(io_error("remove", known))? | found)
    }

    /// The configurations in the order a runtime looks at them.
    fn files(&self) -> Result<Vec<ConfFile>, InstallError> {
        let entries = match fs::read_dir(&self.conf_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(io_error("read the folder", &self.conf_dir)(source)),
        };
        let mut files: Vec<ConfFile> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let form = Form::of(&name)?;
                // One that is gone again, or cannot be read, is none for the runtime either.
                let text = fs::read_to_string(entry.path()).ok()?;
                Some(ConfFile { path: entry.path(), form, text })
            })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }
}

/// Carries out `cni install` and `cni uninstall`.
///
/// # Errors
/// The plugin could not be put in place or taken away.
pub fn run(command: &CniCommand) -> anyhow::Result<()> {
    let (places, install) = match command {
        CniCommand::Install(places) => (places, true),
        CniCommand::Uninstall(places) => (places, false),
    };
    let installer = Installer::of(places);
    if install {
        installer.copy_program()?;
        match installer.ensure()? {
            Installed::In(path) | Installed::Put(path) => println!("installed in {}", path.display()),
            Installed::NoNetwork => {
                anyhow::bail!("no CNI configuration in {}", places.cni_conf_dir.display())
            }
        }
        return Ok(());
    }
    println!("{}", if installer.uninstall()? { "uninstalled" } else { "nothing to uninstall" });
    Ok(())
}

/// A configuration as it was found.
#[derive(Debug)]
struct ConfFile {
    path: PathBuf,
    form: Form,
    text: String,
}

impl ConfFile {
    /// Where the chain is.
    fn as_list(&self) -> PathBuf {
        match self.form {
            Form::List => self.path.clone(),
            Form::Single => self.path.with_extension("conflist"),
        }
    }
}

/// Takes the entry out of a chain.
fn remove_from(file: &ConfFile) -> Result<bool, InstallError> {
    if file.form == Form::Single || !conflist::has_ours(&file.text, file.form) {
        return Ok(false);
    }
    let without = conflist::remove(&file.text)
        .map_err(|source| InstallError::Chain { path: file.path.clone(), source })?;
    let Some(without) = without else { return Ok(false) };
    replace(&file.path, without.as_bytes(), 0o600).map_err(io_error("write", &file.path))?;
    Ok(true)
}

/// Puts a single plugin's file back that was made a chain of.
fn restore(chain: &ConfFile) -> Result<bool, InstallError> {
    if chain.form != Form::List {
        return Ok(false);
    }
    for extension in ["conf", "json"] {
        let single = chain.path.with_extension(extension);
        let saved = suffixed(&single, SAVED);
        if !saved.exists() {
            continue;
        }
        // Somebody has written it anew meanwhile.
        let back = match single.exists() {
            true => fs::remove_file(&saved),
            false => fs::rename(&saved, &single),
        };
        back.map_err(io_error("put back", &single))?;
        fs::remove_file(&chain.path).map_err(io_error("remove", &chain.path))?;
        return Ok(true);
    }
    Ok(false)
}

/// Writes a file in one step.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!("{UNFINISHED}{name}"));
    let mut file = File::options().write(true).create(true).truncate(true).mode(mode).open(&unfinished)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Whether there was one.
fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn io_error<'a>(doing: &'static str, path: &'a Path) -> impl Fn(io::Error) -> InstallError + 'a {
    move |source| InstallError::Io { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
