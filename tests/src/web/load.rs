//! A load of requests that runs beside the test.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::messages::{Mix, MixReport};
use super::{Ended, start};
use crate::place::Place;
use crate::verdict::Failure;

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
        let mut child: Child = start(pod, "web-load", mix)?;
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
        Ok(Self { latest, stdin, reader, _process: Ended(child) })
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
