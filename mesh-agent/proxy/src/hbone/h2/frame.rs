//! The wire format of frames (RFC 9113 §4, §6): headers, codes, and the writers of the small control frames.
//!
//! Invariants: decoding is total; nothing here knows of streams or state.

/// Length of a frame header.
pub(crate) const HEADER: usize = 9;
/// What a client sends before its first frame.
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The smallest MAX_FRAME_SIZE, and the default.
pub(crate) const MIN_MAX_FRAME: u32 = 16_384;
/// The largest MAX_FRAME_SIZE.
pub(crate) const MAX_MAX_FRAME: u32 = (1 << 24) - 1;
/// The largest flow-control window.
pub(crate) const MAX_WINDOW: u32 = (1 << 31) - 1;
/// The window of a connection, and of streams, before anybody says otherwise.
pub(crate) const DEFAULT_WINDOW: u32 = 65_535;
/// The largest stream id.
pub(crate) const MAX_STREAM: u32 = (1 << 31) - 1;

/// Flag of DATA and HEADERS: the sender's half of the stream ends.
pub(crate) const END_STREAM: u8 = 0x1;
/// Flag of SETTINGS and PING.
pub(crate) const ACK: u8 = 0x1;
/// Flag of HEADERS and CONTINUATION: the header block ends.
pub(crate) const END_HEADERS: u8 = 0x4;
/// Flag of DATA and HEADERS: the payload begins with a pad length and ends with padding.
pub(crate) const PADDED: u8 = 0x8;
/// Flag of HEADERS: five bytes of priority come before the header block.
pub(crate) const PRIORITY: u8 = 0x20;

/// Ids of settings (RFC 9113 §6.5.2).
pub(crate) mod setting {
    pub(crate) const HEADER_TABLE_SIZE: u16 = 1;
    pub(crate) const ENABLE_PUSH: u16 = 2;
    pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(crate) const MAX_FRAME_SIZE: u16 = 5;
    pub(crate) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Frame types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Headers,
    Priority,
    Reset,
    Settings,
    PushPromise,
    Ping,
    GoAway,
    WindowUpdate,
    Continuation,
    Unknown(u8),
}

impl Kind {
    const fn from_wire(byte: u8) -> Self {
        match byte {
            0 => Self::Data,
            1 => Self::Headers,
            2 => Self::Priority,
            3 => Self::Reset,
            4 => Self::Settings,
            5 => Self::PushPromise,
            6 => Self::Ping,
            7 => Self::GoAway,
            8 => Self::WindowUpdate,
            9 => Self::Continuation,
            other => Self::Unknown(other),
        }
    }

    const fn to_wire(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Headers => 1,
            Self::Priority => 2,
            Self::Reset => 3,
            Self::Settings => 4,
            Self::PushPromise => 5,
            Self::Ping => 6,
            Self::GoAway => 7,
            Self::WindowUpdate => 8,
            Self::Continuation => 9,
            Self::Unknown(other) => other,
        }
    }
}

/// A decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Length of the payload.
    pub(crate) length: u32,
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// Without the reserved bit.
    pub(crate) stream: u32,
}

impl Head {
    /// Every nine bytes are a frame header.
    pub(crate) const fn decode(bytes: [u8; HEADER]) -> Self {
        Self {
            length: u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]),
            kind: Kind::from_wire(bytes[3]),
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & MAX_STREAM,
        }
    }

    /// The bytes on the wire. The length must fit 24 bits.
    pub(crate) const fn encode(self) -> [u8; HEADER] {
        let length = self.length.to_be_bytes();
        let stream = self.stream.to_be_bytes();
        [
            length[1],
            length[2],
            length[3],
            self.kind.to_wire(),
            self.flags,
            stream[0],
            stream[1],
            stream[2],
            stream[3],
        ]
    }

    pub(crate) const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// An error code (RFC 9113 §7); unknown ones are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ErrorCode(pub(crate) u32);

