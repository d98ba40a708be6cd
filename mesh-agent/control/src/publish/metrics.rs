//! Owns what the controller counts about its clients.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use crate::link::Kind;

/// Counters of the link, registered once for a process.
#[derive(Clone, Debug, Default)]
pub struct PublishMetrics {
    /// Clients connected now.
    pub(super) sessions: Family<ClientLabels, Gauge>,
    /// Streams that ended, by why.
    pub(super) ended: Family<ReasonLabels, Counter>,
    /// Responses sent.
    pub(super) pushes: Family<KindLabels, Counter>,
    /// Resources in them, removed ones too.
    pub(super) resources: Family<KindLabels, Counter>,
    /// Encoded size of them.
    pub(super) bytes: Family<KindLabels, Counter>,
    /// Responses that clients took or refused.
    pub(super) answers: Family<AnswerLabels, Counter>,
    /// Connections and calls that were refused.
    pub(super) refused: Family<ReasonLabels, Counter>,
    /// Certificates issued.
    pub(super) issued: Family<SubjectLabels, Counter>,
    /// Certificates not issued.
    pub(super) not_issued: Family<ReasonLabels, Counter>,
    /// Generation of the world.
    pub(super) generation: Gauge<u64, AtomicU64>,
}

/// Which kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ClientLabels {
    pub(super) client: Client,
}

/// Kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Client {
    /// One of our agents.
    Agent,
    /// Speaks WDS alone.
    Foreign,
}

impl EncodeLabelValue for Client {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(
            &match self {
                Self::Agent => "agent",
                Self::Foreign => "foreign",
            },
            encoder,
        )
    }
}

/// A kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct KindLabels {
    pub(super) kind: &'static str,
}

impl KindLabels {
    pub(super) fn of(kind: Kind) -> Self {
        Self { kind: kind.as_str() }
    }
}

/// An answer to a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct AnswerLabels {
    pub(super) kind: &'static str,
    pub(super) answer: &'static str,
}

/// A reason from a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabels {
    pub(super) reason: &'static str,
}

/// Whom a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct SubjectLabels {
    pub(super) subject: &'static str,
}

impl PublishMetrics {
    /// Counters under their names in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let m = &metrics;
        registry.register("mesh_xds_sessions", "Clients connected now", m.sessions.clone());
        registry.register("mesh_xds_sessions_ended", "Streams that ended, by why", m.ended.clone());
        registry.register("mesh_xds_pushes", "Responses sent, by kind of resource", m.pushes.clone());
        registry.register("mesh_xds_resources", "Resources sent or removed, by kind", m.resources.clone());
        registry.register_with_unit(
            "mesh_xds_sent",
            "Encoded size of responses, by kind of resource",
            Unit::Bytes,
            m.bytes.clone(),
        );
        registry.register("mesh_xds_answers", "Responses that clients took or refused", m.answers.clone());
        registry.register("mesh_xds_refused", "Connections and calls refused, by reason", m.refused.clone());
        registry.register("mesh_ca_issued", "Certificates issued, by kind of subject", m.issued.clone());
        registry.register("mesh_ca_refused", "Certificates refused, by reason", m.not_issued.clone());
        registry.register("mesh_xds_generation", "Generation of what is published", m.generation.clone());
        metrics
    }

    pub(super) fn refuse(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// How often something was refused for a reason.
    pub fn refusals(&self, reason: &'static str) -> u64 {
        self.refused.get_or_create(&ReasonLabels { reason }).get()
    }

    /// How often a certificate was refused for a reason.
    pub fn certificates_refused(&self, reason: &'static str) -> u64 {
        self.not_issued.get_or_create(&ReasonLabels { reason }).get()
    }

    /// Certificates issued to workloads and nodes.
    pub fn certificates_issued(&self) -> u64 {
        ["workload", "node"]
            .map(|subject| self.issued.get_or_create(&SubjectLabels { subject }).get())
            .iter()
            .sum()
    }

    /// Resources of a kind that were sent or removed.
    pub fn resources_sent(&self, kind: Kind) -> u64 {
        self.resources.get_or_create(&KindLabels::of(kind)).get()
    }

    /// Streams that ended for a reason.
    pub fn sessions_ended(&self, reason: &'static str) -> u64 {
        self.ended.get_or_create(&ReasonLabels { reason }).get()
    }

    /// Bytes of responses of a kind that were sent.
    pub fn bytes_sent(&self, kind: Kind) -> u64 {
        self.bytes.get_or_create(&KindLabels::of(kind)).get()
    }

    pub(super) fn set_generation(&self, generation: u64) {
        self.generation.inner().store(generation, Ordering::Relaxed);
    }
}
