//! Servers that answer wrongly: the client gets a 502 or sees that the answer broke off, and no later request gets a part of it.

use std::{cell::Cell, net::SocketAddr, rc::Rc, sync::Arc};

use mesh_core::route::http::{Action, HttpRule, RetryOn};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::spawn_local,
};

use super::fixture::{Client, forward, publish, rule, test};
use crate::tests::fixture::{World, soon};

/// A server that answers the first request of each connection with the first of `answers`, and so on; then it waits. It counts
/// connections.
async fn server(answers: Vec<Vec<u8>>, closes: bool) -> (SocketAddr, Rc<Cell<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let accepted = Rc::new(Cell::new(0));
    let count = Rc::clone(&accepted);
    drop(spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.set(count.get() + 1);
            let answers = answers.clone();
            drop(spawn_local(async move {
                for answer in answers {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    if stream.write_all(&answer).await.is_err() {
                        return;
                    }
                }
                if !closes {
                    stream.read_to_end(&mut Vec::new()).await.ok();
                }
            }));
        }
    }));
    (addr, accepted)
}

fn requests_with(world: &World, flag: &str) -> bool {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &world.registry).unwrap();
    let of_flag = format!("response_flags=\"{flag}\"");
    text.lines().any(|line| line.starts_with("istio_requests_total{") && line.contains(&of_flag))
}

#[test]
fn answers_that_can_be_read_in_two_ways_are_bad_gateways() {
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(200));
    let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(600 << 10));
    for answer in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nX: a\r\n b: c\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/3.1 200 OK\r\n\r\n",
        "SSH-2.0-x\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        &many,
        &long,
    ] {
        let answer = answer.to_owned();
        test(|world| async move {
            let (addr, _) = server(vec![answer.clone().into_bytes()], false).await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            let reply = client.get("/").await;
            let shown = &answer[..answer.len().min(80)];
            assert_eq!(reply.status, 502, "{shown:?}");
            drop(client);
            crate::tests::fixture::eventually(|| requests_with(&world, "UPE"), |counted| *counted).await;
        });
    }
}

#[test]
fn bytes_behind_an_answer_are_never_the_next_ones() {
    const SPLIT: &str =
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    const NO_BODY: &str = "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    for answer in [SPLIT, NO_BODY] {
        test(|world| async move {
            let (addr, accepted) = server(vec![answer.into()], false).await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            for _ in 0..3 {
                let reply = client.get("/").await;
                assert!(!reply.body.contains("evil"), "{reply:?}");
                assert!(matches!(reply.status, 200 | 204), "{reply:?}");
            }
            assert_eq!(accepted.get(), 3, "each on a connection of its own");
        });
    }
}

#[test]
fn an_answer_that_breaks_off_is_seen_to_break_off() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nZ\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloworld\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nFFFFFFFFFFFFFFFFF\r\n",
    ] {
        test(|world| async move {
            let (addr, _) = server(vec![answer.into()], true).await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
            let mut all = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(got @ 1..) = soon(client.stream.read(&mut piece)).await {
                all.extend_from_slice(&piece[..got]);
            }
            let text = String::from_utf8(all).unwrap();
            assert!(text.starts_with("HTTP/1.1 200 "), "{text:?}");
            assert!(!text.ends_with("0\r\n\r\n"), "{text:?} looks complete for {answer:?}");
            let body = text.split_once("\r\n\r\n").unwrap().1;
            assert!(!text.contains("content-length: 10") || body.len() < 10, "{text:?}");
        });
    }
}

#[test]
fn a_server_that_says_nothing_and_goes_is_a_503() {
    for answer in ["", "HTTP/1.1 200 OK\r\nContent-Len"] {
        test(|world| async move {
            let (addr, _) = server(vec![answer.into()], true).await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            assert_eq!(client.get("/").await.status, 503);
            drop(client);
            crate::tests::fixture::eventually(|| requests_with(&world, "UC"), |counted| *counted).await;
        });
    }
}

