//! Owns `cargo xtask cluster`: a real Kubernetes of two nodes on this machine.
//!
//! Not here: the cluster itself, which is in package `mesh-tests` (`tests/src/cluster`, and the program `cluster` that
//! holds it).

pub(crate) mod go;
pub(crate) mod images;
pub(crate) mod kubernetes;

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};

use crate::{
    process,
    setup::{self, Need},
    suites::{self, Built},
    workspace::Workspace,
};

/// How often a starting cluster is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of `cargo xtask cluster`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask cluster up                      two nodes, a and b; prints the path of the kubeconfig
  kubectl --kubeconfig target/cluster/kubeconfig get nodes
  cargo xtask cluster load my-image.tar       docker or OCI archive, for pods with imagePullPolicy: Never
  cargo xtask cluster down                    ends it and removes all it made

Every node has the images localhost/apps:test (the tests' applications) and localhost/nodemesh:dev (mesh-agent and meshctl
as built from this tree). Needs root. Nothing on it can reach, or be reached from, any network.")]
pub(crate) struct ClusterArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start a cluster, leave it running, and print the path of its kubeconfig.
    Up {
        /// Number of nodes.
        #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
    },
    /// Put the images of a docker or OCI archive on every node of the running cluster.
    Load {
        /// The archive.
        archive: PathBuf,
    },
    /// End the running cluster and remove all it made.
    Down,
    /// Install and build what clusters need, and print where it is, as the tests' variables.
    Prepare,
}

/// `cargo xtask cluster`.
pub(crate) fn run(workspace: &Workspace, arguments: &ClusterArguments) -> anyhow::Result<()> {
    match &arguments.action {
        Action::Up { nodes } => up(workspace, *nodes),
        Action::Load { archive } => {
            let archive = archive.canonicalize().with_context(|| format!("find {}", archive.display()))?;
            process::run(holder(workspace)?.arg("load").arg(archive))
        }
        Action::Down => process::run(holder(workspace)?.arg("down")),
        Action::Prepare => {
            for (name, value) in prepare(workspace)?.variables {
                println!("{name}={}", value.display());
            }
            Ok(())
        }
    }
}

/// Everything that a cluster needs, ready for use.
pub(crate) struct Prepared {
    pub(crate) built: Built,
    /// By which its programs find it.
    pub(crate) variables: Vec<(&'static str, OsString)>,
}

/// Installs and builds whatever is missing.
pub(crate) fn prepare(workspace: &Workspace) -> anyhow::Result<Prepared> {
    setup::ensure(workspace, &[Need::Ebpf, Need::Netns, Need::Kubernetes])?;
    let kubernetes = kubernetes::ensure(workspace)?;
    let built = suites::build_programs(workspace, &["mesh-agent", "mesh-tests"])?;
    let variables = variables(workspace, kubernetes, &built)?;
    Ok(Prepared { built, variables })
}

/// Writes the images and says by what tests find them and Kubernetes' programs.
pub(crate) fn variables(
    workspace: &Workspace,
    kubernetes: PathBuf,
    built: &Built,
) -> anyhow::Result<Vec<(&'static str, OsString)>> {
    let images = images::write(workspace, &kubernetes, &built.programs)?;
    let mut variables = built.variables(|_, path| path.into());
    variables.extend([(kubernetes::VARIABLE, kubernetes.into()), (images::VARIABLE, images.into())]);
    Ok(variables)
}

fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("cluster")
}

/// The program that holds the cluster, as built when it was started.
fn holder(workspace: &Workspace) -> anyhow::Result<Command> {
    let program = folder(workspace).join("holder");
    ensure!(program.is_file(), "no cluster runs: `cargo xtask cluster up` starts one");
    let mut command = Command::new(program);
    command.arg("--folder").arg(folder(workspace));
    Ok(command)
}

fn up(workspace: &Workspace, nodes: u8) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "a cluster is made of namespaces and control groups: run this as root"
    );
    let folder = folder(workspace);
    // The program would refuse too, but only after minutes of building.
    ensure!(
        UnixStream::connect(folder.join("control.sock")).is_err(),
        "a cluster runs already: `cargo xtask cluster down` ends it"
    );
    let Prepared { built, variables } = prepare(workspace)?;
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let kubeconfig = folder.join("kubeconfig");
    let socket = folder.join("control.sock");
    let program = built.programs.get("cluster").context("package mesh-tests has no program `cluster`")?;
    // A copy: the tree may be built anew while the cluster runs. A running one keeps its old file.
    let (fresh, kept) = (folder.join("holder.new"), folder.join("holder"));
    fs::copy(program, &fresh).with_context(|| format!("copy {}", program.display()))?;
    fs::rename(&fresh, &kept).with_context(|| format!("keep {}", kept.display()))?;
    let log_path = folder.join("up.log");
    let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
    // In a session of its own: it stays when the terminal goes.
    let mut command = Command::new("setsid");
    command.arg(&kept).arg("--folder").arg(&folder).arg("up");
    for name in ('a'..='z').take(usize::from(nodes)) {
        command.arg("--node").arg(name.to_string());
    }
    command.arg("--image").arg(images::folder(workspace).join("nodemesh.tar"));
    command.envs(variables).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().context("start the cluster")?;
    eprintln!("cluster: starting; its log is {}", log_path.display());
    loop {
        if let Some(status) = child.try_wait().context("wait for the cluster")? {
            let log = fs::read_to_string(&log_path).unwrap_or_default();
            bail!("the cluster did not come up ({status}): {}", log.trim());
        }
        if fs::read_to_string(&log_path)
            .is_ok_and(|log| log.lines().any(|line| kubeconfig.as_os_str() == line))
        {
            break;
        }
        thread::sleep(LOOK);
    }
    ensure!(socket.exists(), "the cluster is up but does not listen on {}", socket.display());
    println!("{}", kubeconfig.display());
    Ok(())
}
