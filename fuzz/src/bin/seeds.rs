//! Writes the inputs that fuzzing starts from: `seeds FOLDER` fills `FOLDER/TARGET/`.

use std::{env, error::Error, fs, path::PathBuf};

use base64::Engine as _;
use mesh_identity::{
    csr,
    key::{KeyAlgorithm, PrivateKey},
    peer::Principal,
};
use mesh_wire::fuzzing;

fn main() -> Result<(), Box<dyn Error>> {
    let folder: PathBuf = env::args_os().nth(1).ok_or("usage: seeds FOLDER")?.into();
    let targets = [
        ("xds", fuzzing::xds_seeds()),
        ("hbone_headers", fuzzing::hbone_header_seeds()),
        ("baggage", fuzzing::baggage_seeds()),
        ("csr", csr_seeds()?),
        ("h2_frames", h2_seeds()),
    ];
    for (target, seeds) in targets {
        let folder = folder.join(target);
        fs::create_dir_all(&folder)?;
        for (index, seed) in seeds.into_iter().enumerate() {
            fs::write(folder.join(format!("seed-{index}")), seed)?;
        }
    }
    Ok(())
}

/// Requests as our agents make them, PEM and DER, of each kind of key.
fn csr_seeds() -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let principal = Principal::parse("spiffe://cluster.local/ns/shop/sa/cart")?;
    let kinds =
        [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048];
    let mut seeds = Vec::new();
    for kind in kinds {
        let pem = csr::make(&PrivateKey::generate(kind)?, &principal)?;
        seeds.push(der_of(&pem)?);
        seeds.push(pem.into_bytes());
    }
    Ok(seeds)
}

/// The bytes between the lines of a PEM.
fn der_of(pem: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
}

/// A server's and a client's view of one small tunnel. The first byte chooses: bit 0 the client, the rest the size of reads.
fn h2_seeds() -> Vec<Vec<u8>> {
    let connect = b"\x02\x07CONNECT\x01\x0b10.0.0.1:80";
    let asked = [
        frame(1, 4, 1, connect),
        frame(0, 0, 1, b"hello"),
        frame(8, 0, 0, &[0, 0, 1, 0]),
        frame(6, 0, 0, &[7; 8]),
        frame(0, 1, 1, b""),
        frame(3, 0, 1, &[0, 0, 0, 8]),
    ];
    let answered = [
        frame(4, 1, 0, b""),
        frame(1, 4, 1, b"\x88"),
        frame(0, 8, 1, b"\x02hi\0\0"),
        frame(7, 0, 0, &[0; 8]),
    ];
    vec![[vec![0xfc], asked.concat()].concat(), [vec![0x01], answered.concat()].concat()]
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap_or(u8::MAX);
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
}
