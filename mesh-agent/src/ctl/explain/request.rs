//! The text of what becomes of a request.

use super::{
    super::proxy_config::{retries, time},
    put,
};
use crate::view::{OriginView, RequestBackendView, RequestView, RouteRuleView};

/// From the rule that a request gets to the endpoints it may go to.
pub(super) fn explain_request(out: &mut String, view: &RequestView) {
    let host = view.host.as_ref().map(|host| format!(" at {host}")).unwrap_or_default();
    put(out, 0, &format!("request {}{host}", view.asked));
    if let Some(path) = view.matched_path.as_ref().filter(|path| !view.asked.ends_with(&format!(" {path}"))) {
        put(out, 1, &format!("matched as {path}"));
    }
    if let Some(rule) = &view.rule {
        explain_rule(out, rule, view);
    }
    let status = view.status.map(|status| format!("{status}: ")).unwrap_or_default();
    put(out, 1, &format!("→ {status}{}", view.text));
    if !view.flags.is_empty() {
        put(out, 2, &format!("response flags: {}", view.flags.join(",")));
    }
    for backend in &view.backends {
        explain_backend(out, backend);
    }
    for note in &view.notes {
        put(out, 1, &format!("note: {note}"));
    }
}

fn from(origin: &OriginView) -> String {
    let place = origin.place.as_ref().map(|place| format!(" ({place})")).unwrap_or_default();
    format!("{} {} {}{place}", origin.kind, origin.name, origin.field)
}

fn explain_rule(out: &mut String, rule: &RouteRuleView, view: &RequestView) {
    let name = rule.name.as_ref().map(|name| format!(" {name:?}")).unwrap_or_default();
    put(out, 1, &format!("rule{name}: {}", from(&rule.origin)));
    put(out, 2, &format!("match: {}", view.matched.as_deref().unwrap_or("any request")));
    let limit = view.timeout_ms.map_or_else(|| "none".to_owned(), time);
    let on = rule.retries.as_ref().map(|retries| format!(" on {}", retries.on.join(","))).unwrap_or_default();
    put(out, 2, &format!("time-out: {limit}, retries: {}{on}", retries(rule)));
    for fault in &rule.fault {
        put(out, 2, &format!("fault: {fault}"));
    }
    for change in &rule.changes {
        put(out, 2, change);
    }
}

fn explain_backend(out: &mut String, backend: &RequestBackendView) {
    let fails =
        backend.status.map(|status| format!(": {status} {}", backend.flags.join(","))).unwrap_or_default();
    put(out, 2, &format!("{}% {}{fails}", backend.percent, backend.cluster));
    if let (Some(authority), Some(path)) = (&backend.authority, &backend.path) {
        put(out, 3, &format!("leaves as {authority} {path}"));
    }
    for (name, value) in &backend.headers {
        put(out, 4, &format!("{name}: {value}"));
    }
    if !backend.balancing.is_empty() {
        let by =
            backend.destination_rule.as_ref().map(|origin| format!(", {}", from(origin))).unwrap_or_default();
        put(out, 3, &format!("endpoints by {}{by}", backend.balancing));
    }
    for row in &backend.endpoints {
        let mark = if row.eligible { "+" } else { "-" };
        let pod = row.endpoint.workload.as_ref().map(|pod| format!(" {pod}")).unwrap_or_default();
        let node = row.endpoint.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
        put(out, 4, &format!("{mark} {}{pod}{node}: {}", row.endpoint.addr, row.reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{EndpointView, RequestEndpointView, RequestOutcome, RetriesView};

    fn endpoint(addr: &str, eligible: bool, reason: &str) -> RequestEndpointView {
        let endpoint = EndpointView {
            addr: addr.parse().unwrap(),
            workload: Some("shop/reviews-v2".into()),
            node: Some("b".into()),
            locality: None,
            weight: 1,
            priority: Some(0),
            status: "HEALTHY".into(),
            outlier_check: "OK".into(),
            ejected_for_ms: None,
            failures: 0,
            active_requests: 0,
            cluster: String::new(),
        };
        RequestEndpointView { endpoint, eligible, reason: reason.into() }
    }

    #[test]
    fn the_story_runs_from_the_rule_to_the_endpoints() {
        let origin = |kind: &str, field: &str, place: &str| OriginView {
            kind: kind.into(),
            name: "shop/reviews".into(),
            field: field.into(),
            place: Some(place.into()),
        };
        let cluster = "outbound|9080|v2|reviews.shop.svc.cluster.local";
        let rule = RouteRuleView {
            name: None,
            origin: origin("VirtualService", "spec.http[0]", "reviews.yaml:9"),
            matches: vec!["header end-user=jason".into()],
            action: cluster.into(),
            backends: Vec::new(),
            timeout_ms: Some(500),
            retries: Some(RetriesView { attempts: 2, on: vec!["5xx".into()], per_try_timeout_ms: None }),
            fault: Vec::new(),
            mirrors: Vec::new(),
            changes: vec!["rewrite path prefix→/".into()],
            cors: false,
        };
        let view = RequestView {
            asked: "GET /a/../x".into(),
            host: Some("reviews.shop.svc.cluster.local:9080".into()),
            matched_path: Some("/x".into()),
            outcome: RequestOutcome::Forward,
            text: format!("sent to {cluster}"),
            status: None,
            flags: Vec::new(),
            matched: Some("header end-user=jason".into()),
            rule: Some(rule),
            location: None,
            timeout_ms: Some(500),
            backends: vec![RequestBackendView {
                percent: 100.0,
                cluster: cluster.into(),
                status: None,
                flags: Vec::new(),
                path: Some("/".into()),
                authority: Some("reviews:9080".into()),
                headers: vec![("end-user".into(), "jason".into())],
                balancing: "LEAST_REQUEST".into(),
                destination_rule: Some(origin("DestinationRule", "spec.subsets[1]", "rules.yaml:20")),
                endpoints: vec![
                    endpoint("10.1.0.3:9080", true, "ready"),
                    endpoint("10.1.0.4:9080", false, "its labels are not those of the subset"),
                ],
            }],
            notes: vec!["copies go nowhere: no_service".into()],
        };
        let mut out = String::new();
        explain_request(&mut out, &view);
        assert_eq!(
            out,
            "request GET /a/../x at reviews.shop.svc.cluster.local:9080\n\
             \x20 matched as /x\n\
             \x20 rule: VirtualService shop/reviews spec.http[0] (reviews.yaml:9)\n\
             \x20   match: header end-user=jason\n\
             \x20   time-out: 500ms, retries: 2 on 5xx\n\
             \x20   rewrite path prefix→/\n\
             \x20 → sent to outbound|9080|v2|reviews.shop.svc.cluster.local\n\
             \x20   100% outbound|9080|v2|reviews.shop.svc.cluster.local\n\
             \x20     leaves as reviews:9080 /\n\
             \x20       end-user: jason\n\
             \x20     endpoints by LEAST_REQUEST, DestinationRule shop/reviews spec.subsets[1] (rules.yaml:20)\n\
             \x20       + 10.1.0.3:9080 shop/reviews-v2 on b: ready\n\
             \x20       - 10.1.0.4:9080 shop/reviews-v2 on b: its labels are not those of the subset\n\
             \x20 note: copies go nowhere: no_service\n"
        );
    }
}
