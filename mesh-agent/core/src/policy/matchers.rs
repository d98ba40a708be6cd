//! How single values of a policy match: texts with `*`, namespaces, principals with trust-domain aliases.
//!
//! Invariant: total, and at most as slow as searching each piece of a value in the peer's text once.

use std::{fmt, sync::Arc};

use crate::{identity::Identity, snapshot::Mesh};

/// A text of a policy (S77).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StringMatch {
    /// The same text.
    Exact(Arc<str>),
    /// `abc*`: begins with it.
    Prefix(Arc<str>),
    /// `*abc`: ends with it. `*abc*` is this one too, with a literal `*` at its end: the first rule wins.
    Suffix(Arc<str>),
    /// `*`: any text but the empty one.
    Present,
}

impl StringMatch {
    /// Reads a value as a manifest has it.
    pub fn parse(text: &str) -> Self {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => Self::Present,
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (None, Some(prefix)) => Self::Prefix(prefix.into()),
            (None, None) => Self::Exact(text.into()),
        }
    }

    /// Whether `text` is meant.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }

    /// Whether `text` is meant when `*` stands for any run of characters wherever it is, as in namespaces and trust
    /// domains (S78).
    pub fn matches_glob(&self, text: &str) -> bool {
        match self {
            Self::Exact(pattern) => glob(pattern, text),
            Self::Prefix(prefix) if prefix.contains('*') => glob(&format!("{prefix}*"), text),
            Self::Suffix(suffix) if suffix.contains('*') => glob(&format!("*{suffix}"), text),
            Self::Prefix(_) | Self::Suffix(_) | Self::Present => self.matches(text),
        }
    }
}

/// Whether `text` is `pattern` with every `*` replaced by some run of characters.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut pieces = rest.split('*').peekable();
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return text.ends_with(piece);
        }
        // The leftmost place leaves the most for what follows.
        match text.find(piece) {
            Some(at) => text = text.get(at + piece.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    true
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

/// The trust domain that a policy's author writes for "this mesh's own" whatever it is called.
const LOCAL_TRUST_DOMAIN: &str = "cluster.local";

/// Whether a value of `principals` means this peer.
///
/// A principal of the mesh's own trust domain, of an alias, or of `cluster.local` means the same workload in all of
/// them (S88). That holds for the complete form `td/ns/NAMESPACE/sa/NAME` only; others match as they are written.
pub(super) fn principal_matches(pattern: &StringMatch, peer: &Identity, mesh: &Mesh) -> bool {
    match Aliased::of(pattern, mesh) {
        Some(aliased) => aliased.matches(pattern, peer, mesh),
        None => pattern.matches(&principal_of(peer)),
    }
}

/// Whether a value of `trustDomains` means this peer. Exactly the mesh's own or an alias means all of them.
pub(super) fn trust_domain_matches(pattern: &StringMatch, peer: &Identity, mesh: &Mesh) -> bool {
    if pattern.matches_glob(&peer.trust_domain) {
        return true;
    }
    let StringMatch::Exact(own) = pattern else { return false };
    mesh.is_own_trust_domain(own) && mesh.is_own_trust_domain(&peer.trust_domain)
}

/// The identity as policies write it: without `spiffe://`.
fn principal_of(peer: &Identity) -> String {
    format!("{}/ns/{}/sa/{}", peer.trust_domain, peer.namespace, peer.service_account)
}

/// A principal whose trust domain stands for the mesh's own and its aliases.
struct Aliased<'a> {
    /// What follows a leading `*` of the trust domain, `Some` if it has one.
    domain_suffix: Option<&'a str>,
    /// What follows the trust domain: `ns/…/sa/…`.
    path: &'a str,
    /// The value ends with `*`.
    open_end: bool,
}

impl<'a> Aliased<'a> {
    /// `None` when the value matches as it is written.
    fn of(pattern: &'a StringMatch, mesh: &Mesh) -> Option<Self> {
        let (text, open_start, open_end) = match pattern {
            StringMatch::Exact(text) => (text, false, false),
            StringMatch::Prefix(text) => (text, false, true),
            StringMatch::Suffix(text) => (text, true, text.ends_with('*')),
            StringMatch::Present => return None,
        };
        let (domain, path) = text.split_once('/')?;
        let is_any_domain = open_start && domain.is_empty();
        if is_any_domain || text.split('/').count() != 5 {
            return None;
        }
        let means = |own: &str| match (open_start, domain.strip_suffix('*')) {
            (true, _) => own.ends_with(domain),
            (false, Some(prefix)) => own.starts_with(prefix),
            (false, None) => own == domain,
        };
        let is_own = mesh.trust_domains().any(means);
        let is_local = !open_start && domain == LOCAL_TRUST_DOMAIN;
        (is_own || is_local).then_some(Self {
            domain_suffix: open_start.then_some(domain),
            path: if open_start { path.strip_suffix('*').unwrap_or(path) } else { path },
            open_end,
        })
    }

    fn matches(&self, pattern: &StringMatch, peer: &Identity, mesh: &Mesh) -> bool {
        // A trust domain with a `*` that fits one of the mesh's stays as it is written for that one.
        if let Some(suffix) = self.domain_suffix
            && (peer.trust_domain.ends_with(suffix) || !mesh.is_own_trust_domain(&peer.trust_domain))
        {
            return pattern.matches(&principal_of(peer));
        }
        if !mesh.is_own_trust_domain(&peer.trust_domain) {
            return false;
        }
        let path = format!("ns/{}/sa/{}", peer.namespace, peer.service_account);
        if self.open_end { path.starts_with(self.path) } else { path == self.path }
    }
}

#[cfg(test)]
mod tests;
