//! Tests with a name server that answers what each test wants.

use hickory_proto::rr::{
    Record,
    rdata::{A, CNAME},
};

use super::*;

/// A server that makes its reply of each query, by UDP, until the test ends.
async fn server(reply: impl Fn(Message) -> Option<Message> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut bytes = vec![0; 4096];
        while let Ok((len, from)) = socket.recv_from(&mut bytes).await {
            let query = Message::from_vec(&bytes[..len]).unwrap();
            if let Some(reply) = reply(query) {
                socket.send_to(&reply.to_vec().unwrap(), from).await.unwrap();
            }
        }
    });
    addr
}

fn reply_to(query: &Message, code: ResponseCode, records: &[(&str, u32, RData)]) -> Message {
    let mut reply = Message::response(query.metadata.id, OpCode::Query);
    reply.queries = query.queries.clone();
    reply.metadata.response_code = code;
    let record = |(name, ttl, data): &(&str, u32, RData)| {
        Record::from_rdata(wire::absolute(name).unwrap(), *ttl, data.clone())
    };
    reply.answers = records.iter().map(record).collect();
    reply
}

fn a(last: u8) -> RData {
    RData::A(A(Ipv4Addr::new(192, 0, 2, last)))
}

fn is_v4(query: &Message) -> bool {
    query.queries[0].query_type() == RecordType::A
}

async fn ask_for(servers: &[SocketAddr], name: &str) -> Answer {
    Lookup::default().addresses(servers, name).await
}

#[tokio::test]
async fn aliases_are_followed_and_the_shortest_time_counts() {
    let server = server(|query| {
        let alias = RData::CNAME(CNAME(wire::absolute("real.y.").unwrap()));
        let records = [
            ("a.x.", 7, alias),
            ("real.y.", 30, a(1)),
            ("real.y.", 20, a(2)),
            ("other.y.", 3, a(9)),
            ("real.y.", 30, RData::A(A(Ipv4Addr::LOCALHOST))),
        ];
        let records = if is_v4(&query) { &records[..] } else { &[] };
        Some(reply_to(&query, ResponseCode::NoError, records))
    })
    .await;
    let answer = ask_for(&[server], "A.x").await;
    let said = answer.v4.unwrap();
    assert_eq!(said.addrs, ["192.0.2.1".parse::<IpAddr>().unwrap(), "192.0.2.2".parse().unwrap()]);
    assert_eq!(said.ttl, Duration::from_secs(7));
    assert!(answer.v6.unwrap().addrs.is_empty());
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_fails_and_failures_have_names() {
    let broken = server(|query| Some(reply_to(&query, ResponseCode::ServFail, &[]))).await;
    let good = server(|query| Some(reply_to(&query, ResponseCode::NoError, &[("a.x.", 5, a(1))]))).await;
    let missing = server(|query| Some(reply_to(&query, ResponseCode::NXDomain, &[]))).await;
    assert_eq!(ask_for(&[broken, good], "a.x").await.v4.unwrap().addrs.len(), 1);
    assert_eq!(ask_for(&[broken], "a.x").await.v4, Err(Failure::ServerFailure));
    assert_eq!(ask_for(&[missing, good], "a.x").await.v4, Err(Failure::NoSuchName));
    assert_eq!(ask_for(&[], "a.x").await.v4, Err(Failure::NoServer));
    assert_eq!(ask_for(&[good], "a..x").await.v4, Err(Failure::BadName));
}

#[tokio::test(start_paused = true)]
async fn a_forged_reply_is_no_answer() {
    let server = server(|query| {
        let mut reply = reply_to(&query, ResponseCode::NoError, &[("a.x.", 5, a(1))]);
        reply.metadata.id = query.metadata.id.wrapping_add(1);
        Some(reply)
    })
    .await;
    assert_eq!(ask_for(&[server], "a.x").await.v4, Err(Failure::TimedOut));
}

#[test]
fn servers_are_read_as_the_c_library_reads_them() {
    let text = "search x y\n# nameserver 192.0.2.9\nnameserver 192.0.2.1\n  nameserver  2001:db8::1 \nnameserver bad\noptions ndots:5\n";
    let servers = servers_of(text);
    assert_eq!(servers, ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
}
