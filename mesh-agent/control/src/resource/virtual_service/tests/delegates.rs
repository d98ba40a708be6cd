//! Delegates: what may be one (S27), and what comes out of root and delegate (S28, S29).

use super::{super::delegate::merged, *};

/// Root in `shop` with these rules, delegates in `parts` by name.
fn merge(root: &str, delegates: &[(&str, &str)]) -> (Vec<HttpRoute>, Vec<String>) {
    let root = good(&format!("{{hosts: [w], http: [{root}]}}"));
    let delegates: Vec<VirtualService> = delegates
        .iter()
        .map(|(name, spec)| {
            let (read, said) = read_in(&format!("name: {name}, namespace: parts"), spec);
            assert_eq!(said, [""; 0], "{spec}");
            read.unwrap()
        })
        .collect();
    let find = |name: &Name| delegates.iter().find(|delegate| delegate.name == *name);
    let (rules, problems) = merged(&root, find, &ExportTo::everyone());
    (rules, problems.into_iter().map(|p| format!("{}: {}", p.field, p.message)).collect())
}

#[test]
fn s27_a_delegate_has_http_alone_and_does_not_delegate() {
    assert!(good(&format!("{{http: [{{{ROUTE}}}]}}")).is_delegate());
    for (spec, wanted) in [
        (format!("{{gateways: [edge], http: [{{{ROUTE}}}]}}"), ("E spec.gateways", "http alone")),
        ("{http: [{delegate: {name: d}}]}".to_owned(), ("E spec.http[0].delegate", "one level")),
        (format!("{{http: [{{{ROUTE}}}], tcp: [{{{ROUTE}}}]}}"), ("E spec.tcp", "http alone")),
    ] {
        says(&spec, &[wanted]);
    }
    rule_says("delegate: {}", &[("E spec.http[0].delegate.name", "is missing")]);
    let HttpAction::Delegate(name) = rule("delegate: {name: d}").action else { panic!() };
    assert_eq!(name, Name::new("shop", "d"), "the root's namespace unless it names one");
    let HttpAction::Delegate(name) = rule("delegate: {name: d, namespace: other}").action else { panic!() };
    assert_eq!(name, Name::new("other", "d"));
}

#[test]
fn s28_delegates_only_narrow_what_their_root_lets_through() {
    for (root, part, kept) in [
        ("{uri: {prefix: /a}}", "{uri: {prefix: /a/b}}", true),
        ("{uri: {prefix: /a}}", "{uri: {exact: /a/b}}", true),
        ("{uri: {prefix: /a}}", "{uri: {prefix: /b}}", false),
        ("{uri: {prefix: /a/b}}", "{uri: {prefix: /a}}", false),
        ("{uri: {exact: /a}}", "{uri: {exact: /a}}", true),
        ("{uri: {exact: /a}}", "{uri: {exact: /b}}", false),
        ("{uri: {exact: /a}}", "{uri: {prefix: /a}}", false),
        ("{uri: {regex: /a.*}}", "{uri: {exact: /a}}", false),
        ("{uri: {prefix: /a}}", "{uri: {regex: /a.*}}", false),
        ("{uri: {prefix: /a}}", "{method: {regex: G.*}}", true),
        ("{uri: {prefix: /a}, ignoreUriCase: true}", "{uri: {prefix: /A/b}, ignoreUriCase: true}", true),
        ("{uri: {prefix: /a}, ignoreUriCase: true}", "{uri: {prefix: /a/b}}", false),
        ("{port: 80}", "{port: 80}", true),
        ("{port: 80}", "{}", true),
        ("{port: 80}", "{port: 81}", false),
        ("{headers: {a: {exact: x}}}", "{headers: {b: {exact: why}}}", true),
        ("{headers: {a: {exact: x}}}", "{headers: {a: {exact: why}}}", false),
        ("{headers: {a: {}}}", "{headers: {a: {exact: why}}}", true),
        ("{headers: {a: {exact: why}}}", "{headers: {a: {}}}", false),
        ("{queryParams: {a: {prefix: x}}}", "{queryParams: {a: {exact: xy}}}", true),
        ("{withoutHeaders: {a: {}}}", "{withoutHeaders: {a: {}}}", true),
        ("{withoutHeaders: {a: {}}}", "{withoutHeaders: {a: {exact: b}}}", false),
        ("{sourceNamespace: one}", "{sourceNamespace: one}", true),
        ("{sourceNamespace: one}", "{sourceNamespace: two}", false),
        ("{sourceNamespace: one}", "{}", true),
        ("{sourceLabels: {a: x}}", "{sourceLabels: {b: why}}", true),
        ("{sourceLabels: {a: x}}", "{sourceLabels: {a: why}}", false),
        ("{gateways: [mesh, infra/a]}", "{gateways: [mesh]}", true),
        ("{gateways: [mesh]}", "{gateways: [infra/a]}", false),
    ] {
        let root = format!("{{match: [{root}], delegate: {{name: d, namespace: parts}}}}");
        let (rules, said) = merge(&root, &[("d", &format!("{{http: [{{match: [{part}], {ROUTE}}}]}}"))]);
        assert_eq!(
            (rules.len(), said.len()),
            (usize::from(kept), usize::from(!kept)),
            "{root} with {part}: {said:?}"
        );
    }
}

