//! Owns the shape of what `meshctl explain` says of a request.

use serde::{Deserialize, Serialize};

use super::{EndpointView, OriginView, RouteRuleView};

/// What would become of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestView {
    /// `GET /x`, or `TLS reviews.example.com` for a connection.
    pub asked: String,
    /// `host:port` whose rules were asked, as far as there are any.
    pub host: Option<String>,
    /// Path and query as they are matched: normalised.
    pub matched_path: Option<String>,
    /// What becomes of it.
    pub outcome: RequestOutcome,
    /// The same in a sentence.
    pub text: String,
    /// Status of an answer of the mesh itself.
    pub status: Option<u16>,
    /// Response flags that the access log would have, in Envoy's letters.
    pub flags: Vec<String>,
    /// The rule that it gets.
    pub rule: Option<RouteRuleView>,
    /// The match of the rule that holds, as in [`RouteRuleView::matches`]; absent for a rule without matches.
    pub matched: Option<String>,
    /// `Location` of a redirect.
    pub location: Option<String>,
    /// Limit over all tries in milliseconds; absent: none.
    pub timeout_ms: Option<u64>,
    /// Where it may go.
    pub backends: Vec<RequestBackendView>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestOutcome {
    /// The agent does not look at it: its bytes go where the connection goes.
    NotLookedAt,
    /// It goes to one of the backends.
    Forward,
    /// It goes to where it was dialled: no rule is about it.
    PassThrough,
    /// It is answered with a redirect.
    Redirect,
    /// It is answered by the mesh.
    Respond,
    /// It is refused as no proper request.
    Refuse,
    /// The connection is closed: its rule leads nowhere.
    Close,
}

/// One of the destinations that a request may go to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestBackendView {
    /// Per cent of such requests.
    pub percent: f64,
    /// `outbound|PORT|SUBSET|HOST`.
    pub cluster: String,
    /// Status that this share is answered with, when it cannot be served.
    pub status: Option<u16>,
    /// Response flags of that answer.
    pub flags: Vec<String>,
    /// Path and query that it leaves with.
    pub path: Option<String>,
    /// Authority that it leaves with.
    pub authority: Option<String>,
    /// Headers of the question as they leave.
    pub headers: Vec<(String, String)>,
    /// How an endpoint is chosen.
    pub balancing: String,
    /// The DestinationRule that counts.
    pub destination_rule: Option<OriginView>,
    /// The endpoints.
    pub endpoints: Vec<RequestEndpointView>,
}

/// An endpoint that a request may or may not go to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestEndpointView {
    /// The endpoint.
    #[serde(flatten)]
    pub endpoint: EndpointView,
    /// Whether it may get the request.
    pub eligible: bool,
    /// Why, or why not.
    pub reason: String,
}
