//! AuthorizationPolicy: who may talk to a workload.
//!
//! Read into the form evaluation uses. What only requests can decide stays in it as a mark, so that evaluation at L4 can
//! fail closed, and is warned about.

mod rules;

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_core::{
    policy::{self, Action, Scope},
    snapshot::Name,
};

use super::{Labels, metadata};
use crate::problem::Problems;

/// Annotation of policies that are only to be reported on.
const DRY_RUN: &str = "istio.io/dry-run";

/// An authorization policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Name.
    pub name: Name,
    /// Selects workloads of its namespace or, in the root namespace, of the mesh; empty for all of them.
    pub selector: Labels,
    /// What is evaluated; `None` for a policy that applies to no workload, which has been warned about.
    pub applies: Option<Applied>,
}

/// What a policy does to the workloads it applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The policy.
    pub policy: Arc<policy::AuthorizationPolicy>,
    /// Its content hash; `None` for a dry run.
    pub hash: Option<u64>,
}

/// The resource as it is written.
pub(crate) mod wire {
    use super::{BTreeMap, ObjectMeta};

    /// A list of texts; `None` when it is not there.
    pub(crate) type List = Option<Vec<String>>;

    /// The whole.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct AuthorizationPolicy {
        #[serde(default)]
        pub(crate) metadata: ObjectMeta,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) spec: Option<Spec>,
    }

    /// `spec`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Spec {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) selector: Option<Selector>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) target_ref: Option<TargetRef>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) target_refs: Option<Vec<TargetRef>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) action: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) provider: Option<Provider>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) rules: Option<Vec<Option<Rule>>>,
    }

    /// `spec.selector`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Selector {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) match_labels: Option<BTreeMap<String, String>>,
    }

    /// Each of `spec.targetRefs`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct TargetRef {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) group: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) kind: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) name: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) namespace: Option<String>,
    }

    /// `spec.provider`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Provider {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) name: Option<String>,
    }

    /// Each of `spec.rules`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Rule {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) from: Option<Vec<From>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) to: Option<Vec<To>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) when: Option<Vec<Condition>>,
    }

    /// Each of `from`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct From {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) source: Option<Source>,
    }

    /// `source`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Source {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) principals: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_principals: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) request_principals: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_request_principals: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) namespaces: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_namespaces: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) service_accounts: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_service_accounts: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) trust_domains: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_trust_domains: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) ip_blocks: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_ip_blocks: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) remote_ip_blocks: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_remote_ip_blocks: List,
    }

    /// Each of `to`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct To {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) operation: Option<Operation>,
    }

    /// `operation`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Operation {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) hosts: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_hosts: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) ports: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_ports: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) methods: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_methods: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) paths: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_paths: List,
    }

    /// Each of `when`.
    #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(crate) struct Condition {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) key: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) values: List,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(crate) not_values: List,
    }
}

/// `spec.action` in a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// Reads a policy. `root_namespace` is where mesh-wide policies live.
pub(crate) fn read(
    object: &wire::AuthorizationPolicy,
    root_namespace: &str,
    problems: &mut Problems,
) -> AuthorizationPolicy {
    let name = metadata::name(&object.metadata, metadata::Scope::Namespaced, problems);
    let spec = object.spec.clone().unwrap_or_default();
    let wanted = action(spec.action.as_deref(), problems);
    let has_targets = targets(&spec, problems);
    let selector = selector(spec.selector, problems);
    if has_targets && !selector.is_empty() {
        problems.error(
            "spec.targetRefs",
            "is there beside spec.selector.matchLabels, wanted at most one of them",
        );
    }
    let scope = match (selector.is_empty(), &*name.namespace == root_namespace) {
        (false, _) => Scope::Selector,
        (true, true) => Scope::Mesh,
        (true, false) => Scope::Namespace,
    };
    let custom = wanted == Wanted::Custom;
    provider(spec.provider.as_ref(), custom, problems);
    let rules = spec.rules.unwrap_or_default();
    if rules.is_empty() && wanted != Wanted::Allow {
        let hint = "so it never matches and has no effect; a rule that matches everything is written {}";
        problems.warning("spec.rules", format!("is empty, {hint}"));
    }
    let action = match wanted {
        Wanted::Allow => Action::Allow,
        // Nobody can be asked yet: what somebody else should decide is refused.
        Wanted::Deny | Wanted::Audit | Wanted::Custom => Action::Deny,
    };
    let rules = rules::Reader { namespace: &name.namespace, action, problems }.rules(&rules);
    let policy = policy::AuthorizationPolicy {
        name: name.clone(),
        scope,
        action,
        dry_run: dry_run(&object.metadata, custom, problems),
        rules,
    };
    let applies = !has_targets && wanted != Wanted::Audit;
    let applied = || Applied { hash: policy::content_hash(&policy), policy: Arc::new(policy) };
    AuthorizationPolicy { name, selector, applies: applies.then(applied) }
}

