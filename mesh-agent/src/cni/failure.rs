//! Owns how the plugin says that something went wrong: the error object of the CNI specification.

use serde_json::{Value, json};

/// Codes of the specification that are used, and one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// A version that is not spoken.
    Version = 1,
    /// A variable of the environment is missing or wrong.
    Environment = 4,
    /// Standard input could not be read.
    Io = 5,
    /// The configuration is no JSON, or not of the right shape.
    Decode = 6,
    /// The configuration lacks something.
    Config = 7,
    /// Worth another try.
    TryLater = 11,
    /// The pod cannot be enrolled.
    NotEnrolled = 101,
}

/// An error as the runtime gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The object to be printed. The runtime shows `msg`, and kubelet makes an event of it.
    pub(super) fn to_json(&self) -> Value {
        json!({"cniVersion": "1.0.0", "code": self.code as u32, "msg": format!("nodemesh: {}", self.message)})
    }
}
