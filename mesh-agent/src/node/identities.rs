//! Owns the certificates of this node's pods: where they come from, whose are wanted, and what operators see of them.
//!
//! Invariants:
//! - Only identities of meshed pods that are on this node by the snapshot are ever asked for, and the authority in this
//!   process signs no others.
//! - Nothing waits for a certificate but the traffic that needs it: a node without one is ready all the same.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_control::publish::hosted::Hosted;
use mesh_core::{identity::Identity, snapshot::Snapshot};
use mesh_identity::{
    Ca, Certificates, Issuer, LocalIssuer, TrustDomains,
    ca::{CaCounters, CaOptions},
    key::KeyAlgorithm,
    workloads::{CertificateCounters, Options, Renewer},
};
use tokio::sync::watch;

use crate::view::{CertificateView, CertificatesView};

/// What certificates of workloads shall be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    /// Kind of their keys; of the key of a root, too, if one is made in this process.
    pub(super) algorithm: KeyAlgorithm,
    /// Life asked for.
    pub(super) ttl: Duration,
}

/// The certificates of this node, and the authority if it is in this process.
#[derive(Debug)]
pub(super) struct Identities {
    node: String,
    certificates: Arc<Certificates>,
    ca: Option<Arc<Ca>>,
    /// Where certificates come from, in the operator's words.
    issuer: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// What fetches certificates; runs on the control thread until dropped.
#[derive(Debug)]
pub(super) struct Background {
    renewer: Renewer,
    ca: Option<Arc<Ca>>,
    certificates: Arc<Certificates>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    node: String,
}

impl Identities {
    /// With an authority in this process, in `ca_dir`. Blocks for file operations.
    pub(super) fn local(
        node: &str,
        ca_dir: &Path,
        wish: Wish,
        snapshots: &watch::Receiver<Arc<Snapshot>>,
    ) -> anyhow::Result<(Self, Background)> {
        let trust_domain = Arc::clone(&snapshots.borrow().mesh().trust_domain);
        let options = CaOptions { algorithm: wish.algorithm, ..CaOptions::new(ca_dir, trust_domain) };
        let ca = Ca::open(options).with_context(|| {
            format!("open the certificate authority in {}; see --ca-dir", ca_dir.display())
        })?;
        let ca = Arc::new(ca);
        let (hosted, of_node) = (Hosted::new(snapshots.clone()), node.to_owned());
        let issuer =
            LocalIssuer::new(Arc::clone(&ca), node, move |identity| hosted.is_hosted(&of_node, identity));
        let from = ca_dir.display().to_string();
        Ok(Self::start(node, Some(ca), Arc::new(issuer), from, wish, snapshots))
    }

    /// With a controller that issues; `url` is where it is.
    pub(super) fn remote(
        node: &str,
        issuer: Arc<dyn Issuer>,
        url: String,
        wish: Wish,
        snapshots: &watch::Receiver<Arc<Snapshot>>,
    ) -> (Self, Background) {
        Self::start(node, None, issuer, url, wish, snapshots)
    }

    fn start(
        node: &str,
        ca: Option<Arc<Ca>>,
        source: Arc<dyn Issuer>,
        issuer: String,
        wish: Wish,
        snapshots: &watch::Receiver<Arc<Snapshot>>,
    ) -> (Self, Background) {
        let snapshot = Arc::clone(&snapshots.borrow());
        let options =
            Options { algorithm: wish.algorithm, ttl: wish.ttl, ..Options::new(domains_of(&snapshot)) };
        let (certificates, renewer) = Certificates::new(options, source);
        // Before the first pod is served: what is not wanted is refused, not waited for.
        certificates.want(identities_on(&snapshot, node));
        let background = Background {
            renewer,
            ca: ca.clone(),
            certificates: Arc::clone(&certificates),
            snapshots: snapshots.clone(),
            node: node.to_owned(),
        };
        let snapshots = snapshots.clone();
        (Self { node: node.to_owned(), certificates, ca, issuer, snapshots }, background)
    }

    /// What the data path takes certificates from.
    pub(super) fn certificates(&self) -> &Arc<Certificates> {
        &self.certificates
    }

    /// Where certificates come from: a folder or a URL.
    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// What happened to certificates so far.
    pub(super) fn counters(&self) -> CertificateCounters {
        self.certificates.counters()
    }

    /// What the authority did so far, if it is in this process.
    pub(super) fn ca_counters(&self) -> Option<CaCounters> {
        self.ca.as_ref().map(|ca| ca.counters())
    }

    /// Each certificate as the identity crate shows it.
    pub(super) fn rows(&self) -> Vec<mesh_identity::CertificateView> {
        self.certificates.views()
    }

