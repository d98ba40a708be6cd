//! Owns what a client can be told to do and what it answers: command-line and JSON form.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

/// First byte of a connection on which every byte is sent back.
pub(super) const ECHO: u8 = b'E';
/// First byte of a connection whose bytes are counted; a [`StreamHeader`] follows.
pub(super) const STREAM: u8 = b'S';
/// The whole request of a connection that gets [`RESPONSE`] and is closed by the server.
pub(super) const REQUEST: u8 = b'R';
/// The whole answer to [`REQUEST`].
pub(super) const RESPONSE: u8 = b'r';

/// What a client does.
#[derive(Clone, Debug, Subcommand, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Task {
    /// One byte there and back, over and over, on one connection.
    Rtt {
        /// When to measure.
        #[command(flatten)]
        #[serde(flatten)]
        timing: Timing,
    },
    /// Write as fast as possible.
    Stream {
        /// Bytes of one write call.
        #[arg(long, default_value_t = 65_536)]
        write_bytes: usize,
        /// Connections, each with a thread of its own.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// When to measure.
        #[command(flatten)]
        #[serde(flatten)]
        timing: Timing,
    },
    /// Connect, send one byte, receive one, be closed; over and over.
    Requests {
        /// How many of them at once, each with a thread of its own.
        #[arg(long, default_value_t = 4)]
        connections: usize,
        /// When to measure.
        #[command(flatten)]
        #[serde(flatten)]
        timing: Timing,
    },
    /// Requests on HTTP connections that are kept, each answered by 1 KiB.
    Http {
        /// Connections; one thread serves them all.
        #[arg(long, default_value_t = 32)]
        connections: usize,
        /// Requests that become due each second, whether or not those before are answered. [default: one on each connection as
        /// soon as the one before is answered]
        #[arg(long)]
        rate: Option<u32>,
        /// When to measure.
        #[command(flatten)]
        #[serde(flatten)]
        timing: Timing,
    },
    /// Open one connection and keep it for `Push`.
    Open,
    /// Write so many bytes on the open connection, then wait until the server has received them.
    Push {
        /// How many bytes; rounded up to whole writes.
        #[arg(long)]
        bytes: u64,
        /// Bytes of one write call.
        #[arg(long, default_value_t = 65_536)]
        write_bytes: usize,
    },
    /// Open so many connections, exchange a byte on each, and keep them.
    Hold {
        /// How many.
        #[arg(long)]
        connections: usize,
    },
    /// Close the open connections.
    Close,
    /// Connect one UDP socket again and again; nothing is sent.
    UdpConnects {
        /// How often.
        #[arg(long, default_value_t = 200_000)]
        count: u64,
    },
}

/// When to measure within a task.
#[derive(Clone, Copy, Debug, Args, Serialize, Deserialize)]
pub struct Timing {
    /// Milliseconds before anything counts.
    #[arg(long, default_value_t = 400)]
    pub warm_up_ms: u32,
    /// Milliseconds that count.
    #[arg(long, default_value_t = 1500)]
    pub window_ms: u32,
}

impl Timing {
    /// The warm-up.
    #[must_use]
    pub fn warm_up(self) -> Duration {
        Duration::from_millis(self.warm_up_ms.into())
    }

    /// Warm-up and window.
    #[must_use]
    pub fn whole(self) -> Duration {
        self.warm_up() + Duration::from_millis(self.window_ms.into())
    }
}

/// What a task came to. Totals include the warm-up, so that CPU time over the whole task can be divided by
/// them; rates and latencies are those of the window alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// Of [`Task::Rtt`].
    Rtt {
        /// Exchanges, warm-up included.
        total: u64,
        /// Median in nanoseconds.
        p50_ns: u64,
        /// 99th percentile in nanoseconds.
        p99_ns: u64,
    },
    /// Of [`Task::Stream`].
    Stream {
        /// Bytes received by the server, warm-up included.
        total_bytes: u64,
        /// Bits per second at the receiver, summed over connections.
        bits_per_s: f64,
    },
    /// Of [`Task::Requests`] and [`Task::Http`].
    Requests {
        /// Requests answered, warm-up included.
        total: u64,
        /// Requests that failed, warm-up included.
        failed: u64,
        /// Why the first of them did.
        first_failure: Option<String>,
        /// Requests answered per second.
        per_s: f64,
        /// Median of connect to close, or of request to response, in nanoseconds.
        p50_ns: u64,
        /// 99th percentile of it.
        p99_ns: u64,
    },
    /// Of [`Task::UdpConnects`].
    UdpConnects {
        /// Nanoseconds of one `connect` call: the median over batches of calls.
        ns_per_connect: f64,
    },
    /// Of the tasks that only do something.
    Done,
    /// The task failed.
    Failed {
        /// Why, with causes.
        error: String,
    },
}

/// What follows [`STREAM`]: when the receiver measures, counted from the arrival of this header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamHeader {
    pub(super) warm_up_ms: u32,
    pub(super) window_ms: u32,
}

impl StreamHeader {
    pub(super) const LEN: usize = 8;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        (u64::from(self.warm_up_ms) << 32 | u64::from(self.window_ms)).to_be_bytes()
    }

    pub(super) fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self { warm_up_ms: u32::from_be_bytes([a, b, c, d]), window_ms: u32::from_be_bytes([e, f, g, h]) }
    }
}

/// What the receiver of a stream answers once the sender has shut its side down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamTotals {
    /// All bytes received.
    pub(super) total_bytes: u64,
    /// Bytes received within `window_ns`.
    pub(super) window_bytes: u64,
    /// From the first to the last read within the window.
    pub(super) window_ns: u64,
}

impl StreamTotals {
    pub(super) const LEN: usize = 24;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        for (chunk, value) in
            bytes.chunks_exact_mut(8).zip([self.total_bytes, self.window_bytes, self.window_ns])
        {
            chunk.copy_from_slice(&value.to_be_bytes());
        }
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_be_bytes(word)
        };
        Self { total_bytes: word(0), window_bytes: word(1), window_ns: word(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_over_the_wire_comes_back_the_same() {
        let header = StreamHeader { warm_up_ms: 400, window_ms: 70_000 };
        assert_eq!(StreamHeader::from_bytes(header.to_bytes()), header);
        let totals = StreamTotals { total_bytes: u64::MAX, window_bytes: 1 << 40, window_ns: 3 };
        assert_eq!(StreamTotals::from_bytes(totals.to_bytes()), totals);
    }

    #[test]
    fn a_task_is_one_flat_json_object() {
        let line = r#"{"task":"stream","write_bytes":1024,"connections":4,"warm_up_ms":1,"window_ms":2}"#;
        let task: Task = serde_json::from_str(line).unwrap();
        assert!(
            matches!(task, Task::Stream { write_bytes: 1024, connections: 4, timing } if timing.window_ms == 2)
        );
        assert_eq!(serde_json::to_string(&task).unwrap(), line);
    }
}
