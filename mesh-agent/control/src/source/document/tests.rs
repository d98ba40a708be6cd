//! Tables of what users write, right and wrong.

use proptest::prelude::*;

use super::*;

fn parse_text(text: &str) -> Parsed {
    parse("mesh/test.yaml".as_ref(), text, &Rules::default(), &Known::new())
}

fn lines(parsed: &Parsed) -> Vec<String> {
    parsed
        .problems
        .iter()
        .map(|p| {
            let level = if p.level == Level::Error { "E" } else { "W" };
            let document = p.document.unwrap_or_default();
            format!("{level}{document} {}: {}", p.field, p.message)
        })
        .collect()
}

fn keys(parsed: &Parsed) -> Vec<String> {
    parsed.resources.iter().map(|(document, resource)| format!("{document} {}", resource.key())).collect()
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.1
  ports: [{port: 80, targetPort: http}]
";

fn service_with(from: &str, to: &str) -> Parsed {
    assert!(SERVICE.contains(from), "{from}");
    parse_text(&SERVICE.replace(from, to))
}

#[test]
fn every_kind_is_read() {
    let parsed = parse_text(
        "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, annotations: {nodemesh.dev/netns: /run/netns/web}}
spec: {nodeName: n1, containers: [{name: app, image: x, ports: [{containerPort: 80}]}]}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1]}]
ports: [{port: 80}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
",
    );
    assert_eq!(lines(&parsed), Vec::<String>::new());
    assert_eq!(
        keys(&parsed),
        [
            "1 Namespace shop",
            "2 ServiceAccount shop/web",
            "3 Pod shop/web-1",
            "4 Service shop/web",
            "5 EndpointSlice shop/web-x",
            "6 PeerAuthentication shop/default",
        ]
    );
    assert_eq!(parsed.ignored, [("apps/v1/Deployment".to_owned(), 1)].into());
}

#[test]
fn a_missing_namespace_is_default() {
    assert_eq!(keys(&parse_text(SERVICE)), ["1 Service default/web"]);
}

