//! Owns the command line of `meshctl`.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use super::{
    bug_report::BugReportArgs,
    cluster::ClusterArgs,
    install::{InstallArgs, ManifestCommand, PrecheckArgs, UninstallArgs, VerifyArgs},
    policy::PolicyArgs,
    proxy_config::ProxyConfigCommand,
    validate::{AnalyzeArgs, ValidateArgs},
};

/// Where the agent listens unless told otherwise; both programs use it.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/nodemesh/admin.sock";

/// Installs Nodemesh, and asks its agents what they do and why: the one of this node, or those of a cluster.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "meshctl",
    version,
    propagate_version = true,
    after_help = "Examples:\n  \
        meshctl status\n  \
        meshctl explain --from shop/cart --to reviews:9080\n  \
        meshctl connections -o json | jq '.connections[].service'\n  \
        meshctl --admin-socket /run/nodemesh/n2.sock top\n  \
        meshctl --context prod status\n\n\
        Without --admin-socket, --context and --kubeconfig the agent of this host is asked if there is one, else the agents of\n\
        the kubeconfig's cluster.\n\n\
        Exit status: 0 answered, 1 no answer (see the message), 2 wrong usage."
)]
pub struct Args {
    /// Admin socket of the agent to ask. [default: /run/nodemesh/admin.sock]
    #[arg(long, global = true, env = "MESH_ADMIN_SOCKET", value_name = "PATH", conflicts_with_all = ["context", "kubeconfig"])]
    pub admin_socket: Option<PathBuf>,
    /// Which cluster, and where in it.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Form of the answer.
    #[arg(short, long, global = true, value_enum, value_name = "FORM", default_value_t = Output::Text)]
    pub output: Output,
    /// What to ask.
    #[command(subcommand)]
    pub command: Command,
}

/// Form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables for people.
    #[value(alias = "table", alias = "short")]
    Text,
    /// Tables with more in them, where there is more.
    Wide,
    /// One JSON document; field names are stable.
    Json,
    /// The same as YAML.
    Yaml,
}

/// A shell that completes commands and names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// Bash, from version 4 on.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}

impl Output {
    /// Whether people read it.
    pub(super) fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Wide)
    }

    /// Whether there is room for more columns.
    pub(super) fn is_wide(self) -> bool {
        self == Self::Wide
    }
}

