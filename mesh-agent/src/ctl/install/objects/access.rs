//! Accounts and what they may do: as little as each part needs.

use k8s_openapi::api::{
    core::v1::ServiceAccount,
    rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject},
};

use super::{AGENT, CONTROLLER, MESH, Manifest, READ_KINDS, ROOTS, meta};

/// To follow objects.
const READ: &[&str] = &["get", "list", "watch"];

const RBAC: &str = "rbac.authorization.k8s.io";

/// `read_secrets`: what DestinationRules name is read.
pub(super) fn all(namespace: &str, read_secrets: bool) -> Result<Vec<Manifest>, serde_json::Error> {
    Ok(vec![
        Manifest::of(&account(CONTROLLER, namespace))?,
        Manifest::of(&account(AGENT, namespace))?,
        Manifest::of(&cluster_role(CONTROLLER, controller(read_secrets)))?,
        Manifest::of(&cluster_role(AGENT, agent()))?,
        Manifest::of(&cluster_binding(CONTROLLER, namespace))?,
        Manifest::of(&cluster_binding(AGENT, namespace))?,
        Manifest::of(&Role {
            metadata: meta(CONTROLLER, CONTROLLER, Some(namespace)),
            rules: Some(controller_at_home()),
        })?,
        Manifest::of(&RoleBinding {
            metadata: meta(CONTROLLER, CONTROLLER, Some(namespace)),
            role_ref: role_ref("Role", CONTROLLER),
            subjects: Some(vec![subject(CONTROLLER, namespace)]),
        })?,
    ])
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> PolicyRule {
    let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    PolicyRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(owned(resources)),
        verbs: owned(verbs),
        ..Default::default()
    }
}

fn named(name: &str, rule: PolicyRule) -> PolicyRule {
    PolicyRule { resource_names: Some(vec![name.to_owned()]), ..rule }
}

fn controller(read_secrets: bool) -> Vec<PolicyRule> {
    let mut rules = vec![
        // What the mesh is made of.
        rule("", &["namespaces", "nodes", "pods", "serviceaccounts", "services"], READ),
        rule("discovery.k8s.io", &["endpointslices"], READ),
        // Definitions that come later are picked up.
        rule("apiextensions.k8s.io", &["customresourcedefinitions"], READ),
        // The roots of the mesh, in every namespace. Creating cannot be limited by name.
        rule("", &["configmaps"], &["create"]),
        named(ROOTS, rule("", &["configmaps"], &["delete", "get", "list", "patch", "update", "watch"])),
        // Whose token an agent shows.
        rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
        // Its own certificate in its own webhook.
        named(
            MESH,
            rule(
                "admissionregistration.k8s.io",
                &["validatingwebhookconfigurations"],
                &["get", "list", "patch", "update", "watch"],
            ),
        ),
        // What it says about resources.
        rule("", &["events"], &["create", "patch"]),
        rule("events.k8s.io", &["events"], &["create", "patch"]),
    ];
    if read_secrets {
        // What DestinationRules name. Which those are is not known beforehand.
        rules.push(rule("", &["secrets"], READ));
    }
    for (group, resources) in READ_KINDS {
        rules.push(rule(group, resources, READ));
        let status: Vec<String> = resources
            .iter()
            // It has no status.
            .filter(|resource| **resource != "referencegrants")
            .map(|resource| format!("{resource}/status"))
            .collect();
        let status: Vec<&str> = status.iter().map(String::as_str).collect();
        rules.push(rule(group, &status, &["patch", "update"]));
    }
    rules
}

/// What the controller may do in the mesh's own namespace only: it keeps the root there, and elects who writes.
fn controller_at_home() -> Vec<PolicyRule> {
    let all = &["create", "delete", "get", "list", "patch", "update", "watch"];
    vec![
        rule("", &["secrets"], all),
        rule("", &["configmaps"], all),
        rule("coordination.k8s.io", &["leases"], all),
    ]
}

/// Which pods are on the node and whether they want to be in the mesh. No Secrets: certificates come from the controller.
fn agent() -> Vec<PolicyRule> {
    vec![rule("", &["namespaces", "pods"], READ)]
}

fn account(name: &str, namespace: &str) -> ServiceAccount {
    ServiceAccount { metadata: meta(name, name, Some(namespace)), ..Default::default() }
}

fn cluster_role(name: &str, rules: Vec<PolicyRule>) -> ClusterRole {
    ClusterRole { metadata: meta(name, name, None), rules: Some(rules), ..Default::default() }
}

fn cluster_binding(name: &str, namespace: &str) -> ClusterRoleBinding {
    ClusterRoleBinding {
        metadata: meta(name, name, None),
        role_ref: role_ref("ClusterRole", name),
        subjects: Some(vec![subject(name, namespace)]),
    }
}

fn role_ref(kind: &str, name: &str) -> RoleRef {
    RoleRef { api_group: Some(RBAC.to_owned()), kind: kind.to_owned(), name: name.to_owned() }
}

fn subject(name: &str, namespace: &str) -> Subject {
    Subject {
        kind: "ServiceAccount".to_owned(),
        name: name.to_owned(),
        namespace: Some(namespace.to_owned()),
        ..Default::default()
    }
}