fn action(text: Option<&str>, problems: &mut Problems) -> Wanted {
    match text {
        None | Some("" | "ALLOW") => Wanted::Allow,
        Some("DENY") => Wanted::Deny,
        Some("AUDIT") => {
            problems
                .warning("spec.action", "is AUDIT, which the mesh does not do yet; the policy has no effect");
            Wanted::Audit
        }
        Some("CUSTOM") => {
            problems.warning(
                "spec.action",
                "is CUSTOM, which needs the mesh to see requests and it does not yet; until then what its rules match \
                 is denied",
            );
            Wanted::Custom
        }
        Some(other) => {
            problems.error("spec.action", format!("is {other:?}, wanted ALLOW, DENY, AUDIT or CUSTOM"));
            Wanted::Deny
        }
    }
}

fn provider(provider: Option<&wire::Provider>, custom: bool, problems: &mut Problems) {
    let name = provider.and_then(|p| p.name.as_deref()).unwrap_or_default();
    if custom && name.is_empty() {
        problems.error("spec.provider.name", "is missing, wanted the provider that action CUSTOM asks");
    }
    if !custom && provider.is_some() {
        problems.error("spec.provider", "is there, wanted only with action CUSTOM");
    }
}

fn selector(selector: Option<wire::Selector>, problems: &mut Problems) -> Labels {
    let labels = selector.and_then(|s| s.match_labels).unwrap_or_default();
    for (key, value) in &labels {
        let field = format!("spec.selector.matchLabels.{key}");
        if key.is_empty() {
            problems.error("spec.selector.matchLabels", "has an empty key, wanted a label");
        } else if key.contains('*') || value.contains('*') {
            problems.error(field, format!("is {value:?}, wanted a label without '*'"));
        }
    }
    metadata::shared(labels.iter())
}

/// Whether the policy is for gateways and the like, not for workloads.
fn targets(spec: &wire::Spec, problems: &mut Problems) -> bool {
    let listed = spec.target_refs.as_deref().unwrap_or_default();
    if spec.target_ref.is_some() && !listed.is_empty() {
        problems.error("spec.targetRef", "is there beside spec.targetRefs, wanted at most one of them");
    }
    let single = spec.target_ref.iter().map(|target| ("spec.targetRef".to_owned(), target));
    let listed = listed.iter().enumerate().map(|(at, target)| (format!("spec.targetRefs[{at}]"), target));
    let mut found = false;
    for (field, target) in single.chain(listed) {
        found = true;
        for (part, value) in [("kind", &target.kind), ("name", &target.name)] {
            if value.as_deref().unwrap_or_default().is_empty() {
                problems.error(format!("{field}.{part}"), "is missing");
            }
        }
        if target.namespace.as_deref().is_some_and(|ns| !ns.is_empty()) {
            let field = format!("{field}.namespace");
            problems.error(field, "is there, wanted none: targets are of the policy's own namespace");
        }
    }
    if found {
        let what =
            "is for gateways and waypoints, which the mesh does not have yet; no workload is policed by it";
        problems.warning("spec.targetRefs", what);
    }
    found
}

fn dry_run(meta: &ObjectMeta, custom: bool, problems: &mut Problems) -> bool {
    let field = format!("metadata.annotations.{DRY_RUN}");
    let asked = match meta.annotations.as_ref().and_then(|a| a.get(DRY_RUN)).map(String::as_str) {
        None | Some("false" | "False" | "FALSE" | "f" | "F" | "0") => false,
        Some("true" | "True" | "TRUE" | "t" | "T" | "1") => true,
        Some(other) => {
            let message = format!("is {other:?}, wanted \"true\" or \"false\"; the policy is enforced");
            problems.warning(field.as_str(), message);
            false
        }
    };
    if asked && custom {
        problems.warning(field, "has no effect with action CUSTOM; the policy is enforced");
    }
    asked && !custom
}

#[cfg(test)]
mod tests;