#[test]
fn mistakes_in_a_service_name_the_field_and_what_is_wanted() {
    let table = [
        ("name: web", "nam: web", "E1 metadata.name: is missing"),
        ("name: web", "name: 7", "E1 metadata.name: invalid type: integer `7`, expected a string"),
        (
            "name: web",
            "name: Web",
            "E1 metadata.name: is \"Web\", wanted lower-case letters, digits, '-' and '.', at most 253",
        ),
        (
            "name: web",
            "name: web.a",
            "E1 metadata.name: is \"web.a\", wanted lower-case letters, digits and '-', at most 63",
        ),
        (
            "name: web",
            "name: web, namespace: a.b",
            "E1 metadata.namespace: is \"a.b\", wanted lower-case letters, digits and '-', at most 63",
        ),
        ("10.96.0.1", "10.96.0.300", "E1 spec.clusterIP: is \"10.96.0.300\", wanted an IPv4 or IPv6 address"),
        ("10.96.0.1", "none", "E1 spec.clusterIP: is \"none\", wanted an IPv4 or IPv6 address"),
        ("10.96.0.1", "127.0.0.1", "E1 spec.clusterIP: is \"127.0.0.1\", wanted an address others can dial"),
        (
            "clusterIP: 10.96.0.1",
            "clusterIPs: [10.96.0.1, 10.96.0.2]",
            "E1 spec.clusterIPs[1]: is \"10.96.0.2\", wanted at most one address per family",
        ),
        (
            "clusterIP: 10.96.0.1",
            "clusterIPs: [None, 10.96.0.2]",
            "E1 spec.clusterIPs[1]: is \"10.96.0.2\", but the service is headless (\"None\") elsewhere",
        ),
        (
            "clusterIP: 10.96.0.1",
            "externalIPs: [x]",
            "E1 spec.externalIPs[0]: is \"x\", wanted an IPv4 or IPv6 address",
        ),
        ("port: 80,", "port: 80x,", "E1 spec.ports[0].port: invalid type: string \"80x\", expected i32"),
        ("port: 80,", "port: '80',", "E1 spec.ports[0].port: invalid type: string \"80\", expected i32"),
        ("port: 80,", "port: 80000,", "E1 spec.ports[0].port: is 80000, wanted a number from 1 to 65535"),
        (
            "{port: 80, targetPort: http}",
            "{targetPort: http}",
            "E1 spec.ports[0].port: is 0 or missing, wanted a number from 1 to 65535",
        ),
        (
            "targetPort: http",
            "targetPort: HTTP",
            "E1 spec.ports[0].targetPort: is \"HTTP\", wanted a number or a port name: at most 15 lower-case letters, digits and '-', with a letter",
        ),
        (
            "targetPort: http",
            "targetPort: '80'",
            "E1 spec.ports[0].targetPort: is \"80\", wanted a number or a port name: at most 15 lower-case letters, digits and '-', with a letter; a number is written without quotes",
        ),
        (
            "targetPort: http",
            "name: Web_1",
            "E1 spec.ports[0].name: is \"Web_1\", wanted lower-case letters, digits and '-', at most 63",
        ),
        (
            "targetPort: http",
            "protocol: tcp",
            "E1 spec.ports[0].protocol: is \"tcp\", wanted \"TCP\", \"UDP\" or \"SCTP\"",
        ),
        (
            "targetPort: http}",
            "name: a}, {port: 81}",
            "E1 spec.ports[1].name: is missing; every port of several needs a name",
        ),
        (
            "targetPort: http}",
            "name: a}, {port: 81, name: a}",
            "E1 spec.ports[1].name: is \"a\", which another port is called already",
        ),
        (
            "targetPort: http}",
            "name: a}, {port: 80, name: b}",
            "E1 spec.ports[1].port: is 80/TCP, which another port has already",
        ),
        (
            "ports: [{port: 80, targetPort: http}]",
            "ports: []",
            "E1 spec.ports: is empty; only a headless service can be without ports",
        ),
        (
            "ports: [{port: 80, targetPort: http}]",
            "type: ExternalName",
            "E1 spec.externalName: is missing, and type ExternalName needs it",
        ),
        (
            "ports: [{port: 80, targetPort: http}]",
            "type: ExternalName\n  externalName: 10.0.0.1",
            "E1 spec.externalName: is \"10.0.0.1\", wanted a DNS name, not an address",
        ),
        (
            "ports: [{port: 80, targetPort: http}]",
            "type: External",
            "E1 spec.type: is \"External\", wanted \"ClusterIP\", \"NodePort\", \"LoadBalancer\" or \"ExternalName\"",
        ),
        (
            "clusterIP: 10.96.0.1",
            "sessionAffinity: clientIP",
            "E1 spec.sessionAffinity: is \"clientIP\", wanted \"ClientIP\" or \"None\"",
        ),
        ("apiVersion: v1", "apiVersion: v2", "E1 apiVersion: is \"v2\", wanted \"v1\" for a Service"),
        (
            "apiVersion: v1",
            "apiVersion: apps/v1",
            "E1 apiVersion: is \"apps/v1\", wanted \"v1\" for a Service",
        ),
        ("apiVersion: v1", "api: v1", "E1 apiVersion: is missing"),
        ("apiVersion: v1", "apiVersion: 1", "E1 apiVersion: is a number, wanted text"),
        ("kind: Service", "kind: ", "E1 kind: is missing"),
        (
            "metadata: {name: web}",
            "metadata: [name]",
            "E1 metadata: invalid type: sequence, expected ObjectMeta",
        ),
    ];
    for (from, to, wanted) in table {
        let parsed = service_with(from, to);
        let errors: Vec<_> = lines(&parsed).into_iter().filter(|l| l.starts_with('E')).collect();
        assert!(errors.iter().any(|line| line == wanted), "{to}: {errors:#?}");
        assert_eq!(parsed.resources.len(), 0, "{to}");
    }
}

#[test]
fn a_service_without_spec_says_so() {
    let parsed = parse_text("{apiVersion: v1, kind: Service, metadata: {name: web}}");
    assert_eq!(lines(&parsed)[0], "E1 spec: is missing");
}

