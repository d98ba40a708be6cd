//! The first process of a node: it makes a machine of its own out of namespaces, starts the node's programs and
//! reaps what they leave.
//!
//! A node sees its own processes, host name, cgroup trees (its own group is their root), `/run`, `/etc`, `/opt` and
//! `/var/lib`, and a bpffs that is its own, if any: several fit on one machine with every path where it is on a real node. All of it,
//! mounts included, ends with the process.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, sethostname};
use serde::{Deserialize, Serialize};

/// Pause before a program that ended is started again, as a service manager would.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// The group of the first process, below the node's.
pub(crate) const INIT_GROUP: &str = "init";

/// Settings of the whole machine that a kubelet writes: a node gets files in their place.
const MACHINE_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// What a node is made of. Written as a file for `pod-tool node`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Its host name.
    pub name: String,
    /// Its private folder: `etc`, `opt`, `lib` below it become the node's own.
    pub directory: PathBuf,
    /// Its group below the root of every cgroup hierarchy, without a leading slash.
    pub group: String,
    /// The hierarchies of the machine.
    pub hierarchies: Vec<Hierarchy>,
    /// Whether it has a BPF file system of its own.
    pub bpf: BpfFileSystem,
    /// What runs on it, in the order of starting.
    pub programs: Vec<Program>,
}

/// What a node has at `/sys/fs/bpf` when its programs start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BpfFileSystem {
    /// A BPF file system, which systemd mounts on every machine that it starts.
    Mounted,
    /// An empty folder: whoever wants to pin something has to mount one.
    Missing,
}

/// A mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Where.
    pub mount_point: PathBuf,
    /// The options of a version 1 hierarchy; `None` for version 2.
    pub options: Option<String>,
}

impl Hierarchy {
    /// Those of this machine.
    ///
    /// # Errors
    /// When `/proc/mounts` cannot be read.
    pub fn all() -> io::Result<Vec<Self>> {
        Ok(Self::parse(&fs::read_to_string("/proc/mounts")?))
    }

    fn parse(mounts: &str) -> Vec<Self> {
        let line = |line: &str| {
            let mut fields = line.split(' ');
            let (_, target, kind, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let mount_point = PathBuf::from(target);
            match kind {
                "cgroup2" => Some(Self { mount_point, options: None }),
                "cgroup" => {
                    // What says which hierarchy it is: controllers, or a name.
                    let own = |option: &&str| {
                        !matches!(*option, "rw" | "ro" | "relatime" | "nosuid" | "nodev" | "noexec" | "xattr")
                            && !option.starts_with("release_agent=")
                    };
                    let own: Vec<&str> = options.split(',').filter(own).collect();
                    let named = own.iter().all(|option| option.starts_with("name="));
                    let none = if named { "none," } else { "" };
                    Some(Self { mount_point, options: Some(format!("{none}{}", own.join(","))) })
                }
                _ => None,
            }
        };
        mounts.lines().filter_map(line).collect()
    }
}

/// A program of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Its name: of its cgroup below the node's, and of its log.
    pub name: String,
    /// The executable and its arguments.
    pub command: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// The next program is started when this path exists.
    pub ready: Option<PathBuf>,
}

/// `pod-tool node SPEC`: join the node's groups, leave the machine's namespaces, and wait for the node's end.
///
/// # Errors
/// When the kernel refuses a step.
pub fn enter(spec_path: &Path) -> anyhow::Result<()> {
    let spec = read(spec_path)?;
    for hierarchy in &spec.hierarchies {
        let group = hierarchy.mount_point.join(&spec.group);
        fs::create_dir_all(&group).with_context(|| format!("create {}", group.display()))?;
        // A cpuset without processors takes no process.
        for setting in ["cpuset.cpus", "cpuset.mems"] {
            inherit_setting(&hierarchy.mount_point, &spec.group, setting)?;
        }
        let procs = group.join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("write {}", procs.display()))?;
    }
    let own = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(own).context("leave the machine's namespaces")?;
    // The first process that is started now is the first of the new process namespace.
    let mut init = Command::new(std::env::current_exe().context("find this program")?);
    let status = init.arg("node-init").arg(spec_path).status().context("start the first process")?;
    anyhow::bail!("the node ended: {status}")
}

/// Gives every group on the way down to `group` its parent's value, where it has none.
fn inherit_setting(root: &Path, group: &str, setting: &str) -> anyhow::Result<()> {
    let mut path = root.to_path_buf();
    let Ok(mut value) = fs::read_to_string(path.join(setting)) else { return Ok(()) };
    for part in group.split('/') {
        path.push(part);
        let file = path.join(setting);
        let own = fs::read_to_string(&file).unwrap_or_default();
        if own.trim().is_empty() {
            fs::write(&file, value.trim()).with_context(|| format!("write {}", file.display()))?;
        } else {
            value = own;
        }
    }
    Ok(())
}

