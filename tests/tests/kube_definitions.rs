//! What an API server refuses by the mesh's definitions alone, where no webhook is installed: each rule of their schemas, be it CEL or
//! structure, has an object here that breaks it, and one beside it that does not.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, ensure};
use mesh_tests::cluster::ApiServer;
use mesh_tests::{TestResult, programs, require_agent, require_api_server, test_name};
use serde_json::Value;

/// A rule, by what breaks it and what does not.
struct Case {
    kind: &'static str,
    /// Where it is in the schema and what it says; of fields that exclude each other, nothing and their names.
    rule: (&'static str, &'static str),
    /// What of the object a refusal names.
    at: &'static str,
    bad: &'static [&'static str],
    good: &'static [&'static str],
}

const TARGETS: &str = "at most one of selector, targetRef, targetRefs";

/// Each of these beside another one.
const TARGETED_TWICE: &[&str] = &[
    "{selector: {matchLabels: {app: web}}, targetRef: {kind: Service, name: web}}",
    "{selector: {matchLabels: {app: web}}, targetRefs: [{kind: Service, name: web}]}",
    "{targetRef: {kind: Service, name: web}, targetRefs: [{kind: Service, name: web}]}",
];

const TARGETED_ONCE: &[&str] = &[
    "{}",
    "{selector: {matchLabels: {app: web}}}",
    "{targetRef: {kind: Service, name: web}}",
    "{targetRefs: [{kind: Service, name: web}]}",
];

