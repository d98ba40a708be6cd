//! Services that Kubernetes does not know: by address, by name and behind WorkloadEntries; real apps, the real agent, a real name
//! server.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_tests::backends::{WebAuthority, ask_tls, serve_tls};
use mesh_tests::nameserver::NameServer;
use mesh_tests::protocol::{DnsBy, Serve};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Agent, Failure, Pod, Server, Shop, TestResult, eventually, hbone::everywhere, require_agent, test_name,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
const TLS_PORT: u16 = 8443;

/// A meshed client on node a, two servers and a name server outside.
struct Scene {
    shop: Shop,
    client: Pod,
    one: Ipv4Addr,
    two: Ipv4Addr,
    names: NameServer,
    agent: Agent,
    _servers: Vec<Server>,
}

impl Scene {
    fn set(
        test: &str,
        records: impl Fn(Ipv4Addr) -> Vec<(&'static str, Vec<IpAddr>)>,
    ) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a"])?;
        let client = shop.pod("a", "client")?;
        let mut servers = Vec::new();
        let mut at = Vec::new();
        for name in ["one", "two"] {
            let place = shop.world().outsider(name)?;
            let options = ServerOptions::named(name).serving(Serve::Http);
            servers.push(place.tool()?.serve(everywhere(PORT), options)?);
            at.push(place.ip4());
        }
        let names = NameServer::start(&shop.world().outsider("names")?, &records(at[0]))?;
        names.set_ttl(1);
        let upstream = names.address().to_string();
        let agent = shop.world().node("a")?.agent().args(&["--dns-upstream", &upstream]).start()?;
        Ok(Self { shop, client, one: at[0], two: at[1], names, agent, _servers: servers })
    }

    /// A ServiceEntry for port 80 of `host`, with these fields besides.
    fn entry(&self, host: &str, fields: &str) -> TestResult {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {host}, namespace: shop}}
spec:
  hosts: [{host}]
  ports: [{{name: http, number: 80, protocol: HTTP, targetPort: {PORT}}}]
{fields}"
        );
        self.shop.world().manifests().apply_text(&format!("{host}.yaml"), &text)?;
        Ok(())
    }

    /// A rule of the same shape as for any service: 410 to what begins with `/gone`, the rest to `host`.
    fn gone_rule(&self, host: &str) -> TestResult {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: gone, namespace: shop}}
spec:
  hosts: [{host}]
  http:
  - match: [{{uri: {{prefix: /gone}}}}]
    directResponse: {{status: 410}}
  - route: [{{destination: {{host: {host}}}}}]
"
        );
        self.shop.world().manifests().apply_text("rule.yaml", &text)?;
        Ok(())
    }

    /// Where the mesh's DNS says a host is, as soon as it says a virtual address.
    fn virtual_address(&self, host: &str) -> Result<SocketAddr, Failure> {
        let ask = || {
            let answer = self.client.tool().map_err(|error| error.to_string()).and_then(|tool| {
                let asked = tool.dns(self.names.address(), &format!("{host}."), "A", DnsBy::ConnectedUdp);
                asked.map_err(|error| error.to_string())
            });
            answer.map(|answer| answer.addresses)
        };
        let is_virtual = |found: &Result<Vec<IpAddr>, String>| {
            found.as_ref().is_ok_and(
                |found| matches!(found[..], [IpAddr::V4(addr)] if addr.octets()[..2] == [240, 240]),
            )
        };
        let found = eventually(SOON, ask, is_virtual)?;
        Ok(SocketAddr::new(found.map_err(anyhow::Error::msg)?[0], 80))
    }

    /// What a GET gets: status and the name of the server, or why there is nothing.
    fn get(&self, to: SocketAddr, host: &str, path: &str) -> (u16, String) {
        let answer = self.client.tool().and_then(|tool| tool.http_get(to, host, path));
        match answer {
            Ok(answer) => {
                let by = ["one", "two"].into_iter().find(|name| answer.body.contains(&format!("\"{name}\"")));
                (answer.status, by.unwrap_or_default().to_owned())
            }
            Err(error) => (0, error.to_string()),
        }
    }

    fn settles(&self, to: SocketAddr, host: &str, path: &str, wanted: (u16, &str)) -> TestResult {
        eventually(SOON, || self.get(to, host, path), |(status, by)| (*status, by.as_str()) == wanted)?;
        Ok(())
    }
}

