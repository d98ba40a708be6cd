//! Owns where a node's configuration comes from: a directory of manifests, or a controller.

use std::{fmt, fs, path::Path, sync::Arc};

use anyhow::Context as _;
use mesh_control::{
    compile::MeshSettings,
    link::{
        files::{RunFolder, certificates},
        token::JoinSecret,
    },
    publish::server::controller_identity,
    source::file::FileSource,
    status::SourceStatus,
    subscribe::{self, SubscribeOptions, Subscription, channel::ControllerUrl},
};
use mesh_core::snapshot::Snapshot;
use mesh_identity::TrustMaterial;
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::kubernetes;
use crate::cli::{NodeArgs, SourceArgs};

/// A source that has its first state.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) sources: watch::Receiver<Arc<SourceStatus>>,
    /// With a controller: certificates come from it too.
    pub(super) link: Option<Subscription>,
}

/// Starts the source that the arguments name. Blocks until there is a first state.
pub(super) fn start(args: &NodeArgs, node: &str, mesh: MeshSettings) -> anyhow::Result<Source> {
    if args.kubernetes {
        return kubernetes::start(args, node);
    }
    if let Some(controller) = &args.source.controller {
        let options = options(args, controller, node)?;
        let link = subscribe::start(options)
            .with_context(|| format!("start the link to the controller {controller}"))?;
        return Ok(Source {
            snapshots: link.snapshots.clone(),
            sources: link.sources.clone(),
            link: Some(link),
        });
    }
    let config =
        args.source.config.as_ref().context("neither --config, --controller nor --kubernetes is given")?;
    let (snapshots, sources) = FileSource::start(config, mesh)?;
    Ok(Source { snapshots, sources, link: None })
}

/// What the node needs to trust the controller and to be trusted, from flags or from the controller of this host.
fn options(args: &NodeArgs, controller: &ControllerUrl, node: &str) -> anyhow::Result<SubscribeOptions> {
    let link = &args.link;
    let run = RunFolder::new(&link.run_dir, controller.port());
    let hint = |flag: &str, path: &Path| {
        format!(
            "read {}; a controller of this host leaves it there, for one of another host give {flag}",
            path.display()
        )
    };
    let roots_path = link.controller_ca.clone().unwrap_or_else(|| run.roots());
    let pem = fs::read(&roots_path).with_context(|| hint("--controller-ca", &roots_path))?;
    let roots =
        certificates(&pem).with_context(|| format!("read certificates from {}", roots_path.display()))?;
    let token = match &link.token_file {
        Some(path) => {
            let text =
                fs::read_to_string(path).with_context(|| format!("read the token {}", path.display()))?;
            Zeroizing::new(Zeroizing::new(text).trim().to_owned())
        }
        None => {
            let path = run.secret();
            let text = fs::read_to_string(&path).map(Zeroizing::new);
            let text = text.with_context(|| hint("--token-file", &path))?;
            let secret = JoinSecret::parse(&text).with_context(|| format!("read {}", path.display()))?;
            Zeroizing::new(secret.token(node))
        }
    };
    // The controller of this host says who it is; of another one the flags do.
    let said = match link.controller_ca {
        None => run.read_identity().context("read who the controller of this host is")?,
        Some(_) => None,
    };
    let identity =
        said.unwrap_or_else(|| controller_identity(&args.trust.trust_domain, args.trust.root_namespace()));
    Ok(SubscribeOptions {
        controller: controller.clone(),
        identity,
        roots: TrustMaterial { roots, ..TrustMaterial::default() },
        node: node.to_owned(),
        token: Some(token),
        state_dir: args.identity.state_dir.clone(),
    })
}

impl fmt::Display for SourceArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.controller, &self.config) {
            (Some(controller), _) => controller.fmt(f),
            (None, Some(config)) => config.display().fmt(f),
            (None, None) => f.write_str("nothing"),
        }
    }
}
