//! VirtualServices (semantics.md §2.1–§2.4).

use std::time::Duration;

use mesh_core::route::{
    http::{Action, HeaderOps, Millionths},
    matching::{PathMatch, StringMatch},
    rewrite::HeaderEdit,
    variables::HeaderText,
};

use super::{
    GATEWAY, ISTIO, action, compile, document, http, over_the_link, routes, service, shown, stream, targets,
    vs, vs_of,
};

const WEB: &str = "web.shop.svc.cluster.local";

fn to(host: &str) -> String {
    format!("route: [{{destination: {{host: {host}}}}}]")
}

#[test]
fn s1_short_names_are_of_the_rules_namespace_and_names_with_a_dot_are_taken_as_they_are() {
    let routes = routes(&[
        service("shop/web", &["http:80"]),
        service("shop/cart", &["http:80"]),
        service("else/web", &["http:80"]),
        vs("shop/a", &format!("hosts: [web], http: [{{{}}}]", to("cart"))),
        vs("shop/b", &format!("hosts: [web.else], http: [{{{}}}]", to("cart.shop"))),
    ]);
    assert_eq!(shown(http(&routes, WEB, 80, "x")), ["a spec.http[0]: shop/cart:80=1"]);
    assert_eq!(http(&routes, "web.else.svc.cluster.local", 80, "x"), None);
    // Neither `web.else` nor `cart.shop` is anybody's full name (S1).
    assert_eq!(shown(http(&routes, "web.else", 80, "x")), ["b spec.http[0]: 503 cluster_not_found=1"]);
}

#[test]
fn s6_s24_of_several_for_one_host_the_oldest_has_it_then_by_name_then_by_namespace_and_the_others_are_named()
{
    let rule = |to_host: &str| format!("hosts: [{WEB}], http: [{{{}}}]", to(to_host));
    let base = [service("shop/web", &["http:80"]), service("shop/cart", &["http:80"])];
    let winner = |documents: &[String]| {
        let compiled = compile(&[&base[..], documents].concat());
        let table = http(compiled.snapshot.routes(), WEB, 80, "x").unwrap();
        let losers: Vec<String> = compiled.problems.iter().map(|p| p.name.clone().unwrap()).collect();
        (table.rules[0].origin.name.to_string(), losers)
    };
    let (a, b) = (rule(WEB), rule(WEB));
    let said = |name: &str, loser: &str| (name.to_owned(), vec![loser.to_owned()]);
    assert_eq!(winner(&[vs_of("p/young", 9, &a), vs_of("q/old", 1, &b)]), said("q/old", "young"));
    assert_eq!(winner(&[vs_of("p/b", 1, &a), vs_of("q/a", 1, &b)]), said("q/a", "b"));
    assert_eq!(winner(&[vs_of("q/a", 1, &a), vs_of("p/a", 1, &b)]), said("p/a", "a"));
    // Without an age first, as for all kinds.
    assert_eq!(winner(&[vs_of("p/a", 1, &a), vs("q/b", &b)]), said("q/b", "a"));
}

#[test]
fn s4_s25_the_most_specific_host_wins_over_age_and_hosts_nobody_has_are_known_at_port_80_only() {
    let routes = routes(&[
        service("shop/web", &["http:80", "http-b:8080"]),
        vs_of("shop/all", 1, &format!("hosts: ['*.cluster.local'], http: [{{{}}}]", to("web"))),
        vs_of("shop/wild", 2, &format!("hosts: ['*.shop.svc.cluster.local'], http: [{{{}}}]", to("web"))),
        vs_of(
            "shop/exact",
            3,
            &format!("hosts: [web, out.example.com, '*.example.org'], http: [{{{}}}]", to("web")),
        ),
    ]);
    for port in [80, 8080] {
        let table = shown(http(&routes, WEB, port, "x"));
        assert_eq!(table, [format!("exact spec.http[0]: shop/web:{port}=1")]);
    }
    for host in ["out.example.com", "a.b.example.org"] {
        assert_eq!(shown(http(&routes, host, 80, "x")).len(), 1, "{host}");
        assert_eq!(http(&routes, host, 8080, "x"), None, "{host}");
    }
    assert_eq!(http(&routes, "example.org", 80, "x"), None, "fact 15");
    assert_eq!(http(&routes, "*.shop.svc.cluster.local", 80, "x"), None, "it has services");
}

