//! `traceparent` (W3C Trace Context): which trace a connection belongs to.

use std::fmt;

use super::HeaderError;

/// Length of version 00, in bytes.
const LEN: usize = 55;
/// Longest value of a later version that is looked at, in bytes.
const LEN_MAX: usize = 512;

/// A trace and the span in it that made the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traceparent {
    /// Id of the trace, never 0.
    trace_id: u128,
    /// Id of the span, never 0.
    span_id: u64,
    /// The trace is recorded.
    pub sampled: bool,
}

impl Traceparent {
    /// A trace of these ids; random words where nothing else gives them. An id of 0 is not one and becomes 1.
    pub fn new(trace_id: u128, span_id: u64, sampled: bool) -> Self {
        Self { trace_id: trace_id.max(1), span_id: span_id.max(1), sampled }
    }

    /// Id of the trace.
    pub fn trace_id(&self) -> u128 {
        self.trace_id
    }

    /// Id of the span that made the request.
    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    /// Reads `00-TRACE-SPAN-FLAGS`. Of later versions the part that version 00 has is read.
    ///
    /// # Errors
    /// It is anything else; then a new trace begins.
    pub fn parse(value: &[u8]) -> Result<Self, HeaderError> {
        if value.len() > LEN_MAX {
            return Err(HeaderError::TooLong);
        }
        let text = std::str::from_utf8(value).map_err(|_| HeaderError::Bytes)?;
        let mut parts = text.splitn(5, '-');
        let [version, trace, span, flags, more] =
            [parts.next(), parts.next(), parts.next(), parts.next(), parts.next()];
        let version = hex(version, 2)?;
        if version == 0xff || (version == 0 && (more.is_some() || value.len() != LEN)) {
            return Err(HeaderError::Form);
        }
        let trace_id = hex(trace, 32)?;
        let span_id = u64::try_from(hex(span, 16)?).map_err(|_| HeaderError::Form)?;
        let sampled = hex(flags, 2)? & 1 == 1;
        if trace_id == 0 || span_id == 0 {
            return Err(HeaderError::Form);
        }
        Ok(Self { trace_id, span_id, sampled })
    }
}

/// Lower-case digits, exactly `len`.
fn hex(text: Option<&str>, len: usize) -> Result<u128, HeaderError> {
    let text = text.ok_or(HeaderError::Form)?;
    if text.len() != len || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(HeaderError::Form);
    }
    u128::from_str_radix(text, 16).map_err(|_| HeaderError::Form)
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_reads_back_as_it_was_written() {
        let parent = Traceparent::parse(TEXT.as_bytes()).unwrap();
        assert_eq!((parent.span_id(), parent.sampled), (0xb7ad_6b71_6920_3331, true));
        assert_eq!(parent.to_string(), TEXT);
        let none = Traceparent::new(0, 0, false);
        assert_eq!(Traceparent::parse(none.to_string().as_bytes()), Ok(none));
    }

    #[test]
    fn later_versions_are_read_as_far_as_they_are_known() {
        let later = TEXT.replacen("00", "cc", 1);
        for text in [later.clone(), format!("{later}-what-the-future-brings")] {
            assert_eq!(Traceparent::parse(text.as_bytes()), Traceparent::parse(TEXT.as_bytes()), "{text}");
        }
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        for text in [
            String::new(),
            "00".into(),
            TEXT.replacen("00", "ff", 1),
            TEXT.to_ascii_uppercase(),
            format!("{TEXT}-"),
            format!("{TEXT}-x"),
            format!(" {TEXT}"),
            TEXT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            TEXT.replace("b7ad6b7169203331", &"0".repeat(16)),
            TEXT.replace("b7ad", "+7ad"),
            TEXT.replace("0af7", "0a7"),
        ] {
            assert_eq!(Traceparent::parse(text.as_bytes()), Err(HeaderError::Form), "{text}");
        }
        assert_eq!(Traceparent::parse(&[b'a'; LEN_MAX + 1]), Err(HeaderError::TooLong));
    }
}