#[test]
fn a_host_with_addresses_is_reached_by_its_name_and_routed_by_its_rules() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Vec::new())?;
    let host = "static.ext.test";
    scene.entry(host, &format!("  resolution: STATIC\n  endpoints: [{{address: {}}}]\n", scene.one))?;
    let vip = scene.virtual_address(host)?;
    scene.settles(vip, host, "/", (200, "one"))?;

    scene.gone_rule(host)?;
    scene.settles(vip, host, "/gone", (410, ""))?;
    scene.settles(vip, host, "/", (200, "one"))?;
    // Earlier questions may have been older than the entry.
    let asked = || scene.names.asked().iter().filter(|question| question.name == format!("{host}.")).count();
    let before = asked();
    assert_eq!(scene.virtual_address(host)?, vip);
    assert_eq!(asked(), before, "the mesh knows the name by itself");
    Ok(())
}

#[test]
fn a_workload_entry_is_an_endpoint_of_what_selects_it_until_it_goes() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Vec::new())?;
    let host = "vm.ext.test";
    let fields = "  location: MESH_INTERNAL\n  resolution: STATIC\n  workloadSelector: {labels: {app: vm}}\n";
    scene.entry(host, fields)?;
    let workload = |address: Ipv4Addr| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: vm, namespace: shop}}
spec: {{address: {address}, labels: {{app: vm}}}}
"
        );
        scene.shop.world().manifests().apply_text("vm.yaml", &text)
    };
    workload(scene.one)?;
    let vip = scene.virtual_address(host)?;
    scene.settles(vip, host, "/", (200, "one"))?;
    workload(scene.two)?;
    scene.settles(vip, host, "/", (200, "two"))?;
    scene.shop.world().manifests().delete_file("vm.yaml")?;
    eventually(SOON, || scene.get(vip, host, "/"), |(status, _)| *status == 0)?;
    Ok(())
}

#[test]
fn a_host_by_name_follows_its_name_and_a_name_that_fails_takes_nothing_away() -> TestResult {
    require_agent!();
    let (moving, missing) = ("moving.ext.test", "missing.ext.test");
    let scene = Scene::set(test_name!(), |one| vec![("moving.ext.test.", vec![one.into()])])?;
    scene.entry(moving, "  resolution: DNS\n")?;
    scene.entry(missing, "  resolution: DNS\n")?;
    let vip = scene.virtual_address(moving)?;
    scene.settles(vip, moving, "/", (200, "one"))?;

    scene.names.set("moving.ext.test.", vec![scene.two.into()])?;
    scene.settles(vip, moving, "/", (200, "two"))?;

    // Gone from DNS: what was known stays, and the failure has its name.
    scene.names.forget("moving.ext.test.")?;
    let failing = || {
        let status = scene.agent.meshctl(&["status"]).unwrap_or(Value::Null);
        let rows = status["names"]["failing"].as_array().cloned().unwrap_or_default();
        rows.iter()
            .map(|row| (row["name"].as_str().unwrap_or_default().to_owned(), row["reason"].to_string()))
            .collect::<Vec<_>>()
    };
    let both = |rows: &Vec<(String, String)>| {
        rows.len() == 2 && rows.iter().all(|(_, reason)| reason == "\"no_such_name\"")
    };
    eventually(SOON, failing, both)?;
    assert_eq!(scene.get(vip, moving, "/"), (200, "two".to_owned()));
    let lookups = scene.agent.metric(&["mesh_name_lookups_total", "outcome=\"no_such_name\""])?;
    assert!(lookups >= 2.0, "{lookups}");

    let nowhere = scene.virtual_address(missing)?;
    assert_eq!(scene.get(nowhere, missing, "/").0, 0, "nothing is known of it");
    Ok(())
}

#[test]
fn a_host_without_addresses_is_told_by_the_name_that_is_asked_for() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Vec::new())?;
    let host = "named.ext.test";
    let (one, two) = (SocketAddr::from((scene.one, PORT)), SocketAddr::from((scene.two, PORT)));
    let entry = |fields: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: named, namespace: shop}}