#[test]
fn s3_a_wildcard_that_begins_within_a_label_has_the_hosts_that_end_like_it() {
    let answer = |status: u16| format!("http: [{{directResponse: {{status: {status}}}}}]");
    let routes = routes(&[
        service("shop/web", &["http:80"]),
        service("shop/cobweb", &["http:80"]),
        service("shop/cart", &["http:80"]),
        vs_of(
            "shop/ends",
            2,
            &format!("hosts: ['*eb.shop.svc.cluster.local', '*-api.Example.com'], {}", answer(201)),
        ),
        vs_of(
            "shop/all",
            1,
            &format!("hosts: ['*.shop.svc.cluster.local', '*.example.com'], {}", answer(202)),
        ),
    ]);
    let status = |host: &str| {
        let table = http(&routes, host, 80, "x").unwrap();
        action(&table.rules[0].action)
    };
    for (host, wanted) in [
        ("web.shop.svc.cluster.local", 201),
        ("cobweb.shop.svc.cluster.local", 201),
        ("cart.shop.svc.cluster.local", 202),
        ("v2-api.example.com", 201),
        ("api.example.com", 202),
    ] {
        assert_eq!(status(host), format!("answer {wanted} direct_response"), "{host}");
    }
}

#[test]
fn s26_clients_see_their_own_then_what_is_exported_to_them_then_what_is_for_everyone() {
    let rule = |export: &str| format!("hosts: [{WEB}], exportTo: [{export}], http: [{{{}}}]", to(WEB));
    let routes = routes(&[
        service("shop/web", &["http:80"]),
        vs_of("a/public", 1, &rule("'*'")),
        vs_of("b/own", 2, &rule(".")),
        vs_of("a/lent", 3, &rule("b, c")),
        vs_of("d/nobody", 0, &rule("'~'")),
    ]);
    for (client, wanted) in [("a", "public"), ("b", "own"), ("c", "lent"), ("d", "public"), ("x", "public")] {
        let table = http(&routes, WEB, 80, client).unwrap();
        assert_eq!(&*table.rules[0].origin.name.name, wanted, "clients of {client}");
    }
}

#[test]
fn what_only_some_see_leaves_the_others_without_a_table() {
    let rule = format!("hosts: [{WEB}], exportTo: [.], http: [{{{}}}]", to(WEB));
    let routes = routes(&[service("shop/web", &["http:80"]), vs("b/own", &rule)]);
    assert!(http(&routes, WEB, 80, "b").is_some());
    assert_eq!(http(&routes, WEB, 80, "x"), None);
}

#[test]
fn s2_s10_to_s12_gateways_ports_and_catch_alls_are_settled_before_a_request_comes() {
    let routes = routes(&[
        service("shop/web", &["http:80", "http-b:81"]),
        vs("shop/gw", "hosts: [web], gateways: [edge], http: [{directResponse: {status: 500}}]"),
        vs(
            "shop/web",
            "hosts: [web], gateways: [mesh, edge], http: [
               {match: [{port: 81}], directResponse: {status: 201}},
               {match: [{gateways: [edge]}], directResponse: {status: 202}},
               {match: [{gateways: [edge]}, {gateways: [mesh], sourceNamespace: q, uri: {prefix: /x}}], directResponse: {status: 203}},
               {match: [{sourceLabels: {app: a}}], directResponse: {status: 204}},
               {match: [{uri: {prefix: /}}], directResponse: {status: 205}},
               {directResponse: {status: 206}}]",
        ),
    ]);
    let statuses = |port: u16| -> Vec<u16> {
        let table = http(&routes, WEB, port, "x").unwrap();
        let status = |action: &Action| match action {
            Action::Respond { status, .. } => *status,
            other => panic!("{other:?}"),
        };
        assert_eq!(action(&table.unmatched), "answer 404 no_route");
        table.rules.iter().map(|rule| status(&rule.action)).collect()
    };
    assert_eq!(statuses(80), [203, 204, 205]);
    // Nothing is left to ask of a request at that port: it ends the list (S10, S11).
    assert_eq!(statuses(81), [201]);
    let table = http(&routes, WEB, 80, "x").unwrap();
    let one = &table.rules[0].matches;
    assert_eq!(one.len(), 1, "the one for gateways alone is gone");
    assert_eq!(one[0].source_namespace, None, "not asked beside gateways (S12)");
    assert_eq!(one[0].path, Some(PathMatch::Prefix { prefix: "/x".into(), ignore_case: false }));
    assert_eq!(table.rules[1].matches[0].source_labels.len(), 1);
}

