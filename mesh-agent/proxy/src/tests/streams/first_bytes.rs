//! Rules for TLS: what a client sends first is looked at, and arrives whole.

use super::*;
use crate::hello::HELLO_MAX;

/// A ClientHello for this name, padded by an extension of so many bytes.
fn hello(name: &str, padding: usize) -> Vec<u8> {
    let vector16 =
        |content: &[u8]| [&u16::try_from(content.len()).unwrap().to_be_bytes()[..], content].concat();
    let entry = [&[0][..], &vector16(name.as_bytes())].concat();
    let server_name = [&[0, 0][..], &vector16(&vector16(&entry))].concat();
    let padding = [&[0, 21][..], &vector16(&vec![0; padding])].concat();
    // The name comes last, so that all of it must be there.
    let extensions = vector16(&[padding, server_name].concat());
    let body = [&[3, 3][..], &[7; 32], &[0], &vector16(&[0x13, 1]), &[1, 0], &extensions].concat();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    let mut records = Vec::new();
    for piece in message.chunks(16 << 10) {
        records.extend([22, 3, 1]);
        records.extend(vector16(piece));
    }
    records
}

async fn by_name(world: &World, port_name: &str) {
    let (web, a, b) = (Server::named("W").await, Server::named("A").await, Server::named("B").await);
    let services = vec![
        plain("web", VIP, port_name, &[web.addr]),
        plain("a", "10.96.0.2", "tls", &[a.addr]),
        plain("b", "10.96.0.3", "tls", &[b.addr]),
    ];
    let rules = vec![
        rule(vec![sni(&["a.example.com"])], vec![to("a", 1)]),
        rule(vec![sni(&["*.example.com"])], vec![to("b", 1)]),
    ];
    publish(world, services, table(rules, Vec::new()));
}

#[test]
fn a_server_name_chooses_and_the_hello_arrives_whole() {
    for port_name in ["tls", "unsaid"] {
        test(|world| async move {
            by_name(&world, port_name).await;
            for (name, server) in
                [("a.example.com", 'A'), ("A.Example.Com", 'A'), ("z.example.com", 'B'), ("other.org", 'W')]
            {
                let sent = hello(name, 100);
                let mut client = connect(&world).await;
                client.write_all(&sent).await.unwrap();
                assert_eq!(answered(&mut client, &sent).await, server, "{name} at a port {port_name}");
            }
        });
    }
}

#[test]
fn a_hello_in_many_segments_is_waited_for() {
    test(|world| async move {
        by_name(&world, "tls").await;
        let sent = hello("a.example.com", 6000);
        let mut client = connect(&world).await;
        client.set_nodelay(true).unwrap();
        for piece in sent.chunks(700) {
            client.write_all(piece).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(answered(&mut client, &sent).await, 'A');
    });
}

#[test]
fn a_hello_that_is_too_large_asks_for_no_name() {
    test(|world| async move {
        by_name(&world, "tls").await;
        let sent = hello("a.example.com", HELLO_MAX);
        let mut client = connect(&world).await;
        client.write_all(&sent).await.unwrap();
        assert_eq!(answered(&mut client, &sent).await, 'W');
    });
}

#[test]
fn what_is_no_tls_goes_on_at_once_and_who_is_too_slow_in_time() {
    test(|world| async move {
        by_name(&world, "tls").await;
        let mut client = connect(&world).await;
        client.write_all(b"not TLS").await.unwrap();
        assert_eq!(answered(&mut client, b"not TLS").await, 'W');
        let sent = hello("a.example.com", 100);
        let mut slow = connect(&world).await;
        slow.write_all(&sent[..40]).await.unwrap();
        assert_eq!(answered(&mut slow, &sent[..40]).await, 'W', "after the time for it");
        let mut ended = connect(&world).await;
        ended.write_all(&sent[..40]).await.unwrap();
        ended.shutdown().await.unwrap();
        assert_eq!(answered(&mut ended, &sent[..40]).await, 'W');
    });
}

#[test]
fn a_server_that_speaks_first_is_heard_after_the_wait() {
    test(|world| async move {
        by_name(&world, "unsaid").await;
        let mut client = connect(&world).await;
        assert_eq!(answered(&mut client, b"").await, 'W');
    });
}

#[test]
fn of_an_address_that_is_no_services_the_name_decides() {
    test(|world| async move {
        let (web, outside) = (Server::named("W").await, Server::named("O").await);
        let routes = || {
            let rules = vec![rule(vec![sni(&["web.default.svc.cluster.local"])], vec![to("web", 1)])];
            let Routes { streams, .. } = table(rules, Vec::new());
            let moved =
                streams.into_iter().map(|(at, table)| (HostPort { port: outside.addr.port(), ..at }, table));
            Routes { streams: moved.collect(), ..Routes::default() }
        };
        publish(&world, vec![plain("web", VIP, "tls", &[web.addr])], routes());
        world.dial(outside.addr);
        for (name, server) in [("web.default.svc.cluster.local", 'W'), ("elsewhere.org", 'O')] {
            let sent = hello(name, 10);
            let mut client = connect(&world).await;
            client.write_all(&sent).await.unwrap();
            assert_eq!(answered(&mut client, &sent).await, server, "{name}");
        }
    });
}

#[test]
fn a_host_without_addresses_is_told_by_the_name_that_is_asked_for() {
    test(|world| async move {
        let (own, outside) = (Server::named("N").await, Server::named("O").await);
        let host = |endpoints: &[SocketAddr], resolution: Resolution| {
            let mut service = plain("named", VIP, "tls", endpoints);
            service.hostname = Some("named.example.com".into());
            service.vips = Vec::new();
            service.ports[0].port = outside.addr.port();
            service.resolution = resolution;
            service
        };
        let reaches = async |world: &World, name: &str| {
            world.dial(outside.addr);
            let sent = hello(name, 10);
            let mut client = connect(world).await;
            client.write_all(&sent).await.unwrap();
            let mut first = [0];
            soon(client.read_exact(&mut first)).await.ok().map(|_| char::from(first[0]))
        };
        publish(&world, vec![host(&[own.addr], Resolution::Listed)], Routes::default());
        assert_eq!(reaches(&world, "named.example.com").await, Some('N'));
        assert_eq!(reaches(&world, "other.example.com").await, Some('O'), "as it was dialled");
        // Without endpoints of its own it is where it was dialled, by its policy.
        let policy = |max_connections| {
            let mut policy = TrafficPolicy::default();
            policy.pool.max_connections = Some(max_connections);
            let cluster = Cluster { origin: None, labels: BTreeMap::new(), policy };
            let key = ClusterKey { port: outside.addr.port(), ..key("named") };
            Routes {
                clusters: BTreeMap::from([(key, Scoped::everywhere(Arc::new(cluster)))]),
                ..Routes::default()
            }
        };
        publish(&world, vec![host(&[], Resolution::Dialled)], policy(1));
        assert_eq!(reaches(&world, "named.example.com").await, Some('O'));
        publish(&world, vec![host(&[], Resolution::Dialled)], policy(0));
        assert_eq!(reaches(&world, "named.example.com").await, None, "no connection is allowed");
        assert_eq!(reaches(&world, "other.example.com").await, Some('O'));
        world.ended_so_far(CloseReason::Overflow, 1).await;
    });
}
