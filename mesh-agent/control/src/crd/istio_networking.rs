//! The kinds of `networking.istio.io` and `telemetry.istio.io`.

use super::{
    Column, Definition,
    schema::{
        Schema, anything, count, duration, labels, list, map, number, object, port, text, texts, truth,
        whole, word,
    },
};

const GROUP: &str = "networking.istio.io";
const VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];

/// The definitions of these groups.
pub(super) fn definitions() -> Vec<Definition> {
    let of = |kind, plural, short, spec, columns| Definition {
        group: GROUP,
        kind,
        plural,
        short,
        versions: VERSIONS,
        cluster_wide: false,
        spec,
        status: Some(anything()),
        columns,
    };
    let column = |name, path| Column { name, path, kind: "string" };
    vec![
        of(
            "DestinationRule",
            "destinationrules",
            &["dr"],
            destination_rule(),
            vec![column("Host", ".spec.host")],
        ),
        of(
            "ServiceEntry",
            "serviceentries",
            &["se"],
            service_entry(),
            vec![
                column("Hosts", ".spec.hosts"),
                column("Location", ".spec.location"),
                column("Resolution", ".spec.resolution"),
            ],
        ),
        of("Sidecar", "sidecars", &[], sidecar(), Vec::new()),
        of(
            "VirtualService",
            "virtualservices",
            &["vs"],
            virtual_service(),
            vec![column("Gateways", ".spec.gateways"), column("Hosts", ".spec.hosts")],
        ),
        of("WorkloadEntry", "workloadentries", &["we"], workload(), vec![column("Address", ".spec.address")]),
        Definition {
            group: "telemetry.istio.io",
            kind: "Telemetry",
            plural: "telemetries",
            short: &["telemetry"],
            versions: &["v1", "v1alpha1"],
            cluster_wide: false,
            spec: telemetry(),
            status: Some(anything()),
            columns: Vec::new(),
        },
    ]
}

/// A selector whose labels are called `field`.
fn selector(field: &str) -> Schema {
    object([(field, labels())])
}

fn port_selector() -> Schema {
    object([("number", port())])
}

fn percent() -> Schema {
    object([("value", number())])
}

fn destination() -> Schema {
    object([("host", text().at_least(1)), ("subset", text()), ("port", port_selector())]).required(&["host"])
}

fn string_match() -> Schema {
    object([("exact", text()), ("prefix", text()), ("regex", text())])
        .exclusive(&["exact", "prefix", "regex"])
}

fn header_operations() -> Schema {
    let operations = || object([("set", labels()), ("add", labels()), ("remove", texts())]);
    object([("request", operations()), ("response", operations())])
}

fn virtual_service() -> Schema {
    object([
        ("hosts", texts().at_most(256)),
        ("gateways", texts()),
        ("exportTo", texts()),
        ("http", list(http_rule())),
        ("tls", list(stream_rule("sniHosts"))),
        ("tcp", list(stream_rule(""))),
    ])
}

fn http_rule() -> Schema {
    let routed =
        object([("destination", destination()), ("weight", count()), ("headers", header_operations())])
            .required(&["destination"]);
    object([
        ("name", text()),
        ("match", list(http_match())),
        ("route", list(routed)),
        (
            "redirect",
            object([
                ("uri", text()),
                ("authority", text()),
                ("port", port()),
                ("derivePort", word(&["FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"])),
                ("scheme", text()),
                ("redirectCode", count()),
                ("prefixRewrite", text()),
            ]),
        ),
        (
            "directResponse",
            object([
                ("status", count()),
                ("body", object([("string", text()), ("bytes", text())]).exclusive(&["string", "bytes"])),
            ])
            .required(&["status"]),
        ),
        ("delegate", object([("name", text()), ("namespace", text())])),
        (
            "rewrite",
            object([
                ("uri", text()),
                ("authority", text()),
                ("uriRegexRewrite", object([("match", text()), ("rewrite", text())])),
            ]),
        ),
        ("timeout", duration()),
        ("retries", retries()),
        ("fault", fault()),
        ("mirror", destination()),
        ("mirrorPercent", count()),
        ("mirror_percent", count()),
        ("mirrorPercentage", percent()),
        (
            "mirrors",
            list(
                object([("destination", destination()), ("percentage", percent())])
                    .required(&["destination"]),
            ),
        ),
        ("corsPolicy", cors()),
        ("headers", header_operations()),
    ])
}

fn http_match() -> Schema {
    object([
        ("name", text()),
        ("uri", string_match()),
        ("scheme", string_match()),
        ("method", string_match()),
        ("authority", string_match()),
        ("headers", map(string_match())),
        ("withoutHeaders", map(string_match())),
        ("queryParams", map(string_match())),
        ("ignoreUriCase", truth()),
        ("port", port()),
        ("sourceLabels", labels()),
        ("sourceNamespace", text()),
        ("gateways", texts()),
        ("statPrefix", text()),
    ])
}

