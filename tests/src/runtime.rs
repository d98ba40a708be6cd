//! A container runtime as far as the mesh sees one: it calls the real CNI plugin for pods of a world, as the last of a chain.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::pod::Pod;
use crate::programs::{self, ProgramMissing};
use crate::world::Node;

/// The plugin could not be called, or said no.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// It has not been built.
    #[error(transparent)]
    Missing(#[from] ProgramMissing),
    /// It could not be put in place or started.
    #[error("cannot {doing}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It refused, with the error object of the specification.
    #[error("the plugin refused: {0}")]
    Refused(Value),
    /// It printed something else.
    #[error("the plugin printed {0:?}")]
    Unreadable(String),
}

impl CniError {
    /// The code of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<u64> {
        match self {
            Self::Refused(error) => error["code"].as_u64(),
            _ => None,
        }
    }
}

/// The runtime of a node: its CNI folders, and the plugin as it is installed there.
#[derive(Debug)]
pub struct Runtime {
    bin_dir: PathBuf,
    conf_dir: PathBuf,
    socket: PathBuf,
    state_dir: PathBuf,
    log: PathBuf,
}

impl Runtime {
    /// Folders for a node, with a network and without the plugin.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn of(directory: &Path, node: &Node) -> Result<Self, CniError> {
        let own = directory.join(node.name());
        let runtime = Self {
            bin_dir: own.join("cni-bin"),
            conf_dir: own.join("cni-conf"),
            socket: own.join("cni.sock"),
            state_dir: own.join("state"),
            log: own.join("runtime.log"),
        };
        let made = fs::create_dir_all(&runtime.conf_dir);
        made.map_err(|source| CniError::Io { doing: "make CNI folders", source })?;
        runtime.configure(&["ptp"])?;
        Ok(runtime)
    }

    /// Arguments for the agent that answers the plugin.
    #[must_use]
    pub fn agent_args(&self) -> Vec<String> {
        vec!["--cni-socket".to_owned(), self.socket.display().to_string()]
    }

    /// Arguments for an agent that answers the plugin and keeps it in place.
    #[must_use]
    pub fn installing_agent_args(&self) -> Vec<String> {
        let folders = [("--cni-conf-dir", &self.conf_dir), ("--cni-bin-dir", &self.bin_dir)];
        let folders = folders.map(|(flag, folder)| [flag.to_owned(), folder.display().to_string()]);
        self.agent_args().into_iter().chain(folders.concat()).collect()
    }

    /// Writes the node's network as another tool does: a chain of these plugins.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, plugins: &[&str]) -> Result<(), CniError> {
        self.configure_as("1.0.0", plugins)
    }

    /// The same by another version of the specification.
    ///
    /// # Errors
    /// As [`Runtime::configure`].
    pub fn configure_as(&self, version: &str, plugins: &[&str]) -> Result<(), CniError> {
        let plugins: Vec<Value> = plugins.iter().map(|kind| json!({"type": kind})).collect();
        let chain = json!({"cniVersion": version, "name": "net", "plugins": plugins});
        fs::write(self.chain_file(), chain.to_string())
            .map_err(|source| CniError::Io { doing: "write a CNI configuration", source })
    }

    /// The chain in force.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn chain(&self) -> Result<Vec<Value>, CniError> {
        Ok(self.configuration()?["plugins"].as_array().cloned().unwrap_or_default())
    }

    fn configuration(&self) -> Result<Value, CniError> {
        let text = fs::read_to_string(self.chain_file())
            .map_err(|source| CniError::Io { doing: "read the CNI configuration", source })?;
        serde_json::from_str(&text).map_err(|_| CniError::Unreadable(text))
    }

    fn chain_file(&self) -> PathBuf {
        self.conf_dir.join("10-net.conflist")
    }

    /// The plugin's program.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.bin_dir.join("nodemesh-cni")
    }

    /// The agent's state folder.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// `mesh-agent cni install` or `uninstall` for these folders. Returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn manage(&self, command: &str) -> Result<String, CniError> {
        self.manage_with(command, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// As [`Runtime::manage`].
    pub fn manage_with(&self, command: &str, arguments: &[&str]) -> Result<String, CniError> {
        let output = Command::new(programs::agent()?)
            .args(["cni", command])
            .args(arguments)
            .arg("--cni-bin-dir")
            .arg(&self.bin_dir)
            .arg("--cni-conf-dir")
            .arg(&self.conf_dir)
            .arg("--cni-socket")
            .arg(&self.socket)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .output()
            .map_err(|source| CniError::Io { doing: "manage the plugin", source })?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match output.status.success() {
            true => Ok(said),
            false => Err(CniError::Unreadable(String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    }

    /// ADD: what a runtime does between making a pod's network and starting its first process. Returns the result.
    ///
    /// # Errors
    /// The pod must not start.
    pub fn add(&self, pod: &Pod) -> Result<Value, CniError> {
        self.add_after(pod, &previous(pod))
    }

    /// ADD, after a plugin whose result was this.
    ///
    /// # Errors
    /// As [`Runtime::add`].
    pub fn add_after(&self, pod: &Pod, previous: &Value) -> Result<Value, CniError> {
        self.call("ADD", Some(pod), &json!({"prevResult": previous}))
    }

    /// CHECK.
    ///
    /// # Errors
    /// The pod is not as it should be.
    pub fn check(&self, pod: &Pod) -> Result<(), CniError> {
        self.call("CHECK", Some(pod), &json!({"prevResult": previous(pod)})).map(drop)
    }

    /// DEL.
    ///
    /// # Errors
    /// Never for want of an agent.
    pub fn del(&self, pod: &Pod) -> Result<(), CniError> {
        self.call("DEL", Some(pod), &json!({})).map(drop)
    }

    /// GC: all attachments but those of `pods` are gone.
    ///
    /// # Errors
    /// Never for want of an agent.
    pub fn gc(&self, pods: &[&Pod]) -> Result<(), CniError> {
        let valid: Vec<Value> =
            pods.iter().map(|pod| json!({"containerID": container(pod), "ifname": "eth0"})).collect();
        self.call("GC", None, &json!({"cni.dev/valid-attachments": valid})).map(drop)
    }

    /// What the plugin said on standard error so far, which a runtime puts into its log.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn said(&self) -> Result<String, CniError> {
        fs::read_to_string(&self.log).map_err(|source| CniError::Io { doing: "read the log", source })
    }

    /// Any command without a pod. Returns what was printed, `null` for nothing.
    ///
    /// # Errors
    /// When it fails.
    pub fn ask(&self, command: &str) -> Result<Value, CniError> {
        self.call(command, None, &json!({}))
    }

    fn call(&self, command: &str, pod: Option<&Pod>, more: &Value) -> Result<Value, CniError> {
        let io = |doing| move |source| CniError::Io { doing, source };
        // The runtime gives each plugin its own entry, with what is common.
        let mut config =
            self.chain()?.into_iter().find(|entry| entry["type"] == "nodemesh-cni").unwrap_or_default();
        let common = self.configuration()?;
        for key in ["cniVersion", "name"] {
            config[key] = common[key].clone();
        }
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut plugin = Command::new(self.program());
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", &self.bin_dir);
        if let Some(pod) = pod {
            let args = format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={}",
                pod.namespace(),
                pod.name(),
                pod.uid()
            );
            plugin
                .env("CNI_CONTAINERID", container(pod))
                .env("CNI_NETNS", pod.netns().path())
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", args);
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log).map_err(io("open the log"))?;
        let mut child = plugin
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(io("start the CNI plugin"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(config.to_string().as_bytes()).map_err(io("write to the CNI plugin"))?;
        }
        let output = child.wait_with_output().map_err(io("wait for the CNI plugin"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let printed = match text.trim() {
            "" => Value::Null,
            printed => serde_json::from_str(printed).map_err(|_| CniError::Unreadable(text.clone()))?,
        };
        match output.status.success() {
            true => Ok(printed),
            false => Err(CniError::Refused(printed)),
        }
    }
}

/// The runtime's id of a pod's sandbox.
fn container(pod: &Pod) -> String {
    format!("sandbox-{}", pod.uid())
}

/// What the plugin before ours has made.
#[must_use]
pub fn previous(pod: &Pod) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": pod.netns().path()}],
        "ips": [
            {"address": format!("{}/24", pod.ip4()), "interface": 0},
            {"address": format!("{}/64", pod.ip6()), "interface": 0},
        ],
        "dns": {},
    })
}
