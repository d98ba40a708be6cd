//! SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! Invariant: an [`Identity`] in memory is well-formed; text of a peer becomes one only through [`Identity::parse`].

use std::{fmt, str::FromStr, sync::Arc};

/// Longest identity that is accepted, in bytes (SPIFFE-ID §2.3).
pub const IDENTITY_BYTES_MAX: usize = 2048;

/// Who a workload is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Trust domain, lower case.
    pub trust_domain: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
}

/// Why a text is no workload identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Another scheme, or none.
    #[error("does not start with spiffe://")]
    Scheme,
    /// Longer than [`IDENTITY_BYTES_MAX`].
    #[error("is longer than {IDENTITY_BYTES_MAX} bytes")]
    Length,
    /// Not a trust domain.
    #[error("has no trust domain of lower-case letters, digits, '.', '-' and '_'")]
    TrustDomain,
    /// A path of another form.
    #[error("is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    Path,
}

impl Identity {
    /// Makes an identity of its parts, which the caller knows to be valid names.
    pub fn new(
        trust_domain: impl Into<Arc<str>>,
        namespace: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// Reads `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`, as a certificate's URI says it.
    ///
    /// # Errors
    /// Any other form; what is merely similar to an identity is none.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        if text.len() > IDENTITY_BYTES_MAX {
            return Err(IdentityError::Length);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(IdentityError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(IdentityError::Path)?;
        let is_domain_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if trust_domain.is_empty() || !trust_domain.bytes().all(is_domain_byte) {
            return Err(IdentityError::TrustDomain);
        }
        let is_segment = |s: &str| {
            !s.is_empty()
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
                && s != "."
                && s != ".."
        };
        let mut segments = path.split('/');
        match [segments.next(), segments.next(), segments.next(), segments.next(), segments.next()] {
            [Some("ns"), Some(namespace), Some("sa"), Some(account), None]
                if is_segment(namespace) && is_segment(account) =>
            {
                Ok(Self::new(trust_domain, namespace, account))
            }
            _ => Err(IdentityError::Path),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Identity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_as_it_was_written() {
        let identity = Identity::new("cluster.local", "shop", "cart");
        assert_eq!(identity.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(Identity::parse(&identity.to_string()), Ok(identity));
    }

    #[test]
    fn what_is_merely_similar_is_no_identity() {
        for (text, error) in [
            ("https://cluster.local/ns/a/sa/b", IdentityError::Scheme),
            ("spiffe://cluster.local", IdentityError::Path),
            ("spiffe:///ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://Cluster.Local/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://user@td/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://td:443/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://td/ns/a/sa/b/", IdentityError::Path),
            ("spiffe://td/ns/a/sa/b/c", IdentityError::Path),
            ("spiffe://td/ns//sa/b", IdentityError::Path),
            ("spiffe://td/ns/../sa/b", IdentityError::Path),
            ("spiffe://td/ns/a%2e/sa/b", IdentityError::Path),
            ("spiffe://td/sa/b/ns/a", IdentityError::Path),
            ("spiffe://td/ns/a/sa/b?x", IdentityError::Path),
        ] {
            assert_eq!(Identity::parse(text), Err(error), "{text}");
        }
        let long = format!("spiffe://td/ns/a/sa/{}", "b".repeat(IDENTITY_BYTES_MAX));
        assert_eq!(Identity::parse(&long), Err(IdentityError::Length));
    }
}
