//! Owns one question: who the client is, how it gets to the server, what the server's policy says.

use std::{net::IpAddr, sync::Arc};

use mesh_control::offline::Loaded;
use mesh_core::{
    identity::Identity,
    mode::Mode,
    policy::{Attempt, Judgement, Peer, Transport, admit, transport},
    snapshot::Workload,
};

use super::{PolicyTestArgs, policy_warnings, view::TestView};
use crate::view::{PolicyView, TransportView};

/// Pods named in a message; more are only counted.
const NAMES_MAX: usize = 8;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum QuestionError {
    #[error("the manifests have no pod {name}; they have {known}")]
    NoPod { name: String, known: String },
    #[error("there are several pods {name}; want NAMESPACE/NAME: {known}")]
    SeveralPods { name: String, known: String },
    #[error("{pod} has no port {port:?}; want a number from 1 to 65535 or one of its names: {known}")]
    NoPort { pod: String, port: String, known: String },
    #[error("--to is missing")]
    NoServer,
    #[error("the matrix has more than {max} rows; narrow it with --from or --to")]
    TooLarge { max: usize },
}

/// Who connects.
#[derive(Clone, Debug)]
pub(super) struct Client {
    /// Its pod, if it is one of the manifests.
    pub(super) pod: Option<Arc<Workload>>,
    /// What it can prove by a certificate or by being a pod of the mesh.
    pub(super) identity: Option<Identity>,
    /// Its address, if it is no pod.
    pub(super) addr: Option<IpAddr>,
}

impl Client {
    /// A pod; `plaintext` if it shall be outside the mesh whatever the manifests say.
    pub(super) fn pod(pod: &Arc<Workload>, plaintext: bool) -> Self {
        Self { pod: Some(Arc::clone(pod)), identity: (!plaintext).then(|| pod.identity()), addr: None }
    }
}

/// What became of one connection.
pub(super) struct Answered {
    pub(super) transport: TransportView,
    pub(super) source: Option<Identity>,
    pub(super) source_addr: Option<IpAddr>,
    pub(super) destination_addr: Option<IpAddr>,
    pub(super) judgement: Judgement,
    /// What the answer rests on and the manifests do not say.
    pub(super) notes: Vec<String>,
}

/// Answers `policy test` for one connection.
pub(super) fn ask(loaded: &Loaded, args: &PolicyTestArgs) -> Result<TestView, QuestionError> {
    let (pod, port) = args.to.as_ref().ok_or(QuestionError::NoServer)?;
    let dest = find_pod(loaded, pod)?;
    let port = find_port(&dest, port)?;
    let client = match &args.from {
        Some(name) => Client::pod(&find_pod(loaded, name)?, args.plaintext),
        None => Client { pod: None, identity: args.principal.clone(), addr: args.from_ip },
    };
    let mut answered = judge(loaded, &client, &dest, port);
    let mut policy =
        PolicyView::of(answered.source.as_ref(), &dest, port, answered.transport, &answered.judgement);
    if dest.settings.exclude_inbound_ports.contains(&port) {
        let text = "the server's pod excludes this port from capture, so nothing is enforced on it";
        (policy.verdict, policy.reason) = ("allow".to_owned(), "excluded_port".to_owned());
        (policy.text, policy.decided_by) = (text.to_owned(), None);
    }
    answered.notes.extend(note_unknown_source(&answered));
    Ok(TestView::of(loaded, &client, &dest, port, policy, answered, policy_warnings(loaded)))
}

/// What the policy of `dest` says.
pub(super) fn judge(loaded: &Loaded, client: &Client, dest: &Workload, port: u16) -> Answered {
    let mut notes = Vec::new();
    let transport = travel(client, dest, port, &mut notes);
    let source = client.identity.clone().filter(|_| transport != TransportView::Plaintext);
    let peer = match (&source, &client.pod, transport) {
        (Some(_), Some(pod), TransportView::Kernel | TransportView::Direct) => Peer::Kernel(pod.id),
        (Some(identity), _, _) => Peer::Tls(Arc::new(identity.clone())),
        (None, _, _) => Peer::Unauthenticated,
    };
    let wanted = client.addr.map(|addr| addr.to_canonical());
    let source_addrs = client.pod.iter().flat_map(|pod| &pod.addrs).copied().chain(wanted);
    let (source_addr, destination_addr) = addresses(source_addrs.collect(), &dest.addrs);
    if destination_addr.is_none() {
        notes.push(format!("{} has no address, so rules about destination.ip do not match", dest.name));
    }
    let attempt = Attempt {
        peer: &peer,
        source: source_addr,
        destination: destination_addr.unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
        port,
    };
    let judgement = admit(&loaded.snapshot, &attempt, dest);
    Answered { transport, source, source_addr, destination_addr, judgement, notes }
}

