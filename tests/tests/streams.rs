//! TLS and TCP connections by rules and policies, and what policies put between: real servers, the real agent.

use std::path::PathBuf;
use std::time::Duration;

use mesh_tests::backends::{Backend, WebAuthority, ask_tls, serve_connect, serve_echo, serve_tls};
use mesh_tests::shop::{TARGET_PORT, Vip};
use mesh_tests::{Agent, Connection, Failure, Pod, Shop, TestResult, eventually, require_agent, test_name};

const SOON: Duration = Duration::from_secs(10);

/// A client on node a and an agent there; servers come with each test.
struct Scene {
    shop: Shop,
    client: Pod,
    files: PathBuf,
    authority: WebAuthority,
    servers: Vec<Backend>,
    agents: Vec<Agent>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.files).ok();
    }
}

impl Scene {
    fn set(test: &str, nodes: &[&str], prepare: impl FnOnce(&Shop) -> TestResult) -> Result<Self, Failure> {
        let shop = Shop::open(test, nodes)?;
        let client = shop.pod("a", "client")?;
        prepare(&shop)?;
        let files = std::env::temp_dir().join(format!("mesh-tests-streams-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&files)?;
        let authority = WebAuthority::new("web")?;
        std::fs::write(files.join("ca.pem"), &authority.certificate)?;
        let args = ["--tls-files", files.to_str().unwrap_or_default()];
        let nodes = shop.world().nodes();
        let agents = nodes.map(|node| node.agent().args(&args).launch()).collect::<Result<Vec<_>, _>>()?;
        agents.iter().try_for_each(Agent::wait_ready)?;
        Ok(Self { shop, client, files, authority, servers: Vec::new(), agents })
    }

    /// The path of a file beside `ca.pem`.
    fn file(&self, name: &str) -> String {
        self.files.join(name).display().to_string()
    }

    fn apply(&self, name: &str, text: &str) -> TestResult {
        self.shop.world().manifests().apply_text(name, text)?;
        Ok(())
    }

    /// A DestinationRule for `web` with this policy.
    fn policy(&self, policy: &str) -> TestResult {
        self.apply(
            "policy.yaml",
            &format!(
                "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: web, namespace: shop}}
spec: {{host: web, trafficPolicy: {policy}}}
"
            ),
        )
    }

    fn connect(&self, to: Vip) -> Result<Connection, Failure> {
        Ok(self.client.tool()?.connect(to.v4)?)
    }

    /// What comes back until the end, or why nothing does.
    fn ask(&self, to: Vip, question: &str) -> Result<String, String> {
        let asked = || -> Result<String, Failure> {
            let connection = self.connect(to)?;
            connection.send(question)?;
            let mut answer = String::new();
            loop {
                let piece = connection.recv_within(65_536, Duration::from_secs(2))?;
                if piece.is_empty() {
                    return Ok(answer);
                }
                answer += &piece;
            }
        };
        asked().map_err(|error| format!("{error:?}"))
    }

    /// Waits until a question is answered like this.
    fn answers(&self, to: Vip, question: &str, wanted: impl Fn(&str) -> bool) -> TestResult {
        let answered = |answer: &Result<String, String>| answer.as_ref().is_ok_and(|answer| wanted(answer));
        drop(eventually(SOON, || self.ask(to, question), answered)?);
        Ok(())
    }
}

/// A pod outside the mesh with label `app: APP`.
fn outside(shop: &Shop, name: &str, app: &str) -> Result<Pod, Failure> {
    let pod = shop.world().node("a")?.pod(&format!("shop/{name}"))?;
    let manifest = pod.manifest().label("app", app).label("nodemesh.dev/mesh", "none");
    shop.world().manifests().apply(manifest.port("tcp", TARGET_PORT))?;
    Ok(pod)
}

/// A service whose port is named so, which says what is spoken there.
fn service(shop: &Shop, name: &str, port: u16, port_name: &str) -> Result<Vip, Failure> {
    Ok(shop.service_with(name, port, |service| service.port(port_name, port, TARGET_PORT))?)
}

#[test]
fn server_names_choose_among_tls_servers_that_end_tls_themselves() -> TestResult {
    require_agent!();
    let mut vip = None;
    let mut pods = Vec::new();
    let mut scene = Scene::set(test_name!(), &["a"], |shop| {
        for name in ["front", "one", "two"] {
            pods.push(outside(shop, name, name)?);
            let made = service(shop, name, 443, "tls")?;
            vip.get_or_insert(made);
        }
        Ok(())
    })?;
    let Some(vip) = vip else { return Ok(()) };
    let certificate = scene.authority.issue("*.example.com")?;
    for pod in &pods {
        let server = serve_tls(pod, TARGET_PORT, pod.name(), &certificate, None)?;
        scene.servers.push(server);
    }
    scene.apply(
        "route.yaml",
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: front, namespace: shop}
spec:
  hosts: [front, '*.example.com']
  tls:
  - match: [{sniHosts: [one.example.com]}]
    route: [{destination: {host: one}}]
  - match: [{sniHosts: ['two.example.com']}]
    route: [{destination: {host: two}}]
",
    )?;
    let roots = scene.files.join("ca.pem");
    let ask = |name: &str| ask_tls(&scene.client, vip.v4, name, &roots).map_err(|error| format!("{error:?}"));
    for (name, server) in
        [("one.example.com", "one"), ("two.example.com", "two"), ("three.example.com", "front")]
    {
        let wanted = format!("{server} sni={name} client=no\n");
        drop(eventually(SOON, || ask(name), |answer| answer.as_ref() == Ok(&wanted))?);
    }
    Ok(())
}

#[test]
fn connections_are_split_over_nodes_go_by_address_and_keep_to_limits() -> TestResult {
    require_agent!();
    let mut vips = Vec::new();
    let mut servers = Vec::new();
    let scene = Scene::set(test_name!(), &["a", "b"], |shop| {
        for (node, name) in [("a", "web"), ("b", "far")] {
            let pod = shop.pod(node, name)?;
            vips.push(service(shop, name, 9000, "tcp")?);
            servers.push(shop.serve(&pod)?);
        }
        Ok(())
    })?;
    let vip = vips[0];
    let route = |rules: &str| {
        let text = format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec: {{hosts: [web], tcp: [{rules}]}}
"
        );
        scene.apply("route.yaml", &text)
    };
    let who = || -> Result<Vec<String>, String> {
        let one = || Ok::<_, Failure>(scene.connect(vip)?.who()?.server);
        (0..20).map(|_| one().map_err(|error| format!("{error:?}"))).collect()
    };
    let are = |seen: &Result<Vec<String>, String>, names: &[&str]| {
        seen.as_ref().is_ok_and(|seen| names.iter().all(|name| seen.iter().any(|server| server == name)))
            && seen.as_ref().is_ok_and(|seen| seen.iter().all(|server| names.contains(&server.as_str())))
    };
    drop(eventually(SOON, who, |seen| are(seen, &["web"]))?);
    route("{route: [{destination: {host: web}, weight: 50}, {destination: {host: far}, weight: 50}]}")?;
    drop(eventually(SOON, who, |seen| are(seen, &["web", "far"]))?);
    let subnet = format!("{}/32", vip.v4.ip());
    route(&format!(
        "{{match: [{{destinationSubnets: ['{subnet}']}}], route: [{{destination: {{host: far}}}}]}}"
    ))?;
    drop(eventually(SOON, who, |seen| are(seen, &["far"]))?);
    route("{match: [{destinationSubnets: ['192.0.2.0/24']}], route: [{destination: {host: far}}]}")?;
    drop(eventually(SOON, who, |seen| are(seen, &["web"]))?);
    scene.policy("{connectionPool: {tcp: {maxConnections: 2}}}")?;
    // How many of four connections at once are answered.
    let at_once = || {
        let held: Vec<_> = (0..4).map(|_| scene.connect(vip)).collect();
        held.iter().filter(|one| one.as_ref().is_ok_and(|one| one.who().is_ok())).count()
    };
    eventually(SOON, at_once, |answered| *answered == 2)?;
    Ok(())
}

