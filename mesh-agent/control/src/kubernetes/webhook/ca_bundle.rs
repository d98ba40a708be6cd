//! Owns what the API server judges the webhook's certificate by: the roots, in the webhook's configuration, kept right by the leader.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{ValidatingWebhook, ValidatingWebhookConfiguration},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use mesh_identity::TrustMaterial;
use serde_json::json;
use tokio::{sync::watch, time::sleep};

use crate::{
    kubernetes::names::{FIELD_MANAGER, WEBHOOK, is_conflict},
    link::files::pem,
};

/// Pause before a configuration that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Keeps the configuration right, for ever. For the leader alone. Without one there is nothing to do until there is.
pub async fn keep_ca_bundle(client: Client, mut trust: watch::Receiver<Arc<TrustMaterial>>) {
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("metadata.name={WEBHOOK}"));
    let mut events = pin!(watcher(configurations.clone(), config).default_backoff());
    let mut current: Option<ValidatingWebhookConfiguration> = None;
    loop {
        let roots: String = trust.borrow_and_update().roots.iter().map(|root| pem(root)).collect();
        let mut failed = false;
        if let Some(found) = &current
            && let Some(webhooks) = corrected(found, &roots)
        {
            // With the version that was read: somebody else's change is not undone.
            let patch = json!({"metadata": {"resourceVersion": found.metadata.resource_version}, "webhooks": webhooks});
            let params =
                PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            match configurations.patch(WEBHOOK, &params, &Patch::Merge(&patch)).await {
                Ok(now) => {
                    tracing::info!("the API server knows the webhook by the roots");
                    current = Some(now);
                }
                Err(error) => {
                    // After a conflict the watch brings the newer one.
                    failed = true;
                    if !is_conflict(&error) {
                        tracing::warn!(%error, "write the roots into the webhook's configuration");
                    }
                }
            }
        }
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Apply(found) | Event::InitApply(found))) => current = Some(found),
                Some(Ok(Event::Delete(_))) => current = None,
                Some(Ok(Event::Init | Event::InitDone)) => {}
                Some(Err(error)) => tracing::debug!(%error, "watch the webhook's configuration"),
                None => return,
            },
            changed = trust.changed() => if changed.is_err() { return },
            () = sleep(RETRY), if failed => {}
        }
    }
}

/// The webhooks with these roots, if any of them has others.
fn corrected(found: &ValidatingWebhookConfiguration, roots: &str) -> Option<Vec<ValidatingWebhook>> {
    let bundle = ByteString(roots.as_bytes().to_vec());
    let mut webhooks = found.webhooks.clone()?;
    let wrong = webhooks.iter().any(|webhook| webhook.client_config.ca_bundle.as_ref() != Some(&bundle));
    for webhook in &mut webhooks {
        webhook.client_config.ca_bundle = Some(bundle.clone());
    }
    wrong.then_some(webhooks)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::admissionregistration::v1::WebhookClientConfig;

    use super::*;

    #[test]
    fn only_a_configuration_with_other_roots_is_written() {
        let webhook = |bundle: Option<&str>| ValidatingWebhook {
            name: "validate.nodemesh.dev".into(),
            client_config: WebhookClientConfig {
                ca_bundle: bundle.map(|text| ByteString(text.into())),
                ..WebhookClientConfig::default()
            },
            ..ValidatingWebhook::default()
        };
        let of = |bundles: &[Option<&str>]| {
            let webhooks = Some(bundles.iter().map(|bundle| webhook(*bundle)).collect());
            let found =
                ValidatingWebhookConfiguration { webhooks, ..ValidatingWebhookConfiguration::default() };
            corrected(&found, "new")
        };
        assert_eq!(of(&[Some("new"), Some("new")]), None);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[Some("new"), None]), Some(vec![webhook(Some("new")); 2]));
        assert_eq!(of(&[Some("old")]), Some(vec![webhook(Some("new"))]));
    }
}
