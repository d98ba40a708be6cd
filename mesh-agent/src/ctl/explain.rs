//! Owns the text of `meshctl explain`.

mod request;

use std::fmt::Write as _;

use crate::view::{
    AddressView, BackendView, ExplainView, HookView, PolicyView, ResolutionKind, TransportView, VerdictView,
};

/// The whole answer as text, from the name to the server's side.
pub(super) fn render(view: &ExplainView) -> String {
    let mut out = format!("{} → {}\n", view.from, view.to);
    resolution(&mut out, view);
    if !view.enrolled {
        put(&mut out, 0, &format!("{} is not enrolled: the kernel leaves its sockets alone", view.from));
    }
    if let Some(why) = &view.without_certificate {
        put(
            &mut out,
            0,
            &format!("{} has no certificate ({why}): what goes by mutual TLS is refused", view.from),
        );
    }
    for address in &view.addresses {
        out.push('\n');
        explain_address(&mut out, address);
    }
    if let Some(request) = &view.request {
        out.push('\n');
        request::explain_request(&mut out, request);
    }
    out
}

fn put(out: &mut String, depth: usize, text: &str) {
    // Writing to a String cannot fail.
    let _ignored = writeln!(out, "{}{text}", "  ".repeat(depth));
}

fn resolution(out: &mut String, view: &ExplainView) {
    let resolution = &view.resolution;
    let addrs = || resolution.addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let name = resolution.name.as_deref().unwrap_or("the name");
    let text = match resolution.kind {
        ResolutionKind::Literal => String::new(),
        ResolutionKind::Mesh => format!("dns: the mesh answers for {name}: {}", addrs()),
        ResolutionKind::NoData => format!("dns: the mesh knows {name}, and that it has no address"),
        ResolutionKind::NxDomain => format!("dns: the mesh says that there is no {name}"),
        ResolutionKind::Forward => {
            format!("dns: the mesh does not know {name}; the pod's own resolver is asked")
        }
    };
    if !text.is_empty() {
        put(out, 0, &text);
    }
    if let Some(note) = &resolution.note {
        put(out, 0, &format!("note: {note}"));
    }
}

fn explain_address(out: &mut String, address: &AddressView) {
    let service = address.service.as_ref().map(|name| format!(" (service {name})")).unwrap_or_default();
    put(out, 0, &format!("dial {}{service}", address.dialled));
    for decision in &address.decisions {
        explain_decision(out, decision);
    }
    if let Some(text) = &address.undescribed {
        put(out, 1, text);
    }
    if address.slots_left_off > 0 {
        put(out, 1, &format!("… and {} more backends", address.slots_left_off));
    }
}

fn explain_decision(out: &mut String, decision: &HookView) {
    if let Some(backend) = &decision.backend {
        put(out, 1, &format!("backend {}", describe(backend)));
    }
    let port = decision.outbound_port.map(|port| format!(" via in-pod port {port}")).unwrap_or_default();
    let ticket = if decision.ticket { ", with a ticket" } else { "" };
    put(
        out,
        2,
        &format!(
            "{}: {} ({}){port}{ticket}",
            decision.hook,
            decision.outcome.to_uppercase(),
            decision.reason
        ),
    );
    put(out, 3, &decision.text);
    if let Some(verdict) = &decision.verdict {
        put(out, 2, &describe_verdict(verdict));
    }
    if let Some(policy) = &decision.policy {
        explain_policy(out, policy);
    }
    if let Some(server) = &decision.server {
        let excluded = if server.excluded { ", port excluded from capture" } else { "" };
        let closed = if server.fail_closed { ", fails closed" } else { "" };
        put(out, 2, &format!("server: mode {}{closed}{excluded}", server.mode));
        put(
            out,
            3,
            &format!("arrival: {} ({})", server.arrival.outcome.to_uppercase(), server.arrival.reason),
        );
        put(out, 4, &server.arrival.text);
        let down = &server.agent_down;
        put(out, 3, &format!("agent down: {} ({})", down.outcome.to_uppercase(), down.reason));
        put(out, 4, &down.text);
    }
}

