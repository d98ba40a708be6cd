//! Sources, index, compilation and publication of the mesh's configuration.
//!
//! ```text
//! directory, API server ─▶ document ─▶ resource ─▶ index ─▶ compile ─▶ Snapshot (mesh-core), SourceStatus
//! ```
//!
//! Invariants:
//! - A resource is checked once, when it is read; what is in the index is good.
//! - A published snapshot never goes back: an edit that cannot be read keeps the last good state of its file.
//!
//! Not here: what the snapshot means for a connection (`mesh-core`), the kernel (`mesh-redirect`).
#![deny(missing_docs)]

pub mod analyze;
pub mod compile;
pub mod crd;
pub mod index;
pub mod kubernetes;
pub mod link;
pub mod offline;
pub mod problem;
pub mod publish;
pub mod resource;
pub mod source;
pub mod status;
pub mod subscribe;
