//! Owns `meshctl proxy-config`: its command line, its questions, and the text of the answers.

mod text;

use std::net::IpAddr;

use clap::Subcommand;

pub(super) use self::text::{retries, time};

use super::{ANSWER_WITHIN, CtlError, Output, client::Client, print};
use crate::view::{ClustersView, EndpointsView, ListenersView, RoutesView, paths};

/// What of a pod's configuration.
#[derive(Clone, Debug, Subcommand)]
pub enum ProxyConfigCommand {
    /// The rules of hosts and ports: matches, where to, time-outs, retries, and the line each is from.
    #[command(
        visible_aliases = ["route", "r"],
        after_help = "Examples:\n  meshctl proxy-config routes shop/cart\n  \
            meshctl proxy-config routes shop/cart --host reviews --port 9080 -o yaml\n\n\
            Rules are tried from the top; the first that matches is the one. `meshctl explain` says which one a request gets."
    )]
    Routes(RoutesArgs),
    /// The destinations: ports of services and their subsets, how endpoints are chosen, limits, outlier detection, TLS.
    #[command(
        visible_aliases = ["cluster", "c"],
        after_help = "Examples:\n  meshctl proxy-config clusters shop/cart\n  \
            meshctl proxy-config clusters shop/cart --fqdn reviews.shop --subset v2 -o json"
    )]
    Clusters(ClustersArgs),
    /// The endpoints of destinations: weight, priority, health, and what this pod's requests have under way.
    #[command(
        visible_aliases = ["endpoint", "ep"],
        after_help = "Examples:\n  meshctl proxy-config endpoints shop/cart --host reviews\n  \
            meshctl proxy-config endpoints shop/cart -o json | jq '.endpoints[] | select(.status == \"EJECTED\")'\n\n\
            Ejections and failures are those of the pod's own requests: each pod judges for itself."
    )]
    Endpoints(EndpointsArgs),
    /// What takes a pod's connections: the agent's listeners, and what the kernel does with each service port.
    #[command(
        visible_aliases = ["listener", "l"],
        after_help = "Examples:\n  meshctl proxy-config listeners shop/cart\n  \
            meshctl proxy-config listeners shop/cart --host reviews\n\n\
            DIRECT: the kernel connects to a backend, the agent steps in only where it must; PROXY: the agent relays; HTTP: and looks at requests."
    )]
    Listeners(ListenersArgs),
}

/// Whose view, and of which host.
#[derive(Clone, Debug, clap::Args)]
pub struct SeenArgs {
    /// A pod of this node, `NAMESPACE/NAME`, or `NAME` if that is unique; without it: what everybody sees.
    #[arg(value_name = "POD", add = clap_complete::ArgValueCompleter::new(crate::ctl::complete::pods))]
    pub pod: Option<String>,
    /// Only this host: its full name, or the beginning of it (`reviews`, `reviews.shop`).
    #[arg(long, visible_alias = "fqdn", value_name = "NAME")]
    pub host: Option<String>,
    /// Only this service port.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
}

/// Options of `routes`.
#[derive(Clone, Debug, clap::Args)]
pub struct RoutesArgs {
    /// Whose view, and of which host.
    #[command(flatten)]
    pub seen: SeenArgs,
}

/// Options of `clusters`.
#[derive(Clone, Debug, clap::Args)]
pub struct ClustersArgs {
    /// Whose view, and of which host.
    #[command(flatten)]
    pub seen: SeenArgs,
    /// Only this subset.
    #[arg(long, value_name = "NAME")]
    pub subset: Option<String>,
}

/// Options of `endpoints`.
#[derive(Clone, Debug, clap::Args)]
pub struct EndpointsArgs {
    /// Whose view, and of which host.
    #[command(flatten)]
    pub seen: SeenArgs,
    /// Only this subset.
    #[arg(long, value_name = "NAME")]
    pub subset: Option<String>,
    /// Only this address.
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
}

/// Options of `listeners`.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenersArgs {
    /// Whose view, and of which host.
    #[command(flatten)]
    pub seen: SeenArgs,
    /// Only this address.
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
}

/// The parameters of a question.
fn query(seen: &SeenArgs, subset: Option<&String>, address: Option<IpAddr>) -> Vec<(&'static str, String)> {
    let all = [
        ("pod", seen.pod.clone()),
        ("host", seen.host.clone()),
        ("port", seen.port.map(|port| port.to_string())),
        ("subset", subset.cloned()),
        ("address", address.map(|address| address.to_string())),
    ];
    all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// Answers one question; `pod` is the full name of the pod that it is about, where that was looked up.
pub(super) fn run(
    client: &Client,
    command: &ProxyConfigCommand,
    pod: Option<String>,
    out: Output,
) -> Result<(), CtlError> {
    let seen = |seen: &SeenArgs| SeenArgs { pod: pod.clone().or_else(|| seen.pod.clone()), ..seen.clone() };
    match command {
        ProxyConfigCommand::Routes(RoutesArgs { seen: of }) => {
            let view: RoutesView = ask(client, paths::ROUTES, &query(&seen(of), None, None))?;
            print(out, &view, |view| text::routes(view, out.is_wide()))
        }
        ProxyConfigCommand::Clusters(ClustersArgs { seen: of, subset }) => {
            let view: ClustersView = ask(client, paths::CLUSTERS, &query(&seen(of), subset.as_ref(), None))?;
            print(out, &view, |view| text::clusters(view, out.is_wide()))
        }
        ProxyConfigCommand::Endpoints(EndpointsArgs { seen: of, subset, address }) => {
            let query = query(&seen(of), subset.as_ref(), *address);
            let view: EndpointsView = ask(client, paths::ENDPOINTS, &query)?;
            print(out, &view, text::endpoints)
        }
        ProxyConfigCommand::Listeners(ListenersArgs { seen: of, address }) => {
            let view: ListenersView = ask(client, paths::LISTENERS, &query(&seen(of), None, *address))?;
            print(out, &view, text::listeners)
        }
    }
}

impl ProxyConfigCommand {
    /// The pod that is asked about, if one is.
    pub(super) fn pod(&self) -> Option<&str> {
        let seen = match self {
            Self::Routes(args) => &args.seen,
            Self::Clusters(args) => &args.seen,
            Self::Endpoints(args) => &args.seen,
            Self::Listeners(args) => &args.seen,
        };
        seen.pod.as_deref()
    }
}

fn ask<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
    query: &[(&'static str, String)],
) -> Result<T, CtlError> {
    let query: Vec<(&str, &str)> = query.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Ok(client.ask(path, &query, ANSWER_WITHIN)?)
}
