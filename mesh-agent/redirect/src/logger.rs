//! Owns the reader of the programs' log statements.

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use aya_log::EbpfLogger;

/// Reads the programs' log records; readable when its descriptor is.
pub struct Logger(pub(crate) EbpfLogger<&'static dyn log::Log>);

impl fmt::Debug for Logger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Logger")
    }
}

impl Logger {
    /// Hands all waiting records to the `log` crate.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsFd for Logger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Logger {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
