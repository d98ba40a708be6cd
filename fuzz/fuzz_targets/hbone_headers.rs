//! Fuzzes headers of CONNECT requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_wire::fuzzing::hbone_headers(input));
