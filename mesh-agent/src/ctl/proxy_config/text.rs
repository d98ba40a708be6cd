//! The text of `meshctl proxy-config`: columns that users of istioctl know, and what this mesh has beyond them.

use super::super::{
    figures,
    table::{Align, Table},
};
use crate::view::{ClustersView, EndpointsView, ListenersView, OriginView, RouteRuleView, RoutesView};

const LEFT: Align = Align::Left;

/// A resource without the part that the column beside it says.
fn resource(origin: &OriginView) -> String {
    format!("{} {} {}", origin.kind, origin.name, origin.field)
}

fn place(origin: Option<&OriginView>) -> String {
    origin.and_then(|origin| origin.place.clone()).unwrap_or_default()
}

/// `500ms`, `1.5s`.
pub(in super::super) fn time(ms: u64) -> String {
    if ms < 1000 { format!("{ms}ms") } else { format!("{}s", ms as f64 / 1e3) }
}

/// Retries in a few words.
pub(in super::super) fn retries(rule: &RouteRuleView) -> String {
    rule.retries.as_ref().map_or_else(
        || "none".to_owned(),
        |retries| {
            let each =
                retries.per_try_timeout_ms.map(|ms| format!(", {} each", time(ms))).unwrap_or_default();
            format!("{}{each}", retries.attempts)
        },
    )
}

/// The rules; `wide` also has what they change, and when tries are repeated.
pub(super) fn routes(view: &RoutesView, wide: bool) -> String {
    let mut table = Table::new(&[
        ("PORT", Align::Right),
        ("VHOST NAME", LEFT),
        ("CLIENTS", LEFT),
        ("NAME", LEFT),
        ("MATCH", LEFT),
        ("ACTION", LEFT),
        ("TIMEOUT", LEFT),
        ("RETRIES", LEFT),
        ("RESOURCE", LEFT),
        ("PLACE", LEFT),
    ])
    .widened(wide, &[("CHANGES", LEFT), ("CORS", LEFT), ("RETRIED ON", LEFT)]);
    for host in &view.tables {
        let start = || {
            let protocol =
                if host.protocol == "http" { String::new() } else { format!(" ({})", host.protocol) };
            let clients = host.clients.clone().unwrap_or_else(|| "this pod".to_owned());
            [host.port.to_string(), format!("{}{protocol}", host.host), clients]
        };
        for rule in &host.rules {
            let [port, name, clients] = start();
            let matched = if rule.matches.is_empty() { "any".to_owned() } else { rule.matches.join(" | ") };
            let extras = rule.fault.iter().cloned().chain(rule.mirrors.iter().map(|m| format!("mirror {m}")));
            let action = std::iter::once(rule.action.clone()).chain(extras).collect::<Vec<_>>().join("; ");
            table.row([
                port,
                name,
                clients,
                rule.name.clone().unwrap_or_default(),
                matched,
                action,
                rule.timeout_ms.map(time).unwrap_or_default(),
                retries(rule),
                resource(&rule.origin),
                place(Some(&rule.origin)),
            ]);
            table.more([
                rule.changes.join("; "),
                if rule.cors { "yes".to_owned() } else { String::new() },
                rule.retries.as_ref().map(|retries| retries.on.join(",")).unwrap_or_default(),
            ]);
        }
        let matches_all = host.rules.iter().any(|rule| rule.matches.is_empty());
        if !matches_all && host.protocol == "http" {
            let [port, name, clients] = start();
            let none = String::new;
            table.row([
                port,
                name,
                clients,
                none(),
                "else".into(),
                host.unmatched.clone(),
                none(),
                none(),
                none(),
                none(),
            ]);
            table.more([none(), none(), none()]);
        }
    }
    if table.is_empty() {
        return "no rules: service ports are left to the kernel, or relayed (meshctl proxy-config listeners)\n".to_owned();
    }
    table.render()
}