fn explain_policy(out: &mut String, policy: &PolicyView) {
    let transport = match policy.transport {
        TransportView::Direct => "direct, between the two sockets",
        TransportView::Kernel => "through the agent, on this node",
        TransportView::MutualTls => "mutual TLS (HBONE)",
        TransportView::Plaintext => "plaintext",
    };
    put(out, 2, &format!("transport: {transport}"));
    let by = match policy.transport {
        TransportView::MutualTls => "by its certificate",
        TransportView::Direct | TransportView::Kernel | TransportView::Plaintext => "by the kernel",
    };
    let source =
        policy.source_identity.as_ref().map_or_else(|| "not known".to_owned(), |id| format!("{id}, {by}"));
    put(out, 3, &format!("client: {source}"));
    put(out, 3, &format!("server: {}", policy.destination_identity));
    let from = policy.mode_from.as_ref().map_or_else(
        || "the default: no PeerAuthentication says anything".to_owned(),
        |name| format!("from PeerAuthentication {name}"),
    );
    put(out, 3, &format!("mode: {}, {from}", policy.mode));
    put(out, 2, &format!("policy: {} ({})", policy.verdict.to_uppercase(), policy.reason));
    put(out, 3, &policy.text);
    if !policy.applying.is_empty() {
        put(out, 3, &format!("applying: {}", policy.applying.join(", ")));
    }
    for said in &policy.dry_run {
        let rule =
            said.rule.map_or_else(|| "no rule matches".to_owned(), |rule| format!("rule {rule} matches"));
        let would = if said.would_deny { "would refuse it" } else { "would not refuse it" };
        put(out, 3, &format!("dry run: {} {} {would}: {rule}", said.action, said.policy));
    }
}

fn describe(backend: &BackendView) -> String {
    let mut out = backend.addr.to_string();
    let mut facts: Vec<String> = backend.workload.iter().cloned().collect();
    facts.extend(backend.slot.map(|slot| format!("slot {slot}")));
    facts.push(
        match (backend.meshed, backend.local) {
            (false, _) => "not meshed",
            (true, true) => "on this node",
            (true, false) => "on another node",
        }
        .to_owned(),
    );
    if !backend.local {
        facts.extend(backend.node.clone());
    }
    if backend.plain {
        facts.push("plaintext by policy".to_owned());
    }
    let _ignored = write!(out, " ({})", facts.join(", "));
    out
}