/// `pod-tool node-init SPEC`: be the first process of a node. Returns only on failure.
///
/// # Errors
/// When the kernel refuses a mount or a program cannot be started.
pub fn run(spec_path: &Path) -> anyhow::Result<()> {
    let spec = read(spec_path)?;
    make_mounts(&spec)?;
    sethostname(&spec.name).context("set the host name")?;
    // On a machine with version 2 alone, a group with children that are limited has no processes itself.
    let own = unified().join(INIT_GROUP);
    fs::create_dir_all(&own).with_context(|| format!("create {}", own.display()))?;
    fs::write(own.join("cgroup.procs"), "0").context("join a group of its own")?;
    let mut running: Vec<(Pid, &Program)> = Vec::new();
    for program in &spec.programs {
        running.push((start(program)?, program));
        while program.ready.as_ref().is_some_and(|path| !path.exists()) {
            // Pods' orphans cannot be there yet, so only the programs are looked at.
            if waitpid(running.last().map(|(pid, _)| *pid), Some(WaitPidFlag::WNOHANG))
                .is_ok_and(|state| state.pid().is_some())
            {
                anyhow::bail!("{} ended before it was ready", program.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    loop {
        let ended = waitpid(None, None).context("wait for the node's processes")?;
        let Some(position) = running.iter().position(|(pid, _)| ended.pid() == Some(*pid)) else { continue };
        let (_, program) = running.swap_remove(position);
        eprintln!("{} ended ({ended:?}); starting it again", program.name);
        std::thread::sleep(RESTART_PAUSE);
        running.push((start(program)?, program));
    }
}

fn read(path: &Path) -> anyhow::Result<NodeSpec> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

fn start(program: &Program) -> anyhow::Result<Pid> {
    let name = &program.name;
    let (executable, arguments) =
        program.command.split_first().with_context(|| format!("{name} has no command"))?;
    let group = unified().join(name);
    fs::create_dir_all(&group).with_context(|| format!("create {}", group.display()))?;
    let procs = OpenOptions::new().write(true).open(group.join("cgroup.procs"));
    let procs = procs.with_context(|| format!("open the group of {name}"))?;
    let log = OpenOptions::new().create(true).append(true).open(&program.log);
    let log = log.with_context(|| format!("open {}", program.log.display()))?;
    let mut command = Command::new(executable);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let join = move || (&procs).write_all(b"0");
    #[expect(unsafe_code, reason = "a program must be in its cgroup before it can make a socket")]
    // SAFETY: between fork and exec the closure only writes to a file opened before the fork; it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(join);
    }
    let child = command.spawn().with_context(|| format!("start {executable}"))?;
    Ok(Pid::from_raw(i32::try_from(child.id()).context("a process id")?))
}

/// Where a node has its version 2 hierarchy: as a machine with both versions does, or as one with version 2 alone.
fn unified() -> PathBuf {
    let hybrid = PathBuf::from("/sys/fs/cgroup/unified");
    if hybrid.is_dir() { hybrid } else { PathBuf::from("/sys/fs/cgroup") }
}

fn make_mounts(spec: &NodeSpec) -> anyhow::Result<()> {
    let root = Path::new("/");
    change(root, MsFlags::MS_PRIVATE)?;
    mount_new("proc", Path::new("/proc"), "")?;
    umount2("/sys", MntFlags::MNT_DETACH).context("unmount /sys")?;
    mount_new("sysfs", Path::new("/sys"), "")?;
    let cgroups = Path::new("/sys/fs/cgroup");
    if spec.hierarchies.iter().any(|hierarchy| hierarchy.options.is_some()) {
        mount_new("tmpfs", cgroups, "mode=755")?;
    }
    for hierarchy in &spec.hierarchies {
        let below = hierarchy.mount_point.strip_prefix(cgroups).unwrap_or(Path::new("unified"));
        let target = cgroups.join(below);
        fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
        match &hierarchy.options {
            Some(options) => mount_new("cgroup", &target, options)?,
            None => mount_new("cgroup2", &target, "")?,
        }
    }
    if spec.bpf == BpfFileSystem::Mounted {
        mount_new("bpf", Path::new("/sys/fs/bpf"), "mode=700")?;
    }
    mount_new("tmpfs", Path::new("/run"), "mode=755")?;
    for (own, target) in [("opt", "/opt"), ("lib", "/var/lib"), ("log", "/var/log")] {
        bind(&spec.directory.join(own), Path::new(target))?;
    }
    let etc = spec.directory.join("etc");
    let work = spec.directory.join("etc-work");
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let layers = format!("lowerdir=/etc,upperdir={},workdir={}", etc.display(), work.display());
    mount_new("overlay", Path::new("/etc"), &layers)?;
    for (setting, value) in MACHINE_SETTINGS {
        let target = Path::new("/proc/sys").join(setting);
        if target.exists() {
            let own = spec.directory.join(setting.replace('/', "."));
            fs::write(&own, value).with_context(|| format!("write {}", own.display()))?;
            bind(&own, &target)?;
        }
    }
    // Containers may ask for mounts that travel, which a private tree cannot give.
    change(root, MsFlags::MS_SHARED)
}

fn change(path: &Path, propagation: MsFlags) -> anyhow::Result<()> {
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_REC | propagation, None::<&str>)
        .with_context(|| format!("change the propagation of {}", path.display()))
}

fn mount_new(kind: &str, target: &Path, options: &str) -> anyhow::Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mount {kind} on {}", target.display()))
}

fn bind(from: &Path, target: &Path) -> anyhow::Result<()> {
    mount(Some(from), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} to {}", from.display(), target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_known_by_their_controllers_or_name() {
        let found = Hierarchy::parse(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,xattr,name=systemd 0 0\n\
             cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n",
        );
        let options: Vec<_> = found.iter().map(|hierarchy| hierarchy.options.as_deref()).collect();
        assert_eq!(options, [Some("cpu,cpuacct"), Some("none,name=systemd"), None]);
    }
}
