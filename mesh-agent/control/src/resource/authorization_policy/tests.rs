//! Tables of what users write, right and wrong.

use mesh_core::policy::{Match, ServiceAccountMatch, StringMatch};

use super::*;
use crate::{
    problem::Level,
    resource::Resource,
    source::document::{Known, Rules, parse},
};

/// The policy, if it is used, and what was said: `E` or `W`, field, message.
fn read(meta: &str, spec: &str) -> (Option<AuthorizationPolicy>, Vec<String>) {
    let text = format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p, {meta}}}, spec: {spec}}}"
    );
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    let said = parsed.problems.iter().map(|p| {
        let level = if p.level == Level::Error { "E" } else { "W" };
        format!("{level} {}: {}", p.field, p.message)
    });
    let policy = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::AuthorizationPolicy(policy) => policy.clone(),
        other => panic!("{other:?}"),
    });
    (policy, said.collect())
}

/// The only match of a policy that is in order.
fn only_match(rule: &str) -> Match {
    let (policy, said) = read("namespace: shop", &format!("{{rules: [{rule}]}}"));
    assert_eq!(said, [""; 0], "{rule}");
    let applied = policy.unwrap().applies.unwrap();
    let [rule] = applied.policy.rules.as_slice() else { panic!("{applied:?}") };
    let [clause] = rule.clauses.as_slice() else { panic!("{rule:?}") };
    let [only] = clause.as_slice() else { panic!("{clause:?}") };
    only.clone()
}

fn texts(values: &[&str]) -> Vec<StringMatch> {
    values.iter().map(|value| StringMatch::parse(value)).collect()
}

fn account(namespace: &str, name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch { namespace: namespace.into(), name: name.into() }
}

#[test]
fn every_field_of_l4_is_read_in_all_its_places() {
    let nets = |values: &[&str]| values.iter().map(|value| value.parse().unwrap()).collect::<Vec<_>>();
    let d = Match::default;
    let blocks = "[10.0.0.1, 10.1.2.3/8, 'fd00::1/64', '::ffff:10.2.0.0/112']";
    let as_read = ["10.0.0.1/32", "10.0.0.0/8", "fd00::/64", "10.2.0.0/16"];
    let table = [
        ("principals: [a, 'b*']", "source.principal", Match { principals: texts(&["a", "b*"]), ..d() }),
        ("notPrincipals: ['*']", "source.principal", Match { not_principals: texts(&["*"]), ..d() }),
        ("namespaces: [a]", "source.namespace", Match { namespaces: texts(&["a"]), ..d() }),
        ("notNamespaces: ['*b']", "source.namespace", Match { not_namespaces: texts(&["*b"]), ..d() }),
        (
            "serviceAccounts: [cart, bank/teller]",
            "source.serviceAccount",
            Match { service_accounts: vec![account("shop", "cart"), account("bank", "teller")], ..d() },
        ),
        (
            "notServiceAccounts: [cart]",
            "source.serviceAccount",
            Match { not_service_accounts: vec![account("shop", "cart")], ..d() },
        ),
        ("trustDomains: ['*-td']", "source.trustDomain", Match { trust_domains: texts(&["*-td"]), ..d() }),
        ("notTrustDomains: [td]", "source.trustDomain", Match { not_trust_domains: texts(&["td"]), ..d() }),
        (&format!("ipBlocks: {blocks}"), "source.ip", Match { source_ips: nets(&as_read), ..d() }),
        (&format!("notIpBlocks: {blocks}"), "source.ip", Match { not_source_ips: nets(&as_read), ..d() }),
    ];
    for (field, key, wanted) in table {
        assert_eq!(only_match(&format!("{{from: [{{source: {{{field}}}}}]}}")), wanted, "{field}");
        let (name, list) = field.split_once(": ").unwrap();
        let values = if name.starts_with("not") { "notValues" } else { "values" };
        assert_eq!(only_match(&format!("{{when: [{{key: {key}, {values}: {list}}}]}}")), wanted, "{key}");
    }
    let ports = only_match("{to: [{operation: {ports: ['80', '65535'], notPorts: ['1']}}]}");
    let wanted = Match { destination_ports: vec![80, 65535], not_destination_ports: vec![1], ..d() };
    assert_eq!(ports, wanted);
    let when = "{when: [{key: destination.port, values: ['80', '65535'], notValues: ['1']}]}";
    assert_eq!(only_match(when), wanted);
    let when = "{when: [{key: destination.ip, values: [10.0.0.1], notValues: ['fd00::/8']}]}";
    let wanted =
        Match { destination_ips: nets(&["10.0.0.1/32"]), not_destination_ips: nets(&["fd00::/8"]), ..d() };
    assert_eq!(only_match(when), wanted);
}

