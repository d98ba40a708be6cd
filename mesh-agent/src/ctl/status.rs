//! Owns the text of `meshctl status`.

use std::fmt::Write as _;

use super::{
    figures,
    table::{Align, Table},
};
use crate::view::{Phase, PodState, StatusView};

/// The whole answer as text.
pub(super) fn render(view: &StatusView) -> String {
    let mut out = String::new();
    summary(&mut out, view);
    pods(&mut out, view);
    programs(&mut out, view);
    maps(&mut out, view);
    sources(&mut out, view);
    out
}

fn line(out: &mut String, key: &str, value: &str) {
    // Writing to a String cannot fail.
    let _ignored = writeln!(out, "{key:<8}  {value}");
}

/// What the agent is doing, in words.
pub(super) fn phase(view: &StatusView) -> String {
    match view.agent.phase {
        Phase::Starting => format!("starting, waits for: {}", view.agent.waiting_for.join("; ")),
        Phase::Ready => "ready".to_owned(),
        Phase::Draining => "draining".to_owned(),
    }
}

fn summary(out: &mut String, view: &StatusView) {
    let agent = &view.agent;
    let phase = phase(view);
    let (version, node, pid, up) = (&agent.version, &agent.node, agent.pid, figures::age(agent.uptime_s));
    line(out, "agent", &format!("{version}, node {node}, pid {pid}, up {up}, {phase}"));
    let beat = agent
        .heartbeat_age_ns
        .map_or_else(|| "none yet".to_owned(), |ns| format!("{} ago", figures::nanos(ns as f64)));
    line(out, "workers", &format!("{}, last heartbeat {beat}", agent.workers));
    let kernel = &view.kernel;
    line(out, "kernel", &format!("{}, ABI {}, pins {}", kernel.release, kernel.abi, kernel.pins));
    line(out, "cgroup", &kernel.cgroup_root);
    let snapshot = &view.snapshot;
    let problems = match view.source_errors.len() {
        0 => String::new(),
        n => format!(", {}", figures::counted(n, "problem")),
    };
    line(
        out,
        "config",
        &format!(
            "{}, snapshot {}: {}, {}{problems}",
            snapshot.source,
            snapshot.version,
            figures::counted(snapshot.workloads, "workload"),
            figures::counted(snapshot.services, "service"),
        ),
    );
    names(out, view);
    for (at, tls) in view.unusable_tls.iter().enumerate() {
        let what = match tls.before_in_use {
            true => "what was read before is in use",
            false => "connections are refused",
        };
        line(out, if at == 0 { "tls" } else { "" }, &format!("{}: {}; {what}", tls.origin, tls.reason));
    }
    identity(out, view);
    let counts: Vec<String> = PodState::ALL
        .iter()
        .map(|state| (state, view.pods.iter().filter(|pod| pod.state == *state).count()))
        .filter(|(state, n)| *n > 0 || **state == PodState::Enrolled)
        .map(|(state, n)| format!("{n} {}", state.as_str()))
        .collect();
    line(out, "pods", &counts.join(", "));
}

/// Names of endpoints, where there are any.
fn names(out: &mut String, view: &StatusView) {
    let names = &view.names;
    if names.needed == 0 {
        return;
    }
    let left_out = match names.left_out {
        0 => String::new(),
        n => format!(", {n} left out: too many"),
    };
    line(out, "names", &format!("{} of {} resolved{left_out}", names.resolved, names.needed));
    for name in &names.failing {
        let known = match name.addresses.len() {
            0 => "nothing is known of it".to_owned(),
            1 => "1 address of before stays".to_owned(),
            n => format!("{n} addresses of before stay"),
        };
        let times = figures::counted(usize::try_from(name.attempts).unwrap_or(usize::MAX), "time");
        line(out, "", &format!("{}: {}, {times}; {known}", name.name, name.reason));
    }
}

fn identity(out: &mut String, view: &StatusView) {
    let identity = &view.identity;
    let reason = identity.reason.as_ref().map(|reason| format!("; {reason}")).unwrap_or_default();
    let (domain, valid, wanted) = (&identity.trust_domain, identity.valid, identity.wanted);
    let value = format!("{domain}, {valid} of {wanted} certificates valid, by {}{reason}", identity.issuer);
    line(out, "identity", &value);
    let Some(controller) = &view.controller else { return };
    let ago = |s: Option<f64>| s.map_or_else(|| "never".to_owned(), |s| format!("{} ago", figures::age(s)));
    let state = match (controller.connected, controller.generation) {
        (true, _) => "connected".to_owned(),
        (false, generation) => {
            let in_force = if generation.is_some() { "its last state" } else { "the state saved on disk" };
            format!("away, last heard {}; {in_force} is in force", ago(controller.last_contact_s))
        }
    };
    let reason = controller.reason.as_ref().map(|reason| format!("; {reason}")).unwrap_or_default();
    line(out, "control", &format!("{}, {state}{reason}", controller.url));
}

