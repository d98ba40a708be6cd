//! Owns the composition of a controller of a cluster: the API server as the source, the authority in a Secret, the server that agents
//! come to with their service account's token, the admission webhook, and what only the leader writes.
//!
//! Invariants:
//! - Every replica serves; one writes. Losing the lease ends the writing at once, and nothing else.
//! - It is ready when it has read the whole cluster and agents can come.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_control::{
    compile::MeshSettings,
    kubernetes::{
        authority::{AuthoritySecrets, SecretError},
        client, lease,
        names::MESH_CONFIG,
        roots, statuses,
        tokens::TokenReviews,
        webhook::{Webhook, WebhookMetrics, keep_ca_bundle},
    },
    publish::{
        auth::NodeProof,
        metrics::PublishMetrics,
        server::{Controller, ServerParts},
    },
    source::{
        document::Rules,
        kubernetes::{self as source, KubernetesOptions, KubernetesSource},
        pulse::Pulse,
    },
};
use mesh_core::snapshot::Name;
use mesh_identity::{Ca, ca::CaOptions, clock::SystemClock};
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::watch, time::sleep};

use super::{SHUTDOWN_WAIT, event_loop, listen, ops::Ops, say_ready, stop_signal, until_stopped};
use crate::{
    cli::ControllerArgs,
    node::{http, logging},
    report::report,
};

/// Pause before the API server is asked again for the authority.
const AUTHORITY_PAUSE: Duration = Duration::from_secs(2);
/// The Lease is given back within this time.
const RESIGN_WITHIN: Duration = Duration::from_secs(5);

/// Serves a cluster until told to stop.
pub(super) fn serve(args: &ControllerArgs) -> anyhow::Result<()> {
    logging::install(&args.log, args.log_format)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), namespace = args.namespace, "starting");
    let runtime = event_loop()?;
    let ended = runtime.block_on(async {
        let stop = stop_signal()?;
        tokio::pin!(stop);
        let ops_listener = listen(args.metrics, "metrics", "--metrics").await?;
        let mut registry = Registry::default();
        let metrics = Metrics {
            publish: PublishMetrics::register(&mut registry),
            webhook: WebhookMetrics::register(&mut registry),
        };
        let pulse = Pulse::default();
        let ops = Arc::new(Ops::new(registry, pulse.clone()));
        let answering = http::serve(ops_listener, Arc::clone(&ops));
        tokio::pin!(answering);
        let starting = Box::pin(Started::new(args, metrics, pulse, ops));
        let started = tokio::select! {
            started = starting => started?,
            () = &mut stop => return Ok(()),
            // It never ends by itself.
            () = &mut answering => return Ok(()),
        };
        Box::pin(started.run(stop, answering)).await
    });
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

struct Metrics {
    publish: PublishMetrics,
    webhook: WebhookMetrics,
}

/// A controller that has read the cluster.
struct Started {
    client: client::Client,
    namespace: String,
    secrets: AuthoritySecrets,
    ca: Arc<Ca>,
    source: KubernetesSource,
    controller: Controller,
    webhook: Arc<Webhook>,
    webhook_listener: TcpListener,
    ops: Arc<Ops>,
}

