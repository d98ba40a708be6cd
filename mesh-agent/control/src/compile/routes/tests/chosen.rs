//! Which of several VirtualServices has a port of a host.

use super::{action, compile, http, service, stream, vs_of};

const WEB: &str = "web.shop.svc.cluster.local";

#[test]
fn s6_one_without_a_rule_for_the_port_leaves_the_host_to_the_next() {
    let web = || service("shop/web", &["http:80", "http-b:81", "tcp:3306", "tcp-b:3307"]);
    let tcp = |port: u16, to: u16| {
        format!(
            "tcp: [{{match: [{{port: {port}}}], route: [{{destination: {{host: web, port: {{number: {to}}}}}}}]}}]"
        )
    };
    let answer =
        |condition: &str, status: u16| format!("{{{condition}directResponse: {{status: {status}}}}}");
    let old = format!("hosts: [{WEB}], http: [{}], {}", answer("match: [{port: 81}], ", 201), tcp(3306, 1));
    let young = format!("hosts: [{WEB}], http: [{}], {}", answer("", 202), tcp(3307, 2));
    let at_80 = format!("hosts: [{WEB}], http: [{}]", answer("match: [{port: 80}], ", 202));
    let wild = format!("hosts: ['*.shop.svc.cluster.local'], http: [{}]", answer("", 203));
    let seen = |documents: &[String]| {
        let compiled = compile(&[&[web()], documents].concat());
        let routes = compiled.snapshot.routes();
        let found = [80, 81].map(|port| {
            http(routes, WEB, port, "x").map(|table| action(&table.rules[0].action)[7..10].to_owned())
        });
        let losers: Vec<String> =
            compiled.problems.iter().map(|problem| problem.name.clone().unwrap()).collect();
        (found, losers)
    };
    let said = |at_80: &str, at_81: &str| [Some(at_80.to_owned()), Some(at_81.to_owned())];
    // At port 81 the younger has no effect.
    let (first, second) = (vs_of("shop/old", 1, &old), vs_of("shop/young", 2, &young));
    assert_eq!(seen(&[first.clone(), second.clone()]), (said("202", "201"), vec!["young".to_owned()]));
    // Neither takes anything from the other: nothing is to be said.
    assert_eq!(seen(&[first.clone(), vs_of("shop/young", 2, &at_80)]), (said("202", "201"), Vec::new()));
    // Nor is a less specific one in the way, or in need of a word.
    assert_eq!(seen(&[first.clone(), vs_of("shop/wild", 2, &wild)]), (said("203", "201"), Vec::new()));
    let compiled = compile(&[web(), first, second]);
    for (port, owner) in [(3306, "old"), (3307, "young")] {
        let table = stream(compiled.snapshot.routes(), WEB, port, "x").unwrap();
        assert_eq!(&*table.tcp[0].origin.name.name, owner);
    }
}
