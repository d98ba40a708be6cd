//! Owns the JSON shapes of the agent's admin socket, shared by the agent and `meshctl`.
//!
//! Invariants:
//! - Field names are `snake_case` and stable: fields are added, never renamed or given another unit.
//! - Every unit is in the field's name; times are seconds, nanoseconds (`_ns`) or microseconds (`_us`).
//! - 64-bit ids are text (`w…`, `s…` and sixteen hex digits), because JSON numbers lose bits above 2⁵³.
//!
//! Not here: how the values are found (`node`) or printed (`ctl`).

mod certificates;
mod connections;
mod explain;
mod profile;
mod proxy_config;
mod request;
mod status;
mod top;

pub use certificates::{CertificateView, CertificatesView};
pub use connections::{ConnectionView, ConnectionsView, Path, Security};
pub(crate) use explain::mode_word;
pub use explain::{
    AddressView, ArrivalView, BackendView, DecidedByView, DryRunView, ExplainView, HookView, PolicyView,
    ResolutionKind, ResolutionView, ServerView, TransportView, VerdictView,
};
pub use profile::{BucketView, CounterView, HistogramView, ProfileView, ProgramCostView};
pub use proxy_config::{
    ClusterView, ClustersView, EndpointView, EndpointsView, InPodListenerView, InUseView, ListenersView,
    OriginView, RetriesView, RouteRuleView, RouteTableView, RoutesView, ServicePortView, ShareView,
};
pub use request::{RequestBackendView, RequestEndpointView, RequestOutcome, RequestView};
pub use status::{
    AgentView, ControllerView, FailingNameView, ForeignProgramView, IdentityView, KernelView, MapView,
    NamesView, Phase, PodState, PodView, ProgramView, SnapshotView, SourceErrorView, StatusView,
    UnusableTlsView,
};
pub use top::{EdgeCountersView, EdgeKeyView, EdgeView, EdgesView, TopRow, TopView, busiest, rates};

/// Paths of the admin socket, one per question.
pub mod paths {
    /// [`super::StatusView`].
    pub const STATUS: &str = "/status";
    /// [`super::ConnectionsView`].
    pub const CONNECTIONS: &str = "/connections";
    /// [`super::CertificatesView`].
    pub const CERTIFICATES: &str = "/certificates";
    /// [`super::EdgesView`].
    pub const EDGES: &str = "/edges";
    /// [`super::ProfileView`]; query `seconds`.
    pub const PROFILE: &str = "/profile";
    /// [`super::ExplainView`]; query `from` and `to`, and of a request `method`, `path`, each `header`, `sni`.
    pub const EXPLAIN: &str = "/explain";
    /// [`super::RoutesView`]; query `pod`, `host`, `port`.
    pub const ROUTES: &str = "/proxy-config/routes";
    /// [`super::ClustersView`]; query as for routes, and `subset`.
    pub const CLUSTERS: &str = "/proxy-config/clusters";
    /// [`super::EndpointsView`]; query as for clusters, and `address`.
    pub const ENDPOINTS: &str = "/proxy-config/endpoints";
    /// [`super::ListenersView`]; query `pod`, `host`, `port`, `address`.
    pub const LISTENERS: &str = "/proxy-config/listeners";
}

/// What every refused request answers, with a status code of 400 or above.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ErrorView {
    /// What was wrong and what was wanted.
    pub error: String,
}
