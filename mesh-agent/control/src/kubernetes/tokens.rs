//! Owns who an agent is by its service account's token: the API server reviews the token, and says on which node its pod runs.
//!
//! Invariants:
//! - A token counts only for our audience, only of the agents' own service account, and only for the node that the API server names;
//!   what the agent says of itself is never asked.
//! - What is remembered is bounded, holds no token, and ends before the token does.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use mesh_core::{id::WorkloadId, snapshot::Snapshot};
use mesh_identity::clock::Clock;
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

/// Whom the agents' tokens are for.
pub const AUDIENCE: &str = "nodemesh.dev";
/// The agents' service account.
pub const AGENT_ACCOUNT: &str = "nodemesh-agent";
/// Longest token that is looked at.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// Tokens that are remembered: two for each of ten thousand nodes.
const REMEMBERED_MAX: usize = 20_000;
/// Refusals that are remembered.
const REFUSED_MAX: usize = 1_000;
/// A review is forgotten so long before its token ends.
const BEFORE_END: Duration = Duration::from_secs(30);
/// And after this time anyway: a pod may be deleted, and its token with it.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);
/// How long a refusal is remembered, so that a client that tries again and again costs the API server little.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// Reviews under way at once.
const REVIEWS_MAX: usize = 32;
/// How long a review may take, waiting for its turn included.
const REVIEW_WITHIN: Duration = Duration::from_secs(10);
/// Extra facts of a token's user: its node, its pod, and the pod's uid.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Why a token is no node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    /// Too long to be one.
    #[error("the token is too long")]
    Form,
    /// The API server does not know it, or not for our audience.
    #[error("the API server does not accept the token for {AUDIENCE}")]
    NotAuthentic,
    /// It is of somebody else.
    #[error("the token is not of the agents' service account")]
    Account,
    /// It is bound to no pod on a node.
    #[error("the token does not say on which node its pod runs")]
    NoNode,
    /// The API server does not answer.
    #[error("the API server cannot be asked about the token")]
    Unavailable,
}

/// Reviews tokens.
pub struct TokenReviews {
    reviews: Api<TokenReview>,
    namespace: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    clock: Arc<dyn Clock>,
    under_way: Semaphore,
    known: Mutex<Known>,
}

type Digest = [u8; 32];

#[derive(Default)]
struct Known {
    nodes: HashMap<Digest, (Arc<str>, SystemTime)>,
    refused: HashMap<Digest, (TokenRefusal, SystemTime)>,
}

