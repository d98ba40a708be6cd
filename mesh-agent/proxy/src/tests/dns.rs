//! DNS queries over real sockets: answered from the snapshot, or by a resolver that the test plays.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name as DnsName, RData, Record, RecordType, rdata::A},
};
use mesh_core::snapshot::{Protocol, Service};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::Instant,
};

use super::fixture::{World, endpoint, eventually, in_world, service, soon};
use crate::metrics::DnsOutcome;

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(
        false,
        |settings| settings.dns.in_flight_max = 4,
        |world| async move {
            let mut headless = service("many", [10, 96, 0, 9].into(), Vec::new());
            (headless.headless, headless.vips) = (true, Vec::new());
            headless.ports[0].endpoints =
                (1..=200).map(|i| endpoint(([10, 0, 1, i], 80).into(), None)).collect();
            let mut outside = Service::named(mesh_core::snapshot::Name::new("default", "outside"));
            outside.external_name = Some("db.example.com".into());
            world.publish(
                Vec::new(),
                vec![service("web", [10, 96, 0, 1].into(), Vec::new()), headless, outside],
            );
            body(world).await;
        },
    );
}

fn query(id: u16, name: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(DnsName::from_ascii(name).unwrap(), record_type));
    message
}

async fn client(world: &World) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(("127.0.0.1", world.dns_udp)).await.unwrap();
    socket
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut buf = [0; 4096];
    let len = soon(socket.recv(&mut buf)).await.unwrap();
    Message::from_vec(&buf[..len]).unwrap()
}

async fn ask(world: &World, message: &Message) -> Message {
    let socket = client(world).await;
    socket.send(&message.to_vec().unwrap()).await.unwrap();
    receive(&socket).await
}

fn addrs(message: &Message) -> Vec<IpAddr> {
    message.answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}

/// A resolver played by the test.
async fn resolver(world: &World) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    *world.kernel.resolver.lock().unwrap() = Some(socket.local_addr().unwrap());
    socket
}

async fn receive_from(socket: &UdpSocket) -> (Message, SocketAddr) {
    let mut buf = [0; 4096];
    let (len, from) = soon(socket.recv_from(&mut buf)).await.unwrap();
    (Message::from_vec(&buf[..len]).unwrap(), from)
}

/// The reply of a resolver that knows one address for every name.
fn resolved(query: &Message, addr: Ipv4Addr) -> Vec<u8> {
    let mut reply = Message::response(query.metadata.id, OpCode::Query);
    reply.queries = query.queries.clone();
    reply.answers = vec![Record::from_rdata(query.queries[0].name().clone(), 60, RData::A(A(addr)))];
    reply.to_vec().unwrap()
}

#[test]
fn a_service_is_answered_under_every_name_with_the_clients_id() {
    test(|world| async move {
        for (id, name) in
            [(1, "web"), (2, "web.default"), (3, "web.default.svc.cluster.local."), (4, "WEB.default.SVC")]
        {
            let reply = ask(&world, &query(id, name, RecordType::A)).await;
            assert_eq!(
                (reply.metadata.id, reply.metadata.response_code),
                (id, ResponseCode::NoError),
                "{name}"
            );
            assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
            assert_eq!(addrs(&reply), [IpAddr::from([10, 96, 0, 1])], "{name}");
            assert_eq!(reply.answers[0].ttl, 30);
        }
        assert_eq!(world.dns(DnsOutcome::Answered), 4);
    });
}