fn retries() -> Schema {
    object([
        ("attempts", whole(i64::from(i32::MIN), i64::from(i32::MAX))),
        ("perTryTimeout", duration()),
        ("retryOn", text()),
        ("retryRemoteLocalities", truth()),
        ("retryIgnorePreviousHosts", truth()),
        ("backoff", duration()),
    ])
}

fn fault() -> Schema {
    object([
        (
            "delay",
            object([
                ("fixedDelay", duration()),
                ("exponentialDelay", duration()),
                ("percentage", percent()),
                ("percent", count()),
            ])
            .exclusive(&["fixedDelay", "exponentialDelay"]),
        ),
        (
            "abort",
            object([
                ("httpStatus", count()),
                ("grpcStatus", text()),
                ("http2Error", text()),
                ("percentage", percent()),
                ("percent", count()),
            ])
            .exclusive(&["httpStatus", "grpcStatus", "http2Error"]),
        ),
    ])
}

fn cors() -> Schema {
    object([
        ("allowOrigins", list(string_match())),
        ("allowOrigin", texts()),
        ("allowMethods", texts()),
        ("allowHeaders", texts()),
        ("exposeHeaders", texts()),
        ("maxAge", duration()),
        ("allowCredentials", truth()),
        ("unmatchedPreflights", word(&["UNSPECIFIED", "FORWARD", "IGNORE"])),
    ])
}

/// A rule of `tls`, whose matches have `sniHosts`, or of `tcp`.
fn stream_rule(names: &'static str) -> Schema {
    let mut fields = vec![
        ("destinationSubnets", texts()),
        ("port", port()),
        ("sourceLabels", labels()),
        ("sourceNamespace", text()),
        ("gateways", texts()),
    ];
    let routed = object([("destination", destination()), ("weight", count())]).required(&["destination"]);
    if names.is_empty() {
        fields.push(("sourceSubnet", text()));
        return object([("match", list(object(fields))), ("route", list(routed))]);
    }
    fields.push((names, texts()));
    object([("match", list(object(fields).required(&[names]))), ("route", list(routed))]).required(&["match"])
}

fn destination_rule() -> Schema {
    let subset = object([("name", text()), ("labels", labels()), ("trafficPolicy", traffic_policy())])
        .required(&["name"]);
    object([
        ("host", text().at_least(1)),
        ("trafficPolicy", traffic_policy()),
        ("subsets", list(subset)),
        ("exportTo", texts()),
        ("workloadSelector", selector("matchLabels")),
    ])
    .required(&["host"])
}

fn traffic_policy() -> Schema {
    let parts = || {
        vec![
            ("loadBalancer", load_balancer()),
            ("connectionPool", connection_pool()),
            ("outlierDetection", outlier_detection()),
            ("tls", client_tls()),
        ]
    };
    let mut of_a_port = parts();
    of_a_port.push(("port", port_selector()));
    let mut fields = parts();
    fields.extend([
        ("portLevelSettings", list(object(of_a_port))),
        (
            "tunnel",
            object([("protocol", text()), ("targetHost", text()), ("targetPort", port())])
                .required(&["targetHost", "targetPort"]),
        ),
        ("proxyProtocol", object([("version", word(&["V1", "V2"]))])),
        (
            "retryBudget",
            object([("percent", number()), ("minRetryConcurrency", count()), ("budgetInterval", duration())]),
        ),
    ]);
    object(fields)
}

fn load_balancer() -> Schema {
    let simple =
        word(&["UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST"]);
    let attribute = object([("name", text()), ("value", text())]).required(&["name"]);
    let cookie =
        object([("name", text()), ("path", text()), ("ttl", duration()), ("attributes", list(attribute))])
            .required(&["name"]);
    object([
        ("simple", simple),
        (
            "consistentHash",
            object([
                ("httpHeaderName", text()),
                ("httpCookie", cookie),
                ("useSourceIp", truth()),
                ("httpQueryParameterName", text()),
                ("minimumRingSize", count()),
                ("ringHash", object([("minimumRingSize", count())])),
                ("maglev", object([("tableSize", count())])),
            ])
            .exclusive(&["httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName"])
            .exclusive(&["ringHash", "maglev"]),
        ),
        ("localityLbSetting", locality()),
        ("zoneAwareLbSetting", zone_aware()),
        ("warmupDurationSecs", duration()),
        (
            "warmup",
            object([("duration", duration()), ("minimumPercent", number()), ("aggression", number())])
                .required(&["duration"]),
        ),
    ])
    .exclusive(&["simple", "consistentHash"])
}

