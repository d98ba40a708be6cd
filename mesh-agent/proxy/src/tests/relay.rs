//! Bytes, ends and resets between two sockets.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};

use super::fixture::{World, eventually, in_world, reset, soon};
use crate::{
    buffers::LARGE,
    close::{CloseReason, Direction},
};

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

/// Bytes that show what is missing or swapped.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 251 + i % 241) as u8).collect()
}

async fn read_exactly(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    soon(stream.read_exact(&mut bytes)).await.unwrap();
    bytes
}

async fn read_all(stream: &mut TcpStream) -> (Vec<u8>, Option<io::ErrorKind>) {
    let mut bytes = Vec::new();
    let end = soon(stream.read_to_end(&mut bytes)).await.err().map(|error| error.kind());
    (bytes, end)
}

#[test]
fn a_server_may_speak_first() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        server.write_all(b"220 ready").await.unwrap();
        assert_eq!(read_exactly(&mut client, 9).await, b"220 ready");
    });
}

#[test]
fn a_client_that_ends_its_half_still_gets_the_reply() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await, (b"question".to_vec(), None));
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await, (b"answer".to_vec(), None));
        world.ended(CloseReason::Finished, 1).await;
    });
}

#[test]
fn a_server_that_ends_its_half_still_gets_the_rest_of_the_request() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await, (Vec::new(), None));
        for _ in 0..3 {
            client.write_all(b"more").await.unwrap();
            assert_eq!(read_exactly(&mut server, 4).await, b"more");
        }
        drop(client);
        assert_eq!(read_all(&mut server).await, (Vec::new(), None));
        world.ended(CloseReason::Finished, 1).await;
    });
}

#[test]
fn an_end_that_comes_with_the_last_bytes_is_not_missed() {
    test(|world| async move {
        for len in [1, 1000, 16 << 10, (16 << 10) + 1, LARGE] {
            let (mut client, mut server) = world.pair().await;
            let bytes = pattern(len);
            let send = async {
                client.write_all(&bytes).await.unwrap();
                drop(client);
            };
            let ((), (got, end)) = tokio::join!(send, read_all(&mut server));
            assert!(got == bytes && end.is_none(), "{len}: {} bytes, {end:?}", got.len());
        }
    });
}

#[test]
fn a_clients_reset_resets_the_server() {
    test(|world| async move {
        let (client, mut server) = world.pair().await;
        reset(client);
        assert_eq!(read_all(&mut server).await.1, Some(io::ErrorKind::ConnectionReset));
        world.ended(CloseReason::ClientReset, 1).await;
    });
}

#[test]
fn a_servers_reset_resets_the_client() {
    test(|world| async move {
        let (mut client, server) = world.pair().await;
        reset(server);
        assert_eq!(read_all(&mut client).await.1, Some(io::ErrorKind::ConnectionReset));
        world.ended(CloseReason::UpstreamReset, 1).await;
    });
}

#[test]
fn a_reset_after_a_half_close_is_passed_on() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await, (Vec::new(), None));
        reset(client);
        // Nothing more is written, so only the reset itself can tell.
        eventually(|| world.closed(Direction::Outbound, CloseReason::ClientReset), |n| *n == 1).await;
        assert_eq!(server.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    });
}

#[test]
fn bytes_sent_before_a_reset_arrive_before_it() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        // A server that answers and closes without reading the request makes its kernel send a reset.
        client.write_all(b"a request nobody reads").await.unwrap();
        sleep(Duration::from_millis(20)).await;
        server.write_all(&pattern(40_000)).await.unwrap();
        drop(server);
        assert_eq!(read_all(&mut client).await, (pattern(40_000), Some(io::ErrorKind::ConnectionReset)));
        world.ended(CloseReason::UpstreamReset, 1).await;
    });
}

#[test]
fn a_receiver_that_does_not_read_holds_its_sender_back_within_bounded_memory() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        let chunk = pattern(64 << 10);
        let mut sent = 0_usize;
        while let Ok(written) = tokio::time::timeout(Duration::from_millis(200), client.write(&chunk)).await {
            sent += written.unwrap();
            assert!(sent < 64 << 20, "nothing holds the sender back");
        }
        assert!(world.worker.buffers().held() <= LARGE, "{}", world.worker.buffers().held());
        // Once it reads, everything comes.
        drop(client);
        let mut got = 0;
        let mut buf = vec![0; 64 << 10];
        loop {
            match soon(server.read(&mut buf)).await.unwrap() {
                0 => break,
                n => got += n,
            }
        }
        assert_eq!(got, sent);
        drop(server);
        world.ended(CloseReason::Finished, 1).await;
        assert_eq!(world.worker.buffers().held(), 0);
    });
}

