//! Owns how a node proves its name before it has a certificate: tokens made of the cluster's join secret.
//!
//! A token is `NODE.MAC`, where MAC is the base64url of HMAC-SHA256 over the node's name. Whoever holds the join secret can
//! make a token for any node; whoever holds a token is that node and no other.
//!
//! Invariants: tokens are compared in constant time; no `Debug` shows a secret.

use std::fmt;

use aws_lc_rs::{
    hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

/// Bytes of a join secret that we make.
const SECRET_BYTES: usize = 32;
/// Shortest join secret accepted, so that an empty or truncated file is no secret.
const SECRET_BYTES_MIN: usize = 16;
/// Longest token that is looked at: a node's name has at most 253 bytes.
pub const TOKEN_BYTES_MAX: usize = 512;
/// Keeps tokens of nodes apart from anything else the secret may come to sign.
const PURPOSE: &str = "nodemesh-node:";

/// Why there is no join secret, or no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Neither base64url nor long enough.
    #[error("the join secret is not base64url of at least {SECRET_BYTES_MIN} bytes")]
    Secret,
    /// The system gave no random bytes.
    #[error("the system has no random bytes")]
    Random,
    /// Not `NODE.MAC`, or too long.
    #[error("the token is not of the form NODE.MAC")]
    Form,
    /// The MAC is not that of the node's name.
    #[error("the token was not made with this join secret")]
    Mac,
}

/// The secret behind the tokens of all nodes.
pub struct JoinSecret {
    key: hmac::Key,
    text: Zeroizing<String>,
}

impl JoinSecret {
    /// A new one.
    ///
    /// # Errors
    /// [`TokenError::Random`].
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = Zeroizing::new([0_u8; SECRET_BYTES]);
        SystemRandom::new().fill(&mut *bytes).map_err(|_| TokenError::Random)?;
        Ok(Self::of(&*bytes))
    }

    /// Reads what [`Self::to_text`] wrote; surrounding white space is allowed.
    ///
    /// # Errors
    /// [`TokenError::Secret`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(text.trim()).map_err(|_| TokenError::Secret)?);
        if bytes.len() < SECRET_BYTES_MIN {
            return Err(TokenError::Secret);
        }
        Ok(Self::of(&bytes))
    }

    fn of(bytes: &[u8]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, bytes),
            text: Zeroizing::new(URL_SAFE_NO_PAD.encode(bytes)),
        }
    }

    /// The secret as kept in a file.
    pub fn to_text(&self) -> &str {
        &self.text
    }

    /// The token of a node.
    pub fn token(&self, node: &str) -> String {
        let mac = hmac::sign(&self.key, format!("{PURPOSE}{node}").as_bytes());
        format!("{node}.{}", URL_SAFE_NO_PAD.encode(mac))
    }

    /// The node a token was made for.
    ///
    /// # Errors
    /// [`TokenError::Form`] and [`TokenError::Mac`].
    pub fn node_of<'a>(&self, token: &'a str) -> Result<&'a str, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Form);
        }
        // A node's name may hold dots, base64url does not.
        let (node, mac) = token.rsplit_once('.').ok_or(TokenError::Form)?;
        if node.is_empty() {
            return Err(TokenError::Form);
        }
        let mac = URL_SAFE_NO_PAD.decode(mac).map_err(|_| TokenError::Form)?;
        hmac::verify(&self.key, format!("{PURPOSE}{node}").as_bytes(), &mac).map_err(|_| TokenError::Mac)?;
        Ok(node)
    }
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinSecret").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_node_even_with_dots_in_the_name() {
        let secret = JoinSecret::generate().unwrap();
        for node in ["n1", "ip-10-0-0-1.eu.example", "a.b"] {
            assert_eq!(secret.node_of(&secret.token(node)), Ok(node));
        }
    }

    #[test]
    fn a_token_of_another_secret_or_for_another_node_is_refused() {
        let (ours, theirs) = (JoinSecret::generate().unwrap(), JoinSecret::generate().unwrap());
        assert_eq!(ours.node_of(&theirs.token("n1")), Err(TokenError::Mac));
        let token = ours.token("n1");
        let (_, mac) = token.rsplit_once('.').unwrap();
        assert_eq!(ours.node_of(&format!("n2.{mac}")), Err(TokenError::Mac));
    }

    #[test]
    fn what_is_no_token_is_refused_whatever_it_is() {
        let secret = JoinSecret::generate().unwrap();
        for text in ["", ".", "n1", ".abc", "n1.!!", &"x".repeat(TOKEN_BYTES_MAX + 1)] {
            assert_eq!(secret.node_of(text), Err(TokenError::Form), "{text}");
        }
        assert_eq!(secret.node_of("n1."), Err(TokenError::Mac));
    }

    #[test]
    fn a_secret_survives_its_file_and_a_truncated_file_is_none() {
        let secret = JoinSecret::generate().unwrap();
        let again = JoinSecret::parse(&format!("{}\n", secret.to_text())).unwrap();
        assert_eq!(again.node_of(&secret.token("n1")), Ok("n1"));
        for text in ["", "abcd", "not base64!"] {
            assert_eq!(JoinSecret::parse(text).err(), Some(TokenError::Secret), "{text}");
        }
    }

    #[test]
    fn nothing_prints_a_secret() {
        let secret = JoinSecret::generate().unwrap();
        assert!(!format!("{secret:?}").contains(secret.to_text()));
    }
}