/// The destinations; `wide` also has their names, as endpoints and rules have them, and retries under way.
pub(super) fn clusters(view: &ClustersView, wide: bool) -> String {
    let mut table = Table::new(&[
        ("SERVICE FQDN", LEFT),
        ("PORT", Align::Right),
        ("SUBSET", LEFT),
        ("CLIENTS", LEFT),
        ("PROTOCOL", LEFT),
        ("BALANCING", LEFT),
        ("LIMITS", LEFT),
        ("OUTLIERS", LEFT),
        ("TLS", LEFT),
        ("IN USE", LEFT),
        ("DESTINATION RULE", LEFT),
        ("PLACE", LEFT),
    ])
    .widened(wide, &[("RETRYING", Align::Right), ("NAME", LEFT)]);
    for cluster in &view.clusters {
        let in_use = cluster.in_use.map(|used| {
            format!("{} conns, {} requests, {} pending", used.connections, used.requests, used.pending)
        });
        table.row([
            cluster.host.clone(),
            cluster.port.to_string(),
            cluster.subset.clone().unwrap_or_default(),
            cluster.clients.clone().unwrap_or_else(|| "this pod".to_owned()),
            cluster.protocol.clone(),
            cluster.balancing.clone(),
            cluster.limits.join(" "),
            cluster.outlier.clone().unwrap_or_default(),
            match &cluster.tls_problem {
                Some(problem) => format!("{} ({problem})", cluster.tls),
                None => cluster.tls.clone(),
            },
            in_use.unwrap_or_default(),
            cluster
                .origin
                .as_ref()
                .map(|origin| format!("{} {}", origin.name, origin.field))
                .unwrap_or_default(),
            place(cluster.origin.as_ref()),
        ]);
        let retrying = cluster.in_use.map(|used| used.retries.to_string());
        table.more([retrying.unwrap_or_default(), cluster.name.clone()]);
    }
    if table.is_empty() { "no services\n".to_owned() } else { table.render() }
}

pub(super) fn endpoints(view: &EndpointsView) -> String {
    let mut table = Table::new(&[
        ("ENDPOINT", LEFT),
        ("STATUS", LEFT),
        ("OUTLIER CHECK", LEFT),
        ("CLUSTER", LEFT),
        ("POD", LEFT),
        ("NODE", LEFT),
        ("LOCALITY", LEFT),
        ("WEIGHT", Align::Right),
        ("PRIORITY", Align::Right),
        ("ACTIVE", Align::Right),
        ("FAILURES", Align::Right),
    ]);
    for endpoint in &view.endpoints {
        let status = match endpoint.ejected_for_ms {
            Some(ms) => format!("{} for {}", endpoint.status, figures::age(ms as f64 / 1e3)),
            None => endpoint.status.clone(),
        };
        table.row([
            endpoint.addr.to_string(),
            status,
            endpoint.outlier_check.clone(),
            endpoint.cluster.clone(),
            endpoint.workload.clone().unwrap_or_default(),
            endpoint.node.clone().unwrap_or_default(),
            endpoint.locality.clone().unwrap_or_default(),
            endpoint.weight.to_string(),
            endpoint.priority.map(|class| class.to_string()).unwrap_or_default(),
            endpoint.active_requests.to_string(),
            endpoint.failures.to_string(),
        ]);
    }
    if table.is_empty() { "no endpoints\n".to_owned() } else { table.render() }
}