#[test]
fn hints_before_an_answer_are_passed_on_but_not_to_clients_that_do_not_know_them() {
    const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: close\r\n\r\n";
    const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    test(|world| async move {
        let answers = vec![format!("{HINTS}{HINTS}{ANSWER}").into(); 3];
        let (addr, accepted) = server(answers, false).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for _ in 0..2 {
            client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
            for _ in 0..2 {
                let hints = client.head().await;
                assert_eq!(hints, "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n");
            }
            assert_eq!(client.reply().await.body, "ok");
        }
        client.send("GET / HTTP/1.0\r\nHost: web\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 200);
        assert_eq!(accepted.get(), 1);
    });
}

#[test]
fn whether_a_body_is_wanted_is_for_the_server_to_say() {
    const ASK: &str = "POST / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    // Refused: nobody is asked for the body, and the connection ends with the answer.
    test(|world| async move {
        let refusal = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno";
        let (addr, _) = server(vec![refusal.into()], false).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send(ASK).await;
        let reply = client.reply().await;
        assert_eq!(
            (reply.status, reply.body.as_str(), reply.header("connection")),
            (417, "no", Some("close"))
        );
        assert!(client.is_ended().await);
        crate::tests::fixture::eventually(|| world.worker.connections.len(), |open| *open == 0).await;
    });
    // Wanted: only then the client is told.
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send(ASK).await;
        let (mut stream, _) = soon(listener.accept()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon(stream.read_u8()).await.unwrap());
        }
        assert!(String::from_utf8(head).unwrap().contains("expect: 100-continue"));
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        assert!(client.head().await.starts_with("HTTP/1.1 100 "));
        client.send("hello").await;
        let mut body = [0; 5];
        soon(stream.read_exact(&mut body)).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        let reply = client.reply().await;
        assert_eq!((&body, reply.body.as_str(), reply.header("connection")), (b"hello", "ok", None));
    });
    // A server that does not know the question gets the body after a while.
    test(|world| async move {
        let (addr, seen) = super::fixture::echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send(ASK).await;
        assert!(client.head().await.starts_with("HTTP/1.1 100 "));
        client.send("hello").await;
        assert_eq!(client.reply().await.body, "POST / hello");
        assert_eq!(seen.last().headers["expect"], "100-continue");
    });
}

#[test]
fn whether_a_body_is_wanted_is_asked_again_when_a_try_is_repeated() {
    const ASK: &str = "POST / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let on = RetryOn { statuses: vec![503], ..RetryOn::default() };
        let retries = crate::tests::upstream::retrying(1, on, None).unwrap().rule().retries.clone();
        let rule = HttpRule { retries, ..forward() };
        publish(&world, vec![rule], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send(ASK).await;
        let asked = async || {
            let (mut stream, _) = soon(listener.accept()).await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(soon(stream.read_u8()).await.unwrap());
            }
            assert!(String::from_utf8(head).unwrap().contains("expect: 100-continue"));
            stream
        };
        let mut first = asked().await;
        first.write_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let mut second = asked().await;
        second.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        assert!(client.head().await.starts_with("HTTP/1.1 100 "));
        client.send("hello").await;
        let mut body = [0; 5];
        soon(second.read_exact(&mut body)).await.unwrap();
        second.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        let reply = client.reply().await;
        assert_eq!((&body, reply.body.as_str(), reply.header("connection")), (b"hello", "ok", None));
        assert!(matches!(soon(first.read(&mut [0])).await, Ok(0) | Err(_)), "nothing more is to come on it");
    });
}

#[test]
fn a_body_that_was_never_asked_for_ends_the_connection_behind_an_answer_without_a_body_too() {
    const ASK: &str = "POST / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    test(|world| async move {
        let refusal = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n";
        let (addr, _) = server(vec![refusal.into()], false).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send(ASK).await;
        let reply = client.reply().await;
        assert_eq!((reply.status, reply.header("connection")), (417, Some("close")));
        assert!(client.is_ended().await);
    });
}

#[test]
fn a_client_that_writes_everything_first_reads_the_answer_to_what_nobody_wanted() {
    const SIZE: usize = 8 << 20;
    test(|world| async move {
        let (addr, _) = super::fixture::echo("one").await;
        let busy =
            rule(Action::Respond { status: 503, body: Arc::from(&b"busy"[..]), reason: "test".into() });
        publish(&world, vec![busy], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let head = format!("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: {SIZE}\r\n\r\n");
        let all = [head.as_bytes(), &vec![b'x'; SIZE]].concat();
        soon(client.stream.write_all(&all)).await.expect("all of it is taken");
        let reply = client.reply().await;
        assert_eq!((reply.status, &*reply.body, reply.header("connection")), (503, "busy", Some("close")));
        assert_eq!(soon(client.stream.read(&mut [0])).await.expect("no reset"), 0);
        drop(client);
        // A body that has come is none that is to come.
        let mut client = Client::connect(&world).await;
        for _ in 0..2 {
            let reply = client.ask("POST", "/", "", "body").await;
            assert_eq!((reply.status, reply.header("connection")), (503, None));
        }
    });
}