#[test]
fn plain_requests_become_tls_to_a_verified_server() -> TestResult {
    require_agent!();
    let mut found = None;
    let mut scene = Scene::set(test_name!(), &["a"], |shop| {
        let pod = outside(shop, "web", "web")?;
        found = Some((service(shop, "web", 80, "http")?, pod));
        Ok(())
    })?;
    let Some((vip, pod)) = found else { return Ok(()) };
    let clients = WebAuthority::new("clients")?;
    let own = scene.authority.issue("api.example.com")?;
    let server = serve_tls(&pod, TARGET_PORT, "web", &own, None)?;
    let get = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
    let roots = scene.file("ca.pem");
    let is = |status: &'static str, end: &'static str| {
        move |answer: &str| answer.starts_with(status) && answer.trim_end().ends_with(end)
    };
    scene.policy(&format!("{{tls: {{mode: SIMPLE, caCertificates: {roots}, sni: api.example.com}}}}"))?;
    scene.answers(vip, get, is("HTTP/1.1 200", "web sni=api.example.com client=no"))?;
    // Neither another name nor another authority will do, and nothing is sent in plaintext.
    scene.policy(&format!("{{tls: {{mode: SIMPLE, caCertificates: {roots}, sni: other.example.com}}}}"))?;
    scene.answers(vip, get, is("HTTP/1.1 503", "tls_wrong_identity"))?;
    std::fs::write(scene.files.join("strangers.pem"), &clients.certificate)?;
    let strangers = scene.file("strangers.pem");
    scene.policy(&format!("{{tls: {{mode: SIMPLE, caCertificates: {strangers}, sni: api.example.com}}}}"))?;
    scene.answers(vip, get, is("HTTP/1.1 503", "tls_unknown_issuer"))?;
    // The agent may read what policies must not name.
    scene.policy(
        "{tls: {mode: SIMPLE, caCertificates: /etc/ssl/certs/ca-certificates.crt, sni: api.example.com}}",
    )?;
    scene.answers(vip, get, is("HTTP/1.1 503", "tls_setup"))?;
    let said = || scene.agents.iter().any(|agent| agent.log_text().contains("--tls-files"));
    eventually(SOON, said, |said| *said)?;
    // The other name is good as well, if the policy says that the certificate may have this one.
    let names = "sni: other.example.com, subjectAltNames: [api.example.com]";
    scene.policy(&format!("{{tls: {{mode: SIMPLE, caCertificates: {roots}, {names}}}}}"))?;
    scene.answers(vip, get, is("HTTP/1.1 200", "web sni=other.example.com client=no"))?;
    drop(server);
    scene.servers.push(serve_tls(&pod, TARGET_PORT, "strict", &own, Some(&clients))?);
    let shown = clients.issue("client")?;
    std::fs::write(scene.files.join("cert.pem"), &shown.certificate)?;
    std::fs::write(scene.files.join("key.pem"), &shown.key)?;
    let (cert, key) = (scene.file("cert.pem"), scene.file("key.pem"));
    let files = format!("caCertificates: {roots}, clientCertificate: {cert}, privateKey: {key}");
    scene.policy(&format!("{{tls: {{mode: MUTUAL, {files}, sni: api.example.com}}}}"))?;
    scene.answers(vip, get, is("HTTP/1.1 200", "strict sni=api.example.com client=yes"))?;
    Ok(())
}