impl Started {
    async fn new(
        args: &ControllerArgs,
        metrics: Metrics,
        pulse: Pulse,
        ops: Arc<Ops>,
    ) -> anyhow::Result<Self> {
        let namespace = args.namespace.clone();
        let root_namespace = args.trust.root_namespace.clone().unwrap_or_else(|| namespace.clone());
        // What cannot be had is said before anything is waited for.
        let listener = listen(args.listen, "agents", "--listen").await?;
        let webhook_listener = listen(args.webhook_listen, "the API server", "--webhook-listen").await?;
        let client = client::connect().await?;

        let secrets = AuthoritySecrets::new(client.clone(), &namespace);
        let plugged = loop {
            match secrets.load_or_make(&args.trust.trust_domain, args.trust.key_algorithm).await {
                Ok(plugged) => break plugged,
                Err(error @ SecretError::Api(..)) => {
                    tracing::warn!(error = %report(&error), "waiting for the root of the mesh");
                    sleep(AUTHORITY_PAUSE).await;
                }
                Err(error) => return Err(error).context("get the root of the mesh"),
            }
        };
        let known = loop {
            match roots::known(client.clone(), &namespace).await {
                Ok(known) => break known,
                Err(error) => {
                    tracing::warn!(error = %report(&error), "waiting for the roots that were published so far");
                    sleep(AUTHORITY_PAUSE).await;
                }
            }
        };
        let options = CaOptions {
            algorithm: args.trust.key_algorithm,
            known,
            ..CaOptions::new(&args.trust.ca_dir, args.trust.trust_domain.as_str())
        };
        let ca = Ca::open_with(options, Some(plugged)).with_context(|| {
            format!(
                "open the certificate authority; its journal is in {}, see --ca-dir",
                args.trust.ca_dir.display()
            )
        })?;
        let ca = Arc::new(ca);

        let rules = Rules {
            root_namespace: root_namespace.clone(),
            mesh_config: Name::new(&*namespace, MESH_CONFIG),
        };
        let options = KubernetesOptions {
            mesh: MeshSettings {
                cluster_domain: args.cluster_domain.clone(),
                root_namespace,
                trust_domain: args.trust.trust_domain.clone(),
                read_secrets: args.read_secrets,
                agent_nodes: args.agent_nodes.clone(),
            },
            mesh_config: rules.mesh_config.clone(),
        };
        let source = source::start(client.clone(), options, pulse).await?;
        ca.set_trust_domain(Arc::clone(&source.snapshots.borrow().mesh().trust_domain));

        let webhook = Arc::new(Webhook { rules, metrics: metrics.webhook });
        let clock = Arc::new(SystemClock);
        let reviews = TokenReviews::new(
            client.clone(),
            namespace.as_str(),
            source.snapshots.clone(),
            Arc::clone(&clock) as _,
        );
        let parts = ServerParts {
            listener,
            ca: Arc::clone(&ca),
            proof: NodeProof::ServiceAccount(Box::new(reviews)),
            namespace: namespace.clone(),
            cluster_domain: args.cluster_domain.clone(),
            own_ttl: args.own_certificate_ttl,
            session_age: None,
            snapshots: source.snapshots.clone(),
            sources: source.sources.clone(),
            clock,
            metrics: metrics.publish,
        };
        let controller = Controller::new(parts).context("start the server")?;
        ops.serve(controller.publication(), ca.trust());
        Ok(Self { client, namespace, secrets, ca, source, controller, webhook, webhook_listener, ops })
    }

    /// Runs until told to stop, and `answering` what operators ask with it.
    async fn run(
        self,
        told: impl Future<Output = ()>,
        answering: impl Future<Output = ()>,
    ) -> anyhow::Result<()> {
        let Self { client, namespace, secrets, ca, source, controller, .. } = self;
        let election = lease::Election::new(client.clone(), &namespace, own_name());
        let leading = election.leading();
        let resign = watch::Sender::new(false);
        let mut resigning = resign.subscribe();
        let election = tokio::spawn(election.run(async move {
            // The sender is gone only when all of this is.
            resigning.wait_for(|resign| *resign).await.ok();
        }));
        let ops = Arc::clone(&self.ops);
        let stop = async {
            told.await;
            ops.drain();
            tracing::info!("stopping");
        };
        tracing::info!(listen = %controller.addr(), identity = %controller.identity(), "ready");
        say_ready();
        let (trust, tls) = (ca.trust(), controller.tls());
        let write = || {
            let (client, trust) = (client.clone(), trust.clone());
            let (judged, ca, own) = (source.judged.clone(), Arc::clone(&ca), namespace.clone());
            async move {
                tokio::join!(
                    roots::publish(client.clone(), own, ca),
                    keep_ca_bundle(client.clone(), trust),
                    statuses::write(client, judged),
                );
            }
        };
        // Parts that never end by themselves; they are dropped with the server.
        let background = async {
            tokio::join!(
                Arc::clone(&ca).run(),
                secrets.follow(Arc::clone(&ca)),
                answering,
                Arc::clone(&self.webhook).serve(self.webhook_listener, tls),
                lease::while_leading(leading, write),
            );
        };
        let ended = Box::pin(until_stopped(controller.run(stop), background)).await;
        resign.send_replace(true);
        if tokio::time::timeout(RESIGN_WITHIN, election).await.is_err() {
            tracing::warn!("the lease was not given back; another controller leads when it has run out");
        }
        ended
    }
}

/// A name of this very process: that of the pod, and when it began.
fn own_name() -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let began = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}_{:x}", host.as_deref().unwrap_or("controller"), began.as_nanos())
}