impl TokenReviews {
    /// For agents in `namespace`; `snapshots` say where their pods run, for API servers that do not.
    pub fn new(
        client: Client,
        namespace: impl Into<String>,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            reviews: Api::all(client),
            namespace: namespace.into(),
            snapshots,
            clock,
            under_way: Semaphore::new(REVIEWS_MAX),
            known: Mutex::default(),
        }
    }

    /// The node whose agent holds this token.
    ///
    /// # Errors
    /// None does, or nobody can be asked.
    pub async fn node_of(&self, token: &str) -> Result<Arc<str>, TokenRefusal> {
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX {
            return Err(TokenRefusal::Form);
        }
        let digest = digest_of(token);
        if let Some(known) = self.lock().find(&digest, self.clock.now()) {
            return known;
        }
        let status = timeout(REVIEW_WITHIN, self.review(token)).await.unwrap_or_else(|_late| {
            tracing::warn!("the API server takes too long to review a token");
            Err(TokenRefusal::Unavailable)
        })?;
        let judged = judge(&status, &self.namespace, &self.snapshots.borrow());
        let now = self.clock.now();
        self.lock().remember(digest, &judged, end_of(token), now);
        judged
    }

    async fn review(&self, token: &str) -> Result<TokenReviewStatus, TokenRefusal> {
        let _turn = self.under_way.acquire().await.map_err(|_closed| TokenRefusal::Unavailable)?;
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![AUDIENCE.to_owned()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.reviews.create(&PostParams::default(), &review).await.map_err(|error| {
            tracing::warn!(%error, "ask the API server to review a token");
            TokenRefusal::Unavailable
        })?;
        Ok(answer.status.unwrap_or_default())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenReviews").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Known {
    fn find(&self, digest: &Digest, now: SystemTime) -> Option<Result<Arc<str>, TokenRefusal>> {
        if let Some((node, until)) = self.nodes.get(digest)
            && now < *until
        {
            return Some(Ok(Arc::clone(node)));
        }
        self.refused.get(digest).filter(|(_, until)| now < *until).map(|(refusal, _)| Err(*refusal))
    }

    fn remember(
        &mut self,
        digest: Digest,
        judged: &Result<Arc<str>, TokenRefusal>,
        ends: Option<SystemTime>,
        now: SystemTime,
    ) {
        match judged {
            Ok(node) => {
                let by_end = ends.and_then(|ends| ends.checked_sub(BEFORE_END));
                let until = by_end.unwrap_or(now).min(now + REMEMBERED_FOR);
                make_room(&mut self.nodes, REMEMBERED_MAX, now);
                self.nodes.insert(digest, (Arc::clone(node), until));
            }
            // The pod may not have been seen yet.
            Err(TokenRefusal::Unavailable | TokenRefusal::NoNode) => {}
            Err(refusal) => {
                make_room(&mut self.refused, REFUSED_MAX, now);
                self.refused.insert(digest, (*refusal, now + REFUSED_FOR));
            }
        }
    }
}

/// Leaves room for one more: what has ended goes first, then everything.
fn make_room<T>(known: &mut HashMap<Digest, (T, SystemTime)>, max: usize, now: SystemTime) {
    if known.len() >= max {
        known.retain(|_, (_, until)| now < *until);
    }
    if known.len() >= max {
        known.clear();
    }
}

fn digest_of(token: &str) -> Digest {
    let digest = digest::digest(&digest::SHA256, token.as_bytes());
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// When a token ends, as it says itself. Only worth something of a token that was reviewed.
fn end_of(token: &str) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: u64,
    }
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: Claims = serde_json::from_slice(&payload).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(claims.exp))
}