#[test]
fn mistakes_in_other_kinds_name_the_field_and_what_is_wanted() {
    let pod = |rest: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\n{rest}");
    let annotated = |key: &str, value: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, annotations: {{{key}: {value}}}}}\nspec: {{}}"
        )
    };
    let slice = |rest: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: a, labels: {{kubernetes.io/service-name: b}}}}\n{rest}"
        )
    };
    let policy = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: a}}\nspec: {spec}"
        )
    };
    let table = [
        (
            pod("spec: {}\nstatus: {podIP: 10.0.0}"),
            "E1 status.podIP: is \"10.0.0\", wanted an IPv4 or IPv6 address",
        ),
        (
            pod("spec: {}\nstatus: {podIP: 127.0.0.1}"),
            "E1 status.podIP: is \"127.0.0.1\", wanted an address others can reach",
        ),
        (
            pod("spec: {}\nstatus: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.2}]}"),
            "E1 status.podIPs[0].ip: is \"10.0.0.2\", but 10.0.0.1 is there already: one address per family",
        ),
        (pod("spc: {}"), "E1 spec: is missing"),
        (
            pod("spec: {containers: [{name: a, ports: [{containerPort: 99999}]}]}"),
            "E1 spec.containers[0].ports[0].containerPort: is 99999, wanted a number from 1 to 65535",
        ),
        (
            pod("spec: {containers: [{name: a, ports: [{containerPort: 80, name: '80'}]}]}"),
            "E1 spec.containers[0].ports[0].name: is \"80\", wanted at most 15 lower-case letters, digits and '-', with a letter",
        ),
        (pod("spec: {containers: {name: a}}"), "E1 spec.containers: invalid type: map, expected a sequence"),
        (
            annotated("nodemesh.dev/dns-capture", "false"),
            "E1 metadata.annotations.nodemesh.dev/dns-capture: invalid type: boolean `false`, expected a string",
        ),
        (slice("addressType: ipv4"), "E1 addressType: is \"ipv4\", wanted \"IPv4\" or \"IPv6\""),
        (
            slice("addressType: IPv4\nendpoints: [{addresses: ['fd00::1']}]"),
            "E1 endpoints[0].addresses[0]: is \"fd00::1\", but addressType is \"IPv4\"",
        ),
        (
            policy("{mtls: {mode: strict}}"),
            "E1 spec.mtls.mode: is \"strict\", wanted UNSET, DISABLE, PERMISSIVE or STRICT",
        ),
        (policy("{mtls: STRICT}"), "E1 spec.mtls: invalid type: string \"STRICT\", expected struct Mtls"),
        (
            policy("{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}"),
            "E1 spec.portLevelMtls.http: is for port \"http\", wanted a number from 1 to 65535",
        ),
        ("[1, 2]".to_owned(), "E1 : is a list, wanted an object with apiVersion and kind"),
        ("hello".to_owned(), "E1 : is text, wanted an object with apiVersion and kind"),
    ];
    for (text, wanted) in table {
        let parsed = parse_text(&text);
        assert!(lines(&parsed).iter().any(|line| line == wanted), "{text}\n{:#?}", lines(&parsed));
        assert_eq!(parsed.resources.len(), 0, "{text}");
    }
}

#[test]
fn a_wrong_word_in_an_annotation_never_keeps_a_pod_from_being_read() {
    let table = [
        ("netns", "run/a", "is \"run/a\", wanted an absolute path; it has no effect"),
        ("tunnel", "tls", "is \"tls\", wanted \"hbone\" or \"none\"; it has no effect"),
        ("dns-capture", "'off'", "is \"off\", wanted \"true\" or \"false\"; it has no effect"),
        (
            "fail-closed",
            "inbound",
            "is \"inbound\", wanted \"outbound\" or \"none\"; it counts as \"outbound\"",
        ),
        (
            "exclude-inbound-ports",
            "'80, http'",
            "holds \"http\", which has no effect: wanted numbers from 1 to 65535 with commas between",
        ),
        (
            "exclude-outbound-ports",
            "'0,80'",
            "holds \"0\", which has no effect: wanted numbers from 1 to 65535 with commas between",
        ),
        (
            "exclude-outbound-cidrs",
            "'10.0.0.0/33,10.0.0.0/8'",
            "holds \"10.0.0.0/33\", which has no effect: wanted networks like 10.0.0.0/8 with commas between",
        ),
    ];
    for (key, value, wanted) in table {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, annotations: {{nodemesh.dev/{key}: {value}}}}}\nspec: {{}}\n"
        );
        let parsed = parse_text(&text);
        assert_eq!(lines(&parsed), [format!("W1 metadata.annotations.nodemesh.dev/{key}: {wanted}")]);
        let Resource::Pod(pod) = &*parsed.resources[0].1 else { panic!("a pod") };
        let (workload, settings) = (&pod.workload, &pod.workload.settings);
        assert_eq!(
            (workload.netns.as_deref(), pod.tunnel_off, settings.dns_capture_off),
            (None, false, false)
        );
        assert_eq!(settings.outbound_fail_closed, key == "fail-closed", "in doubt closed");
        // What can be read counts.
        let ports = |of: &str| if key == of { vec![80] } else { Vec::new() };
        assert_eq!(Vec::from_iter(settings.exclude_inbound_ports.clone()), ports("exclude-inbound-ports"));
        assert_eq!(Vec::from_iter(settings.exclude_outbound_ports.clone()), ports("exclude-outbound-ports"));
        assert_eq!(settings.exclude_outbound_cidrs.len(), usize::from(key == "exclude-outbound-cidrs"));
    }
}

