//! Owns the shape and the text of an answer of `policy test`.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use mesh_control::{
    offline::Loaded,
    resource::{Key, Kind},
};
use mesh_core::{
    policy::DenyReason,
    snapshot::{Name, Workload},
};
use serde::Serialize;

use super::question::{Answered, Client};
use crate::view::{PolicyView, TransportView};

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TestView {
    /// The client: `namespace/name` of its pod, its identity, its address, or what of these is known.
    pub(super) from: String,
    /// The client's address, if known.
    pub(super) source_address: Option<IpAddr>,
    /// The server: `namespace/name` of its pod.
    pub(super) to: String,
    /// The server's address, if it has one.
    pub(super) destination_address: Option<IpAddr>,
    /// The server's port.
    pub(super) port: u16,
    /// Verdict, reason, identities, the deciding policy and rule, dry runs.
    #[serde(flatten)]
    pub(super) policy: PolicyView,
    /// Where the resource that decides is: the AuthorizationPolicy, or the PeerAuthentication for STRICT.
    pub(super) file: Option<PathBuf>,
    /// The document of that file, from 1.
    pub(super) document: Option<usize>,
    /// Where every AuthorizationPolicy that applies is.
    pub(super) places: Vec<PlaceView>,
    /// What the answer rests on and the manifests do not say.
    pub(super) notes: Vec<String>,
    /// What is probably not meant in the policies.
    pub(super) warnings: Vec<String>,
}

/// Where a policy is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PlaceView {
    /// `namespace/name`.
    pub(super) policy: String,
    /// File.
    pub(super) file: PathBuf,
    /// Document of the file, from 1.
    pub(super) document: usize,
}

impl TestView {
    pub(super) fn of(
        loaded: &Loaded,
        client: &Client,
        dest: &Workload,
        port: u16,
        policy: PolicyView,
        answered: Answered,
        warnings: Vec<String>,
    ) -> Self {
        let place = |kind, name: &Name| {
            let origin = loaded.origin(&Key { kind, name: name.clone() })?;
            Some(PlaceView {
                policy: name.to_string(),
                file: origin.file.to_path_buf(),
                document: origin.document,
            })
        };
        let decisive = if policy.reason == DenyReason::StrictPlaintext.as_str() {
            let name = dest.mode_sources.of(&dest.modes, port);
            name.and_then(|name| place(Kind::PeerAuthentication, name))
        } else {
            // An excluded port is decided by nobody.
            let by = answered.judgement.decided_by.as_ref().filter(|_| policy.decided_by.is_some());
            by.and_then(|by| place(Kind::AuthorizationPolicy, &by.policy))
        };
        let places = dest.policies.iter().filter_map(|name| place(Kind::AuthorizationPolicy, name));
        Self {
            from: describe(client, &answered),
            source_address: answered.source_addr,
            to: dest.name.to_string(),
            destination_address: answered.destination_addr,
            port,
            policy,
            document: decisive.as_ref().map(|place| place.document),
            file: decisive.map(|place| place.file),
            places: places.collect(),
            notes: answered.notes,
            warnings,
        }
    }
}

fn describe(client: &Client, answered: &Answered) -> String {
    match (&client.pod, &client.identity, answered.source_addr) {
        (Some(pod), _, _) => pod.name.to_string(),
        (None, Some(identity), _) => identity.to_string(),
        (None, None, Some(addr)) => addr.to_string(),
        (None, None, None) => "anybody".to_owned(),
    }
}

/// The answer as text.
pub(super) fn render(view: &TestView) -> String {
    let mut out = String::new();
    let mut put = |label: &str, text: &str| {
        // Writing to a String cannot fail.
        let _ignored = writeln!(out, "{label:<11} {text}");
    };
    let policy = &view.policy;
    put(&format!("{}:", policy.verdict.to_uppercase()), &format!("{} ({})", policy.text, policy.reason));
    if let Some(by) = &policy.decided_by {
        let rule = by.rule.map(|rule| format!(", spec.rules[{rule}]")).unwrap_or_default();
        put("policy:", &format!("{}{rule}", by.policy));
    }
    if let (Some(file), Some(document)) = (&view.file, view.document) {
        put("file:", &format!("{}, document {document}", file.display()));
    }
    let address = |addr: Option<IpAddr>| addr.map(|addr| format!(", {addr}")).unwrap_or_default();
    let identity = policy.source_identity.as_deref().unwrap_or("no identity");
    put("client:", &format!("{} ({identity}{})", view.from, address(view.source_address)));
    let server = format!("{}:{}", view.to, view.port);
    put(
        "server:",
        &format!("{server} ({}{})", policy.destination_identity, address(view.destination_address)),
    );
    let transport = match policy.transport {
        TransportView::Direct | TransportView::Kernel => "same node; the kernel attests the client",
        TransportView::MutualTls => "mutual TLS (HBONE)",
        TransportView::Plaintext => "plaintext",
    };
    put("transport:", transport);
    let from =
        policy.mode_from.as_ref().map_or_else(|| "the default".to_owned(), |name| format!("from {name}"));
    put("mode:", &format!("{}, {from}", policy.mode));
    for place in &view.places {
        put("applies:", &format!("{} ({}, document {})", place.policy, place.file.display(), place.document));
    }
    for said in &policy.dry_run {
        let rule = said
            .rule
            .map_or_else(|| "no rule matches".to_owned(), |rule| format!("spec.rules[{rule}] matches"));
        let would = if said.would_deny { "would deny" } else { "would not deny" };
        put("dry run:", &format!("{} {} {would}: {rule}", said.action, said.policy));
    }
    for note in &view.notes {
        put("note:", note);
    }
    out
}