/// Questions.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// The agent, its pods, its programs and maps, and what is wrong with the configuration.
    #[command(after_help = "Examples:\n  meshctl status\n  \
        meshctl status -o json | jq -r '.pods[] | select(.state != \"enrolled\") | .name + \": \" + .reason'")]
    Status,
    /// Live connections of this node's pods, proxied and direct.
    #[command(after_help = "Examples:\n  meshctl connections\n  \
        meshctl connections -o json | jq '[.connections[] | select(.path == \"direct\")] | length'")]
    Connections,
    /// The certificates of this node's workloads: whose, until when, by which roots, and what went wrong.
    #[command(after_help = "Examples:\n  meshctl certificates\n  \
        meshctl certificates -o json | jq '.certificates[] | select(.state != \"valid\")'")]
    Certificates,
    /// Who talks to whom right now: rates, failures and latency per edge.
    #[command(after_help = "Examples:\n  meshctl top\n  meshctl top --once -o json | jq '.rows[0]'")]
    Top(TopArgs),
    /// What the kernel programs cost and decided during a window, with latency distributions.
    #[command(after_help = "Examples:\n  meshctl profile\n  meshctl profile --seconds 30 -o json\n\n\
        Measuring the cost needs the kernel's BPF statistics, which are switched on for the window only.")]
    Profile(ProfileArgs),
    /// What would happen to a connection or a request, and why: the hook, the rule, the endpoints, the server's side.
    #[command(after_help = "Examples:\n  meshctl explain --from shop/cart --to reviews:9080\n  \
        meshctl explain --from shop/cart --to reviews:9080 --method GET --path /reviews/0 --header 'end-user: jason'\n  \
        meshctl explain --from shop/cart --to db.example.com:443 --sni db.example.com\n  \
        meshctl explain --from shop/cart --to 10.96.0.10:80 -o json\n\n\
        The answer comes from the code that decides, over the live tables. Nothing is sent.")]
    Explain(ExplainArgs),
    /// What a pod's requests are routed by: routes, clusters, endpoints, listeners.
    #[command(
        visible_aliases = ["pc"],
        after_help = "Examples:\n  meshctl proxy-config routes shop/cart --host reviews\n  \
        meshctl proxy-config clusters shop/cart -o yaml\n  \
        meshctl pc endpoints shop/cart --host reviews --subset v2\n  \
        meshctl pc listeners shop/cart\n\n\
        The names and columns are istioctl's where they mean the same."
    )]
    ProxyConfig {
        /// Which part.
        #[command(subcommand)]
        command: ProxyConfigCommand,
    },
    /// What policies in manifests say about a connection, before they are used. Needs no agent.
    #[command(
        after_help = "Examples:\n  meshctl policy test -f mesh/ --from shop/cart --to shop/reviews-1:9080\n  \
        meshctl policy test -f mesh/ --from-ip 192.0.2.1 --to reviews-1:9080 -o json\n  \
        meshctl policy test -f mesh/ --matrix\n\n\
        `meshctl policy test --help` has more."
    )]
    Policy(PolicyArgs),
    /// Whether manifests are valid, field by field. Needs no agent.
    #[command(
        after_help = "Examples:\n  meshctl validate mesh/\n  meshctl validate -o json routes.yaml policies.yaml | jq '.[].message'\n  \
        kustomize build prod | meshctl validate -\n  meshctl validate --live --context prod\n\n\
        Every kind that the mesh reads is checked as an agent checks it. Other kinds of the same API groups are warned about, all\n\
        others are counted.\n\n\
        Exit status: 0 all valid (warnings allowed), 1 something invalid, 2 wrong usage or a file that cannot be read."
    )]
    Validate(ValidateArgs),
    /// What is wrong between resources of manifests: hosts, subsets, ports and grants that are missing, conflicts. Needs no agent.
    #[command(
        after_help = "Examples:\n  meshctl analyze mesh/\n  meshctl analyze -o json mesh/ | jq '.[] | select(.level == \"error\")'\n  \
        meshctl analyze --live --context prod\n\n\
        The files are taken as the whole configuration: what is in none of them does not exist. What `meshctl validate` finds is\n\
        found too.\n\n\
        Exit status: 0 no errors (warnings allowed), 1 errors, 2 wrong usage or a file that cannot be read."
    )]
    Analyze(AnalyzeArgs),
    /// Put the mesh into a cluster, or bring what is there to this version and these values.
    #[command(
        after_help = "Examples:\n  meshctl install\n  meshctl install --profile demo --set image=registry.example/nodemesh:0.1.0\n  \
        meshctl install -f values.yaml --dry-run\n\n\
        Values are those of the Helm chart deploy/helm/nodemesh. What an earlier version made and this one does not is deleted.\n\
        Definitions of Istio's and the Gateway API's kinds that are there already are used as they are.\n\n\
        Exit status: 0 installed and ready, 1 not (see the message), 2 wrong usage."
    )]
    Install(InstallArgs),
    /// As install, for a mesh that is there already.
    #[command(
        after_help = "Examples:\n  meshctl upgrade -f values.yaml\n  meshctl upgrade --set image=registry.example/nodemesh:0.2.0\n\n\
        Give all values again: those of before are not remembered. Agents are replaced node by node; their connections go on."
    )]
    Upgrade(InstallArgs),
    /// Take the mesh out of a cluster: nothing of it is left on nodes or in the API.
    #[command(after_help = "Examples:\n  meshctl uninstall\n  meshctl uninstall --purge\n\n\
        Pods go on running, without the mesh. Definitions of kinds that the mesh made go too, unless resources of them are left.\n\n\
        Exit status: 0 all is gone, 1 something is left (see the message), 2 wrong usage.")]
    Uninstall(UninstallArgs),
    /// Whether the mesh in a cluster is whole, node by node, and what to do where it is not.
    #[command(
        after_help = "Examples:\n  meshctl verify\n  meshctl verify -o json | jq '.[] | select(.grade != \"good\")'\n\n\
        Exit status: 0 nothing is wrong, 1 something is, 2 wrong usage."
    )]
    Verify(VerifyArgs),
    /// Whether the mesh can work in a cluster, or on this host, before it is installed.
    #[command(after_help = "Examples:\n  meshctl precheck\n  meshctl precheck --host\n\n\
        Exit status: 0 it can, 1 something is in the way, 2 wrong usage.")]
    Precheck(PrecheckArgs),
    /// What an installation consists of, as manifests. Needs no cluster.
    #[command(
        after_help = "Examples:\n  meshctl manifest generate --profile minimal > nodemesh.yaml\n  meshctl manifest crds"
    )]
    Manifest {
        /// Which part.
        #[command(subcommand)]
        command: ManifestCommand,
    },
    /// Collect what an engineer needs to find a fault: objects, states and logs of the mesh, without any Secret.
    #[command(
        after_help = "Examples:\n  meshctl bug-report\n  meshctl bug-report --file /tmp/mesh.tar.gz --logs-since 3600"
    )]
    BugReport(BugReportArgs),
    /// Print the script that completes commands, options and names of pods in a shell.
    #[command(
        after_help = "Examples:\n  source <(meshctl completion bash)\n  meshctl completion zsh > ~/.zfunc/_meshctl\n  \
        meshctl completion fish > ~/.config/fish/completions/meshctl.fish"
    )]
    Completion {
        /// Which shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the agent's answer to one path of its admin socket as it is. For `meshctl` itself, from another host.
    #[command(hide = true, after_help = "Examples:\n  meshctl ask -- /status")]
    Ask {
        /// Path and query.
        target: String,
        /// Seconds to wait for the answer.
        #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=900))]
        within: u32,
    },
}