#[test]
fn s28_every_match_of_a_delegate_is_combined_with_every_match_of_the_root_that_it_narrows() {
    let root = "{name: r, match: [{name: one, uri: {prefix: /a}, method: {exact: GET}}, {uri: {prefix: /a/b}}, \
                {uri: {prefix: /c}}], delegate: {name: d, namespace: parts}}";
    let part = format!(
        "{{http: [{{name: p, match: [{{name: two, uri: {{exact: /a/b/c}}, headers: {{x: {{exact: why}}}}}}], {ROUTE}}}]}}"
    );
    let (rules, said) = merge(root, &[("d", &part)]);
    assert_eq!(said, [""; 0]);
    let [only] = rules.as_slice() else { panic!("{rules:?}") };
    assert_eq!((only.name.as_deref(), only.matches.len()), (Some("r-p"), 2));
    let [first, second] = only.matches.as_slice() else { panic!("{only:?}") };
    assert_eq!(
        (first.name.as_deref(), &first.uri, &first.method),
        (Some("one-two"), &Some(exact("/a/b/c")), &Some(exact("GET")))
    );
    assert_eq!((second.name.as_deref(), &second.method, second.headers.len()), (Some("two"), &None, 1));
    assert_eq!((only.source.clone(), &*only.field), (Name::new("parts", "d"), "spec.http[0]"));
    // One match that narrows nothing takes the rule with it, and only that rule.
    let part = format!(
        "{{http: [{{match: [{{uri: {{exact: /a/x}}}}, {{uri: {{exact: /z}}}}], {ROUTE}}}, {{match: [{{uri: {{exact: /c/x}}}}], {ROUTE}}}]}}"
    );
    let (rules, said) = merge(root, &[("d", &part)]);
    assert_eq!(rules.len(), 1);
    assert!(
        said[0].starts_with("spec.http[0].delegate: is parts/d, whose spec.http[0] asks for more"),
        "{said:?}"
    );
}

#[test]
fn s29_a_delegates_own_fields_win_over_its_roots() {
    let root = "{delegate: {name: d, namespace: parts}, timeout: 1s, retries: {attempts: 1}, rewrite: {uri: /r}, \
                headers: {request: {set: {a: root}}}, mirror: {host: m}, fault: {abort: {httpStatus: 500, percent: 1}}, \
                corsPolicy: {maxAge: 1s}}";
    let inherits = format!("{{http: [{{{ROUTE}}}]}}");
    let (rules, _) = merge(root, &[("d", &inherits)]);
    let rule = &rules[0];
    assert_eq!(rule.timeout, Some(Duration::from_secs(1)));
    assert!(matches!(&rule.retries, Some(Retries::On(on)) if on.attempts == 1));
    assert!(rule.rewrite.is_some() && rule.headers.is_some() && rule.fault.is_some() && rule.cors.is_some());
    assert_eq!(rule.mirrors.len(), 1);
    let HttpAction::Route(to) = &rule.action else { panic!("{rule:?}") };
    assert_eq!(
        &*to[0].destination.host.full("c"),
        "web.parts.svc.c",
        "short names are of the delegate's namespace"
    );

    let own = "{http: [{route: [{destination: {host: w}}], timeout: 2s, retries: {attempts: 0}, rewrite: {uri: /d}, \
               headers: {response: {set: {b: mine}}}, mirrors: [{destination: {host: m1}}, {destination: {host: m2}}]}]}";
    let (rules, _) = merge(root, &[("d", own)]);
    let rule = &rules[0];
    assert_eq!((rule.timeout, &rule.retries), (Some(Duration::from_secs(2)), &Some(Retries::Off)));
    assert!(rule.headers.as_ref().unwrap().request.is_empty(), "headers are taken whole");
    assert_eq!(rule.mirrors.len(), 2);

    let (rules, _) = merge(root, &[("d", "{http: [{directResponse: {status: 200}}]}")]);
    assert!(rules[0].rewrite.is_none() && rules[0].fault.is_none() && rules[0].mirrors.is_empty());
}

#[test]
fn a_delegate_that_is_not_there_or_not_to_be_seen_takes_its_rule_away_and_is_named() {
    let root = "{delegate: {name: d, namespace: parts}}, {route: [{destination: {host: w}}]}";
    let hidden = format!("{{exportTo: ['.'], http: [{{{ROUTE}}}]}}");
    let hosted = format!("{{hosts: [x.y], http: [{{{ROUTE}}}]}}");
    for (delegates, words) in [
        (vec![], "which is not there"),
        (vec![("d", hidden.as_str())], "not exported to namespace shop"),
        (vec![("d", hosted.as_str())], "hosts of its own"),
    ] {
        let (rules, said) = merge(root, &delegates);
        assert_eq!(rules.len(), 1, "{delegates:?}");
        assert!(
            said[0].starts_with("spec.http[0].delegate: is parts/d") && said[0].contains(words),
            "{said:?}"
        );
    }
}
