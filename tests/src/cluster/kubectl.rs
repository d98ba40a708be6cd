//! kubectl as somebody: how tests and the harness talk to the API server.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// kubectl failed.
#[derive(Debug, thiserror::Error)]
pub enum KubectlError {
    /// It could not be started or fed.
    #[error("cannot run kubectl {args}")]
    Run {
        /// Its arguments.
        args: String,
        /// Why not.
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("kubectl {args}: {message}")]
    Refused {
        /// Its arguments.
        args: String,
        /// Its standard error.
        message: String,
    },
    /// Its output is no JSON.
    #[error("kubectl {args} printed no JSON")]
    NoJson {
        /// Its arguments.
        args: String,
        /// Why not.
        source: serde_json::Error,
    },
}

/// kubectl with one kubeconfig. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    pub(crate) fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self { program, kubeconfig }
    }

    /// The kubeconfig it uses.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Its standard output for these arguments.
    ///
    /// # Errors
    /// When it cannot be run or ends badly.
    pub fn run(&self, args: &[&str]) -> Result<String, KubectlError> {
        self.feed(args, "")
    }

    /// Names of all that the mesh or its installation made, as their label says: nothing after it was taken out.
    ///
    /// # Errors
    /// When it cannot be run or ends badly.
    pub fn objects_of_the_mesh(&self) -> Result<Vec<String>, KubectlError> {
        let kinds = "crd,clusterrole,clusterrolebinding,validatingwebhookconfiguration,namespace,configmap,secret,serviceaccount,role,\
            rolebinding,service,deployment,daemonset,poddisruptionbudget,lease";
        let found =
            self.run(&["get", kinds, "-A", "-l", "app.kubernetes.io/part-of=nodemesh", "-o", "name"])?;
        Ok(found.lines().map(ToOwned::to_owned).collect())
    }

    /// Ends a namespace that is being deleted, as its controller would where there is one.
    ///
    /// # Errors
    /// When it cannot be run or ends badly.
    pub fn finalize(&self, mut namespace: Value) -> Result<(), KubectlError> {
        let path = namespace["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!("/api/v1/namespaces/{path}/finalize");
        namespace["spec"]["finalizers"] = Value::Array(Vec::new());
        self.feed(&["replace", "--raw", &path, "-f", "-"], &namespace.to_string()).map(drop)
    }

    /// As [`Kubectl::run`], with something on standard input.
    ///
    /// # Errors
    /// When it cannot be run or ends badly.
    pub fn feed(&self, args: &[&str], input: &str) -> Result<String, KubectlError> {
        let shown = args.join(" ");
        let failed = |source| KubectlError::Run { args: shown.clone(), source };
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // Inputs are far smaller than a pipe's buffer or read at once; a reader that ended says why itself.
            drop(stdin.write_all(input.as_bytes()));
        }
        let output = child.wait_with_output().map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(KubectlError::Refused { args: shown, message })
    }

    /// The JSON it prints; `-o json` is added.
    ///
    /// # Errors
    /// As [`Kubectl::run`], or when its output is no JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value, KubectlError> {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let text = self.run(&all)?;
        serde_json::from_str(&text).map_err(|source| KubectlError::NoJson { args: args.join(" "), source })
    }

    /// Apply manifests on the server's side, as the field manager `test`.
    ///
    /// # Errors
    /// When one of them is refused.
    pub fn apply(&self, manifests: &str) -> Result<String, KubectlError> {
        self.feed(
            &["apply", "--server-side", "--field-manager=test", "--force-conflicts", "-f", "-"],
            manifests,
        )
    }

    /// The command, for a caller who wants to watch it run.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("KUBECONFIG", &self.kubeconfig);
        // Discovery is cached below HOME otherwise: shared by clusters that have nothing in common but a port.
        let cache = self.kubeconfig.with_extension("cache");
        command.env("KUBECACHEDIR", cache);
        command
    }
}
