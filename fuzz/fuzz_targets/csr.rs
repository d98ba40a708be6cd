//! Fuzzes requests for certificates, PEM and DER.
#![no_main]

use mesh_identity::csr::{CSR_BYTES_MAX, Csr};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(csr) = Csr::parse(input) {
        assert!(input.len() <= CSR_BYTES_MAX && !csr.public_key().is_empty());
    }
});
