//! Owns the certificate service: who asks, for whom, whether that is allowed, and what is counted.
//!
//! Invariants:
//! - Only a node gets certificates: its own, and those of meshed pods scheduled on it, by the newest snapshot.
//! - Every outcome is counted with its reason; the CA logs it with the node that asked.

use std::{sync::Arc, time::Duration};

use mesh_identity::{
    ca::{Ca, Refusal, SignRequest},
    csr::CSR_BYTES_MAX,
    issuer::Issued,
    peer::Principal,
};
use mesh_wire::proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use prost_types::{Struct, value::Kind as ValueKind};
use tonic::{Request as Call, Response as Reply, Status};

use super::{
    auth::{Connection, NodeProof, node_of},
    hosted::Hosted,
    metrics::{PublishMetrics, ReasonLabels, SubjectLabels},
};
use crate::link::files::pem;

/// Field of the request's metadata that names the workload, as ztunnel sets it.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// The service.
#[derive(Debug)]
pub(super) struct Certificates {
    pub(super) ca: Arc<Ca>,
    pub(super) hosted: Arc<Hosted>,
    pub(super) proof: Arc<NodeProof>,
    pub(super) metrics: PublishMetrics,
}

impl Certificates {
    fn issue(&self, node: &str, request: &IstioCertificateRequest) -> Result<Issued, Refusal> {
        if request.csr.len() > CSR_BYTES_MAX * 2 {
            return Err(Refusal::Malformed);
        }
        let subject = impersonated(request.metadata.as_ref())?;
        // 0 leaves it to us, as in Istio.
        let ttl = match request.validity_duration {
            0 => None,
            seconds => Some(Duration::from_secs(u64::try_from(seconds).map_err(|_| Refusal::Ttl)?)),
        };
        let allowed = |principal: &Principal| match principal {
            Principal::Workload(identity) => self.hosted.is_hosted(node, identity),
            // Who has a service account's token needs no other proof, and a certificate would outlive the token.
            Principal::Node(asked) => {
                matches!(*self.proof, NodeProof::JoinSecret(_))
                    && *asked.node == *node
                    && self.hosted.is_ours(&asked.trust_domain)
            }
        };
        let request =
            SignRequest { csr: request.csr.as_bytes(), subject: subject.as_ref(), ttl, requester: node };
        self.ca.sign(&request, &allowed)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        call: Call<IstioCertificateRequest>,
    ) -> Result<Reply<IstioCertificateResponse>, Status> {
        let connection = call.extensions().get::<Connection>();
        let node = node_of(connection, call.metadata(), &self.proof).await.map_err(|error| {
            self.metrics.refuse(error.as_str());
            self.metrics.not_issued.get_or_create(&ReasonLabels { reason: "unauthenticated" }).inc();
            let remote = connection.map(|connection| connection.remote.to_string()).unwrap_or_default();
            tracing::warn!(%remote, reason = error.as_str(), "refused a client of the certificate authority");
            Status::from(error)
        })?;
        match self.issue(&node, call.get_ref()) {
            Ok(issued) => {
                let subject =
                    issued.chain.first().and_then(|leaf| {
                        match mesh_identity::peer::principal_of(leaf).ok()? {
                            Principal::Workload(_) => Some("workload"),
                            Principal::Node(_) => Some("node"),
                        }
                    });
                let labels = SubjectLabels { subject: subject.unwrap_or("workload") };
                self.metrics.issued.get_or_create(&labels).inc();
                Ok(Reply::new(IstioCertificateResponse { cert_chain: pem_chain(&issued) }))
            }
            Err(refusal) => {
                let reason = refusal.as_str();
                self.metrics.not_issued.get_or_create(&ReasonLabels { reason }).inc();
                Err(status_of(refusal))
            }
        }
    }
}

/// The refusal as gRPC says it. The message begins with the reason's label.
fn status_of(refusal: Refusal) -> Status {
    let message = format!("{}: {refusal}", refusal.as_str());
    match refusal {
        Refusal::NotHosted | Refusal::TrustDomain => Status::permission_denied(message),
        refusal if refusal.is_ours() => Status::unavailable(message),
        _ => Status::invalid_argument(message),
    }
}

fn impersonated(metadata: Option<&Struct>) -> Result<Option<Principal>, Refusal> {
    let Some(value) = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY)) else {
        return Ok(None);
    };
    match &value.kind {
        Some(ValueKind::StringValue(uri)) => Principal::parse(uri).map(Some).map_err(|_| Refusal::NoIdentity),
        _ => Err(Refusal::NoIdentity),
    }
}

/// The chain as the protocol wants it: the leaf, intermediates, and last all roots in one text.
fn pem_chain(issued: &Issued) -> Vec<String> {
    let mut chain: Vec<String> = issued.chain.iter().map(|der| pem(der)).collect();
    chain.push(issued.roots.iter().map(|der| pem(der)).collect());
    chain
}
