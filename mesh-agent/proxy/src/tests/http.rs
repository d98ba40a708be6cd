//! Requests of a client's pod through the worker to real servers: routed, rewritten, refused.

mod abuse;
mod answers;
mod fixture;
mod hostile;
mod http1;
mod http2;
mod preview;
mod rules;
mod smuggling;
mod switches;
