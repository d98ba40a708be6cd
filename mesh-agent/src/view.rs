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
pub use status::{
    AgentView, ControllerView, ForeignProgramView, IdentityView, KernelView, MapView, Phase, PodState,
    PodView, ProgramView, SnapshotView, SourceErrorView, StatusView,
};
pub use top::{EdgeCountersView, EdgeKeyView, EdgeView, EdgesView, TopRow, TopView, rates};

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
    /// [`super::ExplainView`]; query `from` and `to`.
    pub const EXPLAIN: &str = "/explain";
}

/// What every refused request answers, with a status code of 400 or above.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ErrorView {
    /// What was wrong and what was wanted.
    pub error: String,
}
