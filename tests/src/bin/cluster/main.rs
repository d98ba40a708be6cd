//! `cargo xtask cluster`: a Kubernetes that stays until it is told to go.
//!
//! `up` holds the cluster and listens on a socket of its folder; `load` and `down` talk to it.

mod control;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use mesh_tests::clean;
use mesh_tests::cluster::Cluster;
use mesh_tests::signals::stop_signals;

use control::Order;

/// The administrator's kubeconfig, in the folder.
const KUBECONFIG: &str = "kubeconfig";

/// How often the control socket is looked at.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Parser)]
#[command(about = "A real Kubernetes of two nodes on this machine")]
struct Arguments {
    /// Where the running cluster keeps its kubeconfig and its socket.
    #[arg(long)]
    folder: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a cluster and hold it until `down`, or a signal.
    Up {
        /// Names of the nodes.
        #[arg(long = "node", default_values_t = ["a".to_owned(), "b".to_owned()])]
        nodes: Vec<String>,
        /// An archive of images for every node.
        #[arg(long = "image")]
        images: Vec<PathBuf>,
    },
    /// Put the images of an archive on every node of the running cluster.
    Load {
        /// A docker or OCI archive.
        archive: PathBuf,
    },
    /// End the running cluster.
    Down,
}

fn main() -> ExitCode {
    let Arguments { folder, command } = Arguments::parse();
    let done = match command {
        Command::Up { nodes, images } => up(&folder, &nodes, &images),
        Command::Load { archive } => load(&folder, &archive),
        Command::Down => control::ask(&folder, &Order::Down),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up(folder: &Path, nodes: &[String], images: &[PathBuf]) -> anyhow::Result<()> {
    if let Some(missing) = mesh_tests::require::missing() {
        anyhow::bail!("cannot run here: {missing}");
    }
    let stop = stop_signals()?;
    for remains in clean::leftovers(false) {
        eprintln!("removed {remains} of an earlier run");
    }
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    // Before the cluster, so that a second one is refused at once.
    let control = control::listen(folder)?;
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let cluster = Cluster::start("cluster", &nodes)?;
    for image in images {
        cluster.load(image)?;
    }
    let kubeconfig = folder.join(KUBECONFIG);
    fs::copy(cluster.kubeconfig(), &kubeconfig).with_context(|| format!("write {}", kubeconfig.display()))?;
    println!("{}", kubeconfig.display());
    let leaver = loop {
        match stop.recv_timeout(LOOK) {
            Ok(_) | Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let Some((order, answer)) = control.next() else { continue };
        match order {
            Order::Load(archive) => answer.give(cluster.load(&archive)),
            Order::Down => break Some(answer),
        }
    };
    drop(cluster);
    fs::remove_file(&kubeconfig).with_context(|| format!("remove {}", kubeconfig.display()))?;
    drop(control);
    if let Some(answer) = leaver {
        // Whoever asked may use the machine at once.
        answer.give(Ok::<(), anyhow::Error>(()));
    }
    Ok(())
}

fn load(folder: &Path, archive: &Path) -> anyhow::Result<()> {
    let archive = archive.canonicalize().with_context(|| format!("find {}", archive.display()))?;
    control::ask(folder, &Order::Load(archive))
}
