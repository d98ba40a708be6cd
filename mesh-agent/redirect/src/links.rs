//! Owns how a program gets onto a hook: by updating the pinned link that is there, else by a new pinned link.
//!
//! Invariants:
//! - A live pinned link is never detached to be replaced: its program is swapped atomically.
//! - A link is only updated when its target and attach type are the wanted ones; the kernel would take any.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type;
use nix::libc;

use crate::sys::{self, LinkTarget};

/// A failed attachment.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused a new link.
    #[error("attach {program}")]
    Create {
        /// Program.
        program: String,
        /// Cause.
        source: io::Error,
    },
    /// The kernel refused to swap the program of a live link.
    #[error("update the link of {program}, pinned at {pin}")]
    Update {
        /// Program.
        program: String,
        /// Pin.
        pin: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The link could not be pinned, so it would not outlive the agent.
    #[error("pin the link of {program} at {pin}")]
    Pin {
        /// Program.
        program: String,
        /// Pin.
        pin: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

impl AttachError {
    /// Whether the kernel refused for want of permission: on a cgroup, an exclusive foreign program above it.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self, Self::Create { source, .. } if source.raw_os_error() == Some(libc::EPERM))
    }
}

/// Where and what to attach.
#[derive(Debug)]
pub(crate) struct Attachment<'a> {
    /// For messages.
    pub(crate) name: &'a str,
    pub(crate) program: BorrowedFd<'a>,
    /// Descriptor of the cgroup or namespace.
    pub(crate) target: BorrowedFd<'a>,
    /// The same target as the kernel reports it.
    pub(crate) identity: LinkTarget,
    pub(crate) attach_type: bpf_attach_type,
}

/// An attached program.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) link: OwnedFd,
    /// Taken over from an earlier agent.
    pub(crate) adopted: bool,
}

/// Attaches by the link at `pin`, by one an earlier version pinned elsewhere (which then moves to `pin`), or
/// by a new one.
pub(crate) fn attach(
    what: &Attachment<'_>,
    pin: &Path,
    earlier: &[PathBuf],
) -> Result<Attached, AttachError> {
    for candidate in std::iter::once(pin).chain(earlier.iter().map(PathBuf::as_path)) {
        if let Some(link) = adopt(what, candidate)? {
            if candidate != pin {
                fs::rename(candidate, pin).map_err(|source| pin_failed(what, pin, source))?;
            }
            return Ok(Attached { link, adopted: true });
        }
    }
    let link = sys::link_create(what.program, what.target, what.attach_type)
        .map_err(|source| AttachError::Create { program: what.name.to_owned(), source })?;
    sys::pin(link.as_fd(), pin).map_err(|source| pin_failed(what, pin, source))?;
    Ok(Attached { link, adopted: false })
}

fn pin_failed(what: &Attachment<'_>, pin: &Path, source: io::Error) -> AttachError {
    AttachError::Pin { program: what.name.to_owned(), pin: pin.to_owned(), source }
}

/// Swaps our program into a pinned link. `None`: no link there, or one of another or a dead target, which is
/// then removed.
fn adopt(what: &Attachment<'_>, pin: &Path) -> Result<Option<OwnedFd>, AttachError> {
    let Ok(link) = sys::open_pin(pin) else {
        return Ok(None);
    };
    if sys::link_info(link.as_fd()).ok().map(|info| info.kind) != Some(what.identity) {
        remove(pin);
        return Ok(None);
    }
    match sys::link_update(link.as_fd(), what.program) {
        Ok(()) => Ok(Some(link)),
        // The target died between the two calls.
        Err(source) if source.raw_os_error() == Some(libc::ENOLINK) => {
            remove(pin);
            Ok(None)
        }
        Err(source) => {
            Err(AttachError::Update { program: what.name.to_owned(), pin: pin.to_owned(), source })
        }
    }
}

/// Detaches the link at a pin, whoever else holds it, and removes the pin. Says whether there was one.
pub(crate) fn remove(pin: &Path) -> bool {
    if let Ok(link) = sys::open_pin(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        // A dead target refuses; removing the pin ends the link all the same.
        tracing::debug!(pin = %pin.display(), %error, "link not detached");
    }
    match fs::remove_file(pin) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(pin = %pin.display(), %error, "pin not removed");
            false
        }
    }
}

/// The target of the link at a pin; `None` when there is no link.
pub(crate) fn target(pin: &Path) -> Option<LinkTarget> {
    let link = sys::open_pin(pin).ok()?;
    sys::link_info(link.as_fd()).ok().map(|info| info.kind)
}