fn carries_bulk_both_ways_at_once(splice: bool) {
    in_world(
        false,
        |settings| settings.splice = splice,
        |world| async move {
            const LEN: usize = 24 << 20;
            let (client, server) = world.pair().await;
            let bytes = pattern(LEN);
            let echo = tokio::task::spawn_local(async move {
                let (mut from, mut to) = server.into_split();
                tokio::io::copy(&mut from, &mut to).await.unwrap();
            });
            let (mut from, mut to) = client.into_split();
            let send = async {
                to.write_all(&bytes).await.unwrap();
                drop(to);
            };
            let mut got = Vec::new();
            let (read, ()) = tokio::join!(from.read_to_end(&mut got), send);
            read.unwrap();
            assert!(got == bytes, "{} of {LEN} bytes, or the wrong ones", got.len());
            echo.await.unwrap();
            world.ended(CloseReason::Finished, 1).await;
            assert_eq!(world.worker.buffers().held(), 0);
        },
    );
}

#[test]
fn bulk_is_carried_both_ways_by_splice() {
    carries_bulk_both_ways_at_once(true);
}

#[test]
fn bulk_is_carried_both_ways_by_copy() {
    carries_bulk_both_ways_at_once(false);
}

#[test]
fn many_small_messages_keep_their_order() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        for i in 0..2000_u32 {
            client.write_all(&i.to_be_bytes()).await.unwrap();
            if i % 3 == 0 {
                server.write_all(&i.to_le_bytes()).await.unwrap();
            }
        }
        let got = read_exactly(&mut server, 8000).await;
        assert!(got.chunks(4).zip(0_u32..).all(|(bytes, i)| bytes == i.to_be_bytes()));
        let got = read_exactly(&mut client, 667 * 4).await;
        assert!(got.chunks(4).zip((0_u32..).step_by(3)).all(|(bytes, i)| bytes == i.to_le_bytes()));
    });
}

#[test]
fn an_idle_connection_ends_after_the_idle_time_out_and_not_before() {
    in_world(
        true,
        |settings| settings.idle_timeout = Duration::from_secs(600),
        |world| async move {
            let (mut client, mut server) = world.pair().await;
            sleep(Duration::from_secs(590)).await;
            client.write_all(b"x").await.unwrap();
            let mut byte = [0];
            server.read_exact(&mut byte).await.unwrap();
            let last = Instant::now();
            let error = client.read(&mut byte).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            let waited = last.elapsed();
            assert!((600..=602).contains(&waited.as_secs()), "{waited:?}");
            world.ended(CloseReason::IdleTimeout, 1).await;
        },
    );
}

#[test]
fn a_reset_does_not_wait_for_ever_for_a_receiver_that_does_not_read() {
    in_world(
        true,
        |settings| settings.reset_linger = Duration::from_secs(7),
        |world| async move {
            let (client, mut server) = world.pair().await;
            let chunk = pattern(64 << 10);
            while let Ok(written) =
                tokio::time::timeout(Duration::from_millis(200), server.write(&chunk)).await
            {
                written.unwrap();
            }
            reset(server);
            let begun = Instant::now();
            while world.closed(Direction::Outbound, CloseReason::UpstreamReset) == 0 {
                sleep(Duration::from_millis(100)).await;
                assert!(begun.elapsed() < Duration::from_secs(20));
            }
            assert!(begun.elapsed() >= Duration::from_secs(7), "{:?}", begun.elapsed());
            drop(client);
        },
    );
}

#[test]
fn ipv6_is_carried_alike() {
    test(|world| async move {
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        world.dial(listener.local_addr().unwrap());
        let mut client = TcpStream::connect(world.outbound).await.unwrap();
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        client.write_all(b"six").await.unwrap();
        assert_eq!(read_exactly(&mut server, 3).await, b"six");
    });
}