pub(super) fn listeners(view: &ListenersView) -> String {
    let mut out = String::new();
    if let Some(pod) = view.pod.as_ref().filter(|_| !view.enrolled) {
        out.push_str(&format!("{pod} is not enrolled: the kernel leaves its sockets alone\n\n"));
    }
    let mut table = Table::new(&[
        ("ADDRESS", LEFT),
        ("PORT", Align::Right),
        ("PROTOCOL", LEFT),
        ("KERNEL", LEFT),
        ("BACKENDS", Align::Right),
        ("DESTINATION", LEFT),
    ]);
    for listener in &view.in_pod {
        table.row([
            "in pod".to_owned(),
            listener.port.to_string(),
            String::new(),
            String::new(),
            String::new(),
            listener.purpose.clone(),
        ]);
    }
    for service in &view.services {
        table.row([
            service.addr.to_string(),
            service.port.to_string(),
            service.protocol.clone(),
            service.decision.to_uppercase(),
            service.backends.to_string(),
            service.host.clone(),
        ]);
    }
    out.push_str(&table.render());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{ClusterView, EndpointView, InUseView, RetriesView, RouteTableView, ShareView};

    fn rule(matches: &[&str]) -> RouteRuleView {
        RouteRuleView {
            name: None,
            origin: OriginView {
                kind: "VirtualService".into(),
                name: "shop/reviews".into(),
                field: "spec.http[0]".into(),
                place: Some("reviews.yaml:12".into()),
            },
            matches: matches.iter().map(|&text| text.to_owned()).collect(),
            action: "outbound|9080|v2|reviews.shop.svc.cluster.local".into(),
            backends: vec![ShareView { percent: 100.0, cluster: "x".into(), broken_status: None }],
            timeout_ms: Some(500),
            retries: Some(RetriesView { attempts: 2, on: Vec::new(), per_try_timeout_ms: Some(1500) }),
            fault: vec!["delay 7s of 100%".into()],
            mirrors: Vec::new(),
            changes: Vec::new(),
            cors: false,
        }
    }

    fn view(rules: Vec<RouteRuleView>) -> RoutesView {
        let table = RouteTableView {
            host: "reviews.shop.svc.cluster.local".into(),
            port: 9080,
            protocol: "http".into(),
            clients: None,
            rules,
            unmatched: "respond 404 (no_route)".into(),
        };
        RoutesView { pod: Some("shop/cart".into()), tables: vec![table] }
    }

    #[test]
    fn a_rule_is_a_row_with_its_line_and_what_nothing_matches_is_one_too() {
        let text = routes(&view(vec![rule(&["header end-user=jason", "path=/x*"])]), false);
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows.len(), 3, "{text}");
        for part in [
            "9080",
            "header end-user=jason | path=/x*",
            "; delay 7s of 100%",
            "500ms",
            "2, 1.5s each",
            "reviews.yaml:12",
        ] {
            assert!(rows[1].contains(part), "{part}: {text}");
        }
        assert!(rows[2].contains("respond 404 (no_route)"), "{text}");
        let all = routes(&view(vec![rule(&[])]), false);
        assert_eq!(all.lines().count(), 2, "a rule for everything leaves nothing over: {all}");
    }

    #[test]
    fn a_wide_table_has_what_rules_change_and_clusters_are_called() {
        let mut changing = rule(&["path=/x*"]);
        changing.changes = vec!["host a.b".into(), "set x-a".into()];
        changing.retries =
            Some(RetriesView { attempts: 1, on: vec!["5xx".into()], per_try_timeout_ms: None });
        let routed = view(vec![changing]);
        let rows: Vec<String> = routes(&routed, true).lines().map(ToOwned::to_owned).collect();
        assert!(rows[0].ends_with("CHANGES            CORS  RETRIED ON"), "{rows:#?}");
        assert!(rows[1].ends_with("host a.b; set x-a  -     5xx"), "{rows:#?}");
        assert!(rows[2].ends_with("-     -"), "the row of what matches nothing: {rows:#?}");
        assert!(!routes(&routed, false).contains("set x-a"));

        let cluster = ClusterView {
            name: "outbound|80||web".into(),
            host: "web".into(),
            port: 80,
            subset: None,
            clients: None,
            protocol: "http".into(),
            balancing: "LEAST_REQUEST".into(),
            limits: Vec::new(),
            outlier: None,
            tls: "mesh".into(),
            tls_problem: None,
            origin: None,
            in_use: Some(InUseView { retries: 3, ..InUseView::default() }),
        };
        let of = ClustersView { pod: None, clusters: vec![cluster] };
        assert!(clusters(&of, true).ends_with("       3  outbound|80||web\n"), "{}", clusters(&of, true));
        assert!(!clusters(&of, false).contains("outbound|80||web"));
    }

    #[test]
    fn an_endpoint_that_is_out_says_for_how_long() {
        let endpoint = EndpointView {
            addr: "10.1.0.3:9080".parse().unwrap(),
            workload: None,
            node: None,
            locality: None,
            weight: 1,
            priority: Some(0),
            status: "EJECTED".into(),
            outlier_check: "FAILED".into(),
            ejected_for_ms: Some(12_000),
            failures: 0,
            active_requests: 3,
            cluster: "outbound|9080||reviews".into(),
        };
        let text = endpoints(&EndpointsView { pod: None, endpoints: vec![endpoint] });
        let row = text.lines().nth(1).unwrap();
        assert!(row.starts_with("10.1.0.3:9080  EJECTED for 12"), "{text}");
        assert!(row.contains("FAILED") && row.ends_with("1         0       3         0"), "{text}");
    }
}
