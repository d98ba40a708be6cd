//! Owns a node's presence in the kernel: the pin folder, the loaded programs, their links on the cgroup root.
//!
//! Invariants:
//! - [`Node::open`] changes nothing before the precheck has passed.
//! - Pins are the truth: what a killed agent left is adopted, never guarded by a second record on disk.
//! - Dropping a [`Node`] leaves programs, links and maps in place; only [`crate::cleanup`] takes them away.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use aya::{Ebpf, EbpfLoader, programs::Program};
use aya_log::EbpfLogger;
use aya_obj::generated::bpf_attach_type;
use mesh_common::{
    maps,
    pod::{POD_NODE, PodCfg},
};

use crate::{
    arrival::{Template, TemplateError},
    bpffs,
    cgroup::{self, CgroupError, CgroupRoot},
    cleanup,
    enrol::Enrolled,
    folders::{self, Folders},
    handover::Inherited,
    links::{self, AttachError, Attachment},
    logger::Logger,
    map::{MapError, OpenMapError},
    maps::Maps,
    netns,
    precheck::{self, PrecheckError},
    status::{self, ForeignProgram},
    sys::{self, LinkTarget},
};

/// The object built from `mesh-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("MESH_EBPF_OBJECT"));

/// Cgroup programs of the object and the hook each belongs on.
pub(crate) const CGROUP_PROGRAMS: [(&str, bpf_attach_type); 9] = [
    // sock_ops first: a connect that is redirected before anybody publishes its original destination is lost.
    ("tcp_events", bpf_attach_type::BPF_CGROUP_SOCK_OPS),
    ("getpeername4", bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeername6", bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME),
    ("recvmsg4", bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg6", bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG),
    ("sendmsg4", bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG),
    ("connect4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    ("connect6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
];

/// What a node needs to know of its machine.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Name of the node; agents with different names do not disturb each other.
    pub node: String,
    /// The cgroup whose processes are under the mesh; the whole cgroup2 tree when absent.
    pub cgroup_root: Option<PathBuf>,
    /// Where the BPF file system is or shall be mounted.
    pub bpffs: PathBuf,
    /// The exact cgroup of the kubelet, whose probes get tickets; no probe tickets when absent.
    pub prober_cgroup: Option<PathBuf>,
    /// Without a `prober_cgroup`: the one of an earlier agent stays until [`Node::set_prober`] names another.
    pub keeps_prober: bool,
    /// Compiles the debug log statements of the programs in. They cost time on every connect.
    pub kernel_log: bool,
}

impl NodeOptions {
    /// The usual places.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            cgroup_root: None,
            bpffs: PathBuf::from("/sys/fs/bpf"),
            prober_cgroup: None,
            keeps_prober: false,
            kernel_log: false,
        }
    }
}

/// Why a node could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine cannot carry the mesh.
    #[error("this machine cannot run the agent")]
    Precheck {
        /// What is missing.
        source: PrecheckError,
    },
    /// The BPF file system could not be mounted.
    #[error(
        "mount the BPF file system at {path}: mount it (`mount -t bpf bpf {path}`) or run the agent privileged"
    )]
    Mount {
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The cgroup root is unusable.
    #[error("use the cgroup root")]
    Cgroup {
        /// Cause.
        source: CgroupError,
    },
    /// The pin folders could not be made.
    #[error("make the pin folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The object or one of its maps was refused.
    #[error("load the eBPF object")]
    Load {
        /// Cause.
        source: Box<aya::EbpfError>,
    },
    /// The verifier refused a program.
    #[error("load program {program}")]
    Program {
        /// Which.
        program: &'static str,
        /// Cause, with the verifier's log.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks a program: it was built from other sources.
    #[error("the eBPF object has no cgroup program {program}")]
    NoProgram {
        /// Which.
        program: &'static str,
    },
    /// A pinned map does not fit.
    #[error("open the pinned maps")]
    Maps {
        /// Cause.
        source: OpenMapError,
    },
    /// The template of the arrival programs could not be made.
    #[error("prepare the arrival program")]
    Template {
        /// Cause.
        source: TemplateError,
    },
    /// A program could not be attached.
    #[error("attach to cgroup {cgroup}")]
    Attach {
        /// The cgroup root.
        cgroup: PathBuf,
        /// Cause.
        source: AttachError,
    },
    /// Somebody else's program shuts us out.
    #[error(
        "cgroup {cgroup} has an exclusive program on it or above it ({foreign:?}); detach it or choose another --cgroup-root"
    )]
    ShutOut {
        /// The cgroup root.
        cgroup: PathBuf,
        /// The programs found.
        foreign: Vec<ForeignProgram>,
        /// Cause.
        source: AttachError,
    },
    /// The node's own entry could not be written.
    #[error("write the node's own entry")]
    Table {
        /// Cause.
        source: MapError,
    },
    /// The node's own namespace could not be read.
    #[error("read the cookie of the node's network namespace")]
    Home {
        /// Cause.
        source: io::Error,
    },
}