fn pods(out: &mut String, view: &StatusView) {
    let mut table = Table::new(&[
        ("POD", Align::Left),
        ("ADDRESSES", Align::Left),
        ("STATE", Align::Left),
        ("ID", Align::Right),
        ("REASON", Align::Left),
    ]);
    for pod in &view.pods {
        let addrs: Vec<String> = pod.addrs.iter().map(ToString::to_string).collect();
        let retry = pod.retry_in_s.map(|s| format!(" (try {} in {})", pod.attempts + 1, figures::age(s)));
        table.row([
            format!("{}/{}", pod.namespace, pod.name),
            addrs.join(","),
            pod.state.as_str().to_owned(),
            pod.pod_id.map(|id| id.to_string()).unwrap_or_default(),
            format!("{}{}", pod.reason.as_deref().unwrap_or_default(), retry.unwrap_or_default()),
        ]);
    }
    section(out, &table);
}

fn programs(out: &mut String, view: &StatusView) {
    let mut table = Table::new(&[("PROGRAM", Align::Left), ("ID", Align::Right), ("STATE", Align::Left)]);
    for program in &view.kernel.programs {
        let state = match (program.attached, program.adopted) {
            (false, _) => "not attached",
            (true, false) => "attached",
            (true, true) => "attached, link taken over",
        };
        table.row([program.name.clone(), program.id.to_string(), state.to_owned()]);
    }
    section(out, &table);

    let mut table = Table::new(&[
        ("FOREIGN PROGRAM", Align::Left),
        ("ID", Align::Right),
        ("HOOK", Align::Left),
        ("CGROUP", Align::Left),
    ]);
    for program in &view.kernel.foreign_programs {
        let exclusive = if program.exclusive { " (exclusive)" } else { "" };
        let hook = format!("{}{exclusive}", program.hook);
        table.row([program.name.clone(), program.id.to_string(), hook, program.cgroup.clone()]);
    }
    section(out, &table);
}

fn maps(out: &mut String, view: &StatusView) {
    let mut table = Table::new(&[
        ("MAP", Align::Left),
        ("ENTRIES", Align::Right),
        ("LIMIT", Align::Right),
        ("FILL", Align::Right),
        ("REFUSED", Align::Right),
    ]);
    for map in &view.maps {
        let fill = 100.0 * map.entries as f64 / map.max_entries.max(1) as f64;
        table.row([
            map.name.clone(),
            map.entries.to_string(),
            map.max_entries.to_string(),
            if map.evicts { format!("{fill:.1}% (evicts)") } else { format!("{fill:.1}%") },
            map.refused.to_string(),
        ]);
    }
    section(out, &table);
}

fn sources(out: &mut String, view: &StatusView) {
    let mut table = Table::new(&[
        ("CONFIG FILE", Align::Left),
        ("LEVEL", Align::Left),
        ("OBJECT", Align::Left),
        ("FIELD", Align::Left),
        ("MESSAGE", Align::Left),
    ]);
    for error in &view.source_errors {
        let place = match error.document {
            Some(document) => format!("{}#{document}", error.file),
            None => error.file.clone(),
        };
        let name = match (&error.namespace, &error.name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            (_, name) => name.clone().unwrap_or_default(),
        };
        let object = format!("{} {name}", error.kind.as_deref().unwrap_or_default());
        let object = object.trim().to_owned();
        table.row([place, error.level.clone(), object, error.field.clone(), error.message.clone()]);
    }
    section(out, &table);
}

