//! HBONE: connections between pods of different nodes, as HTTP/2 CONNECT streams in mutual TLS (port 15008).
//!
//! - [`tls`]: the handshake by rustls, then records of our own, opened and sealed in place.
//! - [`h2`]: HTTP/2 as tunnels need it, without sockets.
//!
//! Invariants:
//! - A peer is who its certificate says; nothing it writes into headers is trusted.
//! - A failure here never falls back to plaintext.

#![cfg_attr(not(test), allow(dead_code, reason = "taken into use step by step"))]

mod h2;
mod tls;
