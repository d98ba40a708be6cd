//! Hosts of one VirtualService, beside one another and for the gateways that it is bound to.

use super::*;

fn said_of(hosts: &str, gateways: &str) -> Vec<String> {
    read(&format!("{{hosts: {hosts}, {gateways} http: [{{{ROUTE}}}]}}")).1
}

#[test]
fn only_gateways_have_rules_for_every_host() {
    let wanted = "E spec.hosts[0]: is \"*\", wanted names or \"*.suffix\": rules for workloads (gateway \"mesh\") are not for every host";
    for gateways in ["", "gateways: [mesh],", "gateways: [edge, mesh],"] {
        assert_eq!(said_of("['*']", gateways), [wanted], "{gateways}");
        assert_eq!(said_of("['*', a.b]", gateways), [wanted], "{gateways}");
    }
    let read = good(&format!("{{hosts: ['*'], gateways: [edge], http: [{{{ROUTE}}}]}}"));
    assert_eq!(&*read.hosts[0].full("cluster.local"), "*");
}

#[test]
fn s23_hosts_of_one_resource_have_no_name_in_common() {
    for (hosts, gateways, wanted) in [
        (
            "[a.b.com, '*.b.com']",
            "",
            "E spec.hosts[1]: is \"*.b.com\", which has names in common with \"a.b.com\"",
        ),
        (
            "['*.com', x.org, '*.B.com']",
            "",
            "E spec.hosts[2]: is \"*.B.com\", which has names in common with \"*.com\"",
        ),
        (
            "['*', a.com]",
            "gateways: [edge],",
            "E spec.hosts[1]: is \"a.com\", which has names in common with \"*\"",
        ),
        ("[a.com, A.com]", "", "E spec.hosts[1]: is \"A.com\", which is there already"),
    ] {
        assert_eq!(said_of(hosts, gateways), [wanted], "{hosts}");
    }
    for hosts in
        ["[b.com, '*.b.com']", "['*.a.com', '*.b.com']", "[web, '*.svc.cluster.local']", "['*-a.com', a.com]"]
    {
        assert_eq!(said_of(hosts, ""), [""; 0], "{hosts}");
    }
}
