//! A client and a server of ours, with random sizes, windows, cuts and orders: every byte arrives, once and in order.

use std::{collections::VecDeque, time::Instant};

use proptest::prelude::*;

use super::super::{
    super::{Event, Limits, StreamKey},
    Connection,
};

/// A small generator, so that a failing case is one number.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

struct Flow {
    key: StreamKey,
    /// Bytes still to send; the n-th byte of a stream is a function of n.
    to_send: usize,
    sent: usize,
    received: usize,
    unconsumed: usize,
    ended: bool,
    peer_ended: bool,
}

struct End {
    connection: Connection,
    wire: VecDeque<u8>,
    flows: Vec<Flow>,
}

fn byte(id: u32, place: usize) -> u8 {
    (place as u32).wrapping_mul(31).wrapping_add(id) as u8
}

impl End {
    fn new(connection: Connection) -> Self {
        Self { connection, wire: VecDeque::new(), flows: Vec::new() }
    }

    fn flush(&mut self) {
        self.wire.extend(self.connection.output());
        self.connection.clear_output();
    }

    fn flow(&mut self, key: StreamKey) -> &mut Flow {
        self.flows.iter_mut().find(|flow| flow.key == key).expect("a known stream")
    }

    fn add(&mut self, key: StreamKey, to_send: usize) {
        self.flows.push(Flow {
            key,
            to_send,
            sent: 0,
            received: 0,
            unconsumed: 0,
            ended: false,
            peer_ended: false,
        });
    }

    fn send(&mut self, place: usize, random: &mut Random) {
        self.flush();
        let flow = &mut self.flows[place];
        if flow.ended {
            return;
        }
        let room = self.connection.send_capacity(flow.key).min(self.connection.max_data());
        let size = room.min(flow.to_send).min(random.below(40_000) + 1);
        let end = size == flow.to_send && random.below(2) == 0;
        if size > 0 {
            let head = self.connection.data_frame(flow.key, size, end).unwrap();
            self.wire.extend(head);
            self.wire.extend((flow.sent..flow.sent + size).map(|place| byte(flow.key.id(), place)));
            flow.sent += size;
            flow.to_send -= size;
            flow.ended = end;
        } else if flow.to_send == 0 {
            self.connection.end(flow.key);
            flow.ended = true;
            self.flush();
        }
    }

    fn consume(&mut self, place: usize, random: &mut Random) {
        let flow = &mut self.flows[place];
        let size = random.below(flow.unconsumed + 1).max(flow.unconsumed.min(1));
        flow.unconsumed -= size;
        self.connection.consumed(flow.key, size);
        self.flush();
    }

    fn hear(&mut self, bytes: &[u8], random: &mut Random) {
        let mut at = 0;
        while let Some(event) =
            self.connection.receive(Instant::now(), bytes, &mut at).expect("a conforming peer")
        {
            match event {
                Event::Opened { stream, .. } => {
                    self.connection.respond(stream, 200, &[], false).unwrap();
                    self.add(stream, random.below(200_000));
                }
                Event::Data { stream, range, end } => {
                    let flow = self.flow(stream);
                    for (place, &got) in bytes[range.clone()].iter().enumerate() {
                        assert_eq!(got, byte(stream.id(), flow.received + place));
                    }
                    flow.received += range.len();
                    flow.unconsumed += range.len();
                    flow.peer_ended |= end;
                }
                Event::Ended { stream } => self.flow(stream).peer_ended = true,
                Event::Response { .. } | Event::WindowOpened { .. } | Event::SettingsChanged => {}
                other => panic!("unexpected {other:?}"),
            }
        }
        self.flush();
    }

    fn finished(&self) -> bool {
        self.flows.iter().all(|flow| flow.ended && flow.peer_ended && flow.unconsumed == 0)
    }
}

fn carry(seed: u64, client_limits: Limits, server_limits: Limits) {
    let mut random = Random(seed);
    let now = Instant::now();
    let mut client = End::new(Connection::client(client_limits, now));
    let mut server = End::new(Connection::server(server_limits, now));
    client.flush();
    server.flush();
    let mut to_open = random.below(6) + 1;
    for _ in 0..2_000_000 {
        let (from, to) =
            if random.below(2) == 0 { (&mut client, &mut server) } else { (&mut server, &mut client) };
        match random.below(4) {
            0 => {
                let size = random.below(60_000).min(from.wire.len());
                let bytes: Vec<u8> = from.wire.drain(..size).collect();
                to.hear(&bytes, &mut random);
            }
            1 if !from.flows.is_empty() => {
                let place = random.below(from.flows.len());
                from.send(place, &mut random);
            }
            2 if !from.flows.is_empty() => {
                let place = random.below(from.flows.len());
                from.consume(place, &mut random);
            }
            3 if to_open > 0 => {
                if let Ok(key) =
                    client.connection.open(&[(":method", "CONNECT"), (":authority", "a:1")], false)
                {
                    to_open -= 1;
                    client.flush();
                    client.add(key, random.below(200_000));
                }
            }
            _ => {}
        }
        let quiet = client.wire.is_empty() && server.wire.is_empty();
        if to_open == 0
            && quiet
            && client.finished()
            && server.finished()
            && client.flows.len() == server.flows.len()
        {
            let received: usize = server.flows.iter().map(|flow| flow.received).sum();
            assert_eq!(received, client.flows.iter().map(|flow| flow.sent).sum::<usize>());
            assert_eq!((client.connection.streams(), server.connection.streams()), (0, 0));
            return;
        }
    }
    panic!("stuck");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_byte_arrives(seed: u64, window in 1_u32..200_000, other in 1_u32..200_000, connection in 1_u32..300_000) {
        let limits = |stream_window| Limits {
            stream_window,
            connection_window: connection,
            max_streams: 3,
            ..Limits::default()
        };
        carry(seed, limits(window.max(200)), limits(other.max(200)));
    }
}
