//! Owns the watches of Secrets: one for each that a DestinationRule names for workloads, and none of any other.
//!
//! Invariants:
//! - The API server is never asked for all Secrets, of a namespace or of the cluster.
//! - What nobody names any more is forgotten.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kube::Client;
use mesh_core::snapshot::Name;
use tokio::{
    sync::{mpsc, watch as latest},
    task::JoinHandle,
};

use super::{Change, watch::run_one};
use crate::{
    resource::{Key, Kind},
    source::document::Rules,
};

/// Secrets at once; further ones count as missing.
const SECRETS_MAX: usize = 1024;

/// A watch that ends when it is dropped.
struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows the Secrets that are wanted, until nobody wants any.
pub(super) async fn follow(
    client: Client,
    rules: Arc<Rules>,
    mut wanted: latest::Receiver<BTreeSet<Name>>,
    changes: mpsc::Sender<Change>,
) {
    let mut running: BTreeMap<Name, Watch> = BTreeMap::new();
    loop {
        let now: BTreeSet<Name> = wanted.borrow_and_update().clone();
        let gone: Vec<Name> = running.keys().filter(|name| !now.contains(*name)).cloned().collect();
        for name in gone {
            running.remove(&name);
            if changes.send(Change::Gone(Key { kind: Kind::Secret, name })).await.is_err() {
                return;
            }
        }
        if now.len() > SECRETS_MAX {
            tracing::warn!(
                named = now.len(),
                max = SECRETS_MAX,
                "DestinationRules name too many Secrets; some count as missing"
            );
        }
        for name in now {
            if running.len() >= SECRETS_MAX || running.contains_key(&name) {
                continue;
            }
            let (client, rules, changes, own) =
                (client.clone(), Arc::clone(&rules), changes.clone(), name.clone());
            let watch = tokio::spawn(async move {
                run_one(Kind::Secret, &own, client, rules, changes).await;
            });
            running.insert(name, Watch(watch));
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}
