//! What a peer can do wrong: the closed set behind error codes, metric labels and logs.
//!
//! Invariants: every refusal of the layer names one [`Violation`]; [`Violation::as_str`] values are stable.

use super::frame::ErrorCode;

/// A breach of HTTP/2, or of the limits of this layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Violation {
    /// Replies that the peer does not read have piled up.
    Backlog,
    /// The first bytes of a client are not HTTP/2's.
    BadPreface,
    /// A setting has a value outside its range.
    BadSetting,
    /// Padding longer than its frame.
    BadPadding,
    /// A frame that needs a stream came without one, or the other way round, or on a stream nobody may open.
    BadStreamId,
    /// Too many frames on streams that are long closed.
    ClosedStreamFlood,
    /// A header block in too many CONTINUATION frames.
    ContinuationFlood,
    /// Too many DATA frames without data.
    EmptyDataFlood,
    /// A frame whose length is wrong for its type, or over the announced maximum.
    FrameSize,
    /// A header block that expands far beyond the announced size.
    HeaderBomb,
    /// A header block of more bytes than are read.
    HeaderBlockTooLarge,
    /// A header block that HPACK cannot decode.
    HeaderCompression,
    /// A header list over the announced size.
    HeaderListTooLarge,
    /// A request or response that HTTP/2 calls malformed.
    MalformedHeaders,
    /// The peer did not begin with SETTINGS.
    NoSettings,
    /// Too many PING frames.
    PingFlood,
    /// Too many streams opened and reset before they did anything.
    RapidReset,
    /// Too many SETTINGS frames.
    SettingsFlood,
    /// A frame on a half of a stream that has ended.
    StreamClosed,
    /// More streams than were announced.
    TooManyStreams,
    /// A frame that may not come here: PUSH_PROMISE, a lone CONTINUATION, anything inside a header block.
    UnexpectedFrame,
    /// Too many PRIORITY frames or frames of unknown type.
    UselessFrameFlood,
    /// More data than the window allows.
    WindowExceeded,
    /// A window grew beyond 2³¹−1.
    WindowOverflow,
    /// Too many WINDOW_UPDATE frames for the data that was sent.
    WindowUpdateFlood,
    /// A WINDOW_UPDATE of zero.
    ZeroIncrement,
}

impl Violation {
    /// Every violation, for tables of counters.
    pub(crate) const ALL: [Self; 26] = [
        Self::Backlog,
        Self::BadPreface,
        Self::BadSetting,
        Self::BadPadding,
        Self::BadStreamId,
        Self::ClosedStreamFlood,
        Self::ContinuationFlood,
        Self::EmptyDataFlood,
        Self::FrameSize,
        Self::HeaderBomb,
        Self::HeaderBlockTooLarge,
        Self::HeaderCompression,
        Self::HeaderListTooLarge,
        Self::MalformedHeaders,
        Self::NoSettings,
        Self::PingFlood,
        Self::RapidReset,
        Self::SettingsFlood,
        Self::StreamClosed,
        Self::TooManyStreams,
        Self::UnexpectedFrame,
        Self::UselessFrameFlood,
        Self::WindowExceeded,
        Self::WindowOverflow,
        Self::WindowUpdateFlood,
        Self::ZeroIncrement,
    ];

    /// Metric label and log value.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Backlog => "h2_backlog",
            Self::BadPreface => "h2_bad_preface",
            Self::BadSetting => "h2_bad_setting",
            Self::BadPadding => "h2_bad_padding",
            Self::BadStreamId => "h2_bad_stream_id",
            Self::ClosedStreamFlood => "h2_closed_stream_flood",
            Self::ContinuationFlood => "h2_continuation_flood",
            Self::EmptyDataFlood => "h2_empty_data_flood",
            Self::FrameSize => "h2_frame_size",
            Self::HeaderBomb => "h2_header_bomb",
            Self::HeaderBlockTooLarge => "h2_header_block_too_large",
            Self::HeaderCompression => "h2_header_compression",
            Self::HeaderListTooLarge => "h2_header_list_too_large",
            Self::MalformedHeaders => "h2_malformed_headers",
            Self::NoSettings => "h2_no_settings",
            Self::PingFlood => "h2_ping_flood",
            Self::RapidReset => "h2_rapid_reset",
            Self::SettingsFlood => "h2_settings_flood",
            Self::StreamClosed => "h2_stream_closed",
            Self::TooManyStreams => "h2_too_many_streams",
            Self::UnexpectedFrame => "h2_unexpected_frame",
            Self::UselessFrameFlood => "h2_useless_frame_flood",
            Self::WindowExceeded => "h2_window_exceeded",
            Self::WindowOverflow => "h2_window_overflow",
            Self::WindowUpdateFlood => "h2_window_update_flood",
            Self::ZeroIncrement => "h2_zero_increment",
        }
    }

    /// What the peer is told in GOAWAY or RST_STREAM.
    pub(crate) const fn code(self) -> ErrorCode {
        match self {
            Self::BadPreface
            | Self::BadPadding
            | Self::BadSetting
            | Self::BadStreamId
            | Self::MalformedHeaders
            | Self::NoSettings
            | Self::UnexpectedFrame
            | Self::ZeroIncrement => ErrorCode::PROTOCOL_ERROR,
            Self::FrameSize => ErrorCode::FRAME_SIZE_ERROR,
            Self::HeaderCompression => ErrorCode::COMPRESSION_ERROR,
            Self::StreamClosed => ErrorCode::STREAM_CLOSED,
            Self::TooManyStreams => ErrorCode::REFUSED_STREAM,
            Self::WindowExceeded | Self::WindowOverflow => ErrorCode::FLOW_CONTROL_ERROR,
            Self::Backlog
            | Self::ClosedStreamFlood
            | Self::ContinuationFlood
            | Self::EmptyDataFlood
            | Self::HeaderBomb
            | Self::HeaderBlockTooLarge
            | Self::HeaderListTooLarge
            | Self::PingFlood
            | Self::RapidReset
            | Self::SettingsFlood
            | Self::UselessFrameFlood
            | Self::WindowUpdateFlood => ErrorCode::ENHANCE_YOUR_CALM,
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::error::Error for Violation {}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::Violation;

    #[test]
    fn every_violation_has_its_own_label() {
        let labels: HashSet<_> = Violation::ALL.iter().map(|violation| violation.as_str()).collect();
        assert_eq!(labels.len(), Violation::ALL.len());
    }
}
