//! Private keys: made in this process, held in memory only, wiped when dropped.
//!
//! Invariant: no key of a workload is ever serialised; it exists as aws-lc's own object, which cleanses itself. The one
//! exception is a CA's key, which is read from and written to the CA's folder as PEM ([`PrivateKey::generate_pem`]).

use std::{fmt, str::FromStr, sync::Arc};

use rustls::{
    SignatureAlgorithm, SignatureScheme,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject},
    sign::SigningKey,
};
use x509_parser::{prelude::FromDer, x509::SubjectPublicKeyInfo};
use zeroize::Zeroizing;

/// Kinds of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyAlgorithm {
    /// ECDSA on P-256: the default, small and fast, what ztunnel uses.
    #[default]
    EcdsaP256,
    /// ECDSA on P-384.
    EcdsaP384,
    /// Ed25519.
    Ed25519,
    /// RSA of 2048 bits; making one takes a tenth of a second.
    Rsa2048,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The random generator or aws-lc failed.
    #[error("could not make a key")]
    Generate,
    /// Not PEM of a private key.
    #[error("is not a private key in PEM (PKCS#8, PKCS#1 or SEC1)")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// A kind of key that is not supported, or a damaged one.
    #[error("is not a usable private key")]
    Unusable(#[source] rustls::Error),
    /// A name that is no [`KeyAlgorithm`].
    #[error("is not one of ecdsa-p256, ecdsa-p384, ed25519, rsa-2048")]
    Algorithm,
}

impl KeyAlgorithm {
    /// The name in options and views.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa2048 => "rsa-2048",
        }
    }

    /// PKCS#8 of a new key.
    fn generate(self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        use aws_lc_rs::{
            encoding::AsDer,
            rand::SystemRandom,
            rsa::KeySize,
            signature::{
                ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
                RsaKeyPair,
            },
        };
        let random = SystemRandom::new();
        let ecdsa = |algorithm| {
            let document =
                EcdsaKeyPair::generate_pkcs8(algorithm, &random).map_err(|_| KeyError::Generate)?;
            Ok(Zeroizing::new(document.as_ref().to_vec()))
        };
        match self {
            Self::EcdsaP256 => ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING),
            Self::EcdsaP384 => ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING),
            Self::Ed25519 => {
                let document = Ed25519KeyPair::generate_pkcs8(&random).map_err(|_| KeyError::Generate)?;
                Ok(Zeroizing::new(document.as_ref().to_vec()))
            }
            Self::Rsa2048 => {
                let pair = RsaKeyPair::generate(KeySize::Rsa2048).map_err(|_| KeyError::Generate)?;
                let document = pair.as_der().map_err(|_| KeyError::Generate)?;
                Ok(Zeroizing::new(document.as_ref().to_vec()))
            }
        }
    }
}

impl FromStr for KeyAlgorithm {
    type Err = KeyError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::EcdsaP256, Self::EcdsaP384, Self::Ed25519, Self::Rsa2048]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == name)
            .ok_or(KeyError::Algorithm)
    }
}

/// A private key that can sign, for TLS, for requests and (a CA's) for certificates. Clones share the key.
#[derive(Clone)]
pub struct PrivateKey {
    signing: Arc<dyn SigningKey>,
    /// The public half as SubjectPublicKeyInfo.
    spki: SubjectPublicKeyInfoDer<'static>,
    /// The public half as the bare bit string.
    public: Vec<u8>,
    scheme: SignatureScheme,
    x509: &'static rcgen::SignatureAlgorithm,
}

impl PrivateKey {
    /// Makes a key.
    ///
    /// # Errors
    /// The random generator failed.
    pub fn generate(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        Self::from_pkcs8(&algorithm.generate()?)
    }

