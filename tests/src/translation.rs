//! What kube-proxy does on a node: rules in the host's network that lead the addresses of services to pods, so that the node tracks
//! and translates connections. A world has none by itself.

use std::io;
use std::net::SocketAddr;
use std::process::Command;

use crate::place::Place;
use crate::shop::Vip;
use crate::verdict::Failure;

/// The rules of one node's host; gone with the node.
#[derive(Debug)]
pub struct Translation {
    host: Place,
}

/// Why a test of translated connections cannot run here.
#[must_use]
pub fn nft_missing() -> Option<String> {
    let found = Command::new("nft").arg("--version").output().is_ok_and(|output| output.status.success());
    (!found).then(|| "nft is not installed: run `cargo xtask setup`".to_owned())
}

impl Translation {
    /// Make the tables of rules, without a service yet. The rule for marked packets keeps the node tracking.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn start(host: &Place) -> Result<Self, Failure> {
        let rules = Self { host: host.clone() };
        rules.nft(
            "table inet services { \
             chain prerouting { type nat hook prerouting priority dstnat; }; \
             chain postrouting { type nat hook postrouting priority srcnat; meta mark 0x4000 masquerade; }; }",
        )?;
        Ok(rules)
    }

    /// Lead `vip` to `server`, by both families.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn lead(&self, vip: Vip, server: &Place, port: u16) -> Result<(), Failure> {
        for (family, from, to) in [("ip", vip.v4, server.at4(port)), ("ip6", vip.v6, server.at6(port))] {
            self.nft(&format!(
                "add rule inet services prerouting {family} daddr {} tcp dport {} dnat {family} to {to}",
                from.ip(),
                from.port()
            ))?;
        }
        Ok(())
    }

    /// Lead nothing any more. Connections that are tracked go on as they were.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn forget_rules(&self) -> Result<(), Failure> {
        self.nft("flush chain inet services prerouting")
    }

    /// What is tracked of connections that `client` made, as the kernel lists it: one line for each.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn tracked(&self, client: SocketAddr) -> Result<Vec<String>, Failure> {
        // As a reader of the host's namespace; the path without a thread is that of the process.
        let list = self.host.run(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack"))??;
        Ok(list.lines().filter(|line| is_by(line, client)).map(ToOwned::to_owned).collect())
    }

    fn nft(&self, script: &str) -> Result<(), Failure> {
        let output = self.host.run(|| Command::new("nft").arg(script).output())??;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("nft {script:?}: {said}")).into())
    }
}

/// Whether the first source and source port of a line are these.
fn is_by(line: &str, client: SocketAddr) -> bool {
    let first = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key));
    first("src=").and_then(|ip| ip.parse().ok()) == Some(client.ip())
        && first("sport=").and_then(|port| port.parse().ok()) == Some(client.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_of_whoever_made_the_connection() {
        let line = "ipv4     2 tcp      6 119 TIME_WAIT src=10.244.1.2 dst=10.96.0.101 sport=40001 dport=80 \
                    src=10.244.1.3 dst=10.244.1.2 sport=8080 dport=40001 [ASSURED] mark=0 zone=0 use=2";
        assert!(is_by(line, "10.244.1.2:40001".parse().unwrap()));
        assert!(!is_by(line, "10.244.1.2:40002".parse().unwrap()));
        assert!(!is_by(line, "10.244.1.3:8080".parse().unwrap()));
    }
}
