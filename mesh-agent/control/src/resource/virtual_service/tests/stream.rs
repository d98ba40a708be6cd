//! Routes by server name, and of plain connections.

use super::*;

#[test]
fn tls_rules_need_server_names_that_a_host_covers() {
    let read = good(
        "{hosts: ['*.example.com', db], tls: [{match: [{sniHosts: [A.example.com, '*.example.com', db, db.shop.svc.cluster.local], \
         port: 443, destinationSubnets: [10.0.0.0/8, 10.1.2.3], gateways: [mesh], sourceLabels: {a: b}, sourceNamespace: one}], \
         route: [{destination: {host: db}}]}]}",
    );
    let one = &read.tls[0].matches[0];
    assert_eq!(
        one.sni.iter().map(|sni| &**sni).collect::<Vec<_>>(),
        ["a.example.com", "*.example.com", "db", "db.shop.svc.cluster.local",]
    );
    assert_eq!(
        one.subnets.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "10.1.2.3/32"]
    );
    let to = "route: [{destination: {host: db}}]";
    for (tls, start, words) in [
        (format!("{{{to}}}"), "E spec.tls[0].match", "is missing"),
        (format!("{{match: [{{port: 1}}], {to}}}"), "E spec.tls[0].match[0].sniHosts", "is missing"),
        (
            format!("{{match: [{{sniHosts: [b.org]}}], {to}}}"),
            "E spec.tls[0].match[0].sniHosts[0]",
            "no host of spec.hosts",
        ),
        (
            format!("{{match: [{{sniHosts: ['*.com']}}], {to}}}"),
            "E spec.tls[0].match[0].sniHosts[0]",
            "no host of spec.hosts",
        ),
        (
            format!("{{match: [{{sniHosts: [a.example.com], destinationSubnets: [x]}}], {to}}}"),
            "E spec.tls[0].match[0].destinationSubnets[0]",
            "a network",
        ),
        ("{match: [{sniHosts: [a.example.com]}]}".to_owned(), "E spec.tls[0].route", "is missing"),
    ] {
        says(&format!("{{hosts: ['*.example.com'], tls: [{tls}]}}"), &[(start, words)]);
    }
}

#[test]
fn tcp_rules_may_be_without_a_match() {
    let read = good(
        "{hosts: [db], tcp: [{match: [{port: 27017}], route: [{destination: {host: a}, weight: 80}, \
         {destination: {host: b}, weight: 20}]}, {route: [{destination: {host: c}}]}]}",
    );
    assert_eq!(read.tcp[0].matches[0].port, Some(27017));
    assert_eq!(read.tcp[0].destinations.iter().map(|to| to.weight).collect::<Vec<_>>(), [80, 20]);
    assert!(read.tcp[1].matches.is_empty());
    assert_eq!(&*read.tcp[1].field, "spec.tcp[1]");
    says(
        "{hosts: [db], tcp: [{match: [{sniHosts: [a]}], route: [{destination: {host: a}}]}]}",
        &[("W spec.tcp[0].match[0].sniHosts", "not a field")],
    );
    says(
        "{hosts: [db], tcp: [{route: [{destination: {host: a}}, {destination: {host: b}}]}]}",
        &[("E spec.tcp[0].route", "only weights of 0")],
    );
}
