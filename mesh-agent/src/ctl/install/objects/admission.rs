//! The webhook that refuses invalid resources of the mesh.

use k8s_openapi::{
    api::admissionregistration::v1::{
        RuleWithOperations, ServiceReference, ValidatingWebhook, ValidatingWebhookConfiguration,
        WebhookClientConfig,
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement},
};

use super::{CONTROLLER, MESH, Values, meta};

/// Path that the controller answers on.
const PATH: &str = "/validate";

/// Without a bundle: the controller puts its own there, under its own name as field manager.
pub(super) fn webhook(values: &Values, namespace: &str) -> ValidatingWebhookConfiguration {
    let owned = |list: &[&str]| Some(list.iter().map(ToString::to_string).collect());
    let rule = RuleWithOperations {
        // Whatever can be deleted is no longer wrong.
        operations: owned(&["CREATE", "UPDATE"]),
        api_groups: owned(&[
            "gateway.networking.k8s.io",
            "networking.istio.io",
            "security.istio.io",
            "telemetry.istio.io",
        ]),
        api_versions: owned(&["*"]),
        resources: owned(&["*"]),
        scope: Some("Namespaced".to_owned()),
    };
    let exempt = LabelSelectorRequirement {
        key: "kubernetes.io/metadata.name".to_owned(),
        operator: "NotIn".to_owned(),
        // The cluster's own, and the mesh's: a controller that is down must never keep them from being mended.
        values: owned(&["kube-system", "kube-public", "kube-node-lease", namespace]),
    };
    let webhook = ValidatingWebhook {
        name: "validate.nodemesh.dev".to_owned(),
        admission_review_versions: vec!["v1".to_owned()],
        side_effects: "None".to_owned(),
        match_policy: Some("Equivalent".to_owned()),
        failure_policy: Some(values.webhook.failure_policy.clone()),
        timeout_seconds: Some(values.webhook.timeout_seconds),
        namespace_selector: Some(LabelSelector {
            match_expressions: Some(vec![exempt]),
            ..Default::default()
        }),
        rules: Some(vec![rule]),
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
    };
    ValidatingWebhookConfiguration { metadata: meta(MESH, MESH, None), webhooks: Some(vec![webhook]) }
}
