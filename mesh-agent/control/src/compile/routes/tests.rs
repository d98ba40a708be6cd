//! Tests of routes: from manifests to what clients see.

mod chosen;
mod destination_rule;
mod gateway_api;
mod mesh_config;
mod properties;
mod virtual_service;

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::route::{
    Routes,
    cluster::ClusterKey,
    http::{Action, Backend, HttpRule, HttpTable, WeightedBackend},
    stream::StreamTable,
};

use crate::{
    compile::{
        Compiled, Compiler, MeshSettings,
        tests::{over_the_link, put},
    },
    index::Index,
};

fn compile(documents: &[String]) -> Compiled {
    let mut index = Index::default();
    put(&mut index, "a.yaml", &documents.concat());
    Compiler::new(MeshSettings::default()).compile(&mut index)
}

fn routes(documents: &[String]) -> Arc<Routes> {
    Arc::clone(compile(documents).snapshot.routes())
}

/// A document; `spec` in flow style without its braces.
fn document(api: &str, kind: &str, name: &str, spec: &str) -> String {
    aged(api, kind, name, None, spec)
}

/// The same, created at a second of 2026.
fn aged(api: &str, kind: &str, name: &str, second: Option<u8>, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    let created =
        second.map_or(String::new(), |s| format!(", creationTimestamp: \"2026-01-01T00:00:{s:02}Z\""));
    format!(
        "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}{created}}}\nspec: {{{spec}}}\n"
    )
}

const ISTIO: &str = "networking.istio.io/v1";
const GATEWAY: &str = "gateway.networking.k8s.io/v1";

fn vs(name: &str, spec: &str) -> String {
    document(ISTIO, "VirtualService", name, spec)
}

fn vs_of(name: &str, second: u8, spec: &str) -> String {
    aged(ISTIO, "VirtualService", name, Some(second), spec)
}

/// A service with ports like `http:80`.
fn service(name: &str, ports: &[&str]) -> String {
    let ports: Vec<String> = ports
        .iter()
        .map(|port| port.split_once(':').unwrap())
        .map(|(name, number)| format!("{{name: {name}, port: {number}}}"))
        .collect();
    document("v1", "Service", name, &format!("clusterIP: None, ports: [{}]", ports.join(", ")))
}

fn http(routes: &Routes, host: &str, port: u16, client: &str) -> Option<Arc<HttpTable>> {
    routes.http(host, port)?.get(client, &BTreeMap::new()).cloned()
}

fn stream(routes: &Routes, host: &str, port: u16, client: &str) -> Option<Arc<StreamTable>> {
    routes.stream(host, port)?.get(client, &BTreeMap::new()).cloned()
}

fn target(one: &WeightedBackend) -> String {
    match &one.backend {
        Backend::Cluster(ClusterKey { service, port, subset }) => {
            let subset = subset.as_ref().map(|s| format!("/{s}")).unwrap_or_default();
            format!("{service}:{port}{subset}={}", one.weight)
        }
        Backend::Broken { status, reason } => {
            format!("{status} {}={}", reason.split(':').next().unwrap(), one.weight)
        }
    }
}

fn targets(backends: &[WeightedBackend]) -> String {
    backends.iter().map(target).collect::<Vec<_>>().join(" ")
}

fn action(action: &Action) -> String {
    match action {
        Action::Forward(backends) => targets(backends),
        Action::Redirect(redirect) => format!("redirect {}", redirect.status),
        Action::Respond { status, reason, .. } => format!("answer {status} {reason}"),
        Action::Passthrough => "passthrough".to_owned(),
    }
}

fn line(rule: &HttpRule) -> String {
    format!("{} {}: {}", rule.origin.name.name, rule.origin.field, action(&rule.action))
}

/// The rules of a table, each with its resource, its place there and what it does.
fn shown(table: Option<Arc<HttpTable>>) -> Vec<String> {
    table.map(|table| table.rules.iter().map(line).collect()).unwrap_or_default()
}
