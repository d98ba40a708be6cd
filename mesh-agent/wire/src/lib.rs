//! Owns every format that crosses a machine boundary: protobuf messages, xDS, HBONE headers.
//!
//! Invariant: decoders are total. Whatever bytes arrive, they return a value or an error, in bounded memory.
#![deny(missing_docs)]

pub mod hbone;
pub mod proto;
pub mod wds;