/// An attached cgroup program.
#[derive(Debug)]
pub(crate) struct CgroupProgram {
    pub(crate) name: &'static str,
    pub(crate) program: OwnedFd,
    pub(crate) link: OwnedFd,
    pub(crate) adopted: bool,
}

/// The node in the kernel.
#[derive(Debug)]
pub struct Node {
    pub(crate) options: NodeOptions,
    pub(crate) folders: Folders,
    pub(crate) root: CgroupRoot,
    pub(crate) maps: Arc<Maps>,
    pub(crate) template: Template,
    pub(crate) programs: Vec<CgroupProgram>,
    pub(crate) pods: Mutex<BTreeMap<u32, Enrolled>>,
    /// Pins of arrival links of other ABI versions, by the inode of their namespace.
    pub(crate) inherited: Mutex<HashMap<u64, PathBuf>>,
    /// Listeners of the agent before this one, until their pods are enrolled.
    pub(crate) inherited_sockets: Mutex<Inherited>,
    next_pod: AtomicU32,
    logger: Mutex<Option<Logger>>,
}

impl Node {
    /// Loads the programs and attaches them, taking over whatever an earlier agent of this node left pinned.
    pub fn open(options: NodeOptions) -> Result<Self, OpenError> {
        let mount = precheck::check().map_err(|source| OpenError::Precheck { source })?;
        bpffs::mount(&options.bpffs)
            .map_err(|source| OpenError::Mount { path: options.bpffs.clone(), source })?;
        let cgroup = |source| OpenError::Cgroup { source };
        let root = CgroupRoot::open(&mount, options.cgroup_root.as_deref()).map_err(cgroup)?;
        let prober_cgroup =
            options.prober_cgroup.as_deref().map(cgroup::group_id).transpose().map_err(cgroup)?;
        root.join().map_err(cgroup)?;

        let folders = Folders::new(&options.bpffs, &options.node);
        folders
            .create()
            .map_err(|source| OpenError::Folder { path: folders.version().to_owned(), source })?;
        let log_level = [if options.kernel_log { u8::MAX } else { 0 }];
        let mut object = load(&folders, &log_level)?;
        let maps = Maps::open(&folders.maps()).map_err(|source| OpenError::Maps { source })?;
        let globals = HashMap::from([(maps::LOG_LEVEL_GLOBAL, (log_level.as_slice(), false))]);
        let template = Template::new(OBJECT, &globals, |name| maps.descriptor(name))
            .map_err(|source| OpenError::Template { source })?;
        let logger = EbpfLogger::init(&mut object).ok().map(Logger);
        let programs = attach_all(&mut object, &folders, &root)?;

        let node = Self {
            next_pod: AtomicU32::new(1),
            options,
            folders,
            root,
            maps: Arc::new(maps),
            template,
            programs,
            pods: Mutex::new(BTreeMap::new()),
            inherited: Mutex::new(HashMap::new()),
            inherited_sockets: Mutex::default(),
            logger: Mutex::new(logger),
        };
        if prober_cgroup.is_some() || !node.options.keeps_prober {
            node.write_own_entry(prober_cgroup)?;
        }
        node.next_pod.store(node.largest_pod().saturating_add(1), Ordering::Relaxed);
        *lock(&node.inherited) = node.old_arrivals();
        node.remove_halves();
        Ok(node)
    }

