//! `cargo xtask demo --cluster`: Bookinfo on a real Kubernetes, first without the mesh, then taken into it while it runs.

use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_tests::bookinfo::{NAMESPACE, TrafficReport};
use mesh_tests::clean;
use mesh_tests::cluster::{Bookinfo, Cluster, Enrolment, Mesh};
use mesh_tests::signals::stop_signals;
use nix::sys::signal::Signal;

use super::checks::{show, versions_seen};

/// How often the numbers are shown.
const REFRESH: Duration = Duration::from_secs(2);

/// How long the pods may take to join.
const ENROLMENT_LIMIT: Duration = Duration::from_secs(120);

/// How often is looked whether they have.
const LOOK: Duration = Duration::from_millis(200);

/// Pages that visitors see before the namespace joins the mesh.
const BEFORE: u64 = 100;

pub(crate) fn main(seconds: Option<u64>, visits: u32) -> ExitCode {
    match run(seconds, visits) {
        Ok(Some(checks)) => {
            tell(&checks);
            // Without `--for` the demo ends by Ctrl-C, which is no failure in itself. That there was no mesh to be seen is one.
            let is_good = checks.hold() || (seconds.is_none() && checks.pods.is_complete());
            if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing, if it was ended before there was something to judge.
fn run(seconds: Option<u64>, visits: u32) -> anyhow::Result<Option<Checks>> {
    if let Some(missing) = mesh_tests::require::missing() {
        anyhow::bail!("cannot run here: {missing}");
    }
    let stop = stop_signals()?;
    for remains in clean::leftovers(false) {
        eprintln!("removed {remains} of an earlier run");
    }
    tell(&"starting Kubernetes: control plane, nodes a and b, name server");
    let cluster = Cluster::start("demo", &["a", "b"]).context("the cluster")?;
    tell(&format!("    export KUBECONFIG={}", cluster.kubeconfig().display()));
    tell(&"installing the mesh: meshctl install --profile=minimal");
    let mesh = Mesh::install(&cluster)?;
    tell(&"starting Bookinfo, without the mesh");
    let app = Bookinfo::start(&cluster)?;
    let each = (visits / u32::try_from(cluster.nodes().len())?.max(1)).max(1);
    app.visit(each)?;
    let plain = app.pages(BEFORE)?;
    if ended(&stop, Duration::ZERO)? {
        return Ok(None);
    }
    tell(&format!("{} pages; now: kubectl label namespace {NAMESPACE} nodemesh.dev/mesh=enabled", plain.ok));
    mesh.enrol(NAMESPACE)?;
    let Some(pods) = all_join(&mesh, &stop)? else { return Ok(None) };
    tell(&said(&pods));
    if !pods.is_complete() {
        // It goes on, so that one can look.
        tell(&mesh.meshctl(&["status", "-o", "wide"])?);
    }
    let joined = app.traffic()?;
    let ends = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    while ends.is_none_or(|ends| Instant::now() < ends) {
        if ended(&stop, REFRESH)? {
            break;
        }
        let now = app.traffic()?;
        tell(&format!(
            "{:>8} pages  {:>3} failed  p50 {:>6.1} ms  {:?}",
            now.ok,
            now.failures(),
            f64::from(u32::try_from(now.p50_us).unwrap_or(u32::MAX)) / 1000.0,
            now.versions
        ));
    }
    Ok(Some(Checks { plain, pods, joined, traffic: app.traffic()? }))
}

/// Waits until the agents say of every pod of Bookinfo that it is in the mesh, or too long; nothing if somebody ended the demo meanwhile.
fn all_join(mesh: &Mesh<'_>, stop: &Receiver<Signal>) -> anyhow::Result<Option<Enrolment>> {
    let deadline = Instant::now() + ENROLMENT_LIMIT;
    loop {
        let pods = mesh.enrolment(NAMESPACE)?;
        if pods.is_complete() || Instant::now() >= deadline {
            return Ok(Some(pods));
        }
        if ended(stop, LOOK)? {
            return Ok(None);
        }
    }
}

/// Who is in the mesh; if not all are, what to do.
fn said(pods: &Enrolment) -> String {
    let Enrolment { enrolled, missing } = pods;
    let count = enrolled.len() + missing.len();
    if pods.is_complete() {
        return format!("all {count} pods of {NAMESPACE} are in the mesh, by their agents' word");
    }
    format!(
        "{} of {count} pods of {NAMESPACE} are in the mesh, not {}: `meshctl status -o wide` says why, and \
         `kubectl -n nodemesh-system logs daemonset/nodemesh-agent` what was tried",
        enrolled.len(),
        missing.join(", ")
    )
}

/// Whether somebody wants the demo to end, within so long.
fn ended(stop: &Receiver<Signal>, within: Duration) -> anyhow::Result<bool> {
    match stop.recv_timeout(within) {
        Ok(signal) => {
            tell(&format!("\n{signal}: cleaning up"));
            Ok(true)
        }
        Err(RecvTimeoutError::Timeout) => Ok(false),
        Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the signal thread has ended"),
    }
}

/// The terminal may be what went away.
fn tell(what: &impl fmt::Display) {
    drop(writeln!(io::stdout(), "{what}"));
}

/// The outcome of the demo.
struct Checks {
    /// Before the namespace joined.
    plain: TrafficReport,
    /// Who has joined.
    pods: Enrolment,
    /// What visitors had seen when all had.
    joined: TrafficReport,
    /// Over all.
    traffic: TrafficReport,
}

impl Checks {
    fn hold(&self) -> bool {
        self.rows().iter().all(|(holds, _)| *holds)
    }

    fn rows(&self) -> Vec<(bool, String)> {
        let TrafficReport { ok, failed, .. } = &self.traffic;
        let meshed = ok.saturating_sub(self.joined.ok);
        let mut rows = vec![
            (self.plain.ok > 0, format!("{} product pages without the mesh", self.plain.ok)),
            (self.pods.is_complete(), said(&self.pods)),
            (meshed > 0, format!("{meshed} product pages since then")),
            (failed.is_empty(), format!("{} failed requests", self.traffic.failures())),
        ];
        rows.extend(versions_seen(&self.traffic));
        rows
    }
}

impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(f, &self.rows(), &self.traffic)
    }
}
