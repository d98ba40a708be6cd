//! What telemetry calls a workload: its canonical service and revision.

use mesh_core::snapshot::Workload;

/// Labels that name the service, the first that is there counts.
const SERVICE_LABELS: [&str; 3] = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
/// Labels that name the revision, the first that is there counts.
const REVISION_LABELS: [&str; 3] =
    ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
/// The revision of a workload without such a label.
const REVISION_IMPLIED: &str = "latest";

/// Canonical service and revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Canonical<'a> {
    /// The service; the pod's name if no label names one.
    pub service: &'a str,
    /// The revision; `latest` if no label names one.
    pub revision: &'a str,
}

impl<'a> Canonical<'a> {
    /// Of a pod.
    pub fn of(pod: &'a Workload) -> Self {
        let first =
            |labels: [&str; 3]| labels.into_iter().find_map(|key| pod.labels.get(key)).map(|text| &**text);
        Self {
            service: first(SERVICE_LABELS).unwrap_or(&pod.name.name),
            revision: first(REVISION_LABELS).unwrap_or(REVISION_IMPLIED),
        }
    }
}
