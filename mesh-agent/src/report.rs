//! Owns how an error is printed: once, at the edge, with its causes.

use std::error::Error;

/// An error with its whole source chain. Every `Display` of ours leaves its cause to `source()`, so that no
/// cause is printed twice.
pub fn report(error: &dyn Error) -> String {
    let mut out = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        out.push_str(": ");
        out.push_str(&cause.to_string());
        next = cause.source();
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("connect to upstream 10.0.0.7:8080")]
    struct Refused {
        source: io::Error,
    }

    #[test]
    fn each_cause_is_printed_once() {
        let error = Refused { source: io::Error::other("no route") };
        assert_eq!(super::report(&error), "connect to upstream 10.0.0.7:8080: no route");
    }
}
