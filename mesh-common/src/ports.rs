//! The ports the agent opens inside a pod's network namespace.

/// Outbound listeners. A proxied connect goes to the pod's own address at one of these, chosen by a hash of
/// the destination: several, so that a source port bound by the app can reach several destinations at once
/// and so that one pod may hold more than 28 000 proxied connections.
pub const OUTBOUND: [u16; 4] = [15001, 15002, 15003, 15004];
/// Inbound plaintext: `sk_lookup` assigns arrivals to this listener whatever port they dialled.
pub const INBOUND: u16 = 15006;
/// HBONE (mTLS HTTP/2 CONNECT), bound natively.
pub const HBONE: u16 = 15008;
/// DNS proxy, UDP and TCP.
pub const DNS: u16 = 15053;
/// The port DNS is captured on.
pub const DNS_CAPTURED: u16 = 53;

/// Whether only the pod itself, over loopback or its own address, may reach this port.
#[inline(always)]
pub const fn is_private(port: u16) -> bool {
    (port >= OUTBOUND[0] && port <= OUTBOUND[3]) || port == INBOUND || port == DNS
}
