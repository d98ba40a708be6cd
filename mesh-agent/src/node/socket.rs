//! Owns the files of the agent's unix sockets.
//!
//! Invariants:
//! - Only root may connect.
//! - A socket that somebody answers at is never taken from them; one that is left behind is replaced.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    time::{Instant, sleep},
};

/// Pause between two looks at a socket that is still answered.
const TRY_EACH: Duration = Duration::from_millis(50);

/// Why a socket is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum BindError {
    #[error("make the folder of the socket {path}")]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("replace the socket {path}")]
    Replace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another agent answers at the socket {path}")]
    Taken { path: PathBuf },
    #[error("{path} is not a socket")]
    NotASocket { path: PathBuf },
    #[error("listen at the socket {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The socket's file, removed on drop unless a successor has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Held so that the inode's number stays ours.
    inode: fs::File,
}

/// Listens, replacing what an earlier agent left. Waits up to `wait` for a draining predecessor to let go; whoever
/// answers after that is another node's agent, and keeps its socket.
pub(super) async fn bind(path: &Path, wait: Duration) -> Result<(UnixListener, SocketFile), BindError> {
    use std::os::unix::fs::FileTypeExt as _;
    let owned = || path.to_owned();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|source| BindError::Folder { path: owned(), source })?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindError::NotASocket { path: owned() }),
        Ok(_) if is_answered(path, wait).await => return Err(BindError::Taken { path: owned() }),
        Ok(_) => remove_if_there(path).map_err(|source| BindError::Replace { path: owned(), source })?,
        Err(_) => {}
    }
    let listen = |source| BindError::Listen { path: owned(), source };
    let listener = UnixListener::bind(path).map_err(listen)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(listen)?;
    let inode = fs::File::options()
        .read(true)
        .custom_flags(nix::libc::O_PATH | nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(listen)?;
    Ok((listener, SocketFile { path: owned(), inode }))
}

/// Whether somebody still listens there at the end of `wait`.
async fn is_answered(path: &Path, wait: Duration) -> bool {
    let give_up = Instant::now() + wait;
    while UnixStream::connect(path).await.is_ok() {
        if Instant::now() >= give_up {
            return true;
        }
        sleep(TRY_EACH).await;
    }
    false
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let here = fs::symlink_metadata(&self.path).map(|meta| meta.ino());
        let ours = self.inode.metadata().map(|meta| meta.ino());
        let unchanged = here.is_ok_and(|here| ours.is_ok_and(|ours| here == ours));
        if unchanged && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, socket = %self.path.display(), "remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_one_in_use_or_a_file_is_not() {
        let dir = std::env::temp_dir().join(format!("mesh-agent-socket-{}", std::process::id()));
        let path = dir.join("admin.sock");
        let bind = async |path| bind(path, Duration::ZERO).await;
        let (first, first_file) = bind(&path).await.unwrap();
        assert!(matches!(bind(&path).await, Err(BindError::Taken { .. })));
        drop(first);
        let (_second, _second_file) = bind(&path).await.unwrap();
        drop(first_file);
        assert!(path.exists(), "the successor's socket stays");
        fs::write(dir.join("file"), "x").unwrap();
        assert!(matches!(bind(&dir.join("file")).await, Err(BindError::NotASocket { .. })));
        fs::remove_dir_all(&dir).unwrap();
    }
}