#[test]
fn what_has_no_effect_is_a_warning_and_the_document_counts() {
    let policy = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {{name: a, namespace: istio-system}}\nspec: {spec}"
        )
    };
    let table = [
        (
            SERVICE.replace("ports:", "slector: {app: web}\n  ports:"),
            "W1 spec.slector: is not a field of this kind; it has no effect",
        ),
        (
            SERVICE.replace("targetPort: http", "targetport: 8080"),
            "W1 spec.ports[0].targetport: is not a field of this kind; it has no effect",
        ),
        (
            SERVICE.replace("targetPort: http", "protocol: SCTP"),
            "W1 spec.ports[0].protocol: is \"SCTP\", which the mesh does not carry; the port is left alone",
        ),
        (
            SERVICE.replace("kind: Service", "kind: Service\nspce: 1"),
            "W1 spce: is not a field of this kind; it has no effect",
        ),
        (
            "{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: {nodemesh.dev/mesh: enable}}}"
                .to_owned(),
            "W1 metadata.labels.nodemesh.dev/mesh: is \"enable\", wanted \"enabled\" or \"disabled\"; it has no effect",
        ),
        (
            policy("{portLevelMtls: {80: {mode: STRICT}}}"),
            "W1 spec.portLevelMtls: has no effect without spec.selector.matchLabels",
        ),
        (
            policy("{selector: {matchLabels: {a: b}}}"),
            "W1 spec.selector: in the root namespace istio-system: the policy has no effect",
        ),
        (
            policy("{mtls: {mdoe: STRICT}}"),
            "W1 spec.mtls.mdoe: is not a field of this kind; it has no effect",
        ),
    ];
    for (text, wanted) in table {
        let parsed = parse_text(&text);
        assert_eq!(lines(&parsed), [wanted], "{text}");
        assert_eq!(parsed.resources.len(), 1, "{text}");
    }
}

#[test]
fn another_groups_kind_of_the_same_name_is_ignored() {
    let parsed = service_with("apiVersion: v1", "apiVersion: serving.knative.dev/v1");
    assert_eq!((lines(&parsed).len(), parsed.resources.len()), (0, 0));
    assert_eq!(parsed.ignored, [("serving.knative.dev/v1/Service".to_owned(), 1)].into());
}

#[test]
fn a_broken_document_does_not_hide_the_others_and_its_line_is_the_files() {
    let text = format!(
        "# head\n---\n# nothing\n---{SERVICE}---\nkind: [\napiVersion: v1\n---\n{}",
        SERVICE.replace("web", "b")
    );
    let parsed = parse_text(&text);
    assert_eq!(keys(&parsed), ["1 Service default/web", "3 Service default/b"]);
    let [problem] = &parsed.problems[..] else { panic!("{:#?}", parsed.problems) };
    assert_eq!(problem.document, Some(2));
    let line: usize =
        problem.message.split("line ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    let at: Vec<&str> = text.lines().collect();
    assert!(at[line - 1] == "kind: [" || at[line - 1] == "apiVersion: v1", "{}", problem.message);
    assert!(!problem.message.contains('\n'), "{}", problem.message);
}

#[test]
fn a_name_in_the_document_is_in_the_error() {
    let parsed = service_with("port: 80,", "port: 0,");
    assert_eq!(
        parsed.problems[0].to_string(),
        "mesh/test.yaml, document 1, Service default/web, spec.ports[0].port: is 0 or missing, wanted a number from 1 to 65535"
    );
}

#[test]
fn lists_are_their_items() {
    let parsed = parse_text(
        "
apiVersion: v1
kind: ServiceList
items:
- metadata: {name: a}
  spec: {clusterIP: None, ports: [{port: 80}]}
- metadata: {name: b}
  spec: {clusterIP: None, ports: [{port: 80x}]}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: c}}
- {kind: Namespace, metadata: {name: d}}
",
    );
    assert_eq!(keys(&parsed), ["1 Service default/a", "2 Namespace c"]);
    assert_eq!(
        lines(&parsed),
        [
            "E1 items[1].spec.ports[0].port: invalid type: string \"80x\", expected i32",
            "E2 items[1].apiVersion: is missing",
        ]
    );
}