    /// Makes a key that is to be stored: the key and its PEM, which the caller must keep secret. For CAs only.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_pem(algorithm: KeyAlgorithm) -> Result<(Self, Zeroizing<String>), KeyError> {
        let pkcs8 = algorithm.generate()?;
        Ok((Self::from_pkcs8(&pkcs8)?, pem("PRIVATE KEY", &pkcs8)))
    }

    /// Reads the first private key of a PEM text (PKCS#8, PKCS#1 or SEC1). For CAs only.
    ///
    /// # Errors
    /// No key, a damaged one, or a kind that is not supported.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        Self::new(PrivateKeyDer::from_pem_slice(pem).map_err(KeyError::Pem)?)
    }

    fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, KeyError> {
        Self::new(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.to_vec())))
    }

    /// Takes the key over and wipes its serialised form.
    fn new(mut der: PrivateKeyDer<'static>) -> Result<Self, KeyError> {
        use zeroize::Zeroize as _;
        let signing = any_supported_type(&der).map_err(KeyError::Unusable);
        der.zeroize();
        let signing = signing?;
        let unusable = |text: &str| KeyError::Unusable(rustls::Error::General(text.to_owned()));
        let spki = signing.public_key().ok_or_else(|| unusable("no public key"))?.into_owned();
        let public = match SubjectPublicKeyInfo::from_der(&spki) {
            Ok(([], info)) => info.subject_public_key.data.to_vec(),
            _ => return Err(unusable("public key does not parse")),
        };
        let candidates: &[(SignatureScheme, &'static rcgen::SignatureAlgorithm)] = match signing.algorithm() {
            SignatureAlgorithm::ECDSA => &[
                (SignatureScheme::ECDSA_NISTP256_SHA256, &rcgen::PKCS_ECDSA_P256_SHA256),
                (SignatureScheme::ECDSA_NISTP384_SHA384, &rcgen::PKCS_ECDSA_P384_SHA384),
            ],
            SignatureAlgorithm::ED25519 => &[(SignatureScheme::ED25519, &rcgen::PKCS_ED25519)],
            SignatureAlgorithm::RSA => &[(SignatureScheme::RSA_PKCS1_SHA256, &rcgen::PKCS_RSA_SHA256)],
            _ => return Err(unusable("kind of key")),
        };
        let (scheme, x509) = *candidates
            .iter()
            .find(|(scheme, _)| signing.choose_scheme(&[*scheme]).is_some())
            .ok_or_else(|| unusable("curve of the key"))?;
        Ok(Self { signing, spki, public, scheme, x509 })
    }

    /// The public half as DER of SubjectPublicKeyInfo.
    pub fn public_key(&self) -> &[u8] {
        &self.spki
    }

    /// The key as rustls signs with it.
    pub(crate) fn signing_key(&self) -> Arc<dyn SigningKey> {
        Arc::clone(&self.signing)
    }

    /// The kind of key in words of operators: the name of a [`KeyAlgorithm`], or `rsa` of whatever length.
    pub fn kind(&self) -> &'static str {
        match self.scheme {
            SignatureScheme::ECDSA_NISTP256_SHA256 => KeyAlgorithm::EcdsaP256.as_str(),
            SignatureScheme::ECDSA_NISTP384_SHA384 => KeyAlgorithm::EcdsaP384.as_str(),
            SignatureScheme::ED25519 => KeyAlgorithm::Ed25519.as_str(),
            _ => "rsa",
        }
    }

    /// Whether certificates need `keyEncipherment` for this key's kind, as RSA's traditionally have it.
    pub(crate) fn is_rsa(&self) -> bool {
        self.signing.algorithm() == SignatureAlgorithm::RSA
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl rcgen::PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.x509
    }
}

impl rcgen::SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signer = self.signing.choose_scheme(&[self.scheme]).ok_or(rcgen::Error::RemoteKeyError)?;
        signer.sign(message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// PEM, wiped when dropped: it may hold a key.
pub(crate) fn pem(label: &str, der: &[u8]) -> Zeroizing<String> {
    use base64::Engine as _;
    let body = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(der));
    // Never grows, so no copy is left behind.
    let mut pem = Zeroizing::new(String::with_capacity(body.len() + body.len() / 64 + 2 * label.len() + 64));
    pem.push_str("-----BEGIN ");
    pem.push_str(label);
    pem.push_str("-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str("-----END ");
    pem.push_str(label);
    pem.push_str("-----\n");
    pem
}