fn describe_verdict(verdict: &VerdictView) -> String {
    let current = verdict.current_gen.map_or_else(|| "none".to_owned(), |generation| generation.to_string());
    if verdict.valid {
        format!("cached verdict: {} (policy generation {current})", verdict.action)
    } else {
        format!(
            "cached verdict: {}, void (made for policy generation {}, now {current})",
            verdict.action, verdict.policy_gen
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{ArrivalView, DecidedByView, DryRunView, ResolutionView, ServerView};

    fn view() -> ExplainView {
        ExplainView {
            from: "shop/cart".into(),
            enrolled: true,
            without_certificate: None,
            to: "web:80".into(),
            resolution: ResolutionView {
                kind: ResolutionKind::Mesh,
                name: Some("web.shop.svc.cluster.local".into()),
                addrs: vec!["10.96.0.1".parse().unwrap()],
                note: None,
            },
            addresses: vec![AddressView {
                dialled: "10.96.0.1:80".parse().unwrap(),
                service: Some("shop/web".into()),
                decisions: vec![HookView {
                    hook: "connect4".into(),
                    outcome: "direct".into(),
                    reason: "verdict_allow".into(),
                    text: "a cached verdict allows it".into(),
                    ticket: true,
                    outbound_port: None,
                    backend: Some(BackendView {
                        addr: "10.1.0.3:8080".parse().unwrap(),
                        workload: Some("shop/web-0".into()),
                        node: Some("n1".into()),
                        slot: Some(0),
                        meshed: true,
                        local: true,
                        plain: false,
                    }),
                    verdict: Some(VerdictView {
                        action: "allow".into(),
                        policy_gen: 3,
                        current_gen: Some(3),
                        valid: true,
                    }),
                    policy: Some(PolicyView {
                        transport: TransportView::Direct,
                        source_identity: Some("spiffe://cluster.local/ns/shop/sa/cart".into()),
                        destination_identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
                        mode: "STRICT".into(),
                        mode_from: Some("istio-system/mesh".into()),
                        verdict: "allow".into(),
                        reason: "policy_allows".into(),
                        text: "AuthorizationPolicy shop/web, rule 0 allows it".into(),
                        decided_by: Some(DecidedByView { policy: "shop/web".into(), rule: Some(0) }),
                        applying: vec!["shop/soon".into(), "shop/web".into()],
                        dry_run: vec![DryRunView {
                            policy: "shop/soon".into(),
                            action: "DENY".into(),
                            rule: Some(1),
                            would_deny: true,
                        }],
                    }),
                    server: Some(ServerView {
                        mode: "STRICT".into(),
                        fail_closed: true,
                        excluded: false,
                        arrival: ArrivalView {
                            outcome: "pass".into(),
                            reason: "ticket".into(),
                            text: "the ticket lets it through to the app".into(),
                        },
                        agent_down: ArrivalView {
                            outcome: "pass".into(),
                            reason: "ticket".into(),
                            text: "the same".into(),
                        },
                    }),
                }],
                slots_left_off: 0,
                undescribed: None,
            }],
            request: None,
        }
    }

    #[test]
    fn the_story_runs_from_the_name_to_the_server() {
        assert_eq!(
            render(&view()),
            "shop/cart → web:80\n\
             dns: the mesh answers for web.shop.svc.cluster.local: 10.96.0.1\n\
             \n\
             dial 10.96.0.1:80 (service shop/web)\n\
             \x20 backend 10.1.0.3:8080 (shop/web-0, slot 0, on this node)\n\
             \x20   connect4: DIRECT (verdict_allow), with a ticket\n\
             \x20     a cached verdict allows it\n\
             \x20   cached verdict: allow (policy generation 3)\n\
             \x20   transport: direct, between the two sockets\n\
             \x20     client: spiffe://cluster.local/ns/shop/sa/cart, by the kernel\n\
             \x20     server: spiffe://cluster.local/ns/shop/sa/web\n\
             \x20     mode: STRICT, from PeerAuthentication istio-system/mesh\n\
             \x20   policy: ALLOW (policy_allows)\n\
             \x20     AuthorizationPolicy shop/web, rule 0 allows it\n\
             \x20     applying: shop/soon, shop/web\n\
             \x20     dry run: DENY shop/soon would refuse it: rule 1 matches\n\
             \x20   server: mode STRICT, fails closed\n\
             \x20     arrival: PASS (ticket)\n\
             \x20       the ticket lets it through to the app\n\
             \x20     agent down: PASS (ticket)\n\
             \x20       the same\n"
        );
    }

    #[test]
    fn a_void_verdict_shows_both_generations() {
        let mut view = view();
        view.addresses[0].decisions[0].verdict =
            Some(VerdictView { action: "deny".into(), policy_gen: 3, current_gen: Some(4), valid: false });
        let text = render(&view);
        assert!(text.contains("cached verdict: deny, void (made for policy generation 3, now 4)"), "{text}");
    }

    #[test]
    fn a_client_without_a_certificate_is_said_to_be_refused() {
        let mut view = view();
        view.without_certificate = Some("the certificate is being fetched".into());
        let text = render(&view);
        let said = "shop/cart has no certificate (the certificate is being fetched): what goes by mutual TLS is refused";
        assert!(text.lines().any(|line| line == said), "{text}");
    }

    #[test]
    fn a_pod_outside_the_mesh_is_said_to_be_left_alone() {
        let mut view = view();
        view.enrolled = false;
        view.addresses.clear();
        assert!(render(&view).contains("shop/cart is not enrolled"));
    }
}