fn section(out: &mut String, table: &Table) {
    if !table.is_empty() {
        out.push('\n');
        out.push_str(&table.render());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{
        AgentView, ControllerView, FailingNameView, IdentityView, KernelView, MapView, NamesView, PodView,
        SnapshotView, SourceErrorView, UnusableTlsView,
    };

    fn pod(name: &str, state: PodState, reason: Option<&str>) -> PodView {
        PodView {
            namespace: "shop".into(),
            name: name.into(),
            workload_id: "w0000000000000001".into(),
            addrs: vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            netns: None,
            state,
            pod_id: (state == PodState::Enrolled).then_some(3),
            netns_cookie: None,
            reason: reason.map(Into::into),
            attempts: 2,
            retry_in_s: reason.map(|_| 4.0),
        }
    }

    fn view() -> StatusView {
        StatusView {
            agent: AgentView {
                version: "0.1.0".into(),
                node: "n1".into(),
                pid: 7,
                uptime_s: 65.0,
                phase: Phase::Ready,
                waiting_for: Vec::new(),
                workers: 2,
                heartbeat_age_ns: Some(40_000_000),
            },
            kernel: KernelView {
                release: "6.18.0".into(),
                abi: "00000000000000ff".into(),
                pins: "/sys/fs/bpf/nodemesh/n1/v00000000000000ff".into(),
                cgroup_root: "/sys/fs/cgroup".into(),
                programs: Vec::new(),
                foreign_programs: Vec::new(),
            },
            snapshot: SnapshotView { version: 4, workloads: 9, services: 2, source: "/etc/mesh".into() },
            names: NamesView {
                needed: 3,
                resolved: 2,
                left_out: 0,
                failing: vec![FailingNameView {
                    name: "api.example.com".into(),
                    reason: "timed_out".into(),
                    attempts: 4,
                    addresses: vec![[192, 0, 2, 1].into(), [192, 0, 2, 2].into()],
                }],
            },
            unusable_tls: vec![UnusableTlsView {
                origin: "DestinationRule shop/bank spec.trafficPolicy (bank.yaml, document 1)".into(),
                reason: "cannot read /etc/nodemesh/tls/ca.pem: No such file or directory (os error 2)".into(),
                before_in_use: false,
            }],
            identity: IdentityView {
                trust_domain: "cluster.local".into(),
                trust_domain_aliases: Vec::new(),
                issuer: "https://10.0.0.1:15012".into(),
                wanted: 2,
                valid: 1,
                reason: Some("spiffe://cluster.local/ns/shop/sa/odd: the CA refused: not_hosted".into()),
            },
            controller: Some(ControllerView {
                url: "https://10.0.0.1:15012".into(),
                connected: false,
                since_s: Some(61.0),
                last_contact_s: Some(65.0),
                reason: Some("connection refused".into()),
                attempts: 7,
                generation: None,
                refused_resources: 0,
                certificate_expires_in_s: Some(3600.0),
            }),
            pods: vec![
                pod("cart", PodState::Enrolled, None),
                pod("odd", PodState::Failed, Some("port 15001 is taken")),
            ],
            source_errors: vec![SourceErrorView {
                file: "web.yaml".into(),
                document: Some(2),
                kind: Some("Service".into()),
                namespace: Some("shop".into()),
                name: Some("web".into()),
                level: "error".into(),
                field: "spec.ports[0].port".into(),
                message: "found \"http\", want a number".into(),
            }],
            maps: vec![MapView {
                name: "PODS".into(),
                entries: 2,
                max_entries: 4096,
                refused: 0,
                evicts: false,
            }],
        }
    }

    #[test]
    fn a_failed_pod_says_why_and_when_it_is_tried_again() {
        let text = render(&view());
        assert!(text.contains("pods      1 enrolled, 1 failed\n"), "{text}");
        let odd = text.lines().find(|l| l.starts_with("shop/odd")).unwrap();
        assert!(odd.ends_with("failed     -  port 15001 is taken (try 3 in 4.0s)"), "{odd}");
    }

    #[test]
    fn a_config_error_names_file_document_object_and_field() {
        let text = render(&view());
        let error = text.lines().find(|l| l.starts_with("web.yaml#2")).unwrap();
        for part in ["Service shop/web", "spec.ports[0].port", "want a number"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(text.contains("2 services, 1 problem\n"), "{text}");
    }

    #[test]
    fn a_controller_that_is_away_and_a_missing_certificate_say_why() {
        let text = render(&view());
        let of = |key: &str| text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        assert!(of("identity").contains("1 of 2 certificates valid"), "{text}");
        assert!(of("identity").ends_with("the CA refused: not_hosted"), "{text}");
        assert!(of("control").contains("the state saved on disk is in force; connection refused"), "{text}");
    }

    #[test]
    fn names_that_cannot_be_resolved_say_why_and_what_stays() {
        let text = render(&view());
        assert!(text.contains("names     2 of 3 resolved\n"), "{text}");
        assert!(text.contains("api.example.com: timed_out, 4 times; 2 addresses of before stay\n"), "{text}");
        let nothing = StatusView { names: NamesView::default(), ..view() };
        assert!(!render(&nothing).contains("names "), "nothing is said where there is none");
    }

    #[test]
    fn files_for_tls_that_cannot_be_used_are_named_with_rule_and_reason() {
        let text = render(&view());
        let wanted = "tls       DestinationRule shop/bank spec.trafficPolicy (bank.yaml, document 1): cannot read \
                      /etc/nodemesh/tls/ca.pem: No such file or directory (os error 2); connections are refused\n";
        assert!(text.contains(wanted), "{text}");
        let mut view = view();
        view.unusable_tls[0].before_in_use = true;
        assert!(render(&view).contains("; what was read before is in use\n"));
        // As agents of before say it.
        let mut old = serde_json::to_value(&view).unwrap();
        old.as_object_mut().unwrap().remove("unusable_tls");
        assert_eq!(serde_json::from_value::<StatusView>(old).unwrap().unusable_tls, []);
    }

    #[test]
    fn an_agent_that_is_not_ready_says_what_it_waits_for() {
        let mut view = view();
        view.agent.phase = Phase::Starting;
        view.agent.waiting_for = vec!["1 pod to be enrolled".into()];
        assert!(render(&view).contains("starting, waits for: 1 pod to be enrolled"));
    }

    #[test]
    fn the_json_form_survives_a_round_trip() {
        let json = serde_json::to_string(&view()).unwrap();
        assert_eq!(serde_json::from_str::<StatusView>(&json).unwrap(), view());
    }
}
