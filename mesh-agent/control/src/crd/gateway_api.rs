//! The kinds of `gateway.networking.k8s.io`.

use super::{
    Column, Definition,
    schema::{
        Schema, anything, count, gateway_duration, labels, list, object, port, text, texts, truth, whole,
        word,
    },
};
use crate::resource::{FILTER_TYPES, GATEWAY_GROUP};

/// The definitions of this group.
pub(super) fn definitions() -> Vec<Definition> {
    let of = |kind, plural, versions, spec, columns| Definition {
        group: GATEWAY_GROUP,
        kind,
        plural,
        short: &[],
        versions,
        cluster_wide: false,
        spec,
        status: Some(anything()),
        columns,
    };
    let hosts = || vec![Column { name: "Hostnames", path: ".spec.hostnames", kind: "string" }];
    vec![
        Definition {
            cluster_wide: true,
            short: &["gc"],
            ..of(
                "GatewayClass",
                "gatewayclasses",
                &["v1", "v1beta1"],
                gateway_class(),
                vec![Column { name: "Controller", path: ".spec.controllerName", kind: "string" }],
            )
        },
        Definition {
            short: &["gtw"],
            ..of(
                "Gateway",
                "gateways",
                &["v1", "v1beta1"],
                gateway(),
                vec![Column { name: "Class", path: ".spec.gatewayClassName", kind: "string" }],
            )
        },
        of("GRPCRoute", "grpcroutes", &["v1", "v1beta1", "v1alpha2"], route(grpc_rule()), hosts()),
        of("HTTPRoute", "httproutes", &["v1", "v1beta1"], route(http_rule()), hosts()),
        Definition {
            short: &["refgrant"],
            status: None,
            ..of("ReferenceGrant", "referencegrants", &["v1beta1"], reference_grant(), Vec::new())
        },
        of("TCPRoute", "tcproutes", &["v1alpha2"], object(route_fields(stream_rule())), Vec::new()),
        of("TLSRoute", "tlsroutes", &["v1", "v1alpha3", "v1alpha2"], route(stream_rule()), hosts()),
    ]
}

fn name() -> Schema {
    text().at_least(1).at_most(253)
}