#[test]
fn servers_see_proxy_headers_and_http_proxies_are_gone_through() -> TestResult {
    require_agent!();
    let mut found = None;
    let mut scene = Scene::set(test_name!(), &["a"], |shop| {
        let (web, target) = (outside(shop, "web", "web")?, outside(shop, "target", "target")?);
        found = Some((service(shop, "web", 9000, "tcp")?, web, target));
        Ok(())
    })?;
    let Some((vip, web, target)) = found else { return Ok(()) };
    let echo = serve_echo(&web, TARGET_PORT)?;
    scene.policy("{proxyProtocol: {version: V1}}")?;
    let from_to = format!("PROXY TCP4 {} {} ", scene.client.ip4(), vip.v4.ip());
    scene.answers(vip, "ping", |answer| {
        answer.starts_with(&from_to) && answer.ends_with(" 9000\\r\\nping\n")
    })?;
    scene.policy("{proxyProtocol: {version: V2}}")?;
    let signature = r"\r\n\r\n\x00\r\nQUIT\n!\x11\x00\x0c";
    scene.answers(vip, "ping", |answer| answer.starts_with(signature) && answer.ends_with("ping\n"))?;
    drop(echo);
    scene.servers.push(serve_connect(&web, TARGET_PORT)?);
    scene.servers.push(serve_echo(&target, TARGET_PORT)?);
    let host = target.ip4();
    scene.policy(&format!(
        "{{tunnel: {{protocol: CONNECT, targetHost: {host}, targetPort: {TARGET_PORT}}}}}"
    ))?;
    scene.answers(vip, "ping", |answer| answer == "ping\n")?;
    Ok(())
}
