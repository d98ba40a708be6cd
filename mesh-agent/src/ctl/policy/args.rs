//! Owns the command line of `meshctl policy`.

use std::{net::IpAddr, path::PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use mesh_core::identity::Identity;

/// Options of `policy`.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: PolicyCommand,
}

/// Questions about policies.
#[derive(Clone, Debug, Subcommand)]
pub enum PolicyCommand {
    /// Whether the manifests let one connection through, and which policy and rule decide. Needs no agent.
    #[command(after_help = "Examples:\n  \
        # pod to pod, with the identity and address the client has in the manifests\n  \
        meshctl policy test -f mesh/ --from shop/cart --to shop/reviews-1:9080\n  \
        # the same client, outside the mesh\n  \
        meshctl policy test -f mesh/ --from shop/cart --plaintext --to shop/reviews-1:9080\n  \
        # somebody with a certificate, from an address\n  \
        meshctl policy test -f pods.yaml -f policies.yaml --principal spiffe://cluster.local/ns/shop/sa/cart \
        --from-ip 10.0.0.7 --to reviews-1:9080\n  \
        # plaintext from an address\n  \
        meshctl policy test -f mesh/ --from-ip 192.0.2.1 --to reviews-1:http -o json\n  \
        # everybody to everybody, or one client to all\n  \
        meshctl policy test -f mesh/ --matrix\n  \
        meshctl policy test -f mesh/ --matrix --from shop/cart -o json | jq '.rows[] | select(.verdict == \"deny\")'\n\n\
        Ports are the workload's own (the target port of a Service). L7 fields are judged as an L4 connection: an ALLOW\n\
        rule with one allows nothing, and in a DENY rule it counts as matching.\n\n\
        Exit status: 0 allowed (or a matrix), 1 denied, 2 wrong usage or manifests that cannot be used.")]
    Test(PolicyTestArgs),
}

/// Options of `policy test`.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("who").args(["from", "principal", "from_ip", "matrix"]).multiple(true).required(true)))]
pub struct PolicyTestArgs {
    /// Manifests: files, or folders with all below them; `-` is standard input.
    #[arg(short = 'f', long = "file", value_name = "FILE|DIR", required = true, num_args = 1..)]
    pub files: Vec<PathBuf>,
    /// The client: a pod of the manifests, `NAMESPACE/NAME`, or `NAME` if that is unique.
    #[arg(long, value_name = "POD", conflicts_with_all = ["principal", "from_ip"])]
    pub from: Option<String>,
    /// The client: whoever proves this identity with a certificate (`spiffe://` may be left out).
    #[arg(long, value_name = "SPIFFE", value_parser = principal, conflicts_with = "plaintext")]
    pub principal: Option<Identity>,
    /// The client's address; without --principal it connects in plaintext.
    #[arg(long, value_name = "IP")]
    pub from_ip: Option<IpAddr>,
    /// The client connects in plaintext, so it proves no identity.
    #[arg(long)]
    pub plaintext: bool,
    /// The server: a pod of the manifests, and a port of it by number or by the name a container gives it.
    #[arg(long, value_name = "POD:PORT", value_parser = pod_port, required_unless_present = "matrix")]
    pub to: Option<(String, String)>,
    /// All pods to all ports; --from and --to narrow it.
    #[arg(long, conflicts_with_all = ["principal", "from_ip", "plaintext"])]
    pub matrix: bool,
    /// Namespace of mesh-wide policies and of the MeshConfig.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    pub root_namespace: String,
    /// Trust domain of the pods, unless the MeshConfig of the manifests names one.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,
}

fn principal(text: &str) -> Result<Identity, String> {
    let text = if text.contains("://") { text.to_owned() } else { format!("spiffe://{text}") };
    Identity::parse(&text).map_err(|error| format!("{text:?} {error}"))
}

/// Checks the form only.
fn pod_port(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once(':') {
        Some((pod, port)) if !pod.is_empty() && !port.is_empty() && !pod.contains(':') => {
            Ok((pod.to_owned(), port.to_owned()))
        }
        _ => Err("want POD:PORT, e.g. shop/reviews-1:9080".to_owned()),
    }
}
