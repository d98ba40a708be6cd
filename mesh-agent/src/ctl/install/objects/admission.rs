//! The webhook that refuses invalid resources of the mesh, and a word about those that it does not do.
//!
//! Invariant: while no controller answers, nothing is refused but what only the mesh would carry out: no object of the cluster's own
//! namespaces, no kind and no route of other controllers.

use k8s_openapi::{
    api::admissionregistration::v1::{
        MatchCondition, RuleWithOperations, ServiceReference, ValidatingWebhook,
        ValidatingWebhookConfiguration, WebhookClientConfig,
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement},
};

use super::{CONTROLLER, MESH, READ_KINDS, Values, meta};

/// Path that the controller answers on.
const PATH: &str = "/validate";

/// Istio's kinds that the mesh does not do. Whoever writes one is told that it has no effect, if somebody is there to say so.
const UNREAD_KINDS: [(&str, &[&str]); 4] = [
    ("extensions.istio.io", &["wasmplugins"]),
    ("networking.istio.io", &["envoyfilters", "gateways", "proxyconfigs", "workloadgroups"]),
    ("security.istio.io", &["requestauthentications"]),
    ("telemetry.istio.io", &["telemetries"]),
];

/// Routes with parents none of which is, or was meant to be, the mesh's are other controllers'. Whatever else may be one is asked about:
/// which it is, the controller says.
const IS_NOT_OF_OTHERS: &str = "request.resource.group != 'gateway.networking.k8s.io' || \
    !has(object.spec) || !has(object.spec.parentRefs) || object.spec.parentRefs.size() == 0 || \
    object.spec.parentRefs.exists(parent, has(parent.kind) && parent.kind in ['', 'Service', 'ServiceEntry'])";

/// Without a bundle: the controller puts its own there, under its own name as field manager.
pub(super) fn webhook(values: &Values, namespace: &str) -> ValidatingWebhookConfiguration {
    let routes = MatchCondition {
        name: "is-not-of-other-controllers".to_owned(),
        expression: IS_NOT_OF_OTHERS.to_owned(),
    };
    let judge = ValidatingWebhook {
        name: "validate.nodemesh.dev".to_owned(),
        failure_policy: Some(values.webhook.failure_policy.clone()),
        rules: Some(rules(&READ_KINDS)),
        match_conditions: Some(vec![routes]),
        ..asked(values, namespace)
    };
    let tell = ValidatingWebhook {
        name: "tell.nodemesh.dev".to_owned(),
        failure_policy: Some("Ignore".to_owned()),
        rules: Some(rules(&UNREAD_KINDS)),
        ..asked(values, namespace)
    };
    ValidatingWebhookConfiguration { metadata: meta(MESH, MESH, None), webhooks: Some(vec![judge, tell]) }
}

/// What both have in common.
fn asked(values: &Values, namespace: &str) -> ValidatingWebhook {
    let exempt = LabelSelectorRequirement {
        key: "kubernetes.io/metadata.name".to_owned(),
        operator: "NotIn".to_owned(),
        // The cluster's own, and the mesh's: a controller that is down must never keep them from being mended. The root namespace is none
        // of them: what is written there counts for the whole mesh, and only once a controller is back.
        values: owned(&["kube-system", "kube-public", "kube-node-lease", namespace]),
    };
    ValidatingWebhook {
        admission_review_versions: vec!["v1".to_owned()],
        side_effects: "None".to_owned(),
        match_policy: Some("Equivalent".to_owned()),
        timeout_seconds: Some(values.webhook.timeout_seconds),
        namespace_selector: Some(LabelSelector {
            match_expressions: Some(vec![exempt]),
            ..Default::default()
        }),
        client_config: WebhookClientConfig {
            service: Some(ServiceReference {
                name: CONTROLLER.to_owned(),
                namespace: namespace.to_owned(),
                path: Some(PATH.to_owned()),
                port: Some(443),
            }),
            ..Default::default()
        },
        ..Default::default()
    }
}

fn rules(kinds: &[(&str, &[&str])]) -> Vec<RuleWithOperations> {
    let rule = |(group, resources): &(&str, &[&str])| RuleWithOperations {
        // Whatever can be deleted is no longer wrong.
        operations: owned(&["CREATE", "UPDATE"]),
        api_groups: owned(&[*group]),
        api_versions: owned(&["*"]),
        resources: owned(resources),
        scope: Some("Namespaced".to_owned()),
    };
    kinds.iter().map(rule).collect()
}

fn owned(list: &[&str]) -> Option<Vec<String>> {
    Some(list.iter().map(ToString::to_string).collect())
}