#[test]
fn s58_to_s63_what_is_for_gateways_alone_changes_nothing_for_workloads() {
    let gateway = "servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]";
    let found = routes(&[
        service("shop/web", &["http:80", "tls:443"]),
        document(ISTIO, "Gateway", "shop/edge", gateway),
        vs(
            "shop/gw",
            "hosts: ['*'], gateways: [edge, other/edge], http: [{directResponse: {status: 500}}],
             tls: [{match: [{sniHosts: ['*']}], route: [{destination: {host: web, port: {number: 443}}}]}]",
        ),
        vs(
            "shop/gw-web",
            "hosts: [web, www.example.com], gateways: [edge], http: [{directResponse: {status: 500}}]",
        ),
        document(
            GATEWAY,
            "HTTPRoute",
            "shop/gw",
            "parentRefs: [{name: edge}], hostnames: [www.example.com], rules: [{backendRefs: [{name: web, port: 80}]}]",
        ),
    ]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_service_whose_rules_are_all_for_another_port_is_routed_as_if_there_were_none() {
    let routes = routes(&[
        service("shop/web", &["http:80"]),
        vs("shop/web", "hosts: [web], http: [{match: [{port: 81}], directResponse: {status: 201}}]"),
    ]);
    assert_eq!(http(&routes, WEB, 80, "x"), None);
}

#[test]
fn s16_a_destinations_port_is_the_one_named_else_the_only_one_else_the_one_dialled() {
    let table = [
        ("one", "", "shop/one:7070=1"),
        ("two", "", "shop/two:80=1"),
        ("two", ", port: {number: 81}", "shop/two:81=1"),
        ("two", ", port: {number: 82}", "503 cluster_not_found=1"),
        ("far", "", "503 cluster_not_found=1"),
        ("nobody", "", "503 cluster_not_found=1"),
        ("one", ", subset: v1", "shop/one:7070/v1=1"),
    ];
    for (host, more, wanted) in table {
        let rule = format!("hosts: [web], http: [{{route: [{{destination: {{host: {host}{more}}}}}]}}]");
        let routes = routes(&[
            service("shop/web", &["http:80"]),
            service("shop/one", &["http:7070"]),
            service("shop/two", &["http:80", "http-b:81"]),
            service("shop/far", &["http-a:90", "http-b:91"]),
            vs("shop/web", &rule),
        ]);
        let found = http(&routes, WEB, 80, "x").unwrap();
        assert_eq!(action(&found.rules[0].action), wanted, "{host}{more}");
    }
}

#[test]
fn s17_one_destination_gets_everything_and_of_several_those_without_weight_nothing() {
    for (weights, wanted) in [
        (&[0][..], "shop/web:80=1"),
        (&[7], "shop/web:80=7"),
        (&[90, 10], "shop/web:80=90 shop/web:80=10"),
        (&[0, 3, 1], "shop/web:80=3 shop/web:80=1"),
    ] {
        let list: Vec<String> =
            weights.iter().map(|w| format!("{{destination: {{host: web}}, weight: {w}}}")).collect();
        let rule = format!("hosts: [web], http: [{{route: [{}]}}]", list.join(", "));
        let routes = routes(&[service("shop/web", &["http:80"]), vs("shop/web", &rule)]);
        assert_eq!(action(&http(&routes, WEB, 80, "x").unwrap().rules[0].action), wanted, "{weights:?}");
    }
}

#[test]
fn s20_s21_s30_timeouts_retries_faults_and_mirrors_are_what_holds_in_the_end() {
    let rule = |more: &str| {
        let spec = format!("hosts: [web], http: [{{{}, {more}}}]", to("web"));
        let routes = routes(&[service("shop/web", &["http:80"]), vs("shop/web", &spec)]);
        http(&routes, WEB, 80, "x").unwrap().rules[0].clone()
    };
    let plain = rule("name: r");
    assert_eq!(plain.timeout, None, "fact 3");
    let built_in = plain.retries.unwrap();
    assert_eq!((built_in.attempts, built_in.on.statuses.len()), (2, 0), "fact 1");
    assert!(built_in.on.connect_failure && built_in.on.refused_stream && built_in.on.grpc == [1, 14]);
    assert_eq!(rule("retries: {attempts: 0}").retries, None);
    let own = rule("timeout: 2s, retries: {attempts: 5, perTryTimeout: 1s, retryOn: 'gateway-error,503'}");
    let retries = own.retries.unwrap();
    assert_eq!((own.timeout, retries.attempts), (Some(Duration::from_secs(2)), 5));
    assert!(retries.on.gateway_error && retries.on.statuses == [503] && !retries.on.connect_failure);
    let faulty = rule("timeout: 2s, fault: {abort: {httpStatus: 500, percentage: {value: 50}}}");
    assert_eq!((faulty.timeout, faulty.retries), (None, None), "S21");
    let never = rule("timeout: 2s, fault: {abort: {httpStatus: 500}}");
    assert!(never.timeout.is_some() && never.retries.is_some(), "a fault of 0 % is none");
    assert_eq!(never.fault, None, "or the agent would take time-out and retries away");
    assert!(faulty.fault.is_some());
    let copies =
        rule("mirrors: [{destination: {host: web}}, {destination: {host: web}, percentage: {value: 0}}]");
    assert_eq!(copies.mirrors.len(), 1, "an explicit 0 is none (S20)");
    assert_eq!(copies.mirrors[0].share, Millionths::ALL);
}

#[test]
fn delegates_stand_in_their_roots_places_and_are_found_only_where_exported() {
    let documents = |export: &str| {
        [
            service("shop/web", &["http:80"]),
            vs(
                "shop/root",
                "hosts: [web], http: [{match: [{uri: {prefix: /a}}], delegate: {name: part, namespace: team}}, {directResponse: {status: 299}}]",
            ),
            vs(
                "team/part",
                &format!(
                    "exportTo: [{export}], http: [{{match: [{{uri: {{prefix: /a/b}}}}], directResponse: {{status: 201}}}}]"
                ),
            ),
        ]
    };
    let compiled = compile(&documents("shop"));
    let table = shown(http(compiled.snapshot.routes(), WEB, 80, "x"));
    assert_eq!(
        table,
        ["part spec.http[0]: answer 201 direct_response", "root spec.http[1]: answer 299 direct_response"]
    );
    let owner = http(compiled.snapshot.routes(), WEB, 80, "x").unwrap().owner.clone();
    assert_eq!(owner.as_deref(), Some("shop"), "the root's namespace counts (S66)");
    let compiled = compile(&documents("."));
    let table = shown(http(compiled.snapshot.routes(), WEB, 80, "x"));
    assert_eq!(table, ["root spec.http[1]: answer 299 direct_response"]);
    assert!(compiled.problems[0].message.contains("not exported"), "{:?}", compiled.problems);
}

#[test]
fn an_alias_has_its_services_routes_and_none_of_its_own() {
    let routes = routes(&[
        service("shop/web", &["http:80"]),
        document("v1", "Service", "shop/alias", &format!("type: ExternalName, externalName: {WEB}")),
        document(
            "v1",
            "Service",
            "shop/twice",
            "type: ExternalName, externalName: alias.shop.svc.cluster.local",
        ),
        vs("shop/web", &format!("hosts: [web], http: [{{{}}}]", to("twice"))),
        vs("shop/alias", "hosts: [alias], http: [{directResponse: {status: 500}}]"),
    ]);
    for host in ["web", "alias", "twice"] {
        let host = format!("{host}.shop.svc.cluster.local");
        assert_eq!(shown(http(&routes, &host, 80, "x")), ["web spec.http[0]: shop/web:80=1"], "{host}");
    }
}

#[test]
fn tls_and_tcp_rules_are_for_ports_that_are_no_http() {
    let routes = routes(&[
        service("shop/web", &["http:80", "tls:443", "mysql:3306", "any:9000"]),
        vs(
            "shop/web",
            "hosts: [web, www.example.com], http: [{directResponse: {status: 201}}],
             tls: [{match: [{sniHosts: [www.example.com], port: 443}], route: [{destination: {host: web, port: {number: 443}}}]}],
             tcp: [{match: [{port: 3306, destinationSubnets: [10.0.0.0/8]}, {sourceNamespace: q}], route: [{destination: {host: web, port: {number: 3306}}, weight: 0}]}]",
        ),
    ]);
    let ports = |map: Vec<u16>| map;
    let of_web = |host: &str| host == WEB;
    assert_eq!(ports(routes.http.keys().filter(|k| of_web(&k.host)).map(|k| k.port).collect()), [80, 9000]);
    assert_eq!(ports(routes.streams.keys().map(|k| k.port).collect()), [443, 3306, 9000]);
    let tls = stream(&routes, WEB, 443, "x").unwrap();
    assert_eq!(&*tls.tls[0].matches[0].sni, ["www.example.com".into()]);
    assert_eq!(targets(&tls.tls[0].backends), "shop/web:443=1");
    let tcp = stream(&routes, WEB, 3306, "x").unwrap();
    assert!(tcp.tls.is_empty() && tcp.tcp[0].matches.len() == 2);
    assert_eq!(tcp.tcp[0].matches[0].subnets.len(), 1);
    assert_eq!(tcp.tcp[0].matches[1].source_namespace.as_deref(), Some("q"));
    assert_eq!(stream(&routes, WEB, 9000, "x").unwrap().tcp[0].matches.len(), 1);
}

#[test]
fn every_condition_of_a_match_arrives_and_arrives_over_the_link_too() {
    let compiled = compile(&[
        service("shop/web", &["http:80"]),
        vs(
            "shop/web",
            "hosts: [web], http: [{name: r, match: [{name: m, uri: {regex: '/a.*'}, method: {exact: GET},
               scheme: {exact: http}, authority: {prefix: web}, headers: {X-User: {exact: jason}, x-any: {}},
               withoutHeaders: {x-not: {regex: '.+'}}, queryParams: {q: {exact: '1'}}, sourceLabels: {app: a}, sourceNamespace: ns}],
               rewrite: {uri: /z, authority: other}, headers: {request: {set: {x-a: b}, remove: [x-c]}},
               corsPolicy: {allowOrigins: [{exact: 'https://a'}]},
               route: [{destination: {host: web}, headers: {response: {add: {x-d: e}}}}]}]",
        ),
    ]);
    let table = http(compiled.snapshot.routes(), WEB, 80, "x").unwrap();
    let rule = &table.rules[0];
    let one = &rule.matches[0];
    assert_eq!((rule.name.as_deref(), one.name.as_deref()), (Some("r"), Some("m")));
    let exact = |text: &str| Some(StringMatch::Exact(text.into()));
    assert!(matches!(&one.path, Some(PathMatch::Regex(regex)) if regex.is_match("/abc")));
    assert_eq!((&one.method, &one.scheme), (&exact("GET"), &exact("http")));
    let headers: Vec<(&str, bool)> = one.headers.iter().map(|h| (&*h.name, h.inverted)).collect();
    assert_eq!(headers, [("x-any", false), ("x-user", false), ("x-not", true)]);
    assert_eq!(one.headers[0].value, StringMatch::Present);
    assert_eq!(
        (one.query.len(), one.source_labels.len(), one.source_namespace.as_deref()),
        (1, 1, Some("ns"))
    );
    assert_eq!(rule.rewrite.authority.as_deref(), Some("other"));
    assert!(rule.cors.is_some());
    assert_eq!(rule.origin.place.as_deref(), Some("a.yaml, document 2"));
    assert!(over_the_link(&compiled.snapshot).same_world(&compiled.snapshot));
}

