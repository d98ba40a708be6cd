//! Real servers behind a rule, on one node and across nodes: nginx, HTTP/2, gRPC, WebSocket.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::backends::serve_connect;
use mesh_tests::shop::TARGET_PORT;
use mesh_tests::web::messages::{Ask, Call, Chat, Script, Told};
use mesh_tests::web::{self, Nginx, WebScene};
use mesh_tests::{Failure, Pod, Shop, TestResult, eventually, require_agent, require_nginx, test_name};

const SOON: Duration = Duration::from_secs(10);

/// Everything that arrives on a raw connection until it ends.
fn raw(client: &Pod, to: SocketAddr, bytes: &str) -> Result<String, Failure> {
    let connection = client.tool()?.connect(to)?;
    connection.send(bytes)?;
    let mut all = String::new();
    loop {
        let piece = connection.recv_within(65_536, Duration::from_secs(10))?;
        if piece.is_empty() {
            return Ok(all);
        }
        all += &piece;
    }
}

/// Memory of a process, in bytes.
fn rss(pid: u32) -> Result<u64, Failure> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kilobytes.ok_or_else(|| anyhow::anyhow!("no VmRSS"))? << 10)
}

const NGINX: &str = "
    add_header x-connection $connection always; add_header x-request $connection_requests always;
    if_modified_since before;
    location = /up { client_max_body_size 1m; return 204; }
    location = /echo { add_header x-length $content_length always; return 200 \"$request_method $http_host\\n\"; }
    location = /none { return 204; }
    location = /moved { return 302 /hello.txt; }
    location = /slow.bin { alias www/large.bin; limit_rate 8m; }
";

const ROUTE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [near]
  http:
  - match: [{uri: {prefix: /there/}}]
    rewrite: {uri: /}
    route: [{destination: {host: far}}]
  - route: [{destination: {host: near}}]
";

#[test]
fn nginx_serves_through_a_rule_on_one_node_and_across_nodes() -> TestResult {
    require_nginx!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let _near = Nginx::start(shop.world(), &near, web::HTTP_PORT, NGINX)?;
    let _far = Nginx::start(shop.world(), &far, web::HTTP_PORT, NGINX)?;
    shop.service("far", 80)?;
    let vip = shop.service("near", 80)?;
    let _agents = shop.start_agents()?;
    shop.world().manifests().apply_text("route.yaml", ROUTE)?;
    let get = |path: &str| web::ask_once(&client, vip.v4, false, Ask::get("near", path));
    let hello =
        |path: &str| get(path).map(|told| (told.status, told.text)).map_err(|error| format!("{error:?}"));
    let good = Ok((200, "hello from nginx\n".to_owned()));
    for path in ["/hello.txt", "/there/hello.txt"] {
        eventually(SOON, || hello(path), |told| *told == good)?.ok();
    }

    for prefix in ["/", "/there/"] {
        let at = |path: &str| Ask::get("near", &format!("{prefix}{path}"));
        let script = |requests| Script { to: vip.v4, http2: false, requests };
        // One connection of the client's, and one of the agent's to nginx.
        let told = web::ask(&client, &script(vec![at("hello.txt"); 20]))?;
        assert!(told.iter().all(|told| told.status == 200 && told.error.is_none()), "{told:?}");
        let numbers: Vec<_> = told.iter().filter_map(|told| told.header("x-connection")).collect();
        assert!(numbers.windows(2).all(|two| two[0] == two[1]) && numbers.len() == 20, "{numbers:?}");

        let told = web::ask(
            &client,
            &script(vec![
                at("hello.txt").method("HEAD"),
                at("none"),
                at("hello.txt").header("if-modified-since", "Fri, 01 Jan 2100 00:00:00 GMT"),
                at("hello.txt").header("range", "bytes=0-4"),
                at("large.bin"),
                at("moved"),
                at("nothing-here"),
                at("echo").posting(100_000),
                at("echo").posting(100_000).chunked(),
                at("up").posting(2 << 20),
                at("hello.txt"),
            ]),
        )?;
        let of = |index: usize| -> (u16, u64, Option<&str>) {
            let told = &told[index];
            (told.status, told.bytes, told.error.as_deref())
        };
        assert_eq!(of(0), (200, 0, None));
        assert_eq!(told[0].header("content-length"), Some("17"), "what a GET would have");
        assert_eq!(of(1), (204, 0, None));
        assert_eq!(told[1].header("content-length"), None);
        assert_eq!(of(2), (304, 0, None));
        assert_eq!(of(3), (206, 5, None));
        assert_eq!(told[3].text, "hello");
        assert_eq!(of(4), (200, 4 << 20, None));
        assert_eq!(told[5].status, 302);
        assert_eq!(told[6].status, 404);
        assert_eq!(told[7].text, "POST near\n");
        assert_eq!(told[7].header("x-length"), Some("100000"));
        assert_eq!(of(8).0, 200);
        assert_eq!(told[9].status, 413, "{:?}", told[9]);
        assert_eq!(of(10), (200, 17, None), "after a refused body, perhaps on another connection");

        // What a library would not send: requests behind each other, HTTP/1.0, and a question before the body.
        let path = format!("{prefix}hello.txt");
        let two = format!(
            "GET {path} HTTP/1.1\r\nHost: near\r\n\r\nGET {path} HTTP/1.1\r\nHost: near\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(raw(&client, vip.v4, &two)?.matches("hello from nginx").count(), 2);
        let old = raw(&client, vip.v4, &format!("GET {path} HTTP/1.0\r\nHost: near\r\n\r\n"))?;
        assert!(old.starts_with("HTTP/1.0 200 ") || old.starts_with("HTTP/1.1 200 "), "{old}");
        assert!(old.ends_with("hello from nginx\n") && !old.contains("chunked"), "{old}");
    }

    // Taken slowly: what nginx sends waits there, not in the agent.
    let (old, slow) = (rss(_agents[0].pid())?, Ask { dawdle_ms: 500, ..Ask::get("near", "/huge.bin") });
    let told = web::ask_once(&client, vip.v6, false, slow)?;
    assert_eq!((told.status, told.bytes), (200, 64 << 20), "by IPv6");
    let grown = rss(_agents[0].pid())?.saturating_sub(old);
    assert!(grown < 32 << 20, "{grown} bytes");
    Ok(())
}

fn is_good(told: &[Told]) -> bool {
    told.iter().all(|told| told.status == 200 && told.error.is_none())
}

#[test]
fn http_2_bodies_and_trailers_pass_between_all_versions_and_large_ones_do_not_fill_the_agent() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    scene.route("  - match: [{uri: {prefix: /2}}]\n    route: [{destination: {host: web, subset: v2}}]\n  - route: [{destination: {host: web, subset: v1}}]\n")?;
    scene.settles(Ask::get("web", "/1"), |told| told.header("x-server") == Some("v1"))?;
    const LARGE: u64 = 50 << 20;
    let before = rss(scene.agents[0].pid())?.max(rss(scene.agents[1].pid())?);
    // By port 80 the server is spoken to in HTTP/1.1, by 82 in HTTP/2.
    for (http2, port, seen) in
        [(false, 80, "HTTP/1.1"), (true, 80, "HTTP/1.1"), (false, 82, "HTTP/2.0"), (true, 82, "HTTP/2.0")]
    {
        for path in ["/1", "/2"] {
            let at = |query: &str| Ask::get("web", &format!("{path}?{query}"));
            let told = web::ask(
                &scene.client,
                &Script {
                    to: scene.at(port),
                    http2,
                    requests: vec![
                        at("").posting(1000).trailer("x-sum", "7").header("te", "trailers"),
                        at("trailers=1").header("te", "trailers"),
                        at("chunks=100000"),
                        at("").method("HEAD"),
                        at("").method("OPTIONS"),
                        at("").posting(200_000).chunked(),
                    ],
                },
            )?;
            let what = format!("http2 {http2}, port {port}, {path}: {told:?}");
            assert!(is_good(&told), "{what}");
            let first = told[0].seen()?;
            assert_eq!(
                (first.version.as_str(), first.bytes, first.host.as_str()),
                (seen, 1000, "web"),
                "{what}"
            );
            assert!(first.trailers.contains(&("x-sum".to_owned(), "7".to_owned())), "{what}");
            assert!(told[1].trailers.iter().any(|(name, _)| name == "x-checksum"), "{what}");
            assert_eq!(told[2].bytes, 100_000, "{what}");
            assert_eq!(told[3].bytes, 0, "{what}");
            assert_eq!(told[5].seen()?.bytes, 200_000, "{what}");
        }
        let large = vec![
            Ask::get("web", "/1").posting(LARGE),
            Ask { dawdle_ms: 200, ..Ask::get("web", &format!("/2?bytes={LARGE}")) },
        ];
        let told = web::ask(&scene.client, &Script { to: scene.at(port), http2, requests: large })?;
        assert!(is_good(&told), "{told:?}");
        assert_eq!((told[0].seen()?.bytes, told[1].bytes), (LARGE, LARGE));
        for agent in &scene.agents {
            let grown = rss(agent.pid())?.saturating_sub(before);
            assert!(grown < LARGE, "{grown} bytes more for {LARGE}");
        }
    }
    Ok(())
}

#[test]
fn grpc_calls_of_all_shapes_pass_with_their_statuses() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    let call = |to: SocketAddr, method: &str, messages: &[&str]| {
        let messages = messages.iter().map(|text| (*text).to_owned()).collect();
        let (authority, method) = ("web:90".to_owned(), method.to_owned());
        Call { to, authority, method, messages, headers: Vec::new(), deadline_ms: None }
    };
    for (version, text) in [("v1", "on one node"), ("v2", "across nodes")] {
        scene.route(&format!("  - route: [{{destination: {{host: web, subset: {version}}}}}]\n"))?;
        scene.settles(Ask::get("web", "/"), |told| told.header("x-server") == Some(version))?;
        for to in [scene.at(90), scene.vip.at_port(90).v6] {
            let called =
                |method: &str, messages: &[&str]| web::call(&scene.client, &call(to, method, messages));
            assert_eq!(called("Unary", &["hi"])?.said(), Ok(vec![&*format!("{version}: hi")]), "{text}");
            let many = called("Many", &["300"])?;
            assert_eq!((many.code, many.messages.len()), (0, 300), "{text}");
            let said: Vec<String> = (0..50).map(|n| format!("message {n}")).collect();
            let said: Vec<&str> = said.iter().map(String::as_str).collect();
            let talked = called("Talk", &said)?;
            assert_eq!((talked.code, talked.messages.len()), (0, 50), "{text}");
            assert_eq!(talked.messages[49], format!("{version}: message 49"));
            let failed = called("Fail", &["9"])?;
            assert_eq!((failed.code, failed.message.as_str()), (9, "as asked"), "{text}");
            assert_eq!(called("None", &["x"])?.code, 12, "{text}");
        }
    }
    // The deadline is the client's; where no rule says otherwise the mesh keeps it.
    let late = Call { deadline_ms: Some(300), ..call(scene.at(90), "Slow", &["5000"]) };
    let late = web::call(&scene.client, &late)?;
    // The server knows it, too, and may be the one to say so.
    assert!(matches!(late.code, 1 | 4 | 14) && late.messages.is_empty(), "{late:?}");
    let soon = Call { deadline_ms: Some(20_000), ..call(scene.at(90), "Slow", &["100"]) };
    assert_eq!(web::call(&scene.client, &soon)?.messages.len(), 1);

    // Faults are said in gRPC's own words.
    scene.route("  - match: [{headers: {x-who: {exact: me}}}]\n    fault: {abort: {percentage: {value: 100}, grpcStatus: RESOURCE_EXHAUSTED}}\n    route: [{destination: {host: web}}]\n  - route: [{destination: {host: web}}]\n")?;
    let mine = Call { headers: vec![("x-who".into(), "me".into())], ..call(scene.at(90), "Unary", &["hi"]) };
    let code =
        || web::call(&scene.client, &mine).map(|called| called.code).map_err(|error| format!("{error:?}"));
    eventually(SOON, code, |code| *code == Ok(8))?.ok();
    assert_eq!(web::call(&scene.client, &call(scene.at(90), "Unary", &["hi"]))?.code, 0);
    Ok(())
}

