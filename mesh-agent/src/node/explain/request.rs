//! Owns what `meshctl explain` says of a request: the data path's own preview of it, put into its shape.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    route::{cluster::TrafficPolicy, host::Authority, http::Action},
    snapshot::{Snapshot, Workload},
};
use mesh_proxy::{
    DestinationUse, EndpointStanding, Unfit,
    preview::{
        self, AskedRequest, BackendPreview, DestinationPreview, NoDestination, PreviewError, Understood,
    },
};

use crate::{
    node::proxy_config::{endpoint_row, http_rule, stream_rule, words},
    view::{RequestBackendView, RequestEndpointView, RequestOutcome, RequestView, ResolutionView},
};

/// What is asked about.
#[derive(Clone, Debug)]
pub(in super::super) enum Asked {
    /// A request.
    Request(AskedRequest),
    /// A TLS connection that asks for this server.
    Tls(String),
}

/// A question about a request, or a connection with its first bytes.
#[derive(Clone, Debug)]
pub(in super::super) struct RequestQuestion {
    /// What.
    pub(in super::super) asked: Asked,
    /// What this pod's requests have in use.
    pub(in super::super) in_use: Vec<DestinationUse>,
}

/// What becomes of a request that `from` sends to an address of `resolution` at `port`.
pub(in super::super) fn explain_request(
    snapshot: &Arc<Snapshot>,
    from: &Workload,
    resolution: &ResolutionView,
    port: u16,
    question: &RequestQuestion,
) -> Result<RequestView, PreviewError> {
    let mut view = RequestView {
        asked: match &question.asked {
            Asked::Request(AskedRequest { method, target, .. }) => format!("{method} {target}"),
            Asked::Tls(sni) => format!("TLS {sni}"),
        },
        host: None,
        matched_path: None,
        outcome: RequestOutcome::NotLookedAt,
        text: String::new(),
        status: None,
        flags: Vec::new(),
        rule: None,
        matched: None,
        location: None,
        timeout_ms: None,
        backends: Vec::new(),
        notes: Vec::new(),
    };
    let first = resolution.addrs.iter().find(|addr| addr.is_ipv4()).or(resolution.addrs.first());
    let dialled = SocketAddr::new(first.copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
    if first.is_none() {
        view.notes.push("the address is not known here; one that is no service's is assumed".to_owned());
    }
    let asked = match &question.asked {
        Asked::Request(asked) => asked,
        Asked::Tls(sni) => {
            tell_tls(snapshot, from, dialled, sni, &question.in_use, &mut view);
            return Ok(view);
        }
    };
    let preview = preview::preview(snapshot, from, dialled, asked)?;
    let treatment = preview.treatment;
    if !treatment.concerned {
        view.text = "no rule or policy is about this port: the agent does not look at requests".to_owned();
        return Ok(view);
    }
    if !(treatment.protocol.is_http()
        || treatment.protocol == mesh_core::route::protocol::AppProtocol::Sniffed)
    {
        view.text = format!(
            "the port is {}: its bytes are not read as HTTP (name it http, or set appProtocol)",
            words::protocol(treatment.protocol)
        );
        return Ok(view);
    }
    match preview.understood {
        Err((reason, status)) => {
            view.outcome = RequestOutcome::Refuse;
            view.text = format!("refused as no proper request: {reason}");
            view.status = Some(status);
            view.flags.push("DPE".to_owned());
        }
        Ok(understood) => tell(snapshot, &understood, port, &question.in_use, &mut view),
    }
    Ok(view)
}

fn tell_tls(
    snapshot: &Snapshot,
    from: &Workload,
    dialled: SocketAddr,
    sni: &str,
    in_use: &[DestinationUse],
    view: &mut RequestView,
) {
    let preview = preview::preview_tls(snapshot, from, dialled, Some(sni));
    if preview.treatment.concerned && preview.treatment.protocol.is_http() {
        view.outcome = RequestOutcome::Refuse;
        view.text = "the port is HTTP: what begins with a TLS handshake is refused there".to_owned();
        view.flags.push("DPE".to_owned());
        return;
    }
    let shares = preview.rule.as_ref().map(|(rule, matched)| {
        let shape = stream_rule(snapshot, rule);
        view.matched = matched.and_then(|index| shape.matches.get(index).cloned());
        let shares = shape.backends.clone();
        view.rule = Some(shape);
        shares
    });
    for (index, (_, backend)) in preview.backends.iter().enumerate() {
        let share = shares.as_ref().and_then(|shares| shares.get(index));
        let cluster = match (share, backend) {
            (Some(share), _) => share.cluster.clone(),
            (None, Ok(destination)) => words::cluster(snapshot, &destination.key),
            (None, Err(none)) => none.reason.to_string(),
        };
        let mut row = no_backend(share.map_or(100.0, |share| share.percent), cluster);
        fill(snapshot, backend, in_use, &mut row);
        // Bytes have no status.
        row.status = None;
        view.backends.push(row);
    }
    let leads_nowhere = !view.backends.is_empty()
        && view.backends.iter().filter(|row| row.percent > 0.0).all(|row| !row.flags.is_empty());
    (view.outcome, view.text) = match (&view.rule, leads_nowhere) {
        (_, true) => (RequestOutcome::Close, "closed: see below".to_owned()),
        (Some(_), false) => (RequestOutcome::Forward, "relayed to one of its destinations".to_owned()),
        (None, _) if view.backends.is_empty() => (
            RequestOutcome::PassThrough,
            "no rule or policy is about it: it goes to where it was dialled".to_owned(),
        ),
        (None, _) => {
            (RequestOutcome::Forward, "no rule is about it: relayed by the service's policy".to_owned())
        }
    };
}

fn tell(
    snapshot: &Snapshot,
    understood: &Understood,
    port: u16,
    in_use: &[DestinationUse],
    view: &mut RequestView,
) {
    view.host = Some(format!("{}:{port}", Authority::parse(&understood.authority).name()));
    view.matched_path = Some(understood.target.clone());
    view.timeout_ms = understood.timeout.map(words::millis);
    view.flags.extend(understood.flag().map(str::to_owned));
    if let Some(rule) = understood.rule() {
        let shape = http_rule(snapshot, rule);
        let matched = understood.hit.and_then(|(_, matched)| matched);
        view.matched = matched.and_then(|index| shape.matches.get(index).cloned());
        if let Some(fault) = &rule.fault {
            view.flags.extend(fault.delay.map(|_| "DI".to_owned()));
            view.flags.extend(fault.abort.map(|_| "FI".to_owned()));
            view.notes.push("a fault takes away time-out and retries of its rule".to_owned());
        }
        view.rule = Some(shape);
    }
    if let Some(cors) = understood.cors {
        use mesh_core::route::cors::CorsDecision;
        view.notes.extend(match cors {
            CorsDecision::Forward => None,
            CorsDecision::EmptyPreflight => {
                Some("a preflight of another origin: answered here with 200".to_owned())
            }
            CorsDecision::Preflight => {
                Some("a preflight of an allowed origin: answered here with 200".to_owned())
            }
            CorsDecision::Share => Some("the response is shared with the origin of the request".to_owned()),
        });
    }
    match understood.action() {
        None | Some(Action::Passthrough) => {
            view.outcome = RequestOutcome::PassThrough;
            view.text = "no rule is about this host: it goes to where it was dialled".to_owned();
        }
        Some(Action::Redirect(redirect)) => {
            view.outcome = RequestOutcome::Redirect;
            view.status = Some(redirect.status);
            view.location.clone_from(&understood.location);
            view.text = format!("answered with a redirect to {}", view.location.as_deref().unwrap_or("/"));
        }
        Some(Action::Respond { status, reason, .. }) => {
            view.outcome = RequestOutcome::Respond;
            view.status = Some(*status);
            view.text = match (understood.rule(), &**reason) {
                (None, "no_route") => "no rule of the host matches".to_owned(),
                (_, reason) => format!("answered by the mesh: {reason}"),
            };
        }
        Some(Action::Forward(_)) => {
            view.outcome = RequestOutcome::Forward;
            let total: u64 = understood.backends.iter().map(|backend| u64::from(backend.weight)).sum();
            let shares = view.rule.as_ref().map(|rule| rule.backends.clone()).unwrap_or_default();
            view.backends = understood
                .backends
                .iter()
                .zip(&shares)
                .map(|(backend, share)| {
                    backend_view(snapshot, understood, backend, share.percent, share.cluster.clone(), in_use)
                })
                .collect();
            view.text = match &view.backends[..] {
                [one] => format!("sent to {}", one.cluster),
                several => format!("sent to one of {} destinations by weight", several.len()),
            };
            // Where every share fails, so does the request.
            let fails = |backend: &RequestBackendView| backend.status.is_some() && backend.percent > 0.0;
            let mut failing = view.backends.iter().filter(|backend| backend.percent > 0.0).peekable();
            if total > 0 && failing.peek().is_some() && failing.all(fails) {
                view.status = view.backends.first().and_then(|backend| backend.status);
                view.flags
                    .extend(view.backends.first().map(|backend| backend.flags.clone()).unwrap_or_default());
                view.text = format!("{}; it fails: see below", view.text);
            }
        }
    }
    for mirror in &understood.mirrors {
        match mirror {
            Ok(to) => view.notes.push(format!("copies may go to {}", words::cluster(snapshot, &to.key))),
            Err(none) => view.notes.push(format!("copies go nowhere: {}", none.reason)),
        }
    }
}

fn backend_view(
    snapshot: &Snapshot,
    understood: &Understood,
    backend: &BackendPreview,
    percent: f64,
    cluster: String,
    in_use: &[DestinationUse],
) -> RequestBackendView {
    let mut view = RequestBackendView {
        path: Some(understood.new_target.clone().unwrap_or_else(|| understood.target.clone())),
        authority: Some(backend.authority.clone()),
        headers: backend.headers.clone(),
        ..no_backend(percent, cluster)
    };
    fill(snapshot, &backend.destination, in_use, &mut view);
    view
}

fn no_backend(percent: f64, cluster: String) -> RequestBackendView {
    RequestBackendView {
        percent,
        cluster,
        status: None,
        flags: Vec::new(),
        path: None,
        authority: None,
        headers: Vec::new(),
        balancing: String::new(),
        destination_rule: None,
        endpoints: Vec::new(),
    }
}

/// Where a backend leads to, or why it leads nowhere.
fn fill(
    snapshot: &Snapshot,
    destination: &Result<DestinationPreview, NoDestination>,
    in_use: &[DestinationUse],
    view: &mut RequestBackendView,
) {
    match destination {
        Err(none) => {
            view.status = Some(none.status);
            view.flags.push(none.flag.to_owned());
        }
        Ok(destination) => {
            let default = TrafficPolicy::default();
            let policy = destination.policy.as_ref().map_or(&default, |cluster| &cluster.policy);
            view.balancing = words::balancing(&policy.balancing);
            view.destination_rule = destination.origin().map(|origin| words::origin(origin));
            view.endpoints = endpoints(snapshot, destination, in_use);
            if !view.endpoints.iter().any(|endpoint| endpoint.eligible) {
                view.status = Some(503);
                view.flags.push("UH".to_owned());
            }
        }
    }
}

fn endpoints(
    snapshot: &Snapshot,
    destination: &DestinationPreview,
    in_use: &[DestinationUse],
) -> Vec<RequestEndpointView> {
    let used = in_use.iter().find(|used| used.cluster.as_ref() == Some(&destination.key));
    let cluster = words::cluster(snapshot, &destination.key);
    let well = |standing: &&EndpointStanding| {
        standing.unfit.is_none()
            && used
                .and_then(|used| used.endpoints.get(&standing.addr))
                .is_none_or(|used| used.out_for.is_none())
    };
    // Farther classes take what the nearest cannot.
    let nearest = destination.endpoints.iter().filter(well).filter_map(|standing| standing.class).min();
    let rows = destination.endpoints.iter().map(|standing| {
        let own = used.and_then(|used| used.endpoints.get(&standing.addr));
        let endpoint = endpoint_row(standing, own, cluster.clone());
        let (eligible, reason) = match (standing.unfit, endpoint.ejected_for_ms) {
            (Some(Unfit::NotReady), _) => (false, "not ready".to_owned()),
            (Some(Unfit::OtherSubset), _) => (false, "its labels are not those of the subset".to_owned()),
            (Some(Unfit::OtherFamily), _) => (false, "another address family than the connection".to_owned()),
            (None, Some(ms)) => (false, format!("ejected for {:.1} s more", ms as f64 / 1e3)),
            (None, None) => match standing.class {
                None => (false, "its locality gets nothing".to_owned()),
                class if class == nearest && nearest == Some(0) => (true, "ready".to_owned()),
                Some(class) if class == nearest.unwrap_or(class) => {
                    (true, format!("ready, priority {class}: nothing nearer is"))
                }
                Some(class) => {
                    (false, format!("priority {class}: used when nearer ones cannot take everything"))
                }
            },
        };
        RequestEndpointView { endpoint, eligible, reason }
    });
    rows.collect()
}
