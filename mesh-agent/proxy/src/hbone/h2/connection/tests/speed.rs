//! What a frame costs, printed: `cargo test --release -p mesh-proxy --lib h2::connection::tests::speed -- --ignored --nocapture`.

use std::{hint::black_box, time::Instant};

use super::{
    super::{
        super::{Event, Limits, frame::PREFACE},
        Connection,
    },
    fixture::{data, settings},
};

fn print(what: &str, count: u32, begun: Instant) {
    println!("{what}: {:.0} ns", begun.elapsed().as_nanos() as f64 / f64::from(count));
}

#[test]
#[ignore = "a measurement"]
fn what_frames_cost() {
    let now = Instant::now();
    let limits = Limits { stream_window: 1 << 20, connection_window: 8 << 20, ..Limits::default() };
    let mut client = Connection::client(limits, now);
    let mut server = Connection::server(limits, now);
    let hear = |connection: &mut Connection, bytes: &[u8]| {
        let mut at = 0;
        let mut last = None;
        while let Some(event) = connection.receive(now, bytes, &mut at).unwrap() {
            last = Some(event);
        }
        last
    };
    let hello = client.output().to_vec();
    assert!(hello.starts_with(PREFACE));
    client.clear_output();
    hear(&mut server, &hello);
    let answer = server.output().to_vec();
    server.clear_output();
    hear(&mut client, &answer);
    client.clear_output();
    hear(&mut client, &settings(&[(4, 1 << 30)]));

    // CONNECT, 200, end, end.
    let fields = [
        (":method", "CONNECT"),
        (":authority", "10.244.3.17:8080"),
        (
            "baggage",
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=web-5d8f,service.name=web",
        ),
        ("forwarded", "for=10.244.1.5;proto=http"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ];
    let count = 100_000;
    let begun = Instant::now();
    for _ in 0..count {
        let key = client.open(&fields, false).unwrap();
        let Some(Event::Opened { stream, .. }) = hear(&mut server, client.output()) else {
            panic!("no stream")
        };
        client.clear_output();
        server.respond(stream, 200, &[], false).unwrap();
        server.end(stream);
        hear(&mut client, server.output());
        server.clear_output();
        client.end(key);
        hear(&mut server, client.output());
        client.clear_output();
    }
    print("stream: CONNECT, 200, both ends, on both sides", count, begun);

    for (streams, size) in [(1, 1_024), (1, 16_375), (64, 1_024)] {
        let keys: Vec<_> = (0..streams).map(|_| client.open(&fields, false).unwrap()).collect();
        hear(&mut server, client.output());
        client.clear_output();
        let frames: Vec<Vec<u8>> = keys.iter().map(|key| data(key.id(), &vec![0; size], false)).collect();
        let batch = frames.concat();
        let count = 2_000_000;
        let begun = Instant::now();
        let mut received = 0;
        let mut updates = 0;
        while received < count {
            let mut at = 0;
            while let Some(event) = server.receive(now, black_box(&batch), &mut at).unwrap() {
                if let Event::Data { stream, range, .. } = event {
                    server.consumed(stream, black_box(range).len());
                    received += 1;
                }
            }
            updates += server.output().len();
            server.clear_output();
        }
        print(
            &format!("receive and consume DATA of {size}, {streams} streams ({updates} bytes of updates)"),
            count,
            begun,
        );

        let begun = Instant::now();
        for n in 0..count as usize {
            let key = keys[n % keys.len()];
            let room = client.send_capacity(key).min(client.max_data());
            if room < 1 {
                client.send_window = 1 << 30;
                client.streams.get_mut(key).unwrap().send_window = 1 << 30;
            }
            black_box(client.data_frame(key, size.min(room), false).unwrap());
        }
        print(&format!("frame DATA of {size}, {streams} streams"), count, begun);
        for key in keys {
            client.reset(key, super::super::super::ErrorCode::CANCEL);
        }
        hear(&mut server, client.output());
        client.clear_output();
        server.clear_output();
    }
}
