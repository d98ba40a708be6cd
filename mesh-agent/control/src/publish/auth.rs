//! Owns who a client of the controller is: a node, by its certificate or by its token.
//!
//! Invariants: a client that shows both must be the same node by both; nothing but a node gets anything.

use std::{net::SocketAddr, sync::Arc};

use mesh_identity::peer::Principal;
use tonic::{Code, Status, metadata::MetadataMap};

use crate::link::token::JoinSecret;

/// What is known of a connection; every call on it carries it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Where it comes from.
    pub remote: SocketAddr,
    /// Whom its certificate, if it showed one, names. The handshake has verified it.
    pub principal: Option<Principal>,
}

/// Why a client is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Neither a certificate nor a token.
    #[error("neither a node's certificate nor a node's token was shown")]
    Missing,
    /// The certificate is that of a workload.
    #[error("the certificate is not a node's")]
    NotANode,
    /// The header is not `Bearer TOKEN`, or the token is not ours.
    #[error("the token is not a node's")]
    Token,
    /// The token is of another node than the certificate.
    #[error("certificate and token are of different nodes")]
    Mismatch,
}

impl AuthError {
    /// The reason as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "no_credentials",
            Self::NotANode => "not_a_node",
            Self::Token => "bad_token",
            Self::Mismatch => "credentials_differ",
        }
    }
}

impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        Self::new(Code::Unauthenticated, format!("{}: {error}", error.as_str()))
    }
}

/// The node behind a call.
///
/// # Errors
/// It is none.
pub fn node_of(
    connection: Option<&Connection>,
    metadata: &MetadataMap,
    secret: &JoinSecret,
) -> Result<Arc<str>, AuthError> {
    let by_certificate = match connection.and_then(|connection| connection.principal.as_ref()) {
        Some(Principal::Node(node)) => Some(Arc::clone(&node.node)),
        Some(Principal::Workload(_)) => return Err(AuthError::NotANode),
        None => None,
    };
    let by_token = match metadata.get("authorization") {
        None => None,
        Some(header) => {
            let header = header.to_str().map_err(|_| AuthError::Token)?;
            let (scheme, token) = header.split_once(' ').ok_or(AuthError::Token)?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(AuthError::Token);
            }
            Some(secret.node_of(token.trim()).map_err(|_| AuthError::Token)?)
        }
    };
    match (by_certificate, by_token) {
        (Some(node), Some(other)) if *node != *other => Err(AuthError::Mismatch),
        (Some(node), _) => Ok(node),
        (None, Some(node)) => Ok(node.into()),
        (None, None) => Err(AuthError::Missing),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::identity::Identity;
    use mesh_identity::peer::NodeIdentity;

    use super::*;

    fn connection(principal: Option<Principal>) -> Connection {
        Connection { remote: "127.0.0.1:1".parse().unwrap(), principal }
    }

    fn node(name: &str) -> Option<Principal> {
        Some(NodeIdentity::new("cluster.local", name).unwrap().into())
    }

    fn bearer(token: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
        metadata
    }

    #[test]
    fn a_node_is_known_by_certificate_or_token() {
        let secret = JoinSecret::generate().unwrap();
        let (none, token) = (MetadataMap::new(), bearer(&secret.token("n1")));
        let by = |principal, metadata: &MetadataMap| node_of(Some(&connection(principal)), metadata, &secret);
        assert_eq!(by(node("n1"), &none).as_deref(), Ok("n1"));
        assert_eq!(by(None, &token).as_deref(), Ok("n1"));
        assert_eq!(by(node("n1"), &token).as_deref(), Ok("n1"));
        assert_eq!(by(node("n2"), &token), Err(AuthError::Mismatch));
        assert_eq!(by(None, &none), Err(AuthError::Missing));
    }

    #[test]
    fn a_workload_is_no_node_even_with_a_token() {
        let secret = JoinSecret::generate().unwrap();
        let workload = Some(Principal::from(Identity::new("cluster.local", "shop", "cart")));
        let outcome = node_of(Some(&connection(workload)), &bearer(&secret.token("n1")), &secret);
        assert_eq!(outcome, Err(AuthError::NotANode));
    }

    #[test]
    fn a_certificate_does_not_excuse_a_bad_token() {
        let secret = JoinSecret::generate().unwrap();
        let other = JoinSecret::generate().unwrap().token("n1");
        for metadata in [bearer("n1.x"), bearer(&other), bearer("")] {
            let outcome = node_of(Some(&connection(node("n1"))), &metadata, &secret);
            assert_eq!(outcome, Err(AuthError::Token));
        }
        let mut basic = MetadataMap::new();
        basic.insert("authorization", "Basic bjE6eA==".parse().unwrap());
        assert_eq!(node_of(None, &basic, &secret), Err(AuthError::Token));
    }
}