#[test]
fn json_files_are_read_as_json() {
    let json = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}}"#;
    let read = |text: &str| parse("a.json".as_ref(), text, &Rules::default(), &Known::new());
    assert_eq!(keys(&read(json)), ["1 Namespace a"]);
    assert!(lines(&read("{"))[0].starts_with("E1 : is no valid JSON: "));
    assert_eq!(keys(&parse_text(json)), ["1 Namespace a"]);
}

#[test]
fn text_blocks_anchors_and_line_ends_are_understood() {
    let anchors = SERVICE
        .replace("{name: web}", "{name: web, labels: &l {a: b}}")
        .replace("ports:", "selector: *l\n  ports:");
    let parsed = parse_text(&anchors.replace('\n', "\r\n"));
    assert_eq!(lines(&parsed), Vec::<String>::new());
    let block = "--- # first\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  annotations:\n    text: |\n      x\n      --- y\n...\n";
    assert_eq!(keys(&parse_text(block)), ["1 Namespace a"]);
    assert_eq!(
        keys(&parse_text("--- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n")),
        ["1 Namespace a"]
    );
    assert_eq!(parse_text("").resources.len() + parse_text("---\n---\n# x\n").problems.len(), 0);
}

#[test]
fn an_alias_bomb_is_refused_quickly() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let below = format!("*a{}, ", level - 1).repeat(10);
        text.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    let parsed = parse_text(&text);
    assert!(lines(&parsed)[0].starts_with("E1 : is no valid YAML"), "{:?}", lines(&parsed));
}

