//! Owns the sign of life the hooks look at before they send anything to the agent.

use std::sync::Arc;

use crate::{map::MapError, maps::Maps};

/// Writes the heartbeat. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    maps: Arc<Maps>,
}

impl Heartbeat {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// Publishes the oldest worker's stamp, CLOCK_MONOTONIC nanoseconds. To be called each 100 ms.
    pub fn stamp(&self, oldest_ns: u64) -> Result<(), MapError> {
        self.maps.heartbeat.put(&0, &oldest_ns)
    }

    /// Says that the agent is leaving: the hooks treat it as down at once instead of after three seconds.
    pub fn stop(&self) -> Result<(), MapError> {
        self.maps.heartbeat.put(&0, &0)
    }
}