impl ErrorCode {
    pub(crate) const NO_ERROR: Self = Self(0x0);
    pub(crate) const PROTOCOL_ERROR: Self = Self(0x1);
    pub(crate) const INTERNAL_ERROR: Self = Self(0x2);
    pub(crate) const FLOW_CONTROL_ERROR: Self = Self(0x3);
    pub(crate) const SETTINGS_TIMEOUT: Self = Self(0x4);
    pub(crate) const STREAM_CLOSED: Self = Self(0x5);
    pub(crate) const FRAME_SIZE_ERROR: Self = Self(0x6);
    pub(crate) const REFUSED_STREAM: Self = Self(0x7);
    pub(crate) const CANCEL: Self = Self(0x8);
    pub(crate) const COMPRESSION_ERROR: Self = Self(0x9);
    pub(crate) const CONNECT_ERROR: Self = Self(0xa);
    pub(crate) const ENHANCE_YOUR_CALM: Self = Self(0xb);
    pub(crate) const INADEQUATE_SECURITY: Self = Self(0xc);
    pub(crate) const HTTP_1_1_REQUIRED: Self = Self(0xd);

    /// The name the RFC gives it; `unknown` for codes it does not know.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NO_ERROR => "no_error",
            Self::PROTOCOL_ERROR => "protocol_error",
            Self::INTERNAL_ERROR => "internal_error",
            Self::FLOW_CONTROL_ERROR => "flow_control_error",
            Self::SETTINGS_TIMEOUT => "settings_timeout",
            Self::STREAM_CLOSED => "stream_closed",
            Self::FRAME_SIZE_ERROR => "frame_size_error",
            Self::REFUSED_STREAM => "refused_stream",
            Self::CANCEL => "cancel",
            Self::COMPRESSION_ERROR => "compression_error",
            Self::CONNECT_ERROR => "connect_error",
            Self::ENHANCE_YOUR_CALM => "enhance_your_calm",
            Self::INADEQUATE_SECURITY => "inadequate_security",
            Self::HTTP_1_1_REQUIRED => "http_1_1_required",
            Self(_) => "unknown",
        }
    }
}

impl std::fmt::Debug for ErrorCode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}({})", self.as_str(), self.0)
    }
}

/// Appends frames of fixed shape to an output buffer.
pub(crate) trait WriteFrames {
    fn frame(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]);

    fn reset(&mut self, stream: u32, code: ErrorCode) {
        self.frame(Kind::Reset, 0, stream, &code.0.to_be_bytes());
    }

    fn window_update(&mut self, stream: u32, increment: u32) {
        self.frame(Kind::WindowUpdate, 0, stream, &increment.to_be_bytes());
    }

    fn ping(&mut self, flags: u8, payload: [u8; 8]) {
        self.frame(Kind::Ping, flags, 0, &payload);
    }

    fn go_away(&mut self, last: u32, code: ErrorCode) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&last.to_be_bytes());
        payload[4..].copy_from_slice(&code.0.to_be_bytes());
        self.frame(Kind::GoAway, 0, 0, &payload);
    }

    fn settings(&mut self, settings: &[(u16, u32)]) {
        let mut payload = Vec::with_capacity(settings.len() * 6);
        for (id, value) in settings {
            payload.extend_from_slice(&id.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        self.frame(Kind::Settings, 0, 0, &payload);
    }

    fn settings_ack(&mut self) {
        self.frame(Kind::Settings, ACK, 0, &[]);
    }
}

impl WriteFrames for Vec<u8> {
    fn frame(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        // Callers write control frames and pieces of header blocks: at most `MAX_MAX_FRAME` bytes.
        let length = u32::try_from(payload.len()).unwrap_or(MAX_MAX_FRAME);
        self.extend_from_slice(&Head { length, kind, flags, stream }.encode());
        self.extend_from_slice(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::{ErrorCode, Head, Kind, WriteFrames};

    #[test]
    fn a_frame_header_survives_the_wire() {
        for kind in (0..=12).map(Kind::from_wire) {
            let head = Head { length: 0x12_34_56, kind, flags: 0xa5, stream: 0x7fff_fffe };
            assert_eq!(Head::decode(head.encode()), head);
        }
    }

    #[test]
    fn the_reserved_bit_of_a_stream_id_is_ignored() {
        assert_eq!(Head::decode([0, 0, 0, 0, 0, 0x80, 0, 0, 3]).stream, 3);
    }

    #[test]
    fn control_frames_have_the_layout_of_the_rfc() {
        let mut out = Vec::new();
        out.reset(5, ErrorCode::CANCEL);
        assert_eq!(out, [0, 0, 4, 3, 0, 0, 0, 0, 5, 0, 0, 0, 8]);
        out.clear();
        out.go_away(7, ErrorCode::PROTOCOL_ERROR);
        assert_eq!(out, [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1]);
        out.clear();
        out.settings(&[(4, 0x0102_0304)]);
        assert_eq!(out, [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4]);
    }
}