#[test]
fn the_other_family_of_a_name_is_no_data_and_may_be_remembered() {
    test(|world| async move {
        let reply = ask(&world, &query(7, "web.default.svc.cluster.local.", RecordType::AAAA)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert!(reply.answers.is_empty());
        let [soa] = &reply.authorities[..] else { panic!("{reply:?}") };
        assert_eq!((soa.record_type(), soa.ttl), (RecordType::SOA, 30));
        assert_eq!(world.dns(DnsOutcome::NoData), 1);
    });
}

#[test]
fn a_reply_leaves_from_the_address_its_query_went_to() {
    test(|world| async move {
        for (own, to) in [("127.0.0.1:0", "127.0.0.5"), ("[::1]:0", "::1")] {
            let socket = UdpSocket::bind(own).await.unwrap();
            let to = SocketAddr::new(to.parse().unwrap(), world.dns_udp);
            socket.send_to(&query(9, "web", RecordType::A).to_vec().unwrap(), to).await.unwrap();
            let (_, from) = receive_from(&socket).await;
            assert_eq!(from, to);
        }
    });
}

#[test]
fn what_does_not_fit_a_datagram_is_truncated_and_whole_over_tcp() {
    test(|world| async move {
        let plain = query(3, "many", RecordType::A);
        let mut with_edns = plain.clone();
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        with_edns.set_edns(edns);
        let socket = client(&world).await;
        for (message, max) in [(&plain, 512), (&with_edns, 1232)] {
            socket.send(&message.to_vec().unwrap()).await.unwrap();
            let mut buf = [0; 4096];
            let len = soon(socket.recv(&mut buf)).await.unwrap();
            assert!(len <= max, "{len}");
            let reply = Message::from_vec(&buf[..len]).unwrap();
            assert!(reply.metadata.truncation);
            assert!(!reply.answers.is_empty(), "a part is better than nothing");
            assert_eq!(reply.edns.is_some(), message.edns.is_some());
        }
        let mut stream = TcpStream::connect(world.dns_tcp).await.unwrap();
        for id in [5, 6] {
            let bytes = query(id, "many", RecordType::A).to_vec().unwrap();
            stream.write_u16(bytes.len() as u16).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let len = soon(stream.read_u16()).await.unwrap();
            let mut bytes = vec![0; usize::from(len)];
            soon(stream.read_exact(&mut bytes)).await.unwrap();
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!((reply.metadata.id, reply.metadata.truncation, reply.answers.len()), (id, false, 200));
        }
    });
}

#[test]
fn headless_addresses_come_in_varying_order() {
    test(|world| async move {
        let mut firsts: Vec<IpAddr> = Vec::new();
        for id in 0..20 {
            firsts.push(addrs(&ask(&world, &query(id, "many", RecordType::A)).await)[0]);
        }
        firsts.sort_unstable();
        firsts.dedup();
        assert!(firsts.len() > 5, "{firsts:?}");
    });
}

#[test]
fn an_unknown_name_is_forwarded_under_another_id_and_the_reply_comes_back_under_the_clients() {
    test(|world| async move {
        let resolver = resolver(&world).await;
        let mut ids = Vec::new();
        for _ in 0..8 {
            let socket = client(&world).await;
            socket.send(&query(1234, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
            let (asked, from) = receive_from(&resolver).await;
            assert_eq!(asked.queries[0].name().to_ascii(), "example.com.");
            ids.push((asked.metadata.id, from.port()));
            resolver.send_to(&resolved(&asked, [192, 0, 2, 1].into()), from).await.unwrap();
            let reply = receive(&socket).await;
            assert_eq!((reply.metadata.id, addrs(&reply)), (1234, vec![IpAddr::from([192, 0, 2, 1])]));
        }
        let distinct = |mut all: Vec<u16>| {
            all.sort_unstable();
            all.dedup();
            all.len()
        };
        assert!(distinct(ids.iter().map(|(id, _)| *id).collect()) >= 7, "{ids:?}");
        assert!(distinct(ids.iter().map(|(_, port)| *port).collect()) >= 7, "{ids:?}");
        assert_eq!(world.dns(DnsOutcome::Forwarded), 8);
    });
}

#[test]
fn garbage_and_forged_replies_are_ignored_until_the_right_one_comes() {
    test(|world| async move {
        let resolver = resolver(&world).await;
        let socket = client(&world).await;
        socket.send(&query(1, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
        let (asked, from) = receive_from(&resolver).await;
        let good = resolved(&asked, [192, 0, 2, 1].into());
        let mut other_id = good.clone();
        other_id[0] ^= 1;
        let other_name = resolved(&query(asked.metadata.id, "evil.com.", RecordType::A), [6, 6, 6, 6].into());
        for forged in [&b"x"[..], b"", &[0xff; 40], &other_id, &other_name, &asked.to_vec().unwrap()] {
            resolver.send_to(forged, from).await.unwrap();
        }
        // From elsewhere even the right bytes never arrive: the socket is connected.
        let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        stranger.send_to(&resolved(&asked, [6, 6, 6, 6].into()), from).await.unwrap();
        resolver.send_to(&good, from).await.unwrap();
        assert_eq!(addrs(&receive(&socket).await), [IpAddr::from([192, 0, 2, 1])]);
        assert_eq!(world.dns(DnsOutcome::BadReply), 6);
    });
}

#[test]
fn a_resolver_that_does_not_answer_costs_the_time_out_and_gives_a_failure() {
    in_world(
        true,
        |_| {},
        |world| async move {
            let _resolver = resolver(&world).await;
            let begun = Instant::now();
            let socket = client(&world).await;
            socket.send(&query(8, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
            let mut buf = [0; 512];
            let len = socket.recv(&mut buf).await.unwrap();
            let reply = Message::from_vec(&buf[..len]).unwrap();
            assert_eq!((reply.metadata.id, reply.metadata.response_code), (8, ResponseCode::ServFail));
            assert_eq!(begun.elapsed().as_secs(), 5);
            assert_eq!(world.dns(DnsOutcome::TimedOut), 1);
        },
    );
}

#[test]
fn a_closed_or_unknown_resolver_fails_at_once() {
    test(|world| async move {
        let begun = Instant::now();
        let reply = ask(&world, &query(8, "example.com.", RecordType::A)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
        drop(resolver(&world).await);
        let reply = ask(&world, &query(9, "example.com.", RecordType::A)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(world.dns(DnsOutcome::Unreachable), 2);
        assert!(begun.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn a_flood_is_bounded_and_answers_of_ours_go_on() {
    test(|world| async move {
        let resolver = resolver(&world).await;
        let socket = client(&world).await;
        for id in 0..50 {
            socket.send(&query(id, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
        }
        eventually(|| world.dns(DnsOutcome::Overloaded), |n| *n == 46).await;
        let mut waiting = Vec::new();
        for _ in 0..4 {
            waiting.push(receive_from(&resolver).await);
        }
        assert!(tokio::time::timeout(Duration::from_millis(50), resolver.recv(&mut [0; 64])).await.is_err());
        assert_eq!(addrs(&ask(&world, &query(99, "web", RecordType::A)).await).len(), 1);
        // Places become free as replies come.
        for (asked, from) in waiting {
            resolver.send_to(&resolved(&asked, [192, 0, 2, 1].into()), from).await.unwrap();
            receive(&socket).await;
        }
        socket.send(&query(77, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
        receive_from(&resolver).await;
    });
}

#[test]
fn an_alias_out_of_the_mesh_is_followed_by_the_resolver() {
    test(|world| async move {
        let resolver = resolver(&world).await;
        let socket = client(&world).await;
        socket
            .send(&query(21, "outside.default.svc.cluster.local.", RecordType::A).to_vec().unwrap())
            .await
            .unwrap();
        let (asked, from) = receive_from(&resolver).await;
        assert_eq!(asked.queries[0].name().to_ascii(), "db.example.com.");
        resolver.send_to(&resolved(&asked, [192, 0, 2, 7].into()), from).await.unwrap();
        let reply = receive(&socket).await;
        assert_eq!(reply.metadata.id, 21);
        assert_eq!(reply.queries[0].name().to_ascii(), "outside.default.svc.cluster.local.");
        let types: Vec<RecordType> = reply.answers.iter().map(Record::record_type).collect();
        assert_eq!(types, [RecordType::CNAME, RecordType::A]);
        assert_eq!(addrs(&reply), [IpAddr::from([192, 0, 2, 7])]);
    });
}

#[test]
fn a_resolver_that_is_a_service_is_asked_at_one_of_its_endpoints() {
    test(|world| async move {
        let resolver = resolver(&world).await;
        let vip = IpAddr::from([10, 96, 0, 10]);
        let mut dns = service("kube-dns", vip, vec![endpoint(resolver.local_addr().unwrap(), None)]);
        (dns.ports[0].port, dns.ports[0].protocol) = (53, Protocol::Udp);
        world.publish(Vec::new(), vec![dns]);
        *world.kernel.resolver.lock().unwrap() = Some(SocketAddr::new(vip, 53));
        let socket = client(&world).await;
        socket.send(&query(1, "example.com.", RecordType::A).to_vec().unwrap()).await.unwrap();
        receive_from(&resolver).await;
    });
}

#[test]
fn queries_over_tcp_are_forwarded_over_tcp() {
    test(|world| async move {
        let resolver = TcpListener::bind("127.0.0.1:0").await.unwrap();
        *world.kernel.resolver.lock().unwrap() = Some(resolver.local_addr().unwrap());
        let mut stream = TcpStream::connect(world.dns_tcp).await.unwrap();
        let bytes = query(5, "example.com.", RecordType::A).to_vec().unwrap();
        stream.write_u16(bytes.len() as u16).await.unwrap();
        stream.write_all(&bytes).await.unwrap();

        let (mut upstream, _) = soon(resolver.accept()).await.unwrap();
        let len = soon(upstream.read_u16()).await.unwrap();
        let mut bytes = vec![0; usize::from(len)];
        upstream.read_exact(&mut bytes).await.unwrap();
        let reply = resolved(&Message::from_vec(&bytes).unwrap(), [192, 0, 2, 1].into());
        upstream.write_u16(reply.len() as u16).await.unwrap();
        upstream.write_all(&reply).await.unwrap();

        let len = soon(stream.read_u16()).await.unwrap();
        let mut bytes = vec![0; usize::from(len)];
        soon(stream.read_exact(&mut bytes)).await.unwrap();
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!((reply.metadata.id, addrs(&reply)), (5, vec![IpAddr::from([192, 0, 2, 1])]));
    });
}

#[test]
fn replies_and_fragments_are_not_answered_and_unreadable_queries_are_refused() {
    test(|world| async move {
        let socket = client(&world).await;
        let reply = Message::response(1, OpCode::Query).to_vec().unwrap();
        for silent in [&reply[..], b"", b"short"] {
            socket.send(silent).await.unwrap();
        }
        let mut broken = query(4, "web", RecordType::A).to_vec().unwrap();
        broken.truncate(broken.len() - 3);
        socket.send(&broken).await.unwrap();
        let refused = receive(&socket).await;
        assert_eq!((refused.metadata.id, refused.metadata.response_code), (4, ResponseCode::FormErr));
        assert!(tokio::time::timeout(Duration::from_millis(50), socket.recv(&mut [0; 64])).await.is_err());
    });
}

#[test]
fn a_silent_tcp_client_is_let_go() {
    in_world(
        true,
        |_| {},
        |world| async move {
            let mut stream = TcpStream::connect(world.dns_tcp).await.unwrap();
            let begun = Instant::now();
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            assert_eq!(begun.elapsed().as_secs(), 10);
        },
    );
}
