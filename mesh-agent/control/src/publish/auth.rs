//! Owns who a client of the controller is: a node, by its certificate, by a token made of the join secret, or by its service account's token.
//!
//! Invariants: a client that shows both must be the same node by both; nothing but a node gets anything.

use std::{net::SocketAddr, sync::Arc};

use mesh_identity::peer::Principal;
use tonic::{Code, Status, metadata::MetadataMap};

use crate::{
    kubernetes::tokens::{TokenRefusal, TokenReviews},
    link::token::JoinSecret,
};

/// What a node's token is proved by.
#[derive(Debug)]
pub enum NodeProof {
    /// Tokens are made of this secret.
    JoinSecret(Box<JoinSecret>),
    /// Tokens are service accounts', and the API server reviews them.
    ServiceAccount(Box<TokenReviews>),
}

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
    /// What the API server says of a service account's token.
    #[error(transparent)]
    ServiceAccount(#[from] TokenRefusal),
}

impl AuthError {
    /// The reason as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "no_credentials",
            Self::NotANode => "not_a_node",
            Self::Token => "bad_token",
            Self::Mismatch => "credentials_differ",
            Self::ServiceAccount(TokenRefusal::Form | TokenRefusal::NotAuthentic) => "bad_token",
            Self::ServiceAccount(TokenRefusal::Account) => "other_service_account",
            Self::ServiceAccount(TokenRefusal::NoNode) => "token_without_node",
            Self::ServiceAccount(TokenRefusal::Unavailable) => "token_review_unavailable",
        }
    }
}

impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        let code = match error {
            // Worth another try.
            AuthError::ServiceAccount(TokenRefusal::Unavailable | TokenRefusal::NoNode) => Code::Unavailable,
            _ => Code::Unauthenticated,
        };
        Self::new(code, format!("{}: {error}", error.as_str()))
    }
}

/// The node behind a call.
///
/// # Errors
/// It is none.
pub async fn node_of(
    connection: Option<&Connection>,
    metadata: &MetadataMap,
    proof: &NodeProof,
) -> Result<Arc<str>, AuthError> {
    let by_certificate = match connection.and_then(|connection| connection.principal.as_ref()) {
        Some(Principal::Node(node)) => Some(Arc::clone(&node.node)),
        Some(Principal::Workload(_)) => return Err(AuthError::NotANode),
        None => None,
    };
    let by_token: Option<Arc<str>> = match metadata.get("authorization") {
        None => None,
        Some(header) => {
            let header = header.to_str().map_err(|_| AuthError::Token)?;
            let (scheme, token) = header.split_once(' ').ok_or(AuthError::Token)?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(AuthError::Token);
            }
            Some(match proof {
                NodeProof::JoinSecret(secret) => {
                    secret.node_of(token.trim()).map_err(|_| AuthError::Token)?.into()
                }
                NodeProof::ServiceAccount(reviews) => reviews.node_of(token.trim()).await?,
            })
        }
    };
    match (by_certificate, by_token) {
        // Such nodes get no certificates of their own: each of their calls brings the token.
        (_, None) if matches!(proof, NodeProof::ServiceAccount(_)) => Err(AuthError::Missing),
        (Some(node), Some(other)) if *node != *other => Err(AuthError::Mismatch),
        (Some(node), _) => Ok(node),
        (None, Some(node)) => Ok(node),
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

    fn proof() -> (NodeProof, String) {
        let secret = JoinSecret::generate().unwrap();
        let token = secret.token("n1");
        (NodeProof::JoinSecret(Box::new(secret)), token)
    }

    #[tokio::test]
    async fn a_node_is_known_by_certificate_or_token() {
        let (proof, token) = proof();
        let (none, token) = (MetadataMap::new(), bearer(&token));
        let by = async |principal, metadata: &MetadataMap| {
            let node = node_of(Some(&connection(principal)), metadata, &proof).await;
            node.map(|node| node.to_string())
        };
        assert_eq!(by(node("n1"), &none).await.as_deref(), Ok("n1"));
        assert_eq!(by(None, &token).await.as_deref(), Ok("n1"));
        assert_eq!(by(node("n1"), &token).await.as_deref(), Ok("n1"));
        assert_eq!(by(node("n2"), &token).await, Err(AuthError::Mismatch));
        assert_eq!(by(None, &none).await, Err(AuthError::Missing));
    }

    #[tokio::test]
    async fn a_workload_is_no_node_even_with_a_token() {
        let (proof, token) = proof();
        let workload = Some(Principal::from(Identity::new("cluster.local", "shop", "cart")));
        let outcome = node_of(Some(&connection(workload)), &bearer(&token), &proof).await;
        assert_eq!(outcome, Err(AuthError::NotANode));
    }

    #[tokio::test]
    async fn a_certificate_does_not_excuse_a_bad_token() {
        let (proof, _) = proof();
        let other = JoinSecret::generate().unwrap().token("n1");
        for metadata in [bearer("n1.x"), bearer(&other), bearer("")] {
            let outcome = node_of(Some(&connection(node("n1"))), &metadata, &proof).await;
            assert_eq!(outcome, Err(AuthError::Token));
        }
        let mut basic = MetadataMap::new();
        basic.insert("authorization", "Basic bjE6eA==".parse().unwrap());
        assert_eq!(node_of(None, &basic, &proof).await, Err(AuthError::Token));
    }
}
