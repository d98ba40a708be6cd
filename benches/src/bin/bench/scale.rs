//! Owns `bench scale`: a controller of a large cluster, on the real API server.
//!
//! The cluster is objects alone: what kubelets and Kubernetes' own controllers would write, this program writes. The controller is the
//! real program, and so is the agents' end of the link (connection, proof by a service account's token, requests, answers); behind it
//! there is a ledger of versions in the place of an agent.
//!
//! Invariant: a run that measured something else than it says fails: a change that did not arrive everywhere, an agent that lost its
//! link, or one that holds in the end anything but what the controller publishes.

mod agents;
mod api;
mod changes;
mod cluster;
mod controller;
mod objects;
mod outcome;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use mesh_tests::cluster::ApiServer;

use self::agents::{Fleet, Papers};
use self::api::Api;
use self::changes::{Churn, Plan};
use self::cluster::Cluster;
use self::controller::Controller;
use self::outcome::Outcome;
use crate::rows;

/// How long the agents may take to be in step with a controller.
const SYNC_LIMIT: Duration = Duration::from_secs(120);
/// Rest before a measurement, so that what came before is not in it.
const REST: Duration = Duration::from_secs(3);

/// Options of `bench scale`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Write the rows here, as a JSON array.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How the rows are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Nodes, each with an agent.
    #[arg(long, value_name = "N", default_value_t = 200)]
    agents: usize,
    /// Services, each with a service account and an EndpointSlice.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    services: usize,
    /// Pods, spread over services and nodes.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pods: usize,
    /// Endpoint changes a second.
    #[arg(long, value_name = "N", default_value_t = 100)]
    rate: u32,
    /// Seconds of changes with all services; a third of that with half of them.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
    /// Of a hundred changes so many are a pod that is replaced by another one; the rest becomes ready or unready.
    #[arg(long, value_name = "PERCENT", default_value_t = 10)]
    replaced: u32,
    /// Leave the controller and everything else running for so many seconds under changes, to look at it with other tools.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    linger: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Runs it; fails when something could not be measured, not when a target is missed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.agents > 0 && options.rate > 0 && options.seconds > 0, "nothing to measure");
    ensure!(options.services >= 2, "--services must be at least 2");
    ensure!(options.pods >= options.services, "--pods must be at least --services: each has one");
    ensure!(options.replaced <= 100, "--replaced is a percentage");
    let server = ApiServer::start("bench-scale")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = measure(&server, options) => outcome,
            // Dropping everything ends it.
            stopped = tokio::signal::ctrl_c() => {
                stopped.context("listen for SIGINT")?;
                anyhow::bail!("stopped")
            }
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    let outcome = outcome?;
    let rows = outcome.rows();
    match options.output {
        Output::Text => {
            rows::print(&rows);
            println!("\n{}", outcome.explained(options));
        }
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
    }
    if let Some(path) = &options.json {
        rows::write_json(&rows, path)?;
    }
    Ok(())
}

async fn measure(server: &ApiServer, options: &Options) -> anyhow::Result<Outcome> {
    let api = Api::connect(&server.kubeconfig()).await?;
    let cluster = Arc::new(Cluster::new(options.agents, options.services, options.pods));
    let half = options.services / 2;
    let began = Instant::now();
    cluster.lay_out(&api, 0..half).await?;
    say(began, &format!("{half} services with their pods are written"));

    let folder = server.directory().join("scale");
    let first = Controller::start(&server.kubeconfig(), &folder, "first")?;
    let papers = Arc::new(Papers::issue(&api, &cluster, &folder, first.xds()).await?);
    let fleet = Fleet::start(&papers);
    fleet.synced(SYNC_LIMIT).await?;
    tokio::time::sleep(REST).await;
    let plan = |seconds, services| Plan {
        services,
        rate: options.rate,
        time: Duration::from_secs(u64::from(seconds)),
        replaced: options.replaced,
    };
    let with_half =
        Churn::run(&api, &cluster, &fleet, &first, &plan((options.seconds / 3).max(1), 0..half)).await?;
    say(began, "changes with half of the services are done");
    fleet.end(&first, &with_half).await?;
    drop(first);

    cluster.lay_out(&api, half..options.services).await?;
    say(began, "all services are written");
    let controller = Controller::start(&server.kubeconfig(), &folder, "second")?;
    let papers = Arc::new(papers.to(controller.xds())?);
    let fleet = Fleet::start(&papers);
    let synced = fleet.synced(SYNC_LIMIT).await?;
    let cold_start = synced.saturating_duration_since(controller.started());
    let ready = controller.ready_after();
    let (bytes, cpu) = (controller.bytes_sent()?, controller.cpu()?);
    say(
        began,
        &format!("all agents are in step {:.1} s after the controller's start", cold_start.as_secs_f64()),
    );
    tokio::time::sleep(REST).await;
    let whole =
        Churn::run(&api, &cluster, &fleet, &controller, &plan(options.seconds, 0..options.services)).await?;
    let memory = controller.memory()?;
    if options.linger > 0 {
        say(began, &format!("lingering; the controller is process {}", controller.id()));
        Churn::run(&api, &cluster, &fleet, &controller, &plan(options.linger, 0..options.services)).await?;
    }
    fleet.end(&controller, &whole).await?;
    Ok(Outcome { agents: options.agents, half: with_half, whole, cold_start, ready, bytes, cpu, memory })
}

fn say(began: Instant, what: &str) {
    eprintln!("{:6.1} s  {what}", began.elapsed().as_secs_f64());
}
