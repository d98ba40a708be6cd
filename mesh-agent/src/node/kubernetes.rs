//! Owns what an agent that runs as a pod of a DaemonSet does differently: it takes its world from the cluster's controller by its
//! service account, hears of its own pods from the API server, finds the kubelet, and borrows what its container lacks from the host.
//!
//! Invariants:
//! - Nothing here waits for the API server: without it the last state stays in force.
//! - The controller is told nothing but the token; it asks the API server which node that is.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_control::{
    kubernetes::client,
    source::kubernetes::node_pods::{self, NodePods},
    subscribe::{self, ServiceAccountOptions, channel::ControllerUrl},
};
use mesh_redirect::{Kubelet, host};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{interval, sleep},
};

use super::{local::LocalKnowledge, shared::Shared, source::Source};
use crate::{
    cli::{CNI_CONF_DIR, DEFAULT_CNI_SOCKET, NodeArgs},
    report::report,
};

/// Where the controller is.
const CONTROLLER: &str = "https://nodemesh-controller.nodemesh-system.svc:15012";
/// Where the kubelet puts the agent's token.
const TOKEN: &str = "/var/run/secrets/tokens/nodemesh-token";
/// How often the kubelet is looked for: it may be started again elsewhere.
const LOOK_EACH: Duration = Duration::from_secs(10);
/// Pause before the API server is tried again with files that could not be used.
const CLIENT_PAUSE: Duration = Duration::from_secs(5);

/// Prepares this process, and the arguments that the node has by default in a cluster. To be called before there are threads.
pub(super) fn prepare(args: &NodeArgs) -> anyhow::Result<NodeArgs> {
    let mut args = args.clone();
    let identity = &mut args.identity;
    host::enter_cgroup_namespace()?;
    identity.bpffs = host::bpf_file_system(&identity.bpffs)?;
    // Unlike the host's name, this is what the API server calls the node.
    identity.node = identity.node.take().or_else(|| std::env::var("NODE_NAME").ok());
    anyhow::ensure!(
        identity.node.is_some(),
        "name the node with --node or NODE_NAME: in a cluster its name is not always the host's"
    );
    if args.source.controller.is_none() {
        args.source.controller = Some(ControllerUrl::parse(CONTROLLER).map_err(anyhow::Error::msg)?);
    }
    args.link.token_file.get_or_insert_with(|| PathBuf::from(TOKEN));
    args.pods.cni_socket.get_or_insert_with(|| PathBuf::from(DEFAULT_CNI_SOCKET));
    args.pods.cni_conf_dir.get_or_insert_with(|| PathBuf::from(CNI_CONF_DIR));
    Ok(args)
}

/// The link to the cluster's controller; waits for it only if there is no state from before. The arguments are
/// [`prepare`]d.
pub(super) fn start(args: &NodeArgs, node: &str) -> anyhow::Result<Source> {
    let controller = args.source.controller.clone().context("no --controller")?;
    let options = ServiceAccountOptions {
        server_name: None,
        node: node.to_owned(),
        token_file: args.link.token_file.clone().context("no --token-file")?,
        root_file: args.link.root_cert.clone(),
        state_dir: args.identity.state_dir.clone(),
        controller: controller.clone(),
    };
    let link = subscribe::start_by_service_account(options)
        .with_context(|| format!("start the link to the controller {controller}"))?;
    Ok(Source { snapshots: link.snapshots.clone(), sources: link.sources.clone(), link: Some(link) })
}

/// Follows the node's pods at the API server, for ever.
pub(super) async fn follow_pods(node: &str, local: &LocalKnowledge) {
    let client = loop {
        match client::connect().await {
            Ok(client) => break client,
            Err(error) => {
                let error = report(&error);
                tracing::error!(
                    error,
                    "no watch of the node's own pods; the controller tells of them a little later"
                );
                sleep(CLIENT_PAUSE).await;
            }
        }
    };
    let (out, mut pods) = watch::channel(Arc::<NodePods>::default());
    let take = async {
        while pods.changed().await.is_ok() {
            let now = Arc::clone(&pods.borrow_and_update());
            local.set_declared(now.pods.clone(), now.namespaces.clone());
        }
    };
    tokio::join!(node_pods::follow(client, node, out), take);
}

/// Lets the probes of the kubelet through, wherever it runs; for ever.
pub(super) async fn follow_kubelet(shared: Arc<Shared>) {
    let mut known: Option<Kubelet> = None;
    let mut missed = false;
    let mut tick = interval(LOOK_EACH);
    loop {
        tick.tick().await;
        let found = match spawn_blocking(Kubelet::find).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(error = %report(&error), "look for the kubelet");
                continue;
            }
            Err(error) => {
                tracing::error!(%error, "look for the kubelet; this is a defect of the agent");
                return std::future::pending().await;
            }
        };
        let Some(found) = found else {
            if known.is_none() && !missed {
                missed = true;
                tracing::warn!(
                    "no process is the kubelet: probes of pods that only admit the mesh will fail; name its cgroup with --prober-cgroup"
                );
            }
            continue;
        };
        if known.as_ref().is_some_and(|known| known.cgroup == found.cgroup) {
            continue;
        }
        match shared.kernel.set_prober(&found.cgroup) {
            Ok(()) => {
                tracing::info!(pid = found.pid, cgroup = %found.cgroup.display(), "the kubelet's probes reach pods");
                known = Some(found);
            }
            Err(error) => {
                tracing::warn!(error = %report(&error), "let the kubelet's probes through; trying again")
            }
        }
    }
}
