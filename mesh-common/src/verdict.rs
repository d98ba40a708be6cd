//! Cached policy verdicts for Direct connections.

shared! {
    /// Key of `VERDICTS`.
    pub struct VerdictKey {
        /// Netns cookie of the client pod.
        pub netns_cookie: u64,
        /// Destination workload id.
        pub workload: u64,
        /// Destination's netns cookie: a new incarnation of the workload has no verdicts.
        pub incarnation: u64,
        /// Destination port, host order.
        pub port: u16,
        /// [`crate::addr::FAMILY_V4`] or [`crate::addr::FAMILY_V6`].
        pub family: u16,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Value of `VERDICTS`. Void unless `policy_gen` equals the destination's current generation.
    pub struct Verdict {
        /// Generation read *before* the policy was evaluated.
        pub policy_gen: u64,
        /// [`VERDICT_ALLOW`] or [`VERDICT_DENY`].
        pub action: u32,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Value of `POLICY_GEN`.
    pub struct PolicyGen {
        /// Current generation; never returns.
        pub generation: u64,
        /// Hash of what verdicts of this generation were made from, for the agent alone: the next agent keeps the
        /// generation, and with it the verdicts, if it would judge from the same.
        pub basis: u64,
    }
}

/// The connection may go Direct.
pub const VERDICT_ALLOW: u32 = 1;
/// The connection is refused at connect.
pub const VERDICT_DENY: u32 = 2;