/// Every rule there is: a test counts them.
const CASES: &[Case] = &[
    Case {
        kind: "PeerAuthentication",
        rule: ("spec", "portLevelMtls needs a selector"),
        at: "spec: Invalid value",
        bad: &[
            "{portLevelMtls: {'8080': {mode: DISABLE}}}",
            "{selector: {}, portLevelMtls: {'8080': {mode: DISABLE}}}",
            "{selector: {matchLabels: {}}, portLevelMtls: {'8080': {mode: DISABLE}}}",
        ],
        good: &[
            "{mtls: {mode: STRICT}}",
            "{selector: {matchLabels: {app: web}}, portLevelMtls: {'8080': {mode: DISABLE}}}",
        ],
    },
    Case {
        kind: "AuthorizationPolicy",
        rule: ("spec", TARGETS),
        at: "spec: Invalid value",
        bad: TARGETED_TWICE,
        good: TARGETED_ONCE,
    },
    Case {
        kind: "RequestAuthentication",
        rule: ("spec", TARGETS),
        at: "spec: Invalid value",
        bad: TARGETED_TWICE,
        good: TARGETED_ONCE,
    },
    Case {
        kind: "WorkloadEntry",
        rule: ("spec", "address is missing"),
        at: "spec: Invalid value",
        bad: &["{labels: {app: web}}", "{serviceAccount: web}"],
        good: &["{address: 192.0.2.1}", "{network: far, labels: {app: web}}"],
    },
    Case {
        kind: "ServiceEntry",
        rule: ("spec.endpoints[]", "address is missing"),
        at: "spec.endpoints[1]: Invalid value",
        bad: &[
            "{hosts: [a.example], resolution: STATIC, endpoints: [{address: 192.0.2.1}, {ports: {http: 80}}]}",
        ],
        good: &[
            "{hosts: [a.example], resolution: STATIC, endpoints: [{address: 192.0.2.1}, {network: far}]}",
        ],
    },
    Case {
        kind: "ServiceEntry",
        rule: ("spec", "at most one of workloadSelector, endpoints"),
        at: "spec: Invalid value",
        bad: &[
            "{hosts: [a.example], workloadSelector: {labels: {app: web}}, endpoints: [{address: 192.0.2.1}]}",
        ],
        good: &[
            "{hosts: [a.example], workloadSelector: {labels: {app: web}}}",
            "{hosts: [a.example], endpoints: [{address: 192.0.2.1}]}",
        ],
    },
    Case {
        kind: "GatewayClass",
        rule: ("spec", "controllerName cannot be changed"),
        at: "spec: Invalid value",
        bad: &["{controllerName: example.com/other}"],
        good: &["{controllerName: example.com/one}"],
    },
    // Fields that exclude each other, wherever they are.
    Case {
        kind: "VirtualService",
        rule: ("", "exact, prefix, regex"),
        at: "uri",
        bad: &[
            "{hosts: [a], http: [{match: [{uri: {exact: /a, prefix: /b}}]}]}",
            "{hosts: [a], http: [{match: [{uri: {prefix: /a, regex: .*}}]}]}",
        ],
        good: &["{hosts: [a], http: [{match: [{uri: {exact: /a}, scheme: {prefix: http}}]}]}"],
    },
    Case {
        kind: "VirtualService",
        rule: ("", "bytes, string"),
        at: "body",
        bad: &["{hosts: [a], http: [{directResponse: {status: 200, body: {string: a, bytes: YQ==}}}]}"],
        good: &["{hosts: [a], http: [{directResponse: {status: 200, body: {string: a}}}]}"],
    },
    Case {
        kind: "VirtualService",
        rule: ("", "exponentialDelay, fixedDelay"),
        at: "delay",
        bad: &["{hosts: [a], http: [{fault: {delay: {fixedDelay: 1s, exponentialDelay: 1s}}}]}"],
        good: &["{hosts: [a], http: [{fault: {delay: {fixedDelay: 1s}}}]}"],
    },
    Case {
        kind: "VirtualService",
        rule: ("", "grpcStatus, http2Error, httpStatus"),
        at: "abort",
        bad: &["{hosts: [a], http: [{fault: {abort: {httpStatus: 500, grpcStatus: UNAVAILABLE}}}]}"],
        good: &["{hosts: [a], http: [{fault: {abort: {httpStatus: 500}}}]}"],
    },
    Case {
        kind: "DestinationRule",
        rule: ("", "httpCookie, httpHeaderName, httpQueryParameterName, useSourceIp"),
        at: "consistentHash",
        bad: &[
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x, useSourceIp: true}}}}",
        ],
        good: &[
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x, maglev: {}}}}}",
        ],
    },
    Case {
        kind: "DestinationRule",
        rule: ("", "maglev, ringHash"),
        at: "consistentHash",
        bad: &[
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {}, ringHash: {}}}}}",
        ],
        good: &[
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {}}}}}",
        ],
    },
    Case {
        kind: "DestinationRule",
        rule: ("", "consistentHash, simple"),
        at: "loadBalancer",
        bad: &[
            "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
        ],
        good: &["{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}}}"],
    },
    Case {
        kind: "HTTPRoute",
        rule: ("", "fraction, percent"),
        at: "requestMirror",
        bad: &[
            "{rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a}, percent: 1, fraction: {numerator: 1}}}]}]}",
        ],
        good: &[
            "{rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a}, fraction: {numerator: 1}}}]}]}",
        ],
    },
    Case {
        kind: "GRPCRoute",
        rule: ("", "fraction, percent"),
        at: "requestMirror",
        bad: &[
            "{rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a}, percent: 1, fraction: {numerator: 1}}}]}]}",
        ],
        good: &[
            "{rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a}, percent: 1}}]}]}",
        ],
    },
];

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// The rules of a schema, as [`Case::rule`] has them.
fn rules(schema: &Value, path: &str, found: &mut BTreeSet<(String, String)>) {
    for rule in items(&schema["x-kubernetes-validations"]) {
        found.insert((path.to_owned(), text(rule, "/message").to_owned()));
    }
    for part in items(&schema["allOf"]) {
        let pairs = items(&part["not"]["anyOf"]).flat_map(|pair| items(&pair["required"]));
        let names: BTreeSet<&str> = pairs.filter_map(Value::as_str).collect();
        found.insert((String::new(), Vec::from_iter(names).join(", ")));
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        rules(schema, &path, found);
    }
    for (inner, mark) in [("items", "[]"), ("additionalProperties", ".*")] {
        if schema[inner].is_object() {
            rules(&schema[inner], &format!("{path}{mark}"), found);
        }
    }
}

