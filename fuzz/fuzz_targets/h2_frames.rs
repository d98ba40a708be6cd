//! Fuzzes HTTP/2 frames of a tunnel's peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_proxy::fuzz::h2_frames(input));
