//! Owns the agents' ends of the links: one task a node, by the agent's own code, and what each of them holds.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use bytes::Bytes;
use mesh_control::link::Kind;
use mesh_control::subscribe::ServiceAccountOptions;
use mesh_control::subscribe::channel::ControllerUrl;
use mesh_control::subscribe::store::{Holder, RefusedError};
use mesh_control::subscribe::visit::Visit;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::api::Api;
use super::changes::{Change, Tracker};
use super::cluster::{Cluster, agent_name};
use super::controller::{Controller, Published};
use super::objects::{self, AGENT, MESH};

/// Pause before a controller that is not there yet is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// After this long there is none.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// What is on its way when changes end is there after this.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// What the agents prove themselves with.
#[derive(Clone, Debug)]
pub(super) struct Papers {
    options: Vec<ServiceAccountOptions>,
}

impl Papers {
    /// Gets each agent a token that is bound to its pod, and the roots that the controller has made.
    pub(super) async fn issue(
        api: &Api,
        cluster: &Cluster,
        folder: &Path,
        controller: SocketAddr,
    ) -> anyhow::Result<Self> {
        let roots = folder.join("roots.pem");
        let secret = api.get(&format!("/api/v1/namespaces/{MESH}/secrets/nodemesh-ca")).await?;
        let root = secret["data"]["root-cert.pem"].as_str().context("the authority's Secret has no root")?;
        let root = base64::engine::general_purpose::STANDARD.decode(root).context("read the root")?;
        fs::write(&roots, root).with_context(|| format!("write {}", roots.display()))?;
        let mut options = Vec::new();
        for node in cluster.nodes() {
            let pod = agent_name(&node);
            let found = api.get(&format!("/api/v1/namespaces/{MESH}/pods/{pod}")).await?;
            let uid = found["metadata"]["uid"].as_str().context("a pod has no uid")?;
            let collection = format!("/api/v1/namespaces/{MESH}/serviceaccounts/{AGENT}/token");
            let granted = api.create(&collection, &objects::token_request(&pod, uid)).await?;
            let token = granted["status"]["token"].as_str().context("no token was granted")?;
            let token_file = folder.join(format!("{node}.token"));
            fs::write(&token_file, token).with_context(|| format!("write {}", token_file.display()))?;
            options.push(ServiceAccountOptions {
                controller: url(controller)?,
                server_name: Some(format!("nodemesh-controller.{MESH}.svc")),
                node,
                token_file,
                root_file: roots.clone(),
                state_dir: PathBuf::new(),
            });
        }
        Ok(Self { options })
    }

    /// The same for a controller at another address.
    pub(super) fn to(&self, controller: SocketAddr) -> anyhow::Result<Self> {
        let mut papers = self.clone();
        for options in &mut papers.options {
            options.controller = url(controller)?;
        }
        Ok(papers)
    }
}

fn url(controller: SocketAddr) -> anyhow::Result<ControllerUrl> {
    Ok(ControllerUrl::parse(&format!("https://{controller}"))?)
}

/// What an agent holds: versions by hashes of names, and no contents.
#[derive(Debug)]
struct Ledger {
    agent: usize,
    versions: HashMap<u64, u64>,
    tracker: Arc<Tracker>,
    /// Changes that came with the responses since the last commit.
    arrived: Vec<Arc<Change>>,
}

fn key(kind: Kind, name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (kind, name).hash(&mut hasher);
    hasher.finish()
}

fn version_of(text: &str) -> u64 {
    // Of the controllers that this measures versions are hashes; of another one no comparison would hold.
    u64::from_str_radix(text, 16).unwrap_or_default()
}

impl Holder for Ledger {
    fn versions(&self, _kind: Kind) -> std::collections::BTreeMap<String, String> {
        // It begins with nothing and is not kept beyond its link.
        Default::default()
    }

    fn set(
        &mut self,
        kind: Kind,
        name: Arc<str>,
        version: Arc<str>,
        body: Bytes,
    ) -> Result<(), RefusedError> {
        self.versions.insert(key(kind, &name), version_of(&version));
        if kind == Kind::Address {
            self.arrived.extend(self.tracker.fulfilled(&name, &version, &body));
        }
        Ok(())
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        self.versions.remove(&key(kind, name));
    }
}

/// The agents.
#[derive(Debug)]
pub(super) struct Fleet {
    agents: Vec<JoinHandle<anyhow::Result<Ledger>>>,
    nodes: Vec<String>,
    stop: watch::Sender<bool>,
    /// By agent: when it had its first whole state, and the generation it has now.
    progress: Vec<watch::Receiver<Option<(Instant, u64)>>>,
    tracker: Arc<Tracker>,
}