/// How the client gets there, and so whether its identity does.
fn travel(client: &Client, dest: &Workload, port: u16, notes: &mut Vec<String>) -> TransportView {
    if !dest.meshed {
        notes.push(format!(
            "{} is not in the mesh: judged as if it were, but nothing is enforced on it",
            dest.name
        ));
    }
    let (Some(pod), Some(_)) = (&client.pod, &client.identity) else {
        return match client.identity {
            Some(_) => TransportView::MutualTls,
            None => TransportView::Plaintext,
        };
    };
    if !pod.meshed && dest.meshed {
        notes.push(format!("{} is not in the mesh, so it connects in plaintext", pod.name));
        return TransportView::Plaintext;
    }
    if !pod.node.is_empty() && pod.node == dest.node {
        return TransportView::Kernel;
    }
    // Manifests of policies and bare pods do not say who is in the mesh; then a tunnel is taken for granted.
    match transport(dest, port) {
        Transport::Plaintext if dest.meshed || dest.modes.of(port) == Mode::Disable => {
            TransportView::Plaintext
        }
        Transport::Plaintext | Transport::Hbone => TransportView::MutualTls,
    }
}

/// Addresses of one family, if there are; else those there are.
fn addresses(sources: Vec<IpAddr>, destinations: &[IpAddr]) -> (Option<IpAddr>, Option<IpAddr>) {
    let pair = sources.iter().find_map(|source| {
        let same = destinations.iter().find(|dest| dest.is_ipv4() == source.is_ipv4())?;
        Some((Some(*source), Some(*same)))
    });
    pair.unwrap_or((sources.first().copied(), destinations.first().copied()))
}

fn note_unknown_source(answered: &Answered) -> Option<String> {
    let text =
        "the client's address is not known (--from-ip): rules about it let nobody in and keep everybody out";
    answered.source_addr.is_none().then(|| text.to_owned())
}

/// A pod by `NAMESPACE/NAME`, or by a name that is unique.
pub(super) fn find_pod(loaded: &Loaded, wanted: &str) -> Result<Arc<Workload>, QuestionError> {
    let is_wanted = |w: &Workload| match wanted.split_once('/') {
        Some((namespace, name)) => *w.name.namespace == *namespace && *w.name.name == *name,
        None => *w.name.name == *wanted,
    };
    let mut found: Vec<_> = loaded.snapshot.workloads().filter(|w| is_wanted(w)).collect();
    found.sort_by_key(|w| &w.name);
    match found.as_slice() {
        [only] => Ok(Arc::clone(only)),
        [] => {
            let mut all: Vec<_> = loaded.snapshot.workloads().collect();
            all.sort_by_key(|w| &w.name);
            Err(QuestionError::NoPod { name: wanted.to_owned(), known: listed(&all) })
        }
        several => Err(QuestionError::SeveralPods { name: wanted.to_owned(), known: listed(several) }),
    }
}

fn listed(pods: &[&Arc<Workload>]) -> String {
    let mut text: Vec<String> = pods.iter().take(NAMES_MAX).map(|w| w.name.to_string()).collect();
    match pods.len().saturating_sub(NAMES_MAX) {
        0 if text.is_empty() => "none".to_owned(),
        0 => text.join(", "),
        more => {
            text.push(format!("and {more} more"));
            text.join(", ")
        }
    }
}

fn find_port(pod: &Workload, wanted: &str) -> Result<u16, QuestionError> {
    let number = wanted.parse::<u16>().ok().filter(|port| *port != 0);
    number.or_else(|| pod.named_ports.get(wanted).copied()).ok_or_else(|| QuestionError::NoPort {
        pod: pod.name.to_string(),
        port: wanted.to_owned(),
        known: match pod.named_ports.keys().map(|name| &**name).collect::<Vec<_>>() {
            names if names.is_empty() => "it has none".to_owned(),
            names => names.join(", "),
        },
    })
}

/// The port of `--to`, when a matrix is narrowed by it.
pub(super) fn narrowed(
    loaded: &Loaded,
    args: &PolicyTestArgs,
) -> Result<Option<(Arc<Workload>, u16)>, QuestionError> {
    let Some((pod, port)) = &args.to else { return Ok(None) };
    let pod = find_pod(loaded, pod)?;
    let port = find_port(&pod, port)?;
    Ok(Some((pod, port)))
}