#[test]
fn from_to_and_every_when_are_clauses_of_a_rule() {
    let (policy, said) = read(
        "namespace: shop",
        "{rules: [{}, {from: [{source: {principals: [a]}}, {source: {principals: [b]}}], \
         to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.0.0.1]}, \
         {key: destination.port, values: ['80']}]}]}",
    );
    assert_eq!(said, [""; 0]);
    let rules = policy.unwrap().applies.unwrap().policy.rules.clone();
    let shape: Vec<Vec<usize>> =
        rules.iter().map(|rule| rule.clauses.iter().map(Vec::len).collect()).collect();
    assert_eq!(shape, [vec![], vec![2, 1, 1, 1]]);
}

#[test]
fn scope_and_action_follow_the_namespace_and_the_words() {
    let applied = |meta: &str, spec: &str| {
        let applied = read(meta, spec).0.unwrap().applies.unwrap();
        (applied.policy.scope, applied.policy.action, applied.policy.dry_run, applied.hash.is_some())
    };
    let all = "rules: [{}]";
    let selector = "selector: {matchLabels: {app: web}}";
    let dry = "annotations: {istio.io/dry-run: 'true'}";
    for (meta, spec, wanted) in [
        ("namespace: shop", format!("{{{all}}}"), (Scope::Namespace, Action::Allow, false, true)),
        ("namespace: istio-system", format!("{{{all}}}"), (Scope::Mesh, Action::Allow, false, true)),
        ("namespace: shop", format!("{{{selector}, {all}}}"), (Scope::Selector, Action::Allow, false, true)),
        (
            "namespace: istio-system",
            format!("{{{selector}, action: DENY, {all}}}"),
            (Scope::Selector, Action::Deny, false, true),
        ),
        ("namespace: shop", "{selector: {}}".into(), (Scope::Namespace, Action::Allow, false, true)),
        (dry, format!("{{action: ALLOW, {all}}}"), (Scope::Namespace, Action::Allow, true, false)),
        (
            "annotations: {istio.io/dry-run: 'false'}",
            format!("{{{all}}}"),
            (Scope::Namespace, Action::Allow, false, true),
        ),
        (
            dry,
            format!("{{action: CUSTOM, provider: {{name: x}}, {all}}}"),
            (Scope::Namespace, Action::Deny, false, true),
        ),
    ] {
        assert_eq!(applied(meta, &spec), wanted, "{meta} {spec}");
    }
    // No spec at all is ALLOW without rules.
    let text = "{apiVersion: security.istio.io/v1beta1, kind: AuthorizationPolicy, metadata: {name: p}}";
    let parsed = parse("a.yaml".as_ref(), text, &Rules::default(), &Known::new());
    assert!(parsed.problems.is_empty() && parsed.resources.len() == 1, "{:?}", parsed.problems);
}

