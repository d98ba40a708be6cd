//! TLSRoutes and TCPRoutes: connections by server name and by share.

use mesh_tests::backends::{Backend, WebAuthority, ask_tls, serve_tls};
use mesh_tests::shop::{TARGET_PORT, Vip};
use mesh_tests::{Failure, Pod, Shop, TestResult, eventually, require_agent, test_name};

use crate::scene::{A_TENTH, DRAWS, SOON, route};

/// A pod outside the mesh with label `app: NAME`.
fn outside(shop: &Shop, name: &str) -> Result<Pod, Failure> {
    let pod = shop.world().node("a")?.pod(&format!("shop/{name}"))?;
    let manifest = pod.manifest().label("nodemesh.dev/mesh", "none");
    shop.world().manifests().apply(manifest.port("tcp", TARGET_PORT))?;
    Ok(pod)
}

/// A service whose port is named so, which says what is spoken there.
fn service(shop: &Shop, name: &str, port_name: &str) -> Result<Vip, Failure> {
    Ok(shop.service_with(name, 9000, |service| service.port(port_name, 9000, TARGET_PORT))?)
}

#[test]
fn connections_are_routed_by_server_name_and_split_between_backends() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let authority = WebAuthority::new("web")?;
    let roots = std::env::temp_dir().join(format!("mesh-tests-gateway-api-{}.pem", std::process::id()));
    std::fs::write(&roots, &authority.certificate)?;
    let mut tls: Vec<(Vip, Backend)> = Vec::new();
    for (name, host) in [("front", "front.other.org"), ("one", "one.example.com"), ("many", "*.example.com")]
    {
        let pod = outside(&shop, name)?;
        let server = serve_tls(&pod, TARGET_PORT, name, &authority.issue(host)?, None)?;
        tls.push((service(&shop, name, "tls")?, server));
    }
    let mut lines = Vec::new();
    for (node, name) in [("a", "near"), ("b", "far")] {
        let pod = shop.pod(node, name)?;
        service(&shop, name, "tcp")?;
        lines.push(shop.serve(&pod)?);
    }
    // Nobody is called so: all that is connected goes where the route says.
    let data = service(&shop, "data", "tcp")?;
    let _agents = shop.start_agents()?;
    let apply = |file: &str, text: &str| shop.world().manifests().apply_text(file, text);

    for (name, hosts, backend) in
        [("wide", "['*.example.com']", "many"), ("exact", "[one.example.com]", "one")]
    {
        let rules =
            format!("  hostnames: {hosts}\n  rules: [{{backendRefs: [{{name: {backend}, port: 9000}}]}}]\n");
        apply(&format!("{name}.yaml"), &route("TLSRoute", name, "front", &rules))?;
    }
    let ask = |name: &str| ask_tls(&client, tls[0].0.v4, name, &roots).map_err(|error| format!("{error:?}"));
    for (name, server) in
        [("one.example.com", "one"), ("two.example.com", "many"), ("front.other.org", "front")]
    {
        let wanted = format!("{server} sni={name} client=no\n");
        drop(eventually(SOON, || ask(name), |answer| answer.as_ref() == Ok(&wanted))?);
    }
    std::fs::remove_file(&roots).ok();

    let split = |backends: &str| {
        let rules = format!("  rules: [{{backendRefs: [{backends}]}}]\n");
        apply("split.yaml", &route("TCPRoute", "split", "data", &rules))
    };
    let who = |times: usize| -> Vec<String> {
        let one = || Ok::<_, Failure>(client.tool()?.connect(data.v4)?.who()?.server);
        (0..times).map(|_| one().unwrap_or_else(|_| "nobody".to_owned())).collect()
    };
    let count = |seen: &[String], name: &str| seen.iter().filter(|server| *server == name).count();
    split("{name: near, port: 9000}")?;
    eventually(SOON, || who(10), |seen| count(seen, "near") == 10)?;
    split("{name: near, port: 9000, weight: 0}, {name: far, port: 9000}")?;
    eventually(SOON, || who(10), |seen| count(seen, "far") == 10)?;
    split("{name: near, port: 9000, weight: 90}, {name: far, port: 9000, weight: 10}")?;
    eventually(SOON, || who(10), |seen| count(seen, "near") > 0)?;
    let seen = who(DRAWS);
    let tenth = count(&seen, "far");
    assert!(A_TENTH.contains(&tenth) && tenth + count(&seen, "near") == DRAWS, "{tenth} of {DRAWS}");
    split("{name: near, port: 9000}, {name: gone, port: 9000}")?;
    eventually(
        SOON,
        || who(20),
        |seen| {
            let (good, reset) = (count(seen, "near"), count(seen, "nobody"));
            good > 0 && reset > 0 && good + reset == seen.len()
        },
    )?;
    Ok(())
}