    /// What `meshctl certificates` reads.
    pub(super) fn view(&self) -> CertificatesView {
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let mesh = snapshot.mesh();
        CertificatesView {
            node: self.node.clone(),
            trust_domain: mesh.trust_domain.to_string(),
            trust_domain_aliases: mesh.trust_domain_aliases.iter().map(ToString::to_string).collect(),
            issuer: self.issuer.clone(),
            roots: self.certificates.roots(),
            certificates: self.rows().into_iter().map(shown).collect(),
        }
    }
}

impl Background {
    /// Fetches, renews and follows the configuration until dropped.
    pub(super) async fn run(self) {
        let Self { renewer, ca, certificates, snapshots, node } = self;
        let authority = async {
            match &ca {
                Some(ca) => Arc::clone(ca).run().await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(renewer.run(), authority, follow(ca.as_deref(), &certificates, snapshots, &node));
    }
}

/// Wants the certificates of the pods there are, in the trust domain there is, at each snapshot.
async fn follow(
    ca: Option<&Ca>,
    certificates: &Certificates,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    node: &str,
) {
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        if let Some(ca) = ca {
            ca.set_trust_domain(Arc::clone(&snapshot.mesh().trust_domain));
        }
        if certificates.trust().set_domains(domains_of(&snapshot)) {
            tracing::info!(trust_domain = %snapshot.mesh().trust_domain, "the mesh's trust domains have changed");
        }
        certificates.want(identities_on(&snapshot, node));
        if snapshots.changed().await.is_err() {
            // The source has ended, which ends the agent; until then the pods stay who they are.
            std::future::pending::<()>().await;
        }
    }
}

fn domains_of(snapshot: &Snapshot) -> TrustDomains {
    let mesh = snapshot.mesh();
    TrustDomains { local: Arc::clone(&mesh.trust_domain), aliases: mesh.trust_domain_aliases.clone() }
}

/// Who the meshed pods of a node are.
fn identities_on(snapshot: &Snapshot, node: &str) -> Vec<Identity> {
    let local = snapshot.workloads().filter(|w| *w.node == *node && w.meshed && !w.terminated);
    local.map(|workload| workload.identity()).collect()
}

fn shown(row: mesh_identity::CertificateView) -> CertificateView {
    CertificateView {
        identity: row.identity,
        state: row.state.to_owned(),
        serial: row.serial,
        key: row.key.map(str::to_owned),
        not_before: row.not_before,
        not_after: row.not_after,
        renew_at: row.renew_at,
        chain_depth: row.chain.len(),
        chain: row.chain,
        last_error: row.last_error,
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{Name, Parts, Workload};

    use super::*;

    fn pod(name: &str, node: &str, account: &str) -> Workload {
        Workload {
            node: node.into(),
            service_account: account.into(),
            meshed: true,
            ..Workload::named(Name::new("shop", name))
        }
    }

    #[test]
    fn only_live_meshed_pods_of_the_node_have_identities_there() {
        let workloads = vec![
            pod("a", "n1", "alice"),
            pod("b", "n2", "bob"),
            Workload { meshed: false, ..pod("c", "n1", "carol") },
            Workload { terminated: true, ..pod("d", "n1", "dave") },
        ];
        let parts = Parts { workloads: workloads.into_iter().map(Arc::new).collect(), ..Parts::default() };
        let found = identities_on(&Snapshot::new(1, parts), "n1");
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["spiffe://cluster.local/ns/shop/sa/alice"]);
    }

    #[tokio::test]
    async fn pods_get_certificates_of_the_authority_in_the_process() {
        let dir = std::env::temp_dir().join(format!("mesh-agent-identities-{}", std::process::id()));
        let parts = Parts { workloads: vec![Arc::new(pod("a", "n1", "alice"))], ..Parts::default() };
        let (snapshots_tx, snapshots) = watch::channel(Arc::new(Snapshot::new(1, parts)));
        let wish = Wish { algorithm: KeyAlgorithm::Ed25519, ttl: Duration::from_secs(3600) };
        let (identities, background) = Identities::local("n1", &dir, wish, &snapshots).unwrap();
        let running = tokio::spawn(background.run());
        let wait_for = async |account: &str| {
            let identity = Identity::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap();
            let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
            identities.certificates().wait_for(&identity, deadline).await
        };
        wait_for("alice").await.unwrap();
        assert!(wait_for("bob").await.is_err(), "nobody's identity");
        let view = identities.view();
        assert_eq!((view.certificates[0].state.as_str(), view.certificates[0].chain_depth), ("valid", 1));
        assert_eq!(view.roots.len(), 1);
        let parts = Parts { workloads: vec![Arc::new(pod("b", "n1", "bob"))], ..Parts::default() };
        snapshots_tx.send_replace(Arc::new(Snapshot::new(2, parts)));
        while wait_for("bob").await.is_err() {
            tokio::task::yield_now().await;
        }
        assert_eq!(identities.counters().obtained, 2);
        assert_eq!(identities.ca_counters().unwrap().issued, 2);
        running.abort();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