#[test]
fn mistakes_name_the_field_what_was_found_and_what_is_wanted() {
    let rule = |rule: &str| format!("{{rules: [{rule}]}}");
    let source = |source: &str| format!("{{rules: [{{from: [{{source: {{{source}}}}}]}}]}}");
    let long = "x".repeat(321);
    let many = vec!["x"; 17].join(", ");
    let table: Vec<(String, &str)> = vec![
        ("{action: Allow}".into(), "E spec.action: is \"Allow\", wanted ALLOW, DENY, AUDIT or CUSTOM"),
        (
            "{selector: {matchLabels: {app: a}}, targetRefs: [{kind: Gateway, name: g}], rules: [{}]}".into(),
            "E spec.targetRefs: is there beside spec.selector.matchLabels, wanted at most one of them",
        ),
        (
            "{targetRef: {kind: Gateway, name: g}, targetRefs: [{kind: Gateway, name: g}], rules: [{}]}"
                .into(),
            "E spec.targetRef: is there beside spec.targetRefs, wanted at most one of them",
        ),
        ("{targetRefs: [{kind: Gateway}], rules: [{}]}".into(), "E spec.targetRefs[0].name: is missing"),
        (
            "{targetRefs: [{kind: Service, name: a, namespace: b}], rules: [{}]}".into(),
            "E spec.targetRefs[0].namespace: is there, wanted none: targets are of the policy's own namespace",
        ),
        (
            "{selector: {matchLabels: {app: 'a*'}}, rules: [{}]}".into(),
            "E spec.selector.matchLabels.app: is \"a*\", wanted a label without '*'",
        ),
        (
            "{action: CUSTOM, rules: [{}]}".into(),
            "E spec.provider.name: is missing, wanted the provider that action CUSTOM asks",
        ),
        (
            "{provider: {name: x}, rules: [{}]}".into(),
            "E spec.provider: is there, wanted only with action CUSTOM",
        ),
        (rule("null"), "E spec.rules[0]: is empty, wanted a rule; one that matches everything is written {}"),
        (rule("{from: []}"), "E spec.rules[0].from: is empty, wanted at least one item, or no such field"),
        (rule("{to: []}"), "E spec.rules[0].to: is empty, wanted at least one item, or no such field"),
        (rule("{from: [{}]}"), "E spec.rules[0].from[0].source: is empty, wanted at least one of its fields"),
        (source(""), "E spec.rules[0].from[0].source: is empty, wanted at least one of its fields"),
        (
            rule("{to: [{operation: {}}]}"),
            "E spec.rules[0].to[0].operation: is empty, wanted at least one of its fields",
        ),
        (
            source("namespaces: [a, '']"),
            "E spec.rules[0].from[0].source.namespaces[1]: is empty, wanted a value",
        ),
        (
            source("ipBlocks: [10.0.0.0/33]"),
            "E spec.rules[0].from[0].source.ipBlocks[0]: is \"10.0.0.0/33\", wanted an address such as 10.0.0.1 or a \
             network such as 10.0.0.0/8 or fd00::/64",
        ),
        (
            source("remoteIpBlocks: [x]"),
            "E spec.rules[0].from[0].source.remoteIpBlocks[0]: is \"x\", wanted an address such as 10.0.0.1 or a \
             network such as 10.0.0.0/8 or fd00::/64",
        ),
        (
            source("serviceAccounts: ['a/*']"),
            "E spec.rules[0].from[0].source.serviceAccounts[0]: is \"a/*\", wanted NAMESPACE/NAME, or NAME of the \
             policy's own, without '*'",
        ),
        (
            source("serviceAccounts: [a/b/c]"),
            "E spec.rules[0].from[0].source.serviceAccounts[0]: is \"a/b/c\", wanted NAMESPACE/NAME, or NAME of the \
             policy's own, without '*'",
        ),
        (
            source(&format!("serviceAccounts: [{long}]")),
            "E spec.rules[0].from[0].source.serviceAccounts[0]: has 321 bytes, wanted at most 320",
        ),
        (
            source(&format!("serviceAccounts: [{many}]")),
            "E spec.rules[0].from[0].source.serviceAccounts: has 17 values, wanted at most 16",
        ),
        (
            source("serviceAccounts: [a], notNamespaces: [b]"),
            "E spec.rules[0].from[0].source.notNamespaces: is there beside serviceAccounts or notServiceAccounts, \
             wanted one kind of them",
        ),
        (
            source("trustDomains: [Prod]"),
            "E spec.rules[0].from[0].source.trustDomains[0]: is \"Prod\", wanted lower-case letters, digits, '-', \
             '.' and '_', with '*' for any run of them",
        ),
        (
            rule("{to: [{operation: {ports: ['0']}}]}"),
            "E spec.rules[0].to[0].operation.ports[0]: is \"0\", wanted a number from 1 to 65535",
        ),
        (
            rule("{to: [{operation: {notPorts: ['+80']}}]}"),
            "E spec.rules[0].to[0].operation.notPorts[0]: is \"+80\", wanted a number from 1 to 65535",
        ),
        (
            rule("{to: [{operation: {ports: [80]}}]}"),
            "E spec.rules[0].to[0].operation.ports[0]: invalid type: integer `80`, expected a string",
        ),
        (rule("{when: [{values: [a]}]}"), "E spec.rules[0].when[0].key: is missing"),
        (
            rule("{when: [{key: source.ip}]}"),
            "E spec.rules[0].when[0]: has neither values nor notValues, wanted at least one of them",
        ),
        (
            rule("{when: [{key: destination.port, values: [http]}]}"),
            "E spec.rules[0].when[0].values[0]: is \"http\", wanted a number from 1 to 65535",
        ),
    ];
    for (spec, wanted) in table {
        let (policy, said) = read("namespace: shop", &spec);
        assert!(policy.is_none(), "{spec}");
        assert!(said.iter().any(|line| line == wanted), "{spec}: {said:#?}");
    }
    for key in ["source.port", "request.headers", "request.headers[]", "request.auth.claims", "Source.ip"] {
        let spec = rule(&format!("{{when: [{{key: {key:?}, values: [a]}}]}}"));
        let (policy, said) = read("namespace: shop", &spec);
        assert!(policy.is_none() && said[0].starts_with("E spec.rules[0].when[0].key: is "), "{said:?}");
    }
}

