//! Ctrl-C and its kin as messages, for programs that must clean up.

use std::sync::mpsc::{Receiver, channel};

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};

/// SIGINT, SIGTERM and SIGHUP as messages. Call it before any thread starts, so that all of them leave the signals to the
/// one that waits.
///
/// # Errors
/// When the kernel refuses.
pub fn stop_signals() -> anyhow::Result<Receiver<Signal>> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if sender.send(signal).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}
