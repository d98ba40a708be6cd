//! Fuzzes the baggage header.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_wire::fuzzing::baggage(input));