#[test]
fn what_requests_decide_is_marked_and_warned_about() {
    let source = |field: &str| format!("from: [{{source: {{{field}}}}}]");
    let operation = |field: &str| format!("to: [{{operation: {{{field}}}}}]");
    let when = |key: &str| format!("when: [{{key: {key:?}, values: [10.0.0.1]}}]");
    let table = [
        source("requestPrincipals: ['*']"),
        source("notRequestPrincipals: ['*']"),
        source("remoteIpBlocks: [10.0.0.1]"),
        source("notRemoteIpBlocks: [10.0.0.1]"),
        operation("hosts: [a]"),
        operation("notHosts: [a]"),
        operation("methods: [GET]"),
        operation("notMethods: [GET]"),
        operation("paths: [/a]"),
        operation("notPaths: [/a]"),
        when("remote.ip"),
        when("connection.sni"),
        when("request.headers[x]"),
        when("request.auth.principal"),
        when("request.auth.audiences"),
        when("request.auth.presenter"),
        when("request.auth.claims[a][b]"),
        when("experimental.envoy.filters.a[b]"),
    ];
    for rule in table {
        for (action, effect) in
            [("ALLOW", "so its rule allows nothing"), ("DENY", "its rule denies more than it says")]
        {
            let (policy, said) =
                read("namespace: shop", &format!("{{action: {action}, rules: [{{{rule}}}]}}"));
            assert!(policy.unwrap().applies.unwrap().policy.needs_requests(), "{rule}");
            let [line] = said.as_slice() else { panic!("{rule}: {said:?}") };
            assert!(line.starts_with("W spec.rules[0].") && line.ends_with(effect), "{line}");
        }
    }
}

#[test]
fn what_has_no_effect_is_said() {
    let applies = |spec: &str, wanted: &str| {
        let (policy, said) = read("namespace: shop", spec);
        assert_eq!(said, [wanted], "{spec}");
        policy.unwrap().applies.is_some()
    };
    let empty = |action: &str| {
        format!(
            "W spec.rules: is empty, so it never matches and has no effect; a rule that matches everything is written \
             {{}}{action}"
        )
    };
    assert!(applies("{action: DENY}", &empty("")));
    assert!(applies("{action: DENY, rules: []}", &empty("")));
    assert!(!applies(
        "{action: AUDIT, rules: [{}]}",
        "W spec.action: is AUDIT, which the mesh does not do yet; the policy has no effect"
    ));
    assert!(!applies(
        "{targetRefs: [{kind: Gateway, group: g, name: g}], rules: [{}]}",
        "W spec.targetRefs: is for gateways and waypoints, which the mesh does not have yet; no workload is policed by it"
    ));
    assert!(applies(
        "{rules: [{from: [{source: {principals: [spiffe://td/ns/a/sa/b]}}]}]}",
        "W spec.rules[0].from[0].source.principals[0]: is \"spiffe://td/ns/a/sa/b\", which no peer is: a principal is \
         written without spiffe://"
    ));
    assert!(applies(
        "{rules: [{from: [{source: {principals: ['*a*']}}]}]}",
        "W spec.rules[0].from[0].source.principals[0]: is \"*a*\", which no peer is: the '*' at its end is taken \
         literally"
    ));
    assert!(applies(
        "{rules: [{from: [{source: {namespaces: [a], principals: []}}]}]}",
        "W spec.rules[0].from[0].source.principals: is an empty list; it has no effect"
    ));
    assert!(applies(
        "{rules: [{from: [{source: {namespaces: [a], namespace: b}}]}]}",
        "W spec.rules[0].from[0].source.namespace: is not a field of this kind; it has no effect"
    ));
    let (policy, said) = read("annotations: {istio.io/dry-run: maybe}", "{rules: [{}]}");
    assert!(!policy.unwrap().applies.unwrap().policy.dry_run, "when in doubt it is enforced");
    assert!(said[0].starts_with("W metadata.annotations.istio.io/dry-run: is \"maybe\""), "{said:?}");
}
