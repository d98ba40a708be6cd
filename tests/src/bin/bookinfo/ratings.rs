//! Ratings as they travel from the ratings service to the reviews service.

use serde::{Deserialize, Serialize};

/// The answer of the ratings service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ratings {
    pub(crate) id: u32,
    pub(crate) pod: String,
    /// Stars of the first and the second reviewer, 0 to 5.
    pub(crate) stars: [u8; 2],
}
