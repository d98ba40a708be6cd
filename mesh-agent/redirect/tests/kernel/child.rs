//! A process of its own in a given cgroup and namespace: the test binary started again.

use std::{
    fs,
    fs::File,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// What the child shall do, as `cgroup|netns|destination`.
const ORDER: &str = "NM_REDIRECT_CHILD";
const ANSWER: &str = "child says: ";

/// Dials from a process of its own; returns what its `getpeername` shows, or the error.
pub(crate) fn dial(cgroup: &Path, netns: &Path, to: SocketAddr) -> Result<String, String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child::the_child_does_what_it_is_told", "--nocapture"])
        .env(ORDER, format!("{}|{}|{to}", cgroup.display(), netns.display()))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let answer = text.split(ANSWER).nth(1).unwrap_or_else(|| panic!("no answer in: {text}"));
    let answer = answer.lines().next().unwrap();
    match answer.strip_prefix("ok ") {
        Some(peer) => Ok(peer.to_owned()),
        None => Err(answer.to_owned()),
    }
}

#[test]
fn the_child_does_what_it_is_told() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let [cgroup, netns, to] = order.split('|').collect::<Vec<_>>()[..] else { panic!("{order}") };
    fs::write(Path::new(cgroup).join("cgroup.procs"), "0").unwrap();
    let to: SocketAddr = to.parse().unwrap();
    let result = crate::bed::inside(&File::open(netns).unwrap(), || {
        let stream = TcpStream::connect_timeout(&to, Duration::from_millis(500))?;
        stream.peer_addr()
    });
    match result {
        Ok(peer) => println!("{ANSWER}ok {peer}"),
        Err(error) => println!("{ANSWER}{error:?}"),
    }
}
