//! Sees which streams of HTTP/2 the library gives up because the client broke the rules: it says so to the client alone.
//!
//! Invariant: frames are followed to the byte, however they are cut into writes; nothing is kept but one frame's head.

use crate::metrics::http::Refusal;

/// Bytes of a frame's head, and of the code that a RST_STREAM has behind it.
const HEAD: usize = 9;
const CODE: usize = 4;
/// The type of a RST_STREAM.
const RST_STREAM: u8 = 3;

/// Follows the frames that are sent on one connection.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// Head of the current frame, and the beginning of its payload.
    seen: [u8; HEAD + CODE],
    /// So much of it has been seen.
    len: usize,
    /// Bytes of the payload that are passed over.
    skip: usize,
}

impl Resets {
    /// Takes bytes that were sent, and tells of each refused stream.
    pub(super) fn follow(&mut self, mut sent: &[u8], mut refused: impl FnMut(Refusal)) {
        while !sent.is_empty() {
            if self.skip > 0 {
                let passed = self.skip.min(sent.len());
                self.skip -= passed;
                sent = &sent[passed..];
                continue;
            }
            let wanted = if self.len < HEAD { HEAD } else { HEAD + CODE };
            let taken = (wanted - self.len).min(sent.len());
            self.seen[self.len..self.len + taken].copy_from_slice(&sent[..taken]);
            self.len += taken;
            sent = &sent[taken..];
            if self.len < wanted {
                return;
            }
            let [a, b, c, kind, ..] = self.seen;
            let payload = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if wanted == HEAD && kind == RST_STREAM && payload == CODE {
                continue;
            }
            if wanted == HEAD {
                self.skip = payload;
            } else if let Some(reason) = refusal(self.seen[HEAD + CODE - 1]) {
                refused(reason);
            }
            self.len = 0;
        }
    }
}

/// What an error code (all are below 256) says about the client. Ours for a response that broke off is INTERNAL_ERROR.
fn refusal(code: u8) -> Option<Refusal> {
    match u32::from(code).into() {
        h2::Reason::PROTOCOL_ERROR
        | h2::Reason::STREAM_CLOSED
        | h2::Reason::FRAME_SIZE_ERROR
        | h2::Reason::COMPRESSION_ERROR => Some(Refusal::H2Protocol),
        h2::Reason::FLOW_CONTROL_ERROR => Some(Refusal::H2FlowControl),
        h2::Reason::ENHANCE_YOUR_CALM => Some(Refusal::H2Flood),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, 0, payload.len() as u8, kind, 0, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    #[test]
    fn resets_for_errors_are_seen_however_frames_are_cut() {
        let sent = [
            frame(4, &[]),
            frame(RST_STREAM, &[0, 0, 0, 1]),
            frame(0, &[RST_STREAM; 50]),
            frame(RST_STREAM, &[0, 0, 0, 8]),
            frame(1, b"x"),
            frame(RST_STREAM, &[0, 0, 0, 3]),
        ]
        .concat();
        for piece in [1, 2, 9, 13, 1000] {
            let mut resets = Resets::default();
            let mut refused = Vec::new();
            for bytes in sent.chunks(piece) {
                resets.follow(bytes, |reason| refused.push(reason));
            }
            assert_eq!(refused, [Refusal::H2Protocol, Refusal::H2FlowControl], "{piece}");
        }
    }
}
