//! The allocator's own figures: what the agent holds, and how often it allocates.
//!
//! Requests per allocation are what `bench http` prints; a resident size that grows while the allocated one does not is
//! fragmentation and no leak.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;
use serde::Deserialize;
use tikv_jemalloc_ctl::{
    epoch,
    stats::{allocated, resident},
    stats_print::{Options, stats_print},
};

use super::{counter, gauge};

/// What the allocator writes about itself, as far as it is read here.
#[derive(Debug, Deserialize)]
struct Report {
    jemalloc: Jemalloc,
}

#[derive(Debug, Deserialize)]
struct Jemalloc {
    #[serde(rename = "stats.arenas")]
    arenas: Arenas,
}

#[derive(Debug, Deserialize)]
struct Arenas {
    merged: Merged,
}

#[derive(Debug, Deserialize)]
struct Merged {
    small: Class,
    large: Class,
}

/// Allocations of small or of large objects. Those that a thread serves from its own cache are added when the cache
/// is filled or emptied.
#[derive(Debug, Deserialize)]
struct Class {
    nrequests: u64,
}

/// Writes the figures; what the allocator does not tell is left out.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    // Without this the figures are those of the last scrape.
    if epoch::advance().is_err() {
        return Ok(());
    }
    let sizes = [
        ("mesh_heap_allocated_bytes", "Bytes that the agent has allocated and not freed", allocated::read()),
        ("mesh_heap_resident_bytes", "Bytes of memory that the allocator holds", resident::read()),
    ];
    for (name, help, size) in sizes {
        if let Ok(bytes) = size {
            gauge(encoder, name, help, i64::try_from(bytes).unwrap_or(i64::MAX))?;
        }
    }
    match allocations() {
        Some(count) => counter(encoder, "mesh_heap_allocations", "Allocations since the start", count),
        None => Ok(()),
    }
}

fn allocations() -> Option<u64> {
    let mut options = Options::default();
    options.json_format = true;
    options.skip_constants = true;
    options.skip_per_arena = true;
    options.skip_bin_size_classes = true;
    options.skip_large_size_classes = true;
    options.skip_mutex_statistics = true;
    let mut report = Vec::new();
    stats_print(&mut report, options).ok()?;
    let Report { jemalloc } = serde_json::from_slice(&report).ok()?;
    let Merged { small, large } = jemalloc.arenas.merged;
    Some(small.nrequests + large.nrequests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allocator_tells_how_often_it_was_asked() {
        // Tests do not run on it: that it answers at all is what is shown.
        assert!(allocations().is_some());
        epoch::advance().unwrap();
        assert!(resident::read().unwrap() > 0);
    }
}
