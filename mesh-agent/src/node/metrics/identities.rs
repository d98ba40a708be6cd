//! Owns the metrics of certificates and of the authority.

use std::fmt;

use mesh_identity::ca::Refusal;
use prometheus_client::{
    encoding::DescriptorEncoder,
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::{AgentMetrics, counter, family, gauge, sample};

impl AgentMetrics {
    pub(super) fn certificates(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let identities = &self.shared.identities;
        let counters = identities.counters();
        let help = "Identities of this node's pods";
        gauge(encoder, "mesh_certificates_wanted", help, counters.wanted as i64)?;
        let help = "Identities of this node's pods with a certificate that is valid now";
        gauge(encoder, "mesh_certificates_valid", help, counters.valid as i64)?;
        let help = "Attempts to get certificates, by outcome";
        let mut attempts = family(encoder, "mesh_certificate_attempts", help, MetricType::Counter)?;
        for (outcome, count) in [
            ("obtained", counters.obtained),
            ("renewed", counters.renewed),
            ("refused", counters.refused),
            ("failed", counters.failed),
        ] {
            sample(&mut attempts, &[("outcome", outcome)], &ConstCounter::new(count))?;
        }
        let help = "Seconds until the certificate of an identity ends";
        let mut expiry = family(encoder, "mesh_certificate_expiry_seconds", help, MetricType::Gauge)?;
        for row in identities.rows() {
            let Some(expires_in_s) = row.expires_in_s else { continue };
            sample(&mut expiry, &[("identity", &row.identity)], &ConstGauge::new(expires_in_s as i64))?;
        }
        Ok(())
    }

    pub(super) fn authority(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(counters) = self.shared.identities.ca_counters() else { return Ok(()) };
        counter(encoder, "mesh_ca_issued", "Certificates signed", counters.issued)?;
        let help = "Requests for certificates that were refused, by reason";
        let mut refused = family(encoder, "mesh_ca_refused", help, MetricType::Counter)?;
        for reason in Refusal::ALL {
            let count = counters.refused.get(&reason).copied().unwrap_or(0);
            sample(&mut refused, &[("reason", reason.as_str())], &ConstCounter::new(count))?;
        }
        let help = "Times that signing went over to a new root";
        counter(encoder, "mesh_ca_root_switches", help, counters.root_switches)?;
        let help = "Changes of the authority's files that took effect";
        counter(encoder, "mesh_ca_reloads", help, counters.reloads)?;
        let help = "Changes of the authority's files that could not be used; it went on as it was";
        counter(encoder, "mesh_ca_reload_failures", help, counters.reload_failures)
    }
}
