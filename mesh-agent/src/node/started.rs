//! Owns the question that a container's start-up probe asks: does the agent of this very container serve the node?
//!
//! Two agents of a roll-out share the host's network, so the address of probes is answered by the one that serves the node, for the pods of
//! both. Were that taken for the next one's readiness, the one before it would be ended by Kubernetes before it was relieved.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use super::lock::holder;
use crate::cli::StartedArgs;

/// Longest wait for the agent's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// Succeeds if the agent that serves the node is of this container, and answers.
///
/// # Errors
/// It is not, or does not.
pub fn started(args: &StartedArgs) -> anyhow::Result<()> {
    let Some(pid) = holder(&args.state_dir, &args.node) else { bail!("no agent has served the node yet") };
    ensure!(is_of_this_container(pid), "the node is served by an agent of another container, with pid {pid}");
    is_well(args.metrics).with_context(|| format!("ask the agent at {}", args.metrics))
}

/// All processes of a container have its mount namespace, also those that are started in it later, and no others have it.
fn is_of_this_container(pid: u32) -> bool {
    let mounts = |process: &str| fs::read_link(PathBuf::from("/proc").join(process).join("ns/mnt")).ok();
    let own = mounts("self");
    own.is_some() && own == mounts(&pid.to_string())
}

fn is_well(listens: SocketAddr) -> anyhow::Result<()> {
    let addr = match listens.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(addr, listens.port()), ANSWER_WITHIN)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    // The status is all that counts.
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let head = String::from_utf8_lossy(&head);
    ensure!(head.ends_with(" 200"), "it answered {head:?}");
    Ok(())
}
