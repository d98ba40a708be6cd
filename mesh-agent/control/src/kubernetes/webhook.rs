//! The validating admission webhook: a resource that the mesh cannot use is refused before it is stored, in the words of
//! `meshctl validate`.
//!
//! Invariants:
//! - Judged by the very code that reads resources, so what is let through can be used and what is refused could not.
//! - A request of any other kind, or that takes an object away, is let through; so is one that only touches the status, or leaves the spec as
//!   it is: an object from before the mesh can always be mended, marked and deleted.
//! - What other controllers carry out is theirs to judge.
//! - What it shows is the controller's own certificate, renewed and rooted as that is.

mod ca_bundle;
mod review;
mod serve;

pub use self::{
    ca_bundle::keep_ca_bundle,
    serve::{PATH, Webhook, WebhookMetrics},
};
