//! The data path in one process over loopback: a worker, a pod made of plain sockets, and a kernel of tables.

mod attempts;
mod dns;
mod fixture;
mod hbone;
mod http;
mod inbound_limits;
mod inbound_requests;
pub(crate) mod layers;
mod life;
mod outbound;
mod relay;
mod streams;
mod upstream;