/// What `meshctl manifest crds` prints.
fn definitions(args: &[&str]) -> anyhow::Result<String> {
    let all = [&["manifest", "crds"], args].concat();
    let out = Command::new(programs::meshctl()?).env_remove("KUBECONFIG").args(all).output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?)
}

/// An object of a case, in one of the versions of its kind.
fn object(definition: &Value, version: &str, name: &str, spec: &str) -> String {
    let (group, kind) = (text(definition, "/spec/group"), text(definition, "/spec/names/kind"));
    let namespace = if text(definition, "/spec/scope") == "Cluster" { "" } else { ", namespace: default" };
    format!(
        "{{apiVersion: {group}/{version}, kind: {kind}, metadata: {{name: {name}{namespace}}}, spec: {spec}}}\n"
    )
}

#[test]
fn what_breaks_a_rule_of_a_definition_is_refused_without_a_webhook() -> TestResult {
    require_api_server!();
    require_agent!();
    let all: Vec<Value> = serde_json::from_str(&definitions(&["-o", "json"])?)?;
    let mut there = BTreeSet::new();
    for definition in &all {
        let kind = text(definition, "/spec/names/kind");
        for version in items(&definition["spec"]["versions"]) {
            let mut found = BTreeSet::new();
            rules(&version["schema"]["openAPIV3Schema"], "", &mut found);
            there.extend(found.into_iter().map(|(path, said)| [kind.to_owned(), path, said]));
        }
    }
    let of = |case: &Case| [case.kind, case.rule.0, case.rule.1].map(ToOwned::to_owned);
    let tried: BTreeSet<[String; 3]> = CASES.iter().map(of).collect();
    assert_eq!(there, tried, "rules that are there, and rules that are tried");

    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(&definitions(&[])?)?;
    api.kubectl().run(&["wait", "crd", "--all", "--for=condition=Established"])?;
    let webhooks = api.kubectl().run(&["get", "validatingwebhookconfigurations", "-o", "name"])?;
    assert_eq!(webhooks, "");
    for (number, case) in CASES.iter().enumerate() {
        let definition = all.iter().find(|one| text(one, "/spec/names/kind") == case.kind);
        let definition = definition.context(case.kind)?;
        for version in items(&definition["spec"]["versions"]) {
            holds(&api, case, definition, text(version, "/name"), number)?;
        }
    }
    Ok(())
}

/// What is good is taken, and nothing bad, be it new or in the place of something good.
fn holds(api: &ApiServer, case: &Case, definition: &Value, version: &str, number: usize) -> TestResult {
    let mut good = String::new();
    for (at, spec) in case.good.iter().enumerate() {
        let name = format!("good-{number}-{version}-{at}");
        good += &format!("---\n{}", object(definition, version, &name, spec));
    }
    api.kubectl().apply(&good)?;
    let (there, new) = (format!("good-{number}-{version}-0"), format!("bad-{number}-{version}"));
    let mut names = vec![there.as_str()];
    // What must not change can be anything when it is new.
    if !case.rule.1.ends_with("cannot be changed") {
        names.push(&new);
    }
    for spec in case.bad {
        for name in &names {
            let said = api.kubectl().apply(&object(definition, version, name, spec));
            let said =
                said.err().with_context(|| format!("{} {version} {name} was taken: {spec}", case.kind))?;
            let said = said.to_string();
            assert!(said.contains(case.at), "{} {version} {name}: {spec}: {said}", case.kind);
            // Structure has no words of its own.
            assert!(
                case.rule.0.is_empty() || said.contains(case.rule.1),
                "{} {version}: {spec}: {said}",
                case.kind
            );
        }
    }
    Ok(())
}
