//! Requests of a client's pod through the worker to real servers: routed, rewritten, refused.

mod abuse;
mod answers;
mod by_hash;
mod fixture;
mod hostile;
mod http1;
mod http2;
mod made_here;
mod preview;
mod rules;
mod smuggling;
mod switches;
mod tables;