/// A reference to an object; `more` are fields of this kind of reference.
fn reference(more: &[(&'static str, Schema)]) -> Schema {
    let fields = [
        ("group", text().at_most(253)),
        ("kind", text().at_least(1).at_most(63)),
        ("namespace", text().at_least(1).at_most(63)),
        ("name", name()),
        ("port", port()),
    ];
    object(fields.into_iter().chain(more.iter().cloned())).required(&["name"])
}

fn route_fields(rule: Schema) -> Vec<(&'static str, Schema)> {
    vec![
        ("parentRefs", list(reference(&[("sectionName", name())])).at_most(32)),
        ("useDefaultGateways", text()),
        ("rules", list(rule).at_most(16)),
    ]
}

fn route(rule: Schema) -> Schema {
    let mut fields = route_fields(rule);
    fields.push(("hostnames", list(name()).at_most(16)));
    object(fields)
}

fn name_match() -> Schema {
    object([
        ("type", word(&["Exact", "RegularExpression"])),
        ("name", text().at_least(1).at_most(256)),
        ("value", text().at_least(1).at_most(4096)),
    ])
    .required(&["name", "value"])
}

fn http_rule() -> Schema {
    let path = object([
        ("type", word(&["Exact", "PathPrefix", "RegularExpression"])),
        ("value", text().at_most(1024)),
    ]);
    let one = object([
        ("path", path),
        ("headers", list(name_match()).at_most(16)),
        ("queryParams", list(name_match()).at_most(16)),
        ("method", text().at_most(32)),
    ]);
    object([
        ("name", name()),
        ("matches", list(one).at_most(64)),
        ("filters", list(filter()).at_most(16)),
        (
            "backendRefs",
            list(reference(&[("weight", weight()), ("filters", list(filter()).at_most(16))])).at_most(16),
        ),
        ("timeouts", object([("request", gateway_duration()), ("backendRequest", gateway_duration())])),
        (
            "retry",
            object([
                ("codes", list(whole(400, 599))),
                ("attempts", count()),
                ("backoff", gateway_duration()),
            ]),
        ),
        ("sessionPersistence", anything()),
    ])
}

fn grpc_rule() -> Schema {
    let method = object([
        ("type", word(&["Exact", "RegularExpression"])),
        ("service", text().at_most(1024)),
        ("method", text().at_most(1024)),
    ]);
    object([
        ("name", name()),
        (
            "matches",
            list(object([("method", method), ("headers", list(name_match()).at_most(16))])).at_most(64),
        ),
        ("filters", list(filter()).at_most(16)),
        (
            "backendRefs",
            list(reference(&[("weight", weight()), ("filters", list(filter()).at_most(16))])).at_most(16),
        ),
        ("sessionPersistence", anything()),
    ])
}

fn stream_rule() -> Schema {
    object([("name", name()), ("backendRefs", list(reference(&[("weight", weight())])).at_most(16))])
}

fn weight() -> Schema {
    whole(0, 1_000_000)
}

fn filter() -> Schema {
    let header = || {
        object([("name", text().at_least(1).at_most(256)), ("value", text().at_least(1).at_most(4096))])
            .required(&["name", "value"])
    };
    let modifier = || {
        object([
            ("set", list(header()).at_most(16)),
            ("add", list(header()).at_most(16)),
            ("remove", texts().at_most(16)),
        ])
    };
    let path = || {
        object([
            ("type", word(&["ReplaceFullPath", "ReplacePrefixMatch"])),
            ("replaceFullPath", text().at_most(1024)),
            ("replacePrefixMatch", text().at_most(1024)),
        ])
        .required(&["type"])
    };
    let fraction = object([("numerator", count()), ("denominator", whole(1, i64::from(u32::MAX)))])
        .required(&["numerator"]);
    object([
        ("type", word(&FILTER_TYPES.map(|(kind, _)| kind))),
        ("requestHeaderModifier", modifier()),
        ("responseHeaderModifier", modifier()),
        (
            "requestMirror",
            object([("backendRef", reference(&[])), ("percent", whole(0, 100)), ("fraction", fraction)])
                .required(&["backendRef"])
                .exclusive(&["percent", "fraction"]),
        ),
        (
            "requestRedirect",
            object([
                ("scheme", word(&["http", "https"])),
                ("hostname", name()),
                ("path", path()),
                ("port", port()),
                ("statusCode", whole(300, 399)),
            ]),
        ),
        ("urlRewrite", object([("hostname", name()), ("path", path())])),
        (
            "cors",
            object([
                ("allowOrigins", texts().at_most(64)),
                ("allowCredentials", truth()),
                ("allowMethods", texts().at_most(9)),
                ("allowHeaders", texts().at_most(64)),
                ("exposeHeaders", texts().at_most(64)),
                ("maxAge", whole(1, i64::from(u32::MAX))),
            ]),
        ),
        ("externalAuth", anything()),
        ("extensionRef", anything()),
    ])
    .required(&["type"])
}

fn reference_grant() -> Schema {
    let from = object([("group", text()), ("kind", name()), ("namespace", name())]).required(&[
        "group",
        "kind",
        "namespace",
    ]);
    let to = object([("group", text()), ("kind", name()), ("name", name())]).required(&["group", "kind"]);
    object([("from", list(from).at_least(1).at_most(16)), ("to", list(to).at_least(1).at_most(16))])
        .required(&["from", "to"])
}

fn gateway_class() -> Schema {
    object([
        ("controllerName", text().at_least(1).at_most(253)),
        ("parametersRef", reference(&[])),
        ("description", text().at_most(64)),
    ])
    .required(&["controllerName"])
    .rule("self.controllerName == oldSelf.controllerName", "controllerName cannot be changed")
}

fn gateway() -> Schema {
    let listener = object([
        ("name", name()),
        ("hostname", name()),
        ("port", port()),
        ("protocol", text().at_least(1).at_most(255)),
        ("tls", anything()),
        ("allowedRoutes", anything()),
    ])
    .required(&["name", "port", "protocol"]);
    object([
        ("gatewayClassName", name()),
        ("listeners", list(listener).at_least(1).at_most(64)),
        ("addresses", list(object([("type", text()), ("value", text())])).at_most(16)),
        (
            "infrastructure",
            object([("labels", labels()), ("annotations", labels()), ("parametersRef", reference(&[]))]),
        ),
        ("allowedListeners", anything()),
        ("backendTLS", anything()),
        ("tls", anything()),
        ("defaultScope", text()),
    ])
    .required(&["gatewayClassName", "listeners"])
}