/// Of two proxies, by a header; a third is not there.
const TUNNELS: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: tunnels, namespace: shop}
spec:
  hosts: [one]
  http:
  - match: [{headers: {x-to: {exact: two}}}]
    route: [{destination: {host: two}}]
  - match: [{headers: {x-to: {exact: nobody}}}]
    route: [{destination: {host: nobody}}]
  - route: [{destination: {host: one}}]
";

#[test]
fn websockets_talk_through_a_rule_and_tunnels_go_where_the_rule_says() -> TestResult {
    require_agent!();
    let scene = WebScene::set(test_name!())?;
    for version in ["v1", "v2"] {
        scene.route(&format!("  - route: [{{destination: {{host: web, subset: {version}}}}}]\n"))?;
        scene.settles(Ask::get("web", "/"), |told| told.header("x-server") == Some(version))?;
        let messages: Vec<String> = (0..12).map(|n| format!("{n}: {}", "z".repeat(n * 800))).collect();
        for to in [scene.at(81), scene.vip.at_port(81).v6] {
            let chat = Chat { to, host: "web:81".into(), path: "/chat".into(), messages: messages.clone() };
            assert_eq!(web::chat(&scene.client, &chat)?, messages, "{version}");
        }
    }
    // Through an HTTP proxy to where the client says; which proxy, by the rule.
    let shop = &scene.shop;
    let mut proxies = Vec::new();
    let mut vips = Vec::new();
    for (node, name) in [("a", "one"), ("b", "two")] {
        let pod = shop.world().node(node)?.pod(&format!("shop/{name}"))?;
        let manifest = pod.manifest().label("nodemesh.dev/mesh", "none");
        shop.world().manifests().apply(manifest.port("http", TARGET_PORT))?;
        vips.push(shop.service(name, 3128)?);
        proxies.push((serve_connect(&pod, TARGET_PORT)?, pod));
    }
    let target = shop.unmeshed_pod("a", "target")?;
    let _target = shop.serve(&target)?;
    scene.apply("tunnels.yaml", TUNNELS)?;
    let to = target.at4(TARGET_PORT);
    let tunnel = |header: &str| -> Result<String, Failure> {
        let connection = scene.client.tool()?.connect(vips[0].v4)?;
        connection.send(&format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{header}\r\n"))?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let line = connection.recv_line()?;
            if line.is_empty() {
                break;
            }
            head += &line;
        }
        if !head.starts_with("HTTP/1.1 200 ") {
            return Ok(head);
        }
        // Several words, each answered: who is there sees the proxy.
        let first = connection.who()?;
        let second = connection.who()?;
        assert_eq!((&first.server, first.accepted_from), (&second.server, second.accepted_from));
        let from = first.accepted_from.ip().to_canonical();
        let proxy = proxies.iter().find(|(_, pod)| from == pod.ip4());
        Ok(format!("{} by {}", first.server, proxy.map_or("nobody", |(_, pod)| pod.name())))
    };
    for (header, wanted) in [("", "target by one"), ("x-to: two\r\n", "target by two")] {
        let seen = || tunnel(header).map_err(|error| format!("{error:?}"));
        drop(eventually(SOON, seen, |seen| seen.as_deref() == Ok(wanted))?);
    }
    // Nobody to tunnel through.
    let refused = tunnel("x-to: nobody\r\n")?;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");

    // No rule for a server that does not switch: its answer is passed on.
    let refused = scene.ask(
        Ask::get("web", "/")
            .header("connection", "upgrade")
            .header("upgrade", "h2c")
            .header("http2-settings", "AAMAAABk"),
    )?;
    assert_eq!(
        (refused.status, refused.version.as_str()),
        (200, "HTTP/1.1"),
        "h2c by upgrade is not offered"
    );
    assert_eq!(refused.seen()?.header("upgrade"), None);
    assert_eq!(refused.seen()?.header("http2-settings"), None);
    Ok(())
}