impl Fleet {
    /// Starts all of them at once.
    pub(super) fn start(papers: &Arc<Papers>) -> Self {
        let stop = watch::Sender::new(false);
        let tracker = Arc::new(Tracker::default());
        let (mut agents, mut progress) = (Vec::new(), Vec::new());
        for agent in 0..papers.options.len() {
            let (papers, tracker, mut stopped) = (Arc::clone(papers), Arc::clone(&tracker), stop.subscribe());
            let (told, seen) = watch::channel(None);
            progress.push(seen);
            agents.push(tokio::spawn(async move {
                let mut ledger = Ledger { agent, versions: HashMap::new(), tracker, arrived: Vec::new() };
                tokio::select! {
                    ended = attend(&papers.options[agent], &mut ledger, &told) => match ended {
                        Err(error) => return Err(error.context(format!("agent {agent}"))),
                        Ok(never) => match never {},
                    },
                    // The fleet is gone as well as told to stop.
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
                Ok(ledger)
            }));
        }
        let nodes = papers.options.iter().map(|options| options.node.clone()).collect();
        Self { agents, nodes, stop, progress, tracker }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.agents.len()
    }

    /// What arrives where.
    pub(super) fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Waits until each has had a whole state; returns when the last one had.
    pub(super) async fn synced(&self, limit: Duration) -> anyhow::Result<Instant> {
        let all = async {
            let mut last = None;
            for progress in &self.progress {
                let mut progress = progress.clone();
                let first = progress.wait_for(Option::is_some).await.context("an agent has lost its link")?;
                last = last.max(first.map(|(first, _)| first));
            }
            last.context("no agents")
        };
        timeout(limit, all).await.context("some agents were not in step in time")?
    }

    /// Waits until each has what the controller publishes, compares, and ends.
    pub(super) async fn end(
        self,
        controller: &Controller,
        measured: &super::changes::Churn,
    ) -> anyhow::Result<()> {
        ensure!(measured.lost == 0, "{} changes did not arrive at every agent", measured.lost);
        let settled = async {
            for progress in &self.progress {
                let generation = controller.generation()?;
                let mut progress = progress.clone();
                let is_there =
                    |seen: &Option<(Instant, u64)>| seen.is_some_and(|(_, seen)| seen >= generation);
                progress.wait_for(is_there).await.context("an agent has lost its link")?;
            }
            anyhow::Ok(())
        };
        let settled = timeout(SETTLE_LIMIT, settled).await;
        if !matches!(settled, Ok(Ok(()))) {
            self.first_failure().await?;
        }
        settled.context("some agents do not have the newest state")??;
        let published = controller.published()?;
        self.stop.send_replace(true);
        for (agent, node) in self.agents.into_iter().zip(&self.nodes) {
            let ledger = agent.await??;
            compare(&ledger, node, &published).with_context(|| format!("agent {}", ledger.agent))?;
        }
        Ok(())
    }

    /// The error of an agent that has ended, if one has.
    async fn first_failure(&self) -> anyhow::Result<()> {
        for (agent, node) in self.agents.iter().zip(&self.nodes) {
            if agent.is_finished() {
                bail!("the agent of {node} has lost its link; see its error in a run with fewer agents");
            }
        }
        Ok(())
    }
}

async fn attend(
    options: &ServiceAccountOptions,
    ledger: &mut Ledger,
    told: &watch::Sender<Option<(Instant, u64)>>,
) -> anyhow::Result<std::convert::Infallible> {
    let begun = Instant::now();
    let mut visit = loop {
        match Visit::begin(options, ledger).await {
            Ok(visit) => break visit,
            Err(error) if begun.elapsed() > CONNECT_LIMIT => return Err(error).context("connect"),
            Err(_not_yet) => sleep(RETRY_PAUSE).await,
        }
    };
    loop {
        let received = match visit.next(ledger).await {
            Ok(received) => received,
            Err(error) => {
                eprintln!("the agent of {} has lost its link: {error}", options.node);
                return Err(error).context("the link ended");
            }
        };
        ensure!(received.refused == 0, "refused {} resources", received.refused);
        let Some(generation) = received.commit else { continue };
        let now = Instant::now();
        for change in ledger.arrived.drain(..) {
            change.arrived_at(ledger.agent, now);
        }
        told.send_modify(|seen| *seen = Some((seen.map_or(now, |(first, _)| first), generation)));
    }
}

/// Fails unless the ledger has exactly what the controller publishes for a node.
fn compare(ledger: &Ledger, node: &str, published: &[Published]) -> anyhow::Result<()> {
    let mut wanted = HashMap::new();
    let is_for = |of: &&Published| of.nodes.as_ref().is_none_or(|nodes| nodes.iter().any(|of| of == node));
    for resource in published.iter().filter(is_for) {
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == resource.kind);
        let kind = kind.with_context(|| format!("unknown kind {}", resource.kind))?;
        wanted.insert(key(kind, &resource.name), version_of(&resource.version));
        let held = ledger.versions.get(&key(kind, &resource.name));
        let is_there = held == Some(&version_of(&resource.version));
        ensure!(is_there, "{} {} is not what is published", resource.kind, resource.name);
    }
    let beyond = ledger.versions.keys().filter(|key| !wanted.contains_key(key)).count();
    ensure!(beyond == 0, "holds {beyond} resources that are not published for it");
    Ok(())
}
