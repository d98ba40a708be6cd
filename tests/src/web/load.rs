//! A load of requests that runs beside the test.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::messages::{Mix, MixReport};
use super::{Ended, start};
use crate::place::Place;
use crate::verdict::Failure;
use crate::waiting::{NeverHappened, eventually};

/// A running load.
#[derive(Debug)]
pub struct WebLoad {
    latest: Arc<Mutex<MixReport>>,
    stdin: Option<ChildStdin>,
    reader: Option<JoinHandle<()>>,
    _process: Ended,
}

impl WebLoad {
    /// Start it in a pod.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(pod: &Place, mix: &Mix) -> Result<Self, Failure> {
        Ok(Self::of(start(pod, "web-load", mix)?))
    }

    /// One that is running: a process with pipes that ends in `pod-tool web-load`, however far away.
    #[must_use]
    pub fn of(mut child: Child) -> Self {
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let latest = Arc::new(Mutex::new(MixReport::default()));
        let write = Arc::clone(&latest);
        let reader = stdout.map(|stdout| {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines() {
                    let report = line.ok().and_then(|line| serde_json::from_str(&line).ok());
                    let Some(report) = report else { break };
                    *write.lock().unwrap_or_else(PoisonError::into_inner) = report;
                }
            })
        });
        Self { latest, stdin, reader, _process: Ended(child) }
    }

    /// Wait for so many more good answers; what failed meanwhile is in the report.
    ///
    /// # Errors
    /// When they do not come in time.
    pub fn go_on(&self, more: u64, within: Duration) -> Result<MixReport, NeverHappened> {
        let before = self.report().ok();
        eventually(within, || self.report(), |now| now.ok() >= before + more)
    }

    /// What became of its requests until some tenths of a second ago.
    #[must_use]
    pub fn report(&self) -> MixReport {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Let requests under way finish, and return what became of all.
    #[must_use]
    pub fn stop(mut self) -> MixReport {
        drop(self.stdin.take());
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
        self.report()
    }
}
