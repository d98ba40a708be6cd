//! The directory of manifests: what is wrong is told and changes nothing, what changes is taken up.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::{EndpointSliceManifest, ServiceManifest};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Pod, Shop, TestResult, ToolError, World, eventually, require_agent, shop, test_name,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(5);

fn source_errors(agent: &Agent) -> Vec<Value> {
    let status = agent.meshctl(&["status"]).unwrap_or_default();
    status["source_errors"].as_array().cloned().unwrap_or_default()
}

/// Wait until exactly `count` problems are shown.
fn problems(agent: &Agent, count: usize) -> Result<Vec<Value>, mesh_tests::waiting::NeverHappened> {
    eventually(SOON, || source_errors(agent), |rows| rows.len() == count)
}

fn text<'v>(row: &'v Value, field: &str) -> &'v str {
    row[field].as_str().unwrap_or_default()
}

fn answering(client: &Pod, to: SocketAddr, times: usize) -> Result<BTreeSet<String>, ToolError> {
    (0..times).map(|_| client.tool()?.who(to).map(|seen| seen.server)).collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_bad_document_keeps_the_last_good_state_of_its_file_and_is_located() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let (one, two) = (shop.pod("a", "one")?, shop.pod("a", "two")?);
    let (ip1, _) = World::service_ips(1);
    let (ip2, _) = World::service_ips(2);
    let service = |name: &str, ip, port: Value| -> Value {
        ServiceManifest::new("shop", name)
            .cluster_ip(ip)
            .with("/spec/ports", json!([{"name": "http", "port": port, "targetPort": 8080}]))
            .selector("app", name)
            .into()
    };
    let manifests = shop.world().manifests();
    manifests.apply_all("two.yaml", &[service("one", ip1, 80.into()), service("two", ip2, 80.into())])?;
    let agent = shop.world().node("a")?.agent().start()?;
    let _servers = [shop.serve(&one)?, shop.serve(&two)?];
    let (vip1, vip2) = (SocketAddr::from((ip1, 80)), SocketAddr::from((ip2, 80)));
    for vip in [vip1, vip2] {
        client.tool()?.who(vip)?;
    }
    assert!(source_errors(&agent).is_empty());

    // Out of range, of another type, and not YAML at all.
    let bad: [(&str, Value); 3] = [
        ("spec.ports[0].port", 70_000.into()),
        ("spec.ports[0].port", "eighty".into()),
        ("spec.ports[0]", json!(null)),
    ];
    for (field, port) in bad {
        let broken = if port.is_null() {
            service("two", ip2, 80.into()).as_object().map(|object| {
                let mut object = object.clone();
                object["spec"]["ports"] = json!(["http"]);
                Value::Object(object)
            })
        } else {
            Some(service("two", ip2, port))
        };
        // The first document changes too, and must not be taken while the second is bad.
        manifests.apply_all("two.yaml", &[service("one", ip1, 81.into()), broken.unwrap_or_default()])?;
        let rows = eventually(
            SOON,
            || source_errors(&agent),
            |rows| rows.len() == 1 && text(&rows[0], "field").starts_with(field),
        )?;
        let row = &rows[0];
        assert!(text(row, "file").ends_with("two.yaml"), "{row:#}");
        assert_eq!(row["document"], 2, "{row:#}");
        let named = [text(row, "kind"), text(row, "namespace"), text(row, "name")];
        assert_eq!(named, ["Service", "shop", "two"], "{row:#}");
        assert!(!text(row, "message").is_empty(), "{row:#}");
        for (vip, server) in [(vip1, "one"), (vip2, "two")] {
            assert_eq!(client.tool()?.who(vip)?.server, server);
        }
    }
    manifests.apply_text("two.yaml", "kind: [Service\n---\n}: {")?;
    let rows =
        eventually(SOON, || source_errors(&agent), |rows| rows.iter().all(|r| text(r, "kind").is_empty()))?;
    assert!(!rows.is_empty() && text(&rows[0], "file").ends_with("two.yaml"), "{rows:#?}");
    assert_eq!(client.tool()?.who(vip2)?.server, "two");

    manifests.apply_all("two.yaml", &[service("one", ip1, 81.into()), service("two", ip2, 80.into())])?;
    problems(&agent, 0)?;
    let moved = SocketAddr::from((ip1, 81));
    eventually(SOON, || client.tool()?.who(moved), |answer| answer.is_ok())??;
    assert!(client.tool()?.who(vip1).is_err(), "the old port is gone");
    Ok(())
}

#[test]
fn a_file_that_starts_out_bad_is_told_and_the_others_serve() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    shop.world().manifests().apply_text(
        "sub/folder/broken.yaml",
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: broken\n  namespace: shop\nspec:\n  ports: 80\n",
    )?;
    let agent = shop.world().node("a")?.agent().start()?;
    let _server = shop.serve(&web)?;
    assert_eq!(client.tool()?.who(vip.v4)?.server, "web");
    let rows = problems(&agent, 1)?;
    assert!(text(&rows[0], "file").ends_with("sub/folder/broken.yaml"), "{rows:#?}");
    assert_eq!(text(&rows[0], "field"), "spec.ports", "{rows:#?}");
    let told = agent.log_text().lines().filter(|line| line.contains("broken.yaml")).count();
    assert_eq!(told, 1, "once a change, not once a scan");
    Ok(())
}