#[test]
fn s18_headers_of_a_rule_and_its_only_destination_are_one_list() {
    let rules = |destinations: &str| {
        let spec = format!(
            "hosts: [web], http: [{{headers: {{request: {{set: {{x-b: rule, x-c: rule, host: rule.example}}}},
               response: {{add: {{x-e: rule}}}}}}, route: [{destinations}]}}]"
        );
        let found = routes(&[service("shop/web", &["http:80"]), vs("shop/web", &spec)]);
        http(&found, WEB, 80, "x").unwrap().rules[0].clone()
    };
    let to = "{destination: {host: web}, headers: {request: {set: {x-a: own, x-c: own, host: own.example}, remove: [x-b]},
               response: {set: {x-e: own}}}}";
    let edits = |ops: &HeaderOps| -> Vec<String> {
        let text = |text: &HeaderText| match text {
            HeaderText::Plain(text) => text.to_string(),
            HeaderText::Template(template) => template.source().to_owned(),
        };
        let said = |edit: HeaderEdit<'_>| match edit {
            HeaderEdit::Set(name, value) => format!("{name}={}", text(value)),
            HeaderEdit::Add(name, value) => format!("{name}+{}", text(value)),
            HeaderEdit::Remove(name) => format!("-{name}"),
        };
        ops.edits().map(said).collect()
    };
    let one = rules(to);
    assert_eq!(edits(&one.request_headers), ["-x-b", "x-a=own", "x-b=rule", "x-c=rule", "x-c=own"]);
    assert_eq!(edits(&one.response_headers), ["x-e=own", "x-e+rule"]);
    assert_eq!(one.request_headers.authority.as_deref(), Some("rule.example"));
    assert!(one.action.backends().unwrap()[0].request_headers.is_empty());
    // Of several each has its own.
    let several = rules(&format!(
        "{}, {{destination: {{host: web}}, weight: 1}}",
        to.replace("}}}}", "}}}, weight: 1}")
    ));
    assert_eq!(edits(&several.request_headers), ["x-b=rule", "x-c=rule"]);
    let own = &several.action.backends().unwrap()[0].request_headers;
    assert_eq!(edits(own), ["-x-b", "x-a=own", "x-c=own"]);
}
