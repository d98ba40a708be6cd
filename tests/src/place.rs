//! A place to run processes in: a network namespace plus a cgroup (a pod, a node's host, an outsider).

use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::cgroup::Cgroup;
use crate::netns::{NetNs, NetNsError};
use crate::tool::{PodTool, ToolError};

/// A network namespace and a cgroup under one name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Place {
    inner: Arc<PlaceInner>,
}

#[derive(Debug)]
struct PlaceInner {
    name: String,
    netns: Arc<NetNs>,
    cgroup: Cgroup,
    ip4: Ipv4Addr,
    ip6: Ipv6Addr,
    log: PathBuf,
    resolv_conf: Option<PathBuf>,
    tool: Mutex<Option<PodTool>>,
}

/// What a place is made of.
#[derive(Debug)]
pub(crate) struct PlaceParts {
    pub(crate) name: String,
    pub(crate) netns: Arc<NetNs>,
    pub(crate) cgroup: Cgroup,
    pub(crate) ip4: Ipv4Addr,
    pub(crate) ip6: Ipv6Addr,
    /// Where the standard error of its processes goes.
    pub(crate) log: PathBuf,
    /// What its processes see as `/etc/resolv.conf`.
    pub(crate) resolv_conf: Option<PathBuf>,
}

/// A process could not be started in a place.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {program} in {place}")]
pub struct StartError {
    program: String,
    place: String,
    source: io::Error,
}

impl Place {
    pub(crate) fn new(parts: PlaceParts) -> Self {
        let PlaceParts { name, netns, cgroup, ip4, ip6, log, resolv_conf } = parts;
        let tool = Mutex::new(None);
        Self { inner: Arc::new(PlaceInner { name, netns, cgroup, ip4, ip6, log, resolv_conf, tool }) }
    }

    /// Its short name in the test.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn ip4(&self) -> Ipv4Addr {
        self.inner.ip4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn ip6(&self) -> Ipv6Addr {
        self.inner.ip6
    }

    /// Its IPv4 address with a port.
    #[must_use]
    pub fn at4(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.inner.ip4), port)
    }

    /// Its IPv6 address with a port.
    #[must_use]
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.inner.ip6), port)
    }

    /// Its IPv4 address as an IPv4-mapped IPv6 one, with a port.
    #[must_use]
    pub fn at_mapped(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.inner.ip4.to_ipv6_mapped()), port)
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &NetNs {
        &self.inner.netns
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.inner.cgroup
    }

    /// Run `work` inside the network namespace on a fresh thread; see [`NetNs::run`] for what it is not.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        self.inner.netns.run(work)
    }

    /// Write a value under `/proc/sys/net` of this place.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sysctl(&self, setting: &str, value: &str) -> Result<(), NetNsError> {
        self.inner.netns.sysctl(setting, value)
    }

    /// Start a program here: in the cgroup and network namespace from its first instruction on.
    ///
    /// Standard error goes to the place's log unless the command says otherwise before.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child, StartError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.enter_on_start(&mut command).and_then(|()| command.spawn()).map_err(|source| StartError {
            program,
            place: self.inner.name.clone(),
            source,
        })
    }

    /// The same namespaces with another cgroup.
    pub(crate) fn in_group(&self, cgroup: Cgroup) -> Self {
        let PlaceInner { name, netns, ip4, ip6, log, resolv_conf, cgroup: _, tool: _ } = &*self.inner;
        Self::new(PlaceParts {
            name: name.clone(),
            netns: Arc::clone(netns),
            cgroup,
            ip4: *ip4,
            ip6: *ip6,
            log: log.clone(),
            resolv_conf: resolv_conf.clone(),
        })
    }

    /// A file at the end of which the place's processes write their standard error.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn log_file(&self) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).open(&self.inner.log)
    }

    /// The shared `pod-tool` of this place, started at first use.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn tool(&self) -> Result<PodTool, ToolError> {
        let mut tool = self.inner.tool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tool) = tool.as_ref().filter(|tool| tool.is_alive()) {
            return Ok(tool.clone());
        }
        let started = self.new_tool()?;
        *tool = Some(started.clone());
        Ok(started)
    }

    /// One more `pod-tool` process: a second application of the pod.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new_tool(&self) -> Result<PodTool, ToolError> {
        PodTool::start(self)
    }

    /// Kill every process here; the shared tool starts anew at its next use.
    ///
    /// # Errors
    /// When processes survive.
    pub fn kill_all(&self) -> Result<(), crate::cgroup::CgroupError> {
        self.inner.cgroup.kill()
    }

    /// The sockets of the namespace, as `ss` lists them, for artefacts and messages.
    #[must_use]
    pub fn sockets(&self) -> String {
        let listing = self.run(|| {
            let output = Command::new("ss").args(["-H", "-tuanpe"]).stderr(Stdio::null()).output();
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).or_else(|_| {
                ["tcp", "tcp6", "udp", "udp6"]
                    .iter()
                    .map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
                    .collect::<io::Result<String>>()
            })
        });
        match listing {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => format!("no socket listing: {error}\n"),
            Err(error) => format!("no socket listing: {error}\n"),
        }
    }

    fn enter_on_start(&self, command: &mut Command) -> io::Result<()> {
        let procs = OpenOptions::new().write(true).open(self.inner.cgroup.path().join("cgroup.procs"))?;
        let netns = self.inner.netns.as_fd().try_clone_to_owned()?;
        let resolv_conf = self.inner.resolv_conf.as_deref().map(c_path).transpose()?;
        let enter = move || {
            (&procs).write_all(b"0")?;
            enter_namespaces(netns.as_fd(), resolv_conf.as_ref())
        };
        #[expect(unsafe_code, reason = "a process must be in its cgroup before it can make a socket")]
        // SAFETY: between fork and exec the closure only makes system calls (write, setns, unshare, mount)
        // on values made before the fork; it neither allocates nor takes locks.
        unsafe {
            command.pre_exec(enter);
        }
        Ok(())
    }
}

fn enter_namespaces(netns: BorrowedFd<'_>, resolv_conf: Option<&CString>) -> io::Result<()> {
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let Some(resolv_conf) = resolv_conf else { return Ok(()) };
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave, not private: names of namespaces that the harness unmounts must vanish here too.
    mount(None::<&OsStr>, c"/", None::<&OsStr>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&OsStr>)?;
    mount(
        Some(resolv_conf.as_c_str()),
        c"/etc/resolv.conf",
        None::<&OsStr>,
        MsFlags::MS_BIND,
        None::<&OsStr>,
    )?;
    Ok(())
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