    /// A local pod id that no pod of this pin folder has or had since the agent started.
    pub fn next_pod_id(&self) -> u32 {
        self.next_pod.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes this process serve the node again after another one did so for a while, which may have changed any map. Returns the
    /// pods that one took out: their listeners are to be closed. The others are written anew by [`Node::update`].
    pub fn resume(&self) -> Result<Vec<u32>, MapError> {
        self.next_pod.fetch_max(self.largest_pod().saturating_add(1), Ordering::Relaxed);
        let mut served = lock(&self.pods);
        let mut lost = Vec::new();
        for (pod, enrolled) in served.iter_mut() {
            let entry = self.maps.pods.get(&enrolled.sockets.netns().cookie())?;
            match entry.is_some_and(|entry| entry.pod == *pod) {
                true => enrolled.is_stale = true,
                false => lost.push(*pod),
            }
        }
        served.retain(|pod, _| !lost.contains(pod));
        Ok(lost)
    }

    /// The reader of the programs' log, once.
    pub fn take_logger(&self) -> Option<Logger> {
        lock(&self.logger).take()
    }

    /// The shared maps.
    pub fn maps(&self) -> &Arc<Maps> {
        &self.maps
    }

    /// Removes what other ABI versions of the programs left. To be called when every pod that shall be taken
    /// over has been: until then their arrival links still guard their pods.
    pub fn retire_old_versions(&self) {
        lock(&self.inherited).clear();
        for version in self.folders.other_versions() {
            cleanup::remove_version(&version);
        }
    }

    /// From now on the processes of this very group get probe tickets, and no others.
    ///
    /// # Errors
    /// It is no group, or the kernel refuses; what was before stays.
    pub fn set_prober(&self, cgroup: &Path) -> Result<(), OpenError> {
        let id = cgroup::group_id(cgroup).map_err(|source| OpenError::Cgroup { source })?;
        self.write_own_entry(Some(id))
    }

    /// The node's entry gives probe tickets to the kubelet; without one, no entry: the node's namespace stays
    /// untouched.
    fn write_own_entry(&self, prober_cgroup: Option<u64>) -> Result<(), OpenError> {
        let cookie = netns::home_cookie().map_err(|source| OpenError::Home { source })?;
        let written = match prober_cgroup {
            Some(prober_cgroup) => {
                let entry = PodCfg { prober_cgroup, flags: POD_NODE, ..PodCfg::ZERO };
                self.maps.pods.put(&cookie, &entry).and_then(|()| {
                    // Probe tickets count against the node.
                    self.maps.tickets_used.put_new(&cookie, &0).map(drop)
                })
            }
            None => self.maps.pods.delete(&cookie).map(drop),
        };
        written.map_err(|source| OpenError::Table { source })
    }

    /// The largest local pod id that anything pinned mentions.
    fn largest_pod(&self) -> u32 {
        let mut largest = 0;
        let in_maps = self
            .maps
            .pods
            .each(|_, pod| largest = largest.max(pod.pod))
            .and_then(|()| self.maps.inbound.each(|pod, _| largest = largest.max(*pod)));
        if let Err(error) = in_maps {
            tracing::warn!(%error, "cannot list the adopted pods");
        }
        let links = folders::entries(&self.folders.links());
        links.iter().filter_map(|pin| folders::arrival_pod(pin)).fold(largest, u32::max)
    }

    fn old_arrivals(&self) -> HashMap<u64, PathBuf> {
        let mut found = HashMap::new();
        for version in self.folders.other_versions() {
            for pin in folders::entries(&version.join("links")) {
                if folders::arrival_pod(&pin).is_some()
                    && let Some(LinkTarget::Netns { inode, .. }) = links::target(&pin)
                    && inode != 0
                {
                    found.insert(u64::from(inode), pin);
                }
            }
        }
        found
    }
}

/// Loads the object with its maps taken from or put into the pin folder, then its cgroup programs.
fn load(folders: &Folders, log_level: &[u8; 1]) -> Result<Ebpf, OpenError> {
    let folder = folders.maps();
    let mut loader = EbpfLoader::new();
    for name in maps::ALL {
        loader.map_pin_path(name, folder.join(name));
    }
    loader.override_global(maps::LOG_LEVEL_GLOBAL, &log_level[0], false);
    let mut object = loader.load(OBJECT).map_err(|source| OpenError::Load { source: Box::new(source) })?;
    for (name, _) in CGROUP_PROGRAMS {
        let loaded = match object.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => program.load(),
            Some(Program::SockOps(program)) => program.load(),
            _ => return Err(OpenError::NoProgram { program: name }),
        };
        loaded.map_err(|source| OpenError::Program { program: name, source: Box::new(source) })?;
    }
    Ok(object)
}

fn attach_all(
    object: &mut Ebpf,
    folders: &Folders,
    root: &CgroupRoot,
) -> Result<Vec<CgroupProgram>, OpenError> {
    let others = folders.other_versions();
    let mut programs = Vec::with_capacity(CGROUP_PROGRAMS.len());
    for (name, attach_type) in CGROUP_PROGRAMS {
        let program = object.program(name).ok_or(OpenError::NoProgram { program: name })?;
        let failed = |source| OpenError::Program { program: name, source: Box::new(source) };
        let program = program.fd().map_err(failed)?.as_fd().try_clone_to_owned();
        let program = program.map_err(|error| failed(aya::programs::ProgramError::IOError(error)))?;
        let what = Attachment {
            name,
            program: program.as_fd(),
            target: root.dir.as_fd(),
            identity: LinkTarget::Cgroup { id: root.id, attach_type: attach_type as u32 },
            attach_type,
        };
        let earlier: Vec<PathBuf> = others.iter().map(|version| version.join("links").join(name)).collect();
        let attached = links::attach(&what, &folders.link(name), &earlier)
            .map_err(|source| attach_failed(source, root, attach_type))?;
        programs.push(CgroupProgram { name, program, link: attached.link, adopted: attached.adopted });
    }
    Ok(programs)
}

/// A legacy exclusive program above us is the one refusal with a cure worth naming.
fn attach_failed(source: AttachError, root: &CgroupRoot, attach_type: bpf_attach_type) -> OpenError {
    let cgroup = root.path.clone();
    if source.is_refused() {
        let foreign = status::foreign_on(root, attach_type as u32, &[]);
        if !foreign.is_empty() {
            return OpenError::ShutOut { cgroup, foreign, source };
        }
    }
    OpenError::Attach { cgroup, source }
}

/// A poisoned lock only means that some other thread panicked: the data are written whole or not at all.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The id of a loaded program; 0 when the kernel does not say.
pub(crate) fn program_id(program: std::os::fd::BorrowedFd<'_>) -> u32 {
    sys::program_info(program).map(|info| info.id).unwrap_or(0)
}