spec:
  hosts: [{host}]
  ports: [{{name: http, number: {PORT}, protocol: HTTP}}]
  {fields}
"
        );
        scene.shop.world().manifests().apply_text("named.yaml", &text)
    };
    entry("resolution: NONE")?;
    scene.gone_rule(host)?;
    scene.settles(one, host, "/gone", (410, ""))?;
    // It goes where it was dialled, and so does what nothing is said about.
    assert_eq!(scene.get(one, host, "/"), (200, "one".to_owned()));
    assert_eq!(scene.get(two, host, "/"), (200, "two".to_owned()));
    assert_eq!(scene.get(one, "other.ext.test", "/gone"), (200, "one".to_owned()));

    // A network, whatever name is asked for there; its endpoints are elsewhere.
    let network = format!("addresses: [{}/31]", scene.one);
    entry(&format!("{network}\n  resolution: NONE"))?;
    scene.settles(one, "other.ext.test", "/gone", (410, ""))?;
    assert_eq!(scene.get(one, "other.ext.test", "/"), (200, "one".to_owned()));
    entry(&format!("{network}\n  resolution: STATIC\n  endpoints: [{{address: {}}}]", scene.two))?;
    scene.settles(one, host, "/", (200, "two"))?;
    Ok(())
}

/// One ServiceEntry of two hosts, each of which DNS knows at another server; `more` are fields besides.
fn two_hosts(ports: &str, more: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: twins, namespace: shop}}
spec:
  hosts: [one.twins.test, two.twins.test]
  ports: [{ports}]
  resolution: DNS
  {more}
"
    )
}

#[test]
fn each_host_of_one_entry_is_where_dns_has_it() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |one| vec![("one.twins.test.", vec![one.into()])])?;
    scene.names.set("two.twins.test.", vec![scene.two.into()])?;
    let http = format!("{{name: http, number: 80, protocol: HTTP, targetPort: {PORT}}}");
    scene.shop.world().manifests().apply_text("twins.yaml", &two_hosts(&http, ""))?;
    for (host, server) in [("one.twins.test", "one"), ("two.twins.test", "two")] {
        let vip = scene.virtual_address(host)?;
        scene.settles(vip, host, "/", (200, server))?;
    }
    Ok(())
}

#[test]
fn hosts_that_share_an_address_are_told_apart_by_the_name_that_is_asked_for() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Vec::new())?;
    let world = scene.shop.world();
    let authority = WebAuthority::new("web")?;
    let certificate = authority.issue("*.twins.test")?;
    let (mut http, mut tls) = (Vec::new(), Vec::new());
    for name in ["one", "two"] {
        let place = world.outsider(&format!("twin-{name}"))?;
        http.push(place.tool()?.serve(everywhere(PORT), ServerOptions::named(name).serving(Serve::Http))?);
        tls.push(serve_tls(&place, TLS_PORT, name, &certificate, None)?);
        scene.names.set(&format!("{name}.twins.test."), vec![place.ip4().into()])?;
    }
    let roots = world.manifests().directory().with_extension("pem");
    fs::write(&roots, &authority.certificate)?;
    let ports = format!(
        "{{name: http, number: 80, protocol: HTTP, targetPort: {PORT}}}, {{name: tls, number: 443, protocol: TLS, targetPort: {TLS_PORT}}}"
    );
    let vip = Ipv4Addr::new(240, 240, 77, 77);
    world.manifests().apply_text("twins.yaml", &two_hosts(&ports, &format!("addresses: [{vip}]")))?;
    let (web, secure) = (SocketAddr::from((vip, 80)), SocketAddr::from((vip, 443)));
    // Nothing else is said of any of them. Who names neither is the first one's.
    for (host, server) in [
        ("two.twins.test", "two"),
        ("one.twins.test", "one"),
        ("else.test", "one"),
        ("two.twins.test", "two"),
    ] {
        scene.settles(web, host, "/", (200, server))?;
    }
    let ask = |name: &str| {
        ask_tls(&scene.client, secure, name, &roots).unwrap_or_else(|error| format!("{error:?}"))
    };
    for (host, server) in [("two.twins.test", "two"), ("one.twins.test", "one"), ("else.twins.test", "one")] {
        let wanted = format!("{server} sni={host} client=no\n");
        eventually(SOON, || ask(host), |said| *said == wanted)?;
    }
    let status = scene.agent.meshctl(&["status"])?;
    assert_eq!(status["source_errors"].as_array().map(Vec::len), Some(0), "{status}");

    // What is said of the second one holds for it alone.
    scene.gone_rule("two.twins.test")?;
    scene.settles(web, "two.twins.test", "/gone", (410, ""))?;
    assert_eq!(scene.get(web, "one.twins.test", "/gone"), (200, "one".to_owned()));
    Ok(())
}