fn locality() -> Schema {
    object([
        ("enabled", truth()),
        ("distribute", list(object([("from", text()), ("to", map(count()))]))),
        ("failover", failover()),
        ("failoverPriority", texts()),
    ])
}

/// Regions and the region that stands in for each.
fn failover() -> Schema {
    list(object([("from", text()), ("to", text())]))
}

fn zone_aware() -> Schema {
    object([
        ("enabled", truth()),
        ("minClusterSize", count()),
        ("failover", failover()),
        ("failoverPriority", texts()),
    ])
}

fn connection_pool() -> Schema {
    object([
        (
            "tcp",
            object([
                ("maxConnections", count()),
                ("connectTimeout", duration()),
                ("idleTimeout", duration()),
                ("maxConnectionDuration", duration()),
                (
                    "tcpKeepalive",
                    object([("probes", count()), ("time", duration()), ("interval", duration())]),
                ),
            ]),
        ),
        (
            "http",
            object([
                ("http1MaxPendingRequests", count()),
                ("http2MaxRequests", count()),
                ("maxRequestsPerConnection", count()),
                ("maxRetries", count()),
                ("idleTimeout", duration()),
                ("h2UpgradePolicy", word(&["DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"])),
                ("useClientProtocol", truth()),
                ("maxConcurrentStreams", count()),
                ("http2KeepAlive", object([("interval", duration()), ("timeout", duration())])),
            ]),
        ),
    ])
}

fn outlier_detection() -> Schema {
    object([
        ("consecutive5xxErrors", count()),
        ("consecutiveErrors", count()),
        ("consecutiveGatewayErrors", count()),
        ("consecutiveLocalOriginFailures", count()),
        ("splitExternalLocalOriginErrors", truth()),
        ("outlierDetectionHttpErrorCodes", list(count())),
        ("interval", duration()),
        ("baseEjectionTime", duration()),
        ("maxEjectionPercent", count()),
        ("minHealthPercent", count()),
    ])
}

fn client_tls() -> Schema {
    object([
        ("mode", word(&["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"])),
        ("clientCertificate", text()),
        ("privateKey", text()),
        ("caCertificates", text()),
        ("caCrl", text()),
        ("credentialName", text()),
        ("subjectAltNames", texts()),
        ("sni", text()),
        ("insecureSkipVerify", truth()),
    ])
}

fn workload() -> Schema {
    object([
        ("address", text().at_most(256)),
        ("ports", map(port())),
        ("labels", labels()),
        ("network", text()),
        ("locality", text()),
        ("weight", count()),
        ("serviceAccount", text()),
    ])
    .rule("has(self.address) || has(self.network)", "address is missing")
}

fn service_entry() -> Schema {
    let port = object([("number", port()), ("protocol", text()), ("name", text()), ("targetPort", port())])
        .required(&["number", "name"]);
    object([
        ("hosts", texts().at_least(1).at_most(256)),
        ("addresses", list(text().at_most(64)).at_most(256)),
        ("ports", list(port).at_most(256)),
        ("location", word(&["MESH_EXTERNAL", "MESH_INTERNAL"])),
        ("resolution", word(&["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"])),
        ("endpoints", list(workload()).at_most(4096)),
        ("workloadSelector", selector("labels")),
        ("exportTo", texts()),
        ("subjectAltNames", texts()),
    ])
    .required(&["hosts"])
    .at_most_one(&["workloadSelector", "endpoints"])
}

fn sidecar() -> Schema {
    let listener =
        || object([("number", port()), ("protocol", text()), ("name", text()), ("targetPort", port())]);
    let capture = || word(&["DEFAULT", "IPTABLES", "NONE"]);
    object([
        ("workloadSelector", selector("labels")),
        (
            "ingress",
            list(object([
                ("port", listener()),
                ("bind", text()),
                ("captureMode", capture()),
                ("defaultEndpoint", text()),
                ("tls", anything()),
                ("connectionPool", connection_pool()),
            ])),
        ),
        (
            "egress",
            list(
                object([
                    ("port", listener()),
                    ("bind", text()),
                    ("captureMode", capture()),
                    ("hosts", texts()),
                ])
                .required(&["hosts"]),
            ),
        ),
        ("inboundConnectionPool", connection_pool()),
        (
            "outboundTrafficPolicy",
            object([("mode", word(&["REGISTRY_ONLY", "ALLOW_ANY"])), ("egressProxy", destination())]),
        ),
    ])
}

fn telemetry() -> Schema {
    object([
        ("selector", selector("matchLabels")),
        ("targetRef", super::istio_security::target()),
        ("targetRefs", list(super::istio_security::target()).at_most(16)),
        // Providers of tracing and overrides of metrics are open lists of theirs.
        ("tracing", list(anything())),
        ("metrics", list(anything())),
        ("accessLogging", list(anything())),
    ])
}
