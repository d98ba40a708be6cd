//! Fuzzes delta responses and the resources in them.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_wire::fuzzing::xds(input));
