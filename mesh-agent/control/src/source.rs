//! Where resources come from. Every source feeds the same [`crate::index::Index`] with the same types.

pub(crate) mod directory;
pub mod document;
pub mod file;
pub mod kubernetes;
pub mod lines;
pub mod pulse;
