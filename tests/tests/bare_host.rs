//! Hosts that lack a file system which the agent needs, or have it elsewhere: it is found or mounted, and pods are in the mesh.
//!
//! The agent runs among mounts of its own, so this machine keeps its.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::agent::AgentError;
use mesh_tests::cgroup::mount_point;
use mesh_tests::{
    Agent, Failure, Pod, Shop, TestResult, eventually, programs, require_agent, shop, test_name,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
const BPFFS: &str = "/sys/fs/bpf";

/// A program that is the agent, on a host whose mounts `prepare` has changed. Paths of cgroups are given to it as they are
/// below `seen_at`.
fn on_a_host(shop: &Shop, prepare: &str, seen_at: &Path) -> Result<PathBuf, Failure> {
    let path = shop.world().directory().join("agent-on-a-host");
    let (agent, cgroups) = (programs::agent()?, mount_point()?);
    let (agent, cgroups, seen_at) = (agent.display(), cgroups.display(), seen_at.display());
    let script = format!(
        "#!/bin/sh\n\
         if [ \"$1\" != among-own-mounts ]; then exec unshare --mount --propagation private \"$0\" among-own-mounts \"$@\"; fi\n\
         shift\n\
         set -e\n\
         {prepare}\n\
         for arg; do\n  \
           shift\n  \
           case $arg in {cgroups}/*) arg={seen_at}${{arg#{cgroups}}};; esac\n  \
           set -- \"$@\" \"$arg\"\n\
         done\n\
         exec {agent} \"$@\"\n"
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Two pods of one node, and an agent on such a host.
struct Scene {
    shop: Shop,
    client: Pod,
    web: Pod,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a"])?;
        let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
        Ok(Self { shop, client, web })
    }

    fn start(&self, prepare: &str, seen_at: &Path, args: &[&str]) -> Result<Agent, Failure> {
        let program = on_a_host(&self.shop, prepare, seen_at)?;
        Ok(self.shop.world().node("a")?.agent().program(program).args(args).start()?)
    }

    /// Where the agent mounts the cgroup2 tree if it finds it nowhere.
    fn cgroup2_of_the_agent(&self) -> PathBuf {
        self.shop.world().directory().join("a/state/cgroup2")
    }

    /// The pods are enrolled, and their connections go by the mesh.
    fn is_served(&self, agent: &Agent) -> TestResult {
        agent.wait_enrolled([&self.client, &self.web])?;
        let vip = self.shop.service("web", 80)?;
        let _server = self.shop.serve(&self.web)?;
        let ask = || self.client.tool().and_then(|tool| tool.who(vip.v4));
        let seen = eventually(SOON, ask, Result::is_ok)??;
        assert_eq!(seen.server, "web");
        let opened = || -> Result<u64, AgentError> {
            let by = |path| shop::opened(agent, &self.client, &self.web, path);
            Ok(by("direct")? + by("proxy")?)
        };
        eventually(SOON, opened, |opened| opened.as_ref().is_ok_and(|opened| *opened > 0))??;
        Ok(())
    }
}

/// What is mounted where, as the agent sees it.
fn mounts(agent: &Agent, kind: &str) -> Result<Vec<String>, Failure> {
    let text = fs::read_to_string(format!("/proc/{}/mounts", agent.pid()))?;
    let of_kind = text.lines().map(|line| line.split(' ')).filter_map(|mut fields| {
        let (at, found) = (fields.nth(1)?, fields.next()?);
        (found == kind).then(|| at.to_owned())
    });
    Ok(of_kind.collect())
}

#[test]
fn a_host_without_bpffs_and_cgroup2_gets_them_and_its_pods_are_meshed() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let (bare, own) = (mount_point()?, scene.cgroup2_of_the_agent());
    let agent = scene.start(&format!("umount -l {BPFFS} || :\numount -l {}", bare.display()), &own, &[])?;
    assert_eq!(mounts(&agent, "cgroup2")?, [own.display().to_string()]);
    assert_eq!(mounts(&agent, "bpf")?, [BPFFS]);
    scene.is_served(&agent)?;
    let status: Value = agent.meshctl(&["status"])?;
    let root = status["kernel"]["cgroup_root"].as_str().context("no cgroup root")?;
    assert!(Path::new(root).starts_with(&own), "{root}");
    Ok(())
}

#[test]
fn a_cgroup2_tree_beside_those_of_version_1_is_used_as_it_is() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    // As such hosts have it: a folder in memory with a tree for each controller, and one of version 2.
    let (bare, hybrid) = (mount_point()?, Path::new("/sys/fs/cgroup/unified"));
    let prepare = format!(
        "umount -l {}\nmount -t tmpfs tmpfs /sys/fs/cgroup\nmkdir {hybrid}\nmount -t cgroup2 none {hybrid}",
        bare.display(),
        hybrid = hybrid.display()
    );
    let agent = scene.start(&prepare, hybrid, &[])?;
    assert_eq!(mounts(&agent, "cgroup2")?, [hybrid.display().to_string()]);
    assert!(!scene.cgroup2_of_the_agent().exists(), "nothing is mounted twice");
    scene.is_served(&agent)
}

#[test]
fn a_bpffs_that_cannot_be_mounted_is_named() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let nowhere = "/proc/no-folder";
    let refused = scene.start(":", &mount_point()?, &["--bpffs", nowhere]);
    let said = refused.err().map(|failure| format!("{failure:?}")).unwrap_or_default();
    assert!(said.contains("before it was ready") && said.contains(nowhere), "{said}");
    Ok(())
}