/// Servers that are called by their names, whatever addresses these have.
fn called(port: u16, protocol: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: called, namespace: shop}}
spec:
  hosts: ['*.called.test']
  ports: [{{name: one, number: {port}, protocol: {protocol}}}]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
"
    )
}

#[test]
fn s50_a_server_that_is_called_by_name_is_where_dns_says_and_never_at_a_place_of_our_own() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |one| {
        let (link, own) = (Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::LOCALHOST);
        vec![
            ("a.called.test.", vec![one.into()]),
            ("link.called.test.", vec![link.into()]),
            ("own.called.test.", vec![own.into()]),
        ]
    })?;
    scene.shop.world().manifests().apply_text("called.yaml", &called(PORT, "HTTP"))?;
    // Whatever was dialled: the name counts.
    let (one, two) = (SocketAddr::from((scene.one, PORT)), SocketAddr::from((scene.two, PORT)));
    scene.settles(two, "a.called.test", "/", (200, "one"))?;
    assert_eq!(
        scene.get(two, "other.test", "/"),
        (200, "two".to_owned()),
        "others go where they were dialled"
    );
    let asked = || scene.names.asked().iter().any(|question| question.name.starts_with("other"));
    assert!(!asked(), "nobody has a name looked up that no wildcard covers");

    for (host, outcome) in [
        ("link.called.test", "refused_address"),
        ("own.called.test", "no_address"),
        ("missing.called.test", "no_such_name"),
    ] {
        assert_eq!(scene.get(one, host, "/").0, 503, "{host}");
        let counted = scene.agent.metric(&["mesh_called_names_total", &format!("outcome=\"{outcome}\"")])?;
        assert!(counted >= 1.0, "{outcome} {counted}");
    }
    // It follows its name, and a name that fails takes nothing away.
    scene.names.set("a.called.test.", vec![scene.two.into()])?;
    scene.settles(one, "a.called.test", "/", (200, "two"))?;
    scene.names.forget("a.called.test.")?;
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(scene.get(one, "a.called.test", "/"), (200, "two".to_owned()));
    Ok(())
}

#[test]
fn s50_a_tls_server_that_is_called_by_name_is_found_by_its_server_name() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), |_| Vec::new())?;
    let world = scene.shop.world();
    let authority = WebAuthority::new("web")?;
    let certificate = authority.issue("*.called.test")?;
    let (named, dialled) = (world.outsider("named")?, world.outsider("dialled")?);
    let _servers = [
        serve_tls(&named, TLS_PORT, "named", &certificate, None)?,
        serve_tls(&dialled, TLS_PORT, "dialled", &certificate, None)?,
    ];
    scene.names.set("a.called.test.", vec![named.ip4().into()])?;
    scene.names.set("own.called.test.", vec![Ipv4Addr::LOCALHOST.into()])?;
    let roots = world.manifests().directory().with_extension("pem");
    fs::write(&roots, &authority.certificate)?;
    let to = SocketAddr::from((dialled.ip4(), TLS_PORT));
    let ask =
        |name: &str| ask_tls(&scene.client, to, name, &roots).unwrap_or_else(|error| format!("{error:?}"));
    assert_eq!(ask("a.called.test"), "dialled sni=a.called.test client=no\n", "nothing is said of it yet");

    world.manifests().apply_text("called.yaml", &called(TLS_PORT, "TLS"))?;
    eventually(SOON, || ask("a.called.test"), |said| said == "named sni=a.called.test client=no\n")?;
    assert!(ask("own.called.test").contains("no answer of own.called.test"));
    let refused = scene.agent.metric(&["mesh_called_names_total", "outcome=\"no_address\""])?;
    assert!(refused >= 1.0, "{refused}");
    Ok(())
}