#[test]
fn a_pod_is_read_as_its_fields_say() {
    let parsed = parse_text(
        "
apiVersion: v1
kind: Pod
metadata:
  name: db-0
  labels: {app: db}
  annotations:
    nodemesh.dev/netns: /run/netns/db
    nodemesh.dev/fail-closed: outbound
    nodemesh.dev/dns-capture: 'false'
    nodemesh.dev/tunnel: none
    traffic.sidecar.istio.io/excludeInboundPorts: '22,23'
    nodemesh.dev/exclude-outbound-cidrs: 10.1.2.3/8, 192.0.2.7
spec:
  nodeName: n1
  serviceAccountName: db
  hostname: db-0
  subdomain: db
  initContainers:
  - {name: once, ports: [{containerPort: 1, name: once}]}
  - {name: side, restartPolicy: Always, ports: [{containerPort: 9090, name: metrics}]}
  containers:
  - name: db
    ports: [{containerPort: 5432, name: sql}, {containerPort: 53, name: dns, protocol: UDP}]
    livenessProbe: {tcpSocket: {port: sql}}
    readinessProbe: {httpGet: {port: 8080}}
    startupProbe: {exec: {command: [x]}}
  - name: other
    livenessProbe: {grpc: {port: 7000}}
    readinessProbe: {httpGet: {port: 8081, host: example.com}}
status:
  phase: Running
  podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]
  conditions: [{type: Ready, status: 'False'}]
",
    );
    assert_eq!(lines(&parsed), Vec::<String>::new());
    let Resource::Pod(pod) = &*parsed.resources[0].1 else { panic!("a pod") };
    let w = &pod.workload;
    assert_eq!((&*w.node, &*w.service_account, w.netns.as_deref()), ("n1", "db", Some("/run/netns/db")));
    assert_eq!(w.addrs, ["10.0.0.1".parse::<std::net::IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    assert!(!w.ready && !w.terminated && !pod.host_network);
    assert_eq!(w.probe_ports, [5432, 7000, 8080].into());
    assert_eq!(w.named_ports, [("dns".into(), 53), ("metrics".into(), 9090), ("sql".into(), 5432)].into());
    assert!(w.settings.outbound_fail_closed && w.settings.dns_capture_off && pod.tunnel_off);
    assert_eq!(w.settings.exclude_inbound_ports, [22, 23].into());
    let cidrs: Vec<String> = w.settings.exclude_outbound_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(cidrs, ["10.0.0.0/8", "192.0.2.7/32"]);
    assert_eq!(pod.hostname, Some(("db-0".into(), "db".into())));
}

#[test]
fn readiness_and_termination_follow_the_status() {
    let table = [
        ("", true, false),
        ("status: {podIP: 10.0.0.1}", true, false),
        ("status: {phase: Running}", true, false),
        ("status: {phase: Pending}", false, false),
        ("status: {phase: Running, conditions: [{type: Ready, status: 'True'}]}", true, false),
        ("status: {phase: Running, conditions: [{type: PodScheduled, status: 'True'}]}", false, false),
        ("status: {phase: Succeeded}", false, true),
        ("status: {phase: Failed}", false, true),
    ];
    for (status, ready, terminated) in table {
        let parsed =
            parse_text(&format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {{}}\n{status}\n"));
        let Resource::Pod(pod) = &*parsed.resources[0].1 else { panic!("a pod") };
        assert_eq!((pod.workload.ready, pod.workload.terminated), (ready, terminated), "{status}");
    }
}

#[test]
fn a_pod_that_is_being_deleted_runs_on_and_gets_no_new_work() {
    let deleted = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, deletionTimestamp: '2026-01-01T00:00:00Z'}\nspec: {}\n";
    for (phase, terminated) in [("Running", false), ("Succeeded", true)] {
        let status = format!("status: {{phase: {phase}, conditions: [{{type: Ready, status: 'True'}}]}}\n");
        let parsed = parse_text(&format!("{deleted}{status}"));
        let Resource::Pod(pod) = &*parsed.resources[0].1 else { panic!("a pod") };
        assert_eq!((pod.workload.ready, pod.workload.terminated), (false, terminated), "{phase}");
    }
}

#[test]
fn an_unchanged_document_is_known_again_wherever_it_moves() {
    let warned = SERVICE.replace("web", "warned").replace("ports:", "slector: {a: b}\n  ports:");
    let first = parse_text(&format!("{SERVICE}---{warned}---{}", SERVICE.replace("web", "b")));
    let text = format!("{}---{warned}---{SERVICE}", SERVICE.replace("web", "new"));
    let second = parse("mesh/test.yaml".as_ref(), &text, &Rules::default(), &first.known);
    assert_eq!(keys(&second), ["1 Service default/new", "2 Service default/warned", "3 Service default/web"]);
    assert_eq!(lines(&second), lines(&first), "a warning is given again");
    assert!(Arc::ptr_eq(&first.resources[0].1, &second.resources[2].1));
    assert_eq!(second.known.len(), 2, "what is gone is forgotten");
    assert!(second.lines.is_empty(), "only rules are named by lines");
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in "\\PC*|([a-z: {}\\[\\]\n-]|---\n|kind: Service\n|apiVersion: v1\n|spec:\n|  ports:\n){0,40}") {
        let _parsed = parse_text(&text);
    }

    #[test]
    fn a_field_of_any_wrong_type_is_an_error_and_never_a_panic(
        field in prop::sample::select(vec!["metadata", "spec", "status", "kind", "apiVersion"]),
        kind in prop::sample::select(vec!["Pod", "Service", "Namespace", "ServiceAccount"]),
        value in prop::sample::select(vec!["1", "x", "[1]", "{a: b}", "null", "true", "1.5", "[[]]"]),
    ) {
        let mut fields = vec![("apiVersion", "v1"), ("kind", kind), ("metadata", "{name: a}"), ("spec", "{ports: [{port: 1}]}")];
        fields.retain(|(name, _)| *name != field);
        let text: String = fields.iter().chain([&(field, value)]).map(|(k, v)| format!("{k}: {v}\n")).collect();
        let parsed = parse_text(&text);
        let found = parsed.resources.len() + parsed.problems.len() + parsed.ignored.len();
        prop_assert!(found > 0, "{}", text);
    }
}
