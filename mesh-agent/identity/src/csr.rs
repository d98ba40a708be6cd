//! Certificate signing requests (PKCS#10): made for our own keys, and read from whoever asks the CA.
//!
//! Invariant: a [`Csr`] has proved possession of its key: its own signature is verified. [`Csr::parse`] is total and bounded.
//! Not here: whether the requester may have what it asks (`ca/sign.rs`).

use rcgen::{CertificateParams, DistinguishedName, SanType, string::Ia5String};
use rustls::pki_types::{
    CertificateSigningRequestDer, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, pem::PemObject,
};
use webpki::{RawPublicKeyEntity, aws_lc_rs as algorithms};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::{
        OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256,
        OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519, Oid,
    },
    prelude::FromDer,
    public_key::PublicKey,
};

use crate::{key::PrivateKey, peer::Principal};

/// Longest request that is looked at, in bytes as received (PEM or DER).
pub const CSR_BYTES_MAX: usize = 16 * 1024;

/// RSA moduli that are certified, in bits; the upper end bounds what a verification costs.
pub const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Why a request is refused before anyone asks whether it is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than [`CSR_BYTES_MAX`].
    #[error("the request is longer than {CSR_BYTES_MAX} bytes")]
    TooLong,
    /// Not PKCS#10, or with bytes behind it.
    #[error("the request is malformed")]
    Malformed,
    /// A kind or size of key, or of signature, that is not accepted.
    #[error("the request's key is of a kind that is not accepted")]
    Key,
    /// The request is not signed by the key it carries.
    #[error("the request's signature is wrong")]
    Signature,
}

/// A request whose signature holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    spki: Vec<u8>,
    uris: Vec<String>,
}

/// Makes the PEM of a request for `principal` by `key`.
///
/// # Errors
/// Only if the key cannot sign.
pub fn make(key: &PrivateKey, principal: &Principal) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(principal.to_string())?)];
    params.serialize_request(key)?.pem()
}

impl Csr {
    /// Reads a request, PEM or DER, and verifies its signature.
    ///
    /// # Errors
    /// Whatever a requester may send that is not a request by the key it carries.
    pub fn parse(request: &[u8]) -> Result<Self, CsrError> {
        if request.len() > CSR_BYTES_MAX {
            return Err(CsrError::TooLong);
        }
        // DER of a request begins with a SEQUENCE; PEM never does.
        if request.first() == Some(&0x30) {
            return Self::from_der(request);
        }
        let der = CertificateSigningRequestDer::from_pem_slice(request).map_err(|_| CsrError::Malformed)?;
        Self::from_der(&der)
    }

    fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        let Ok(([], request)) = X509CertificationRequest::from_der(der) else {
            return Err(CsrError::Malformed);
        };
        let info = &request.certification_request_info;
        let candidates = algorithms_of(&request.signature_algorithm.algorithm).ok_or(CsrError::Key)?;
        match info.subject_pki.parsed() {
            Ok(PublicKey::RSA(key)) if !RSA_BITS.contains(&key.key_size()) => return Err(CsrError::Key),
            Ok(PublicKey::RSA(_) | PublicKey::EC(_) | PublicKey::Unknown(_)) => {}
            _ => return Err(CsrError::Key),
        }
        let spki = SubjectPublicKeyInfoDer::from(info.subject_pki.raw);
        let key = RawPublicKeyEntity::try_from(&spki).map_err(|_| CsrError::Malformed)?;
        verify(&key, &candidates, info.raw, &request.signature_value.data)?;

        let mut uris = Vec::new();
        for extension in request.requested_extensions().into_iter().flatten() {
            match extension {
                ParsedExtension::SubjectAlternativeName(names) => {
                    uris.extend(names.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some((*uri).to_owned()),
                        _ => None,
                    }));
                }
                ParsedExtension::ParseError { .. } => return Err(CsrError::Malformed),
                _ => {}
            }
        }
        Ok(Self { spki: spki.to_vec(), uris })
    }

    /// The key to certify, as DER of SubjectPublicKeyInfo.
    pub fn public_key(&self) -> &[u8] {
        &self.spki
    }

    /// The URIs the requester put among its names. Only a wish; ztunnel puts its workload's identity here.
    pub fn uris(&self) -> &[String] {
        &self.uris
    }
}

/// Algorithms of a signature's OID, one for each kind of key.
fn algorithms_of(oid: &Oid<'_>) -> Option<Vec<&'static dyn SignatureVerificationAlgorithm>> {
    Some(if *oid == OID_SIG_ECDSA_WITH_SHA256 {
        vec![algorithms::ECDSA_P256_SHA256, algorithms::ECDSA_P384_SHA256]
    } else if *oid == OID_SIG_ECDSA_WITH_SHA384 {
        vec![algorithms::ECDSA_P384_SHA384, algorithms::ECDSA_P256_SHA384]
    } else if *oid == OID_SIG_ED25519 {
        vec![algorithms::ED25519]
    } else if *oid == OID_PKCS1_SHA256WITHRSA {
        vec![algorithms::RSA_PKCS1_2048_8192_SHA256]
    } else if *oid == OID_PKCS1_SHA384WITHRSA {
        vec![algorithms::RSA_PKCS1_2048_8192_SHA384]
    } else if *oid == OID_PKCS1_SHA512WITHRSA {
        vec![algorithms::RSA_PKCS1_2048_8192_SHA512]
    } else {
        return None;
    })
}

fn verify(
    key: &RawPublicKeyEntity<'_>,
    candidates: &[&'static dyn SignatureVerificationAlgorithm],
    message: &[u8],
    signature: &[u8],
) -> Result<(), CsrError> {
    let mut error = CsrError::Key;
    for algorithm in candidates {
        match key.verify_signature(*algorithm, message, signature) {
            Ok(()) => return Ok(()),
            // The algorithm is for this kind of key, so the signature is what is wrong.
            Err(webpki::Error::InvalidSignatureForPublicKey) => error = CsrError::Signature,
            Err(_) => {}
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests;
