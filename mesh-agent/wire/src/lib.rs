//! Owns every format that crosses a machine boundary: protobuf messages, xDS, HBONE headers.
//!
//! Invariant: decoders are total. Whatever bytes arrive, they return a value or an error, in bounded memory.
#![deny(missing_docs)]

pub mod codec;
pub mod encoded;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod hbone;
pub mod proto;
pub mod wds;

/// Istio's name of the only cluster of a mesh, in names of workloads and in baggage.
pub const CLUSTER: &str = "Kubernetes";
