//! The kinds of `security.istio.io`.

use super::{
    Column, Definition,
    schema::{Schema, anything, duration, labels, list, map, object, text, texts, truth, word},
};

const GROUP: &str = "security.istio.io";

/// The definitions of this group.
pub(super) fn definitions() -> Vec<Definition> {
    let of = |kind, plural, short, spec, columns| Definition {
        group: GROUP,
        kind,
        plural,
        short,
        versions: &["v1", "v1beta1"],
        cluster_wide: false,
        spec,
        status: Some(anything()),
        columns,
    };
    vec![
        of(
            "AuthorizationPolicy",
            "authorizationpolicies",
            &["ap"],
            authorization_policy(),
            vec![Column { name: "Action", path: ".spec.action", kind: "string" }],
        ),
        of(
            "PeerAuthentication",
            "peerauthentications",
            &["pa"],
            peer_authentication(),
            vec![Column { name: "Mode", path: ".spec.mtls.mode", kind: "string" }],
        ),
        of("RequestAuthentication", "requestauthentications", &["ra"], request_authentication(), Vec::new()),
    ]
}

fn selector() -> Schema {
    object([("matchLabels", labels())])
}

/// `targetRef` of a policy.
pub(super) fn target() -> Schema {
    object([
        ("group", text()),
        ("kind", text().at_least(1)),
        ("name", text().at_least(1)),
        ("namespace", text()),
    ])
    .required(&["kind", "name"])
}

/// The fields that say what a policy is for; at most one of them is there.
fn targeted<'a>(fields: impl IntoIterator<Item = (&'a str, Schema)>) -> Schema {
    let of_all =
        [("selector", selector()), ("targetRef", target()), ("targetRefs", list(target()).at_most(16))];
    object(of_all.into_iter().chain(fields)).at_most_one(&["selector", "targetRef", "targetRefs"])
}

/// Each name also as what must not be.
fn with_opposites(names: &[&str]) -> Schema {
    let both = |name: &&str| {
        let mut upper = (*name).to_owned();
        upper[..1].make_ascii_uppercase();
        [((*name).to_owned(), texts()), (format!("not{upper}"), texts())]
    };
    let fields: Vec<(String, Schema)> = names.iter().flat_map(both).collect();
    object(fields.iter().map(|(name, schema)| (name.as_str(), schema.clone())))
}

fn authorization_policy() -> Schema {
    let source = with_opposites(&[
        "principals",
        "requestPrincipals",
        "namespaces",
        "serviceAccounts",
        "trustDomains",
        "ipBlocks",
        "remoteIpBlocks",
    ]);
    let operation = with_opposites(&["hosts", "ports", "methods", "paths"]);
    let condition = object([("key", text()), ("values", texts()), ("notValues", texts())]).required(&["key"]);
    targeted([
        ("action", word(&["ALLOW", "DENY", "AUDIT", "CUSTOM"])),
        ("provider", object([("name", text())])),
        (
            "rules",
            list(object([
                ("from", list(object([("source", source)]))),
                ("to", list(object([("operation", operation)]))),
                ("when", list(condition)),
            ])),
        ),
    ])
}

fn peer_authentication() -> Schema {
    let mutual = || object([("mode", word(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]))]);
    object([("selector", selector()), ("mtls", mutual()), ("portLevelMtls", map(mutual()))]).rule(
        "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0)",
        "portLevelMtls needs a selector",
    )
}

fn request_authentication() -> Schema {
    let header = object([("name", text().at_least(1)), ("prefix", text())]).required(&["name"]);
    let claim = object([("header", text().at_least(1)), ("claim", text().at_least(1))])
        .required(&["header", "claim"]);
    let rule = object([
        ("issuer", text().at_least(1)),
        ("audiences", texts()),
        ("jwksUri", text()),
        ("jwks_uri", text()),
        ("jwks", text()),
        ("fromHeaders", list(header)),
        ("fromParams", texts()),
        ("fromCookies", texts()),
        ("outputPayloadToHeader", text()),
        ("outputClaimToHeaders", list(claim)),
        ("spaceDelimitedClaims", texts()),
        ("forwardOriginalToken", truth()),
        ("timeout", duration()),
    ])
    .required(&["issuer"]);
    targeted([("jwtRules", list(rule).at_most(4096))])
}
