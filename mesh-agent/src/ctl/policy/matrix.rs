//! Owns the matrix of `policy test`: every client, every server, every port it is known to have.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_control::offline::Loaded;
use mesh_core::{
    id::WorkloadId,
    snapshot::{Protocol, Workload},
};
use serde::Serialize;

use super::{
    PolicyTestArgs, policy_warnings,
    question::{Client, QuestionError, find_pod, judge, narrowed},
};
use crate::{
    ctl::table::{Align, Table},
    view::PolicyView,
};

/// Most rows; beyond them nobody reads, and a narrower question is quicker.
const ROWS_MAX: usize = 200_000;
/// The client that is no pod, and whose address nobody knows.
const OUTSIDE: &str = "(plaintext)";

/// All answers.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MatrixView {
    /// One for each client, server and port, in this order.
    pub(super) rows: Vec<RowView>,
    /// What is probably not meant in the policies.
    pub(super) warnings: Vec<String>,
}

/// One answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RowView {
    /// `namespace/name` of the client's pod, or `(plaintext)` for somebody outside the mesh, of an address that is not
    /// known: rules about it keep him out.
    pub(super) from: String,
    /// `namespace/name` of the server's pod.
    pub(super) to: String,
    /// The server's port.
    pub(super) port: u16,
    /// `allow` or `deny`.
    pub(super) verdict: String,
    /// Why.
    pub(super) reason: String,
    /// `namespace/name` of the policy that decides, if one does.
    pub(super) policy: Option<String>,
    /// Its rule, if one matches.
    pub(super) rule: Option<usize>,
}

/// Asks every question.
pub(super) fn matrix(loaded: &Loaded, args: &PolicyTestArgs) -> Result<MatrixView, QuestionError> {
    let mut pods: Vec<&Arc<Workload>> = loaded.snapshot.workloads().filter(|w| !w.terminated).collect();
    pods.sort_by_key(|w| &w.name);
    let any_meshed = pods.iter().any(|w| w.meshed);
    let known = known_ports(loaded);
    let mut servers: Vec<(Arc<Workload>, BTreeSet<u16>)> = match narrowed(loaded, args)? {
        Some((pod, port)) => vec![(pod, BTreeSet::from([port]))],
        None => pods
            .iter()
            .filter(|w| w.meshed || !any_meshed)
            .map(|w| (Arc::clone(w), known.get(&w.id).cloned().unwrap_or_default()))
            .collect(),
    };
    servers.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let clients: Vec<Client> = match &args.from {
        Some(name) => vec![Client::pod(&find_pod(loaded, name)?, false)],
        None => {
            let outside = Client { pod: None, identity: None, addr: None };
            pods.iter().map(|pod| Client::pod(pod, false)).chain([outside]).collect()
        }
    };
    let ports: usize = servers.iter().map(|(_, ports)| ports.len()).sum();
    if clients.len().saturating_mul(ports) > ROWS_MAX {
        return Err(QuestionError::TooLarge { max: ROWS_MAX });
    }
    let mut rows = Vec::new();
    for client in &clients {
        for (server, ports) in &servers {
            let is_self = client.pod.as_ref().is_some_and(|pod| pod.id == server.id);
            for port in ports.iter().filter(|_| !is_self) {
                rows.push(row(loaded, client, server, *port));
            }
        }
    }
    Ok(MatrixView { rows, warnings: policy_warnings(loaded) })
}

fn row(loaded: &Loaded, client: &Client, server: &Workload, port: u16) -> RowView {
    let answered = judge(loaded, client, server, port);
    let view =
        PolicyView::of(answered.source.as_ref(), server, port, answered.transport, &answered.judgement);
    let excluded = server.settings.exclude_inbound_ports.contains(&port);
    let (verdict, reason) = match excluded {
        true => ("allow".to_owned(), "excluded_port".to_owned()),
        false => (view.verdict, view.reason),
    };
    let by = view.decided_by.filter(|_| !excluded);
    RowView {
        from: client.pod.as_ref().map_or_else(|| OUTSIDE.to_owned(), |pod| pod.name.to_string()),
        to: server.name.to_string(),
        port,
        verdict,
        reason,
        rule: by.as_ref().and_then(|by| by.rule),
        policy: by.map(|by| by.policy),
    }
}

/// The TCP ports each pod declares, serves behind a service, or has in its policies.
fn known_ports(loaded: &Loaded) -> BTreeMap<WorkloadId, BTreeSet<u16>> {
    let snapshot = &loaded.snapshot;
    let mut known: BTreeMap<WorkloadId, BTreeSet<u16>> = BTreeMap::new();
    for namespace in loaded.index().namespaces() {
        for pod in loaded.index().pods(&namespace) {
            let declared =
                pod.ports.iter().filter(|port| port.protocol == Protocol::Tcp).map(|port| port.port);
            known.entry(pod.workload.id).or_default().extend(declared);
        }
    }
    for service in snapshot.services() {
        for port in service.ports.iter().filter(|port| port.protocol == Protocol::Tcp) {
            for endpoint in port.endpoints.iter().filter(|endpoint| endpoint.port != 0) {
                if let Some(workload) = snapshot.workload_of(endpoint) {
                    known.entry(workload.id).or_default().insert(endpoint.port);
                }
            }
        }
    }
    for workload in snapshot.workloads() {
        let policies = workload.policies.iter().filter_map(|name| snapshot.policy(name));
        let matches =
            policies.flat_map(|policy| &policy.rules).flat_map(|rule| rule.clauses.iter().flatten());
        let ports = matches.flat_map(|m| m.destination_ports.iter().chain(&m.not_destination_ports)).copied();
        known.entry(workload.id).or_default().extend(ports.chain(workload.modes.ports.keys().copied()));
    }
    known
}

/// The answers as a table.
pub(super) fn render(view: &MatrixView) -> String {
    let mut table = Table::new(&[
        ("FROM", Align::Left),
        ("TO", Align::Left),
        ("PORT", Align::Right),
        ("VERDICT", Align::Left),
        ("REASON", Align::Left),
        ("POLICY", Align::Left),
        ("RULE", Align::Right),
    ]);
    for row in &view.rows {
        table.row([
            row.from.clone(),
            row.to.clone(),
            row.port.to_string(),
            row.verdict.to_uppercase(),
            row.reason.clone(),
            row.policy.clone().unwrap_or_default(),
            row.rule.map(|rule| rule.to_string()).unwrap_or_default(),
        ]);
    }
    table.render()
}