/// Options of `top`.
#[derive(Clone, Debug, clap::Args)]
pub struct TopArgs {
    /// Print one table over one interval and end.
    #[arg(long)]
    pub once: bool,
    /// Seconds between readings.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub interval: u32,
    /// Most rows to show in the live table.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub rows: u32,
}

/// Options of `profile`.
#[derive(Clone, Debug, clap::Args)]
pub struct ProfileArgs {
    /// Length of the window.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
}

/// Options of `explain`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExplainArgs {
    /// The client: a pod of this node, `NAMESPACE/NAME`, or `NAME` if that is unique.
    #[arg(long, value_name = "POD", add = clap_complete::ArgValueCompleter::new(super::complete::pods))]
    pub from: String,
    /// What it dials: a name as the pod would write it, or an address, and a TCP port.
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub to: String,
    /// Asks about a request of this method, GET when only other parts of a request are given.
    #[arg(long, value_name = "METHOD")]
    pub method: Option<String>,
    /// Path of the request, with query if it has one; `/` when only other parts are given.
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
    /// A header of the request; may be given several times. `host` takes the place of HOST:PORT in it.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header)]
    pub headers: Vec<String>,
    /// Asks about a TLS connection for this server name instead.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["method", "path", "headers"])]
    pub sni: Option<String>,
}

/// Checks the form only.
fn header(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some((name, _)) if !name.trim().is_empty() => Ok(text.to_owned()),
        _ => Err("want NAME: VALUE, e.g. 'end-user: jason'".to_owned()),
    }
}

/// Checks the form only; the agent resolves the host.
fn host_port(text: &str) -> Result<String, String> {
    let wanted = "want HOST:PORT, e.g. reviews:9080, 10.96.0.10:80 or [fd00::1]:80";
    let (host, port) = text.rsplit_once(':').ok_or(wanted)?;
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || bare_v6 {
        return Err(wanted.to_owned());
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(text.to_owned()),
        Ok(0) | Err(_) => Err(format!("port {port:?} is not a number from 1 to 65535; {wanted}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn global_options_are_taken_before_and_after_the_subcommand() {
        for line in ["meshctl -o json status", "meshctl status -o json"] {
            assert_eq!(parse(line).unwrap().output, Output::Json, "{line}");
        }
        let args = parse("meshctl top --once --admin-socket /tmp/x.sock").unwrap();
        assert_eq!(args.admin_socket, Some(PathBuf::from("/tmp/x.sock")));
        let args = parse("meshctl status --context prod -n shop").unwrap();
        assert_eq!(
            (args.cluster.context.as_deref(), args.cluster.namespace.as_deref()),
            (Some("prod"), Some("shop"))
        );
    }

    #[test]
    fn wrong_usage_is_status_2() {
        for line in [
            "meshctl",
            "meshctl status -o xml",
            "meshctl proxy-config",
            "meshctl proxy-config routes a b",
            "meshctl proxy-config clusters --port 0",
            "meshctl proxy-config endpoints --address web",
            "meshctl explain --from a --to web:80 --header x",
            "meshctl explain --from a --to web:443 --sni x --path /",
            "meshctl explain --from a/b",
            "meshctl explain --from a/b --to web",
            "meshctl explain --from a/b --to web:0",
            "meshctl explain --from a/b --to web:http",
            "meshctl explain --from a/b --to fd00::1:80",
            "meshctl profile --seconds 0",
            "meshctl status --admin-socket /tmp/x.sock --context prod",
            "meshctl manifest",
            "meshctl completion csh",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn hosts_may_be_names_and_addresses_of_both_families() {
        for to in ["web:80", "web.default.svc.cluster.local:65535", "10.0.0.1:1", "[fd00::1]:80"] {
            assert!(parse(&format!("meshctl explain --from a --to {to}")).is_ok(), "{to}");
        }
    }

    #[test]
    fn names_that_users_of_istioctl_know_are_taken() {
        for line in [
            "meshctl proxy-config cluster shop/cart --fqdn web.shop.svc.cluster.local --port 80 --subset v1 -o json",
            "meshctl pc c shop/cart",
            "meshctl pc routes -o table",
            "meshctl pc ep cart --address 10.0.0.1",
            "meshctl proxy-config listener cart --port 15001",
            "meshctl explain --from a --to web:80 -H 'a:b' --header c:d --method POST --path /x?y",
        ] {
            assert!(parse(&line.replace('\'', "")).is_ok(), "{line}");
        }
    }

    #[test]
    fn every_subcommand_shows_examples() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands() {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Examples:"), "{} has none", sub.get_name());
                check(sub);
            }
        }
        check(&Args::command());
    }
}