/// What a review means.
fn judge(status: &TokenReviewStatus, namespace: &str, snapshot: &Snapshot) -> Result<Arc<str>, TokenRefusal> {
    let is_for_us = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if status.authenticated != Some(true) || !is_for_us {
        return Err(TokenRefusal::NotAuthentic);
    }
    let user = status.user.as_ref().ok_or(TokenRefusal::NotAuthentic)?;
    if user.username.as_deref() != Some(&format!("system:serviceaccount:{namespace}:{AGENT_ACCOUNT}")) {
        return Err(TokenRefusal::Account);
    }
    let extra = |key: &str| match user.extra.as_ref()?.get(key)?.as_slice() {
        [one] if !one.is_empty() => Some(one.as_str()),
        _ => None,
    };
    if let Some(node) = extra(NODE_NAME) {
        return Ok(node.into());
    }
    let (Some(pod), Some(uid)) = (extra(POD_NAME), extra(POD_UID)) else { return Err(TokenRefusal::NoNode) };
    // The id is made of the uid too, so a pod that was made anew under the same name is another one.
    let workload = snapshot.workload(WorkloadId::of_pod(namespace, pod, uid));
    match workload.map(|workload| &workload.node) {
        Some(node) if !node.is_empty() => Ok(Arc::clone(node)),
        _ => Err(TokenRefusal::NoNode),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::authentication::v1::UserInfo;
    use mesh_core::snapshot::{Name, Parts, Workload};

    use super::*;

    fn status(user: &str, audience: &str, extra: &[(&str, &str)]) -> TokenReviewStatus {
        let extra: BTreeMap<String, Vec<String>> =
            extra.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()])).collect();
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![audience.to_owned()]),
            user: Some(UserInfo {
                username: Some(user.to_owned()),
                extra: Some(extra),
                ..UserInfo::default()
            }),
            ..TokenReviewStatus::default()
        }
    }

    const AGENT: &str = "system:serviceaccount:mesh:nodemesh-agent";

    fn judged(status: &TokenReviewStatus) -> Result<String, TokenRefusal> {
        let agent = Workload {
            id: WorkloadId::of_pod("mesh", "agent-x", "u1"),
            node: "n7".into(),
            ..Workload::named(Name::new("mesh", "agent-x"))
        };
        let parts = Parts { workloads: vec![Arc::new(agent)], ..Parts::default() };
        judge(status, "mesh", &Snapshot::new(1, parts)).map(|node| node.to_string())
    }

    #[test]
    fn the_node_is_the_one_that_the_api_server_names() {
        let by_node = status(AGENT, AUDIENCE, &[(NODE_NAME, "n1"), (POD_NAME, "agent-x"), (POD_UID, "u1")]);
        assert_eq!(judged(&by_node).as_deref(), Ok("n1"));
        let by_pod = status(AGENT, AUDIENCE, &[(POD_NAME, "agent-x"), (POD_UID, "u1")]);
        assert_eq!(judged(&by_pod).as_deref(), Ok("n7"));
    }

    #[test]
    fn a_token_that_is_no_agents_or_not_for_us_is_refused() {
        let node = [(NODE_NAME, "n1")];
        for user in [
            "system:serviceaccount:mesh:default",
            "system:serviceaccount:other:nodemesh-agent",
            "system:serviceaccount:mesh:nodemesh-agent:x",
            "system:node:n1",
            "",
        ] {
            assert_eq!(judged(&status(user, AUDIENCE, &node)), Err(TokenRefusal::Account), "{user}");
        }
        assert_eq!(judged(&status(AGENT, "https://kubernetes", &node)), Err(TokenRefusal::NotAuthentic));
        let unknown = TokenReviewStatus { authenticated: Some(false), ..status(AGENT, AUDIENCE, &node) };
        assert_eq!(judged(&unknown), Err(TokenRefusal::NotAuthentic));
        assert_eq!(judged(&TokenReviewStatus::default()), Err(TokenRefusal::NotAuthentic));
    }

    #[test]
    fn a_token_of_no_pod_or_of_another_incarnation_of_it_names_no_node() {
        for extra in
            [&[][..], &[(POD_NAME, "agent-x")], &[(POD_NAME, "agent-x"), (POD_UID, "u2")], &[(NODE_NAME, "")]]
        {
            assert_eq!(judged(&status(AGENT, AUDIENCE, extra)), Err(TokenRefusal::NoNode), "{extra:?}");
        }
    }

    #[test]
    fn a_review_is_remembered_until_shortly_before_its_token_ends() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let (a, b) = (digest_of("a"), digest_of("b"));
        let mut known = Known::default();
        known.remember(a, &Ok("n1".into()), Some(now + Duration::from_secs(100)), now);
        known.remember(b, &Ok("n2".into()), None, now);
        assert_eq!(known.find(&a, now + Duration::from_secs(69)), Some(Ok("n1".into())));
        assert_eq!(known.find(&a, now + Duration::from_secs(70)), None);
        assert_eq!(known.find(&b, now), None, "a token without an end is asked about each time");
        known.remember(a, &Ok("n1".into()), Some(now + Duration::from_secs(86_400)), now);
        assert_eq!(known.find(&a, now + REMEMBERED_FOR), None, "its pod may be gone");
    }

    #[test]
    fn refusals_are_remembered_briefly_and_in_bounded_number() {
        let now = UNIX_EPOCH;
        let mut known = Known::default();
        let refused = Err(TokenRefusal::Account);
        for i in 0..3 * REFUSED_MAX {
            known.remember(digest_of(&i.to_string()), &refused, None, now);
            assert!(known.refused.len() <= REFUSED_MAX);
        }
        let last = digest_of(&(3 * REFUSED_MAX - 1).to_string());
        assert_eq!(known.find(&last, now), Some(Err(TokenRefusal::Account)));
        assert_eq!(known.find(&last, now + REFUSED_FOR), None);
        known.remember(digest_of("away"), &Err(TokenRefusal::Unavailable), None, now);
        assert_eq!(known.find(&digest_of("away"), now), None, "not knowing is no refusal");
    }

    #[test]
    fn the_end_of_a_token_is_its_own_word() {
        let token = |payload: &str| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload));
        assert_eq!(end_of(&token(r#"{"exp": 12}"#)), Some(UNIX_EPOCH + Duration::from_secs(12)));
        for bad in [token("{}"), token("[]"), token(r#"{"exp": -1}"#), "a".into(), "a.!.c".into()] {
            assert_eq!(end_of(&bad), None, "{bad}");
        }
    }
}
