//! Everything the mesh says to, and asks of, a cluster's API server, except the watches of [`crate::source::kubernetes`].

pub mod authority;
pub mod client;
pub mod lease;
pub mod names;
pub mod roots;
pub mod statuses;
pub mod tokens;
pub mod webhook;