#[test]
fn one_resource_in_two_files_is_told_and_the_first_file_holds() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let (other, _) = World::service_ips(77);
    let again = ServiceManifest::new("shop", "web").cluster_ip(other).port("http", 80, 8080);
    shop.world().manifests().apply_all("zzz.yaml", &[again.selector("app", "web").into()])?;
    let agent = shop.world().node("a")?.agent().start()?;
    let _server = shop.serve(&web)?;
    let rows = problems(&agent, 1)?;
    assert!(text(&rows[0], "file").ends_with("zzz.yaml"), "{rows:#?}");
    assert!(text(&rows[0], "message").contains("service-web.yaml"), "both files are named: {rows:#?}");
    assert_eq!(client.tool()?.who(vip.v4)?.server, "web");
    shop.world().manifests().delete_file("zzz.yaml")?;
    problems(&agent, 0)?;
    Ok(())
}

#[test]
fn kinds_the_mesh_does_not_read_are_no_errors() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let client = shop.pod("a", "client")?;
    let manifests = shop.world().manifests();
    manifests.apply(json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"anything": true}}))?;
    manifests.apply_text("notes.txt", "not: [a manifest")?;
    manifests.apply_text(
        "list.json",
        &json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "shop"}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x", "namespace": "shop"}},
        ]})
        .to_string(),
    )?;
    let agent = shop.world().node("a")?.agent().start()?;
    agent.wait_enrolled([&client])?;
    assert!(source_errors(&agent).is_empty(), "{:#?}", source_errors(&agent));
    Ok(())
}

#[test]
fn what_appears_later_is_taken_up_and_what_is_removed_is_gone() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let agents = shop.start_agents()?;
    let first = shop.backend("b", "web-1", "web")?;
    let _first = shop.serve(&first)?;
    let vip = shop.service("web", 80)?;
    agents[1].wait_enrolled([&first])?;
    for to in vip.all() {
        eventually(SOON, || client.tool()?.who(to), |answer| answer.is_ok())??;
    }
    // Endpoints derived from pods come and go with them.
    let second = shop.backend("a", "web-2", "web")?;
    let _second = shop.serve(&second)?;
    let seen = |expected: &[&str]| -> TestResult {
        let expected = names(expected);
        for to in [vip.v4, vip.v6] {
            eventually(
                SOON,
                || answering(&client, to, 12),
                |seen| seen.as_ref().is_ok_and(|s| *s == expected),
            )??;
        }
        Ok(())
    };
    seen(&["web-1", "web-2"])?;
    let manifests = shop.world().manifests();
    manifests.apply(first.manifest().label("app", "something-else"))?;
    seen(&["web-2"])?;
    manifests.apply(first.manifest().label("app", "web"))?;
    seen(&["web-1", "web-2"])?;
    manifests.delete("Pod", shop::NAMESPACE, "web-2")?;
    seen(&["web-1"])?;
    manifests.delete("Service", shop::NAMESPACE, "web")?;
    eventually(SOON, || client.tool()?.who(vip.v4).map(drop), |answer| answer.is_err())?.unwrap_err();
    // The pod itself is still there, and still meshed.
    assert_eq!(client.tool()?.who(first.at4(8080))?.server, "web-1");
    Ok(())
}

#[test]
fn endpoint_slices_of_a_service_without_selector_lead_where_they_say() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let outsider = shop.world().outsider("legacy")?;
    let (ip, _) = World::service_ips(9);
    let manifests = shop.world().manifests();
    manifests.apply(ServiceManifest::new("shop", "mixed").cluster_ip(ip).port("http", 80, 80))?;
    let slice = |inside: bool, outside: bool| {
        EndpointSliceManifest::new("shop", "mixed-1", "mixed")
            .port("http", 8080)
            .endpoint(web.ip4(), inside)
            .endpoint(outsider.ip4(), outside)
    };
    manifests.apply(slice(true, true))?;
    shop.start_agents()?;
    let _server = shop.serve(&web)?;
    let _legacy = outsider.tool()?.serve(outsider.at4(8080), ServerOptions::named("legacy"))?;
    let vip = SocketAddr::from((ip, 80));
    for (inside, outside, expected) in [
        (true, true, names(&["legacy", "web"])),
        (false, true, names(&["legacy"])),
        (true, false, names(&["web"])),
    ] {
        manifests.apply(slice(inside, outside))?;
        eventually(
            SOON,
            || answering(&client, vip, 12),
            |seen| seen.as_ref().is_ok_and(|s| *s == expected),
        )??;
    }
    manifests.delete("EndpointSlice", "shop", "mixed-1")?;
    eventually(SOON, || client.tool()?.connect(vip).map(drop), |answer| answer.is_err())?.unwrap_err();
    Ok(())
}
