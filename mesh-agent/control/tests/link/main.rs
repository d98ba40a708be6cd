//! The controller link over loopback TLS: a real server, real agents, and clients that are neither.

mod bed;
mod certificates;
mod foreign;
mod state;
